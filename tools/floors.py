"""Lessons as Colab opens them: its versions (constraints-floors.txt), one notebook in an empty folder, no wikidpo yet.

    floors.py [02 05 ...]   these lessons, else LESSONS; then the tests of the widgets

`make test-floors` makes the environment that this runs in.
The first cell of the first lesson installs wikidpo, from a repository of this tree in place of the one on the network.
Then every package must have the version that it had. What lesson 10 needs for TRL comes last, for TRL itself wants a
newer `datasets` than Colab has.
"""
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from alone import settings
from check import copy_tree
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ("02", "05", "12")  # widgets, training, results that come with the package; the others take longer
TESTED = ["-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning", "tests/test_widgets.py"]
FLAG = re.compile(r"^#\|\s*(?:vllm|gpu|browser|slow|eval:\s*false)\b", re.M)


def pip(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: pip {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def installed() -> dict:
    "{package: version}, without wikidpo."
    lines = pip("freeze", "--exclude", "wikidpo").splitlines()
    return dict(re.split(r"==| @ ", line, maxsplit=1) for line in lines)


def repository(folder: Path) -> dict:
    "The tree as a git repository, and the environment in which its address on the network leads there."
    tree, cfg = copy_tree(ROOT, folder / "tree"), settings()
    own = ["-c", "user.name=floors", "-c", "user.email=floors@localhost"]
    for words in (["init", "-q", "-b", cfg["branch"]], ["add", "-A", "-f"], ["commit", "-qm", "as it is"]):
        subprocess.run(["git", *own, *words], cwd=tree, check=True)
    instead = {"GIT_CONFIG_KEY_0": f"url.file://{tree}.insteadOf", "GIT_CONFIG_VALUE_0": cfg["git_url"]}
    own = {"WANDB_MODE": "offline", "TQDM_DISABLE": "1", "WIKIDPO_PREDICTIONS": str(folder / "predictions.json")}
    return os.environ | instead | own | {"GIT_CONFIG_COUNT": "1"}


def run(lesson: Path, folder: Path, env: dict) -> float:
    "A notebook, from top to bottom, in a folder that has nothing else; the seconds that it took."
    class Client(NotebookClient):
        async def async_execute_cell(self, cell, index, *args, **kwargs):
            if cell.cell_type == "code" and FLAG.search(cell.source):
                return cell
            return await super().async_execute_cell(cell, index, *args, **kwargs)

    start, nb = time.perf_counter(), nbformat.read(lesson, as_version=4)
    folder.mkdir()
    Client(nb, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}}).execute(env=env)
    print(f"{lesson.stem}: ok ({time.perf_counter() - start:.0f} s)", flush=True)


def main(args: list[str]) -> int:
    pip("uninstall", "-q", "-y", "wikidpo")
    before = installed()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        env = repository(folder)
        for number in args or LESSONS:
            (lesson,) = (ROOT / "nbs/lessons").glob(f"{number}_*.ipynb")
            run(lesson, folder / number, env)
        after = installed()
        replaced = {name: (v, after.get(name)) for name, v in before.items() if after.get(name) != v}
        added = sorted(after.keys() - before.keys())
        print(f"installed: {', '.join(added) or 'nothing more'}; replaced: {replaced or 'nothing'}", flush=True)
        tests = [sys.executable, "-m", "pytest", *TESTED]
        return bool(replaced) or subprocess.run(tests, cwd=folder / "tree", env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
