"The list of wrong changes does not rot, and the tool that tries them tells noticed from not noticed"
import sys

import pytest

import mutations
from mutants import KNOWN, MUTANTS, Mutant


def test_every_change_can_be_made_and_has_its_tests():
    assert mutations.problems() == []
    assert len(MUTANTS) >= 100 and len(KNOWN) <= 5 and all(KNOWN.values())


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A package of one file with one test"
    for folder in ("wikidpo", "tests"): (tmp_path/folder).mkdir()
    (tmp_path/"wikidpo/one.py").write_text("one = 1 # the number\n")
    read = "exec(open('wikidpo/one.py').read())"
    (tmp_path/"tests/test_one.py").write_text(f"def test_one():\n    {read}\n    assert locals()['one'] == 1\n")
    (tmp_path/"pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(mutations, "PATIENCE", 30)
    return tmp_path


@pytest.mark.parametrize("old, new, seen", [
    ("one = 1", "one = 2", True), ("the number", "a number", False), ("one = 1", "one =", True),
    ("one = 1", "while True: pass", True)])
def test_a_change_is_noticed_or_not_and_undone(toy, monkeypatch, old, new, seen):
    if "while" in new: monkeypatch.setattr(mutations, "PATIENCE", 3)
    change = Mutant("one.py", "test_one.py", old, new)
    assert mutations.noticed(toy, change, toy/"log") == seen
    assert (toy/"wikidpo/one.py").read_text() == "one = 1 # the number\n"


def test_a_test_that_is_not_there_is_no_noticing(toy):
    with pytest.raises(SystemExit, match="could not run"):
        mutations.noticed(toy, Mutant("one.py", "test_one.py::test_two", "1", "2"), toy/"log")


def test_a_list_that_rots_is_named(monkeypatch):
    monkeypatch.setattr(mutations, "MUTANTS", [
        Mutant("core/pairs.py", "test_pairs.py", "no such text", "x"),
        Mutant("core/pairs.py", "test_none.py", "in (max, min)", "x"),
        Mutant("core/pairs.py", "test_pairs.py::test_nothing", "in (max, min)", "y")])
    monkeypatch.setattr(mutations, "KNOWN", {})
    assert [p.split(": ")[1] for p in mutations.problems()] == ["stands there 0 times", "no such test", "no such test"]


def test_the_package_is_not_loaded_before_it_is_changed():
    import subprocess
    code = "import sys, mutations; sys.exit(any(name.startswith('wikidpo') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=mutations.ROOT/"tools").returncode == 0
