"The text under its gate: each house rule on a small bad example, and the tree itself."
import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import style

ROOT = Path(__file__).resolve().parent.parent
FOUR = "a, b, c, d = 1, 2, 3, 4"
TALL = "x = 1 if a else 2 if b else 3 if c else 4"
LONG = "def f():\n" + 25 * "    g()\n"


def rules(source: str, cell: str = "") -> list[str]:
    "The rules that `source` breaks, with their lines."
    where = f"a.py: cell {cell}: line " if cell else "a.py: line "
    found = (fault.removeprefix(where).split(": ") for fault in style.faults(style.Text(source, "a.py", cell)))
    return [f"{rule} {line}" for line, rule, *_ in found]


@pytest.mark.parametrize(
    "source, broken",
    [
        ("[[y for y in x] for x in z]", ["comprehension 1"]),
        ("z = 1\nsum(max(y for y in x) for x in z)", ["comprehension 2"]),
        ("[x for x in z if any(y for y in x)]", ["comprehension 1"]),
        ("[y for x in z for y in x]", []),
        ("inner = [y for y in x]\nouter = [y for y in inner]", []),
        (FOUR, ["assignment 1"]),
        ("a, b, c = 1, 2, 3\na, b, c, d = f()", []),
        (TALL, ["conditional 1"]),
        ("x = 1 if a else 2 if b else 3", []),
        (LONG, ["function 1"]),
        ("class A:\n    " + LONG.replace("\n", "\n    "), ["function 2"]),
        ('def f():\n    """One.\n\n    Two.\n    """\n' + 23 * "    g()\n\n    # why\n", []),
        ("from wikidpo.judge.client import _words, score", ["private 1"]),
        ("from wikidpo import __version__\nfrom elsewhere import _x", []),
    ],
)
def test_rules_for_any_text(source, broken):
    assert rules(source) == broken


def test_a_reason_excuses_its_line_and_no_other():
    assert rules(f"{FOUR}  # style: the four corners of the table\n{FOUR}") == ["assignment 2"]


@pytest.mark.parametrize(
    "comment, accused",
    [
        ("# style:", True),
        ("# style: why", False),
        ("# noqa", True),
        ("# noqa: E731", True),
        ("# noqa: E731, B023", True),
        ("# noqa: E731 it is passed on", False),
        ("# type: ignore[arg-type]", True),
        ("# type: ignore[arg-type]  torch says Any", False),
        ("# chkstyle: ignore", True),
        ("# chkstyle: ignore a table", False),
        ("# what noqa means", False),
    ],
)
def test_an_exception_says_why(comment, accused):
    assert rules(f"x = 1  {comment}") == ["reason 1"] * accused


EXPORT = "#| export\n"
ONE = "def {}(): pass\n"


@pytest.mark.parametrize(
    "source, broken",
    [
        (EXPORT + "".join(map(ONE.format, "abc")), []),
        (EXPORT + "".join(map(ONE.format, "abcd")), ["cell 1"]),
        (EXPORT + 25 * "x = 1\n", []),
        (EXPORT + 26 * "x = 1\n", ["cell 1"]),
        ("#| export engine.head\n" + 26 * "x = 1\n", ["cell 1"]),
        (EXPORT + "class A:\n" + 25 * "    x = 1\n", ["cell 1"]),
        (EXPORT + LONG, ["function 2"]),  # once, not twice
        (12 * "x = 1\n", []),
        (13 * "x = 1\n", ["cell 1"]),
        ("import a\n" + 12 * "x = 1\n", []),
        (EXPORT + "x = \"\"\"" + 30 * "text\n" + "\"\"\"\n", []),
        ("f(" + 11 * "1,\n" + ")", []),  # one statement
        ("import a\n" * 11, []),
        ("fig, ax = plt.subplots()\n" + 19 * "x = 1\n", []),
        ("fig, ax = plt.subplots()\n" + 20 * "x = 1\n", ["cell 1"]),
        ("# style: the whole run at one look\n" + 13 * "x = 1\n", []),
        (13 * "x = 1\n" + FOUR + "  # style: four corners\n", ["cell 1"]),
        ("%matplotlib inline\n!ls\n" + FOUR, ["assignment 3"]),
    ],
)
def test_rules_for_cells(source, broken):
    assert rules(source, "1a2b") == broken


