"""What lets a notebook be opened alone: links to Colab and Kaggle on top, and a cell that installs wikidpo where it is
missing. Their address is that of settings.ini.

    alone.py            writes both into every lesson, and into the other pages of PAGES
    alone.py --check    says where they are not what this would write

The package comes from where the links lead, so that the notebook and the package are of one age. It brings the results
that the lessons show (wikidpo.run.course). In a clone, or wherever else wikidpo can be imported, the cell does nothing.
"""
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("nbs/lessons/[0-9][0-9]_*.ipynb", "nbs/show/is_my_run_broken.ipynb")
LINKS, INSTALL = "open-elsewhere", "install-if-alone"  # the ids of the cells
FOLDED = {"jupyter": {"source_hidden": True}}
CODE = """#| hide
# Opened alone, in Colab or Kaggle, this notebook lacks wikidpo: then this installs it from its
# repository, which takes a minute. Where wikidpo is there already, this does nothing.
from importlib.util import find_spec
if not find_spec("{name}"):
    %pip install -q fastcore "{name} @ {repository}\""""
TRL = """
if not find_spec("trl"):
    %pip install -q {packages}"""


def settings() -> dict:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def colab(page: str, cfg: dict) -> str:
    repository = cfg["git_url"].replace("https://github.com", "https://colab.research.google.com/github")
    return f"{repository}/blob/{cfg['branch']}/{page}"


def links(page: str, cfg: dict) -> str:
    "The line on top of a page."
    kaggle = f"https://kaggle.com/kernels/welcome?src={cfg['git_url']}/blob/{cfg['branch']}/{page}"
    return f"[Open in Colab]({colab(page, cfg)}) · [Open in Kaggle]({kaggle})"


def install(nb, cfg: dict) -> str:
    "The cell that installs; a notebook that imports TRL wants what belongs to that as well."
    repository, code = f"git+{cfg['git_url']}@{cfg['branch']}", "\n".join(c.source for c in nb.cells)
    cell = CODE.format(name=cfg["lib_name"], repository=repository)
    if not re.search(r"^(?:from|import) trl\b", code, re.M):
        return cell
    return cell + TRL.format(packages=" ".join(f'"{r}"' for r in cfg["lessons_requirements"].split()))


def does_something(cell) -> bool:
    return cell.cell_type == "code" and bool(re.sub(r"^\s*#.*$", "", cell.source, flags=re.M).strip())


def insert(nb, page: str, cfg: dict) -> None:
    "Both cells, in their places: on top, and before the first cell that does something."
    nb.cells = [c for c in nb.cells if c.id not in (LINKS, INSTALL)]
    first = next(i for i, c in enumerate(nb.cells) if does_something(c))
    nb.cells.insert(first, new_code_cell(install(nb, cfg), id=INSTALL, metadata=FOLDED))
    nb.cells.insert(0, new_markdown_cell(links(page, cfg), id=LINKS))


def main(args: list[str]) -> str | None:
    "Write, or with --check say, what is out of step."
    cfg, stale = settings(), []
    for path in sorted(p for pages in PAGES for p in ROOT.glob(pages)):
        page, nb = path.relative_to(ROOT).as_posix(), nbformat.read(path, as_version=4)
        insert(nb, page, cfg)
        text = nbformat.writes(nb) + "\n"
        if path.read_text(encoding="utf-8") != text:
            stale.append(page)
            if "--check" not in args:
                path.write_text(text, encoding="utf-8")
    if "--check" in args:
        return "\n".join(f"{page}: cannot be opened alone: run `python tools/alone.py`" for page in stale) or None
    return print(*stale, sep="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
