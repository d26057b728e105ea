"""Draws the pictures of the documentation.

    python docs/make_figures.py

tiles.png: how the forward pass works, from the block schedule that the library itself follows.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from flash_jax import BlockSchedule, CausalMask, block_schedule

FOLDER = Path(__file__).resolve().parent
FULL, PARTIAL, SKIPPED = "#0072B2", "#E69F00", "#E4E4E4"  # Okabe & Ito: safe for the colour-blind
COLOURS = {
    BlockSchedule.FULL: FULL,
    BlockSchedule.PARTIAL: PARTIAL,
    BlockSchedule.SKIPPED: SKIPPED,
}
INK, SOFT = "#222222", "#777777"
PALE, STATE = "#EFEFEF", "#CFE3EF"

LENGTH, BLOCKS = 1000, (128, 96)
QUERY_TILE = 5
DRAWN_STEP = 3


def box(
    ax: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = ""
) -> None:
    """A rectangle with its lower left corner at (x, y), and text in it."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", lw=1))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center")


def arrow(ax: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """A thin arrow from begin to end."""
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "color": SOFT, "lw": 1.1}
    ax.add_patch(FancyArrowPatch(begin, end, shrinkA=0, shrinkB=0, **style))


def draw_schedule(ax: Axes, schedule: BlockSchedule) -> None:
    """The score matrix in tiles; one row of them is framed."""
    block_q, block_kv = schedule.block_sizes
    for (i, j), kind in np.ndenumerate(schedule.tiles):
        t, s = i * block_q, j * block_kv
        size = min(block_kv, LENGTH - s), min(block_q, LENGTH - t)
        ax.add_patch(Rectangle((s, t), *size, facecolor=COLOURS[kind], edgecolor="white", lw=1))
    ax.plot([0, LENGTH], [0, LENGTH], color=INK, lw=0.9)
    row = Rectangle((0, QUERY_TILE * block_q), LENGTH, block_q, fill=False, edgecolor=INK, lw=1.6)
    row.set_zorder(3)
    ax.add_patch(row)
    ax.set(xlim=(-8, LENGTH + 8), ylim=(LENGTH + 8, -8), aspect="equal")
    ax.set(xticks=[0, LENGTH], yticks=[0, LENGTH])
    ax.set_xlabel("keys", labelpad=-8)
    ax.set_ylabel("queries", labelpad=-18)
    ax.xaxis.label.set_color(SOFT)
    ax.yaxis.label.set_color(SOFT)
    ax.tick_params(length=0, pad=2, labelcolor=SOFT)
    ax.spines[:].set_visible(False)
    handles = [
        Patch(color=colour, label=f"{schedule.counts[name]} {name}")
        for name, colour in [("full", FULL), ("partial", PARTIAL), ("skipped", SKIPPED)]
    ]
    ax.legend(
        handles=handles,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        frameon=False,
        handlelength=0.9,
        handletextpad=0.5,
        columnspacing=1.2,
    )


def draw_scan(ax: Axes, row: np.ndarray) -> None:
    """One query tile meets its key tiles: full ones first, then partial ones."""
    ax.set(xlim=(0, 11), ylim=(0, 10))
    ax.axis("off")
    order = np.argsort(-row, kind="stable")
    visited = int(np.sum(row != BlockSchedule.SKIPPED))
    for j, kind in enumerate(row):
        box(ax, j, 8.3, 1, 1, COLOURS[kind])
    for step, j in enumerate(order[:visited]):
        colour = "white" if row[j] == BlockSchedule.FULL else INK
        ax.text(j + 0.5, 8.8, str(step + 1), color=colour, ha="center", va="center")
    ax.add_patch(Rectangle((0, 8.3), 11, 1, fill=False, edgecolor=INK, lw=1.6))
    ax.text(11, 7.6, "full first, then partial", color=SOFT, ha="right", va="center")

    x = order[DRAWN_STEP] + 0.5  # the arrays of one step, drawn to scale for H = 64
    arrow(ax, (x, 8.2), (x, 6.7))
    box(ax, x - 1.05, 5.3, 2.1, 1.2, PALE, r"$k_j^\top$")
    box(ax, x - 2.65, 2.7, 1.4, 2.4, PALE, "$q_i$")
    box(ax, x - 1.05, 2.7, 2.1, 2.4, FULL)
    ax.text(x, 3.9, "$s$", color="white", ha="center", va="center", fontsize=12)
    box(ax, x + 1.25, 3.3, 1.4, 1.8, PALE, "$v_j$")
    arrow(ax, (x + 3.0, 4.2), (11, 4.2))
    ax.text((x + 14) / 2, 4.65, "absorb", color=SOFT, ha="center", va="center")
    ax.text(0, 1.6, r"$s =$ scale $\cdot\; q_i\, k_j^\top$", va="center")
    ax.text(0, 0.6, r"partial tile: $s = -\infty$ where masked", va="center")


