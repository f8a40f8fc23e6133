"""What the book's widgets show of a training, since the book runs nothing: nbs/results/book.json.

    book_run.py    the lesson with the default run, and its pairs at four times the learning rate (about three minutes)

It holds the curves and the watched margins of both, the reward of each token of a dozen pairs before and after the
training, and sixty comparisons of the judge. Runs that are done are kept in runs/book, whatever the code has become
since: remove that folder to make them anew.
"""
import json
from operator import itemgetter

from default_run import wikidpo
from evidence import PROFILE, ROOT, configured

from wikidpo.core.data import PairDataset
from wikidpo.core.files import read_jsonl
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.core.chat import load_tokenizer
from wikidpo.run.folder import write_atomic
from wikidpo.show.run import load_run
from wikidpo.show.tokens import TokenView

RUNS = ROOT / "runs/book"
RESULT = ROOT / "nbs/results/book.json"
PAIRS, COMPARISONS, DIGITS = 12, 60, 4
SETTINGS = ("beta", "loss_type", "label_smoothing")
COMPARED = ("prompt_id", "prompt", "a", "b", "result")


def train() -> None:
    "The default run, and the same pairs at four times its learning rate."
    wikidpo("lesson", "--out", RUNS / "calm")
    hot = ("--lr", 4 * PROFILE["train"]["lr"], "--on-sickness", "ignore")
    wikidpo("train", "--pairs", RUNS / "calm/pairs.jsonl", *hot, "--out", RUNS / "wild")


def rounded(value):
    "With few digits that count: a screen shows no more."
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def curves(name: str) -> dict:
    "The settings of a run's loss, its metrics, and the margins of the watched pairs."
    run = load_run(RUNS / name)
    margins = [{"step": row["step"], "z": row["z"]} for row in run.rows("margins") if row.get("z")]
    settings = {key: run.config["train"][key] for key in SETTINGS if key in run.config["train"]}
    return {"train": settings, "metrics": run.rows("metrics"), "margins": margins}


def tokens() -> dict:
    "What the token view knows of the first pairs."
    policy = configured("policy")
    reference, trained = (load_checkpoint(path) for path in (policy.checkpoint, RUNS / "calm/dpo.pt"))
    pairs = read_jsonl(RUNS / "calm/pairs.jsonl")[:PAIRS]
    dataset = PairDataset(pairs, load_tokenizer(policy.tokenizer), reference.cfg.block_size)
    view = TokenView(dataset, reference, {"after training": trained, "reference": reference}, PROFILE["train"]["beta"])

    def row(name: str) -> list[dict]:
        return [view._compute(name, i) for i in range(PAIRS)]

    return {name: row(name) for name in view.models}


def comparisons() -> list[dict]:
    "Comparisons of two different answers, as the judge decided them."
    rows = (row for row in load_run(RUNS / "calm").verdicts if row["result"] in ("a", "b", "tie"))
    wanted = itemgetter(*COMPARED)
    different = [dict(zip(COMPARED, wanted(row))) for row in rows if row["a"] != row["b"]]
    return different[:COMPARISONS]


if __name__ == "__main__":
    train()
    found = {"calm": curves("calm"), "wild": curves("wild"), "tokens": tokens(), "verdicts": comparisons()}
    write_atomic(RESULT, json.dumps(rounded(found), ensure_ascii=False, separators=(",", ":")) + "\n")
