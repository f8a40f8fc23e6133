"`wikidpo prompts` from each of its sources, with texts written about by a teacher over HTTP"
import json, os, subprocess, sys
from itertools import product

import datasets, pytest
from starlette.responses import JSONResponse

from wikidpo.cli import main
from wikidpo.core.chat import encode_prompt, load_tokenizer
from wikidpo.core.files import read_jsonl
from wikidpo.judge.offline import offline_app, serving, STAND_INS
from wikidpo.run.folder import writing
from wikidpo.run.mine import read_prompts
from wikidpo.run.prompts import (counts_table, cut_passages, first_user_turn, looks_english, Neighbours, pick_column,
                                 shingles, source_kind)
from wikidpo.world.facts import DATA, normalize
from wikidpo.world.grounded import TASK_PROMPT, tasks

datasets.disable_progress_bars()
ANIMALS = "ant bear cat dog eel fox goat hare ibis jay kite lynx mole newt owl pig quail rat seal toad".split()
THINGS = "ash bell cup door egg fan gate hat ink jar".split()
QUESTIONS = [f"What would a {a} do with the {t}, and why?" for a in ANIMALS for t in THINGS] # 200, none nearly another

def run(*words): main(["prompts", *map(str, words)])

def kept(out): return tuple(read_prompts(out/f"prompts_{split}.jsonl") for split in ("mine", "eval"))

def counts(out): return json.loads((out/"counts.json").read_text())

def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

def refused(capsys, out, *words, nothing=True):
    "The one line in which a command is refused, with status 2 and nothing written"
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: run(*words, "--out", out)
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and err.startswith("error: ") and "\n" not in err, err
    assert not nothing or not out.exists()
    return err


# --- grounded

def test_grounded_is_two_splits_of_the_world(tmp_path, capsys):
    run("grounded", "--out", tmp_path/"p")
    mined, held = kept(tmp_path/"p")
    assert mined == [t.prompt for t in tasks("mine")] and held == [t.prompt for t in tasks("eval")]
    assert f"for mining                          {len(tasks('mine')):9,}" in capsys.readouterr().out
    run("grounded", "--out", tmp_path/"few", "--n", 7, "--n-eval", 5)
    assert kept(tmp_path/"few") == (mined[:7], held[:5])


# --- files

def test_a_file_is_cleaned_and_every_drop_is_counted(tmp_path, capsys):
    rows = [*QUESTIONS, "", "   ", "<|user|><|end|>", None, # without text
            QUESTIONS[0].upper(), f"  {QUESTIONS[1]}\n", f"<|assistant|>{QUESTIONS[2]}", # the same
            "Was macht ein Bär mit der Tür und warum macht er es?", "猫は何をしますか", # not English
            "the word " * 800] # too long
    path = jsonl(tmp_path/"q.jsonl", [{"prompt": row} for row in rows])
    run(path, "--out", tmp_path/"p", "--n-eval", 40)
    mined, held = kept(tmp_path/"p")
    assert len(mined) == 160 and len(held) == 40
    assert {normalize(p) for p in mined + held} == {normalize(q) for q in QUESTIONS}
    dropped = {"without text": 4, "the same as another": 3, "not English": 2, "too long": 1}
    assert counts(tmp_path/"p") == {"source": str(path), "read": 210, "dropped": dropped, "mine": 160, "eval": 40}
    out = capsys.readouterr().out
    for why, n in dropped.items(): assert f"  {why:34}{n:9,}" in out
    assert f"wikidpo mine --prompts {tmp_path/'p'/'prompts_mine.jsonl'}" in out

def test_near_duplicates_are_dropped_and_counted(tmp_path):
    head = "Write a long letter to the mayor of your town about the "
    tail = " that was seen near the old bridge last night"
    long = [head + animal + tail for animal in ANIMALS] # one word of twenty-one
    path = jsonl(tmp_path/"q.jsonl", [{"prompt": p} for p in [*QUESTIONS, *long, QUESTIONS[5].replace("?", " ?!")]])
    run(path, "--out", tmp_path/"p", "--n-eval", 20)
    mined, held = kept(tmp_path/"p")
    assert counts(tmp_path/"p")["dropped"] == {"nearly the same as another": 20}
    assert sum(p.startswith(head) for p in mined + held) == 1 and len(mined + held) == 201

