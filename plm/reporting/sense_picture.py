"""The picture of a word's occurrences: a point each, coloured by cluster, with some contexts written beside it."""

import textwrap
from itertools import zip_longest
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas

from plm.analysis.senses import name
from plm.reporting.plots import COLOURS, FAINT, GRID, INK, MARKERS, STYLE

LABELS = 12  # contexts in all, half of them on each side
WIDTH = 34  # characters of a context's side
LINE = 0.118  # of the axes' height, what a label with its space takes


def draw(found: dict, folder: Path) -> None:
    """senses.png and senses.svg. Contexts stand in columns left and right of the points, so that none covers another;
    a thin line leads from each to its point."""
    points = np.array([row["point"] for row in found["occurrences"]], float)
    labels = np.array([row["cluster"] for row in found["occurrences"]])
    with mpl.rc_context(STYLE | {"axes.grid": False, "svg.fonttype": "none"}):
        canvas = Canvas(figsize=(11, 5.6), dpi=110)
        axis = canvas.add_axes((0.31, 0.09, 0.38, 0.76))
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(True)
            spine.set_color(GRID)
        for label, one in enumerate(found["clusters"]):
            colour, marker = _look(label)
            telling = ", ".join(one["telling_words"][:4])
            axis.scatter(
                *points[labels == label].T,
                s=26,
                color=colour,
                marker=marker,
                alpha=0.7,
                linewidths=0,
                label=f"{name(label)} ({one['size']})" + (f": {telling}" if telling else ""),
            )
        axis.margins(0.06)
        axis.set_xlabel(found["axes"], fontsize=8.5, color=FAINT)
        _write_contexts(canvas, axis, found, points)
        where = f"layer {found['layer']}" if found["layer"] else "the embedding"
        canvas.text(0.02, 0.955, f"{found['word']}: {len(points):,} occurrences, {where}", fontsize=12, color=INK)
        columns = 2 if len(found["clusters"]) > 3 else len(found["clusters"])
        canvas.legend(
            loc="upper left", bbox_to_anchor=(0.012, 0.945), ncols=columns, fontsize=8.5, handletextpad=0.2, borderpad=0
        )
        for suffix, options in (("png", {"dpi": 110}), ("svg", {"metadata": {"Date": None}})):
            canvas.savefig(folder / f"senses.{suffix}", format=suffix, facecolor="white", **options)


def _look(label: int) -> tuple[str, str]:
    return COLOURS[label % len(COLOURS)], MARKERS[label % len(MARKERS)]


def _write_contexts(canvas: Canvas, axis, found: dict, points: np.ndarray) -> None:
    """Occurrences of each cluster in turn; the left half of their points is written on the left."""
    by_cluster = [_spread_out(found, one["central"], points) for one in found["clusters"]]
    chosen = [index for turn in zip_longest(*by_cluster) for index in turn if index is not None][:LABELS]
    axis.autoscale_view()
    height = dict(
        zip(chosen, (axis.transData + axis.transAxes.inverted()).transform(points[chosen])[:, 1], strict=True)
    )
    by_x = sorted(chosen, key=lambda index: points[index][0])
    for indices, left in ((by_x[: len(by_x) // 2], True), (by_x[len(by_x) // 2 :], False)):
        indices = sorted(indices, key=lambda index: -height[index])
        for index, y in zip(indices, _apart([height[index] for index in indices]), strict=True):
            row = found["occurrences"][index]
            colour, _ = _look(row["cluster"])
            before, word, after = row["context"]
            axis.annotate(
                "\n".join(textwrap.wrap(f"{_end(before)} [{word}] {_begin(after)}".strip(), 44)[:2]),
                points[index],
                (-0.05 if left else 1.05, y),
                textcoords="axes fraction",
                ha="right" if left else "left",
                va="center",
                fontsize=8,
                color=INK,
                linespacing=1.15,
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "linewidth": 0.8,
                    "alpha": 0.8,
                    "shrinkA": 3,
                    "shrinkB": 2,
                    "relpos": (1.0 if left else 0.0, 0.5),
                },
            )


def _spread_out(found: dict, central: list[int], points: np.ndarray) -> list[int]:
    """Members of a cluster: the most central one, then each time the one farthest from those before it, among the
    more central four fifths and with contexts that differ."""
    contexts: dict[tuple, int] = {}
    for index in central[: max(1, len(central) * 4 // 5)]:
        contexts.setdefault(tuple(found["occurrences"][index]["context"]), index)
    members = np.array(list(contexts.values()))
    chosen = [0]
    distance = np.linalg.norm(points[members] - points[members[0]], axis=1)
    while len(chosen) < min(LABELS, len(members)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points[members] - points[members[chosen[-1]]], axis=1))
    return members[chosen].tolist()


def _end(text: str) -> str:
    return text if len(text) <= WIDTH else "…" + text[-WIDTH:].partition(" ")[2]


def _begin(text: str) -> str:
    return text if len(text) <= WIDTH else text[:WIDTH].rpartition(" ")[0] + "…"


def _apart(heights: list[float]) -> np.ndarray:
    """Heights from top to bottom, moved as little as needed to be `LINE` apart and inside the picture."""
    places = np.array(heights, float)
    for _ in range(200):
        gaps = places[:-1] - places[1:]
        for i in np.flatnonzero(gaps < LINE - 1e-6):
            push = (LINE - gaps[i]) / 2
            places[i] += push
            places[i + 1] -= push
        if len(places):
            places += min(0.0, 0.98 - places[0]) + max(0.0, 0.02 - places[-1])
    return places
