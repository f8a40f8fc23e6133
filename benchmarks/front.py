"The first page: benchmarks/README.md, from the results of all machines that have a folder"
import json

from contestants import HERE
from page import shares, WRITTEN
from rows import table
from wikidpo.run.folder import write_atomic

MACHINES = { # folder: its column's head, and the machine
    "epyc": ("EPYC", "two cores of an AMD EPYC with units for bfloat16"),
    "xeon": ("Xeon", "two cores of an Intel Xeon with AMX, which multiply in bfloat16 several times as fast as in "
             "float32"),
    "avx2": ("EPYC, float32", "two cores of an AMD EPYC without units for bfloat16: all of it in float32"),
    "h100": ("H100", "an NVIDIA H100"),
}
FRONT = f"""\
{WRITTEN}

# Benchmarks

`make bench` measures all of this, `make bench ARGS="train"` some rows; they go to `runs/benchmarks`, or where `--out` \
says. The folders here are what was measured on four machines: their pages have every contestant and the date of each \
row, their `results.json` every repeat and what each contestant was told to do.

In each row all contestants do the same work, each in a process and an environment of its own, one measurement each \
in turn; medians are compared. "Of the matrix rate" counts the operations of the work as described (all weights and \
the attention, for every token made or trained on; in training forward and backward), and divides by the best rate of \
the product in the page's first table, in bfloat16 where the processor has units for it: what a contestant manages to \
leave out counts as speed. Where a target is missed, "at most" is what the necessary products, or the necessary \
reading of weights, keys and values, whichever takes longer, would allow at the machine's best rates, if these were \
measured on the same day. vLLM runs in its worker's process, without the memory allocator that it recommends to \
preload. Loading, compiling and warming up stand in a column of their own and count for nobody.
"""
LEGEND = """\
✓ reached, ✗ missed; in brackets what the machine allows at most, where that is known; empty: not measured there. \
\\* measured before the row was mended, as the machine's page says."""
MISSES = """\
## Why a target is missed

**1.5 × vLLM.** Both make the same products. On both EPYCs these are nearly three quarters of the time \
(`mine-smollm2-profile`): if all the rest took none, the target would just be reached in float32, and just be missed \
in bfloat16. On the Xeon they are little more than half of it. Much of the rest is attention, norms and what lies \
between them; with units for bfloat16 each block is compiled already, a prompt is read once for its four answers, and \
what all prompts begin with once for all.

**30 × the original lesson's way, for MiniWiki.** It is reached on one EPYC. On the other it was missed by less than \
one repeat differs from the next (its page has the lowest and the highest), before the weights of a small model were \
packed for sampling. More than a third of our time is linear layers, four tenths and more are attention, norms and \
what lies between them (`sample-miniwiki-profile`).

**Half the time of the real model's lesson.** It takes four fifths of what it took where the processor has units for \
bfloat16, three quarters in float32. Products are most of it: of mining (`mine-smollm2-profile`) and of a step of \
training (`step-smollm2-profile`). By these shares it would still be more than half if all else took no time. What \
was saved is a quarter of mining and of judging and a seventh of training; in float32 a third of mining, three tenths \
of judging and an eighth of training.

**3 × TRL, for a step of the real model.** It is reached with units for bfloat16, and missed in float32. There \
products are three quarters of our step (`step-smollm2-profile`): 3 would be reached if what lies between them took \
well under half of its time.

**MiniWiki's whole lesson.** Its phases stand on the machines' pages: mining and training take about three quarters. \
More than half of the training is products in float32 (`epoch-miniwiki-profile`). Training takes hardly less than \
before the work on speed on one EPYC, a tenth longer on the other; PyTorch's compiler, which was imported when a \
command starts, is now imported when a training does, and counts there. Of mining a third is saved on the first, a \
quarter on the other.

**Large runs.** The limits in seconds were set before every line was checked against a schema. Growth and memory are \
within theirs.

**An epoch on a GPU.** Little more than a third of its time is products; the rest is copies and the many small \
operations between them.

## Where the time goes"""
MANY = 4 # targets of a row; of more only how many are reached


def measured():
    "{folder: its results}, as they are committed"
    return {folder: json.loads((HERE/folder/"results.json").read_text()) for folder in MACHINES}


def mark(result, target):
    "The verdict on a target as the first page shows it, by the words of the machine's page"
    answer = dict(result["verdicts"]).get(target, "")
    if ": " not in answer: return "" # it did not run
    found, *limit = answer.split("; ")
    state, value = found.split(": ")
    bound = f" ({limit[0].split()[-1]})" if limit else ""
    return f"{value} {'✓' if state == 'reached' else '✗'}{bound}" + (r" \*" if "note" in result else "")


def together(verdicts):
    "How many of many targets are reached; nothing where none was measured"
    if not verdicts: return ""
    reached = sum(answer.startswith("reached") for _, answer in verdicts)
    return f"{reached} of {len(verdicts)} {'✓' if reached == len(verdicts) else '✗'}"


def targets(rows, machines):
    "The lines of the table: a target each, a column for each machine; of many targets of a row only how many"
    heads = [f"[{MACHINES[folder][0]}]({folder}/README.md)" for folder in machines]
    lines = [f"| | target | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for name, row in rows.items():
        found = [results["rows"].get(name, {"verdicts": []}) for results in machines.values()]
        if len(row.targets) > MANY:
            cells = [together(r["verdicts"]) for r in found]
            lines.append(f"| {row.brief} (`{name}`) | {len(row.targets)} limits | {' | '.join(cells)} |")
            continue
        for target in row.targets:
            words = target.words(row)
            lines.append(f"| {row.brief} (`{name}`) | {words} | {' | '.join(mark(r, words) for r in found)} |")
    return lines


def profiles(rows, machines):
    "The lines of the table: a row that is measured part by part on one machine each, and the shares of the parts"
    lines = ["| row | machine | |", "|---|---|---|"]
    for name in rows:
        for folder, results in machines.items():
            profile = results["rows"].get(name, {"contestants": {}})["contestants"].get("profile")
            if profile: lines.append(f"| `{name}` | {MACHINES[folder][0]} | {'; '.join(shares(profile))} |")
    return lines


def front(rows, machines): # {row: Row}, {folder: its results}
    "The whole of the first page"
    lines = [FRONT, "## Targets", "", *targets(rows, machines), "", LEGEND, ""]
    lines += [f"- [{head}]({folder}/README.md): {words}" for folder, (head, words) in MACHINES.items()]
    lines += ["", MISSES, "", *profiles(rows, machines)]
    return "\n".join(lines) + "\n"


def write_front():
    write_atomic(HERE/"README.md", front(table(), measured()))
