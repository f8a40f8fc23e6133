"""The pages of the book, from the committed notebooks: nothing is run. `make docs` builds it in `_docs/html`.

    book.py              writes _docs/source and _docs/extra, which Sphinx reads (docs/conf.py)
    book.py check HTML   says which links of the built book lead nowhere
    book.py fetch TO     brings MathJax's one file from npm

A page of the book is a notebook under nbs/, one of PROJECT, a folder's list of its pages, or a module's (book_api.py).
A link leads to a page where there is one; another file of the repository comes along as a download.
"""
from copy import deepcopy
import hashlib
import html
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cached_property
from html.parser import HTMLParser
from os.path import relpath
from pathlib import Path
from posixpath import dirname, normpath
from urllib.parse import unquote, urlsplit

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "_docs"
PROJECT = ["CONTRIBUTING.md", "CHANGELOG.md", "DEPENDENCIES.md", "LICENSE", "benchmarks/README.md",
           "benchmarks/epyc/README.md", "benchmarks/xeon/README.md", "benchmarks/avx2/README.md",
           "benchmarks/h100/README.md"]
BESIDE = ["appendix/trap_museum", "appendix/ppo", "appendix/claims", "show/is_my_run_broken"]  # the lessons
ROOMS = {  # a folder of notebooks and of modules: what it is for
    "core": "what the lessons show: a complete, plain DPO that imports nothing but itself",
    "engine": "what makes it fast and large behind the same arguments, each part tested against core",
    "judge": "who grades: prompts, parsing, the client, a judge that knows the facts, vLLM",
    "world": "MiniWiki: its facts, answers of every quality, the truth",
    "world/exercises": "the exercises of the lessons, and what checks them",
    "models": "which models come in and go out: checkpoints, your own model.py, Hugging Face, servers",
    "run": "what makes a run of it: folders, profiles, mining, training, evaluating, sweeping",
    "show": "what shows it: curves, the doctor, the report, the widgets",
}
BADGE = re.compile(r"^\[!\[Open in Colab\].*\n+", re.M)  # the line under the title has it in words
BADGES = {"open-elsewhere"}  # cells whose links are in the line under the title
# In place of a picture on the first page: the widget that it shows. In place of a cell's static figure: its widget.
LIVING_PICTURES = {"images/widget_beta.png": "beta"}
LIVING_CELLS = {
    "nbs/lessons/02_the_loss.ipynb": ["beta"],
    "nbs/lessons/05_preference_pairs.ipynb": ["inspector"],
    "nbs/lessons/06_training.ipynb": ["tokens"],
    "nbs/lessons/07_reading_the_run.ipynb": ["player", "wild"],
    "nbs/lessons/08_win_rate.ipynb": ["vote"],
}

MATHJAX = "mathjax@3.2.2", "package/es5/tex-svg.js"
MATHJAX_SHA256 = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"

# A fenced block, code in a line, a link or a picture: the first two stay as they are.
FENCE = r"^(?P<fence>`{3,}).*?^(?P=fence)`*[ ]*$"
MARKUP = re.compile(rf"{FENCE}|(?P<bang>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)"
                    r"|(?P<tick>`+)[^`].*?(?P=tick)(?!`)", re.M | re.S)
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.M | re.S)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
# What a reader need not see.
TO_CHECKERS = re.compile(r"^# style: .*\n|[ ]*# (?:noqa|style:|chkstyle:|type: ignore).*$", re.M)
SUMMARY = re.compile(r"(<summary>)(.*?)(</summary>)")
ELSEWHERE = re.compile(r"\w+:")


def name_of(path: str) -> str:
    "The page that a file of the repository becomes, without its suffix."
    path = path.removeprefix("nbs/")
    return path[: path.rindex(".")] if "." in path else path


def settings() -> dict[str, str]:
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


# --- what notebooks say


