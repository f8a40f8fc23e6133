"""Make small wrong changes to the package, one at a time, and see whether a test notices.

`make mutations` tries those of tools/mutants.py that no test has noticed yet, or whose file has changed since;
ARGS="core/pairs.py 17": some of them. Nothing in the work tree is touched: each change is made in a copy of it. What
was found stands in runs/mutations.json (without it all are tried). Who survives is listed, with the reason where one
is known; an unknown survivor is a failure."""
import compileall
import gc
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from py_compile import PycInvalidationMode

from check import copy_tree
from mutants import KNOWN, MUTANTS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs/mutations.json"
PATIENCE = 240  # seconds; a change that makes a test hang is noticed too
HEAVY = ("torch", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "tokenizers", "openai", "pytest",
         "hypothesis", "pydantic", "jinja2", "starlette.applications", "uvicorn", "anywidget", "matplotlib.figure")


def problems(root: Path = ROOT) -> list[str]:
    "What is wrong with the list: a text that does not stand exactly once in its file, or a test that is not there."
    found, seen = [], set()
    for m in MUTANTS:
        text = (root / "wikidpo" / m.file).read_text(encoding="utf-8")
        if text.count(m.old) != 1:
            found.append(f"{m.file}: stands there {text.count(m.old)} times: {m.old!r}")
        if m.old == m.new or (m.file, m.old, m.new) in seen:
            found.append(f"{m.file}: changes nothing, or stands in the list twice: {m.old!r}")
        seen.add((m.file, m.old, m.new))
        for test in m.tests.split():
            name, _, function = test.partition("::")
            if name.startswith("-") or (root / "tests" / name).exists() and f"def {function}" in source(root, name):
                continue
            found.append(f"{m.file}: no such test: {test}")
    listed = {(m.file, m.old, m.new) for m in MUTANTS}
    return found + [f"{key[0]}: a reason for what is not in the list: {key[1]!r}" for key in KNOWN if key not in listed]


def source(root: Path, name: str) -> str:
    return (root / "tests" / name).read_text(encoding="utf-8")


def fingerprint(m) -> str:
    "What a result belongs to: the change, the file as it is without it, and the files of the tests."
    text = (ROOT / "wikidpo" / m.file).read_text(encoding="utf-8")
    files = {test.partition("::")[0] for test in m.tests.split() if not test.startswith("-")}
    tests = [source(ROOT, name) for name in sorted(files) if (ROOT / "tests" / name).is_file()]
    return hashlib.sha256("\0".join((m.old, m.new, text, *tests)).encode()).hexdigest()[:16]


def passes(tree: Path, tests: str, log: Path) -> bool:
    "Whether the tests pass in a copy of the tree; they run in a child of this process, which has the large libraries."
    child = os.fork()
    if not child:
        os._exit(run_tests(tree, tests, log))
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code in (3, 4, 5):
                sys.exit(f"error: pytest could not run {tests}: {log.read_text()[-2000:]}")
            return code == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def run_tests(tree: Path, tests: str, log: Path) -> int:
    "In the child: pytest on files of the tree, and on nothing of the work tree."
    os.setpgid(0, 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "WANDB_MODE": "offline"}
    for name in ("PYTHONDONTWRITEBYTECODE", "TQDM_DISABLE", "PYTEST_DISABLE_PLUGIN_AUTOLOAD"):
        os.environ[name] = "1"  # looking for plugins takes longer than most of the tests
    sys.path[:0] = [str(tree)]
    import pytest

    return pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests.split())])


def noticed(tree: Path, m, log: Path) -> bool:
    "Whether a test fails while the change is made."
    path = tree / "wikidpo" / m.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(m.old, m.new), encoding="utf-8")
    try:
        return not passes(tree, m.tests, log)
    finally:
        path.write_text(before, encoding="utf-8")


def wanted(words: list[str]) -> list:
    "The changes of these files, or with these numbers; without words all."
    chosen = [m for n, m in enumerate(MUTANTS, 1) if m.file in words or str(n) in words]
    return chosen if words else list(MUTANTS)


def try_all(chosen: list, results: dict, tree: Path, log: Path) -> None:
    "Try each change that was not noticed yet; its result is written at once, so that a stopped run goes on."
    healthy = set()
    for m in chosen:
        key = fingerprint(m)
        if key in results and results[key]["noticed"]:
            continue
        if m.tests not in healthy and not passes(tree, m.tests, log):
            sys.exit(f"error: {m.tests} fails without any change:\n{log.read_text()[-2000:]}")
        healthy.add(m.tests)
        start = time.monotonic()
        results[key] = {"file": m.file, "old": m.old, "new": m.new, "noticed": noticed(tree, m, log)}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        word = "noticed " if results[key]["noticed"] else "SURVIVES"
        print(f"{word} {time.monotonic() - start:5.1f} s  {m.file}: {m.old!r} -> {m.new!r}", flush=True)


def main(words: list[str]) -> int:
    if wrong := problems():
        sys.exit("error: " + "\n".join(wrong))
    for name in HEAVY:
        __import__(name)
    gc.freeze()  # the children need not look through all that
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = wanted(words)
    with tempfile.TemporaryDirectory(prefix="wikidpo-") as scratch:
        tree = copy_tree(ROOT, Path(scratch).resolve() / "tree")
        compileall.compile_dir(tree, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        try_all(chosen, results, tree, Path(scratch) / "log")
    alive = [m for m in chosen if not results[fingerprint(m)]["noticed"]]
    for m in alive:
        print(f"survives: {m.file}: {m.old!r} -> {m.new!r}: {KNOWN.get((m.file, m.old, m.new), 'nobody knows why')}")
    print(f"{len(chosen)} wrong changes, {len(chosen) - len(alive)} noticed, {len(alive)} not")
    return int(any((m.file, m.old, m.new) not in KNOWN for m in alive))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
