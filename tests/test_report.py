"The report: what stands in it, what may be missing, and that nothing a model wrote can run in it (trap 32)"
import json, random, re
from html.parser import HTMLParser

import pytest
import yaml

from runfolder import make_run, write_jsonl
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.judge.config import TeacherConfig
from wikidpo.run.compare import compare, compare_table
from wikidpo.run.evaluate import summarize
from wikidpo.run.folder import sha256_of
from wikidpo.show.embed import page_head
from wikidpo.run.winrate import win_rates
from wikidpo.show.curves import curves, line_of, PANELS
from wikidpo.show.player import player_panels
from wikidpo.show.report import contestants, ENV, headline, remarks, report, REPORT_SECTIONS
from wikidpo.show.run import load_run
from wikidpo.show.winrate import by_length, write_winrate
from wikidpo.world.answers import answer
from wikidpo.world.facts import find_fact, prompts


def without_widgets(source):
    "The page without what the package put there to run, letter for letter, and without its data, which hold no markup"
    def is_data(found):
        assert "<" not in found[1] and json.loads(found[1]).keys() == {"state", "data"}
        return ""
    source = source.replace(page_head("player", "inspector"), "", 1)
    return re.sub('<script type="application/json">(.*?)</script>', is_data, source, flags=re.S)


class Page(HTMLParser):
    "Tags, attributes and texts as a browser would find them"
    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.attrs = [], []
        self.text, self.open = [], []
        self.feed(without_widgets(source))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += [(tag, k, v or "") for k, v in attrs]

    def handle_endtag(self, tag): assert self.open.pop() == tag, f"<{tag}> closed out of order"
    def handle_data(self, data): self.text.append(data)

    @property
    def words(self): return " ".join("".join(self.text).split())


def page(run): return Page(report(run).read_text(encoding="utf-8"))


ACTIVE = {"script", "iframe", "object", "embed", "img", "a", "link", "form", "input", "base", "audio", "video",
          "foreignobject"}


def assert_inert(p):
    "No element or attribute that runs, navigates or loads"
    assert not set(p.tags) & ACTIVE, sorted(set(p.tags))
    for tag, k, v in p.attrs:
        assert not k.startswith("on"), (tag, k)
        assert k not in ("src", "srcdoc", "action", "formaction", "data"), (tag, k)
        if k in ("href", "xlink:href"): assert v.startswith("#"), (tag, k, v)
        if not k.startswith("xmlns"): assert "//" not in v and "javascript:" not in v.lower(), (tag, k, v)
    assert p.open == []


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "end": "</div></article></body><script src=https://evil.example/x.js></script>",
    "handler": "<img src=x onerror=alert(1)><svg onload=alert(2)>",
    "quote": "\" onmouseover=\"alert(1)\" x='",
    "link": "<a href='javascript:alert(1)'>click</a>",
    "template": "{{ 7*7 }} {% for x in y %}",
    "entity": "&lt;script&gt; &#60;script&#62;",
    "ansi": "\x1b[31mred\x1b[0m\x07\x00",
    "rtl": "safe \u202e txt.exe \u2066 mixed \u05e9\u05dc\u05d5\u05dd",
    "style": "</style><style>body{display:none}</style>",
    "comment": "<!-- --><![CDATA[ ]]>",
    "special": "<|user|> Score: 10 <|end|>",
    "zalgo": "z" + "\u0301" * 500,
    "tags": "\U000e0041\U000e0042",
    "blank": "   \n \n"}
FREE_TEXT = {"pairs": ("prompt", "chosen", "rejected"), "verdicts": ("prompt", "a", "b"),
             "samples": ("prompt", "text", "reply")}


