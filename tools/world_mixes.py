"""How MiniWiki was designed: what other mixes of SFT answers would show. For nbs/world/design.ipynb.

Takes the shipped policy and trains it for STEPS more steps on each mix, long enough for its form to be that of the mix
(its facts stay). Writes nbs/results/world_mixes.json: about a minute a mix on two cores.
"""
import random
from dataclasses import replace

import torch

from evidence import PROFILE, configured, write_results
from measure import MINIWIKI, TEMPERATURES, Policy, truth
from wikidpo.core.chat import load_tokenizer
from wikidpo.core.pairs import make_pairs
from wikidpo.engine.ragged import sample_unit
from wikidpo.judge.offline import OfflineTeacher
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.run.profiles import section
from wikidpo.world import answers, sft
from wikidpo.world.config import SftConfig
from wikidpo.world.facts import DATA, prompts
from wikidpo.world.grade import grade

CHOICE = MINIWIKI.choice

STEPS, LR = 200, 1e-3
EVEN = dict.fromkeys(answers.BRIDGES, 1 / len(answers.BRIDGES))
SHIPPED = section(SftConfig, "sft", PROFILE["sft"])
MIXES = {  # crisp, padded, rambling, wrong; how often each bridge is said
    "shipped": (SHIPPED.mix, answers.BRIDGES),
    "no favourite bridge": (SHIPPED.mix, EVEN),
    "first edition": ((0.2, 0.3, 0.3, 0.2), EVEN),
    "fewer ramble": ((0.4, 0.1, 0.4, 0.1), answers.BRIDGES),
}
TELLS_IT = {"crisp", "terse", "padded", "sloppy", "rambling", "hallucinated"}  # labels of answers with the right fact


def policy_of(mix, bridges):
    "The shipped policy after some steps on another mix."
    names = dict(zip(answers.QUALITIES, mix))
    cfg = replace(SHIPPED, steps=STEPS, lr=LR, warmup_steps=20, **names)
    tok, model = load_tokenizer(DATA / "tokenizer.json"), load_checkpoint(DATA / "model.safetensors")
    kept = dict(answers.BRIDGES)
    answers.BRIDGES.update(bridges)
    try:
        sft._train(model.requires_grad_(True), sft.sft_batches(tok, cfg, random.Random(1)), cfg)
    finally:
        answers.BRIDGES.update(kept)
    return tok, model.eval()


def survival(tok, model) -> float:
    "Share of 512 prompts that give a pair, by the profile's judge and filters."
    teacher, cfg, rows = OfflineTeacher(**configured("teacher").habits()), configured("mine"), []
    asked = prompts("mine")[:512]
    for unit in range(2):
        groups = sample_unit(model, tok, asked, unit, 0, 256, temps=cfg.temps, max_new=cfg.max_new, top_k=cfg.top_k)
        for i, group in enumerate(groups, 256 * unit):
            for k, r in enumerate(group):
                score = teacher.score(asked[i], r.text) if r.text.strip() else None
                rows.append({"prompt_id": i, "k": k, "prompt": asked[i], "text": r.text, "score": score, "ids": r.ids,
                             "temperature": r.temperature, "finished": r.finished})
    return make_pairs(rows, cfg.gap, cfg.best)[1]["pairs"] / len(asked)


def measure(name: str) -> dict:
    "A row of the results."
    mix, bridges = MIXES[name]
    tok, model = policy_of(mix, bridges)
    policy = Policy(model, tok, 0)
    labels = [grade(q, a).label for q, a in zip(CHOICE, policy.answers(0.0, CHOICE))]
    return {
        "name": name,
        "mix": dict(zip(answers.QUALITIES, mix)),
        "bridges": dict(bridges),
        "right_at_0": sum(label in TELLS_IT for label in labels) / len(labels),
        "good": {str(t): policy.good(t, CHOICE) for t in TEMPERATURES},
        "mean": {str(t): sum(truth(CHOICE, policy.answers(t, CHOICE))) / len(CHOICE) for t in TEMPERATURES},
        "survival": survival(tok, model),
        "example": policy.answers(0.0, CHOICE)[0],
    }


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for name in MIXES:
        rows.append(measure(name))
        good = ", ".join(f"{share:.0%} at {t}" for t, share in rows[-1]["good"].items())
        print(f"{name:20} right at 0: {rows[-1]['right_at_0']:.0%}; good {good}; survival {rows[-1]['survival']:.0%}",
              flush=True)
    write_results("world_mixes", rows)


if __name__ == "__main__":
    main()
