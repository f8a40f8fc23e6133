"The tools behind `make`, on a small project of their own: each check passes on it, and finds what is then broken."
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import check
import readme

ROOT = Path(__file__).resolve().parent.parent


def write(path: Path, *cells) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for n, cell in enumerate(cells):
        cell.id = f"cell{n}"
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nb = new_notebook(cells=list(cells), metadata={"kernelspec": kernel})
    path.write_text(nbformat.writes(nb) + "\n", encoding="utf-8")


def printed(text: str) -> list:
    return [new_output("stream", name="stdout", text=text)]


def lesson(output: str = "2\n", source: str = "print(one() + 1)") -> list:
    return [
        new_code_cell("#| default_exp core"),
        new_markdown_cell("# One"),
        new_code_cell('#| export\ndef one(): return 1'),
        new_code_cell(source, outputs=printed(output) if output else []),
        new_code_cell("assert one() == 1"),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    (root / "tests").mkdir()
    (root / "tests/test_one.py").write_text("from wikidpo.core import one\ndef test_one(): assert one() == 1\n")
    (root / "wikidpo").mkdir()
    write(root / "nbs/lessons/01_one.ipynb", *lesson())
    write(root / "nbs/index.ipynb", new_markdown_cell("# Toy\n\n[one](lessons/01_one.ipynb)"))
    for command in ("nbdev-export", "nbdev-clean"):
        assert check.run(command, cwd=root) == (0, "")
    (root / "README.md").write_text(readme.render(json.loads((root / "nbs/index.ipynb").read_text())))
    return root


@pytest.fixture
def toy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "toy")


def stage(name: str, root: Path, *options: str) -> check.Result:
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        return check.STAGES[name](root, Path(scratch), list(options))


@pytest.mark.parametrize("name", check.STAGES)
def test_passes_on_a_sound_tree(name, toy):
    before = sorted(p for p in toy.rglob("*"))
    result = stage(name, toy)
    assert (result.failed, result.detail) == (0, "") and result.passed >= 1
    assert sorted(p for p in toy.rglob("*")) == before, "a check leaves nothing behind"


@pytest.mark.parametrize(
    "path, text, why",
    [
        ("wikidpo/core.py", "def one(): return 2\n", "differs from its notebook"),
        ("wikidpo/hand.py", "x = 1\n", "no notebook exports it"),
        ("wikidpo/_modidx.py", "d = {}\n", "differs"),
    ],
)
def test_export_finds(path, text, why, toy):
    (toy / path).write_text(text)
    result = stage("export", toy)
    assert result.failed == 1 and path in result.detail and why in result.detail


def shown(kind: str, **what):
    "A cell with one output of this kind."
    return new_code_cell("1", outputs=[new_output(kind, **what)])


ERROR = shown("error", ename="ZeroDivisionError", evalue="", traceback=[])
STATE = shown("display_data", data={"application/vnd.jupyter.widget-state+json": {}})
WIDGET = shown("display_data", data={"application/vnd.jupyter.widget-view+json": {}})