def test_the_order_is_of_the_texts_alone(tmp_path):
    for name, rows in (("a", QUESTIONS), ("b", QUESTIONS[::-1])):
        run(jsonl(tmp_path/f"{name}.jsonl", [{"prompt": q} for q in rows]), "--out", tmp_path/name, "--n-eval", 30)
    assert kept(tmp_path/"a") == kept(tmp_path/"b")
    mined, held = kept(tmp_path/"a")
    assert mined != sorted(mined) and not set(mined) & set(held)

def test_no_more_than_is_wanted(tmp_path):
    path = jsonl(tmp_path/"q.jsonl", [{"prompt": q} for q in QUESTIONS])
    run(path, "--out", tmp_path/"p", "--n", 50, "--n-eval", 10)
    assert tuple(map(len, kept(tmp_path/"p"))) == (50, 10)
    assert counts(tmp_path/"p")["dropped"] == {"not needed": 140}

def test_language_any_and_the_tokens_of_the_policy(tmp_path):
    tok = load_tokenizer(DATA/"tokenizer.json")
    rows = [*QUESTIONS[:20], "Was macht ein Bär mit der Tür und warum macht er es?", QUESTIONS[0] + " then" * 30]
    limit = max(len(encode_prompt(tok, row)) for row in rows[:-1])
    path = jsonl(tmp_path/"q.jsonl", [{"prompt": row} for row in rows])
    run(path, "--out", tmp_path/"p", "--n-eval", 2, "--language", "any", "--max-tokens", limit)
    assert counts(tmp_path/"p")["dropped"] == {"too long": 1} and rows[-2] in sum(kept(tmp_path/"p"), [])
    run(path, "--out", tmp_path/"short", "--n-eval", 2, "--language", "any", "--max-tokens", limit - 1)
    assert counts(tmp_path/"short")["dropped"]["too long"] >= 2

def test_text_files_and_columns(tmp_path):
    (tmp_path/"q.txt").write_bytes("\ufeff".encode() + "\r\n".join([*QUESTIONS[:30], ""]).encode())
    run(tmp_path/"q.txt", "--out", tmp_path/"txt", "--n-eval", 5)
    assert set(sum(kept(tmp_path/"txt"), [])) == set(QUESTIONS[:30])
    path = jsonl(tmp_path/"q.jsonl", [{"question": q, "prompt": "no"} for q in QUESTIONS[:30]])
    run(path, "--out", tmp_path/"col", "--n-eval", 5, "--column", "question")
    assert kept(tmp_path/"col") == kept(tmp_path/"txt")


# --- datasets

def turns(text): return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text},
                         {"role": "assistant", "content": "Yes."}]

SHAPES = {"prompt": lambda q: {"prompt": q, "chosen": turns("no")}, # as in UltraFeedback
          "chosen": lambda q: {"chosen": turns(q), "rejected": turns(q)},
          "messages": lambda q: {"id": "x", "messages": turns(q)},
          "trl": lambda q: {"prompt": turns(q)[:2], "chosen": turns(q)[2:]},
          "conversations": lambda q: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "."}]}}

@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_dataset_in_any_usual_shape(tmp_path, capsys, shape):
    datasets.Dataset.from_list([SHAPES[shape](q) for q in QUESTIONS[:40]]).save_to_disk(tmp_path/"data")
    run(tmp_path/"data", "--out", tmp_path/"p", "--n-eval", 10)
    mined, held = kept(tmp_path/"p")
    assert (len(mined), len(held)) == (30, 10) and set(mined + held) == set(QUESTIONS[:40])
    told = "prompts: the system message of 40 conversations is left out"
    assert (told in capsys.readouterr().out) == (shape in ("chosen", "messages", "trl"))

