"""The book: how its pages are prepared, and the book itself in a real Chromium, from disk.

The second half is slow and builds it first; `make test-docs` runs it, with BOOK=the folder of what it has just built.
"""
import ast, json, os, re, subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import book as tool
import book_api
from test_browser import CHROMIUM

ROOT = Path(__file__).resolve().parent.parent
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
OPEN = "nbs/lessons/02_the_loss.ipynb"


@pytest.fixture(scope="module")
def book():
    "The pages of this repository"
    found = tool.Book()
    found.find_reached()
    return found


@pytest.fixture
def small(tmp_path):
    "A repository of two notebooks and a file; make(source) writes the first notebook"
    def make(*cells):
        nb = new_notebook(cells=[new_markdown_cell("# One\n> A line.", id="title"), *cells])
        nbformat.write(nb, tmp_path/"nbs/core/one.ipynb")
        return tool.Book(tmp_path)
    (tmp_path/"nbs/core").mkdir(parents=True)
    (tmp_path/"wikidpo").mkdir()
    (tmp_path/"nbs/data.json").write_text("{}")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Two\n> Another.", id="there")]),
                   tmp_path/"nbs/core/two.ipynb")
    return make


def figures(cells):
    "All outputs but those in Markdown, whose links change"
    return [o for c in cells for o in c.get("outputs", []) if "text/markdown" not in o.get("data", {})]


def sources(nb): return "\n".join(cell.source for cell in nb.cells)


@pytest.mark.parametrize("path", tool.notebooks(ROOT))
def test_nothing_is_lost(book, path):
    "Every output and every line of code that is not for the exporter; no directive; a title and a line of links"
    before, after = book.pages[path].nb, book.notebook(path, "index", "cli")
    hidden = re.compile(r"^#\|\s*hide\b", re.M)
    kept = [c for c in before.cells if c.cell_type == "code" and not hidden.search(c.source)]
    assert figures(kept) == figures(after.cells)
    assert not re.search(r"^#\|", sources(after), re.M)
    for cell in after.cells: assert cell.cell_type == "markdown" or cell.source.strip()
    assert sources(after).count('class="page-line"') == 1
    assert len({c.id for c in after.cells}) == len(after.cells)


def test_directives(small):
    "Exporting marks go, hidden cells too; of a cell that shows only its output the code is hidden"
    book = small(new_code_cell("#| default_exp core.one"), new_code_cell("#| hide\nassert True"),
                 new_code_cell("#| export\nx = 1 # noqa: F841 for later"), new_code_cell("#| echo: false\nx",
                 outputs=[new_output("execute_result", {"text/plain": "1"}, execution_count=1)]))
    nb = book.notebook("nbs/core/one.ipynb")
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert [c.source for c in code] == ["x = 1", "x"]
    assert code[1].metadata.tags == ["remove-input"] and code[1].outputs


def test_code_that_a_notebook_folds_is_folded(small):
    code = new_code_cell("plt.plot(x)", metadata={"jupyter": {"source_hidden": True}})
    nb = small(new_code_cell("#| default_exp core.one"), code).notebook("nbs/core/one.ipynb")
    assert [c.metadata.get("tags") for c in nb.cells if c.cell_type == "code"] == [["hide-input"]]


@pytest.mark.parametrize("link,expected", [
    ("[a](two.ipynb)", "[a](two.ipynb)"),
    ("[a](two.ipynb#cell-id=there)", '<a href="two.html#cell-id=there">a</a>'),
    ("[`a`](#cell-id=title)", '<a href="#cell-id=title">`a`</a>'),
    ("[a](two.ipynb#Over-There)", '<a href="two.html#over-there">a</a>'),
    ("[a](../data.json)", '<a href="../files/nbs/data.json">a</a>'),
    ("[a](https://example.org/x.ipynb)", "[a](https://example.org/x.ipynb)"),
    ("`[a](nowhere.ipynb)`", "`[a](nowhere.ipynb)`"),
    ("```\n[a](nowhere.ipynb)\n```", "```\n[a](nowhere.ipynb)\n```"),
])
def test_links(small, link, expected):
    assert small().markdown("nbs/core/one.ipynb", link) == expected


