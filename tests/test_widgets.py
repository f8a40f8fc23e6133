"The widgets without a browser: formulas against reference values, handlers by setting what a browser would set"
import base64, json, math, os, re
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
import mpmath
import numpy as np
import pytest
import torch
from jupyter_client import KernelManager
from matplotlib import pyplot

from engines import TOK
from runfolder import make_run, verdicts, write_jsonl
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.core.loss import preference_loss
from wikidpo.core.pairs import make_pairs
from wikidpo.show.beta import BetaSlider, pull
from wikidpo.show.inspector import columns, differing, ORDERS, pair_view, PairInspector, select
from wikidpo.show.player import RunPlayer
from wikidpo.show.predict import ask, outcome, predictions
from wikidpo.show.report import HIDDEN, visible
from wikidpo.show.run import load_run
from wikidpo.show.tokens import pieces
from wikidpo.show.vote import BlindVote, kappa
from wikidpo.show import widgets
from wikidpo.show.widgets import LIVE, STATIC

ROOT = Path(__file__).resolve().parent.parent

# loss_type, label_smoothing
SETTINGS = [("dpo", 0.), ("dpo", .1), ("dpo", .49), ("robust", .1), ("ipo", 0.), ("hinge", 0.)]
BETAS, MARGINS = (.01, .1, .5, 1.), (-700., -29.4, -3., 0., .7, 4., 31.5, 650.)


def exact_loss_and_slope(loss_type, z, b, e):
    "With as many digits as mpmath is set to"
    if loss_type == "ipo": return (z - 1 / (2 * b)) ** 2, 2 * (z - 1 / (2 * b))
    if loss_type == "hinge": return max(mpmath.mpf(0), 1 - b * z), -b if b * z < 1 else mpmath.mpf(0)
    sign, whole = (-1, 1 - 2 * e) if loss_type == "robust" else (1, 1)
    loss = (1 - e) * mpmath.log1p(mpmath.exp(-b * z)) + sign * e * mpmath.log1p(mpmath.exp(b * z))
    slope = -b * ((1 - e) / (1 + mpmath.exp(b * z)) - sign * e / (1 + mpmath.exp(-b * z)))
    return loss / whole, slope / whole


def reference():
    "(loss_type, z, beta, smoothing, loss, slope, pull), 40 digits of mpmath, which knows neither torch nor JavaScript"
    mpmath.mp.dps, rows = 40, []
    for (loss_type, eps), beta, z in product(SETTINGS, BETAS, MARGINS):
        b = mpmath.mpf(beta)
        loss, slope = exact_loss_and_slope(loss_type, mpmath.mpf(z), b, mpmath.mpf(eps))
        share = -slope * (b if loss_type == "ipo" else 1 / b)
        rows.append((loss_type, z, beta, eps, float(loss), float(slope), float(share)))
    return rows


def test_formulas_in_python():
    for loss_type, z, beta, eps, *want in reference():
        t = torch.tensor([z], dtype=torch.float64, requires_grad=True)
        loss = preference_loss(t, beta, loss_type, eps)
        slope, = torch.autograd.grad(loss.sum(), t)
        got = [loss.item(), slope.item(), pull(t, beta, loss_type, eps).item()]
        assert got == pytest.approx(want, rel=1e-12, abs=1e-15), (loss_type, z, beta, eps)


def browser(widget, **state):
    "What a message from the browser does"
    widget.set_state(state)


def test_slider_takes_what_the_browser_sends_and_refuses_the_rest():
    w, heard = BetaSlider(torch.randn(1000) * 20), []
    w.observe(lambda change: heard.append(change.new), "beta")
    browser(w, beta=.5, loss_type="dpo", label_smoothing=.2)
    # both at once: no moment in which smoothing meets ipo
    browser(w, beta=.5, loss_type="ipo", label_smoothing=0.)
    assert (w.beta, w.loss_type, w.label_smoothing, heard) == (.5, "ipo", 0., [.5])
    with pytest.raises(UserError, match="beta is -1.0"): w.beta = -1.
    with pytest.raises(UserError, match="no effect"): w.label_smoothing = .1
    assert (w.beta, w.label_smoothing) == (.5, 0.)
    assert np.array_equal(np.frombuffer(base64.b64decode(w.margins), np.float32), w.z.numpy())
    with pytest.raises(UserError, match="finite"): BetaSlider([1., math.nan])


