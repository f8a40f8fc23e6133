"The page of a machine: README.md, from results.json"
from contestants import CONTESTANTS
from targets import number

WRITTEN = "<!-- Written by benchmarks/bench.py: run `make bench`. -->"
COLUMNS = "lowest to highest | this project is faster by | of the matrix rate | to get ready"
FACTS = ("rows_at_once", "pairs_a_forward", "tokens_an_answer", "mine_s", "train_s", "judge_s", "reference_s", "growth",
         "peak_gb", "estimated") # shown beside the contestant's name


def spaced(key): return key.replace("_", " ")


def shares(contestant):
    "Those of a profile, in words"
    return [f"{k.removesuffix(' share')} {v:.0%}" for k, v in contestant.items() if k.endswith(" share")]


def facts(contestant):
    "What else was measured: the facts, and the shares of a profile"
    shown = [(spaced(k), contestant[k]) for k in contestant if k in FACTS]
    words = [f"{k} {number(v) if isinstance(v, float) else v}" for k, v in shown]
    return "".join(f"; {w}" for w in words + shares(contestant))


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


def title(machine):
    "What a machine's page is called"
    return (machine["gpu"] or machine["cpu"]) + (", in float32" if "bf16" in machine else "")


def page(results, first): # the way to the first page
    "The whole of a machine's README.md"
    machine = [f"{spaced(k)} {v}" for k, v in results["machine"].items() if v is not None]
    lines = [WRITTEN, "", f"# Benchmarks: {title(results['machine'])}", ""]
    lines += [f"[The first page]({first}) says how this is measured, and how to read it.", ""]
    lines += [f"Machine: {', '.join(machine)}.", ""]
    for name, result in results["rows"].items(): lines += section(name, result)
    return "\n".join(lines).replace("\n\n\n", "\n\n")