@dataclass
class Page:
    "A notebook, or a Markdown file, of the repository"

    path: str  # relative to the repository
    root: Path = ROOT

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def is_notebook(self) -> bool:
        return self.path.endswith(".ipynb")

    @cached_property
    def nb(self):
        return nbformat.read(self.root / self.path, as_version=4)

    @cached_property
    def head(self) -> str:
        "The source of the cell with the title."
        if not self.is_notebook:
            return (self.root / self.path).read_text("utf-8")
        texts = [cell.source for cell in self.nb.cells if cell.cell_type == "markdown"]
        return next((text for text in texts if text.startswith("# ")), "")

    @property
    def title(self) -> str:
        found = re.search(r"^# (.+)$", self.head, re.M)
        if not found:
            raise SystemExit(f"error: {self.path}: no title: a page has a text that begins with `# `")
        return found[1].strip()

    @property
    def lead(self) -> str:
        "The line under the title."
        found = re.search(r"^# .+\n+> (.+)$", self.head, re.M)
        return found[1] if found else ""


def notebooks(root: Path = ROOT) -> list[str]:
    "Every notebook, relative to `root`."
    found = (p.relative_to(root).as_posix() for p in sorted((root / "nbs").rglob("*.ipynb")))
    return [path for path in found if not re.search(r"/[_.]", path)]


