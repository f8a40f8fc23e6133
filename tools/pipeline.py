"""The picture of the whole pipeline, once for each step with that step lit, and once with none: images/pipeline*.svg.

    pipeline.py           writes them
    pipeline.py --check   says which are not what this would write
"""
import sys
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parent.parent / "images"
STEPS = {  # name: title, what stands in the box, the file that comes out
    "prompts": ("prompts", ["2,048 questions"], "prompts.jsonl"),
    "answers": ("four answers", ["T = 0.7, 0.9, 1.1, 1.3"], "responses.jsonl"),
    "scores": ("scores", ["a judge: 1 to 10"], "samples.jsonl"),
    "pairs": ("pairs", ["best and worst,", "if far enough apart"], "pairs.jsonl"),
    "training": ("training", ["DPO against", "a frozen copy"], "dpo.pt"),
    "judging": ("judging", ["before and after,", "in both orders"], "verdicts.jsonl"),
}
WIDTH, HEIGHT = 124, 74  # of a box
GAP, EDGE = 14, 12  # between boxes, around all
PAPER, INK, QUIET = "#ffffff", "#222222", "#666666"
LIT, PLAIN = "#ffd27d", "#f2f2f2"
FONT = "font-family='Helvetica, Arial, sans-serif' text-anchor='middle'"


def text(x: float, y: float, words: str, size: int, color: str = INK, weight: str = "normal") -> str:
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{color}' font-weight='{weight}'>{escape(words)}</text>"


def box(i: int, name: str, lit: bool) -> list[str]:
    "A step: its title, what happens, and under it the file that it leaves."
    title, lines, file = STEPS[name]
    x = EDGE + i * (WIDTH + GAP)
    middle = x + WIDTH / 2
    frame = (f"<rect x='{x}' y='{EDGE}' width='{WIDTH}' height='{HEIGHT}' rx='6' fill='{LIT if lit else PLAIN}' "
             f"stroke='{INK if lit else QUIET}' stroke-width='{2 if lit else 1}'/>")
    found = [frame, text(middle, EDGE + 24, title, 15, weight="bold" if lit else "normal")]
    found += [text(middle, EDGE + 44 + 15 * n, line, 11, QUIET if not lit else INK) for n, line in enumerate(lines)]
    found.append(text(middle, EDGE + HEIGHT + 18, file, 11, QUIET))
    if i:
        y = EDGE + HEIGHT / 2
        found.append(f"<path d='M{x - GAP + 2} {y:g}h{GAP - 5}m-4 -4l4 4l-4 4' fill='none' stroke='{INK}'/>")
    return found


def picture(lit: str = "") -> str:
    "The SVG, on paper of its own, so that it is read in a dark theme too."
    width, height = 2 * EDGE + len(STEPS) * (WIDTH + GAP) - GAP, 2 * EDGE + HEIGHT + 20
    words = "The pipeline: " + ", ".join(title for title, _, _ in STEPS.values()) + (f"; lit: {lit}" if lit else "")
    parts = [part for i, name in enumerate(STEPS) for part in box(i, name, name == lit)]
    return "\n".join([
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"role='img' aria-label='{words}' {FONT}>",
        f"<rect width='{width}' height='{height}' rx='8' fill='{PAPER}'/>", *parts, "</svg>", ""])


def pictures() -> dict[Path, str]:
    found = {IMAGES / f"pipeline_{name}.svg": picture(name) for name in STEPS}
    return {IMAGES / "pipeline.svg": picture()} | found


def main(args: list[str]) -> str | None:
    stale = [path for path, svg in pictures().items() if not path.exists() or path.read_text("utf-8") != svg]
    if "--check" in args:
        return "\n".join(f"{path.name}: run `python tools/pipeline.py`" for path in stale) or None
    for path, svg in pictures().items():
        path.write_text(svg, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
