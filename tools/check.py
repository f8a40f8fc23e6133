"""What `make test` runs. Every stage runs, whatever the ones before it found, and the last line counts them all.

    check.py                      all stages
    check.py style readme         these only
    check.py notebooks            the half of "tests" that are notebooks
    check.py pytest -k loss       the other half; options that follow go to pytest

The stages work on copies of the tree (what git tracks, and new files that it does not ignore), so they see what a clone
would hold, and leave nothing behind. "style" only reads, and reads the tree itself.
"""
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ET
from collections import Counter
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import readme
import style as house

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 3  # notebooks and files of tests run at a time: two cores, and some of them wait for servers
TIMEOUT = 900  # seconds that a notebook or a command may take before it is taken to hang; pytest may take any
SLOWEST = 20  # are named at the end of a run
LEFTOVERS = (".git", ".venv*", "runs", "wandb", "build", "dist", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
NARROW = ("nbs/core", "nbs/lessons", "nbs/appendix/ppo.ipynb")  # where a learner reads, and what becomes core
COLUMNS = 100  # there; elsewhere what pyproject.toml says


@dataclass
class Result:
    passed: int = 0
    failed: int = 0
    detail: str = ""  # what a person needs in order to mend it
    skipped: int = 0
    remark: str = ""  # worth a look though nothing failed

    def fail(self, name: str, why: str) -> None:
        self.failed += 1
        self.detail += f"\n--- {name}\n{why.strip()}\n"

    def add(self, name: str, why: str) -> None:
        "One check more: `why` is empty where it passed."
        if why:
            self.fail(name, why)
        else:
            self.passed += 1


def copy_tree(root: Path, to: Path) -> Path:
    "Copy the sources of `root` into the new folder `to`: git's list, or without git all but the usual leftovers."
    git = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    if git.returncode:
        shutil.copytree(root, to, ignore=shutil.ignore_patterns(*LEFTOVERS))
    for name in filter(None, git.stdout.split("\0")):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    return to


def environment(cwd: Path) -> dict:
    "A test run logs to nobody's account; what runs at a time shares the cores."
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(cwd),
        "MPLBACKEND": "agg",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run(*command: str, cwd: Path, timeout: float | None = TIMEOUT, show: str = "") -> tuple[int, str]:
    """Run a program of this environment, or a script of ours, in `cwd`: its exit status, and all it wrote, with paths
    relative to `cwd`. Lines that `show` matches are printed while it runs."""
    env = environment(cwd)
    program, *options = (sys.executable, *command) if command[0].endswith(".py") else command
    if not shutil.which(program, path=env["PATH"]):
        return 1, f"{program} is not installed: run `make install`"
    process = subprocess.Popen(
        [shutil.which(program, path=env["PATH"]), *options],
        cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace",
    )
    watch = threading.Timer(timeout or threading.TIMEOUT_MAX, process.kill)
    watch.start()
    written = []
    for line in process.stdout:
        written.append(line)
        if show and re.search(show, line):
            print(" ", line.strip(), flush=True)
    stopped = "" if watch.is_alive() else f"stopped after {timeout:.0f} seconds\n"
    watch.cancel()
    return process.wait(), stopped + "".join(written).replace(f"{cwd}/", "")


def nbdev(command: str, cwd: Path, *options: str) -> tuple[int, str]:
    return run(f"nbdev-{command}", *options, cwd=cwd)


def notebooks(root: Path) -> list[str]:
    "Every notebook that nbdev looks at, relative to `root`."
    names = [p.relative_to(root).as_posix() for p in sorted((root / "nbs").rglob("*.ipynb"))]
    return [name for name in names if not re.search(r"/[_.]", name)]


# --- the stages: each takes the tree, a scratch folder and pytest's options


def style(root: Path, scratch: Path, _) -> Result:
    "The text: ruff, chkstyle on the notebooks, tools/style.py, and mypy on core."
    result = Result()
    rooms = [room for room in house.ROOMS if (root / room).exists()]
    narrow = [room for room in NARROW if (root / room).exists()]
    ruff = ("ruff", "check", "--no-cache", "--output-format", "concise")
    result.add("ruff", failure(*ruff, *rooms, cwd=root))
    if narrow:
        columns = ("--select", "E501", "--line-length", str(COLUMNS))
        result.add("ruff, where a learner reads", failure(*ruff, *columns, *narrow, cwd=root))
    said = failure("chkstyle", "--show-rule", "nbs", cwd=root)
    result.add("chkstyle", "\n".join(re.findall(r"^# (.+)", said, re.M)) or said)
    result.add("tools/style.py", "\n".join(house.check(root, rooms)))
    if (root / "wikidpo/core").exists():
        result.add("mypy", failure("mypy", "--no-error-summary", f"--cache-dir={scratch}", "wikidpo/core", cwd=root))
    return result


def failure(*command: str, cwd: Path) -> str:
    "What a command says when it fails, and nothing when it does not."
    status, log = run(*command, cwd=cwd)
    return log or "failed, and said nothing" if status else ""


def modules(tree: Path) -> dict[str, bytes]:
    return {p.relative_to(tree).as_posix(): p.read_bytes() for p in (tree / "wikidpo").rglob("*.py")}


def export(root: Path, scratch: Path, _) -> Result:
    "wikidpo/*.py are what nbdev-export makes of the notebooks, byte for byte, and nothing else."
    tree = copy_tree(root, scratch / "tree")
    before = modules(tree)
    for name in before:
        if not name.endswith("__init__.py"):  # nbdev-export only sets the version in it
            (tree / name).unlink()
    status, log = nbdev("export", tree)
    if status:
        return Result(failed=1, detail=log)
    after, result = modules(tree), Result()
    for name in sorted(before | after):
        why = "differs from its notebook: run `make export`" if name in after else "no notebook exports it: remove it"
        result.add(name, "" if before.get(name) == after.get(name) else why)
    return result


def clean(root: Path, scratch: Path, _) -> Result:
    "Notebooks hold the outputs of a clean run, and nothing that changes from machine to machine."
    import nbformat  # takes seconds, which the processes of one_queue.py do not need to spend

    tree = copy_tree(root, scratch / "tree")
    status, log = nbdev("clean", tree)
    if status:
        return Result(failed=1, detail=log)
    settings, result = ConfigParser(), Result()
    settings.read(root / "settings.ini", encoding="utf-8")
    flags = settings["DEFAULT"].get("tst_flags", "").split()
    for name in notebooks(tree):
        found = faults(name, nbformat.read(tree / name, as_version=4), root, flags)
        if (tree / name).read_bytes() != (root / name).read_bytes():
            found.append("not clean: run `nbdev-clean`")
        result.add(name, "\n".join(found))
    return result


def readme_in_sync(root: Path, scratch: Path, _) -> Result:
    "README.md is what nbs/index.ipynb says, and its links lead somewhere."
    found = readme.problems(root)
    return Result(failed=1, detail="\n".join(found)) if found else Result(passed=1)


def tests(root: Path, scratch: Path, options: list[str]) -> Result:
    """Every notebook, from top to bottom, and tests/, from one queue. Not what is marked slow, vllm or smollm2; what is
    marked browser only where there is a Chromium, and a lesson that runs there is not run by nbdev as well."""
    seen = "nbs/lessons/" if seen_in_browser(root, options) else "nothing"
    return queue(root, scratch, ["tests", *(n for n in notebooks(root) if not n.startswith(seen))], options)


def notebooks_run(root: Path, scratch: Path, options: list[str]) -> Result:
    "Every notebook runs from top to bottom (nbdev-test)."
    return queue(root, scratch, notebooks(root), options)


def pytest(root: Path, scratch: Path, options: list[str]) -> Result:
    "tests/, without those marked slow, vllm or smollm2; those marked browser only where there is a Chromium."
    return queue(root, scratch, ["tests"], options)


def seen_in_browser(root: Path, options: list[str]) -> bool:
    "Whether tests/test_browser.py will run every lesson in a real JupyterLab."
    return bool(shutil.which("chromium")) and (root / "tests/test_browser.py").exists() and not options


def queue(root: Path, scratch: Path, what: list[str], options: list[str]) -> Result:
    "Run notebooks and folders of tests with tools/one_queue.py."
    tree, report = copy_tree(root, scratch / "tree"), scratch / "pytest.xml"
    own = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"-n{WORKERS}", f"--junitxml={report}")
    marked = ("-m", "not slow and not vllm and not smollm2") if shutil.which("chromium") else ()
    script = str(Path(__file__).with_name("one_queue.py"))
    status, log = run(script, *own, *marked, *options, *what, cwd=tree, timeout=None, show=r"\[ *\d+%\]$")
    if not report.exists():
        return Result(failed=1, detail=log)
    return count(ET.parse(report).getroot(), status, log)