@pytest.mark.parametrize("loss_type, beta, eps", [("dpo", .1, 0.), ("dpo", 1.25, .2), ("ipo", .37, 0.)])
def test_slider_sums_up_as_the_browser_does(loss_type, beta, eps):
    "In double precision, as JavaScript does: 10,000 margins, some of them where a pair just retires"
    edge = math.log(1 / (.025 + .95 * eps) - 1) / beta if loss_type == "dpo" else .475 / beta
    z = np.concatenate([np.random.default_rng(0).normal(5, 9, 9000), edge * (1 + np.linspace(-2e-7, 2e-7, 1000))])
    w = BetaSlider(z, beta=beta, loss_type=loss_type, label_smoothing=eps)
    zs = w.z.numpy().astype(float)
    pulls = 1 - 2 * beta * zs if loss_type == "ipo" else 1 / (1 + np.exp(beta * zs)) - eps
    began = 1 if loss_type == "ipo" else .5 - eps
    assert w.summary["retired"] == (abs(pulls) < .05 * began).sum()
    assert math.isclose(w.summary["mean"], pulls.mean(), rel_tol=1e-12)


@pytest.fixture
def run(tmp_path):
    path = make_run(tmp_path/"run")
    speeds = np.arange(-3, 12) / 20 # nats a step
    write_jsonl(path/"margins.jsonl", [{"step": s, "z": (s * speeds).tolist()} for s in (0, 40, 80, 120)])
    return load_run(path)


def test_inspector_reads_pairs_and_samples_alike(run):
    w = PairInspector(run.path/"samples.jsonl")
    assert (w.total, w.unit, w.limits) == (60, "prompts", {"gap": [2, None], "score_chosen": [6, None]})
    for gap, best in product(range(6), range(11)):
        browser(w, limits={"gap": [gap, None], "score_chosen": [best, None]})
        want, counts = make_pairs(run.samples, gap, best)
        assert [w.pairs[i] for i in w.selection] == want
        assert w.view["kept"] == counts["pairs"] and w.view["total"] == counts["prompts"]
        assert sum(map(sum, w.view["counts"])) == len(want) and not w.error
    w = PairInspector(run.path/"pairs.jsonl")
    assert (w.total, w.unit, len(w.selection)) == (len(run.pairs), "pairs", len(run.pairs))


def test_inspector_handlers(run):
    w, heard = PairInspector(run.pairs), []
    w.observe(lambda change: heard.append(change.new["kept"]), "view")
    browser(w, query="COUNTRY 1")
    assert heard == [sum("country 1" in t for t in w.texts)] and w.pair["prompt"] == w.pairs[w.selection[0]]["prompt"]
    browser(w, position=2)
    assert w.pair["prompt"] == w.pairs[w.selection[2]]["prompt"]
    browser(w, limits={"gap": [3, 4]})
    assert w.position == 0 and all(3 <= w.cols["gap"][i] <= 4 for i in w.selection)
    browser(w, query="nothing says this")
    assert w.pair == {} and w.view["rows"] == [] and w.view["longer"] is None and not w.error
    browser(w, limits={"colour": [1, None]}, query="")
    assert w.error == "KeyError: 'colour'"
    browser(w, limits={})
    assert w.error == "" and len(w.selection) == len(run.pairs)
    json.dumps([w.view, w.pair], allow_nan=False) # what goes to the browser is JSON