def test_a_link_to_nothing_stops_the_build(small):
    with pytest.raises(SystemExit, match="links to three.ipynb, which does not exist"):
        small().markdown("nbs/core/one.ipynb", "See [three](three.ipynb).")


def test_linked_cells_have_an_address(small):
    "Only those: `there` is linked to, `title` is not"
    book = small(new_markdown_cell("[over there](two.ipynb#cell-id=there)"))
    book.find_reached()
    assert 'id="cell-id=there"' in sources(book.notebook("nbs/core/two.ipynb"))
    assert "cell-id=title" not in sources(book.notebook("nbs/core/one.ipynb"))


def test_the_line_of_links(book):
    line = sources(book.notebook(OPEN, "lessons/01_why_not_rlhf", "lessons/03_sampling"))
    assert f'href="https://colab.research.google.com/github/wikidpo/wikidpo/blob/main/{OPEN}"' in line
    assert f'href="../notebooks/{OPEN}" download' in line
    assert 'class="previous" href="01_why_not_rlhf.html"' in line and 'class="next" href="03_sampling.html"' in line


def test_every_notebook_has_its_place_in_the_order(book):
    "Once, and the lessons in theirs"
    names = tool.order(book)
    assert sorted(names) == sorted(p.name for p in book.pages.values() if p.is_notebook)
    assert [n for n in names if n.startswith("lessons/")] == names[1:16]


def test_mathematics_and_code_in_a_summary(small):
    text = small().markdown("nbs/core/one.ipynb", "<details><summary>Is $x<1$ in `f`?</summary>\n\nYes.\n\n</details>")
    assert r'<span class="math notranslate nohighlight">\(x<1\)</span> in <code>f</code>?</summary>' in text


def test_a_chain_becomes_boxes():
    chain = 'flowchart LR\n  A["one"] -->|does| B["two & more"]\n  B --> C["three"]\n'
    drawn = tool.flow(chain)
    assert re.findall("<span>(.*?)</span>", drawn) == ["one", "two &amp; more", "three"] and "<i>does →</i>" in drawn
    with pytest.raises(SystemExit, match="a chain of mermaid's only"): tool.flow(chain + "  A --> C\n")


def test_a_living_widget_stands_where_its_picture_stood(small, tmp_path):
    "In a lesson in place of the figure, on the first page in place of the picture; else all stays"
    (tmp_path/"beta.html").write_text("<b>living</b>")
    book = tool.Book(ROOT, tmp_path)
    for path in "nbs/index.ipynb", OPEN:
        shown = [o.data["text/html"] for c in book.notebook(path).cells for o in c.get("outputs", [])
                 if "text/html" in o.get("data", {})]
        assert shown == ["<b>living</b>"]
    assert "widget_beta.png" not in sources(book.notebook("nbs/index.ipynb"))
    assert "widget_inspector.png" in sources(book.notebook("nbs/index.ipynb"))
    assert "widget_beta.png" in sources(tool.Book(ROOT).notebook("nbs/index.ipynb"))


def test_pages_of_the_package(book):
    "Each public name of each module stands on its page, with the comments of its parameters and its source"
    pages = book_api.pages(book)
    for path, name in book.modules.items():
        module = book_api.Module(path, (ROOT/path).read_text("utf-8"))
        there = set(re.findall(r"^`+\{py:\w+\} (\w+)", pages[name], re.M))
        names = {book_api.named(node) for node in module.tree.body}
        assert set(module.public) & names <= there, name
    loss = pages["api/core/loss"]
    assert "{py:function} preference_loss(z, beta: float=0.1, loss_type: str='dpo'" in loss
    assert r"- `z`: (B,) margin in nats" in loss and "- `loss_type`: one of `MARGIN_LOSSES`" in loss
    assert '<a href="../../lessons/14_the_family.html#cell-id=fam14pre">' in loss
    assert "- `policy_rejected: torch.Tensor`: log pi(rejected" in loss
    sample = book_api.Module("x.py", 'def f(a, b, # of both\n      c=1 # of one\n     )->int: # how many\n    "Doc"\n')
    assert book_api.remarks(sample, sample.tree.body[0]) == [("`a`, `b`", "of both"), ("`c`", "of one")]
    assert book_api.result(sample, sample.tree.body[0]) == "how many"