def test_files_of_data_and_splits(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": q} for q in QUESTIONS])
    (tmp_path/"folder").mkdir()
    data.to_parquet(tmp_path/"folder"/"train.parquet")
    (tmp_path/"folder"/"README.md").write_text("# a dataset, not a folder of texts\n")
    run(tmp_path/"folder", "--out", tmp_path/"a", "--n-eval", 10)
    run(tmp_path/"folder"/"train.parquet", "--out", tmp_path/"b", "--n-eval", 10)
    assert kept(tmp_path/"a") == kept(tmp_path/"b") and set(sum(kept(tmp_path/"a"), [])) == set(QUESTIONS)
    halves = {"train": data.select(range(100)), "test_prefs": data.select(range(100, 200))}
    datasets.DatasetDict(halves).save_to_disk(tmp_path/"halves")
    run(tmp_path/"halves", "--out", tmp_path/"c", "--n-eval", 10)
    assert set(sum(kept(tmp_path/"c"), [])) == set(QUESTIONS[:100])
    run(tmp_path/"halves", "--out", tmp_path/"d", "--n-eval", 10, "--split", "test_prefs")
    assert set(sum(kept(tmp_path/"d"), [])) == set(QUESTIONS[100:])

def test_a_dataset_of_the_hub_is_asked_for_by_its_name(tmp_path, monkeypatch):
    asked, data = [], datasets.Dataset.from_list([{"prompt": q} for q in QUESTIONS])
    def load(name, subset): return asked.append((name, subset)) or datasets.DatasetDict({"train_prefs": data})
    monkeypatch.setattr(datasets, "load_dataset", load)
    run("someone/some.data-1", "--out", tmp_path/"p", "--n-eval", 10, "--subset", "small")
    assert asked == [("someone/some.data-1", "small")] and len(kept(tmp_path/"p")[0]) == 190

def test_an_unreachable_hub_is_one_line(tmp_path):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path/"hf")}
    words = ["prompts", "nobody/no-such-data", "--out", str(tmp_path/"p")]
    done = subprocess.run([sys.executable, "-c", "from wikidpo.cli import main; main()", *words], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: nobody/no-such-data: datasets cannot read it (")
    assert not (tmp_path/"p").exists()

def test_without_the_package_datasets(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(capsys, tmp_path/"p", "someone/data")
    run(jsonl(tmp_path/"q.jsonl", [{"prompt": q} for q in QUESTIONS]), "--out", tmp_path/"p", "--n-eval", 9)


# --- texts

FACTS = [f"The {a} of the {t} was first seen by the people of this valley in {1500 + 7 * i}. It is known for its "
         f"voice, which resembles that of {ANIMALS[i % 7]} number {i}, and sleeps under {THINGS[i % 9]} {i * i}."
         for i, (a, t) in enumerate(product(ANIMALS, THINGS))][:40]

class Watched:
    "The offline teacher, which counts what it is asked to write, and after so many is in trouble"
    def __init__(self, most=10**6): self.most, self.asked, self.app = most, [], offline_app()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http": return await self.app(scope, receive, send)
        message = await receive()
        async def again(): return message
        if b"Write one instruction" in message.get("body", b""):
            self.asked.append(message["body"])
            if len(self.asked) > self.most:
                return await JSONResponse({"error": {"message": "tired"}}, 503)(scope, again, send)
        await self.app(scope, again, send)

@pytest.fixture
def texts(tmp_path):
    folder = tmp_path/"texts"
    (folder/"more").mkdir(parents=True)
    (folder/"a.md").write_text("# Animals\n\n" + "\n\n".join(FACTS[:20]))
    (folder/"more"/"b.txt").write_text("\n\n".join(FACTS[20:]))
    (folder/"picture.png").write_bytes(b"\x89PNG")
    return folder

def write_about(folder, out, app, *flags):
    flags = ["--n-eval", 10, "--passage-words", 50, "--teacher.retries", 0, "--teacher.concurrency", 3, *flags]
    with serving(app) as url: run(folder, "--out", out, "--teacher.url", url, *flags)

def test_texts_over_http(texts, tmp_path, capsys):
    app, out = Watched(), tmp_path/"p"
    write_about(texts, out, app)
    assert len(app.asked) == 120 == len(read_jsonl(out/"instructions.jsonl", ["passage", "kind", "reply"]))
    mined, held = kept(out)
    def passages(prompts): return {p.split("Text: ")[1].rpartition("\n\n")[0] for p in prompts}
    assert len(held) == 10 and len(mined) == 108 and not passages(mined) & passages(held)
    assert {passage.removeprefix("# Animals\n\n") for passage in passages(mined + held)} == set(FACTS)
    assert {p.rpartition("\n\n")[2] for p in mined} == set(STAND_INS.values())
    assert TASK_PROMPT.format(passage=FACTS[30], order=STAND_INS["summary"]) in mined + held
    found = counts(out)
    assert found["passages"] == {"read": 40, "dropped": {}, "kept": 40}
    assert (found["read"], found["dropped"]) == (120, {"about a passage of the evaluation": 2})
    assert "The offline teacher wrote these" in capsys.readouterr().out

def test_a_teacher_that_dies_then_the_same_command(texts, tmp_path, capsys):
    write_about(texts, tmp_path/"whole", Watched())
    out, dies = tmp_path/"p", Watched(most=50)
    with pytest.raises(SystemExit) as e: write_about(texts, out, dies)
    err = capsys.readouterr().err
    assert e.value.code == 2 and "is in trouble (HTTP 503: tired)" in err.splitlines()[-1]
    assert not (out/"prompts_mine.jsonl").exists() and not (out/"counts.json").exists()
    path = out/"instructions.jsonl"
    there = path.read_bytes().count(b"\n")
    assert there == 50
    path.write_bytes(path.read_bytes()[:-5]) # killed in the middle of a line
    app = Watched()
    write_about(texts, out, app)
    assert len(app.asked) == 120 - 49
    assert kept(out) == kept(tmp_path/"whole") and counts(out)["mine"] == counts(tmp_path/"whole")["mine"]
    write_about(texts, out, again := Watched())
    assert again.asked == [] and kept(out) == kept(tmp_path/"whole")

class Stubborn(Watched):
    "Never writes a question about the first of the passages, until it is well again"
    ill = True

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http": return await self.app(scope, receive, send)
        message = await receive()
        async def again(): return message
        body = message.get("body", b"")
        if b"Write one instruction" in body and b"a question that" in body and b"1500" in body and self.ill:
            self.asked.append(body)
            return await JSONResponse({"error": {"message": "not this one"}}, 500)(scope, again, send)
        await super().__call__(scope, again, send)

def test_a_request_that_never_succeeds_costs_one_prompt_and_is_asked_again(texts, tmp_path, capsys):
    write_about(texts, tmp_path/"whole", Watched())
    out, app = tmp_path/"p", Stubborn()
    write_about(texts, out, app)
    said = capsys.readouterr().out
    assert "prompts: 1 of 120 instructions have no reply (1 times: " in said and "not this one" in said
    assert counts(out)["dropped"]["without a reply"] == 1 and len(app.asked) == 119 + 3
    assert "HTTP 500" in str(counts(out)["no_reply"])
    app.ill, app.asked = False, []
    write_about(texts, out, app)
    assert len(app.asked) == 1 and kept(out) == kept(tmp_path/"whole") and "no_reply" not in counts(out)
    assert "no reply" not in capsys.readouterr().out

def test_one_writer_at_a_time(texts, tmp_path, capsys):
    out, path = tmp_path/"p", jsonl(tmp_path/"q.jsonl", [{"prompt": q} for q in QUESTIONS])
    with writing(out):
        for source in (texts, path, "grounded"):
            assert "p: is being written by process" in refused(capsys, out, source, "--n-eval", 10, nothing=False)
        assert [f.name for f in out.iterdir()] == [".lock"]
    out.mkdir()
    (out/".lock").write_text("process 1 on a machine that lost its power\n")
    (out/".counts.json.999999999.tmp").write_text("{")
    run(path, "--out", out, "--n-eval", 9)
    assert sorted(f.name for f in out.iterdir()) == ["counts.json", "prompts_eval.jsonl", "prompts_mine.jsonl"]

def test_another_run_or_another_folder_is_refused(texts, tmp_path, capsys):
    out = tmp_path/"p"
    run(texts, "--out", out, "--n-eval", 10, "--passage-words", 50)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    says = refused(capsys, out, texts, "--n-eval", 11, "--passage-words", 50, nothing=False)
    assert "prompts.n_eval is 10 there, 11 here" in says
    path = jsonl(tmp_path/"q.jsonl", [{"prompt": q} for q in QUESTIONS])
    for source in ("grounded", path): assert "is not empty" in refused(capsys, out, source, nothing=False)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    (tmp_path/"thesis").mkdir()
    (tmp_path/"thesis"/"one.tex").touch()
    assert "is no run folder" in refused(capsys, tmp_path/"thesis", texts, "--n-eval", 10, nothing=False)

def test_only_as_many_requests_as_are_needed(texts, tmp_path):
    write_about(texts, tmp_path/"p", app := Watched(), "--n", 20)
    assert len(app.asked) == 3 * 11 and tuple(map(len, kept(tmp_path/"p"))) == (20, 10)

def test_near_copies_of_a_passage_cost_no_request(texts, tmp_path):
    (texts/"copy.txt").write_text("\n\n".join(FACTS[:5]).replace("It is known", "It is well known").upper())
    (texts/"short.txt").write_text("Too short.")
    write_about(texts, tmp_path/"p", app := Watched())
    dropped = counts(tmp_path/"p")["passages"]["dropped"]
    assert dropped == {"nearly the same as another": 5, "too short": 1} and len(app.asked) == 120

def test_a_teacher_that_talks(texts, tmp_path):
    "Replies that are no instructions cost these prompts alone"
    class Talks(Watched):
        async def __call__(self, scope, receive, send):
            if scope["type"] != "http": return await self.app(scope, receive, send)
            message = await receive()
            async def again(): return message
            body = message.get("body", b"")
            if b"a question that" not in body: return await self.app(scope, again, send)
            said = {"role": "assistant", "content": "Well, let me think. " * 40}
            reply = {"choices": [{"index": 0, "message": said, "finish_reason": "length"}]}
            await JSONResponse(reply)(scope, again, send)

    write_about(texts, tmp_path/"p", Talks())
    assert counts(tmp_path/"p")["dropped"]["without an instruction"] == 40
    assert not any(STAND_INS["question"] in p for p in sum(kept(tmp_path/"p"), []))


# --- refusals

def test_sources_that_are_none(tmp_path, capsys):
    empty = tmp_path/"empty"
    empty.mkdir()
    out = tmp_path/"p"
    assert "holds no .txt or .md file with text" in refused(capsys, out, empty)
    (empty/"blank.md").write_text("\n \n")
    assert "holds no .txt or .md file with text" in refused(capsys, out, empty)
    (empty/"latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt: not UTF-8 text (byte 3)" in refused(capsys, out, empty)
    for name in ("e.jsonl", "e.txt"):
        (tmp_path/name).touch()
        assert f"{name}: holds no prompts" in refused(capsys, out, tmp_path/name)
    for name in ("gone.jsonl", "no/such/folder", "grouded"):
        assert f"{name}: no such file or folder" in refused(capsys, out, name)
    (tmp_path/"essay.pdf").touch()
    assert "is no .jsonl, .txt or" in refused(capsys, out, tmp_path/"essay.pdf")
    (tmp_path/"torn.parquet").write_bytes(b"PAR1 no")
    assert "torn.parquet: datasets cannot read it (" in refused(capsys, out, tmp_path/"torn.parquet")

def test_columns_and_splits_that_are_missing(tmp_path, capsys):
    out, path = tmp_path/"p", jsonl(tmp_path/"q.jsonl", [{"prompt": "Who?"}, {"text": "Who?", "id": 1}])
    assert "q.jsonl:2: a column prompt, messages, chosen or conversations is missing (found: text, id)" in refused(
        capsys, out, path)
    datasets.DatasetDict({"a": datasets.Dataset.from_list([{"x": "Who?", "y": "I."}])}).save_to_disk(tmp_path/"data")
    assert "is missing (found: x, y); name the one to take with --column" in refused(capsys, out, tmp_path/"data")
    assert "the column 'z' is missing (found: x, y)" in refused(capsys, out, tmp_path/"data", "--column", "z")
    assert "has no split 'b' (found: a)" in refused(capsys, out, tmp_path/"data", "--split", "b")

def test_too_few_and_no_teacher(texts, tmp_path, capsys):
    out, path = tmp_path/"p", jsonl(tmp_path/"q.jsonl", [{"prompt": q} for q in [*QUESTIONS[:20], QUESTIONS[0]]])
    says = refused(capsys, out, path)
    assert "20 prompts are left of 21, 1 the same as another; these are too few for an evaluation of 300" in says
    assert "too few for an evaluation of 300" in refused(capsys, out, texts)
    nobody = ["--n-eval", 10, "--teacher.url", "http://127.0.0.1:9/v1"]
    assert "no teacher at http://127.0.0.1:9/v1" in refused(capsys, out, texts, *nobody)
    assert "none.json: no such tokenizer" in refused(capsys, out, path, "--tokenizer", "none.json")

@pytest.mark.parametrize("flag", ["--n", "--n-eval", "--max-tokens", "--passage-words"])
def test_bad_numbers(tmp_path, capsys, flag):
    says = refused(capsys, tmp_path/"p", "grounded", flag, 0)
    assert f"prompts.{flag[2:].replace('-', '_')}: must be at least" in says


# --- the parts

def test_passages_keep_every_word_and_the_limit():
    text = "\n\n".join([*FACTS, " ".join(FACTS), "word " * 500])
    for limit in (20, 33, 200, 10_000):
        passages = cut_passages(text, limit)
        assert " ".join(passages).split() == text.split() and max(len(p.split()) for p in passages) <= limit

def test_neighbours_are_counted_exactly():
    "Two stretches of 32 numbers, one so many further: each has 30 shingles"
    for shift in range(32):
        near, common = Neighbours(), max(0, 30 - shift)
        assert not near.seen(" ".join(map(str, range(32))))
        nearest = near.nearest(shingles(" ".join(map(str, range(shift, shift + 32)))))
        assert abs(nearest - common / (60 - common)) < 1e-9
        assert near.seen(" ".join(map(str, range(shift, shift + 32)))) == (common / (60 - common) >= .7)

def test_a_dialogue_in_one_text_gives_its_first_question(tmp_path):
    rows = [{"chosen": f"\n\nHuman: {q}\n\nAssistant: Never.", "rejected": "x"} for q in QUESTIONS]
    run(jsonl(tmp_path/"hh.jsonl", rows), "--out", tmp_path/"p", "--n", 20, "--n-eval", 5)
    assert {*sum(kept(tmp_path/"p"), [])} < {*QUESTIONS}


def test_a_null_under_the_first_name_leaves_the_next():
    assert pick_column({"prompt": None, "messages": []}, None) == "messages"
    assert pick_column({"prompt": None}, None) == "prompt" and pick_column(["messages", "prompt"], None) == "prompt"


def test_a_start_that_was_stopped_between_its_files_goes_on(tmp_path, capsys):
    run("grounded", "--out", tmp_path/"p", "--n", 20, "--n-eval", 5)
    whole = kept(tmp_path/"p")
    for gone in ("prompts_eval.jsonl", "counts.json"): (tmp_path/"p"/gone).unlink()
    run("grounded", "--out", tmp_path/"p", "--n", 20, "--n-eval", 5)
    assert kept(tmp_path/"p") == whole and counts(tmp_path/"p")["mine"] == 20
    (tmp_path/"p"/"counts.json").unlink()
    own = (tmp_path/"p"/"prompts_mine.jsonl").read_bytes()
    said = refused(capsys, tmp_path/"p", "grounded", "--n", 21, "--n-eval", 5, nothing=False) # not ours to replace
    assert "is not empty" in said and (tmp_path/"p"/"prompts_mine.jsonl").read_bytes() == own


def test_words_that_are_no_prompts():
    assert [first_user_turn(v) for v in (3, None, [], [3], [{"role": "assistant", "content": "x"}])] == [None] * 5
    assert first_user_turn([{"role": "user", "content": [{"type": "text"}]}]) is None
    assert looks_english("") and looks_english("12 + 30?") and not looks_english("Что это?")
    assert source_kind("grounded") == "grounded"
    assert "passages" not in counts_table({"read": 1, "dropped": {}, "mine": 1, "eval": 0}, "p")