def test_inspector_begins_where_it_is_told(run):
    w = PairInspector(run.pairs, position=17)
    assert (w.position, w.error) == (17, "") and w.pair["prompt"] == run.pairs[17]["prompt"]
    w = PairInspector(run.path/"samples.jsonl", position=3, order="both bad")
    assert w.position == 3 and w.pair["prompt"] == w.pairs[w.selection[3]]["prompt"]
    assert w.view["first"] == 0
    w = PairInspector(run.pairs, position=10**6)
    assert "position 1000000: there are" in w.error


@pytest.mark.skipif(ipywidgets.__version__ < "8", reason="ipywidgets 7 sends nothing where there is no kernel")
def test_the_pair_and_its_view_arrive_together(run):
    "The browser hears of both in one message: a view of some pairs without a pair would be no state at all"
    w, sent = PairInspector(run.pairs), []
    browser(w, query="nothing says this")
    w._send = lambda message, buffers=None: sent.append(message.get("state", {}))
    browser(w, query="")
    assert [s for s in sent if "view" in s or "pair" in s] == [s for s in sent if "view" in s and "pair" in s] != []


def test_inspector_exports_what_is_selected(run, tmp_path):
    w = PairInspector(run.path/"samples.jsonl", order="both bad")
    w._handle_custom_msg({"export": True}, []) # the button
    assert read_jsonl(run.path/"pairs.inspected.jsonl") == make_pairs(run.samples, 2, 6)[0]
    assert w.saved == f"{len(w.selection)} pairs written to pairs.inspected.jsonl"
    w = PairInspector(run.pairs)
    w.export()
    assert "no file to write to" in w.error
    w.out, w.query = tmp_path/"never.jsonl", "nothing says this"
    w.export()
    assert "nothing was written" in w.error and not w.out.exists()


def test_suspicious_pairs_come_first():
    texts = [("a b c d e f", "g h i j k l", 7), ("", "m", 10), ("n", "o " * 50, 8), ("same words", "Same  words", 9),
             ("both", "bad!", 2)]
    rows = [{"prompt": "p", "chosen": chosen, "rejected": rejected, "score_chosen": score, "score_rejected": 1}
            for chosen, rejected, score in texts]
    first = {order: select(columns(rows), [""] * 5, order=order)[0] for order in ORDERS}
    assert first == {"as mined": 0, "high score, very short": 1, "longer, but worse": 2, "nearly the same text": 3,
                     "both bad": 4}


@pytest.mark.parametrize("a, b", [("", ""), ("one", ""), ("a  b\n c", "a b\nc"), ("<b>x</b> y", "<b>x</b> z"),
                                  ("x" * 100_000, "y"), ("w " * 50_000, "w"), ("\u202eabc\x1b[1m", "abc")])
def test_marking_loses_no_character(a, b):
    left, right = differing(a, b)
    assert "".join(t for t, _ in left) == a and "".join(t for t, _ in right) == b
    if a.split() == b.split(): assert not any(d for _, d in left + right)


def test_player_reads_a_run_folder(run):
    w = RunPlayer(run)
    assert w.steps == list(range(1, 121)) and w.margin_steps == [0, 40, 80, 120] and w.z.shape == (4, 15)
    assert {p["title"] for p in w.run["panels"]} >= {"loss", "reward accuracy"} and w.run["beta"] == .1
    json.dumps(w.run, allow_nan=False)
    browser(w, step=77)
    assert w.step == 77
    with pytest.raises(UserError, match="the run has steps 1 to 120"): w.step = 121
    (run.path/"margins.jsonl").unlink()
    assert RunPlayer(load_run(run.path)).z.numel() == 0 # a run of an older version


def test_not_a_number_in_the_metrics_reaches_the_browser_as_missing(tmp_path):
    path = make_run(tmp_path/"run", ("train",))
    rows = read_jsonl(path/"metrics.jsonl")
    rows[3]["loss"] = math.nan
    del rows[5]["grad_norm"]
    write_jsonl(path/"metrics.jsonl", rows)
    json.dumps(RunPlayer(load_run(path)).run, allow_nan=False)


