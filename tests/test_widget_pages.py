"""The widgets in a real Chromium, without Jupyter: their files in a page of their own, as narrow as a phone's, in the
colours of front ends that cannot be run here. A page with 20 lines of a model stands in for the front end.

SCREENSHOTS (default runs/browser) is where the pictures go: look at them after changing style.css.
"""
import json
from contextlib import contextmanager

import numpy as np
import pytest
from test_browser import CHROMIUM, OFFLINE, pytestmark, SHOTS # noqa: F401 the marks are this file's too

from runfolder import make_run, verdicts, write_jsonl
from wikidpo.core.files import read_jsonl
from wikidpo.show.beta import BetaSlider
from wikidpo.show.inspector import PairInspector
from wikidpo.show.player import RunPlayer
from wikidpo.show.predict import ask
from wikidpo.show.run import load_run
from wikidpo.show.tokens import TokenView
from wikidpo.show.vote import BlindVote
from wikidpo.show.widgets import module, STATIC
from wikidpo.world.facts import DATA

SMALLEST = 9.5 # CSS pixels of the smallest text
NAMES = ["beta", "inspector", "tokens", "player", "vote", "predict"]
PAGE = """<!doctype html><html {html}><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>{css}</style><body style="margin: 0; background: {paper}" {body}><div id="here"></div></body></html>"""
SHOW = """async ([source, state]) => {
    const {default: widget} = await import(URL.createObjectURL(new Blob([source], {type: 'text/javascript'})));
    const heard = {}, tell = name => { for (const f of heard[name] ?? []) f(); };
    const model = {
        get: name => state[name],
        set: (name, value) => { state[name] = value; tell(`change:${name}`); },
        on: (names, f) => { for (const name of names.split(' ')) (heard[name] ??= []).push(f); },
        off: () => {}, save_changes: () => {}, send: () => {},
    };
    widget.render({model, el: document.getElementById('here')});
}"""
TEXTS = """() => { // [text, its height in CSS pixels as drawn, whether all of it is inside the widget]
    const frame = document.querySelector('.wikidpo').getBoundingClientRect(), found = [];
    for (const e of document.querySelectorAll('.wikidpo *')) {
        const text = [...e.childNodes].filter(n => n.nodeType == 3).map(n => n.data).join('').trim();
        const box = e.getBoundingClientRect();
        if (!text || !box.width || !e.checkVisibility({visibilityProperty: true})) continue;
        const scale = e instanceof SVGGraphicsElement ? e.getScreenCTM().a : 1;
        const inside = box.left >= frame.left - .5 && box.right <= frame.right + .5 && box.bottom <= frame.bottom + .5;
        found.push([text, scale * parseFloat(getComputedStyle(e).fontSize), inside]);
    }
    return found;
}"""


class Told(TokenView):
    "A token view whose rewards nobody has to compute"
    def _compute(self, name, i):
        words = "The capital of France is Paris , and its people speak French .".split()
        rewards = np.random.default_rng(i).normal(0, .4, len(words)).tolist()
        side = {"tokens": [f" {w}" for w in words], "rewards": rewards}
        return {"prompt": "What is the capital of France?", "chosen": side, "rejected": side}


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    "{name: what the browser would get of a widget}"
    tmp = tmp_path_factory.mktemp("widgets")
    path, rng, speeds = make_run(tmp/"run"), np.random.default_rng(0), np.arange(-3, 12) / 20 # nats a step
    write_jsonl(path/"margins.jsonl", [{"step": s, "z": (s * speeds).tolist()} for s in (0, 40, 80, 120)])
    made = {"beta": BetaSlider(rng.normal(8, 12, 2000)),
            "inspector": PairInspector(read_jsonl(DATA/"pairs.jsonl")[:300]),
            "tokens": Told([{}], None, {"after training": None}), "player": RunPlayer(load_run(path), step=100),
            "vote": BlindVote(verdicts(40), tmp/"votes.jsonl"),
            "predict": ask("00-page", "Which of the two?", ["the longer answer", "the shorter answer"])}
    def state(w): return {k: v for k, v in w.get_state().items() if k[0] != "_" and k != "layout"}
    # bytes would not become JSON: nothing here is lost where buffers are
    return {name: json.loads(json.dumps(state(w))) for name, w in made.items()}


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        yield browser
        browser.close()


@contextmanager
def shown(chromium, name, state, width=390, **page):
    "The widget in a page of this width; an error in the console fails"
    tab, wrong = chromium.new_page(viewport={"width": width, "height": 1000}), []
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    css = page.pop("more", "") + (STATIC/"style.css").read_text(encoding="utf-8")
    tab.set_content(PAGE.format(css=css, **{"html": "", "body": "", "paper": "#fff"} | page))
    tab.evaluate(SHOW, [module(name), state])
    yield tab
    tab.close()
    assert not wrong, wrong


@pytest.mark.parametrize("name", NAMES)
def test_text_is_readable_on_a_phone(chromium, states, name):
    "No text is smaller than SMALLEST, and none sticks out, down to the narrowest phone"
    for width in (360, 390, 520, 1280):
        with shown(chromium, name, states[name], width) as tab:
            texts = tab.evaluate(TEXTS)
            tab.locator(".wikidpo").screenshot(path=SHOTS/f"page_{name}_{width}.png")
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert len(texts) > 3 and [t for t in texts if t[1] < SMALLEST or not t[2]] == [], width


# What the pages of other front ends say of their colours; as Chromium computes them, paper, ink and the blue of data
VSCODE = ":root { --vscode-editor-background: #1e1e1e; --vscode-editor-foreground: #d4d4d4; }"
VSCODE_LIGHT = ":root { --vscode-editor-background: #fffffe; --vscode-editor-foreground: #3b3b3b; }"
DARK_BLUE, BLUE = "rgb(86, 180, 233)", "rgb(0, 114, 178)"
FRONT_ENDS = {
    "vscode dark": (dict(body='class="vscode-dark"', more=VSCODE), "rgb(30, 30, 30)", "rgb(212, 212, 212)", DARK_BLUE),
    "vscode light": (
        dict(body='class="vscode-light"', more=VSCODE_LIGHT), "rgb(255, 255, 254)", "rgb(59, 59, 59)", BLUE),
    "vscode high contrast light": (
        dict(body='class="vscode-high-contrast-light vscode-high-contrast"', more=VSCODE_LIGHT),
        "rgb(255, 255, 254)", "rgb(59, 59, 59)", BLUE),
    "colab dark": (dict(html='theme="dark"'), "rgb(31, 31, 31)", "rgb(227, 227, 227)", DARK_BLUE),
    "none": ({}, "rgb(255, 255, 255)", "rgb(34, 34, 34)", BLUE),
}


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_colours_are_those_of_the_front_end(chromium, states, front):
    page, *wanted = FRONT_ENDS[front]
    with shown(chromium, "beta", states["beta"], 800, **page) as tab:
        got = tab.evaluate("""() => {
            const {backgroundColor, color} = getComputedStyle(document.querySelector('.wikidpo'));
            return [backgroundColor, color, getComputedStyle(document.querySelector('.wikidpo .line.blue')).stroke];
        }""")
        tab.locator(".wikidpo").screenshot(path=SHOTS/f"page_{front.replace(' ', '_')}.png")
    assert got == wanted