class Book:
    "Which pages there are, and how one reaches the other."

    def __init__(self, root: Path = ROOT, living: Path | None = None):  # living: a folder of widgets, NAME.html
        self.root, self.living = root, living
        paths = notebooks(root) + [path for path in PROJECT if (root / path).exists()]
        self.pages = {path: Page(path, root) for path in paths}
        self.modules = {p.relative_to(root).as_posix(): f"api/{p.relative_to(root/'wikidpo').with_suffix('')}"
                        for p in sorted((root / "wikidpo").rglob("*.py")) if not p.name.startswith("_")}
        self.files: set[str] = set()  # that pages link to
        self.reached: dict[str, set[str]] = {}  # page: the cells that links lead to

    def suffix(self, path: str) -> str:
        return ".ipynb" if path.endswith(".ipynb") else ".md"

    def resolve(self, page: str, target: str) -> tuple[str, str]:
        "The file of the repository that a link of the file `page` leads to, and the place in it."
        path, _, place = target.partition("#")
        return normpath(f"{dirname(page)}/{unquote(path)}") if path else page, place

    def page_name(self, path: str) -> str | None:
        return self.pages[path].name if path in self.pages else self.modules.get(path)

    def link(self, page: str, home: str, m: re.Match) -> str:
        "A link of the file `page`, as it stands on the page of the book with the name `home`."
        if m["target"] is None:
            return m[0]
        if ELSEWHERE.match(m["target"]):  # a picture that is a link holds an address of its own
            words = MARKUP.sub(lambda inner: self.link(page, home, inner), m["text"])
            return f"{m['bang']}[{words}]({m['target']})"
        path, place = self.resolve(page, m["target"])
        name, here = self.page_name(path), dirname(home) or "."
        if name and place:
            shown = place if place.startswith("cell-id=") else place.lower()
            own = "" if name == home else relpath(f"{name}.html", here)
            return f'<a href="{own}#{shown}">{m["text"]}</a>'
        if name:
            return f"[{m['text']}]({relpath(name + self.suffix(path), here)})"
        if not (self.root / path).exists():
            raise SystemExit(f"error: {page}: links to {m['target']}, which does not exist")
        if (self.root / path).is_dir():
            ini = settings()
            return f"[{m['text']}]({ini['git_url']}/tree/{ini['branch']}/{path})"
        self.files.add(path)
        file = relpath(f"files/{path}", here)
        return f"![{m['text']}]({file})" if m["bang"] else f'<a href="{file}">{m["text"]}</a>'

    def markdown(self, page: str, text: str, home: str = "") -> str:
        "Text of the file `page`, as Sphinx reads it."
        text = MERMAID.sub(lambda m: flow(m[1]), text)
        text = MARKUP.sub(lambda m: self.link(page, home or name_of(page), m), text)
        return SUMMARY.sub(lambda m: m[1] + inline(m[2]) + m[3], text)

    def find_reached(self) -> None:
        "Note which cells links lead to: only those get an address."
        for path, page in self.pages.items():
            cells = page.nb.cells if page.is_notebook else []
            for m in (m for cell in cells if cell.cell_type == "markdown" for m in MARKUP.finditer(cell.source)):
                target, place = self.resolve(path, m["target"] or "")
                if place.startswith("cell-id="):
                    self.reached.setdefault(target, set()).add(place)

    # --- a notebook

    def notebook(self, path: str, before: str = "", after: str = ""):
        "The notebook as Sphinx reads it; before and after: the pages beside it in the book."
        page, nb = self.pages[path], deepcopy(self.pages[path].nb)
        nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
        line, cells = tools_line(page, before, after), []
        for cell in nb.cells:
            if cell.get("id") in BADGES:
                continue
            if cell.cell_type == "markdown":
                cells += self.text_cell(path, cell, line)
                line = "" if cell.source == page.head or not line else line
            else:
                cells += self.code_cell(cell)
        living = list(LIVING_CELLS.get(path, []))
        for cell in cells:
            if living and any("image/png" in o.get("data", {}) for o in cell.get("outputs", [])):
                self.enliven(cell, living.pop(0))
        nb.cells = [c for cell in cells for c in (*self.address(path, cell), cell)]
        return nb

    def address(self, path: str, cell) -> Iterator:
        "A place to arrive at before the cell, if a link leads there."
        place = f"cell-id={cell.id}"
        if place in self.reached.get(path, ()):
            yield new_markdown_cell(f'<div class="arrival" id="{place}"></div>', id=f"to-{cell.id}"[:64])

    def text_cell(self, path: str, cell, line: str) -> list:
        "A cell of text; under the title of the page goes a line that says what can be done with it."
        source = cell.source
        parts = [cell]
        if "\n![" in f"\n{source}" and self.living:
            parts = self.living_pictures(path, cell)
        for part in (p for p in parts if p.cell_type == "markdown"):
            part.source = self.markdown(path, BADGE.sub("", part.source))
            if line and source == self.pages[path].head:
                part.source = re.sub(r"\A(# .+\n(?:\n*> .+\n?)*)", rf"\1\n{line}\n\n", part.source, count=1)
                line = ""
        return parts

    def living_pictures(self, path: str, cell) -> list:
        "The cell in pieces, with a widget where its picture stood."
        parts, text = [], cell.source
        for m in [m for m in MARKUP.finditer(text) if m["bang"]]:
            widget = LIVING_PICTURES.get(self.resolve(path, m["target"])[0])
            if not widget or path != "nbs/index.ipynb":
                continue
            first, text = text.split(m[0], 1)
            parts.append(new_markdown_cell(first, id=cell.id if not parts else f"{cell.id}-{len(parts)}"))
            shown = new_code_cell("# alive", id=f"live-{widget}", metadata={"tags": ["remove-input"]})
            shown.outputs = [new_output("display_data", {"text/html": ""})]
            self.enliven(shown, widget)
            parts.append(shown)
        rest = new_markdown_cell(text, id=f"{cell.id}-{len(parts)}") if parts else cell
        return [*parts, rest]

    def code_cell(self, cell) -> list:
        "A cell of code without its directives; none if that was all, or if it is hidden."
        directives = "\n".join(DIRECTIVE.findall(cell.source))
        cell.source = TO_CHECKERS.sub("", DIRECTIVE.sub("", cell.source)).strip("\n")
        if re.search(r"^#\|\s*hide\b", directives, re.M) or not cell.source.strip():
            return []
        tags = []
        if re.search(r"^#\|\s*echo:\s*false\b", directives, re.M):
            tags = ["remove-cell"] if not cell.outputs else ["remove-input"]
        elif "%config InlineBackend" in cell.source or cell.metadata.get("jupyter", {}).get("source_hidden"):
            tags = ["hide-input"]
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.outputs:
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = self.markdown("nbs/index.ipynb", output.data["text/markdown"])
        return [cell]

    def enliven(self, cell, widget: str) -> None:
        "The living widget in place of its static figure, where there is one."
        file = self.living / f"{widget}.html" if self.living else None
        if not file or not file.exists():
            return
        for output in cell.outputs:
            if {"image/png", "text/html"} & set(output.get("data", {})):
                output.data = {"text/html": file.read_text("utf-8")}


