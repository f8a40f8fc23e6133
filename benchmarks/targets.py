"What a row is to reach, and how near it came"
from dataclasses import dataclass

from contestants import CONTESTANTS

BYTES = {"bfloat16": 2, "float32": 4} # of a number


def number(x):
    "Three digits, or all of those before the point"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def whole(contestant):
    "Seconds of a measurement, the reference's pass included where it was apart; None if there are none"
    if "seconds" not in contestant: return None
    return contestant["seconds"] + contestant.get("reference_s", 0.)


@dataclass(frozen=True)
class Target:
    "At least `goal`, or at most; of the row's first contestant, or of the one that is named"
    goal: float
    who: str | None = None
    at_most = False

    def look(self, row, contestants):
        "The numbers of the contestant that is to reach it"
        return contestants[self.who or row.who[0]]

    def show(self, reached): return number(reached)

    def limit(self, contestants, compared):
        "What this machine allows at most, where that is known"
        return None


class Rate(Target):
    "So many units a second"
    def words(self, row): return f"{self.goal:,} {row.unit}"
    def reached(self, row, contestants, compared): return self.look(row, contestants).get("value")


class Seconds(Target):
    "The whole work in so many seconds"
    at_most = True

    def words(self, row):
        return f"{self.goal} s" + (f" for {CONTESTANTS[self.who].words}" if self.who else "")

    def reached(self, row, contestants, compared):
        found = self.look(row, contestants)
        return found.get("value") if row.unit == "s" else whole(found)


class PartOfTime(Target):
    "At most this part of the seconds that `who` takes, in a row whose unit is the second"
    at_most = True
    def words(self, row): return f"{self.goal} × the time of {CONTESTANTS[self.who].words}"

    def reached(self, row, contestants, compared):
        first, other = (contestants.get(name, {}).get("value") for name in (row.who[0], self.who))
        return first and other and first / other


class PeakMemory(Target):
    "Under so many GB of memory, the GPU's where the work runs there"
    at_most = True

    def words(self, row):
        return f"under {self.goal} GB" + (f" for {CONTESTANTS[self.who].words}" if self.who else "")

    def reached(self, row, contestants, compared): return self.look(row, contestants).get("peak_gb")


class Growth(Target):
    "At most so many times the seconds for ten times the work: ten is linear, a hundred is the square"
    at_most = True
    def words(self, row): return f"at most {self.goal} × for ten times the prompts for {CONTESTANTS[self.who].words}"
    def reached(self, row, contestants, compared): return self.look(row, contestants).get("growth")


class ShareOfPeak(Target):
    "This share of the rate at which the machine multiplies matrices"
    def words(self, row): return f"{self.goal:.0%} of the matrix rate"
    def show(self, reached): return f"{reached:.0%}"
    def reached(self, row, contestants, compared): return compared.get("of_peak", {}).get(self.who or row.who[0])


class TimesAsFast(Target):
    "So many times as fast as `who`"
    def words(self, row): return f"{self.goal} × {CONTESTANTS[self.who].words}"
    def reached(self, row, contestants, compared): return compared.get("times_as_fast_as", {}).get(self.who)

    def limit(self, contestants, compared):
        other = contestants[self.who]
        if "limit" not in compared or "value" not in other: return None
        return compared["limit"] / other["value"]


def verdict(target, row, contestants, compared):
    "Reached or missed, with the number, in words"
    reached = target.reached(row, contestants, compared)
    if reached is None: return "did not run"
    met = reached <= target.goal if target.at_most else reached >= target.goal
    words = f"{'reached' if met else 'missed'}: {target.show(reached)}"
    limit = None if met else target.limit(contestants, compared)
    return words + (f"; at this machine's measured rates at most {number(limit)}" if limit else "")


def compare(row, found, peak, memory=None):
    """What the contestants' numbers say: ratios, shares of the matrix rate, and what this machine allows, the
    products at its matrix rate (`peak`, GFLOP/s) and the reading at its memory's (`memory`, 10^9 numbers a second)."""
    first, out = found[row.who[0]], {}
    if "value" not in first: return out
    ran = {name: c for name, c in found.items() if "value" in c}
    others = {name: c for name, c in ran.items() if name != "ours"}
    if len(row.who) > 1 and row.who[0] == "ours":
        out["times_as_fast_as"] = {name: first["value"] / c["value"] for name, c in others.items()}
        if "reference_s" in first:
            out["with_reference"] = {name: whole(c) / whole(first) for name, c in others.items()}
    if row.flop and peak:
        out["of_peak"] = {name: c["value"] * row.flop / 1e9 / peak for name, c in ran.items()}
    if row.least and peak and (memory or not row.reads):
        out["limit"] = 1 / max(row.least / 1e9 / peak, row.reads / 1e9 / (memory or 1)) # they can run at once
    return out


def best(rows, name, who, result):
    """The best rate of a yardstick, for a row that was measured on the same day: that of another day may be twice as
    fast. Other tenants of a shared machine take from it, so its best is the machine's"""
    yardstick = rows.get(name, {})
    if yardstick.get("measured", "")[:10] != result.get("measured", "")[:10]: return None
    return yardstick.get("contestants", {}).get(who, {}).get("high")


def judge(rows, known):
    "Compare the contestants of all rows and look at the targets, by the machine's rates of the same day"
    for name, result in rows.items():
        row, contestants = known[name], result["contestants"]
        precision = result.get("task", {}).get("dtype", "bfloat16")
        peak = best(rows, "gpu-product" if name.startswith("gpu-") else "product", precision, result)
        memory = best(rows, "memory", "memory", result)
        compared = compare(row, contestants, peak, memory and memory / BYTES[precision])
        for key in ("times_as_fast_as", "with_reference", "of_peak", "limit", "note"): result.pop(key, None)
        if row.changed and result.get("measured", "") < row.changed[0]:
            compared["note"] = f"Measured before {row.changed[0]}, when the row was mended: {row.changed[1]}."
        verdicts = [(t.words(row), verdict(t, row, contestants, compared)) for t in row.targets]
        result |= compared | {"verdicts": verdicts}