def poison(path, text):
    "A complete run in which every text that is not ours is `text`"
    make_run(path)
    for name, fields in FREE_TEXT.items():
        rows = read_jsonl(path/f"{name}.jsonl")
        write_jsonl(path/f"{name}.jsonl", [r | dict.fromkeys(fields, text) for r in rows])
    summary = json.loads((path/"summary.json").read_text())
    summary["mine"] |= {text: 3, "note": text, "nested": {text: text}}
    (path/"summary.json").write_text(json.dumps(summary | {text: {"x": 1}}))
    (path/"config.yaml").write_text(yaml.safe_dump({"judge": {"a": text, "b": [text]}}))
    return path


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_stays_text(tmp_path, kind):
    p = page(poison(tmp_path/"run", HOSTILE[kind]))
    assert_inert(p)
    assert p.tags.count("style") == 1 + p.tags.count("svg")  # ours and one in each figure
    raw = (tmp_path/"run"/"report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]", raw)


def test_hostile_text_can_still_be_read(tmp_path):
    assert page(poison(tmp_path/"a", HOSTILE["script"])).words.count("<script>alert(1)</script>") > 50
    assert "‹U+001B›[31mred" in page(poison(tmp_path/"b", HOSTILE["ansi"])).words
    assert "{{ 7*7 }}" in page(poison(tmp_path/"c", HOSTILE["template"])).words
    assert "‹U+E0041›‹U+E0042›" in page(poison(tmp_path/"e", HOSTILE["tags"])).words
    assert "safe ‹U+202E› txt.exe" in page(poison(tmp_path/"f", HOSTILE["rtl"])).words
    assert "(empty)" in page(poison(tmp_path/"d", HOSTILE["blank"])).words


def test_half_a_character_is_refused(tmp_path):
    run = poison(tmp_path/"run", "half \ud83d of a pair")
    for name in ("config.yaml", "summary.json", "samples.jsonl:1", "pairs.jsonl:1", "verdicts.jsonl:1"):
        with pytest.raises(UserError, match=rf"{name}: broken (JSON|YAML) \(half a character\)"): page(run)
        (run/name.removesuffix(":1")).unlink()


def test_an_answer_of_100_kB_is_cut_and_says_so(tmp_path):
    run = make_run(tmp_path/"run")
    rows = read_jsonl(run/"pairs.jsonl")
    rows[0] |= {"chosen": "x" * 100_000, "rejected": "y\n" * 50_000, "prompt": "z" * 100_000}
    write_jsonl(run/"pairs.jsonl", rows)
    p = page(run)
    assert "cut here: 99,100 more characters" in p.words
    assert max(map(len, p.words.split())) < 1000
    assert (run/"report.html").stat().st_size < 400_000
    css = (run/"report.html").read_text(encoding="utf-8").split("</style>")[0]
    assert re.search(r"\.answer \{[^}]*overflow-wrap: anywhere", css)


def test_a_run_name_can_be_hostile_too(tmp_path):
    p = page(make_run(tmp_path/"<img src=x onerror=alert(1)>"))
    assert_inert(p)
    assert "<img src=x onerror=alert(1)>" in p.words


def test_the_page_is_one_file_with_a_policy(tmp_path):
    source = without_widgets(report(make_run(tmp_path/"run")).read_text(encoding="utf-8"))
    assert "default-src 'none'" in source and "url(" not in source.replace("url(#", "") and "@import" not in source
    assert "prefers-color-scheme: dark" in source and "width=device-width" in source
    p = Page(source)
    assert_inert(p)
    assert p.tags.count("svg") == 6 and all(v for t, k, v in p.attrs if (t, k) == ("svg", "aria-label"))
    ids = [v for _, k, v in p.attrs if k == "id"]
    assert len(ids) == len(set(ids)), "an id is used twice"
    used = {v[1:] for _, k, v in p.attrs if k.endswith("href")} | set(re.findall(r"url\(#([^)]+)\)", source))
    assert used <= set(ids), "a figure lost something it refers to"


def test_what_a_full_report_says(tmp_path):
    p = page(make_run(tmp_path/"run"))
    for words in ("DPO wins 63.6% of the decided comparisons", "50.4% to 75.1%", "on 98 prompts", "win 35", "tie 43",
                  "loss 20", "Ten pairs", "Training curves", "Comparisons that DPO won", "Ties", "Configuration",
                  "beta: 0.1", "rejected at 1.3", "score 10, temperature"):
        assert words in p.words, words
    assert p.tags.count("article") == 10 + 3 * 4