def inline(text: str) -> str:
    "Mathematics and code in a line of HTML, which is no Markdown."
    text = re.sub(r"\$([^$]+)\$", r'<span class="math notranslate nohighlight">\\(\1\\)</span>', text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def flow(source: str) -> str:
    "A chain in mermaid's words as boxes and arrows that wrap; what is no chain is refused."
    names = dict(re.findall(r'(\w+)\["([^"]+)"\]', source))
    steps = re.findall(r"^\s*(\w+)\S*(?:\[.*?\])?\s*-->\s*(?:\|([^|]*)\|)?\s*(\w+)", source, re.M)
    if not steps or any(a[2] != b[0] for a, b in zip(steps, steps[1:])):
        raise SystemExit("error: the book draws a chain of mermaid's only; make a picture in images/ of what is more")
    parts = [f"<span>{html.escape(names[steps[0][0]])}</span>"]
    for _, what, to in steps:
        parts.append(f"<i>{html.escape(what)} →</i><span>{html.escape(names[to])}</span>")
    return f'<div class="flow">{"".join(parts)}</div>\n'


def tools_line(page: Page, before: str, after: str) -> str:
    "Open in Colab, download, previous, next: one line of HTML."
    ini, depth = settings(), page.name.count("/")
    up = "../" * depth
    repository = ini["git_url"].removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{repository}/blob/{ini['branch']}/{page.path}"
    links = [f'<a href="{colab}">open in Colab</a>',
             f'<a href="{up}notebooks/{page.path}" download>download the notebook</a>']
    here = dirname(page.name) or "."
    for side, name in ("previous", before), ("next", after):
        if name:
            links.append(f'<a class="{side}" href="{relpath(name + ".html", here)}">{side}</a>')
    return f'<p class="page-line">{"".join(links)}</p>'


# --- the book as a whole


def toctree(entries: list[str], caption: str = "", depth: int = 1) -> str:
    options = [f":caption: {caption}"] if caption else []
    return "\n".join(["```{toctree}", ":hidden:", f":maxdepth: {depth}", ":titlesonly:", *options, "", *entries,
                      "```", ""])


def folder_page(book: Book, room: str) -> str:
    "The list of the notebooks of a folder."
    pages = [page for path, page in book.pages.items() if dirname(path) == f"nbs/{room}"]
    rows = [f"- [{page.title}]({Path(page.path).name}): {page.lead}" for page in pages]
    inner = [f"{r.split('/')[-1]}/index" for r in ROOMS if dirname(r) == room]
    names = [page.name.split("/")[-1] for page in pages]
    return "\n".join([f"# {room}", f"> {ROOMS[room]}", "", *rows, "", toctree(names + inner)])


def order(book: Book) -> list[str]:
    "The pages that are notebooks, in the order in which previous and next go through them."
    names = [page.name for page in book.pages.values() if page.is_notebook]
    lessons = [n for n in names if n.startswith("lessons/")]
    rooms = [n for room in ROOMS for n in names if dirname(n) == room]
    first = ["index", *lessons, *BESIDE, "appendix/architecture", "cli"]
    return [*first, *(n for n in rooms if n not in first)]


def contents(book: Book) -> str:
    "The table of contents of the whole book, for its first page."
    lessons = [n for n in order(book) if n.startswith("lessons/")]
    rooms = [f"{room}/index" for room in ROOMS if "/" not in room]
    project = [name_of(path) for path in PROJECT if path in book.pages]
    return "\n".join([toctree(lessons, "Lessons"), toctree(BESIDE, "Beside them"),
                      toctree(["appendix/architecture", "cli", *rooms], "The rooms, notebook by notebook"),
                      toctree(["api/index"], "The package"), toctree(project, "The project")])


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, to)