def count(report: ET.Element, status: int, log: str) -> Result:
    "What a JUnit report says."
    n = Counter()
    for suite in report.iter("testsuite"):
        n.update({key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")})
    # A test that passes and then fails in its teardown counts twice in failures + errors; no test at all is a failure.
    failed = max(n["failures"] + n["errors"], int(status != 0))
    passed = max(n["tests"] - failed - n["skipped"], 0)
    return Result(passed, failed, log if failed else "", n["skipped"], slowest(report))


def slowest(report: ET.Element) -> str:
    "What took longest, setup and teardown counted in."
    cases = [(float(case.get("time", 0)), case.get("classname"), case.get("name")) for case in report.iter("testcase")]
    ranked = sorted(cases, reverse=True)[:SLOWEST]
    return "\n".join(["The slowest:", *(f"{seconds:6.1f} s  {where} {name}" for seconds, where, name in ranked)])


STAGES = {
    "style": style,
    "export": export,
    "clean": clean,
    "readme": readme_in_sync,
    "tests": tests,
    "notebooks": notebooks_run,
    "pytest": pytest,
}
ALL = ("style", "export", "clean", "readme", "tests")


# --- what must not be in a committed notebook

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|var/folders)/")
PROGRESS_BAR = re.compile(r"\d%\|.*\||\d(?:it/s|s/it)\b|\r(?!\n)")
WIDGETS = {
    "application/vnd.jupyter.widget-state+json": "widget state",
    "application/vnd.jupyter.widget-view+json": "a widget, which is dead without its kernel: run the "
    "notebook without a browser (nbclient), which leaves the static figure",
}
DIRECTIVE = re.compile(r"^#\|\s*(.+?)\s*$", re.M)


def is_run(source: str, flags: list[str]) -> bool:
    "Whether a plain test run executes the cell: not where `#| eval: false` or one of the project's test flags stands."
    directives = [d.replace(":", " ").split() for d in DIRECTIVE.findall(source)]
    return not any(d[0] in flags or d == ["eval", "false"] for d in directives)


def shows(source: str) -> bool:
    "Whether a cell surely shows something: print or plt.show stands at its top level."
    try:
        body = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M)).body
    except SyntaxError:
        return False
    values = (node.value for node in body if isinstance(node, ast.Expr))
    return any(isinstance(v, ast.Call) and ast.unparse(v.func) in ("print", "display", "plt.show") for v in values)