@pytest.mark.parametrize(
    "cells, why",
    [
        (lesson("in /home/ada/x\n"), "a path of one machine"),
        (lesson("in {root}/nbs\n"), "a path of one machine"),
        (lesson(" 50%|#####     | 1/2 [00:01<00:01, 1.0it/s]\n"), "a progress bar"),
        (lesson(""), "no outputs"),
        ([*lesson(), new_code_cell("print(3)")], "no output is committed"),
        ([*lesson(), ERROR], "an error"),
        ([*lesson(), STATE], "widget state"),
        ([*lesson(), WIDGET], "dead without its kernel"),
        ([*lesson(), new_code_cell("one()", execution_count=7)], "not clean"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_clean_finds(cells, why, toy):
    for cell in cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = output["text"].replace("{root}", str(toy))
    write(toy / "nbs/lessons/01_one.ipynb", *cells)
    if why != "not clean":
        assert check.run("nbdev-clean", cwd=toy)[0] == 0
    result = stage("clean", toy)
    assert result.failed == 1 and why in result.detail, result.detail
    assert result.passed == 1, "the other notebook is counted as it was"


def test_clean_lets_cells_that_do_not_run_be_silent(toy):
    silent = new_code_cell("#| gpu\nprint(1)"), new_code_cell("#| eval: false\nprint(1)")
    write(toy / "nbs/lessons/01_one.ipynb", *lesson(), *silent)
    assert check.run("nbdev-clean", cwd=toy)[0] == 0
    assert stage("clean", toy).detail == ""


def test_notebooks_shows_the_traceback(toy):
    cell = new_code_cell("from wikidpo.core import one\nassert one() == 2, 'one is not two'")
    write(toy / "nbs/lessons/02_bad.ipynb", cell)
    result = stage("notebooks", toy)
    assert (result.passed, result.failed) == (2, 1)
    assert "nbs/lessons/02_bad.ipynb" in result.detail and "AssertionError: one is not two" in result.detail


def test_pytest_counts_and_passes_options_on(toy):
    (toy / "tests/test_two.py").write_text(
        "import pytest\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_good(): pass\n"
        "@pytest.mark.skip\n"
        "def test_later(): pass\n"
    )
    (toy / "tests/test_three.py").write_text("import nowhere\n")
    result = stage("pytest", toy)
    assert (result.passed, result.failed, result.skipped) == (2, 2, 1)  # a file that cannot be imported hides no other
    assert "test_bad" in result.detail and "nowhere" in result.detail
    (toy / "tests/test_three.py").unlink()
    result = stage("pytest", toy, "-k", "good")
    assert (result.passed, result.failed) == (1, 0)


@pytest.mark.parametrize(
    "source, who, why",
    [
        ("x = 1; print(2)", "ruff", "E702"),
        (f"x = '{105 * 'x'}'\nprint(2)".replace("xx", "x "), "ruff, where a learner reads", "E501"),
        ("import os\nprint(os.sep)", "chkstyle", "[mixed-imports]"),
        ("a, b, c, d = 1, 2, 3, 4\nprint(2)", "tools/style.py", "cell cell3: line 1: assignment"),
    ],
    ids=lambda x: x.split()[0],
)
def test_style_finds(source, who, why, toy):
    write(toy / "nbs/lessons/01_one.ipynb", *lesson(source=source))
    result = stage("style", toy)
    assert (result.passed, result.failed) == (3, 1), result.detail
    assert f"--- {who}\n" in result.detail and why in result.detail


def test_core_is_checked_for_types(toy):
    (toy / "wikidpo/core").mkdir()
    (toy / "wikidpo/core/loss.py").write_text("def loss(z): return z\nloss(1, 2)\n")
    assert "Too many arguments" in stage("style", toy).detail


def test_no_test_at_all_is_a_failure(toy):
    assert stage("pytest", toy, "-k", "nothing_is_called_this").failed == 1


def test_readme_finds(toy):
    (toy / "README.md").write_text("# Toy\n")
    (toy / "nbs/lessons/01_one.ipynb").unlink()
    detail = stage("readme", toy).detail
    assert "run `make readme`" in detail and "nbs/lessons/01_one.ipynb, which does not exist" in detail


def test_readme_render():
    links = '![plot](../images/a.svg) [web](https://x.org/a) [here](#b) <img src="../images/b.png">'
    nb = new_notebook(cells=[
        new_markdown_cell(links),
        new_code_cell("#| hide\nimport os"),
        new_code_cell("#| eval: false\nprint(1)", outputs=printed("1\n")),
        new_code_cell("2", outputs=[new_output("execute_result", {"text/plain": "2"})]),
    ])
    assert readme.render(nb).split("\n\n", 1)[1] == (
        '![plot](images/a.svg) [web](https://x.org/a) [here](#b) <img src="images/b.png">\n\n'
        "```python\nprint(1)\n```\n\n```\n1\n```\n\n```python\n2\n```\n\n```\n2\n```\n"
    )
    nb.cells[3].outputs = [new_output("display_data", {"image/png": "", "text/plain": "<Figure>"})]
    with pytest.raises(SystemExit, match="images/"):
        readme.render(nb)


def test_copy_tree_takes_what_git_would(tmp_path):
    root = tmp_path / "root"
    for name in (".gitignore", "new.py", "runs/big.pt", ".hypothesis/constants/1"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("runs/\n.hypothesis/\n")

    def files(tree: Path) -> list[str]:
        return sorted(p.relative_to(tree).as_posix() for p in tree.rglob("*") if p.is_file())

    assert files(check.copy_tree(root, tmp_path / "without_git")) == [".gitignore", "new.py"]
    subprocess.run(["git", "init", "-q", root], check=True)
    assert files(check.copy_tree(root, tmp_path / "with_git")) == [".gitignore", "new.py"]


def test_every_stage_runs_and_the_last_line_counts(toy, monkeypatch, capsys):
    (toy / "wikidpo/hand.py").write_text("x = 1\n")
    (toy / "README.md").unlink()
    monkeypatch.setattr(check, "ROOT", toy)
    assert check.main([]) == 1
    out = capsys.readouterr().out
    passed = 4 + 3 + 2 + 2 + 1  # checkers, modules, notebooks cleaned and run, a test
    assert out.splitlines()[-1] == f"{passed} passed, 2 failed"  # hand.py and README.md
    assert "===== export: 1 failed" in out and "===== readme: 1 failed" in out
    assert check.main(["clean"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 0 failed"


def test_a_crash_in_a_stage_is_a_failure(monkeypatch, capsys):
    monkeypatch.setitem(check.STAGES, "clean", lambda *_: 1 / 0)
    assert check.main(["clean"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_unknown_stage_is_refused():
    done = subprocess.run([sys.executable, ROOT / "tools/check.py", "lint"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no stage 'lint'")


def test_constraints_pin_every_requirement():
    "Each requirement of settings.ini has an exact pin that it accepts; no line names an index, a path or a build."
    from configparser import ConfigParser

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    assert len(pins) == len(lines)
    for pin in pins.values():
        assert [s.operator for s in pin.specifier] == ["=="]
    assert not any("+" in line or "@" in line for line in lines)
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = config["DEFAULT"]
    for key in ("requirements", "lessons_requirements", "dev_requirements", "lab_requirements"):
        for req in map(Requirement, cfg[key].split()):
            (pinned,) = pins[canonicalize_name(req.name)].specifier
            assert req.specifier.contains(pinned.version, prereleases=True), req


def test_evidence_is_configured_as_the_profile_says_with_what_is_changed():
    import evidence

    train = evidence.configured("train", seed=3, wandb="disabled")
    assert (train.seed, train.lr) == (3, evidence.PROFILE["train"]["lr"])
    judged = {"decided_win_rate": 0.6, "ci_low": 0.5, "ci_high": 0.7, "win": 6, "loss": 4}
    assert evidence.win_rate(judged) == "60.0% (50.0% to 70.0%)"
    assert evidence.win_rate_of_decided(judged) == "win rate 0.600 [0.500, 0.700] of 10"


def test_the_better_answer_stands_first_in_a_pair_of_margins():
    import world

    found = [(0, 9, "Oslo."), (0, 3, "Oslo, by the way."), (0, 8, "Rome."), (1, 9, "Bern."), (1, 9, "Bonn."),
             (2, 5, "Kiel."), (2, 1, "Riga.")]
    samples = [{"prompt_id": i, "prompt": f"Question {i}?", "score": score, "text": text, "ids": [], "finished": True}
               for i, score, text in found]
    pairs = world.every_pair(samples, world.configured("mine"))
    # 9 and 8 are too close, 9 and 9 equal, 5 is below the floor
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("Oslo.", found[1][2]), ("Rome.", found[1][2])]


def test_phrasing_counts_the_teachers_words_and_those_that_are_right():
    import pairs_study

    texts = [("It is Paris.", 9), ("You are looking for Rome.", 2), ("Paris is the capital.", 9)]
    verdicts = [{"a": text, "truth_a": truth} for text, truth in texts]
    assert pairs_study.phrasing(verdicts) == {"teacher_phrasing": 2 / 3, "phrased_right": 1 / 2}
    assert pairs_study.phrasing(verdicts[2:]) == {"teacher_phrasing": 0.0, "phrased_right": None}


@pytest.mark.parametrize("words", [["--help"], ["style", "-h"]])
def test_help_explains_and_runs_nothing(words, capsys):
    assert check.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("What `make test` runs.") and "passed" not in printed


def test_make_kernel_tells_other_labs_of_this_environment(tmp_path):
    bin_dir = Path(sys.executable).parent
    done = subprocess.run(["make", "-o", "install", "kernel", f"BIN={bin_dir}"], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"JUPYTER_DATA_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    spec = json.loads((tmp_path / "kernels/wikidpo/kernel.json").read_text())
    assert spec["argv"][0].startswith(str(bin_dir)) and spec["display_name"] == "wikidpo"