def write_book(out: Path = OUT, root: Path = ROOT) -> None:
    "Everything that Sphinx reads."
    import book_api

    book, source = Book(root, out / "widgets"), out / "source"
    for part in ("source", "extra", "static", "html", "doctrees"):
        shutil.rmtree(out / part, ignore_errors=True)
    book.find_reached()
    api = book_api.pages(book)
    names = order(book)
    for path, page in book.pages.items():
        if not page.is_notebook:
            text = page.head if path != "LICENSE" else f"# License\n\n```text\n{page.head}\n```"
            write(source / f"{page.name}.md", book.markdown(path, text))
            continue
        at = names.index(page.name)
        nb = book.notebook(path, *(names[i] if 0 <= i < len(names) else "" for i in (at - 1, at + 1)))
        if page.name == "index":
            nb.cells.append(new_markdown_cell(contents(book), id="contents"))
        write(source / f"{page.name}.ipynb", nbformat.writes(nb))
    for room in ROOMS:
        write(source / room / "index.md", folder_page(book, room))
    for name, text in api.items():
        write(source / f"{name}.md", text)
    copy_files(out, book)


def copy_files(out: Path, book: Book) -> None:
    "What is no page: what pages link to, the notebooks as they are, MathJax; and a word to Pages: no Jekyll."
    for path in book.files:
        copy(book.root / path, out / "source/files" / path)  # pictures
        copy(book.root / path, out / "extra/files" / path)  # what is downloaded
    for path in (p for p in book.pages if p.endswith(".ipynb")):
        copy(book.root / path, out / "extra/notebooks" / path)
    copy(Path(sys.prefix) / MATHJAX[1].split("/")[-1], out / "static/tex-svg.js")
    (out / "extra/.nojekyll").touch()


# --- what was built


class Links(HTMLParser):
    "The links of a built page, and the places in it."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids, self.loaded = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {value for name, value in attrs if name in ("id", "name") and value}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        loads = attributes.get("src") or (attributes.get("href") if tag == "link" else None)
        if loads and attributes.get("rel") != "canonical":
            self.loaded.append(loads)


def broken(site: Path) -> list[str]:
    "The links of a built book that lead to no file or no place, and what it would load from another host."
    pages = {p: Links(p.read_text("utf-8")) for p in sorted(site.rglob("*.html"))}
    found = []
    for page, held in pages.items():
        where = page.relative_to(site).as_posix()
        found += [f"{where}: loads {url}" for url in held.loaded if re.match(r"(https?:)?//", url)]
        for link in {*held.links, *held.loaded}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            place = unquote(parts.fragment)
            if not target.exists():
                found.append(f"{where}: {link}: no such file")
            elif place and target in pages and place not in pages[target].ids:
                found.append(f"{where}: {link}: no such place")
    return found


def fetch(to: Path) -> None:
    "MathJax's one file out of its npm package, if it is the one that we know."
    package, member = MATHJAX
    npm = shutil.which("npm")
    if not npm:
        raise SystemExit(f"error: npm is not installed: the book takes {package} with it (Debian: apt-get install npm)")
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run([npm, "pack", "--silent", package], cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: npm pack {package}: {done.stderr.strip()[-300:]}")
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            data = archive.extractfile(member).read()
    if hashlib.sha256(data).hexdigest() != MATHJAX_SHA256:
        raise SystemExit(f"error: {member} of {package} is not the file that was known: its SHA-256 differs")
    to.write_bytes(data)


def main(args: list[str]) -> str | None:
    match args:
        case ["fetch", to]: fetch(Path(to))
        case ["check", site]: return "\n".join(broken(Path(site).resolve())) or None
        case []: write_book()
        case _: return __doc__
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
