"""The exercises: each is whole, its checker lets the solution pass, knows every mistake by its name, and is polite
to everything else."""
import ast
import random
import time
from collections import Counter
from itertools import combinations

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exercises as tool
from wikidpo.world.exercises.all import EXERCISES
from wikidpo.world.exercises.base import (
    Exercise,
    Mistake,
    differs,
    first_sentence,
    in_full,
    outcomes,
    printed,
    prove,
    spell,
    spoil_twice,
    unwrap,
)

NAMES = sorted(EXERCISES)
MISTAKES = [(name, says) for name in NAMES for says in EXERCISES[name].wrong()]


@pytest.mark.parametrize("name", NAMES)
def test_solution_passes(name):
    e = EXERCISES[name]
    said, answer = e.review(e.load(e.solution)).split("\n")
    assert said == (f"right, in all {len(e.cases())} cases." if len(e.cases()) > 1 else "right.")
    assert answer.startswith("  And the prediction? ") and not set("\\${}") & set(answer), answer
    assert answer.endswith((".", "!", "?")) and len(answer) < 250, answer


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
    "At least 25 in all, one to six in each lesson, easy ones and hard ones."
    found = Counter(e.lesson for e in EXERCISES.values())
    assert sorted(found) == [*range(1, 13), 14] and all(1 <= n <= 6 for n in found.values()), found
    assert len(EXERCISES) >= 25 and {e.stars for e in EXERCISES.values()} == {1, 2, 3}


def test_cases_are_fresh_each_time():
    "A function that spoils its arguments does not spoil the next run."
    e = EXERCISES["dpo_gradient"]

    def spoils(z, beta):
        z.zero_()
        return z, z

    assert "  Besides, `z` is changed by dpo_gradient." in e.review(spoils)
    assert e.review(e.load(e.solution)).startswith("right")


# --- what the learner reads of a case


@pytest.mark.parametrize("name", NAMES)
def test_cases_are_printed_in_full(name):
    for text in printed(EXERCISES[name]):
        assert in_full(text), text
        assert max(map(len, text.split("\n"))) <= 130, text


def tiny(solution, mistakes=(), cases=((2.0, 3.0),), **fields):
    "An exercise with the least that one needs."
    texts = dict(lesson=0, title="Tiny", stars=1, minutes=1, task="", hint="", answer="Yes. No.")
    return Exercise(solution=solution, mistakes=list(mistakes), cases=lambda: list(cases), **texts, **fields)


MOMENTS = """
def moments(x):
    "x (n,) -> mean, and mean square"
    return x.mean(), (x ** 2).mean()
"""


def test_a_case_too_wide_for_a_line_has_one_for_each_argument():
    rows = [{"beta": b, "win": 0.6, "low": 0.55, "high": 0.65, "kl": 9.5} for b in (0.05, 0.1, 0.5)]
    e = tiny('def best(rows, floor):\n    "rows"\n    return rows[0]["beta"]\n', cases=[(rows, 0.5)])
    review = e.review(lambda rows, floor: 0)
    lines = review.split("\n")
    assert lines[1:4] == ["  Case 1: best(",
                          "      rows=[{'beta': 0.05, 'win': 0.6, 'low': 0.55, 'high': 0.65, 'kl': 9.5},",
                          "            {'beta': 0.1, 'win': 0.6, 'low': 0.55, 'high': 0.65, 'kl': 9.5},"]
    assert lines[5] == "      floor=0.5)"
    assert lines[-1] == "  should give 0.05; yours gives 0" and in_full(review)


def test_a_tensor_of_63_numbers_is_printed_and_one_of_64_is_counted():
    e = tiny('def same(x):\n    "x -> x"\n    return x\n', cases=[(torch.rand(7, 9),)])
    assert all(map(in_full, printed(e)))
    e = tiny(e.solution, cases=[(torch.rand(8, 8),)])
    assert "<tensor (8, 8): 64 numbers>" in printed(e)[0] and not in_full(printed(e)[0])


def test_a_wide_dict_has_a_line_for_each_key():
    e = tiny('def same(x):\n    "x -> x"\n    return x\n', cases=[({k: [0.123456] * 8 for k in range(2)},)])
    [text] = printed(e)
    starts = [line[: line.index(":") + 6] for line in text.split("\n") if ":" in line]
    assert starts == ["      x={0: [0.1", "         1: [0.1", "  should give {0: [0.1", "               1: [0.1"], text