def faults(name: str, nb, root: Path, flags: list[str]) -> list[str]:
    "What is wrong with the outputs of one notebook, a line each."
    found = []
    if "widgets" in nb.metadata:
        found.append("metadata.widgets: code hosts then refuse to show the page")
    if name.startswith("nbs/lessons/") and not any(c.get("outputs") for c in nb.cells):
        found.append("no outputs: a lesson is committed with those of a clean run")
    for n, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        wrong = [fault for output in cell.outputs for fault in output_faults(output, root)]
        if not cell.outputs and is_run(cell.source, flags) and shows(cell.source):
            wrong.append("shows something, but no output is committed")
        found += [f"cell {n} ({cell.id}): {fault}" for fault in wrong]
    return found


def output_faults(output, root: Path) -> list[str]:
    "What is wrong with one output."
    if output.output_type == "error":
        return [f"an error as output: {output.ename}"]
    data = output.get("data", {"text/plain": output.get("text", "")})
    text = "\n".join(v for k, v in data.items() if k.startswith("text/") or k == "image/svg+xml")
    text = text.replace(f"{root}/", "/home/HERE/")
    found = [why for kind, why in WIDGETS.items() if kind in data]
    if path := MACHINE_PATH.search(text):
        found.append(f"a path of one machine: {text[max(path.start() - 20, 0) : path.end() + 40]!r}")
    if bar := PROGRESS_BAR.search(text):
        found.append(f"a progress bar: {bar[0]!r}")
    return found


def one_stage(name: str, options: list[str]) -> Result:
    "Run a stage, say how it went, and survive it."
    start = time.perf_counter()
    print(f"{name}: {STAGES[name].__doc__}", flush=True)
    with tempfile.TemporaryDirectory(prefix="wikidpo-") as scratch:
        try:
            result = STAGES[name](ROOT, Path(scratch).resolve(), options)
        except Exception:
            result = Result(failed=1, detail=traceback.format_exc())
    skipped = f", {result.skipped} skipped" if result.skipped else ""
    word, seconds = "FAILED" if result.failed else "ok", time.perf_counter() - start
    print(f"  {word}: {result.passed} passed, {result.failed} failed{skipped} ({seconds:.0f} s)", flush=True)
    return result


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    names = []
    while arguments and arguments[0] in STAGES:
        names.append(arguments.pop(0))
    if arguments and not arguments[0].startswith("-") and "pytest" not in names:
        sys.exit(f"error: no stage {arguments[0]!r}: there are {', '.join(STAGES)}")
    results = {name: one_stage(name, arguments) for name in names or ALL}
    for name, result in results.items():
        if result.remark:
            print(f"\n{result.remark}")
        if result.failed:
            print(f"\n===== {name}: {result.failed} failed\n{result.detail.rstrip()}")
    failed = sum(r.failed for r in results.values())
    print(f"\n{sum(r.passed for r in results.values())} passed, {failed} failed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