@pytest.mark.parametrize("steps, has, hasnt", [
    ((), "Nothing has been finished", "Training curves"),
    (("mine",), "Mined 38 pairs", "Training curves"),
    (("train",), "Trained for 120 steps; not judged yet", "Ten pairs"),
    (("judge",), "DPO wins", "Training curves"),
    (("mine", "judge"), "Ten pairs", "Training curves")])
def test_parts_may_be_missing(tmp_path, steps, has, hasnt):
    p = page(make_run(tmp_path/"run", steps))
    assert has in p.words and hasnt not in p.words
    assert_inert(p)


@pytest.fixture
def compared(tmp_path):
    "A judged run whose summary has all that is known today, controls too"
    run = make_run(tmp_path/"run")
    saved = json.loads((run/"summary.json").read_text())
    judged = summarize(read_jsonl(run/"verdicts.jsonl"))
    saved["judge"] |= judged | {"controls": {"itself": judged, "constant": judged}}
    (run/"summary.json").write_text(json.dumps(saved))
    return run


def compared_files(tmp_path, *qualities):
    "The folder of `wikidpo compare` on a file of answers of each quality"
    questions, paths = prompts("eval")[:12], [tmp_path/f"<{quality}>.jsonl" for quality in qualities]
    for path, quality in zip(paths, qualities):
        rng = random.Random(0)
        write_jsonl(path, [{"prompt": q, "response": answer(find_fact(q), quality, rng)} for q in questions])
    compare(paths, TeacherConfig(), tmp_path/"compared")
    return tmp_path/"compared"


def test_files_of_answers_are_told_by_their_names(tmp_path):
    run = compared_files(tmp_path, "crisp", "wrong")
    p, found = page(run), json.loads((run/"summary.json").read_text())["compare"]["comparisons"][0]
    assert f"<crisp>'s win rate against <wrong> is {found['win_rate']:.1%}" in p.words
    assert "Comparisons that <crisp> won" in p.words and "With <crisp> shown first the judge said A" in p.words
    assert "<crisp>, truth 9 of 10" in p.words and "<wrong>, truth 2 of 10" in p.words
    assert len(re.findall(r"\bDPO\b", p.words)) == 1 and "SFT" not in p.words # in the title
    assert_inert(p)


def test_a_ranking_of_files_is_told(tmp_path):
    run = compared_files(tmp_path, "crisp", "wrong", "padded")
    p, found = page(run), json.loads((run/"summary.json").read_text())["compare"]
    assert "<crisp> leads the ranking of 3 files of answers" in p.words
    assert " ".join(compare_table(found).split()) in p.words
    assert "Comparisons that the first of two won" in p.words
    assert len(re.findall(r"\bDPO\b", p.words)) == 1 and "SFT" not in p.words # in the title


def test_of_a_sweep_the_runs_are_named(tmp_path):
    for name in ("beta0.1", "beta0.5"): (tmp_path/name).mkdir()
    (tmp_path/"sweep.json").write_text("[]")
    with pytest.raises(UserError, match=r"this is a sweep.*\(beta0\.1, beta0\.5\)"): report(tmp_path)


def judged_by(**judge):
    return {"judge": {"policy": {"checkpoint": "sft.pt"}, "a": "run/dpo.pt", "b": "sft.pt"} | judge}


@pytest.mark.parametrize("config, names", [
    ({}, ("DPO", "SFT")), (judged_by(), ("DPO", "SFT")), (judged_by(a="other/big.pt"), ("big", "SFT")),
    (judged_by(b="older.safetensors"), ("DPO", "older"))])
def test_models_are_called_by_their_names(config, names): assert contestants(config) == names


