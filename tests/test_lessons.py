"What every lesson has: its source's one name, its neighbours, the picture, five questions answered by cells"
import ast
import json
import re
from collections import Counter
from pathlib import Path
from statistics import median

import alone
import claims
import nbformat
import pipeline
import pytest
import style

from wikidpo.world.exercises.all import EXERCISES

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT/"nbs"/"lessons").glob("[0-9]*.ipynb"))
CLOSING = LESSONS[claims.CLOSING] # those after it go further
LONGEST = 5 # lines of the median example cell


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text(cell): return "".join(cell["source"])


def prose(path): return [text(c) for c in cells(path) if c["cell_type"] == "markdown"]


def every(*names): return pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)


@every()
def test_its_title_has_its_number(path):
    title = next(line for p in prose(path) for line in p.split("\n") if line.startswith("# "))
    assert title.startswith(f"# Lesson {path.stem[:2]} · ")


OTHER_NAMES = (r"\bthe document\b", r"\bthe course\b", r"\blesson 10 of\b(?!,? .Preference Data)", r"\bthis course\b")


PAGES = sorted((ROOT/"nbs").rglob("*.ipynb"))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_the_source_has_one_name(path):
    "It is the original lesson; what else it might be called is refused"
    found = [m[0] for p in prose(path) for pattern in OTHER_NAMES for m in re.finditer(pattern, p, re.IGNORECASE)]
    assert not found


@every()
def test_it_leads_to_its_neighbours(path):
    i, last = LESSONS.index(path), prose(path)[-1]
    links = re.findall(r"\]\(([^)]+\.ipynb)\)", last)
    wanted = [p.name for p in (LESSONS[i - 1:i] if i else []) + LESSONS[i + 1:i + 2]]
    assert links[:len(wanted)] == wanted


@every()
def test_it_shows_the_pipeline(path):
    form = r"!\[([^]]+)\]\((\.\./\.\./images/pipeline[a-z_]*\.svg)\)"
    pictures = [found for p in prose(path) for found in re.findall(form, p)]
    assert pictures and all((path.parent/where).resolve().exists() for _, where in pictures)


@every()
def test_a_long_figure_is_folded(path):
    "What is seen is the figure; who wants its code opens the fold"
    for cell in cells(path):
        if cell["cell_type"] != "code" or text(cell).startswith("#| export"): continue
        code = style.Text(text(cell), path.name, cell["id"])
        long = code.statements > 10 and re.search(r"\b(plt|figure)\.|subplots\(", code.python)
        assert not long or cell["metadata"].get("jupyter", {}).get("source_hidden"), cell["id"]


@every()
def test_five_questions_are_answered_by_cells(path):
    ids = {c["id"] for c in cells(path)}
    asked = [p for p in prose(path) if p.startswith("## Five questions")]
    assert len(asked) == 1
    folds = re.findall(r"<details><summary>\d · (.+?)</summary>(.+?)</details>", asked[0], re.DOTALL)
    assert len(folds) == 5
    for question, answer in folds:
        places = re.findall(r"\(#cell-id=([\w-]+)\)", answer)
        assert places and set(places) <= ids, (question, places)


@pytest.mark.parametrize("path", claims.lessons(), ids=lambda p: p.stem)
def test_what_should_have_been_seen_is_asserted(path):
    "Each sentence links to cells of its lesson that hold an assertion"
    nb = nbformat.read(path, as_version=4)
    asserting = {c.id for c in nb.cells if c.cell_type == "code" and claims.assertions(c.source)}
    said = claims.sentences(nb)
    assert said
    for sentence in said:
        assert sentence.cells and set(sentence.cells) <= asserting, sentence


def test_the_page_of_claims_is_what_its_script_writes():
    assert claims.main(["--check"]) is None


def lines(source):
    "Of an example: without directives, comments and blank lines"
    return [line for line in source.split("\n") if line.strip() and not line.lstrip().startswith("#")]


@every()
def test_examples_are_small(path):
    code = [text(c) for c in cells(path) if c["cell_type"] == "code"]
    examples = [len(lines(s)) for s in code if "#| export" not in s and lines(s)]
    assert median(examples) <= LONGEST


@every()
def test_outcomes_of_predictions_are_measured(path):
    "What `outcome` is told is no text that somebody typed"
    for source in (text(c) for c in cells(path) if c["cell_type"] == "code"):
        for node in ast.walk(ast.parse(re.sub(r"(?m)^([ \t]*)[%!].*$", r"\1pass", source))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "outcome":
                key, measured = node.args
                assert ast.literal_eval(key).startswith(f"{path.stem[:2]}-") and not isinstance(measured, ast.Constant)


@every()
def test_what_is_asked_is_answered(path):
    source = "\n".join(text(c) for c in cells(path) if c["cell_type"] == "code")
    asked, told = (set(re.findall(rf"\b{f}\(\s*\"(\d\d-[\w-]+)\"", source)) for f in ("ask", "outcome"))
    assert asked == told


def test_the_index_lists_every_lesson():
    index = "\n".join(prose(ROOT/"nbs"/"index.ipynb"))
    assert re.findall(r"^\| \d+ \| \[.+?\]\(lessons/(.+?)\)", index, re.M) == [p.name for p in LESSONS]


def test_the_index_says_how_long_the_exercises_take():
    index = "\n".join(prose(ROOT/"nbs"/"index.ipynb"))
    said = {int(n): int(minutes) for n, minutes in re.findall(r"^\| (\d+) \|.+, (\d+) min \|$", index, re.M)}
    minutes = Counter()
    for e in EXERCISES.values(): minutes[e.lesson] += e.minutes
    assert said == minutes


def test_links_to_cells_of_other_lessons_lead_somewhere():
    for path in LESSONS:
        for name, cell in re.findall(r"\]\(([\w.-]+\.ipynb)#cell-id=([\w-]+)\)", "\n".join(prose(path))):
            assert cell in {c["id"] for c in cells(path.parent/name)}, (path.name, name, cell)


def test_the_closing_page_has_a_takeaway_of_every_lesson():
    closing = "\n".join(prose(CLOSING))
    linked = set(re.findall(r"\]\((\d\d)_[\w]+\.ipynb#cell-id=", closing))
    assert linked == {p.name[:2] for p in LESSONS if p <= CLOSING} - {"00", "12", "13"}


def test_the_pictures_of_the_pipeline_are_what_their_script_draws():
    assert pipeline.main(["--check"]) is None


def test_a_page_can_be_opened_alone():
    "Its links on top lead to itself, and its cell installs what settings.ini names"
    assert alone.main(["--check"]) is None


@every()
def test_no_file_beside_it_is_read(path):
    "Opened alone there is none; `recorded` finds what was measured"
    code = "\n".join(text(c) for c in cells(path) if c["cell_type"] == "code")
    assert not re.search(r"""["'](?:\.\.?/|results/)""", code)


def test_the_index_opens_the_first_lesson_in_colab():
    index = "\n".join(prose(ROOT/"nbs"/"index.ipynb"))
    assert f"](../images/colab.svg)]({alone.colab('nbs/lessons/00_miniwiki.ipynb', alone.settings())})" in index