def test_what_is_too_long_says_how_much_is_missing():
    e = tiny('def many(n):\n    "n"\n    return n\n', cases=[(2,)])
    review = e.review(lambda n: list(range(1000)))
    assert " ... and 3,438 characters more" in review and len(review) < 2000 and not in_full(review)
    with pytest.raises(AssertionError, match="a case is too large to be printed"):
        prove(tiny(e.solution, cases=[("a" * 2000,)]))


def test_numbers_that_differ_look_different():
    e = tiny('def third(x, y):\n    "x, y"\n    return 100 / 3\n', tol=1e-7)
    assert e.review(lambda x, y: 33.33334).endswith("should give 33.33333333; yours gives 33.33334")
    x = torch.tensor([1 / 3])
    e = tiny('def third(x, y):\n    "x, y"\n    return torch.ones(1) / 3\n', tol=1e-5)
    assert "should give tensor([0.33333334]); yours gives tensor([0.333345" in e.review(lambda *args: x + 1.2e-5)


# --- the edges of the rules

NEXT_TO = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
NO_EDGE = {  # where nothing stands on the edge
    "share_colder": "the equal ones are left out before",
    "which_run: mean > 0": "0 is inside of every interval around it, and asked for first",
    "diagnose: abs(run['first_loss'] - math.log(2)) > 0.001": "no loss is exactly that far from ln 2",
}


def edges(name):
    "(comparison, the source in which it counts the edge to the other side) of a solution"
    def compares(tree):
        return [c for c in ast.walk(tree) if isinstance(c, ast.Compare) and type(c.ops[0]) in NEXT_TO]

    source = EXERCISES[name].solution
    for i in range(len(compares(ast.parse(source)))):
        tree = ast.parse(source)
        compare = compares(tree)[i]
        rule = ast.unparse(compare)
        compare.ops[0] = NEXT_TO[type(compare.ops[0])]()
        yield rule, ast.unparse(tree)


EDGES = [(name, rule, source) for name in NAMES for rule, source in edges(name)
         if not {name, f"{name}: {rule}"} & set(NO_EDGE)]


@pytest.mark.parametrize("name, rule, source", EDGES, ids=[f"{name}: {rule}" for name, rule, _ in EDGES])
def test_a_case_stands_on_the_edge_of_every_rule(name, rule, source):
    e = EXERCISES[name]
    assert not e.review(e.load(source)).startswith("right"), f"no case tells {rule} from its neighbour"


# --- parts, cases, pairs


@pytest.mark.parametrize("f, says", [
    (lambda x: (x.mean(), x.mean() ** 2), "mean is right, square is not."),
    (lambda x: (x.sum(), (x ** 2).mean()), "square is right, mean is not."),
    (lambda x: (x.mean(), None), "mean is right, square is not."),
    (lambda x: (-x.mean(), (x ** 2).mean()), "square is right, mean is not. In mean: the sign is flipped."),
    (lambda x: (2 * x.mean(), (x ** 2).mean() + 1), " In mean: every number is 2 times the right one. "
                                                    "In square: every number is off by +1."),
])
def test_parts_are_compared_one_by_one(f, says):
    cases = [(torch.tensor([1.0, 3.0]),), (torch.tensor([1.0, 5.0, 6.0]),)]
    e = tiny(MOMENTS, cases=cases, parts="mean square")
    assert says in e.review(f)
    unnamed = says.replace("mean", "part 1").replace("square", "part 2")
    unnamed = unnamed.replace("part 1 is", "'part 1' is").replace("part 2 is", "'part 2' is")
    assert unnamed in tiny(MOMENTS, cases=cases).review(f)


def test_the_keys_of_a_dict_are_its_parts():
    e = EXERCISES["step_metrics"]
    right = e.load(e.solution)
    review = e.review(lambda *args: right(*args) | {"accuracy": 0.123})
    assert "cases. margin is right, accuracy is not.\n" in review, review


@pytest.mark.parametrize("name", [name for name in NAMES if EXERCISES[name].parts])
def test_names_of_parts_fit(name):
    e = EXERCISES[name]
    values = [value for value in outcomes(e, e.load(e.solution)) if value is not None]
    assert values and all(isinstance(value, tuple) and len(value) == len(e.parts.split()) for value in values)


