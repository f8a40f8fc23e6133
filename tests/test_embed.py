"""Widgets without a kernel: one page from disk, in a real browser, that says what Python says.

Any error in the console and any request to a host fails the test. Pictures go where SCREENSHOTS says, if it does."""
import copy, json, os
from pathlib import Path

import pytest
import torch

from runfolder import make_run, samples, verdicts, write_jsonl
from test_browser import CHROMIUM
from wikidpo.core.chat import load_tokenizer
from wikidpo.core.data import PairDataset
from wikidpo.core.files import read_jsonl
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.show.beta import BetaSlider, has_retired
from wikidpo.show.embed import embedded, page_head, page_state
from wikidpo.show.inspector import ORDERS, PairInspector
from wikidpo.show.player import RunPlayer
from wikidpo.show.predict import ask
from wikidpo.show.report import report
from wikidpo.show.run import load_run
from wikidpo.show.tokens import TokenView
from wikidpo.show.vote import BlindVote
from wikidpo.world.facts import DATA

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no chromium")]
HOSTILE = {"prompt": "</script><script>window.hacked = 1</script>", "rejected": "<!--<script>\u2028\u202e &lt;b&gt;",
           "chosen": "<img src=x onerror='window.hacked = 2'> </script>", "score_chosen": 9, "score_rejected": 2.5,
           "temp_chosen": .7, "temp_rejected": 1.0, "turns": [["<b>İ</b>?", "ß \U0001f600"]]}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    "`opened(path)`: the page, from disk; at the end nothing may have gone wrong in it, nor been asked of a host"
    wrong, contexts = [], []
    def watch(page):
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("request", lambda r: None if r.url.startswith(("file:", "blob:", "data:")) else wrong.append(r.url))
        return page
    def opened(path, **how):
        contexts.append(browser.new_context(**{"viewport": {"width": 1000, "height": 900}} | how))
        page = watch(contexts[-1].new_page())
        page.goto(path.as_uri())
        return page
    yield opened
    for context in contexts: context.close()
    assert not wrong, wrong


def write_page(path, *widgets, theme=""):
    "A page as the book or the report makes it"
    places = "\n".join(map(embedded, widgets))
    path.write_text(f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
                    f'<title>all</title>{page_head()}<body {theme}>{places}</body>', encoding="utf-8")
    return path


def alive(page, n):
    page.wait_for_function("n => [...document.querySelectorAll('.wikidpo-page')].filter(p => p.model).length == n",
                           arg=n)


SET = """([i, values]) => {
    const model = document.querySelectorAll('.wikidpo-page')[i].model;
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
}"""
STATE = """i => {
    const { state } = document.querySelectorAll('.wikidpo-page')[i].model;
    return Object.fromEntries(Object.entries(state).filter(([, value]) => !(value instanceof DataView)));
}"""


def says(widget):
    "The state of a Python widget, as JSON brings it"
    plain = {name: value for name, value in page_state(widget).items() if not isinstance(value, bytes)}
    return json.loads(json.dumps(plain))


class Both:
    "A widget in Python and its copy in the page"
    def __init__(self, page, i, widget):
        self.page, self.i, self.widget = page, i, widget
        self.place = page.locator(".wikidpo-page").nth(i)
    def set(self, **values):
        self.widget.set_state(values) # what a message from the browser does
        self.page.evaluate(SET, [self.i, values])
        return self
    def state(self): return self.page.evaluate(STATE, self.i)
    def agree(self): assert self.state() == says(self.widget)
    def readout(self, name): return self.place.locator(f"[data-readout={name}]").inner_text()


BETAS = [(.01, "dpo", 0), (.1, "dpo", 0), (.1, "dpo", .1), (3, "dpo", .49), (.03, "ipo", 0), (.5, "ipo", 0),
         (.05, "hinge", 0), (1, "hinge", 0), (.1, "robust", .1), (.7, "robust", .3), (10, "dpo", 0), (.23, "dpo", .2)]


def check_beta(both):
    for beta, loss_type, eps in BETAS:
        both.set(beta=beta, loss_type=loss_type, label_smoothing=eps).agree()
        summary = both.widget.summary
        assert both.readout("retired") == f"{summary['retired']:,} of {len(both.widget.z):,}"
        assert both.readout("mean").replace("−", "-") == f"{summary['mean']:.3f}"


FILTERS = [{}, {"query": "capital"}, {"query": "nothing has this"}, {"query": ""}, {"position": 9}, {"position": 10**6},
           {"limits": {"gap": [5, None], "temp_chosen": [None, .9]}},
           {"limits": {"longer": [None, -40.5]}, "query": "THE"},
           {"limits": {}, "query": "ß \U0001f600"}, {"query": "</script>"}, {"query": "", "position": 17},
           {"limits": {"score_chosen": [9, 9]}, "order": "both bad"}, {"position": 0}]


