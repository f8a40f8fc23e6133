"The package as people get it: what the wheel holds, what importing it does, that it works away from the source tree."
import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import readme
from check import copy_tree

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "wikidpo").rglob("[!_]*.py"))
NAMES = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES]
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def settings() -> dict:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def python(code: str, **kwargs) -> str:
    "Run `code` in a fresh interpreter at the root of the tree."
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return copy_tree(ROOT, tmp_path_factory.mktemp("copied") / "tree")


@pytest.fixture(scope="session")
def files(tree):
    "All that `tree` holds, before anything is built in it."
    return {p.relative_to(tree).as_posix() for p in tree.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, tree, files):
    "The wheel built from the sdist that is built from a copy of the tree."
    tmp = tmp_path_factory.mktemp("build")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp / "dist"), str(tree)],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next((tmp / "dist").glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel, files):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {n for n in names if ".dist-info/" not in n and not n.startswith("wikidpo/course/")}
    assert package == {name for name in files if name.startswith("wikidpo/")}
    course = {n.removeprefix("wikidpo/course/") for n in names if n.startswith("wikidpo/course/")}
    assert course < files and {name for name in files if name.endswith(".ipynb")} < course
    assert any(n.startswith("wikidpo/data/") for n in names)
    assert any(re.fullmatch(r"wikidpo/profiles/\w+\.yaml", n) for n in names)
    assert wheel.stat().st_size < 12e6


def test_sdist_holds_all_that_builds_and_tests(wheel, files):
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert not files - held


def test_lessons_come_out_of_the_wheel(wheel, tmp_path):
    "Written twice, a changed one left alone; what they read and link to beside them is there too."
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = [sys.executable, "-c", "from wikidpo.cli import main; main()", "lessons", "here"]

    def write() -> str:
        done = subprocess.run(command, cwd=tmp_path, env=ENV | {"PYTHONPATH": str(tmp_path / "site")},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "open here/nbs/lessons/00_miniwiki.ipynb" in write()
    lesson = tmp_path / "here/nbs/lessons/01_why_not_rlhf.ipynb"
    lesson.write_text("mine")
    assert write().startswith("left, for you have changed it: here/nbs/lessons/01_why_not_rlhf.ipynb\n0 files written")
    assert lesson.read_text() == "mine"


def test_a_lesson_runs_alone_with_the_wheel(wheel, tmp_path):
    "Lesson 12 reads two results: it finds them in the package, from an empty folder, and its first cell does nothing."
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (alone := tmp_path / "alone").mkdir()
    nb = nbformat.read(ROOT / "nbs/lessons/12_the_rig.ipynb", as_version=4)
    nb.cells.append(nbformat.v4.new_code_cell("import wikidpo; print(wikidpo.__file__)"))
    own = {"PYTHONPATH": str(tmp_path / "site"), "WIKIDPO_PREDICTIONS": str(tmp_path / "predictions.json")}
    client = NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": alone}})
    client.execute(env=ENV | own)
    assert Path(nb.cells[-1].outputs[0].text.strip()).is_relative_to(tmp_path / "site")
    (first,) = [cell for cell in nb.cells if cell.id == "install-if-alone"]
    assert first.execution_count and not first.outputs


def test_the_page_on_pypi_has_no_relative_link(wheel):
    cfg, archive = settings(), zipfile.ZipFile(wheel)
    page = archive.read(f"wikidpo-{cfg['version']}.dist-info/METADATA").decode()
    assert not readme.LINK.search(page.partition("\n\n")[2])
    here = re.findall(rf"{cfg['git_url']}/(?:raw|blob)/v{cfg['version']}/([^)\"\s#]+)", page)
    assert len(here) > 20 and all((ROOT / name).exists() for name in here)


def test_wheel_metadata_comes_from_settings(wheel):
    cfg, archive = settings(), zipfile.ZipFile(wheel)
    info = f"wikidpo-{cfg['version']}.dist-info"
    meta = metadata.PathDistribution(zipfile.Path(archive, info + "/"))
    assert meta.version == cfg["version"]
    assert meta.metadata["License-Expression"] == "Apache-2.0"
    assert meta.metadata["Requires-Python"] == f">={cfg['min_python']}"
    assert {"dev", "lab", "lessons", "teacher-own-environment"} <= set(meta.metadata.get_all("Provides-Extra"))
    assert any("jupyterlab" in r and "dev" in r for r in meta.requires)
    urls = {url.split(",")[0] for url in meta.metadata.get_all("Project-URL")}
    assert urls == {"Documentation", "Source", "Issues", "Changelog"}
    assert "Intended Audience :: Education" in meta.metadata.get_all("Classifier")
    assert {(e.group, e.name, e.value) for e in meta.entry_points} == {
        ("console_scripts", "wikidpo", "wikidpo.cli:main"),
        ("nbdev", "wikidpo", "wikidpo._modidx:d"),
    }
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()


def test_the_oldest_python_is_the_same_everywhere():
    oldest = settings()["min_python"]
    said = {
        "pyproject.toml": f'requires-python=">={oldest}"',
        "nbs/index.ipynb": f"Python {oldest} or newer",
        "README.md": f"Python {oldest} or newer",
        "Makefile": f"Python {oldest} or newer",
        ".github/workflows/test.yml": f'"{oldest}"',
    }
    missing = [name for name, words in said.items() if words not in (ROOT / name).read_text(encoding="utf-8")]
    assert not missing


def test_pyproject_and_the_version_in_the_package_agree_with_settings():
    "setup.py reads settings.ini; nbdev 3 reads pyproject.toml, and writes no version."
    cfg, project = settings(), tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == cfg["lib_name"]
    assert f'__version__ = "{cfg["version"]}"' in (ROOT / "wikidpo/__init__.py").read_text(encoding="utf-8")
    assert f"\nversion: {cfg['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for key in ("lib_path", "nbs_path", "tst_flags"):
        assert project["tool"]["nbdev"][key] == cfg[key]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_are_declared(path):
    "Whatever a module imports is in the standard library or among `requirements`; the tools that nbdev needs are not."
    declared = {canonical(re.match(r"[\w.-]+", r)[0]) for r in settings()["requirements"].split()}
    owners = metadata.packages_distributions()
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"wikidpo"}
    undeclared = {name for name in third_party if declared.isdisjoint(map(canonical, owners.get(name, [])))}
    # imported where they are used, refused in one line where they are missing
    optional = {"vllm", "trl", "datasets", "pyarrow"}
    assert not undeclared - optional, f"not in settings.ini: {undeclared}"


