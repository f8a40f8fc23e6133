"""A plugin of pytest: notebooks are tests like others, and all of them wait in one queue for the next free worker.

    python tools/one_queue.py -n 2 tests nbs/lessons/02_the_loss.ipynb ...

A file of tests stays with one worker, for its fixtures; FIRST begin before all others, so that no worker is left with a
long one at the end. Options are those of pytest, and `--quick`, which leaves FIRST out.
"""
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # as `python -m pytest` does; xdist hands the path on to its workers as it is now

import pytest
from xdist.scheduler import LoadScopeScheduling

from check import TIMEOUT
from warm import nbdev_test

# What takes longest, longest first: run `make test` and look at the last lines when something has grown.
FIRST = (
    "test_browser.py", "test_scoring.py", "ppo.ipynb", "test_engine.py", "06_training.ipynb",
    "07_reading_the_run.ipynb",
    "08_win_rate.ipynb", "01_why_not_rlhf.ipynb", "10_trl.ipynb", "09_the_beta_sweep.ipynb", "speed_training.ipynb",
    "test_ranks.py", "test_sampling.py", "test_tools.py", "03_sampling.ipynb", "trap_museum.ipynb", "test_training.py",
    "02_the_loss.ipynb", "speed_sampling.ipynb", "test_mining.py", "test_cli.py", "mine.ipynb", "train.ipynb",
    "distributed.ipynb",
)
SPLIT = {"test_browser.py::test_lesson_runs_in_the_browser": 2}  # numbered tests that may go to as many workers


class Notebook(pytest.File):
    def collect(self):
        yield Run.from_parent(self, name="runs")


class Run(pytest.Item):
    "One notebook, from top to bottom, in a process of its own."

    def runtest(self):
        root = self.config.rootpath
        if why := nbdev_test(self.path.relative_to(root).as_posix(), root, TIMEOUT):
            raise NotebookFailed(why)

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if excinfo.errisinstance(NotebookFailed) else super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, None, self.nodeid


class NotebookFailed(Exception):
    pass


def pytest_collect_file(file_path, parent):
    return Notebook.from_parent(parent, path=file_path) if file_path.suffix == ".ipynb" else None


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out the files that take long")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    place = {name: n for n, name in enumerate(FIRST)}
    if config.option.quick:
        items[:] = [item for item in items if item.path.name not in place]
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))


class Queue(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        test, _, parameters = nodeid.partition("[")
        name = Path(test).name
        if name in SPLIT:
            return f"{test} {int(parameters[:2]) % SPLIT[name]}"  # every other lesson
        return nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config, log):
    return Queue(config, log)


if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "one_queue", "--no-loadscope-reorder", *sys.argv[1:]]))
