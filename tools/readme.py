"""README.md from nbs/index.ipynb: `readme.py` writes it, `readme.py --check` says whether it is in step.

Markdown cells are taken as they are, code cells and their printed output become fenced blocks, cells with `#| hide`
are dropped, and of a cell with `#| echo: false` only the output is shown; Markdown output is taken as it is. Relative
links point from nbs/ in the notebook and from the root in README.md.
"""
import json
import re
import sys
from pathlib import Path
from posixpath import normpath

NOTE = "<!-- Written by tools/readme.py from nbs/index.ipynb: edit that notebook, then run `make readme`. -->"
# [text](target), ![alt](target), src="target", href="target", where target is neither an URL nor an #anchor
LINK = re.compile(r'(\]\(|\b(?:src|href)=")(?!\w+:|#)([^)"\s#]+)')


def fenced(text: str, language: str = "") -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def printed(output: dict) -> str:
    "One output as a Markdown block. A figure belongs in images/, where README.md can show it."
    if markdown := output.get("data", {}).get("text/markdown"):
        return "".join(markdown).strip()
    text = output.get("text") or output.get("data", {}).get("text/plain")
    if text is None or any(kind.startswith("image/") for kind in output.get("data", {})):
        raise SystemExit(
            "error: nbs/index.ipynb: README.md can show text output only; save the figure in images/ and link to it"
        )
    return fenced("".join(text))


def blocks(cell: dict) -> list[str]:
    "The Markdown blocks that one cell becomes."
    source = "".join(cell["source"]).strip()
    if re.search(r"^#\|\s*hide\b", source, re.M):
        return []
    if cell["cell_type"] == "markdown":
        return [LINK.sub(lambda m: m[1] + normpath("nbs/" + m[2]), source)]
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
    echo = code.strip() and not re.search(r"^#\|\s*echo:\s*false\b", source, re.M)
    return [fenced(code, "python")] * bool(echo) + [b for b in map(printed, cell.get("outputs", [])) if b]


def render(notebook: dict) -> str:
    return "\n\n".join([NOTE, *(b for cell in notebook["cells"] for b in blocks(cell))]) + "\n"


def wanted(root: Path) -> str:
    "What root/README.md should be."
    return render(json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8")))


def with_absolute_links(text: str, settings) -> str:
    "The same for a page elsewhere, such as PyPI's: what is in the repository by its address there, at this version."
    repository, version = settings["git_url"], settings["version"]

    def absolute(m: re.Match) -> str:
        kind = "raw" if m[2].endswith((".svg", ".png")) else "blob"
        return f"{m[1]}{repository}/{kind}/v{version}/{m[2]}"

    return LINK.sub(absolute, text)


def problems(root: Path) -> list[str]:
    "What is wrong with root/README.md: out of step with the notebook, or links that lead nowhere."
    text = wanted(root)
    readme = root / "README.md"
    found = []
    if not readme.exists() or readme.read_text(encoding="utf-8") != text:
        found.append("README.md is not what nbs/index.ipynb says: run `make readme`")
    targets = {m[2] for m in LINK.finditer(text)}
    return found + [f"README.md links to {t}, which does not exist" for t in sorted(targets) if not (root / t).exists()]


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    if "--check" in sys.argv[1:]:
        sys.exit("\n".join(problems(root)) or None)
    (root / "README.md").write_text(wanted(root), encoding="utf-8")
