"""The living widgets of the book, as HTML in _docs/widgets: from what ships, and from nbs/results/book.json.

`make docs` calls it with the environment of the package; tools/book.py puts the pieces into the pages.
"""
import json
import tempfile
from pathlib import Path

import numpy as np

from evidence import RESULTS, ROOT
from wikidpo.run.folder import write_atomic, write_jsonl
from wikidpo.show.beta import BetaSlider
from wikidpo.show.embed import embedded, page_head
from wikidpo.show.inspector import PairInspector
from wikidpo.show.player import RunPlayer
from wikidpo.show.run import load_run
from wikidpo.show.tokens import TokenView
from wikidpo.show.vote import BlindVote
from wikidpo.show.widgets import LabWidget

DATA = ROOT / "wikidpo/data/miniwiki"
OUT = ROOT / "_docs/widgets"
NOTES = {  # what a widget shows here, where the notebook would show what the reader has just run
    "inspector": "In the book: the pairs that ship with the package.",
    "tokens": "In the book: a dozen pairs of a recorded default run, by the policy before and after it.",
    "player": "In the book: a recorded default run of 82 steps, in place of the one above.",
    "wild": "In the book: the pairs of the recorded run again, at four times its learning rate.",
    "vote": "In the book: sixty comparisons of a recorded default run.",
}


class RecordedTokens(TokenView):
    "The token view of what was computed before: no model is asked"

    def __init__(self, known: dict):  # {checkpoint: what it shows of each pair}
        self.known = {(name, i): shown for name, row in known.items() for i, shown in enumerate(row)}
        self.models = dict.fromkeys(known)
        names = list(known)
        LabWidget.__init__(self, checkpoint=names[0], checkpoints=names, total=len(known[names[0]]))
        self._show()


def player(folder: Path, recorded: dict) -> RunPlayer:
    "The run player of a recorded run, by way of the folder that it would read."
    folder.mkdir()
    write_atomic(folder / "config.yaml", json.dumps({"train": recorded["train"]}))  # JSON is YAML
    write_jsonl(folder / "metrics.jsonl", recorded["metrics"])
    write_jsonl(folder / "margins.jsonl", recorded["margins"])
    return RunPlayer(load_run(folder))


def widgets(scratch: Path) -> dict[str, str]:
    "NAME: the widget as HTML; a page shows `wild` after `player`, whose style and script it shares."
    recorded = json.loads((RESULTS / "book.json").read_text(encoding="utf-8"))
    shown = {
        "beta": BetaSlider(np.load(DATA / "margins.npy"), beta=1.25),
        "inspector": PairInspector(DATA / "pairs.jsonl"),
        "tokens": RecordedTokens(recorded["tokens"]),
        "player": player(scratch / "calm", recorded["calm"]),
        "vote": BlindVote(recorded["verdicts"], scratch / "votes.jsonl"),
    }
    wild = embedded(player(scratch / "wild", recorded["wild"]))
    pieces = {name: f"{page_head(name)}\n{embedded(widget)}" for name, widget in shown.items()} | {"wild": wild}
    return {name: piece + note(name) for name, piece in pieces.items()}


def note(name: str) -> str:
    return f'\n<p class="living-note">{NOTES[name]}</p>' if name in NOTES else ""


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in widgets(Path(scratch)).items():
            (OUT / f"{name}.html").write_text(text, encoding="utf-8")
