"""The exercises: each is whole, its checker lets the solution pass, knows every mistake by its name, and is polite
to everything else."""
import random
from collections import Counter

import nbformat
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exercises as tool
from wikidpo.world.exercises.all import EXERCISES
from wikidpo.world.exercises.base import Exercise, Mistake, differs, prove, unwrap

NAMES = sorted(EXERCISES)
MISTAKES = [(name, says) for name in NAMES for says in EXERCISES[name].wrong()]


@pytest.mark.parametrize("name", NAMES)
def test_solution_passes(name):
    e = EXERCISES[name]
    assert e.review(e.load(e.solution)) == f"right, in all {len(e.cases())} cases."


@pytest.mark.parametrize("name, says", MISTAKES)
def test_mistake_is_named(name, says):
    e = EXERCISES[name]
    review = e.review(e.load(e.wrong()[says]))
    assert says in review and review.startswith("not yet"), review


@pytest.mark.parametrize("name", NAMES)
def test_stub_is_met_politely(name, capsys):
    e = EXERCISES[name]
    e(e.load(e.stub))
    review = capsys.readouterr().out
    assert review.startswith(f"{name}: not yet. Nothing comes back so far") and review.count("\n") == 1
    assert e.solution.startswith(e.stub.removesuffix("    ... # your code")), "the stub is the solution's head"
    assert e.solution != e.stub


@pytest.mark.parametrize("name", NAMES)
def test_exercise_is_whole(name):
    e = EXERCISES[name]
    assert all(text.strip() for text in (e.title, e.task, e.hint, e.answer))
    assert "**Predict first" in e.task and 1 <= e.stars <= 3 and 5 <= e.minutes <= 30
    assert len(e.mistakes) >= 4 and len(e.wrong()) == len(e.mistakes)
    for mistake in e.mistakes:
        assert mistake.says.endswith((".", "?", ")")), mistake.says
        assert bool(mistake.source) != bool(mistake.right), f"a piece or a source for {mistake.says!r}"
        assert mistake.right in e.solution, f"nothing to replace for {mistake.says!r}"


def test_counts():
    "At least 25 in all, two to five in each lesson, easy ones and hard ones."
    found = Counter(e.lesson for e in EXERCISES.values())
    assert sorted(found) == [*range(1, 11), 12] and all(2 <= n <= 5 for n in found.values()), found
    assert len(EXERCISES) >= 25 and {e.stars for e in EXERCISES.values()} == {1, 2, 3}


def test_cases_are_fresh_each_time():
    "A function that spoils its arguments does not spoil the next run."
    e = EXERCISES["dpo_gradient"]

    def spoils(z, beta):
        z.zero_()
        return z, z

    e.review(spoils)
    assert e.review(e.load(e.solution)).startswith("right")


# --- functions that are none of the known mistakes


class Garbage(random.Random):
    "Values of every kind, in shapes that fit and that do not."

    def value(self, depth=2):
        kind = self.randrange(9 if depth else 6)
        if kind < 2:
            return self.uniform(-9, 9)
        if kind == 2:
            return self.choice([None, "", "text", "A", True, float("nan"), float("inf"), object(), {}, b"x"])
        if kind < 6:
            shape = [self.randrange(4) for _ in range(self.randrange(3))]
            return torch.randn(shape, generator=torch.Generator().manual_seed(self.randrange(999)))
        if kind < 8:
            return [self.value(depth - 1) for _ in range(self.randrange(4))]
        return {"margin": self.value(depth - 1)}


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_garbage_is_never_right(seed):
    g = Garbage(seed)
    e = EXERCISES[g.choice(NAMES)]
    review = e.review(lambda *args: g.value())
    assert review.startswith("not yet") and review.count("\n") <= 2 and len(review) < 1500, review


