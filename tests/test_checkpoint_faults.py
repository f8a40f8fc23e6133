"Checkpoints, caches and chat templates that are damaged, foreign or made to do harm: the right weights, or one line"
import json, pickle, random, subprocess, sys, time, zipfile
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import pytest, torch
from safetensors.torch import save_file
from systems import LINUX

from wikidpo.core.chat import read_chat
from wikidpo.core.files import UserError
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.engine.reference_cache import cached_table, tensors_digest
from wikidpo.models.adopt import load_policy, save_policy
from wikidpo.models.checkpoints import load_checkpoint, save_checkpoint
from wikidpo.run.rig import rig

SMALL = GPTConfig(vocab_size=61, block_size=32, n_layer=1, n_head=2, n_embd=16, ffn_dim=24)
MODEL_PY = "from wikidpo.core.model import GPT, GPTConfig\n"


def small(seed=0):
    torch.manual_seed(seed)
    return GPT(SMALL).eval()


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refusal(fn, *args):
    "The line with which something is refused; None: it is accepted"
    try: fn(*args)
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 600
        return str(e)
    return None


def write(path, config, state=None):
    "A checkpoint of this configuration, in the form of its name, with whatever weights"
    state = small().state_dict() if state is None else state
    if path.suffix == ".pt": torch.save({"model": state, "config": config}, path)
    else: save_file(state, path, metadata={"config": json.dumps(config)})
    return path


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_changed_bytes_are_noticed(tmp_path, name):
    "200 changes of a byte or of eight: the right weights, or a line"
    model, path, rng = small(), tmp_path/name, random.Random(0)
    save_checkpoint(path, model)
    whole, refused = path.read_bytes(), 0
    for _ in range(200):
        data = bytearray(whole)
        at = rng.randrange(len(data))
        for i in range(at, min(at + rng.choice((1, 8)), len(data))): data[i] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        try: assert same(load_checkpoint(path), model)
        except UserError as e:
            refused += 1
            assert "\n" not in str(e) and name in str(e)
    assert refused > 100
    path.write_bytes(whole)
    assert same(load_checkpoint(path), model)


def test_a_learners_own_checkpoint_is_guarded_too(tmp_path):
    "What training writes for a model.py has its digest as well"
    (tmp_path/"model.py").write_text(MODEL_PY)
    policy = load_policy(write(tmp_path/"sft.pt", asdict(SMALL)), tmp_path/"model.py")
    save_policy(tmp_path/"dpo.pt", policy)
    data = bytearray((tmp_path/"dpo.pt").read_bytes())
    at = data.find(small().state_dict()["blocks.0.mlp.down.weight"].numpy().tobytes()[:32])
    data[at + 1] ^= 1
    (tmp_path/"dpo.pt").write_bytes(data)
    says = refusal(load_policy, tmp_path/"dpo.pt", tmp_path/"model.py")
    assert "dpo.pt: its bytes are not those that were written" in says


def test_a_checkpoint_without_a_digest_still_loads(tmp_path):
    "As the original lesson writes it, and as ours were written before there was a digest"
    for name in ("sft.pt", "sft.safetensors"):
        assert same(load_checkpoint(write(tmp_path/name, asdict(SMALL))), small())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, name, value):
    model = small()
    model.blocks[0].mlp.down.weight.data[3, 5] = value
    save_checkpoint(tmp_path/name, model)
    says = f"{name}: blocks.0.mlp.down.weight holds values that are not finite"
    assert says in refusal(load_checkpoint, tmp_path/name)
    (tmp_path/"model.py").write_text(MODEL_PY)
    assert "down.weight holds values that are not finite" in refusal(load_policy, tmp_path/name, tmp_path/"model.py")


ODD = [None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**12, 10**30, "8", [], {}, [1, 2], "x" * 10_000]


def test_odd_configurations_are_refused_by_field(tmp_path):
    "182 values in 13 fields: accepted where they mean the same model, else a line, at once"
    start, refused = time.perf_counter(), 0
    for name in [*asdict(SMALL), "its_own"]:
        for value in ODD:
            path = write(tmp_path/"a.pt", asdict(SMALL) | {name: value})
            says = refusal(load_checkpoint, path)
            if says: assert name.replace("its_own", "fields") in says and "a.pt" in says, (name, value, says)
            refused += bool(says)
    assert refused >= 165 and time.perf_counter() - start < 60


SIZES = [dict(vocab_size=2**24), dict(n_embd=2**16, n_head=256), dict(ffn_dim=2**23), dict(n_layer=512),
         dict(vocab_size=10**12)]
