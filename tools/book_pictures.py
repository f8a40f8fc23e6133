"""The book's icon and its social picture, docs/static/icon.svg and social.png: the pull of a pair over its margin.

    book_pictures.py    writes both, from the margins of 10,000 real pairs that ship with the package
"""
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "docs/static"
BLUE, RED, INK = "#0072B2", "#D55E00", "#4d4d4d"
BETAS = {0.1: ":", 0.5: "--", 1.25: "-"}
WORDS = "Learn Direct Preference\nOptimization by doing\nall of it: sample, judge,\npair, train, judge again."


def pull(z, beta: float):
    "The share of its full pull that a pair with margin z still has"
    return (1 - np.tanh(beta * z / 2)) / 2


def icon() -> str:
    "The curve of the pull, and one pair on it."
    x = np.linspace(8, 56, 25)
    points = " ".join(f"{a:.0f},{12 + 40 * (1 - pull((a - 32) / 5, 1)):.1f}" for a in x)
    at = 24, 12 + 40 * (1 - pull(-8 / 5, 1))
    return (f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 64 64'><rect width='64' height='64' rx='12' "
            f"fill='{BLUE}'/><polyline points='{points}' fill='none' stroke='#fff' stroke-width='5' "
            f"stroke-linecap='round'/><circle cx='{at[0]}' cy='{at[1]:.1f}' r='7' fill='{RED}' stroke='#fff' "
            "stroke-width='3'/></svg>\n")


def social(z) -> Figure:
    "1200 x 630 pixels: the name, what it is, and the figure of lesson 02."
    fig = Figure(figsize=(12, 6.3), dpi=100)
    fig.text(0.06, 0.76, "wikidpo", fontsize=58, weight="bold", color=BLUE)
    fig.text(0.06, 0.28, WORDS, fontsize=25, color=INK, linespacing=1.5)
    ax = fig.add_axes((0.52, 0.17, 0.43, 0.7))
    ax.hist(z, 60, color=INK, alpha=0.25, weights=np.full(len(z), 9 / len(z)))
    grid = np.linspace(z.min(), z.max(), 300)
    for beta, dash in BETAS.items():
        ax.plot(grid, pull(grid, beta), dash, color=RED, lw=4, label=f"β = {beta:g}")
    ax.set(xlim=(z.min(), z.max()), ylim=(0, 1.05))
    ax.set_xlabel("margin of a pair (nats)", fontsize=19, color=INK)
    ax.set_title("the pull of a pair on the training", fontsize=20, color=INK, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=15, labelcolor=INK)
    ax.legend(frameon=False, fontsize=19, labelcolor=INK)
    return fig


if __name__ == "__main__":
    STATIC.mkdir(parents=True, exist_ok=True)
    (STATIC / "icon.svg").write_text(icon(), encoding="utf-8")
    margins = np.load(ROOT / "wikidpo/data/miniwiki/margins.npy")
    social(margins).savefig(STATIC / "social.png", metadata={"Software": None})