def test_votes(tmp_path):
    rows, path = verdicts(40), tmp_path/"votes.jsonl"
    w = BlindVote(rows, path)
    assert set(w.rows) == {r["prompt_id"] for r in rows if r["result"]}
    shown = set()
    for i in range(12):
        assert set(w.question) == {"number", "prompt", "first", "second"} # no names, no verdicts
        row = w.rows[w.current]
        assert {w.question["first"], w.question["second"]} == {row["a"], row["b"]}
        shown.add(w.question["first"] == row["a"])
        # the same key twice, before the next question arrived
        for _ in range(2): w._handle_custom_msg({"vote": "first", "number": i}, [])
        assert len(w.votes) == i + 1 and ("kappa" in w.result) == (i >= 9)
    assert shown == {True, False}
    kept = read_jsonl(path)
    assert all(v["vote"] == v["shown_first"] for v in kept) and w.table().sum() == 12
    again = BlindVote(rows, path)
    assert (again.votes, again.current, again.result) == (w.votes, w.current, w.result)
    other = [r | {"prompt_id": r["prompt_id"] + 1000} for r in rows]
    with pytest.raises(UserError, match="votes.jsonl:1"): BlindVote(other, path)


def test_votes_on_other_answers_to_the_same_prompts_are_refused(tmp_path):
    "As of a policy that was trained again; lines from before a vote said what it was on are believed"
    rows, path = verdicts(40), tmp_path/"votes.jsonl"
    w = BlindVote(rows, path)
    for _ in range(3): w.vote("first")
    other = [r | {"a": r["a"] + " Or so."} for r in rows]
    with pytest.raises(UserError, match="votes.jsonl:1: a vote on other answers to this prompt"): BlindVote(other, path)
    older = read_jsonl(path)
    for vote in older: del vote["answers"]
    write_jsonl(path, older)
    assert len(BlindVote(other, path).votes) == 3


def test_what_is_null_in_a_pair_is_unknown():
    pair = {"prompt": "Who?", "chosen": "I.", "rejected": "You, I think."}
    null = {f"{name}_{side}": None for name in ("score", "temp") for side in ("chosen", "rejected")}
    null |= {f"{side}_tokens": None for side in ("chosen", "rejected")}
    assert pair_view(pair | null) == pair_view(pair)


def test_each_token_adds_its_own_piece_also_half_a_character():
    text = "The capital is São Tomé – 日本."
    ids = TOK.encode(text, add_special_tokens=False).ids
    found = pieces(TOK, ids)
    assert len(found) == len(ids) and max(map(len, found)) < 12
    assert [piece for piece in found if piece in ("The", " capital", ".")] == ["The", " capital", "."]


def test_kappa_knows_its_extremes():
    assert kappa(np.diag([30, 20, 50]))[0] == 1 and kappa(np.full((3, 3), 10))[0] == pytest.approx(0)
    value, low, high = kappa([[20, 5, 3], [4, 15, 6], [2, 7, 30]])
    assert low < value < high < 1
    table = np.array([[4, 1, 1], [1, 3, 1], [0, 1, 6]])
    wide, narrow = (np.diff(kappa(table * k)[1:])[0] for k in (1, 20))
    assert narrow < wide / 3


def test_every_widget_has_a_static_figure_and_none_stays_behind(run, tmp_path, capsys):
    without_temperatures = [p | {"temp_chosen": None} for p in run.pairs]
    made = [BetaSlider(torch.randn(100)), PairInspector(run.pairs), PairInspector(without_temperatures), RunPlayer(run),
            BlindVote(run.verdicts, tmp_path/"v.jsonl")]
    for w in made:
        w.static_figure().savefig(tmp_path/"figure.png")
        assert (tmp_path/"figure.png").stat().st_size > 5000
        w._ipython_display_() # here, without a kernel: the figure only
    assert capsys.readouterr().out.count(f"'text/plain': '{LIVE}'") == len(made)
    assert not pyplot.get_fignums()


