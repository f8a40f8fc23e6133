"""The widgets and the lessons in a real JupyterLab, driven by a real Chromium without a screen.

Skipped only where there is no Chromium. SCREENSHOTS (default runs/browser) is where the pictures go: look at them after
changing a widget. timings.json there says how long actions took.
"""
import json, math, os, re, shutil, socket, subprocess, sys, time, urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import nbformat
import pytest

from check import copy_tree

ROOT = Path(__file__).resolve().parent.parent
SHOTS = Path(os.environ.get("SCREENSHOTS", ROOT/"runs"/"browser")).resolve()
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LESSONS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/"nbs"/"lessons").glob("[0-9]*.ipynb"))
PAIRS = len((ROOT/"wikidpo"/"data"/"miniwiki"/"pairs.jsonl").read_text().splitlines()) # that ship with the package
WIDGETS = ["beta", "inspector", "tokens", "player", "vote"] # nbs/show/NAME.ipynb shows one each
OFFLINE = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync",
           "--no-first-run", "--disable-gpu"]
SESSION = "jupyterapp.shell.currentWidget?.sessionContext"
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
LAB_SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
                "apputils-extension/themes": {"theme": "JupyterLab Light"}}
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no chromium")]

HOSTILE = ["<script>window.hacked = 1</script>", '<img src=x onerror="window.hacked = 2">',
           '<a href="javascript:window.hacked = 3">click</a>', "\x1b[31mred\x1b[0m\x07",
           "\u202eright to left\u202c \u200b\u2066isolated", "</textarea></script><svg onload=window.hacked=4>",
           "x" * 100_000, "long " * 20_000]


def write_notebook(path, *cells):
    "A notebook with these code cells"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=KERNEL)
    nbformat.write(nb, path)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def lab_environment(tree, tmp, settings):
    "Nothing of this machine's Jupyter, and the package of the tree"
    own = {name: str(tmp/folder) for name, folder in {
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython", "WANDB_DIR": "."}.items()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | own | {"PYTHONPATH": str(tree), "PATH": path, "JUPYTERLAB_SETTINGS_DIR": str(settings),
                              "TQDM_DISABLE": "1", "WANDB_MODE": "offline"}
    env.pop("MPLBACKEND", None) # the kernel picks the inline one
    return env


class Lab:
    "A JupyterLab of its own, on a copy of the tree, and a browser; `open` gives a page with a notebook in it"
    def __init__(self, tmp):
        from playwright.sync_api import sync_playwright
        self.tree = copy_tree(ROOT, tmp/"tree")
        settings = tmp/"settings"
        for plugin, values in LAB_SETTINGS.items():
            file = settings/f"@jupyterlab/{plugin}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        port = free_port()
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
                   f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
                   f"--ServerApp.root_dir={self.tree}",
                   "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
        self.log = open(tmp/"lab.log", "w")
        self.server = subprocess.Popen(command, env=lab_environment(self.tree, tmp, settings), cwd=self.tree,
                                       stdout=self.log, stderr=self.log)
        self.url = f"http://127.0.0.1:{port}"
        self.wait_for_server()
        self.playwright = sync_playwright().start()
        self.browser = self.playwright.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        self.idle = []

    def wait_for_server(self):
        for _ in range(240):
            try: return urllib.request.urlopen(f"{self.url}/api")
            except OSError: time.sleep(.25)
            assert self.server.poll() is None, Path(self.log.name).read_text()

    def close(self):
        self.browser.close()
        self.playwright.stop()
        self.server.terminate()
        self.server.wait(20)
        self.log.close()

    @contextmanager
    def open(self, notebook):
        "A page on the notebook, 1024 pixels wide; fails at an error in the console, or at what comes from elsewhere"
        page, wrong = self.idle.pop() if self.idle else self.new_page()
        try:
            page.evaluate("async path => { await jupyterapp.commands.execute('docmanager:open', {path}); }", notebook)
            page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
            page.wait_for_function(f"{SESSION}?.session?.kernel?.status == 'idle'", timeout=60_000)
            yield page
            assert not wrong, wrong
        except BaseException: # nobody knows what is left in it
            page.evaluate(f"{SESSION}?.shutdown()")
            page.context.close()
            raise
        page.evaluate(f"{SESSION}.shutdown()")
        page.evaluate("jupyterapp.shell.currentWidget.dispose()") # to close it would ask whether to save
        if page.locator(".jp-Dialog").count(): page.context.close() # what asks, asks the next one too
        else: self.idle.append((page, wrong))

    def new_page(self):
        "JupyterLab, and a list of what goes wrong in it; loading it takes longest, so it is used again and again"
        page, wrong = self.browser.new_context(viewport={"width": 1024, "height": 900}).new_page(), []
        ours = self.url, self.url.replace("http", "ws"), "data:", "blob:"
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: None if r.url.startswith(ours) else wrong.append(r.url))
        page.goto(f"{self.url}/lab/workspaces/test{len(self.browser.contexts)}?reset")
        page.wait_for_function("window.jupyterapp?.shell.currentWidget", timeout=60_000)
        page.evaluate("jupyterapp.shell.collapseLeft()")
        return page, wrong


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    SHOTS.mkdir(parents=True, exist_ok=True)
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


