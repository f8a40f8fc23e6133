"""What `make test` runs. Every stage runs, whatever the ones before it found, and the last line counts them all.

    check.py                      all stages
    check.py clean readme         these only
    check.py pytest -k loss       one stage; options that follow go to pytest

The stages work on copies of the tree (what git tracks, and new files that it does not ignore), so they see what a clone
would hold, and leave nothing behind.
"""
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import nbformat

import readme

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2  # notebooks, or files of tests, run at a time
TIMEOUT = 900  # seconds a notebook or a command may take, pytest excepted
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv*", "runs", "wandb", "build", "dist", "__pycache__", "*.egg-info", ".*_cache")


@dataclass
class Result:
    passed: int = 0
    failed: int = 0
    detail: str = ""  # what a person needs in order to mend it
    skipped: int = 0

    def fail(self, name: str, why: str) -> None:
        self.failed += 1
        self.detail += f"\n--- {name}\n{why.strip()}\n"


def copy_tree(root: Path, to: Path) -> Path:
    "Copy the source files of `root` into the new folder `to`: git's list, or all but the usual leftovers where there is no git."
    git = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    if git.returncode:
        shutil.copytree(root, to, ignore=NOT_SOURCE)
    for name in filter(None, git.stdout.split("\0")):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    return to


def run(*command: str, cwd: Path, timeout: float | None = TIMEOUT) -> tuple[int, str]:
    "Run a program of this environment in `cwd`: its exit status, and all it wrote, with paths relative to `cwd`."
    bin_dir = Path(sys.executable).parent
    # A test run logs to nobody's account; what runs at a time shares the cores.
    env = os.environ | {
        "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(cwd),
        "MPLBACKEND": "agg",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, *command] if command[0] == "-m" else [str(bin_dir / command[0]), *command[1:]],
            cwd=cwd, env=env, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            encoding="utf-8", errors="replace",
        )
    except subprocess.TimeoutExpired as e:
        return 1, f"stopped after {timeout:.0f} seconds\n{(e.stdout or b'').decode(errors='replace')}"
    return done.returncode, done.stdout.replace(f"{cwd}/", "")


def notebooks(root: Path) -> list[str]:
    "Every notebook that nbdev looks at, relative to `root`."
    names = (p.relative_to(root) for p in sorted((root / "nbs").rglob("*.ipynb")))
    return [n.as_posix() for n in names if not any(part[0] in "_." for part in n.parts)]


# --- the stages: each takes the tree, a scratch folder and pytest's options


def export(root: Path, scratch: Path, _) -> Result:
    "wikidpo/*.py are what nbdev_export makes of the notebooks, byte for byte, and nothing else."
    tree = copy_tree(root, scratch / "tree")
    modules = lambda: {p.relative_to(tree).as_posix(): p.read_bytes() for p in (tree / "wikidpo").rglob("*.py")}
    before = modules()
    for name in before:
        if not name.endswith("__init__.py"):  # nbdev_export only sets the version in it
            (tree / name).unlink()
    status, log = run("nbdev_export", cwd=tree)
    if status:
        return Result(failed=1, detail=log)
    after, result = modules(), Result()
    for name in sorted(before | after):
        if before.get(name) == after.get(name):
            result.passed += 1
        elif name not in after:
            result.fail(name, "no notebook exports it: remove it")
        else:
            result.fail(name, "differs from its notebook: run `make export`")
    return result


def clean(root: Path, scratch: Path, _) -> Result:
    "Notebooks hold the outputs of a clean run, and nothing that changes from machine to machine."
    tree = copy_tree(root, scratch / "tree")
    status, log = run("nbdev_clean", cwd=tree)
    if status:
        return Result(failed=1, detail=log)
    settings, result = ConfigParser(), Result()
    settings.read(root / "settings.ini", encoding="utf-8")
    flags = settings["DEFAULT"].get("tst_flags", "").split()
    for name in notebooks(tree):
        found = faults(name, nbformat.read(tree / name, as_version=4), root, flags)
        if (tree / name).read_bytes() != (root / name).read_bytes():
            found.append("not clean: run `nbdev_clean`")
        if found:
            result.fail(name, "\n".join(found))
        else:
            result.passed += 1
    return result


def readme_in_sync(root: Path, scratch: Path, _) -> Result:
    "README.md is what nbs/index.ipynb says, and its links lead somewhere."
    found = readme.problems(root)
    return Result(failed=1, detail="\n".join(found)) if found else Result(passed=1)


def notebooks_run(root: Path, scratch: Path, _) -> Result:
    "Every notebook runs from top to bottom (nbdev_test)."
    tree, result = copy_tree(root, scratch / "tree"), Result()

    def one(name):
        start = time.perf_counter()
        status, log = run("nbdev_test", "--path", name, "--n_workers", "0", cwd=tree)
        print(f"  {name} {'FAILED' if status else 'ok'} ({time.perf_counter() - start:.0f} s)", flush=True)
        return name, status, log

    with ThreadPoolExecutor(WORKERS) as pool:
        for name, status, log in pool.map(one, notebooks(tree)):
            if status:
                result.fail(name, log.split("\nnbdev Tests Failed")[0])
            else:
                result.passed += 1
    return result


