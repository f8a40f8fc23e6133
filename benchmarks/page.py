"README.md, from results.json"
from contestants import CONTESTANTS
from targets import number

INTRO = """\
<!-- Written by benchmarks/bench.py: run `make bench`. -->

# Benchmarks

`make bench` measures all of this again, `make bench ARGS="train"` some rows. Every repeat, and what each contestant \
was told to do, is in [results.json](results.json).

In each table all contestants do the same work, each in a process and an environment of its own, one measurement each \
in turn; medians are compared. "Of the matrix rate" counts the operations of the work as described (all weights and \
the attention, for every token made or trained on; in training forward and backward), and divides by the best rate of \
the product in the first table, in bfloat16 where the processor has units for it: what a contestant manages to leave \
out counts as speed. Where a target is missed, the line says what the necessary products, or the necessary reading of \
weights, keys and values, whichever takes longer, would allow at the best rates of the first two tables, if these were \
measured on the same day. vLLM runs in its worker's process, without the memory allocator that it recommends to \
preload. Loading, compiling and warming up stand in the last column and count for nobody.
"""
ELSEWHERE = ("Measured elsewhere, by `bench.py` with the rows' names and `--out`: on a GPU ([h100](h100/README.md)); "
             "on two cores with AMX, which multiply in bfloat16 several times as fast as in float32 "
             "([xeon](xeon/README.md)); on two cores without units for bfloat16, all of it in float32 "
             "([avx2](avx2/README.md)).")
COLUMNS = "lowest to highest | this project is faster by | of the matrix rate | to get ready"
FACTS = ("rows_at_once", "pairs_a_forward", "tokens_an_answer", "mine_s", "train_s", "judge_s", "reference_s", "growth",
         "peak_gb", "estimated") # shown beside the contestant's name


def spaced(key): return key.replace("_", " ")


def facts(contestant):
    "What else was measured: the facts, and the shares of a profile"
    shown = [(spaced(k), contestant[k]) for k in contestant if k in FACTS]
    words = [f"{k} {number(v) if isinstance(v, float) else v}" for k, v in shown]
    shares = [f"{k.removesuffix(' share')} {v:.0%}" for k, v in contestant.items() if k.endswith(" share")]
    return "".join(f"; {w}" for w in words + shares)


def line(name, contestant, result):
    "A contestant in its table"
    head = f"| {CONTESTANTS[name].words}{facts(contestant)} | "
    if "value" not in contestant: return f"{head}did not run: {contestant['did_not_run']} | | | | |"
    value, low, high = (number(contestant[k]) for k in ("value", "low", "high"))
    ratio = result.get("times_as_fast_as", {}).get(name)
    share = result.get("of_peak", {}).get(name)
    cells = [value, f"{low} to {high}", f"{ratio:.2f} ×" if ratio else "", f"{share:.0%}" if share else "",
             f"{contestant['ready_s']:.0f} s"]
    return f"{head}{' | '.join(cells)} |"


def section(name, result):
    "The lines of a row: its table, and its targets"
    lines = [f"## {name}: {result['what']}", "", f"| | {result['unit']}, median | {COLUMNS} |", "|---" * 6 + "|"]
    lines += [line(who, c, result) for who, c in result["contestants"].items()]
    if "with_reference" in result:
        ratios = [f"{v:.2f} × {CONTESTANTS[who].words}" for who, v in result["with_reference"].items()]
        lines += ["", f"With the reference's own pass counted, as in a first epoch: {', '.join(ratios)}."]
    notes = [f"Measured {result['measured']}." if "measured" in result else "", result.get("note", "")]
    lines += ["", *[f"Target: {words}: {answer}." for words, answer in result["verdicts"]], ""]
    lines += [" ".join(filter(None, notes)), ""]
    return lines


def page(results, at_home=True): # whether it stands in benchmarks/
    "The whole of README.md"
    machine = [f"{spaced(k)} {v}" for k, v in results["machine"].items() if v is not None]
    lines = [INTRO, f"Machine: {', '.join(machine)}.", ""]
    if at_home: lines += [ELSEWHERE, ""]
    for name, result in results["rows"].items(): lines += section(name, result)
    return "\n".join(lines).replace("\n\n\n", "\n\n")