def check_inspector(both):
    for values in FILTERS: both.set(**values).agree()
    for order in ORDERS: both.set(order=order, limits={}, query="").agree()
    for limits in ({"gap": [2, None]}, {"chars_chosen": [20, 60]}): both.set(limits=limits).agree()


def check_tokens(both):
    for checkpoint in both.widget.models:
        for position in range(5): both.set(checkpoint=checkpoint, position=position).agree()
    both.set(position=5).agree()
    both.set(position=-1).agree()
    assert "pair 0: there are 5" in both.place.inner_text()
    both.set(position=2).agree()


def check_player(both):
    for step in (1, 2, 3, 17, 30, 40, 59, 80, 99, 110, 119, 120):
        both.set(step=step).agree()
        assert both.readout("step") == f"{step} of 120"
        if step in both.widget.margin_steps:
            z = both.widget.z[both.widget.margin_steps.index(step)]
            assert both.readout("retired") == f"{int(has_retired(z, .1).sum())} of 40"


def check_vote(both):
    "Fourteen votes by hand; the ends of the interval come from other draws"
    both.agree()
    choices = ["first", "second", "tie", "first", "second"] * 2 + ["tie", "first", "second", "first"]
    for i, choice in enumerate(choices):
        both.widget.vote(choice, i)
        both.place.get_by_role("button", name={"first": "1:", "second": "2:", "tie": "0:"}[choice]).click()
        here, there = both.state(), says(both.widget)
        for end in ("low", "high"):
            if end in there["result"]:
                assert here["result"].pop(end) == pytest.approx(there["result"].pop(end), abs=.04)
        assert here == there
    assert "Cohen's kappa" in both.place.inner_text()
    again = "i => document.querySelectorAll('.wikidpo-page')[i].model.send({vote: 'tie', number: 3})"
    both.page.evaluate(again, both.i)
    assert both.state()["result"]["votes"] == 14 # a key pressed twice is no second vote


def check_predict(both):
    for answer in ("cold", "<b>warm</b>", "cold"):
        both.set(answer=answer).agree()
        assert f"Stored: {answer}" in both.place.inner_text()


CHECKS = {"BetaSlider": check_beta, "PairInspector": check_inspector, "TokenView": check_tokens,
          "RunPlayer": check_player, "BlindVote": check_vote, "Prediction": check_predict}


def token_view(tmp):
    tok, ref = load_tokenizer(DATA/"tokenizer.json"), load_checkpoint(DATA/"model.safetensors")
    write_jsonl(tmp/"five.jsonl", read_jsonl(DATA/"pairs.jsonl")[:5])
    policy, generator = copy.deepcopy(ref), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters(): p.add_(.003 * torch.randn(p.shape, generator=generator))
    return TokenView(PairDataset(tmp/"five.jsonl", tok, 256), ref, {"after": policy, "reference": ref})


def all_widgets(tmp):
    "One of each, and inspectors of hostile pairs, of pairs without scores, and of samples"
    run = make_run(tmp/"run")
    speed = torch.linspace(-.2, 1.4, 40)
    write_jsonl(run/"margins.jsonl", [{"step": s, "z": (speed * (s - 1)).tolist()} for s in range(1, 121, 8)])
    shipped = read_jsonl(DATA/"pairs.jsonl")[:150]
    bare = {"prompt": "A capital?", "chosen": "C", "rejected": "R"}
    z = torch.randn(3000, generator=torch.Generator().manual_seed(1)) * 15 + 10
    return [BetaSlider(z), PairInspector([*shipped, HOSTILE], order="longer, but worse"),
            PairInspector([*shipped[:20], bare]), PairInspector(samples()), token_view(tmp), RunPlayer(load_run(run)),
            BlindVote(verdicts(40), tmp/"votes.jsonl"),
            ask("00-cold", "Which <i>are</i> best?", ["cold", "<b>warm</b>"])]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("page")
    os.environ["WIKIDPO_PREDICTIONS"] = str(tmp/"predictions.json")
    widgets = all_widgets(tmp)
    yield widgets, write_page(tmp/"all.html", *widgets)
    del os.environ["WIKIDPO_PREDICTIONS"]


