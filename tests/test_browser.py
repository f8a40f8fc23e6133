"""The widgets and the lessons in a real JupyterLab, driven by a real Chromium without a screen. Skipped only where there is no Chromium.

SCREENSHOTS (default runs/browser) is where the pictures go: look at them after changing a widget. timings.json there says how long actions took.
"""
import json, math, os, re, shutil, socket, subprocess, sys, time, urllib.request
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
OFFLINE = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-gpu"]
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no chromium")]

HOSTILE = ["<script>window.hacked = 1</script>", '<img src=x onerror="window.hacked = 2">', '<a href="javascript:window.hacked = 3">click</a>',
           "\x1b[31mred\x1b[0m\x07", "\u202eright to left\u202c \u200b\u2066isolated", "</textarea></script><svg onload=window.hacked=4>", "x" * 100_000, "long " * 20_000]


class Lab:
    "A JupyterLab of its own, on a copy of the tree, and a browser; `open` gives a page with a notebook in it"
    def __init__(self, tmp):
        from playwright.sync_api import sync_playwright
        self.tree = copy_tree(ROOT, tmp/"tree")
        settings = tmp/"settings"
        for plugin, values in {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}, "apputils-extension/themes": {"theme": "JupyterLab Light"}}.items():
            (file := settings/f"@jupyterlab/{plugin}.jupyterlab-settings").parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
        env = os.environ | {"PYTHONPATH": str(self.tree), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "JUPYTERLAB_SETTINGS_DIR": str(settings),
            "JUPYTERLAB_WORKSPACES_DIR": str(tmp/"workspaces"), "JUPYTER_CONFIG_DIR": str(tmp/"config"), "JUPYTER_RUNTIME_DIR": str(tmp/"runtime"), "JUPYTER_DATA_DIR": str(tmp/"data"),
            "IPYTHONDIR": str(tmp/"ipython"), "TQDM_DISABLE": "1", "WANDB_MODE": "offline", "WANDB_DIR": str(tmp)}
        env.pop("MPLBACKEND", None) # the kernel picks the inline one
        self.log = open(tmp/"lab.log", "w")
        self.server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
            f"--ServerApp.root_dir={self.tree}", "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"], env=env, cwd=self.tree, stdout=self.log, stderr=self.log)
        self.url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try: urllib.request.urlopen(f"{self.url}/api"); break
            except OSError: time.sleep(.25)
            assert self.server.poll() is None, Path(self.log.name).read_text()
        self.playwright = sync_playwright().start()
        self.browser = self.playwright.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)

    def close(self):
        self.browser.close(); self.playwright.stop()
        self.server.terminate(); self.server.wait(20)
        self.log.close()

    @contextmanager
    def open(self, notebook):
        "A page on the notebook, 1024 pixels wide; fails if a script fails or anything is fetched from elsewhere"
        context = self.browser.new_context(viewport={"width": 1024, "height": 900})
        page, wrong = context.new_page(), []
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((self.url, self.url.replace("http", "ws"), "data:", "blob:")) else None)
        page.goto(f"{self.url}/lab/workspaces/{Path(notebook).stem}/tree/{notebook}?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_function("jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'", timeout=60_000)
        page.evaluate("jupyterapp.shell.collapseLeft()")
        try:
            yield page
            assert not wrong, wrong
        finally:
            page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
            context.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    SHOTS.mkdir(parents=True, exist_ok=True)
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


def run_all(page, expect_widgets=0):
    "Run all cells; no error, and no widget that is still loading"
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    nb = page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON()")
    errors = [re.sub(r"\x1b\[[\d;]*m", "", "\n".join(o["traceback"])) for c in nb["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert not errors, errors[0]
    assert all(c["execution_count"] for c in nb["cells"] if c["cell_type"] == "code" and re.sub("(?m)^#.*$", "", "".join(c["source"])).strip())
    views = sum("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", []))
    page.wait_for_function("n => document.querySelectorAll('.wikidpo').length >= n", arg=views, timeout=20_000)
    assert views >= expect_widgets
    text = page.evaluate("document.querySelector('.jp-Notebook').textContent")
    assert "Loading widget" not in text and "Error displaying widget" not in text and "Javascript Error" not in text
    return nb


def python(page, code):
    "Run code in the page's kernel; what it prints"
    return page.evaluate("""async code => {
        const future = jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code}); let out = '';
        future.onIOPub = m => { if (m.header.msg_type == 'stream') out += m.content.text; if (m.header.msg_type == 'error') out += m.content.evalue; };
        await future.done; return out.trim(); }""", code)


def widget(page, label): return page.get_by_role("region", name=label)
def readout(w, name): return w.locator(f"[data-readout={name}]").inner_text()
def wait(page, condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        page.wait_for_timeout(20)


def note(name, value):
    "Add a time (ms) to timings.json"
    file = SHOTS/"timings.json"
    times = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(times | {name: round(value, 1)}, indent=1, sort_keys=True) + "\n")


def shoot(page, w, name):
    "The widget in the light and in the dark theme, and nothing of it sticks out of its frame"
    for theme in ("Dark", "Light"):
        page.evaluate("t => jupyterapp.commands.execute('apputils:change-theme', {theme: `JupyterLab ${t}`})", theme)
        page.wait_for_function("t => document.body.dataset.jpThemeName == `JupyterLab ${t}`", arg=theme)
        page.wait_for_timeout(300)
        w.screenshot(path=SHOTS/f"{name}_{theme.lower()}.png")
    assert w.evaluate("e => e.scrollWidth <= e.clientWidth + 1 && e.getBoundingClientRect().right <= innerWidth")


@pytest.fixture(scope="module")
def room(lab):
    "The notebook of the widgets, all cells run"
    with lab.open("nbs/appendix/widgets.ipynb") as page:
        run_all(page, 5)
        yield page


def test_twins_hide_behind_live_widgets(room):
    assert room.locator(".wikidpo").count() == 5
    assert room.locator(".jp-OutputArea-child:has(.wikidpo) + .jp-OutputArea-child img").count() == 5
    assert not any(i.is_visible() for i in room.locator(".jp-OutputArea-child:has(.wikidpo) + .jp-OutputArea-child img").all())


def test_twins_show_without_a_kernel(lab):
    shutil.copy(lab.tree/"nbs/appendix/widgets.ipynb", lab.tree/"nbs/appendix/unrun.ipynb") # the same path would share the kernel
    with lab.open("nbs/appendix/unrun.ipynb") as page:
        widths = page.evaluate("""async () => { const nb = jupyterapp.shell.currentWidget.content, widths = [];
            for (const cell of nb.widgets) { await nb.scrollToCell(cell); await new Promise(r => setTimeout(r, 50));
                for (const image of cell.node.querySelectorAll('.jp-OutputArea-output img')) { await image.decode(); widths.push(image.getBoundingClientRect().width); } }
            return widths; }""")
        assert len(widths) == 5 and min(widths) > 300
        assert page.locator(".wikidpo").count() == 0 and "widget..." not in page.evaluate("document.querySelector('.jp-Notebook').textContent")


def test_beta_slider(room):
    w = widget(room, "The loss and the leash: beta slider")
    w.scroll_into_view_if_needed()
    python(room, "slider.beta = .1")
    wait(room, lambda: readout(w, "beta") == "0.1")
    curve, before = w.locator("path.line").first, w.locator("path.line").first.get_attribute("d")
    slider = w.get_by_label("beta", exact=True)
    slider.evaluate("""e => { window.frames_ms = []; e.addEventListener('input', ev => requestAnimationFrame(() => {
        const c = new MessageChannel(); c.port1.onmessage = () => frames_ms.push(performance.now() - ev.timeStamp); c.port2.postMessage(0); })); }""")
    box = slider.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    room.mouse.move(x, y); room.mouse.down()
    for i in range(60): room.mouse.move(x + i * box["width"] / 140, y); room.wait_for_timeout(16)
    assert readout(w, "beta") != "0.1" and curve.get_attribute("d") != before # under the finger, before it is lifted
    room.mouse.up()
    frames = room.evaluate("frames_ms")
    note("beta: input to painted, median", median(frames)); note("beta: input to painted, slowest", max(frames))
    assert len(frames) > 20
    script = slider.evaluate("""e => { const ts = []; for (let i = 0; i < 100; i++) { e.value = -2 + i / 50; const t = performance.now(); e.dispatchEvent(new Event('input'));
        document.querySelector('.wikidpo svg').getBoundingClientRect(); ts.push(performance.now() - t); } return ts.sort((a, b) => a - b); }""")
    note("beta: redraw of 10,000 pairs, median", script[50])
    assert script[50] < 16
    slider.evaluate("e => e.dispatchEvent(new Event('change'))")
    wait(room, lambda: math.isclose(float(python(room, "print(slider.beta)")), float(readout(w, "beta"))))
    summary = json.loads(python(room, "import json; print(json.dumps(slider.summary))"))
    assert readout(w, "retired") == f"{summary['retired']:,} of 10,000" and readout(w, "mean") == f"{summary['mean']:.3f}"

    python(room, "slider.beta, slider.kind = .05, 'hinge'")                       # set from Python
    wait(room, lambda: readout(w, "beta") == "0.05" and w.get_by_label("hinge").is_checked())
    for name in ("DPO", "cDPO", "IPO", "hinge"): # from the hinge
        was = curve.get_attribute("d")
        w.get_by_label(name, exact=True).check()
        wait(room, lambda: curve.get_attribute("d") != was)
        wait(room, lambda: python(room, "print(slider.kind, slider.smoothing > 0)") == {"DPO": "dpo False", "cDPO": "dpo True", "IPO": "ipo False", "hinge": "hinge False"}[name])
        summary = json.loads(python(room, "print(json.dumps(slider.summary))"))
        assert readout(w, "retired") == f"{summary['retired']:,} of 10,000"
    w.get_by_label("cDPO", exact=True).check()
    assert w.get_by_label("smoothing").is_visible()
    shoot(room, w, "beta_cdpo")
    w.get_by_label("DPO", exact=True).check()
    slider.focus()
    before = readout(w, "beta")
    room.keyboard.press("ArrowRight")
    assert float(readout(w, "beta")) > float(before) and "pairs retired" in slider.get_attribute("aria-valuetext")
    python(room, "slider.beta = .2")
    wait(room, lambda: readout(w, "beta") == "0.2")
    shoot(room, w, "beta")


def test_formulas_in_the_browser(room):
    "The same reference values that test_widgets.py holds against Python"
    from test_widgets import reference
    got = room.evaluate("""async ([source, rows]) => { const m = await import(URL.createObjectURL(new Blob([source], {type: 'text/javascript'})));
        return rows.map(([kind, z, beta, eps]) => [m.loss(z, beta, kind, eps), m.slope(z, beta, kind, eps), m.weight(z, beta, kind, eps)]); }""",
        [(ROOT/"wikidpo"/"static"/"losses.js").read_text(), [r[:4] for r in reference()]])
    for (kind, z, beta, eps, *want), values in zip(reference(), got):
        assert values == pytest.approx(want, rel=1e-12, abs=1e-15), (kind, z, beta, eps)


def test_pair_inspector(room):
    w = widget(room, "Pair inspector")
    w.scroll_into_view_if_needed()
    python(room, "inspector.query, inspector.limits, inspector.order = '', {}, 'as mined'")
    wait(room, lambda: readout(w, "kept").startswith("1,353 of 1,353"))
    w.get_by_label("search").fill("capital")
    wait(room, lambda: not readout(w, "kept").startswith("1,353"))
    n = int(python(room, "print(sum('capital' in t for t in inspector.texts))"))
    assert readout(w, "kept").startswith(f"{n} of 1,353")
    w.get_by_label("gap", exact=True).focus()
    for _ in range(6): room.keyboard.press("ArrowRight")
    wait(room, lambda: python(room, "print(inspector.limits)") == "{'gap': [6, None]}")
    n = int(python(room, "print(sum('capital' in t and g >= 6 for t, g in zip(inspector.texts, inspector.cols['gap'])))"))
    wait(room, lambda: readout(w, "kept").startswith(f"{n} of 1,353"))
    w.get_by_label("sort by").select_option("longer, but worse")
    wait(room, lambda: python(room, "print(inspector.order)") == "longer, but worse")
    first = w.locator("[data-side=chosen]").inner_text()
    w.get_by_role("grid").focus()
    room.keyboard.press("ArrowDown")
    wait(room, lambda: readout(w, "position") == f"2 of {n}")
    room.keyboard.press("End")
    wait(room, lambda: readout(w, "position") == f"{n} of {n}")
    room.keyboard.press("k")
    wait(room, lambda: readout(w, "position") == f"{n - 1} of {n}")
    assert w.locator("[data-side=chosen]").inner_text() != first and w.locator("mark").count()
    w.get_by_text("more filters").click()
    w.get_by_label("chosen temperature, at most").fill("0.8")
    wait(room, lambda: "temp_chosen" in python(room, "print(inspector.limits)"))
    kept = python(room, "print(len(inspector.selection))")
    assert 0 < int(kept) < n
    python(room, "from pathlib import Path; import tempfile; inspector.out = Path(tempfile.mkdtemp())/'kept.jsonl'")
    w.get_by_role("button", name="export").click()
    wait(room, lambda: w.locator("[role=status]").inner_text() == f"{kept} pairs written to kept.jsonl")
    assert python(room, "print(len(read_jsonl(inspector.out)))") == kept
    w.get_by_label("search").fill("no pair says this")
    wait(room, lambda: readout(w, "position") == "no pair passes these filters")
    python(room, "inspector.position = 5")
    wait(room, lambda: w.get_by_role("alert").is_visible())                        # an error in a callback is seen in the widget
    assert "position 5: there are 0 pairs" in w.get_by_role("alert").inner_text()
    w.get_by_text("more filters").click()
    python(room, "inspector.query, inspector.limits, inspector.order, inspector.position = '', {'gap': [3, None]}, 'as mined', 11")
    wait(room, lambda: readout(w, "position").startswith("12 of") and not w.get_by_role("alert").is_visible())
    shoot(room, w, "inspector")


def test_token_view(room):
    w = widget(room, "Token view")
    w.scroll_into_view_if_needed()
    python(room, "view.checkpoint, view.position = 'after 5 steps', 0")
    wait(room, lambda: w.get_by_label("pair", exact=True).input_value() == "1")
    before = readout(w, "margin")
    w.get_by_role("button", name="next").click()
    wait(room, lambda: readout(w, "margin") != before)
    sums = json.loads(python(room, "print(json.dumps({s: sum(view.data[s]['rewards']) for s in ('chosen', 'rejected')}))"))
    for side, total in sums.items(): assert float(readout(w, side).replace("−", "-")) == pytest.approx(total, abs=6e-4)
    shown = [float(t.replace("−", "-")) for t in w.locator("[data-side=rejected] small").all_inner_texts()]
    assert sum(shown) == pytest.approx(sums["rejected"], abs=.005 * len(shown)) and any(shown)
    shoot(room, w, "tokens")
    w.get_by_label("checkpoint").select_option("reference")
    wait(room, lambda: readout(w, "margin") == "0.000")
    python(room, "view.position = 10**6")
    wait(room, lambda: "pair 1000001: there are 1353" in w.get_by_role("alert").inner_text())


def test_run_player(room):
    w = widget(room, "Run player")
    w.scroll_into_view_if_needed()
    python(room, "player.step = 1")
    wait(room, lambda: readout(w, "step") == "1 of 60")
    dots = lambda: [float(x) for x in w.locator("circle").evaluate_all("cs => cs.map(c => c.getAttribute('cx'))")]
    start, slider = dots(), w.get_by_label("step", exact=True)
    assert max(start) - min(start) < 20 and readout(w, "retired") == "0 of 40"      # all pairs begin near z = 0
    slider.focus()
    for _ in range(29): room.keyboard.press("ArrowRight")
    assert readout(w, "step") == "30 of 60"
    middle = dots()
    assert max(middle) - min(middle) > 100
    shoot(room, w, "player")
    took = slider.evaluate("""e => { const ts = []; for (let i = 59; i >= 0; i--) { e.value = i; const t = performance.now(); e.dispatchEvent(new Event('input'));
        document.querySelector('.wikidpo svg').getBoundingClientRect(); ts.push(performance.now() - t); } return ts.sort((a, b) => a - b); }""")
    note("player: redraw, median", took[30])
    slider.focus(); room.keyboard.press("End")
    wait(room, lambda: python(room, "print(player.step)") == "60")                  # Python hears where it stopped
    retired = int(python(room, "print(int((weight(player.z[-1], .1).abs() < RETIRED).sum()))"))
    assert readout(w, "retired") == f"{retired} of 40" and retired > 10
    assert w.locator("circle.retired").count() == retired
    w.get_by_role("button", name="play").click()
    wait(room, lambda: 1 < int(readout(w, "step").split()[0]) < 60)
    w.get_by_role("button", name="pause").click()


def test_blind_vote(room):
    python(room, "import tempfile; from pathlib import Path; vote.path = Path(tempfile.mkdtemp())/'votes.jsonl'; vote.votes = {}; vote._next()")
    w = widget(room, "Blind vote")
    w.scroll_into_view_if_needed()
    wait(room, lambda: readout(w, "votes") == "0 votes")
    text = w.inner_text()
    assert "DPO" not in text and "SFT" not in text and "after 10 more" in text      # blind
    w.focus()
    cells = room.locator(".jp-Cell").count()
    for i, key in enumerate(["1", "2", "0", "ArrowLeft", "ArrowRight", "ArrowDown", "1", "2", "1"], 1):
        question = w.locator("[data-side=first]").inner_text()
        room.keyboard.press(key)
        wait(room, lambda: readout(w, "votes") == (f"{i} votes" if i > 1 else "1 vote"))
        assert w.locator("[data-side=first]").inner_text() != question
    assert "kappa" not in w.inner_text()
    room.keyboard.press("a"); room.keyboard.press("d"); room.keyboard.press("d")    # Lab's shortcuts rest
    assert room.locator(".jp-Cell").count() == cells
    shoot(room, w, "vote_blind")
    w.get_by_role("button", name="left is better").click()
    wait(room, lambda: "Cohen's kappa" in readout(w, "kappa"))
    votes = json.loads(python(room, "import json; print(json.dumps([v for v in read_jsonl(vote.path)]))"))
    assert len(votes) == 10 and [v["vote"] for v in votes][2] == "tie"
    first = {"a": "b", "b": "a"}
    assert votes[0]["vote"] == votes[0]["shown_first"] and votes[1]["vote"] == first[votes[1]["shown_first"]]
    value = json.loads(python(room, "print(json.dumps(vote.result['kappa']))"))
    assert f"kappa {value:.2f}".replace("-", "−") in readout(w, "kappa")
    shoot(room, w, "vote")


@pytest.fixture(scope="module")
def attack(lab):
    "A notebook whose pairs, answers, checkpoints and errors are hostile, and large"
    cells = ["import time, random, ipywidgets; from wikidpo.widgets import *; from wikidpo.widgets import LabWidget", f"bad = {HOSTILE!r}",
        "pairs = [{'prompt': t, 'chosen': t, 'rejected': 'plain ' + t, 'score_chosen': 9, 'score_rejected': 2, 'temp_chosen': .7, 'temp_rejected': 1.3} for t in bad]",
        "inspector = PairInspector(pairs)\ninspector",
        "vote = BlindVote([{'prompt_id': i, 'prompt': t, 'a': t, 'b': 'plain ' + t, 'result': 'a'} for i, t in enumerate(bad)], 'votes.jsonl', names=(bad[1], bad[0]))\nvote",
        "class Fake(TokenView):\n    def _compute(self, name, i): return {'prompt': bad[i], **{s: {'tokens': [bad[i], ' end'], 'rewards': [.5, -.1]} for s in ('chosen', 'rejected')}}\n"
        "tokens = Fake(bad, None, {bad[0]: None, bad[1]: None})\ntokens",
        "words = [f'word{i}' for i in range(3000)]\nrandom.seed(0)\n"
        "many = [{'prompt': ' '.join(random.choices(words, k=12)), 'chosen': ' '.join(random.choices(words, k=40)), 'rejected': ' '.join(random.choices(words, k=60)), 'score_chosen': random.randint(4, 10), "
        "'score_rejected': random.randint(1, 5), 'temp_chosen': random.choice((.7, .9)), 'temp_rejected': random.choice((1.1, 1.3))} for _ in range(10_000)]\n"
        "t = time.perf_counter(); big = PairInspector(many); opened = time.perf_counter() - t\nbig",
        "again = BetaSlider([random.gauss(5, 9) for _ in range(10_000)])\nagain"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(nb, lab.tree/"attack.ipynb")
    with lab.open("attack.ipynb") as page:
        run_all(page, 5)
        yield page


def test_hostile_text_is_only_text(attack):
    "Nothing of it runs, nothing of it becomes an element, and nothing of it leaves its box"
    inspector, vote, tokens = attack.get_by_role("region", name="Pair inspector").first, widget(attack, "Blind vote"), widget(attack, "Token view")
    for i, text in enumerate(HOSTILE):
        python(attack, f"inspector.position = {i}; tokens.position = {i}; tokens.checkpoint = bad[{i % 2}]")
        wait(attack, lambda: inspector.locator("[data-readout=position]").inner_text() == f"{i + 1} of {len(HOSTILE)}")
        shown = inspector.locator("[data-side=chosen]").evaluate("e => e.textContent")
        assert not re.search("[\x00-\x08\x0b-\x1f\u200b\u202a-\u202e\u2066-\u2069]", shown)
        if text.isprintable(): assert shown == text
        wait(attack, lambda: tokens.locator("[data-side=chosen] b").first.evaluate("e => e.textContent.length") == len(shown))
        for w in (inspector, vote, tokens):
            assert w.locator("script, img, a, iframe, [onerror], [onload]").count() == 0
            assert w.evaluate("e => e.scrollWidth <= e.clientWidth + 1 && e.getBoundingClientRect().height < 1600"), (i, text[:40])
        vote.focus(); attack.keyboard.press("1")
        wait(attack, lambda: vote.locator("[data-readout=votes]").inner_text().startswith(str(i + 1)))
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
    "Whether it crashed, was restarted or was shut down: the widget says so, once, and works again when its cell is run again"
    name = f"gone_{end.split()[0]}.ipynb"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("from wikidpo.widgets import BetaSlider\nBetaSlider([-3., 1., 8.])")], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(nb, lab.tree/name)
    with lab.open(name) as page:
        run_all(page, 1)
        note_ = page.get_by_text("The kernel has stopped.")
        assert note_.count() == 0
        session = "jupyterapp.shell.currentWidget.sessionContext"
        if end == "restart": page.evaluate(f"{session}.session.kernel.restart()")
        elif end == "shut down": page.evaluate(f"{session}.shutdown()")
        else: page.evaluate(f"code => {{ {session}.session.kernel.requestExecute({{code}}); }}", end)
        wait(page, lambda: note_.count() == 1, 30)
        if end.startswith("import"): page.wait_for_function(f"{session}.session?.kernel?.status == 'idle'", timeout=60_000) # the server starts another one
        if end == "restart":
            page.locator(".wikidpo").screenshot(path=SHOTS/"kernel_gone.png")
            run_all(page, 1)
            wait(page, lambda: note_.count() == 0)


def test_ten_thousand_pairs(attack):
    w = attack.get_by_role("region", name="Pair inspector").nth(1)
    w.scroll_into_view_if_needed()
    note("inspector: 10,000 pairs opened", 1000 * float(python(attack, "print(opened)")))
    took = []
    for name, act, where in [("search", lambda: w.get_by_label("search").fill("word17"), ".list tbody"), ("sort", lambda: w.get_by_label("sort by").select_option("nearly the same text"), ".list tbody"),
                             ("gap", lambda: w.get_by_label("gap", exact=True).fill("4"), ".list tbody"), ("best", lambda: w.get_by_label("best", exact=True).fill("8"), ".list tbody"),
                             ("clear", lambda: w.get_by_label("search").fill(""), ".list tbody"), ("next", lambda: w.get_by_role("button", name="next").click(), "[data-side=chosen]")]:
        w.evaluate("""(e, where) => { window.seen = null; let from; for (const k of ['input', 'change', 'click']) e.addEventListener(k, () => { from = performance.now(); }, {once: true, capture: true});
            const o = new MutationObserver(() => { o.disconnect(); window.seen = performance.now() - from; }); o.observe(e.querySelector(where), {childList: true}); }""", where)
        act()
        attack.wait_for_function("window.seen !== null")
        took.append(attack.evaluate("window.seen"))
        note(f"inspector: 10,000 pairs, {name}", took[-1])
    assert median(took) < 100


def test_running_a_cell_again_leaks_nothing(attack):
    count = "from ipywidgets.widgets.widget import _instances; print(len(_instances))"
    figures = "import matplotlib.pyplot as plt; print(len(plt.get_fignums()))"
    before = python(attack, count)
    models = attack.evaluate("document.querySelectorAll('.wikidpo').length")
    attack.evaluate("""async () => { const nb = jupyterapp.shell.currentWidget.content; nb.activeCellIndex = nb.widgets.length - 1;
        for (let i = 0; i < 50; i++) await jupyterapp.commands.execute('notebook:run-cell'); }""")
    attack.wait_for_timeout(500)
    assert python(attack, count) == before and python(attack, figures) == "0"
    assert attack.evaluate("document.querySelectorAll('.wikidpo').length") == models


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: Path(p).stem)
def test_lesson_runs_in_the_browser(lab, lesson):
    with lab.open(lesson) as page:
        start = time.monotonic()
        run_all(page)
        note(f"lesson {Path(lesson).stem}", 1000 * (time.monotonic() - start))
        for i, w in enumerate(page.locator(".wikidpo").all()):
            w.scroll_into_view_if_needed()
            if (step := w.get_by_label("step", exact=True)).count(): step.fill("9")
            w.screenshot(path=SHOTS/f"lesson_{Path(lesson).stem[:2]}_{i}.png")