def errors_in(nb):
    "The tracebacks of a notebook's cells, without colours"
    outputs = [o for c in nb["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    return [re.sub(r"\x1b\[[\d;]*m", "", "\n".join(o["traceback"])) for o in outputs]


def holds_code(cell):
    "More than comments"
    return cell["cell_type"] == "code" and bool(re.sub("(?m)^#.*$", "", "".join(cell["source"])).strip())


def run_all(page, expect_widgets=0):
    "Run all cells; no error, and no widget that is still loading"
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    nb = page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON()")
    errors = errors_in(nb)
    assert not errors, errors[0]
    assert all(c["execution_count"] for c in nb["cells"] if holds_code(c))
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    views = sum("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs)
    page.wait_for_function("n => document.querySelectorAll('.wikidpo').length >= n", arg=views, timeout=20_000)
    assert views >= expect_widgets
    text = page.evaluate("document.querySelector('.jp-Notebook').textContent")
    for words in ("Loading widget", "Error displaying widget", "Javascript Error"): assert words not in text
    return nb


def python(page, code):
    "Run code in the page's kernel; what it prints"
    return page.evaluate("""async code => {
        const future = jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code});
        let out = '';
        future.onIOPub = m => {
            if (m.header.msg_type == 'stream') out += m.content.text;
            if (m.header.msg_type == 'error') out += m.content.evalue;
        };
        await future.done;
        return out.trim();
    }""", code)


def widget(page, label): return page.get_by_role("region", name=label)
def number(text): return float(text.replace("−", "-"))
def readout(w, name): return w.locator(f"[data-readout={name}]").inner_text()


def wait(page, condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        page.wait_for_timeout(20)


REDRAW_TIMES = """(slider, values) => {
    const times = [];
    for (const value of values) {
        slider.value = value;
        const begin = performance.now();
        slider.dispatchEvent(new Event('input'));
        document.querySelector('.wikidpo svg').getBoundingClientRect();
        times.push(performance.now() - begin);
    }
    return times;
}"""


def note(name, value):
    "Add a time (ms) to timings.json"
    file = SHOTS/"timings.json"
    times = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(times | {name: round(value, 1)}, indent=1, sort_keys=True) + "\n")


def shoot(page, w, name):
    "The widget in the light and in the dark theme, and nothing of it sticks out of its frame"
    for theme in ("Dark", "Light"):
        page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme}")
        page.wait_for_function("theme => document.body.dataset.jpThemeName == theme", arg=f"JupyterLab {theme}")
        page.wait_for_timeout(300)
        w.screenshot(path=SHOTS/f"{name}_{theme.lower()}.png")
    assert w.evaluate("e => e.scrollWidth <= e.clientWidth + 1 && e.getBoundingClientRect().right <= innerWidth")


@pytest.fixture(scope="module")
def room(lab, request):
    "The notebook of one of the widgets, all cells run"
    with lab.open(f"nbs/show/{request.param}.ipynb") as page:
        run_all(page, 1)
        yield page


def in_the_notebook_of(*names): return pytest.mark.parametrize("room", names, indirect=True)


BEHIND = ".jp-OutputArea-child:has(.wikidpo) + .jp-OutputArea-child img"


@in_the_notebook_of(*WIDGETS)
def test_figures_hide_behind_live_widgets(room):
    assert room.locator(".wikidpo").count() == 1
    assert room.locator(BEHIND).count() == 1
    assert not any(i.is_visible() for i in room.locator(BEHIND).all())


def test_figures_show_without_a_kernel(lab):
    "The notebooks of the widgets as they are committed, one after the other on a page"
    cells = []
    for name in WIDGETS: cells += nbformat.read(lab.tree/f"nbs/show/{name}.ipynb", 4).cells
    for i, cell in enumerate(cells): cell.id = f"cell{i}"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), lab.tree/"nbs/show/unrun.ipynb")
    with lab.open("nbs/show/unrun.ipynb") as page:
        widths = page.evaluate("""async () => {
            const nb = jupyterapp.shell.currentWidget.content, widths = [];
            for (const cell of nb.widgets) {
                await nb.scrollToCell(cell);
                await new Promise(r => setTimeout(r, 50));
                for (const image of cell.node.querySelectorAll('.jp-OutputArea-output img')) {
                    await image.decode();
                    widths.push(image.getBoundingClientRect().width);
                }
            }
            return widths;
        }""")
        assert len(widths) == len(WIDGETS) and min(widths) > 300
        assert page.locator(".wikidpo").count() == 0
        assert "widget..." not in page.evaluate("document.querySelector('.jp-Notebook').textContent")


def summary_of(room):
    "What Python says of the slider"
    return json.loads(python(room, "import json; print(json.dumps(slider.summary))"))


@in_the_notebook_of("beta")
def test_beta_slider_is_drawn_under_the_finger(room): # style: one walk through a page
    w = widget(room, "The loss and the leash: beta slider")
    w.scroll_into_view_if_needed()
    python(room, "slider.beta = .1")
    wait(room, lambda: readout(w, "beta") == "0.1")
    curve = w.locator("path.line").first
    before = curve.get_attribute("d")
    slider = w.get_by_label("beta", exact=True)
    slider.evaluate("""e => {
        window.frames_ms = [];
        e.addEventListener('input', ev => requestAnimationFrame(() => {
            const c = new MessageChannel();
            c.port1.onmessage = () => frames_ms.push(performance.now() - ev.timeStamp);
            c.port2.postMessage(0);
        }));
    }""")
    box = slider.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    room.mouse.move(x, y)
    room.mouse.down()
    for i in range(60):
        room.mouse.move(x + i * box["width"] / 140, y)
        room.wait_for_timeout(16)
    assert readout(w, "beta") != "0.1" and curve.get_attribute("d") != before # before the finger is lifted
    room.mouse.up()
    frames = room.evaluate("frames_ms")
    note("beta: input to painted, median", median(frames))
    note("beta: input to painted, slowest", max(frames))
    assert len(frames) > 20


@in_the_notebook_of("beta")
def test_beta_slider_and_python_agree(room): # style: one walk through a page
    w = widget(room, "The loss and the leash: beta slider")
    w.scroll_into_view_if_needed()
    slider, curve = w.get_by_label("beta", exact=True), w.locator("path.line").first
    redraws = slider.evaluate(REDRAW_TIMES, [-2 + i / 50 for i in range(100)])
    note("beta: redraw of 10,000 pairs, median", median(redraws))
    assert min(redraws) < 16 # one that no other process held up
    slider.evaluate("e => e.dispatchEvent(new Event('change'))")
    wait(room, lambda: math.isclose(float(python(room, "print(slider.beta)")), float(readout(w, "beta"))))
    summary = summary_of(room)
    assert readout(w, "retired") == f"{summary['retired']:,} of 10,000"
    assert readout(w, "mean") == f"{summary['mean']:.3f}"

    python(room, "slider.beta, slider.loss_type = .05, 'hinge'") # set from Python
    wait(room, lambda: readout(w, "beta") == "0.05" and w.get_by_label("hinge").is_checked())
    heard_of = {"DPO": "dpo False", "cDPO": "dpo True", "robust": "robust True", "IPO": "ipo False",
                "hinge": "hinge False"}
    for name, heard in heard_of.items():
        was = curve.get_attribute("d") # at first, of the hinge
        w.get_by_label(name, exact=True).check()
        wait(room, lambda: curve.get_attribute("d") != was)
        wait(room, lambda: python(room, "print(slider.loss_type, slider.label_smoothing > 0)") == heard)
        assert readout(w, "retired") == f"{summary_of(room)['retired']:,} of 10,000"
        assert python(room, "print(slider.beta)") == "0.05"       # and not the slider's nearest step
    w.get_by_label("cDPO", exact=True).check()
    assert w.get_by_label("smoothing").is_visible()
    shoot(room, w, "beta_cdpo")
    w.get_by_label("DPO", exact=True).check()
    slider.focus()
    before = readout(w, "beta")
    room.keyboard.press("ArrowRight")
    assert float(readout(w, "beta")) > float(before) and "pairs retired" in slider.get_attribute("aria-valuetext")
    # what the arrow key said has arrived: it would undo what Python says next
    wait(room, lambda: float(python(room, "print(slider.beta)")) == float(readout(w, "beta")) > float(before))
    python(room, "slider.beta = 2.") # beyond what the profile takes
    wait(room, lambda: readout(w, "beta") == "2")
    assert math.isclose(10 ** float(slider.input_value()), 2, rel_tol=.02)
    shoot(room, w, "beta")


@in_the_notebook_of("beta")
def test_formulas_in_the_browser(room):
    "The same reference values that test_widgets.py holds against Python"
    from test_widgets import reference
    source = (ROOT/"wikidpo"/"show"/"static"/"losses.js").read_text()
    got = room.evaluate("""async ([source, rows]) => {
        const m = await import(URL.createObjectURL(new Blob([source], {type: 'text/javascript'})));
        return rows.map(([type, z, beta, eps]) => [m.loss, m.slope, m.pull].map(f => f(z, beta, type, eps)));
    }""", [source, [r[:4] for r in reference()]])
    for (loss_type, z, beta, eps, *want), values in zip(reference(), got):
        assert values == pytest.approx(want, rel=1e-12, abs=1e-15), (loss_type, z, beta, eps)


@in_the_notebook_of("inspector")
def test_pair_inspector_filters_sorts_and_moves(room): # style: one walk through a page
    w = widget(room, "Pair inspector")
    w.scroll_into_view_if_needed()
    python(room, "inspector.query, inspector.limits, inspector.order = '', {}, 'as mined'")
    wait(room, lambda: readout(w, "kept").startswith(f"{PAIRS:,} of {PAIRS:,}"))
    w.get_by_label("search").fill("capital")
    wait(room, lambda: not readout(w, "kept").startswith(f"{PAIRS:,}"))
    n = int(python(room, "print(sum('capital' in t for t in inspector.texts))"))
    assert readout(w, "kept").startswith(f"{n} of {PAIRS:,}")
    w.get_by_label("gap", exact=True).focus()
    for _ in range(6): room.keyboard.press("ArrowRight")
    wait(room, lambda: python(room, "print(inspector.limits)") == "{'gap': [6, None]}")
    in_python = "sum('capital' in t and g >= 6 for t, g in zip(inspector.texts, inspector.cols['gap']))"
    n = int(python(room, f"print({in_python})"))
    wait(room, lambda: readout(w, "kept").startswith(f"{n} of {PAIRS:,}"))
    w.get_by_label("sort by").select_option("longer, but worse")
    wait(room, lambda: python(room, "print(inspector.order)") == "longer, but worse")
    first = w.locator("[data-side=chosen]").inner_text()
    w.get_by_role("grid").focus()
    room.keyboard.press("ArrowDown")
    wait(room, lambda: readout(w, "position") == f"2 of {n}")
    w.locator("[data-side=chosen]").focus()
    room.keyboard.press("PageDown")                               # scrolls the text that has the focus
    room.keyboard.press("j")
    wait(room, lambda: readout(w, "position") == f"3 of {n}")
    w.get_by_role("grid").focus()
    room.keyboard.press("End")
    wait(room, lambda: readout(w, "position") == f"{n} of {n}")
    room.keyboard.press("k")
    wait(room, lambda: readout(w, "position") == f"{n - 1} of {n}")
    assert w.locator("[data-side=chosen]").inner_text() != first and w.locator("mark").count()
    w.get_by_label("gap", exact=True).focus()
    room.keyboard.press("Home")                                   # back at 0 there is no limit, nor for unscored pairs
    wait(room, lambda: python(room, "print(inspector.limits)") == "{'gap': [None, None]}")


@in_the_notebook_of("inspector")
def test_pair_inspector_exports_and_says_what_is_wrong(room):
    w = widget(room, "Pair inspector")
    w.scroll_into_view_if_needed()
    python(room, "inspector.query, inspector.limits = 'capital', {'gap': [6, None]}")
    n = int(python(room, "print(len(inspector.selection))"))
    wait(room, lambda: readout(w, "kept").startswith(f"{n} of {PAIRS:,}"))
    w.get_by_text("more filters").click()
    w.get_by_label("chosen temperature, at most").fill("0.8")
    wait(room, lambda: "temp_chosen" in python(room, "print(inspector.limits)"))
    kept = python(room, "print(len(inspector.selection))")
    assert 0 < int(kept) < n
    python(room, "import tempfile; inspector.out = Path(tempfile.mkdtemp())/'kept.jsonl'")
    w.get_by_role("button", name="export").click()
    wait(room, lambda: w.locator("span[role=status]").inner_text() == f"{kept} pairs written to kept.jsonl")
    assert python(room, "print(len(read_jsonl(inspector.out)))") == kept
    w.get_by_label("search").fill("no pair says this")
    wait(room, lambda: readout(w, "position") == "no pair passes these filters")
    python(room, "inspector.position = 5")
    wait(room, lambda: w.get_by_role("alert").is_visible()) # an error in a callback is seen in the widget
    assert "position 5: there are 0 pairs" in w.get_by_role("alert").inner_text()
    w.get_by_text("more filters").click()
    python(room, "inspector.query, inspector.limits = '', {'gap': [3, None]}")
    python(room, "inspector.order, inspector.position = 'as mined', 11")
    wait(room, lambda: readout(w, "position").startswith("12 of") and not w.get_by_role("alert").is_visible())
    shoot(room, w, "inspector")


@in_the_notebook_of("inspector")
def test_a_search_that_found_nothing_can_be_cleared(room):
    "Its page fails at an error in the console"
    w = widget(room, "Pair inspector")
    python(room, "inspector.query, inspector.limits = '', {}")
    w.get_by_label("search").fill("no pair says this")
    wait(room, lambda: readout(w, "position") == "no pair passes these filters")
    w.get_by_label("search").fill("")
    wait(room, lambda: readout(w, "position").startswith("1 of") and w.locator("mark").count())


@in_the_notebook_of("tokens")
def test_token_view(room):
    w = widget(room, "Token view")
    w.scroll_into_view_if_needed()
    python(room, "view.checkpoint, view.position = 'after 5 steps', 0")
    wait(room, lambda: w.get_by_label("pair", exact=True).input_value() == "1")
    before = readout(w, "margin")
    w.get_by_role("button", name="next").click()
    wait(room, lambda: readout(w, "margin") != before)
    in_python = "{s: sum(view.data[s]['rewards']) for s in ('chosen', 'rejected')}"
    sums = json.loads(python(room, f"import json; print(json.dumps({in_python}))"))
    for side, total in sums.items(): assert number(readout(w, side)) == pytest.approx(total, abs=6e-4)
    shown = [number(t) for t in w.locator("[data-side=rejected] small").all_inner_texts()]
    assert sum(shown) == pytest.approx(sums["rejected"], abs=.005 * len(shown)) and any(shown)
    shoot(room, w, "tokens")
    w.get_by_label("checkpoint").select_option("reference")
    wait(room, lambda: readout(w, "margin") == "0.000")
    python(room, "view.position = 10**6")
    wait(room, lambda: f"pair 1000001: there are {PAIRS}" in w.get_by_role("alert").inner_text())


@in_the_notebook_of("player")
def test_run_player(room): # style: one walk through a page
    w = widget(room, "Run player")
    w.scroll_into_view_if_needed()
    python(room, "player.step = 1")
    wait(room, lambda: readout(w, "step") == "1 of 60")
    slider, circles = w.get_by_label("step", exact=True), w.locator("circle")
    def dots(): return [float(x) for x in circles.evaluate_all("cs => cs.map(c => c.getAttribute('cx'))")]
    start = dots()
    assert max(start) - min(start) < 20 and readout(w, "retired") == "0 of 40" # all pairs begin near z = 0
    slider.focus()
    for _ in range(29): room.keyboard.press("ArrowRight")
    assert readout(w, "step") == "30 of 60"
    middle = dots()
    assert max(middle) - min(middle) > 100
    shoot(room, w, "player")
    note("player: redraw, median", median(slider.evaluate(REDRAW_TIMES, list(range(59, -1, -1)))))
    slider.focus()
    room.keyboard.press("End")
    wait(room, lambda: python(room, "print(player.step)") == "60") # Python hears where it stopped
    retired = int(python(room, "print(int(has_retired(player.z[-1], .1).sum()))"))
    assert readout(w, "retired") == f"{retired} of 40" and retired > 10
    assert w.locator("circle.retired").count() == retired
    w.get_by_role("button", name="play").click()
    wait(room, lambda: 1 < int(readout(w, "step").split()[0]) < 60)
    w.get_by_role("button", name="pause").click()
    wait(room, lambda: python(room, "print(player.step)") == readout(w, "step").split()[0])


@in_the_notebook_of("vote")
def test_blind_vote(room): # style: one walk through a page
    python(room, "vote.path, vote.votes = Path(tempfile.mkdtemp())/'votes.jsonl', {}\nvote._next()")
    w = widget(room, "Blind vote")
    w.scroll_into_view_if_needed()
    wait(room, lambda: readout(w, "votes") == "0 votes")
    text = w.inner_text()
    assert "DPO" not in text and "SFT" not in text and "after 10 more" in text # blind
    w.locator("[data-side=first]").focus()
    room.keyboard.press("ArrowDown")                              # scrolls the text, and is no vote
    w.focus()
    cells = room.locator(".jp-Cell").count()
    for i, key in enumerate(["1", "2", "0", "ArrowLeft", "ArrowRight", "ArrowDown", "1", "2", "1"], 1):
        question = w.locator("[data-side=first]").inner_text()
        room.keyboard.press(key)
        wait(room, lambda: readout(w, "votes") == (f"{i} votes" if i > 1 else "1 vote"))
        assert w.locator("[data-side=first]").inner_text() != question
    assert "kappa" not in w.inner_text()
    for key in "add": room.keyboard.press(key) # Lab's shortcuts rest
    assert room.locator(".jp-Cell").count() == cells
    shoot(room, w, "vote_blind")
    w.get_by_role("button", name="left is better").click()
    wait(room, lambda: "Cohen's kappa" in readout(w, "kappa"))
    votes = json.loads(python(room, "import json; print(json.dumps([v for v in read_jsonl(vote.path)]))"))
    assert len(votes) == 10 and [v["vote"] for v in votes][2] == "tie"
    other = {"a": "b", "b": "a"}
    assert votes[0]["vote"] == votes[0]["shown_first"] and votes[1]["vote"] == other[votes[1]["shown_first"]]
    value = json.loads(python(room, "print(json.dumps(vote.result['kappa']))"))
    assert f"kappa {value:.2f}".replace("-", "−") in readout(w, "kappa")
    shoot(room, w, "vote")


ATTACK = ["""import time, random, ipywidgets
import numpy as np
from wikidpo.show.beta import BetaSlider
from wikidpo.show.inspector import columns, PairInspector
from wikidpo.show.tokens import TokenView
from wikidpo.show.vote import BlindVote""",
f"bad = {HOSTILE!r}",
"""def pair(text):
    return {'prompt': text, 'chosen': text, 'rejected': 'plain ' + text, 'score_chosen': 9, 'score_rejected': 2,
            'temp_chosen': .7, 'temp_rejected': 1.3}
inspector = PairInspector([pair(text) for text in bad])
inspector""",
"""def verdict(i, text): return {'prompt_id': i, 'prompt': text, 'a': text, 'b': 'plain ' + text, 'result': 'a'}
vote = BlindVote([verdict(i, text) for i, text in enumerate(bad)], 'votes.jsonl', names=(bad[1], bad[0]))
vote""",
"""class Fake(TokenView):
    def _compute(self, name, i):
        side = {'tokens': [bad[i], ' end'], 'rewards': [.5, -.1]}
        return {'prompt': bad[i], 'chosen': side, 'rejected': side}
tokens = Fake(bad, None, {bad[0]: None, bad[1]: None})
tokens""",
"""words = [f'word{i}' for i in range(3000)]
random.seed(0)
def text(k): return ' '.join(random.choices(words, k=k))
many = [{'prompt': text(12), 'chosen': text(40), 'rejected': text(60), 'score_chosen': random.randint(4, 10),
         'score_rejected': random.randint(1, 5), 'temp_chosen': random.choice((.7, .9)),
         'temp_rejected': random.choice((1.1, 1.3))} for _ in range(10_000)]
big = PairInspector(many)
big""",
"""again = BetaSlider([random.gauss(5, 9) for _ in range(10_000)])
again"""]


@pytest.fixture(scope="module")
def attack(lab):
    "A notebook whose pairs, answers, checkpoints and errors are hostile, and large"
    write_notebook(lab.tree/"attack.ipynb", *ATTACK)
    with lab.open("attack.ipynb") as page:
        run_all(page, 5)
        yield page


def test_hostile_text_is_only_text(attack): # style: one walk through a page
    "Nothing of it runs, nothing of it becomes an element, and nothing of it leaves its box"
    inspector = attack.get_by_role("region", name="Pair inspector").first
    vote, tokens = widget(attack, "Blind vote"), widget(attack, "Token view")
    for i, text in enumerate(HOSTILE):
        python(attack, f"inspector.position = {i}; tokens.position = {i}; tokens.checkpoint = bad[{i % 2}]")
        wait(attack, lambda: readout(inspector, "position") == f"{i + 1} of {len(HOSTILE)}")
        shown = inspector.locator("[data-side=chosen]").evaluate("e => e.textContent")
        assert not re.search("[\x00-\x08\x0b-\x1f\u200b\u202a-\u202e\u2066-\u2069]", shown)
        if text.isprintable(): assert shown == text
        token = tokens.locator("[data-side=chosen] b").first
        wait(attack, lambda: token.evaluate("e => e.textContent.length") == len(shown))
        for w in (inspector, vote, tokens):
            assert w.locator("script, img, a, iframe, [onerror], [onload]").count() == 0
            contained = "e => e.scrollWidth <= e.clientWidth + 1 && e.getBoundingClientRect().height < 1600"
            assert w.evaluate(contained), (i, text[:40])
        vote.focus()
        attack.keyboard.press("1")
        wait(attack, lambda: readout(vote, "votes").startswith(str(i + 1)))
    python(attack, "vote.NEEDED = 1; vote.result = vote._result()")
    wait(attack, lambda: "Cohen's kappa" in vote.inner_text())
    assert vote.locator("script, img, a").count() == 0
    python(attack, "inspector.error = bad[1]")
    wait(attack, lambda: inspector.get_by_role("alert").is_visible())
    assert inspector.locator("img").count() == 0
    assert attack.evaluate("window.hacked") is None
    python(attack, "inspector.position = 4")
    attack.wait_for_timeout(200)
    shoot(attack, inspector, "hostile")


@pytest.mark.parametrize("end", ["import os; os._exit(1)", "restart", "shut down"])
def test_a_stopped_kernel_is_announced(lab, end):
    "Whether it crashed, was restarted or was shut down: the widget says so, once, and works again when its cell runs"
    name = f"gone_{end.split()[0]}.ipynb"
    write_notebook(lab.tree/name, "from wikidpo.show.beta import BetaSlider\nBetaSlider([-3., 1., 8.])")
    with lab.open(name) as page:
        run_all(page, 1)
        announced = page.get_by_text("The kernel has stopped.")
        assert announced.count() == 0
        if end == "restart": page.evaluate(f"{SESSION}.session.kernel.restart()")
        elif end == "shut down": page.evaluate(f"{SESSION}.shutdown()")
        else: page.evaluate(f"code => {{ {SESSION}.session.kernel.requestExecute({{code}}); }}", end)
        wait(page, lambda: announced.count() == 1, 30)
        if end.startswith("import"): # the server starts another one
            page.wait_for_function(f"{SESSION}?.session?.kernel?.status == 'idle'", timeout=60_000)
        if end == "restart":
            page.locator(".wikidpo").screenshot(path=SHOTS/"kernel_gone.png")
            run_all(page, 1)
            wait(page, lambda: announced.count() == 0)


TIME_TO_CHANGE = """(e, where) => { // from the next input to the next change of what is shown
    let from;
    window.seen = null;
    for (const kind of ['input', 'change', 'click']) {
        e.addEventListener(kind, () => { from = performance.now(); }, {once: true, capture: true});
    }
    const observer = new MutationObserver(() => { observer.disconnect(); window.seen = performance.now() - from; });
    observer.observe(e.querySelector(where), {childList: true});
}"""


def test_ten_thousand_pairs(attack): # style: one walk through a page
    "An action shows one page of what passes; six cost the kernel less than half of six looks at all pairs"
    w = attack.get_by_role("region", name="Pair inspector").nth(1)
    w.scroll_into_view_if_needed()
    search, by_label = w.get_by_label("search"), w.get_by_label
    sort, button = by_label("sort by"), w.get_by_role("button", name="next")
    word = "np.array(['word17' in text for text in big.texts])"
    gap, best = "(big.cols['gap'] >= 4)", "(big.cols['score_chosen'] >= 8)"
    actions = {"search": (lambda: search.fill("word17"), word), # what it does, and which pairs pass then
               "sort": (lambda: sort.select_option("nearly the same text"), word),
               "gap": (lambda: by_label("gap", exact=True).fill("4"), f"{word} & {gap}"),
               "best": (lambda: by_label("best", exact=True).fill("8"), f"{word} & {gap} & {best}"),
               "clear": (lambda: search.fill(""), f"{gap} & {best}"),
               "next": (lambda: button.click(), f"{gap} & {best}")}
    spent = 0
    for name, (act, passing) in actions.items():
        w.evaluate(TIME_TO_CHANGE, "[data-side=chosen]" if name == "next" else ".list tbody")
        python(attack, "start = time.process_time()")
        act()
        attack.wait_for_function("window.seen !== null")
        spent += float(python(attack, "print(time.process_time() - start)"))
        note(f"inspector: 10,000 pairs, {name}", attack.evaluate("window.seen"))
        kept = int(python(attack, f"print(({passing}).sum())"))
        assert readout(w, "kept") == f"{kept:,} of 10,000 pairs ({kept / 100:.1f} %)" and kept > 100, name
        assert w.locator(".list tbody tr").count() == 8
    assert readout(w, "position").startswith("2 of ")
    python(attack, "start = time.process_time(); columns(many)")
    anew = float(python(attack, "print(time.process_time() - start)"))
    note("inspector: 10,000 pairs, all six actions, processor", 1000 * spent)
    note("inspector: 10,000 pairs, their columns, processor", 1000 * anew)
    assert spent < len(actions) * anew / 2


def test_running_a_cell_again_leaks_nothing(attack):
    count = "from ipywidgets.widgets.widget import _instances; print(len(_instances))"
    figures = "import matplotlib.pyplot as plt; print(len(plt.get_fignums()))"
    before = python(attack, count)
    models = attack.evaluate("document.querySelectorAll('.wikidpo').length")
    attack.evaluate("""async () => {
        const nb = jupyterapp.shell.currentWidget.content;
        nb.activeCellIndex = nb.widgets.length - 1;
        for (let i = 0; i < 15; i++) await jupyterapp.commands.execute('notebook:run-cell');
    }""")
    attack.wait_for_timeout(500)
    assert python(attack, count) == before and python(attack, figures) == "0"
    assert attack.evaluate("document.querySelectorAll('.wikidpo').length") == models


def lesson_with_marks(path):
    "A lesson on a real model is a test of its own"
    return pytest.param(path, marks=pytest.mark.smollm2) if "11_" in path else path


@pytest.mark.parametrize("lesson", [*map(lesson_with_marks, LESSONS)], ids=lambda p: Path(p).stem)
def test_lesson_runs_in_the_browser(lab, lesson):
    with lab.open(lesson) as page:
        start = time.monotonic()
        run_all(page)
        note(f"lesson {Path(lesson).stem}", 1000 * (time.monotonic() - start))
        seen = Counter()
        for w in page.locator(".wikidpo").all():
            w.scroll_into_view_if_needed()
            if (step := w.get_by_label("step", exact=True)).count(): step.fill("9")
            label = re.sub(r"\W+", "_", (w.get_attribute("aria-label") or "form").lower()) # of ipywidgets alone: none
            w.screenshot(path=SHOTS/f"lesson_{Path(lesson).stem[:2]}_{label}_{seen[label]}.png")
            seen[label] += 1


def run_cell(page, cell_id):
    "Run one cell of the page; the text that it writes"
    page.evaluate("""async id => {
        const nb = jupyterapp.shell.currentWidget.content;
        nb.activeCellIndex = nb.widgets.findIndex(cell => cell.model.id == id);
        await jupyterapp.commands.execute('notebook:run-cell');
    }""", cell_id)
    nb = page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON()")
    errors = errors_in(nb)
    assert not errors, errors[0]
    [cell] = [c for c in nb["cells"] if c["id"] == cell_id]
    return "".join("".join(o.get("text", "")) for o in cell["outputs"])


def test_a_sweep_scores_what_the_learner_predicted(lab):
    "The form of lesson 09, filled in by hand; then its sweep, with fewer pairs and questions, and the score"
    with lab.open("nbs/lessons/09_the_beta_sweep.ipynb") as page:
        for cell in ("b03c1427", "5594a18f", "dfd1ad67"): run_cell(page, cell) # imports, folder, form
        form = page.locator(".wikidpo")
        button = form.get_by_role("button", name="Store my prediction")
        form.scroll_into_view_if_needed()
        button.click()
        wait(page, lambda: "found none" in form.inner_text())
        for select, beta in zip(form.locator("select").all(), ("3", "0.3", "0.03"), strict=True):
            select.select_option(label=beta)
        button.click()
        wait(page, lambda: "stored: {'margin': 3.0, 'closest': 0.3, 'wins': 0.03}" in form.inner_text())
        form.screenshot(path=SHOTS/"lesson_09_form.png")
        for cell in ("1ead3e5d", "sect0901"): run_cell(page, cell) # policy, teacher
        small = "SweepConfig = lambda config=SweepConfig, **kw: config(**kw | {'n_pairs': 16, 'kl_prompts': 8})"
        assert python(page, f"{small}; judging = replace(judging, n=8)") == ""
        run_cell(page, "514aa375")
        score = run_cell(page, "da88a605").splitlines()
        assert re.search(r"largest reward margin +predicted 3 +found 3 +right$", score[0]), score
        assert "predicted 0.3" in score[1] and "predicted 0.03" in score[2] and "not scored" not in "".join(score)
        button.click()
        wait(page, lambda: "this sweep has run; what is said now is no prediction" in form.inner_text())


def test_a_prediction_is_stored_by_a_click_until_its_outcome_is_seen(lab):
    write_notebook(lab.tree/"nbs/show/asked.ipynb",
                   "from wikidpo.show.predict import ask, outcome, predictions\n"
                   "ask('00-cold', 'Which answers are the best?', ['cold', 'warm'])")
    with lab.open("nbs/show/asked.ipynb") as page:
        assert python(page, "import os; os.environ['WIKIDPO_PREDICTIONS'] = 'asked.json'") == ""
        run_all(page, 1)
        w = widget(page, "Prediction")
        assert "Choose before you read on." in w.inner_text()
        w.get_by_label("warm").check()
        wait(page, lambda: "Stored: warm." in w.inner_text())
        assert python(page, "print(predictions()['00-cold']['answer'])") == "warm"
        w.get_by_label("cold").check()
        wait(page, lambda: "Stored: cold." in w.inner_text())
        shoot(page, w, "predict")
        assert python(page, "outcome('00-cold', 'warm')") == "Measured: warm; you predicted: cold."
        w.get_by_label("warm").click() # and it jumps back
        wait(page, lambda: "the outcome has been seen" in w.inner_text())
        assert python(page, "print(predictions()['00-cold']['answer'])") == "cold"