@pytest.mark.parametrize("name", NAMES)
def test_unforeseen_mistakes_get_a_useful_answer(name):
    "A solution with random numbers added is not right, and is told where it differs, and in what."
    e, g = EXERCISES[name], Garbage(name)

    def shaken(x):
        if isinstance(x, torch.Tensor):
            return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(g.randrange(999))) + 3
        if isinstance(x, bool) or x is None or isinstance(x, str):
            return "something else"
        if isinstance(x, (int, float)):
            return x + 3 + g.random()
        if isinstance(x, dict):
            return {k: shaken(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [shaken(y) for y in x] or ["one too many"]
        return torch.nn.Linear(1, 1)

    right = e.load(e.solution)
    review = e.review(lambda *args: shaken(right(*args)))
    assert review.startswith("not yet: right in 0 of ") and "Case 1: " in review and "should give" in review, review
    assert not any(says in review for says in e.wrong()), review


def test_an_error_is_one_line_with_its_place():
    e = EXERCISES["best_policy"]
    source = 'def best_policy(ref, r, beta):\n    "..."\n    n = len(r)\n    return missing(n)\n'
    review = e.review(e.load(source)).split("\n")
    assert len(review) == 3 and "line 4 raises NameError: name 'missing' is not defined" in review[-1], review


def test_an_error_deep_in_a_library_names_the_learners_line():
    e = EXERCISES["best_policy"]
    source = 'def best_policy(ref, r, beta):\n    w = torch.ones(7)\n    return torch.stack([r, w])\n'
    assert "line 3 raises RuntimeError: stack expects" in e.review(e.load(source))


@pytest.mark.parametrize("f, says", [
    (lambda r, v: r, "TypeError"),
    (lambda ref, r, beta: [1.0], "a list of 1, not a tensor of shape (5,)"),
    (lambda ref, r, beta: torch.zeros(1), "a tensor of shape (1,), not a tensor of shape (5,)"),
    (lambda ref, r, beta: r * torch.nan, "NaN"),
    (torch.zeros(3), "Give the checker the function itself"),
    (len, "TypeError: len() takes exactly one argument (3 given)"),
])
def test_wrong_kinds_are_named(f, says):
    assert says in EXERCISES["best_policy"].review(f)


@pytest.mark.parametrize("factor, says", [
    (-1, "The sign is flipped."),
    (2, "Every number is 2 times the right one."),
    (0.125, "Every number is 0.125 times the right one."),
])
def test_a_common_factor_is_named(factor, says):
    e = EXERCISES["strengths"]
    right = e.load(e.solution)
    review = e.review(lambda wins: factor * right(wins))
    assert says in review or factor == -1 and "wrong way round" in review


@pytest.mark.parametrize("got, want, how", [
    (torch.tensor(1.0), 1, ""),
    (1, torch.tensor(1.0), ""),
    ((1, 2), [1, 2], ""),
    (torch.tensor([1, 0]), torch.tensor([True, False]), ""),
    (1.0 + 1e-9, 1.0, ""),
    (1.01, 1.0, "values"),
    ("7", 7, "a text, not a number"),
    (0, None, "a number, not None"),
    ([1], [1, 2], "a list of 1, not a list of 2"),
    (torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.float64), ""),
    (float("nan"), 1.0, "values"),
])
def test_what_counts_as_the_same(got, want, how):
    assert differs(got, want) == how


@pytest.mark.parametrize("text, rendered", [
    ("one", "one"),
    ("\na paragraph\non two lines\n", "a paragraph on two lines"),
    ("one\n\n$$z$$\n\nthree\nfour", "one\n\n$$z$$\n\nthree four"),
    ("these:\n\n- first\n- second,\n  long\n- third", "these:\n\n- first\n- second, long\n- third"),
])
def test_wrapped_texts_are_rendered_in_lines(text, rendered):
    assert unwrap(text) == rendered and unwrap(rendered) == rendered


def test_an_exercise_that_is_not_whole_is_found_out():
    fields = dict(lesson=0, title="Twice", stars=1, minutes=1, task="", hint="", answer="")
    fields["cases"] = lambda: [(2.0,), (3.0,)]
    solution = 'def twice(x):\n    "x -> 2 x"\n    return 2 * x\n'
    square = Mistake("That is the square.", right="2 * x", wrong="x * x")
    assert prove(Exercise(solution=solution, mistakes=[square], **fields)).startswith("twice")
    for mistake, complaint in (
        (Mistake("Nothing to change.", right="3 * x", wrong="x"), "nothing to replace"),
        (Mistake("That is the product.", right="2 * x", wrong="x * x"), "'That is the product.' is not recognised"),
        (Mistake("That is right.", right="2 * x", wrong="x + x"), "'That is right.' is not recognised"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            prove(Exercise(solution=solution, mistakes=[square, mistake], **fields))


# --- the lessons


def test_lessons_agree_with_the_module():
    stale = [path.name for path, old, new in tool.lessons(tool.ROOT) if old != new]
    assert not stale, f"run `python tools/exercises.py`: {', '.join(stale)}"


def lesson(tmp_path, *cells):
    path = tmp_path / "nbs/lessons/02_the_loss.ipynb"
    path.parent.mkdir(parents=True)
    for n, cell in enumerate(cells):
        cell.id = f"cell{n}"
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=list(cells))) + "\n", encoding="utf-8")
    return path