def pytest(root: Path, scratch: Path, options: list[str]) -> Result:
    "tests/, without those marked slow or vllm; those marked browser only where there is a Chromium."
    tree, report = copy_tree(root, scratch / "tree"), scratch / "pytest.xml"
    own = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}", "-n", str(WORKERS), "--dist", "loadfile")
    marked = ("-m", "not slow and not vllm") if shutil.which("chromium") else ()
    status, log = run("-m", "pytest", *own, *marked, *options, cwd=tree, timeout=None)
    if not report.exists():
        return Result(failed=1, detail=log)
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    tests, failures, errors, skipped = (sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped"))
    # A test that passes and then fails in its teardown counts twice in failures + errors; no test at all is a failure.
    failed = max(failures + errors, int(status != 0))
    return Result(max(tests - failed - skipped, 0), failed, log if failed else "", skipped)


STAGES = {"export": export, "clean": clean, "readme": readme_in_sync, "notebooks": notebooks_run, "pytest": pytest}


# --- what must not be in a committed notebook

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|var/folders)/")
PROGRESS_BAR = re.compile(r"\d%\|.*\||\d(?:it/s|s/it)\b|\r(?!\n)")
DIRECTIVE = re.compile(r"^#\|\s*(.+?)\s*$", re.M)


def is_run(source: str, flags: list[str]) -> bool:
    "Whether a plain test run executes the cell: not where `#| eval: false` or one of the project's test flags stands in it."
    directives = [d.replace(":", " ").split() for d in DIRECTIVE.findall(source)]
    return not any(d[0] in flags or d == ["eval", "false"] for d in directives)


def shows(source: str) -> bool:
    "Whether a cell surely shows something: print or plt.show stands at its top level."
    try:
        body = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M)).body
    except SyntaxError:
        return False
    calls = (ast.unparse(node.value.func) for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    return any(c in ("print", "display", "plt.show") for c in calls)


def faults(name: str, nb, root: Path, flags: list[str]) -> list[str]:
    "What is wrong with the outputs of one notebook, a line each."
    found = []
    if "widgets" in nb.metadata:
        found.append("metadata.widgets: code hosts then refuse to show the page")
    code = [c for c in nb.cells if c.cell_type == "code"]
    if name.startswith("nbs/lessons/") and not any(c.outputs for c in code):
        found.append("no outputs: a lesson is committed with those of a clean run")
    for n, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        where = f"cell {n} ({cell.id})"
        if not cell.outputs and is_run(cell.source, flags) and shows(cell.source):
            found.append(f"{where}: shows something, but no output is committed")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"{where}: an error as output: {output.ename}")
                continue
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "application/vnd.jupyter.widget-state+json" in data:
                found.append(f"{where}: widget state")
            if "application/vnd.jupyter.widget-view+json" in data:
                found.append(f"{where}: a widget, which is dead without its kernel: run the notebook without a browser (nbclient), which leaves the static twin")
            text = "\n".join(v for k, v in data.items() if k.startswith("text/") or k == "image/svg+xml")
            text = text.replace(f"{root}/", "/home/HERE/")
            if path := MACHINE_PATH.search(text):
                found.append(f"{where}: a path of one machine: {text[max(path.start() - 20, 0):path.end() + 40]!r}")
            if bar := PROGRESS_BAR.search(text):
                found.append(f"{where}: a progress bar: {bar[0]!r}")
    return found


def main(arguments: list[str]) -> int:
    names = []
    while arguments and arguments[0] in STAGES:
        names.append(arguments.pop(0))
    if arguments and not arguments[0].startswith("-") and "pytest" not in names:
        sys.exit(f"error: no stage {arguments[0]!r}: there are {', '.join(STAGES)}")
    results = {}
    for name in names or STAGES:
        stage, start = STAGES[name], time.perf_counter()
        print(f"{name}: {stage.__doc__}", flush=True)
        with tempfile.TemporaryDirectory(prefix="wikidpo-") as scratch:
            try:
                result = stage(ROOT, Path(scratch).resolve(), arguments)
            except Exception:
                result = Result(failed=1, detail=traceback.format_exc())
        results[name] = result
        skipped = f", {result.skipped} skipped" if result.skipped else ""
        word = "FAILED" if result.failed else "ok"
        print(f"  {word}: {result.passed} passed, {result.failed} failed{skipped} ({time.perf_counter() - start:.0f} s)", flush=True)
    for name, result in results.items():
        if result.failed:
            print(f"\n===== {name}: {result.failed} failed\n{result.detail.rstrip()}")
    failed = sum(r.failed for r in results.values())
    print(f"\n{sum(r.passed for r in results.values())} passed, {failed} failed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
