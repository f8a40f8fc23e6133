"""The appendix page of what the lessons claim: each sentence of their recaps, the cells that hold it, their assertions.

    claims.py           writes nbs/appendix/claims.ipynb
    claims.py --check   says whether it is what this would write
"""
import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell, new_notebook
from style import Text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs/appendix/claims.ipynb"
CLOSING = 13  # measures nothing: its statements link to the others
RECAP = "## What you should have seen\n"
LINK = re.compile(r" \[checked\]\(#cell-id=([\w-]+)\)")
LONGEST = 120  # characters of an assertion

HEAD = """# What is claimed, and what asserts it
> Every sentence under "What you should have seen", the cells of its lesson that hold it, and their assertions.

A lesson ends with what it should have shown you. Each of those sentences links to the cells that check it, and a cell \
whose assertion fails stops the run of its notebook, which every change of this project has to survive: `make test` \
runs all of them. Here the three stand side by side, for all lessons but the closing one: {sentences} sentences, \
{cells} cells, {assertions} assertions. A number from a file under `nbs/results` or from the arithmetic of a small \
world is asserted to the digits that its sentence shows. A number from a run that trains may differ in its last \
digits from one machine to the next: there the sentence says "about" or gives fewer digits, and the assertion is a \
range that keeps it true. A cell asserts what other sentences of its lesson say as well, so a row may hold more than \
its sentence needs; a long assertion is cut.

`python tools/claims.py` writes this page from the lessons, and a test looks that it is up to date and that each \
sentence has its cell. Edit the lessons, never this page."""


@dataclass
class Sentence:
    "One bullet of a recap"

    text: str  # without its links
    cells: list[str]  # the ids that it links to


def lessons() -> list[Path]:
    found = sorted((ROOT / "nbs/lessons").glob("[0-9][0-9]_*.ipynb"))
    return [path for path in found if int(path.name[:2]) != CLOSING]


def sentences(nb) -> list[Sentence]:
    "The bullets of a lesson's recap."
    recap = next(c.source for c in nb.cells if c.cell_type == "markdown" and RECAP in c.source)
    bullets = re.findall(r"^- (.+)$", recap.split(RECAP)[1], re.M)
    return [Sentence(LINK.sub("", bullet), LINK.findall(bullet)) for bullet in bullets]


def asserts(node: ast.AST) -> bool:
    "Whether a statement is an assert, one of fastcore's tests, or the check of an exercise."
    if isinstance(node, ast.Assert):
        return True
    call = getattr(node, "value", None)
    if not isinstance(node, ast.Expr | ast.Assign) or not isinstance(call, ast.Call):
        return False
    name = getattr(call.func, "id", "")
    if isinstance(node, ast.Assign):
        return name == f"check_{getattr(node.targets[0], 'id', '')}"
    return name.startswith("test_")


def assertions(source: str) -> list[str]:
    "The lines of a cell that assert, a text for each statement."
    found = [node for node in Text(source, "", "cell").nodes if asserts(node)]
    spans = sorted({(node.lineno - 1, node.end_lineno) for node in found})
    lines = source.splitlines()
    return ["\n".join(lines[first:last]) for first, last in spans]


def code(source: str) -> str:
    "An assertion in code font and without its comments, in a cell of a table."
    line = " ".join(re.sub(r"\s+# .*$", "", source, flags=re.M).split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    ticks = "``" if "`" in line else "`"
    return f"{ticks}{line}{ticks}".replace("|", r"\|")


def prose(sentence: str) -> str:
    "A sentence as it stands in this folder, in a cell of a table."
    return re.sub(r"\]\((?=\w+\.ipynb)", "](../lessons/", sentence).replace("|", r"\|")


def table(name: str, nb) -> str:
    "The section of one lesson: a row for each cell that a sentence links to."
    title = re.search(r"^# (.+)$", "\n".join(c.source for c in nb.cells if c.cell_type == "markdown"), re.M)[1]
    source = {c.id: c.source for c in nb.cells}
    rows = [f"## [{title}](../lessons/{name})", "", "| sentence | cell | assertions |", "|---|---|---|"]
    listed = set()
    for sentence in sentences(nb):
        for i, cell in enumerate(sentence.cells):
            shown = "as above" if cell in listed else "<br>".join(map(code, assertions(source[cell])))
            listed.add(cell)
            said = "" if i else prose(sentence.text)
            rows.append(f"| {said} | [{cell}](../lessons/{name}#cell-id={cell}) | {shown} |")
    return "\n".join(rows)


def page() -> str:
    "The notebook, as text."
    read = {path: nbformat.read(path, as_version=4) for path in lessons()}
    said = [sentence for nb in read.values() for sentence in sentences(nb)]
    linked = {(path, cell) for path, nb in read.items() for sentence in sentences(nb) for cell in sentence.cells}
    held = [assertions(c.source) for path, nb in read.items() for c in nb.cells if (path, c.id) in linked]
    head = HEAD.format(sentences=len(said), cells=len(linked), assertions=sum(map(len, held)))
    cells = [new_markdown_cell(head, id="claims-head")]
    cells += [new_markdown_cell(table(path.name, nb), id=f"claims-{path.name[:2]}") for path, nb in read.items()]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return nbformat.writes(new_notebook(cells=cells, metadata={"kernelspec": kernel})) + "\n"


def main(args: list[str]) -> str | None:
    text = page()
    if "--check" in args:
        stale = not PAGE.exists() or PAGE.read_text("utf-8") != text
        return f"{PAGE.relative_to(ROOT)}: run `python tools/claims.py`" if stale else None
    PAGE.write_text(text, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