REFUSED = """
import resource, sys
from wikidpo.core.files import UserError
from wikidpo.models.checkpoints import load_checkpoint
load_checkpoint(sys.argv[1]) # what a sound one takes
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try: load_checkpoint(path)
    except UserError: pass
    else: sys.exit(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@LINUX
def test_sizes_are_checked_before_memory_is_asked_for(tmp_path):
    "In a process of its own, whose peak nothing else has raised"
    odd = [write(tmp_path/f"{i}{kind}", asdict(SMALL) | change)
           for i, change in enumerate(SIZES) for kind in (".pt", ".safetensors")]
    sound = write(tmp_path/"sound.pt", asdict(SMALL))
    done = subprocess.run([sys.executable, "-c", REFUSED, str(sound), *map(str, odd)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000 # kB


def test_one_number_for_a_terabyte_is_refused(tmp_path):
    "A pickle may say that a tensor is a single number repeated"
    config = asdict(SMALL) | dict(vocab_size=2**24, n_embd=2**12)
    state = small().state_dict() | {"embed.weight": torch.zeros(1).expand(2**24, 2**12)}
    assert "embed.weight" in refusal(load_checkpoint, write(tmp_path/"a.pt", config, state))


def test_a_file_that_unpacks_to_more_than_it_is(tmp_path):
    save_checkpoint(tmp_path/"a.pt", small())
    with zipfile.ZipFile(tmp_path/"a.pt") as z: parts = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(tmp_path/"bomb.pt", "w", zipfile.ZIP_DEFLATED) as z:
        for n, data in parts.items(): z.writestr(n, data + bytes(10_000_000) * n.endswith("/data/0"))
    assert "bomb.pt" in refusal(load_checkpoint, tmp_path/"bomb.pt")


class Harm:
    def __reduce__(self): return Path.touch, (Path("harm"),)


def test_other_entries_are_no_checkpoint(tmp_path):
    config, state = asdict(SMALL), small().state_dict()
    sparse = state | {"norm.weight": torch.ones(16).to_sparse()}
    for i, content in enumerate([
            None, 3, [], {}, {"model": state}, {"config": config}, {"model": None, "config": config},
            {"model": [1], "config": config}, {"model": {1: 2}, "config": config},
            {"model": {"norm.weight": "one"}, "config": config}, {"model": state, "config": None},
            {"model": state, "config": {3: 4}}, {"model": sparse, "config": config},
            {"model": {k: v.to(torch.complex64) for k, v in state.items()}, "config": config},
            {"model": {k: v.to(torch.int32) for k, v in state.items()}, "config": config},
            {"model": state, "config": config, "digest": 5}]):
        torch.save(content, tmp_path/f"{i}.pt")
        assert f"{i}.pt" in refusal(load_checkpoint, tmp_path/f"{i}.pt"), content


def test_other_files_are_no_checkpoint(tmp_path, monkeypatch):
    "Nonsense, headers that lie, a pickle that would run code: in both forms"
    monkeypatch.chdir(tmp_path)
    for i, data in enumerate([b"", b"PK", b"\0" * 1000, b"\xff" * 8 + b"{}", (10**9).to_bytes(8, "little") + b"{" * 100,
                              pickle.dumps(Harm())]):
        for ending in ("pt", "safetensors"):
            (tmp_path/f"b{i}.{ending}").write_bytes(data)
            assert f"b{i}.{ending}" in refusal(load_checkpoint, tmp_path/f"b{i}.{ending}")
    assert not (tmp_path/"harm").exists()


def test_other_headers_are_no_checkpoint(tmp_path):
    path, state = tmp_path/"c.safetensors", small().state_dict()
    for text in ("null", "[]", "3", "{", "[" * 100_000, '{"vocab_size": 1' + "0" * 10_000 + "}"):
        save_file(state, path, metadata={"config": text})
        assert "c.safetensors" in refusal(load_checkpoint, path)
    save_file(state, path)
    assert "c.safetensors" in refusal(load_checkpoint, path)


def test_names_that_are_no_file(tmp_path):
    (tmp_path/"folder.pt").mkdir()
    for name in ("folder.pt", "x" * 300 + ".pt", "a\0.pt", "es\x1b[31mc.pt", "none.safetensors"):
        says = refusal(load_checkpoint, tmp_path/name)
        assert says and "\x1b" not in says and "\0" not in says


TABLE, KEY = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)), ["weights", "pairs"]


def kept_table(folder):
    "The file of a reference cache that holds TABLE"
    cached_table(lambda: TABLE, KEY, folder)
    [path] = folder.iterdir()
    return path


def table_file(table):
    buf = BytesIO()
    torch.save(table, buf)
    return buf.getvalue()


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:300], lambda whole: b"", lambda whole: b"garbage" * 99, lambda whole: whole[:-1],
    lambda whole: table_file(TABLE * 0), lambda whole: table_file(TABLE), lambda whole: table_file({"table": TABLE}),
    lambda whole: table_file({"table": TABLE[:3], "digest": tensors_digest({"other.pt": TABLE[:3]})}),
    lambda whole: table_file({"table": None, "digest": None}), lambda whole: pickle.dumps(Harm())],
    ids=["cut", "empty", "garbage", "a byte short", "zeros", "of old", "no digest", "another's", "none", "harm"])
def test_a_reference_cache_that_is_not_ours_is_made_anew(tmp_path, capsys, damage):
    path, asked = kept_table(tmp_path), []
    def make():
        asked.append(1)
        return TABLE
    path.write_bytes(damage(whole := path.read_bytes()))
    assert torch.equal(cached_table(make, KEY, tmp_path), TABLE) and asked == [1]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "is torn, or not what was written there; the reference is asked again" in said
    assert path.read_bytes() == whole
    assert torch.equal(cached_table(make, KEY, tmp_path), TABLE) and asked == [1] and not capsys.readouterr().out


def test_a_bit_or_a_name_of_the_reference_cache_that_changes_is_noticed(tmp_path, capsys):
    path, rng = kept_table(tmp_path), random.Random(0)
    whole = path.read_bytes()
    for _ in range(100):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert torch.equal(cached_table(lambda: TABLE, KEY, tmp_path), TABLE)
    cached_table(lambda: TABLE * 2, [*KEY, "other pairs"], tmp_path)
    [other] = set(tmp_path.iterdir()) - {path}
    path.write_bytes(other.read_bytes())                              # put there under this name
    capsys.readouterr()
    assert torch.equal(cached_table(lambda: TABLE, KEY, tmp_path), TABLE)
    assert "asked again" in capsys.readouterr().out


def test_a_reference_that_gives_no_numbers_is_not_kept_as_if_it_did(tmp_path):
    spoilt, asked = TABLE.clone(), []
    spoilt[2, 1] = float("nan")
    for _ in range(2): cached_table(lambda: asked.append(1) or spoilt, KEY, tmp_path)
    assert len(asked) == 2


def test_a_reference_cache_that_cannot_be_written_costs_a_word(tmp_path, capsys):
    (tmp_path/"file").write_text("")
    assert torch.equal(cached_table(lambda: TABLE, KEY, tmp_path/"file"/".cache"), TABLE)
    assert "cannot be kept" in capsys.readouterr().out


CHAT = dict(prefix="<|user|>\n", suffix="\n<|end|>\n<|assistant|>\n", end="<|end|>", specials=["<|end|>"])


@pytest.mark.parametrize("change", [
    {"prefix": None}, {"suffix": 3}, {"end": ""}, {"end": [1]}, {"specials": "<|end|>"}, {"specials": [""]},
    {"specials": [3]}, {"trim": 1}, {"vocab_size": True}, {"vocab_size": -1}, {"vocab_size": 1e30}, {"other": 1}],
    ids=str)
def test_an_odd_chat_json_is_refused_by_field(tmp_path, change):
    (tmp_path/"chat.json").write_text(json.dumps(CHAT))
    assert read_chat(tmp_path/"chat.json").specials == ("<|end|>",)
    (tmp_path/"chat.json").write_text(json.dumps(CHAT | change))
    says = refusal(read_chat, tmp_path/"chat.json")
    assert "chat.json: not a chat template (" in says and "import the model again" in says and min(change) in says


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{}", b"{", b"[" * 100_000, b"\xff", b'{"end": "\\ud800"}',
                                  b'{"vocab_size": 1' + b"0" * 10_000 + b"}"], ids=range(9))
def test_a_chat_json_that_is_none(tmp_path, text):
    (tmp_path/"chat.json").write_bytes(text)
    assert "chat.json" in refusal(read_chat, tmp_path/"chat.json")


@pytest.mark.parametrize("options", [
    {"dollars": float("nan")}, {"dollars": float("inf")}, {"dollars": -1}, {"save": ""}, {"save": "/"}], ids=str)
def test_odd_values_for_the_rig_are_refused_before_anything_is_measured(options):
    says = refusal(lambda: rig(None, None, None, None, None, **options))
    assert f"rig.{min(options)} is " in says