@pytest.mark.parametrize("lesson", sorted((ROOT / "nbs/lessons").glob("*.ipynb")), ids=lambda p: p.stem)
def test_what_a_lesson_imports_is_declared(lesson):
    "Among `requirements` or `lessons_requirements`: who installs wikidpo[lessons] can run it."
    cfg, owners = settings(), metadata.packages_distributions()
    declared = (cfg["requirements"] + " " + cfg["lessons_requirements"]).split()
    held = {canonical(re.match(r"[\w.-]+", r)[0]) for r in declared}
    cells = [cell for cell in json.loads(lesson.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in [*cell["source"], "\n"]]
    code = "".join(line for line in lines if not line.lstrip().startswith(("%", "!")))
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", code, re.M)) - set(sys.stdlib_module_names) - {"wikidpo"}
    assert not {name for name in imported if held.isdisjoint(map(canonical, owners.get(name, [])))}


def test_import_is_light():
    "`import wikidpo` takes under a second of the processor and brings no torch along."
    code = "import time, wikidpo, sys; print(time.process_time(), 'torch' in sys.modules)"
    seconds, torch = zip(*(python(code).split() for _ in range(3)))
    assert min(map(float, seconds)) < 1
    assert set(torch) == {"False"}


def test_imports_touch_no_network():
    "Importing every module opens no connection and looks up no name."
    code = f"""
import importlib, sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        raise SystemExit(f"{{event}} {{args[1:]}}")
sys.addaudithook(hook)
for name in {NAMES!r}: importlib.import_module(name)
"""
    python(code, timeout=600)


@pytest.mark.slow
def test_installed_wheel_runs_the_lesson(wheel, tmp_path):
    "The wheel in an environment without the source tree, in an empty folder."
    home, empty = tmp_path / "env", tmp_path / "empty"
    empty.mkdir()
    venv.create(home, with_pip=True)
    bin_dir = home / "bin"
    subprocess.run([bin_dir / "python", "-m", "pip", "install", "-qq", "--no-deps", wheel], check=True, env=ENV)
    # What wikidpo depends on is lent from this environment, after the new one's own packages. A path named in a .pth
    # file has its own .pth files ignored, so an editable wikidpo does not come along.
    (own,) = home.glob("lib/python3*/site-packages")
    lent = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (own / "lent.pth").write_text("\n".join(lent) + "\n")

    where = subprocess.run(
        [bin_dir / "python", "-c", "import wikidpo; print(wikidpo.__file__)"],
        cwd=empty, env=ENV, check=True, capture_output=True, text=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(home)

    done = subprocess.run(
        [bin_dir / "wikidpo", "lesson"],
        cwd=empty, env=ENV | {"WANDB_MODE": "offline"}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((empty / "runs/lesson/summary.json").read_text())
    assert {"mine", "train", "judge"} <= set(summary)
    assert "<html" in (empty / "runs/lesson/report.html").read_text(encoding="utf-8")
    assert [p.name for p in empty.iterdir()] == ["runs"], "the lesson leaves files outside runs/"