def test_what_a_page_shows_is_what_python_says(everything, opened):
    widgets, file = everything
    page = opened(file)
    alive(page, len(widgets))
    for i, widget in enumerate(widgets): CHECKS[type(widget).__name__](Both(page, i, widget))
    assert page.evaluate("window.hacked") is None and page.locator(".wikidpo img, .wikidpo script").count() == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids)) > 5

    inspector, vote = Both(page, 1, widgets[1]), Both(page, 6, widgets[6])
    with page.expect_download() as saved: inspector.place.get_by_role("button", name="export").click()
    widgets[1].out = file.with_name("live.jsonl")
    widgets[1].export()
    assert read_jsonl(saved.value.path()) == read_jsonl(widgets[1].out)
    with page.expect_download() as saved: vote.place.get_by_role("button", name="download").click()
    assert read_jsonl(saved.value.path()) == read_jsonl(widgets[6].path)
    page.reload()
    alive(page, len(widgets))
    assert vote.state()["question"] == says(widgets[6])["question"]
    vote.place.get_by_role("button", name="start again").click()
    assert vote.state()["result"]["votes"] == 0


LOOKS = {"light": {"color_scheme": "light"}, "dark": {"color_scheme": "dark"},
         "phone": {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}}}


@pytest.mark.parametrize("look", LOOKS)
def test_nothing_sticks_out_and_the_theme_is_followed(everything, opened, look):
    "The system's theme, and furo's switch, which goes before it"
    widgets, file = everything
    page = opened(file, **LOOKS[look])
    alive(page, len(widgets))
    paper = "getComputedStyle(document.querySelector('.wikidpo')).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(31, 31, 31)"
    assert page.evaluate(paper) == (light if look == "light" else dark)
    for theme, color in ("light", light), ("dark", dark):
        page.evaluate("theme => { document.body.dataset.theme = theme; }", theme)
        assert page.evaluate(paper) == color
    page.evaluate("() => { document.body.dataset.theme = 'auto'; }")
    assert page.evaluate(paper) == (light if look == "light" else dark)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if shots := os.environ.get("SCREENSHOTS"):
        for i in range(len(widgets)):
            page.locator(".wikidpo-page").nth(i).screenshot(path=Path(shots)/f"embed_{i}_{look}.png")


def test_without_javascript_the_figures_stand_there(everything, opened):
    page = opened(everything[1], java_script_enabled=False)
    pictures = page.locator(".wikidpo-page img")
    assert pictures.count() == 7 and all(p.is_visible() for p in pictures.all())
    assert page.locator(".wikidpo").count() == 0
    assert "Which <i>are</i> best?" in page.inner_text("body")


def hostile_run(path):
    "A run with margins, 250 pairs, and texts that would like to be a script"
    run = make_run(path)
    write_jsonl(run/"margins.jsonl", [{"step": s, "z": [s/9, -s/30]} for s in range(1, 121, 10)])
    long = {"prompt": "long", "chosen": "x" * 100_000, "rejected": HOSTILE["rejected"]}
    write_jsonl(run/"pairs.jsonl", [HOSTILE, long, *read_jsonl(DATA/"pairs.jsonl")[:248]])
    return run


def test_the_report_lives_and_hostile_text_in_it_does_not(tmp_path, opened):
    file = report(hostile_run(tmp_path/"run"))
    assert file.stat().st_size < 600_000
    page = opened(file)
    alive(page, 2)
    player, inspector = (page.get_by_role("region", name=name) for name in ("Run player", "Pair inspector"))
    assert page.locator(".curves svg").count() == 0 # the player stands in their place
    player.get_by_label("step", exact=True).fill("119")
    assert player.locator("[data-readout=step]").inner_text() == "120 of 120"
    assert "200 of the 250 pairs" in page.inner_text("body")
    assert "<img src=x onerror='window.hacked = 2'> </script>" in inspector.inner_text()
    inspector.get_by_label("search").fill("xxxx")
    assert "1 of 200 pairs" in inspector.inner_text() and "99,400 more characters" in inspector.inner_text()
    inspector.get_by_role("button", name="export").click()
    assert "in pairs.jsonl of the run" in inspector.get_by_role("alert").inner_text()
    assert page.evaluate("window.hacked") is None
    if shots := os.environ.get("SCREENSHOTS"): page.screenshot(path=Path(shots)/"report_live.png", full_page=True)


def test_without_javascript_the_report_is_as_it_was(tmp_path, opened):
    page = opened(report(hostile_run(tmp_path/"run")), java_script_enabled=False)
    assert page.locator(".curves svg").count() == 6 and page.locator("article").count() == 10 + 3 * 4
    assert "They need JavaScript" in page.inner_text("body")


def test_a_run_that_the_player_refuses_keeps_its_pictures(tmp_path, opened):
    run = hostile_run(tmp_path/"run")
    write_jsonl(run/"margins.jsonl", [{"step": 1, "z": [1.]}, {"step": 2, "z": [1., 2.]}])
    page = opened(report(run))
    alive(page, 1)
    assert page.locator(".curves svg").count() == 6
    assert "the lines are not of the same pairs" in page.inner_text("body")