def test_words_of_a_docstring_are_no_markup():
    assert book_api.plain("a_b * <i> $x$ `c_d`") == r"a\_b \* \<i\> \$x\$ `c_d`"


def test_what_is_broken_is_found(tmp_path):
    (tmp_path/"a.html").write_text('<a href="b.html">x</a><a href="#here">x</a><p id="here">'
                                   '<link rel="canonical" href="https://example.org/a.html"><a href="https://e.org">x</a>')
    assert tool.broken(tmp_path) == ["a.html: b.html: no such file"]
    (tmp_path/"b.html").write_text('<a href="a.html#gone">x</a><script src="https://cdn.example/x.js"></script>')
    assert tool.broken(tmp_path) == ["b.html: loads https://cdn.example/x.js", "b.html: a.html#gone: no such place"]


def test_settings_of_the_book():
    "The pins are those that are asked for, each file by its hash; pictures and settings are there"
    wanted = dict(line.split("==") for line in (ROOT/"docs/requirements.in").read_text().split())
    pinned = (ROOT/"docs/requirements.txt").read_text()
    for name, version in wanted.items(): assert f"\n{name}=={version} \\" in pinned
    for block in re.split(r"^(?=\w)", pinned, flags=re.M)[1:]: assert "--hash=sha256:" in block, block[:60]
    assert (ROOT/"docs/static/icon.svg").exists() and (ROOT/"docs/static/social.png").stat().st_size > 10_000
    ast.parse((ROOT/"docs/conf.py").read_text())


# --- the book itself


@pytest.fixture(scope="module")
def site():
    "The built book"
    if "BOOK" not in os.environ: subprocess.run(["make", "-s", "docs"], cwd=ROOT, check=True)
    return Path(os.environ.get("BOOK", ROOT/"_docs/html")).resolve()


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM: pytest.skip("no chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Reader:
    "A page of the book in a browser; `wrong` holds errors in the console and requests to a host"
    def __init__(self, browser, site, size=WIDE, scheme="light"):
        self.site, self.wrong = site, []
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("request", self.request)

    def request(self, request):
        if not request.url.startswith(("file:", "data:", "blob:")): self.wrong.append(request.url)

    def open(self, name):
        self.page.goto(f"{self.site.as_uri()}/{name}", wait_until="load")
        return self.page

    def sideways(self): return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.slow
def test_links_of_the_built_book(site):
    assert tool.broken(site) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [PHONE, WIDE], ids=["phone", "wide"])