def test_a_factor_may_change_from_case_to_case():
    e = tiny('def scaled(x, beta):\n    "x, beta"\n    return x\n',
             cases=[(torch.tensor([1.0, 2.0]), 0.1), (torch.tensor([1.0, 2.0]), 0.5), (torch.tensor([3.0, 2.0]), 1.0)])
    review = e.review(lambda x, beta: beta**2 * x)
    assert "right in 1 of 3 cases. In case 1: every number is 0.01 times the right one. " \
        "In case 2: every number is 0.25 times the right one.\n" in review, review


def test_nan_where_it_belongs_is_no_clue():
    e = tiny('def f(x, y):\n    "x, y"\n    return torch.tensor([torch.nan, 1., 5.])\n')
    assert "NaN" not in e.review(lambda x, y: torch.tensor([torch.nan, 2.0, 7.0])).split("\n")[0]


PAIRS = [(name, a, b) for name in NAMES for a, b in combinations(EXERCISES[name].mistakes, 2)
         if spoil_twice(EXERCISES[name].solution, a, b)]


@pytest.mark.parametrize("name", NAMES)
def test_two_mistakes_at_once_are_named_both(name):
    "Unless the two do what one does, or stop."
    e = EXERCISES[name]
    alone = [outcomes(e, e.load(source)) for source in [e.solution, *e.wrong().values()]]
    for a, b in [(a, b) for other, a, b in PAIRS if other == name]:
        f = e.load(spoil_twice(e.solution, a, b))
        found = outcomes(e, f)
        review = e.review(f)
        if any(isinstance(value, Exception) for value in found):
            continue
        same = [values for values in alone if not any(map(lambda g, w: bool(differs(g, w, e.tol)), found, values))]
        if not same:
            assert "cases. Two things at once. " in review, review
            assert review.count(" And: ") == 1 and sum(says in review for says in e.wrong()) >= 2, review


def test_most_pairs_go_together():
    assert len(PAIRS) >= 300


@pytest.mark.parametrize("pieces, both", [
    ((("2 * x", "x ** 2"), ("return ", "return -")), "return -x ** 2"),
    ((("2 * x", "x ** 2"), ("* x", "")), ""),  # one inside the other
    ((("2 *", ""), ("* x", "")), ""),  # they overlap
    ((("x", "y"), ("x", "z")), ""),  # the same piece
    ((("2", "x"), ("x", "2")), "return x * 2"),  # what the first puts in is not changed by the second
])
def test_pieces_are_changed_together_if_they_do_not_touch(pieces, both):
    a, b = (Mistake("Says.", right=right, wrong=wrong) for right, wrong in pieces)
    assert spoil_twice("return 2 * x", a, b) == spoil_twice("return 2 * x", b, a) == both


def test_a_source_may_have_a_piece_changed():
    source, piece = Mistake("Says.", source="return 4 * x"), Mistake("Says.", right="return ", wrong="return -")
    assert spoil_twice("return 2 * x", source, piece) == spoil_twice("return 2 * x", piece, source) == "return -4 * x"
    assert spoil_twice("return 2 * x", source, source) == ""
    assert spoil_twice("return 2 * x", source, Mistake("Says.", right="2", wrong="3")) == ""


# --- arguments


@pytest.mark.parametrize("case, wrote, body", [
    ((torch.ones(2), 3.0), "x", "x.add_(1)"),
    ((torch.ones(2), 3.0), "x", "x[1:] = 7"),
    (({"a": 1.0}, 3.0), "x", "x.clear()"),
    (([1, 2], [3, 4]), "y", "y.append(5)"),
    (([{"beta": 0.1}], None), "x", "x[0]['beta'] = 0.5"),
    (((1, [2]), None), "x", "x[1].pop()"),
    ((None, {"a": [torch.ones(2)]}), "y", "y['a'][0].zero_()"),
])
def test_arguments_are_not_changed(case, wrote, body):
    "The right value, and an argument that is no longer what it was."
    e = tiny('def one(x, y):\n    "x, y -> 1"\n    return 1\n', cases=[case])

    def spoils(x, y):
        exec(body, {"x": x, "y": y})
        return 1

    review = e.review(spoils)
    assert review == (f"not yet. The values are right, but `{wrote}` is changed by one. "
                      "Whoever calls it still needs it: make a new value, or work on a copy.")
    assert tiny(e.solution, cases=e.cases()).review(lambda x, y: 2).count("changed") == 0