def test_margins_are_those_of_the_run(tmp_path): # style: one run, looked at from all sides
    """What `train` writes for the player: the step before the first, the final policy's margins last, and each due
    step once. Watching changes nothing"""
    from wikidpo.core.data import PairDataset, collate
    from wikidpo.core.logps import pair_logps
    from wikidpo.core.loss import margin
    from wikidpo.world.facts import DATA
    from wikidpo.run.profiles import load_profile, section
    from wikidpo.models.policy import open_policy
    from wikidpo.run.config import PolicyConfig
    from wikidpo.run.config import RunTrainConfig
    from wikidpo.run.train import train
    write_jsonl(tmp_path/"pairs.jsonl", read_jsonl(DATA/"pairs.jsonl")[:50])
    profile = load_profile("miniwiki")
    policy = section(PolicyConfig, "policy", profile["policy"])
    recipe = profile["train"] | {"pairs": str(tmp_path/"pairs.jsonl"), "wandb": "disabled", "batch_size": 4,
                                 "grad_accum_steps": 1}
    for watch in (9, 0):
        train(policy, section(RunTrainConfig, "train", recipe | {"watch": watch}), tmp_path/f"run{watch}")
    assert (tmp_path/"run9"/"dpo.pt").read_bytes() == (tmp_path/"run0"/"dpo.pt").read_bytes()
    assert not (tmp_path/"run0"/"margins.jsonl").exists()
    rows = read_jsonl(tmp_path/"run9"/"margins.jsonl")
    steps = [r["step"] for r in rows]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 12 and len(steps) >= 12
    assert set(rows[0]["z"]) == {0.}
    after, tok = open_policy(policy, tmp_path/"run9"/"dpo.pt")
    ref, _ = open_policy(policy)
    dataset = PairDataset(tmp_path/"pairs.jsonl", tok, 256)
    batch = collate([dataset[i] for i in range(0, 45, 5)])
    with torch.no_grad(): policy_logps, ref_logps = pair_logps(after, batch), pair_logps(ref, batch)
    assert rows[-1]["z"] == pytest.approx(margin(*policy_logps, *ref_logps).tolist(), abs=2e-3)
    player = RunPlayer(load_run(tmp_path/"run9"))
    assert player.z.shape == (len(rows), 9) and player.run["beta"] == recipe["beta"]


# --- predictions


@pytest.fixture
def kept(tmp_path, monkeypatch):
    path = tmp_path/"kept"/"predictions.json"
    monkeypatch.setenv("WIKIDPO_PREDICTIONS", str(path))
    return path


def test_a_prediction_is_stored_and_comes_back(kept, capsys):
    options = ["colder", "warmer"]
    w = ask("03-winner", "Which answer wins?", options)
    browser(w, answer="warmer")
    assert predictions() == {"03-winner": {"question": "Which answer wins?", "answer": "warmer"}}
    assert ask("03-winner", "Which answer wins?", options).answer == "warmer"
    outcome("03-winner", "colder")
    assert capsys.readouterr().out == "Measured: colder; you predicted: warmer.\n"
    browser(w, answer="colder")
    assert "the outcome has been seen" in w.error and w.answer == "warmer"
    assert predictions()["03-winner"] == {"question": "Which answer wins?", "answer": "warmer", "outcome": "colder"}


def test_no_prediction_is_made_up(kept, capsys):
    ask("03-winner", "Which answer wins?", ["colder", "warmer"])
    outcome("03-winner", "colder")
    assert capsys.readouterr().out == "Measured: colder. (You stored no prediction.)\n" and not kept.exists()


def test_what_cannot_be_a_prediction_is_refused(kept):
    w = ask("03-winner", "Which answer wins?", ["colder", "warmer"])
    with pytest.raises(UserError, match="'both' is none of the answers: colder, warmer"): w.answer = "both"
    kept.parent.mkdir()
    for text in ("no json", "[1]", '{"03-winner": 7}'):
        kept.write_text(text)
        with pytest.raises(UserError, match="no predictions; delete the file"): outcome("03-winner", "colder")
    assert kept.read_text() == '{"03-winner": 7}'


