"All that the workers use of the package: what changes its insides changes this file, and no other here"
import json
from time import perf_counter

import torch

from wikidpo.core.chat import end_id as end_id, load_tokenizer
from wikidpo.core.config import UNIT, TrainConfig
from wikidpo.core.data import PairDataset, collate as collate
from wikidpo.core.files import read_jsonl
from wikidpo.core.train import freeze as freeze, train_dpo
from wikidpo.engine import packed, ragged, scoring
from wikidpo.engine.accelerate import ready_to_sample, training_parts
from wikidpo.engine.training import TrainingEngine
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.world.facts import DATA

TOP_K = 50
# Parts of a step of sampling that a profile looks at: where the function stands, its name, in words
SAMPLING_PARTS = (
    (packed, "packed_linear", "linear layers"),
    (ragged, "extend_shared", "attention, norms and the rest of the blocks"),
    (ragged, "prefill_prompts", "the same of the prompts"),
    (ragged.SharedCache, "add", "keeping the cache"),
    (ragged.SharedCache, "step", "keeping the cache"),
    (ragged.SharedCache, "keep", "keeping the cache"),
    (ragged, "draw", "drawing"),
)
PLAIN_PARTS = ((torch.nn.Linear, "forward", "linear layers"),) # in float32, where no compiler would see the clock
# What training does beside its steps: the reference's pass, and compiling; the third is the name of its seconds
BESIDE_TRAINING = (
    (TrainingEngine, "reference_table", "reference_s"),
    (scoring, "compile_scoring", "compile_step_s"),
)


def precision(task): return "bf16" if task["dtype"] == "bfloat16" else "fp32"


def policy(folder, task): return load_checkpoint(folder/"model.safetensors", task["device"])


def tokenizer(folder): return load_tokenizer(folder/"tokenizer.json")


def prompts(folder, task, kind):
    "The first prompts of the task, as `texts` or as `ids`"
    return json.loads((folder/"prompts.json").read_text())[kind][:task["prompts"]]


def pairs(folder, name, policy): return PairDataset(folder/f"{name}.jsonl", tokenizer(folder), policy.cfg.block_size)


def fast_sampler(folder, task): return ready_to_sample(policy(folder, task), precision(task))


def sample(model, tok, asked, task, max_new, batch):
    "Responses to all prompts, one after the other, as a mining takes them: unit by unit, `batch` prompts at once"
    options = dict(temps=tuple(task["temps"]), max_new=max_new, top_k=TOP_K, batch=batch)
    units = [ragged.sample_unit(model, tok, asked, unit, 0, **options) for unit in range(-(-len(asked) // UNIT))]
    return [response for groups in units for group in groups for response in group]


def train(policy, ref, data, task, cache=None):
    "One epoch of DPO, with what a long run puts on; cache: a folder for the reference's log-probabilities"
    cfg = TrainConfig(lr=1e-6, batch_size=task["batch"], grad_accum_steps=task["accum"], warmup_steps=0)
    def choose(policy, tokens): return training_parts(policy, precision(task))
    train_dpo(policy, ref, data, cfg, TrainingEngine(choose, cache=cache))


def clock_beside(spent):
    "From now on what training does beside its steps writes its seconds into `spent`"
    for place, name, key in BESIDE_TRAINING: setattr(place, name, clocked(getattr(place, name), key, spent))


def clocked(function, key, spent):
    "The function, with a clock around it"
    def timed(*args):
        start = perf_counter()
        out = function(*args)
        spent[key] = perf_counter() - start
        return out
    return timed


# --- what reads a whole run; imported late, since each is measured alone


def shipped_pairs(): return read_jsonl(DATA/"pairs.jsonl")


def read_pairs(run): return PairDataset(run/"pairs.jsonl", tokenizer(DATA), 256)


def command(words):
    "A command of `wikidpo`, ready to be run"
    from wikidpo.cli import main
    return lambda: main(words)


def report(run):
    from wikidpo.show.report import report
    return report(run)


def doctor(run):
    from wikidpo.show.doctor import doctor
    return doctor(run)


def inspect(path):
    from wikidpo.show.inspector import PairInspector
    return PairInspector(path)


def vote(path):
    "A vote on these verdicts: the first one, with its answer kept"
    from wikidpo.show.vote import BlindVote
    BlindVote(read_jsonl(path), path.with_name("votes.jsonl")).vote("tie")