def test_all_changed_arguments_are_named():
    e = EXERCISES["write_tokens"]
    right = e.load(e.solution)

    def spoils(ids, lens, done, drawn, end):
        found = right(ids, lens, done, drawn, end)
        for x, value in zip((ids, lens, done), found):
            x.copy_(value)
        return ids, lens, done

    assert "but `ids`, `lens` and `done` are changed by write_tokens." in e.review(spoils)


def test_a_new_value_may_share_memory_with_an_argument():
    e = tiny('def same(x, y):\n    "x, y -> x"\n    return x\n', cases=[(torch.ones(2), [1, [2]])])
    assert e.review(lambda x, y: x).startswith("right")
    assert "`y` is changed" in e.review(lambda x, y: y[1].append(3) or x)


@pytest.mark.parametrize("name", NAMES)
def test_a_checker_answers_soon(name):
    "Whatever it is given: all mistakes and all pairs are tried."
    e = EXERCISES[name]
    for f in (lambda *args: object(), lambda *args: 7.0, e.load(e.solution)):
        start = time.process_time()
        e.review(f)
        assert time.process_time() - start < 2


@pytest.mark.parametrize("text, said", [
    ("ln 2, about 0.693: a coin. And 200: far out", "ln 2, about 0.693: a coin."),
    ("No: 1,303 are needed. Half", "No: 1,303 are needed."),
    ("Nothing", "Nothing"),
    ("", ""),
    ("Why?", "Why?"),
])
def test_first_sentence(text, said):
    assert first_sentence(text) == said


@pytest.mark.parametrize("text, spelled", [
    (r"3, whatever $\beta$ is: $Z = e^{3/\beta}$.", "3, whatever β is: Z = e^(3/β)."),
    (r"$\frac{\beta^2}{2}\,\text{lr}\,|g|^2$", "β²/2 lr |g|²"),
    (r"$\frac{\beta z}{n}$", "(β z)/n"),
    (r"on $\log\pi(y_c)$ as hard", "on log π(y_c) as hard"),
    (r"$\beta\,\text{lr}\sum|g|$", "β lrΣ|g|"),
    ("the word `beta`, **twice**, and *once*", "the word beta, twice, and once"),
    ("a * b * c", "a * b * c"),
])
def test_formulas_are_spelled(text, spelled):
    assert spell(text) == spelled


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
    assert review.startswith("not yet") and len(review) < 5000, review


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


TAKEN_BY_MISTAKE = { # what checkers once let pass
    "choose_beta": ("min(candidates, key=kl.get)", "max(candidates)"),
    "make_reference": ("copy.deepcopy(model).eval()", "type(model)().eval()"),
    "expected_score": ("labels = {i: probs.get(str(i), 0) for i in range(1, 11)}",
                       "labels = {int(k): p for k, p in probs.items() if k.isdigit()}"),
    "read_score": ("(?:/\\s*10)?", "(?:/\\d+)?")}


@pytest.mark.parametrize("name", TAKEN_BY_MISTAKE)
def test_a_wrong_solution_is_not_taken(name):
    e, (right, wrong) = EXERCISES[name], TAKEN_BY_MISTAKE[name]
    assert e.solution.count(right) == 1
    assert e.review(e.load(e.solution.replace(right, wrong))).startswith("not yet")


def test_a_policy_keeps_the_mode_that_it_was_in():
    source = """
def make_reference(model):
    "A model -> a frozen copy in eval mode"
    import copy
    ref = copy.deepcopy(model.eval()).requires_grad_(False)
    model.train()
    return ref
"""
    e = EXERCISES["make_reference"]
    assert e.review(e.load(source)).startswith("not yet")


def test_first_losses_near_ln_2_are_told_apart():
    e = EXERCISES["diagnose"]
    assert e.solution.count('abs(run["first_loss"] - math.log(2)) > .001') == 1
    rounded = e.solution.replace('abs(run["first_loss"] - math.log(2)) > .001', 'round(run["first_loss"], 2) != .69')
    assert e.review(e.load(rounded)).startswith("not yet")


def test_texts_from_numpy_are_texts():
    assert differs(np.array(["a", "b"]), ["a", "b"]) == "" and differs(np.str_("a"), "b") == "values"


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