def test_every_page_from_disk(site, chromium, size):
    "No host is asked, nothing goes wrong, and no page is wider than the screen"
    reader, wide = Reader(chromium, site, size), []
    names = [p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html"))]
    assert len(names) > 150
    for name in names:
        reader.open(name)
        if reader.sideways() > 0: wide.append(name)
    assert reader.wrong == [] and wide == []


@pytest.mark.slow
def test_mathematics_is_typeset(site, chromium):
    reader = Reader(chromium, site)
    page = reader.open("lessons/02_the_loss.html")
    page.wait_for_selector("summary mjx-container")
    assert page.locator("mjx-container").count() > 100 and page.locator("mjx-merror").count() == 0
    assert "$" not in page.locator("article p").all_inner_texts() and reader.wrong == []


@pytest.mark.slow
def test_search_from_disk(site, chromium):
    reader = Reader(chromium, site)
    page = reader.open("search.html?q=retired")
    page.wait_for_selector("ul.search li a")
    found = page.locator("ul.search li a").all_inner_texts()
    assert any("Lesson 02" in title for title in found) and reader.wrong == []
    page = reader.open("search.html?q=preference_loss")
    page.wait_for_selector("ul.search li a")
    assert "preference_loss" in page.locator("ul.search li a").first.inner_text()


@pytest.mark.slow
def test_hints_and_solutions_are_folded(site, chromium):
    "Until they are opened, or a link leads into one"
    reader = Reader(chromium, site)
    page = reader.open("lessons/02_the_loss.html")
    folded = page.locator("details", has=page.locator("summary", has_text="Solution")).first
    assert not folded.locator("pre").is_visible()
    folded.locator("summary").click()
    assert folded.locator("pre").is_visible()


@pytest.mark.slow
def test_a_link_into_a_cell(site, chromium):
    reader = Reader(chromium, site)
    page = reader.open("lessons/02_the_loss.html")
    page.locator("article a", has_text=re.compile("^checked$")).first.click()
    page.wait_for_function("document.querySelector(':target')?.getBoundingClientRect().top < innerHeight / 2")
    assert page.evaluate("document.querySelector(':target + *').innerText.length") > 20 and reader.wrong == []


@pytest.mark.slow
def test_dark(site, chromium):
    "The page is dark; figures keep their paper"
    reader = Reader(chromium, site, scheme="dark")
    page = reader.open("lessons/02_the_loss.html")
    def paper(where): return page.eval_on_selector(where, "e => getComputedStyle(e).backgroundColor")
    assert max(map(int, re.findall(r"\d+", paper("body"))[:3])) < 60
    assert paper("div.cell_output img") == "rgb(255, 255, 255)"
    page.wait_for_selector(".wikidpo-page svg")
    assert paper(".wikidpo-page svg") == "rgba(0, 0, 0, 0)"


LIVING = {"index": "beta", "lessons/02_the_loss": "beta", "lessons/05_preference_pairs": "inspector",
          "lessons/06_training": "tokens", "lessons/07_reading_the_run": "player", "lessons/08_win_rate": "vote"}


@pytest.mark.slow
@pytest.mark.parametrize("size,scheme", [(WIDE, "light"), (PHONE, "dark")], ids=["wide", "phone, dark"])
def test_widgets_live(site, chromium, size, scheme):
    "On each page that has one, readable: what is drawn fits the page"
    for name, widget in LIVING.items():
        reader = Reader(chromium, site, size, scheme)
        page = reader.open(f"{name}.html")
        page.wait_for_selector(f'.wikidpo-page[data-widget="{widget}"] .wikidpo button, .wikidpo-page input')
        page.locator(".wikidpo-page").first.scroll_into_view_if_needed()
        assert reader.sideways() <= 0 and reader.wrong == [], name


@pytest.mark.slow
def test_the_slider_on_the_first_page(site, chromium):
    "Sliding beta retires pairs, without a kernel"
    reader = Reader(chromium, site)
    page = reader.open("index.html")
    slider = page.locator('.wikidpo-page[data-widget="beta"] input[type=range]').first
    slider.wait_for()
    words = page.locator('.wikidpo-page[data-widget="beta"] .wikidpo')
    before = words.inner_text()
    slider.focus()
    for _ in range(20): page.keyboard.press("ArrowRight")
    assert words.inner_text() != before and "retired" in words.inner_text() and reader.wrong == []


@pytest.mark.slow
def test_head_of_a_page(site):
    "An icon, and the picture that is shown where the page is linked to"
    text = (site/"lessons/02_the_loss.html").read_text()
    assert 'property="og:image" content="https://wikidpo.github.io/wikidpo/_static/social.png"' in text
    assert (site/"_static/social.png").exists() and 'href="../_static/icon.svg"' in text
    assert json.loads((site/f"notebooks/{OPEN}").read_text())["cells"]
