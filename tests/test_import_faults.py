"Model folders from strangers: brought here whole, or refused in one line with nothing left behind"
import json, os, random, shutil, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file
from systems import LINUX

from wikidpo.core.files import UserError
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.models.chat_template import render_apart
from wikidpo.models.checkpoints import save_checkpoint
from wikidpo.models.hf import export, import_
from wikidpo.models.policy import open_policy
from wikidpo.run.config import PolicyConfig
from wikidpo.world.facts import DATA

TOKENIZER = DATA/"tokenizer.json"
ODD = [None, True, -1, 0, 1.5, float("nan"), 10**12, 10**30, "8", "", [], {}, [1, 2], "x" * 100_000, {"content": 3},
       [[]], "\x1b]0;title\x07", "{% for i in range(99999) %}{{ i }}{% endfor %}"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    "A Hugging Face folder with a tiny random Llama"
    where = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    size = len(json.loads(TOKENIZER.read_text())["model"]["vocab"])
    config = GPTConfig(vocab_size=-(-size // 64) * 64, block_size=64, n_layer=1, n_head=2, n_embd=16, ffn_dim=24)
    save_checkpoint(where/"tiny.pt", GPT(config))
    export(where/"tiny.pt", TOKENIZER, where/"hf")
    (where/"hf/special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    return where/"hf"


def content(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def opens(out):
    model, _ = open_policy(PolicyConfig(str(out/"model.safetensors"), str(out/"tokenizer.json"), device="cpu"))
    return model


def outcome(source, out):
    "None where the folder came here and can be used; else the line that refuses it. Nothing else is left beside `out`"
    try: import_(source, out)
    except UserError as e:
        line = str(e)
        assert line.isprintable() and len(line) <= 1000 and not out.exists(), line
    else: line = opens(out) and None
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]
    return line


def changed(model_folder, tmp_path, name, text):
    "A copy of the folder with this text, or these bytes, in one of its files"
    bad = tmp_path/"bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(model_folder, bad)
    (bad/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return bad


def all_changes(model_folder):
    "(file, bytes or text) for every field of every JSON file with every odd value, and for files that are no JSON"
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
                 "tokenizer.json"):
        whole = json.loads((model_folder/name).read_text())
        extra = ("rope_scaling", "rope_parameters") if name == "config.json" else ("bos_token", "auto_map")
        for field in [*whole, *extra]:
            for value in ODD: yield name, json.dumps(whole | {field: value})
        for text in ("", "null", "[]", "3", "{", "[" * 100_000, '{"a": "\\ud800"}', '{"n": 1' + "0" * 10_000 + "}",
                     b"\xff\xfe{}", b"\0" * 100, b"\xef\xbb\xbf" + json.dumps(whole).encode()): yield name, text
    for text in ("", "\0", b"\xff", "{%", "{{ messages[0]['content'] }}" * 2, "x" * 2_000_000):
        yield "chat_template.jinja", text


def tried(model_folder, tmp_path, changes):
    "Imports each of them; returns how many were refused"
    refused = 0
    for i, (name, text) in enumerate(changes):
        try: line = outcome(changed(model_folder, tmp_path, name, text), tmp_path/"out")
        except Exception as e: raise AssertionError(f"{i}: {name} {text[:3000]!r}") from e
        refused += line is not None
        shutil.rmtree(tmp_path/"out", ignore_errors=True)
    return refused


def test_odd_files_are_refused_in_a_line_or_brought_here_whole(model_folder, tmp_path):
    "30 of all changes; the slow test tries them all"
    changes = random.Random(0).sample(list(all_changes(model_folder)), 30)
    assert 10 < tried(model_folder, tmp_path, changes) < 30


@pytest.mark.slow
def test_every_odd_value_in_every_file(model_folder, tmp_path):
    changes = list(all_changes(model_folder))
    assert 300 < tried(model_folder, tmp_path, changes) < len(changes)
    print(f"{len(changes)} changed folders")


@pytest.mark.parametrize("template", [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}", "{{ 9**(9**9) }}", "{{ [0] * 10**10 }}", "{{ 'x' * 2000000 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{% for i in range(10**9) %}{% endfor %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch harm') }}", "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}"],
    ids=range(12))
def test_templates_that_hang_or_reach_out(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    [(text, why)] = render_apart(template, [([{"role": "user", "content": "instruction"}], True)], {}, seconds=1)
    assert text is None and why and time.perf_counter() - start < 60 and not list(tmp_path.iterdir())


@LINUX
def test_an_import_with_a_template_that_hangs_ends(model_folder, tmp_path):
    bad = changed(model_folder, tmp_path, "chat_template.jinja", "{{ 'x' * 10**10 }}{{ messages[0]['content'] }}")
    assert "the chat template fails (MemoryError" in outcome(bad, tmp_path/"out")


def test_a_half_character_in_the_template_leaves_nothing(model_folder, tmp_path):
    config = json.loads((model_folder/"tokenizer_config.json").read_text())
    text = json.dumps(config | {"chat_template": config["chat_template"] + "\ud800"})
    assert "half a character" in outcome(changed(model_folder, tmp_path, "tokenizer_config.json", text), tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_only_known_fields_and_files_come_in(model_folder, tmp_path):
    code = {"auto_map": {"AutoTokenizer": "evil.Tok"}, "custom": 1}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        text = json.dumps(json.loads((model_folder/name).read_text()) | code)
        (bad := changed(model_folder, tmp_path, name, text))/"evil.py"
        (bad/"evil.py").write_text("open('harm', 'w')")
        assert outcome(bad, tmp_path/name) is None
        assert "auto_map" not in (tmp_path/name/name).read_text() and not (tmp_path/name/"evil.py").exists()
        export(tmp_path/name/"model.safetensors", tmp_path/name/"tokenizer.json", tmp_path/f"{name}-out")
        assert "evil" not in "".join(p.read_text(errors="replace") for p in (tmp_path/f"{name}-out").glob("*.json"))


@pytest.mark.parametrize("name", [
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "model.safetensors", "chat_template.jinja", "model.safetensors.index.json"])
def test_a_link_out_of_the_folder_is_refused(model_folder, tmp_path, name):
    bad, outside = changed(model_folder, tmp_path, name, b""), tmp_path/"private"
    (outside).write_text((model_folder/name).read_text(errors="ignore") if (model_folder/name).exists() else "secret")
    (bad/name).unlink()
    (bad/name).symlink_to(outside)
    assert "leads out of its folder" in outcome(bad, tmp_path/"out")
    (bad/name).unlink()
    (bad/name).symlink_to(name)                                       # to itself
    assert outcome(bad, tmp_path/"out") or name not in ("config.json", "tokenizer.json", "model.safetensors")


ODD_NAMES = ["../other/model.safetensors", "/etc/passwd", "model.bin", "", 3, None, "a\0b.safetensors"]


@pytest.mark.parametrize("names", ODD_NAMES)
def test_an_index_names_files_of_the_folder_alone(model_folder, tmp_path, names):
    shutil.copytree(model_folder, tmp_path/"other")
    for text in (json.dumps({"weight_map": {"a": names}}), json.dumps({"weight_map": names}), "{}"):
        bad = changed(model_folder, tmp_path, "model.safetensors.index.json", text)
        assert "names no files of safetensors beside it" in outcome(bad, tmp_path/"out")


def test_links_of_the_hubs_cache_are_followed(model_folder, tmp_path):
    "models--owner--name/snapshots/revision holds links into models--owner--name/blobs, as huggingface_hub lays it out"
    blobs, snapshot = tmp_path/"hub/blobs", tmp_path/"hub/snapshots/abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(model_folder, blobs)
    for p in blobs.iterdir(): (snapshot/p.name).symlink_to(Path("../../blobs")/p.name)
    assert outcome(snapshot, tmp_path/"out") is None
    (snapshot/"config.json").unlink()
    (snapshot/"config.json").symlink_to(model_folder/"config.json")
    assert "leads out of its folder" in outcome(snapshot, tmp_path/"other")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(model_folder, tmp_path, value):
    bad = changed(model_folder, tmp_path, "x", b"")
    tensors = load_file(bad/"model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][2, 3] = value
    save_file(tensors, bad/"model.safetensors")
    assert "blocks.0.attn.qkv.weight holds values that are not finite" in outcome(bad, tmp_path/"out")
    whole = {k: v.to(torch.int32) for k, v in load_file(model_folder/"model.safetensors").items()}
    save_file(whole, bad/"model.safetensors")
    assert "holds tensors that are no floating-point numbers" in outcome(bad, tmp_path/"out")


def test_odd_places_to_write_to(model_folder, tmp_path):
    (tmp_path/"file").write_text("")
    (tmp_path/"empty").mkdir()
    (tmp_path/"link").symlink_to(tmp_path/"behind")
    for name in ("file", "x\x1b[31m/\0"):
        with pytest.raises((UserError, ValueError)): import_(model_folder, tmp_path/name)
    import_(model_folder, tmp_path/"empty")
    import_(model_folder, tmp_path/"link")                            # the link stays, what it names is made
    assert content(tmp_path/"empty") == content(tmp_path/"behind") and (tmp_path/"link").is_symlink()
    (tmp_path/".new.part").symlink_to(tmp_path/"empty")               # a trap where we would write
    with pytest.raises(UserError, match="is in the way"): import_(model_folder, tmp_path/"new")
    assert content(tmp_path/"empty") == content(tmp_path/"behind") and not os.path.lexists(tmp_path/"new")