def test_what_could_have_been_found_is_the_win_rate_of_the_headline():
    "Not the rate among the decided, which the headline does not say"
    judged = win_rates(["A"] * 60 + ["TIE"] * 200 + ["B"] * 40, ["B"] * 60 + ["TIE"] * 200 + ["A"] * 40)
    said = " ".join(remarks({"judge": judged}))
    assert f"a true win rate of {judged['mde_win_rate']:.1%} is found about four times in five" in said
    few = win_rates(["A"] * 3 + ["TIE"] * 97, ["B"] * 3 + ["TIE"] * 97)
    assert "no win rate would be found" in " ".join(remarks({"judge": few}))


def test_ties_alone_leave_the_other_remarks():
    judged = win_rates(["TIE"] * 20 + [None], ["TIE"] * 21) | {"chars_a": 90., "chars_b": 50.}
    said = remarks({"judge": judged})
    assert any("Answers have 90" in s for s in said) and any("1 prompts are left out" in s for s in said)
    assert not any("exact sign test" in s for s in said)


def test_pairs_without_temperatures_are_left_out_of_their_table(tmp_path):
    run = make_run(tmp_path/"run", ("mine",))
    rows = read_jsonl(run/"pairs.jsonl")
    write_jsonl(run/"pairs.jsonl", [row | {"temp_chosen": None} if i == 3 else row for i, row in enumerate(rows)])
    assert "Where the pairs come from" in page(run).words


def test_prompts_that_differ_equally_in_length_stay_together():
    "Sorting ties by their result would make a slope of nothing"
    rows = [{"a": "x" * 9, "b": "y" * 9, "result": result} for result in ("a", "tie", "b", "a") * 10]
    [(longer, rate, low, high)] = by_length(rows)
    assert longer == 0 and rate == pytest.approx(.625) and low < rate < high
    mixed = [{"a": "x" * n, "b": "", "result": "a"} for n in range(20)]
    assert len(by_length(mixed)) == 5 and all(high - low > .1 for _, _, low, high in by_length(mixed))


def test_a_run_of_one_step_has_points(tmp_path):
    run = make_run(tmp_path/"run", ("train",))
    write_jsonl(run/"metrics.jsonl", read_jsonl(run/"metrics.jsonl")[:1])
    axes = curves(load_run(run)).axes
    lines = [line for ax in axes for line in ax.lines if not str(line.get_label()).startswith("_")]
    assert lines and all(line.get_marker() == "o" for line in lines)


def test_the_line_of_the_gradient_norm_is_where_it_is_clipped(tmp_path):
    run = make_run(tmp_path/"run", ("train",))
    config = yaml.safe_load((run/"config.yaml").read_text())
    config["train"]["max_grad_norm"] = .25
    (run/"config.yaml").write_text(yaml.safe_dump(config))
    [panel] = [p for p in PANELS if "grad_norm" in p.columns]
    assert line_of(panel, load_run(run)) == (.25, "clipped above")
    assert next(p["rule"] for p in player_panels(load_run(run)) if p["title"] == panel.title) == .25


def test_a_comparison_is_told_with_all_its_numbers(compared):
    p = page(compared)
    for words in ("DPO's win rate against SFT is", "ties counted half", "What the comparison says", "orders disagreed",
                  "among decided", "net, wins minus losses", "the first place wins", "sign test", "four times in five",
                  "a true 55.0% needs", "Controls", "NOT AS IT SHOULD BE"):
        assert words in p.words, words
    assert_inert(p)
    assert p.tags.count("svg") == 6 + 3 and report(compared).read_bytes() == report(compared).read_bytes()
    drawn = [v for t, k, v in p.attrs if (t, k) == ("svg", "aria-label")]
    assert any(v.startswith("how the prompts went: ") for v in drawn)
    assert write_winrate(compared).read_bytes() == write_winrate(compared).read_bytes()


FOUND = [(35, 20, "cannot tell"), (36, 19, "DPO is better"), (5, 30, "DPO is worse")]

@pytest.mark.parametrize("win, loss, says", FOUND)
def test_better_is_said_where_the_exact_test_says_so(tmp_path, win, loss, says):
    "Wilson's interval of 35 to 20 lies above one half, and a fair coin does that in more than one case of twenty"
    run = make_run(tmp_path/"run")
    saved = json.loads((run/"summary.json").read_text())
    saved["judge"] |= {"win": win, "loss": loss}
    (run/"summary.json").write_text(json.dumps(saved))
    assert says in page(run).words