def test_insert_stands_before_the_ending_and_settles(tmp_path):
    md = nbformat.v4.new_markdown_cell
    path = lesson(tmp_path, md("# One"), md("## Seen\n\n- This.\n\nNext: [02](02.ipynb)."))
    [(_, old, new)] = tool.lessons(tmp_path)
    cells = nbformat.reads(new, as_version=4).cells
    assert [c.id for c in cells[:3]] == ["cell0", "cell1", "exercise-head"] and cells[1].source == "## Seen\n\n- This."
    assert cells[-1].source == "Next: [02](02.ipynb)." and len({c.id for c in cells}) == len(cells)
    stubs = [c.source for c in cells if "check_baseline(baseline)" in c.source]
    assert stubs == [EXERCISES["baseline"].stub + "\n\nbaseline = check_baseline(baseline)"]
    path.write_text(new, encoding="utf-8")
    assert [(a == b) for _, a, b in tool.lessons(tmp_path)] == [True]
    for text, other in (("one softmax does the rest", "a spoiled hint"), ("Nothing comes back so far", "Well done")):
        spoil = new.replace(text, other)
        assert spoil != new
        path.write_text(spoil, encoding="utf-8")
        assert [b for _, _, b in tool.lessons(tmp_path)] == [new]


def test_an_exercise_stays_where_it_was_moved_to(tmp_path):
    md = nbformat.v4.new_markdown_cell
    path = lesson(tmp_path, md("# One"), md("## Two"), md("Next: [03](03.ipynb)."))
    [(_, _, new)] = tool.lessons(tmp_path)
    nb = nbformat.reads(new, as_version=4)
    moved = [c for c in nb.cells if c.id.startswith("exercise-baseline")]
    nb.cells = [nb.cells[0], *moved, *(c for c in nb.cells[1:] if c not in moved)]
    moved[0].source = "an old text"
    path.write_text(nbformat.writes(nb) + "\n", encoding="utf-8")
    [(_, _, again)] = tool.lessons(tmp_path)
    cells = nbformat.reads(again, as_version=4).cells
    assert [c.id for c in cells] == [c.id for c in nb.cells] and cells[1].source != "an old text"


def test_a_checker_gives_back_what_the_lesson_goes_on_with():
    e = EXERCISES["baseline"]
    def mine(*args): return e.load(e.solution)(*args)
    assert e(mine) is mine
    cases = e.cases()
    assert [e(e.load(e.stub))(*args) for args in cases] == [mine(*args) for args in e.cases()]


def test_cells_run_as_a_learner_would_run_them(capsys):
    "The code cells of every lesson, in order, in one namespace; then each with its solution in place of the stub."
    for number in sorted({e.lesson for e in EXERCISES.values()}):
        space = {}
        for cell in tool.cells(number):
            if cell.cell_type == "code":
                exec(cell.source, space)
                assert capsys.readouterr().out == "".join(o.text for o in cell.outputs)
        for e in EXERCISES.values():
            if e.lesson == number:
                exec(f"{e.solution}\ncheck_{e.name}({e.name})", space)
                assert capsys.readouterr().out.startswith(f"{e.name}: right")
