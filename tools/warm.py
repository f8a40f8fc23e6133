"""Notebooks under nbdev-test in processes that have torch, its compiler, openai and nbdev already, and do not
import them one by one.

The processes are forked from a server that has imported and done nothing else, so that no notebook sees another's
state.
"""
import multiprocessing
import os
import tempfile
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "matplotlib.pyplot", "nbdev.test", "openai"])


def nbdev_test(notebook: str, cwd: Path, timeout: float) -> str:
    "Run one notebook of the tree `cwd` from top to bottom: what went wrong, or nothing."
    with tempfile.NamedTemporaryFile() as log:
        process = PROCESSES.Process(target=_run, args=(notebook, cwd, log.name))
        process.start()
        process.join(timeout)
        stopped = "" if process.exitcode is not None else f"stopped after {timeout:.0f} seconds\n"
        process.kill()
        process.join()
        if not stopped and process.exitcode == 0:
            return ""
        written = Path(log.name).read_text(encoding="utf-8", errors="replace")
    said = written.replace(f"{cwd}/", "").split("\nnbdev Tests Failed")[0]
    return stopped + said or "failed, and said nothing"


def _run(notebook: str, cwd: Path, log: str) -> None:
    "What the process does: as the command line nbdev-test, in its place, all that it writes into a file."
    from nbdev.test import nbdev_test

    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    nbdev_test(notebook, n_workers=0)