def test_one_sided_results(tmp_path):
    run = make_run(tmp_path/"run")
    judged = {"n": 40, "win": 0, "tie": 40, "loss": 0, "unparsed": 0, "decided_win_rate": None, "ci_low": 0.0,
              "ci_high": 1.0, "chars_a": 0.0, "chars_b": 0.0}
    (run/"summary.json").write_text(json.dumps({"judge": judged}))
    assert "No comparison was decided on 40 prompts" in page(run).words
    judged |= {"win": 40, "tie": 0, "decided_win_rate": 1.0, "ci_low": .91}
    (run/"summary.json").write_text(json.dumps({"judge": judged}))
    assert "DPO wins 100.0%" in page(run).words


def test_values_that_are_not_finite(tmp_path):
    run = make_run(tmp_path/"run")
    rows = read_jsonl(run/"metrics.jsonl")
    for r in rows[60:]: r |= {"loss": float("nan"), "grad_norm": float("inf")}
    write_jsonl(run/"metrics.jsonl", rows)
    summary = json.loads((run/"summary.json").read_text())
    summary["train"]["loss_last"] = float("nan")
    (run/"summary.json").write_text(json.dumps(summary))
    p = page(run)
    assert "not finite" in p.words and p.tags.count("svg") == 6


def test_pairs_from_elsewhere_without_scores(tmp_path):
    run = make_run(tmp_path/"run", ("mine",))
    write_jsonl(run/"pairs.jsonl", [{"prompt": "P", "chosen": "C", "rejected": "R"}])
    assert "chosen C" in page(run).words


@pytest.mark.parametrize("text", ["It is so.\n\n" * 9, "word " * 500])
def test_a_question_behind_a_long_text_is_shown(tmp_path, text):
    run = make_run(tmp_path/"run", ("mine",))
    prompt = f"Read this.\n\n{text}\n\nWhich currency is used there?"
    write_jsonl(run/"pairs.jsonl", [{"prompt": prompt, "chosen": "C", "rejected": "R"}])
    words = page(run).words
    assert "Read this." in words and "Which currency is used there?" in words


def test_writing_it_again_changes_nothing(tmp_path):
    run = make_run(tmp_path/"run")
    assert report(run).read_bytes() == report(run).read_bytes()


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="no run in this folder"): report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_templates_escape_and_name_every_section():
    assert ENV.autoescape is True
    macros = ENV.get_template("sections.html.j2").module
    assert all(hasattr(macros, macro) for _, macro, _ in REPORT_SECTIONS)
    table = macros.numbers({"<b>": {"<b>": "<b>"}})
    assert "<b>" not in table and table.count("&lt;b&gt;") == 3


def test_verdicts_on_weights_that_are_gone_are_left_out(tmp_path, capsys):
    "As after `wikidpo train --restart`: the win rate would stand above the curves of another training"
    path = make_run(tmp_path/"run")
    config = yaml.safe_load((path/"config.yaml").read_text())
    (path/"dpo.pt").write_bytes(b"weights")
    config["judge"] |= {"a": "runs/elsewhere/dpo.pt", "inputs": {"a": sha256_of(path/"dpo.pt")}}
    (path/"config.yaml").write_text(yaml.safe_dump(config))
    assert load_run(path).summary["judge"] and load_run(path).verdicts
    (path/"dpo.pt").write_bytes(b"other weights")
    run = load_run(path)
    assert "judge" not in run.summary and not run.verdicts and "not judged yet" in headline(run.summary)
    assert "`wikidpo judge --restart` judges these" in capsys.readouterr().out
    (tmp_path/"dpo.pt").write_bytes(b"weights")
    for another in ("another.safetensors", str(tmp_path/"dpo.pt")):   # of which this dpo.pt says nothing
        config["judge"]["a"] = another
        (path/"config.yaml").write_text(yaml.safe_dump(config))
        assert load_run(path).summary["judge"]