@pytest.fixture
def tree(tmp_path):
    "A small project without a fault, and a function that changes a file of it and returns what is then found"
    files = {
        "wikidpo/__init__.py": '__version__ = "1"\n',
        "wikidpo/_modidx.py": "d = {}\n",
        "wikidpo/core/loss.py": f"# {style.GENERATED}\nfrom .config import BETA\ndef loss(): pass\n",
        "wikidpo/core/config.py": "BETA = 1\n_hidden = 1\nfrom wikidpo.core import loss\n",
        "wikidpo/engine/head.py": "from ..core.loss import loss\nfrom wikidpo.core.config import BETA\n_hidden = 2\n",
        "tests/test_one.py": "def test_loss(): pass\n",
    }

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def change(name: str, text: str, *rooms: str) -> list[str]:
        write(name, text)
        return style.check(tmp_path, list(rooms or ("wikidpo", "tests")))

    for name, text in files.items():
        write(name, text)
    return change


def test_a_sound_tree_has_no_faults(tree):
    assert tree("wikidpo/engine/other.py", "from .head import _hidden\n") == []


@pytest.mark.parametrize("text", ["def loss(): pass", "class loss: pass", "loss = 1", "x, loss = f()", "loss: int = 1"])
def test_a_public_name_stands_in_one_module(tree, text):
    head = "wikidpo/engine/head.py"
    assert tree(head, text) == [f"{head}: line 1: unique: loss stands in wikidpo/core/loss.py already"]
    assert tree(head, f"{text}  # style: the same signature, faster") == []


@pytest.mark.parametrize(
    "line, name",
    [
        ("from ..engine.head import x", "wikidpo.engine.head"),
        ("from .. import engine", "wikidpo.engine"),
        ("from wikidpo.engine import head", "wikidpo.engine"),
        ("from wikidpo import engine", "wikidpo.engine"),
        ("import wikidpo.engine.head", "wikidpo.engine.head"),
        ("def f():\n    from ..judge import client", "wikidpo.judge"),
    ],
)
def test_core_imports_only_core(tree, line, name):
    data, where = "wikidpo/core/data.py", line.count("\n") + 1
    assert tree(data, line) == [f"{data}: line {where}: core: imports {name}, which is not in core"]
    assert tree(data, "from . import loss\nfrom .config import BETA\nimport os.path, torch.nn") == []


def test_rooms_may_be_named(tree):
    two = "tests/test_two.py"
    assert tree(two, FOUR) == tree(two, FOUR, two) == [f"{two}: line 1: assignment: pairs 4 things, at most 3"]
    assert tree(two, FOUR, "wikidpo") == tree(two, FOUR, "wikidpo", "tests/test_one.py") == []


def test_cells_are_named_by_their_ids(tree):
    cells = [{"cell_type": kind, "id": kind, "source": [FOUR, "\n"]} for kind in ("code", "markdown")]
    said = tree("nbs/one.ipynb", json.dumps({"cells": cells}), "nbs")
    assert said == ["nbs/one.ipynb: cell code: line 1: assignment: pairs 4 things, at most 3"]


def test_what_nbdev_wrote_is_looked_at_in_its_notebook(tree):
    assert tree("wikidpo/core/loss.py", f"# AUTOGENERATED! DO NOT EDIT!\n{FOUR}") == []


def test_the_command_ends_as_a_command_should(tmp_path):
    command = [sys.executable, ROOT / "tools/style.py", "tools/style.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "style: nothing to mend\n")


def test_the_changelog_knows_this_version():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    section = lines.index(f"## {config['DEFAULT']['version']}")
    assert any(line.startswith("- ") for line in lines[section:]), "one line a change"