def draw_state(ax: Axes) -> None:
    """The state (m, l, o), the update of one step, and what the last step leaves."""
    ax.set(xlim=(0, 11), ylim=(0, 10))
    ax.axis("off")
    for x, width, name in [(0, 0.45, "m"), (1.2, 0.45, "l"), (2.4, 1.45, "o")]:
        box(ax, x, 6.9, width, 2.4, STATE)
        ax.text(x + width / 2, 6.5, f"${name}$", ha="center", va="center")
    ax.text(4.6, 8.6, "running maximum $m$", color=SOFT, va="center")
    ax.text(4.6, 7.7, "running sums $l$, $o$", color=SOFT, va="center")
    steps = [
        ("$m'$", r"$\max(m,\ $rowmax$\ s)$"),
        (r"$\alpha$", r"$\exp(m - m')$"),
        ("$p$", r"$\exp(s - m')$"),
        ("$l'$", r"$\alpha\, l\, +\, $rowsum$\ p$"),
        ("$o'$", r"$\alpha\, o\, +\, p\, v_j$"),
    ]
    end = [("out", r"$o\, /\, l$"), ("lse", r"$m + \log\, l$")]
    levels = [5.5, 4.7, 3.9, 3.1, 2.3, 1.25, 0.45]
    for y, (left, right) in zip(levels, steps + end, strict=True):
        ax.text(1.3, y, left, ha="right", va="center")
        ax.text(2.0, y, "=", ha="center", va="center")
        ax.text(2.7, y, right, va="center")
    ax.plot([0, 11], [1.8, 1.8], color=SKIPPED, lw=1)
    ax.text(11, 5.5, "per tile", color=SOFT, ha="right", va="center")
    ax.text(11, 1.25, "at the end", color=SOFT, ha="right", va="center")


def tiles(path: Path) -> None:
    """How it works, in one picture: the tiles, the scan, the state."""
    schedule = block_schedule(CausalMask(), LENGTH, LENGTH, BLOCKS)
    mpl.rcParams.update({"font.size": 9.5, "text.color": INK, "mathtext.fontset": "dejavusans"})
    figure = plt.figure(figsize=(9, 3.5), facecolor="white")
    panels = [
        (figure.add_axes((0.05, 0.16, 0.28, 0.70)), "1  Scores in tiles, never stored"),
        (figure.add_axes((0.375, 0.07, 0.29, 0.79)), "2  A query tile scans its key tiles"),
        (figure.add_axes((0.71, 0.07, 0.28, 0.79)), "3  Each tile updates a small state"),
    ]
    for ax, title in panels:
        left = ax.get_position().x0
        figure.text(left, 0.92, title, weight="bold", va="center")
    draw_schedule(panels[0][0], schedule)
    draw_scan(panels[1][0], schedule.tiles[QUERY_TILE])
    draw_state(panels[2][0])
    figure.savefig(path, dpi=200)
    plt.close(figure)


if __name__ == "__main__":
    tiles(FOLDER / "tiles.png")
