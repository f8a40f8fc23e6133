"""The exercises of wikidpo.world.exercises, written into the lessons.

`exercises.py` writes them, `exercises.py 03 04` into these lessons alone; `exercises.py --check` says which
lessons are out of step.

An exercise stands where its cells stand: move them, by their ids, to where the idea is. One that has no cells yet is
put before the lesson's last section, "Next". The cells are always written whole, with what the untouched stub prints:
edit nbs/world/exercises/, never these cells.
"""
import io
import re
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from wikidpo.world.exercises.all import EXERCISES
from wikidpo.world.exercises.base import PRELUDE, Exercise

ROOT = Path(__file__).resolve().parent.parent
NEXT = re.compile(r"^(?:## )?Next\b", re.M)  # where a lesson's ending begins

NOQA = " # noqa: F401, RUF100 for what you write"
HEAD = """**The exercises** stand where their ideas stand. Predict, then write, then check. The checkers run your \
function on a few cases and know the usual mistakes by name; what a checker gives back, yours if it is right and else \
ours, is what the lesson goes on with. Stars say how hard (★☆☆ a few lines, ★★★ paper and pencil), minutes how long \
({minutes} in all). Unfold the hint first; the solution comes with the answer to the prediction."""


def folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def statement(e: Exercise) -> str:
    "The Markdown of one exercise."
    title = f"### {e.title}\n\n{'★' * e.stars}{'☆' * (3 - e.stars)} · about {e.minutes} minutes"
    solution = f"```python\n{e.solution}\n```\n\n**The prediction:** {e.answer}"
    return "\n\n".join([title, e.task, folded("Hint", e.hint), folded("Solution", solution)])


def stub_cell(e: Exercise):
    "The cell that the learner fills in, with what it prints as it stands."
    with redirect_stdout(io.StringIO()) as output:
        e(e.load(e.stub))
    printed = [new_output("stream", name="stdout", text=output.getvalue())]
    return new_code_cell(f"{e.stub}\n\n{checked(e)}", id=cell_id(e.name, "stub"), outputs=printed)


def checked(e: Exercise) -> str:
    "The line that checks the learner's function, and goes on with it or with ours."
    line = f"{e.name} = check_{e.name}({e.name})"
    return line if len(line) <= 100 else f"{e.name} = check_{e.name}(\n    {e.name})"


def imports(mine: list[Exercise], lesson: int) -> str:
    "What the exercises of a lesson need, with their checkers."
    names = ", ".join(f"check_{e.name}" for e in mine)
    line = f"from wikidpo.world.exercises.lesson{lesson:02} import ({names})"
    may_use = re.sub(r"(?m)$", NOQA, PRELUDE.strip(), count=0)
    return f"{may_use}\n" + textwrap.fill(line, 100, subsequent_indent="    ")


def cell_id(*parts: str) -> str:
    return "-".join(["exercise", *parts]).replace("_", "-")


def cells(lesson: int) -> list:
    "The cells of a lesson's exercises, none where it has none."
    mine = [e for e in EXERCISES.values() if e.lesson == lesson]
    if not mine:
        return []
    head = HEAD.format(minutes=sum(e.minutes for e in mine))
    found = [new_markdown_cell(head, id=cell_id("head")), new_code_cell(imports(mine, lesson), id=cell_id("imports"))]
    for e in mine:
        found += [new_markdown_cell(statement(e), id=cell_id(e.name)), stub_cell(e)]
    return found


def insert(nb, lesson: int) -> None:
    "Write the exercises of a lesson into its notebook: each in its place, a new one before the ending."
    wanted = {c.id: c for c in cells(lesson)}
    placed = [wanted.pop(c.id, None) if c.id.startswith("exercise-") else c for c in nb.cells]
    rest = [c for c in placed if c is not None]
    if not wanted:
        nb.cells = rest
        return
    endings = [i for i, c in enumerate(rest) if c.cell_type == "markdown" and NEXT.search(c.source)]
    at = endings[-1] if endings else len(rest)
    begin = NEXT.search(rest[at].source).start() if endings else 0
    if begin:  # "Next" shares a cell with what comes before it
        ending = new_markdown_cell(rest[at].source[begin:], id="next")
        rest[at].source = rest[at].source[:begin].rstrip()
        at += 1
        rest.insert(at, ending)
    nb.cells = rest[:at] + list(wanted.values()) + rest[at:]


def lessons(root: Path) -> list[tuple[Path, str, str]]:
    "(path, text as it stands, text as it should be) of every lesson."
    found = []
    for path in sorted((root / "nbs/lessons").glob("[0-9][0-9]_*.ipynb")):
        nb = nbformat.read(path, as_version=4)
        insert(nb, int(path.name[:2]))
        found.append((path, path.read_text(encoding="utf-8"), nbformat.writes(nb) + "\n"))
    return found


def main(args: list[str]) -> str | None:
    "Write, or with --check say, what is out of step."
    only = [a for a in args if a.isdecimal()]  # numbers of lessons: these alone
    stale = [(path, text) for path, old, text in lessons(ROOT) if old != text and (not only or path.name[:2] in only)]
    if "--check" in args:
        advice = "its exercises are not those of wikidpo.world.exercises: run `python tools/exercises.py`"
        return "\n".join(f"{path.relative_to(ROOT)}: {advice}" for path, _ in stale) or None
    for path, text in stale:
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