def test_widgets_and_report_mark_the_same_characters():
    "The class of characters in common.js, read as Python's, finds what the report's finds, in all of Unicode"
    text = (STATIC/"common.js").read_text(encoding="utf-8")
    theirs = re.search(r"const HIDDEN = /(.*)/gu;", text)[1]
    theirs = re.compile(re.sub(r"\\u\{(\w+)\}", lambda m: f"\\U{m[1]:0>8}", theirs))
    assert [c for c in map(chr, range(0x110000)) if bool(theirs.match(c)) != bool(HIDDEN.match(c))] == []
    for c in "\x1b\xad\u200b\u2028\u202e\u3164\ufeff\ud800\U000e0041": assert visible(c).startswith("‹U+")
    for c in "\t\nä\u200d\ufe0f\U0001f600": assert visible(c) == c


# Requests as the front ends send them: JupyterLab and Kaggle's editor a bare id, VS Code an address, Colab a field of
# its own; nbconvert and papermill none.
REQUESTS = [
    ("lab", {"cellId": "5e11a005", "deletedCells": []}),
    ("vscode", {"cellId": "vscode-notebook-cell:/lesson.ipynb#W0sZmlsZQ%3D%3D"}),
    ("colab", {"colab": {"base_url": "https://colab.research.google.com", "cell_id": "b3f4vQ"}}),
    (None, {}),
]


LIVE_TYPE, FIGURE = "application/vnd.jupyter.widget-view+json", "image/png"
BOTH = [{LIVE_TYPE, FIGURE}] # two forms of one output
SHOWN = {"lab": [{LIVE_TYPE}, {FIGURE}], "vscode": BOTH, "colab": BOTH, None: [{FIGURE}]}


@pytest.mark.parametrize("front, metadata", REQUESTS, ids=lambda x: x if isinstance(x, str) else "")
def test_each_front_end_shows_the_widget_once(monkeypatch, front, metadata):
    shown = []
    shell = SimpleNamespace(get_parent=lambda: {"header": {"msg_id": "1"}, "metadata": metadata})
    monkeypatch.setattr(widgets, "get_ipython", lambda: shell)
    monkeypatch.setattr(widgets, "display", lambda output, raw: shown.append({LIVE_TYPE, FIGURE} & set(output)))
    slider = BetaSlider([1.])
    slider._ipython_display_()
    assert shown == SHOWN[front]
    assert bool(front) == any(slider in held for _, held in slider._shown.values())
    slider.close()


SHOW_ONE = """from wikidpo.show.beta import BetaSlider
BetaSlider([1., 4.])"""


def test_a_kernel_sends_each_front_end_what_it_can_show():
    "A real kernel, asked as the front ends ask it: the types of each output that comes, and a widget's numbers as text"
    manager = KernelManager()
    manager.start_kernel(env=os.environ | {"PYTHONPATH": str(ROOT)})
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(120)
        for front, metadata in REQUESTS: assert asked(client, metadata) == SHOWN[front], front
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def asked(client, metadata):
    "Of each output of SHOW_ONE which of LIVE_TYPE and FIGURE it holds; no message to a widget carries bytes"
    content = dict(code=SHOW_ONE, silent=False, store_history=True, user_expressions={}, allow_stdin=False)
    request, shown = client.session.msg("execute_request", content, metadata=metadata), []
    client.shell_channel.send(request)
    while True:
        message = client.get_iopub_msg(timeout=120)
        if message["parent_header"].get("msg_id") != request["header"]["msg_id"]: continue
        kind, content = message["msg_type"], message["content"]
        assert kind != "error", content
        assert not message["buffers"]
        if kind == "display_data": shown.append({LIVE_TYPE, FIGURE} & set(content["data"]))
        if kind == "status" and content["execution_state"] == "idle": return shown
