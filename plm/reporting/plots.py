"""Figures as inline SVG: Okabe-Ito colours with a marker each, text as text, ink that follows the page's theme.

Matplotlib draws with fixed colours; `_svg` then turns each into `var(--name, colour)`, so that the page can give the
same figure darker or lighter ink, while a downloaded figure, which has no page around it, keeps the fixed colours.
"""

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from plm.reporting.runs import Arm, Run, is_finite
from plm.reporting.studies import Drawing, Results
from plm.reporting.tables import Panel, ngram_name, quantity, sense_gain

INK, FAINT, GRID = "#1b1f24", "#5b6570", "#d9dee3"
# Okabe & Ito (2008), without yellow, which is lost on white; black comes last.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# What a curve is drawn against: an axis of `Run.at`, and its label.
AGAINST = (
    ("step", "steps"),
    ("tokens", "tokens of text read"),
    ("flops", "training FLOPs by formula"),
    ("seconds", "wall time"),
)
DASHES = ("-", "--", "-.", ":")
NAMED_BEST = 14  # more arms than this share colours by architecture and objective

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "plm",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Figure:
    """A figure for the page: `title` says what is seen, `alt` is for those who do not see it."""

    name: str
    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Look:
    """How one arm is drawn in every figure."""

    label: str
    colour: str
    marker: str
    dash: str


def looks(all_arms: Sequence[Arm]) -> dict[str, Look]:
    """Arm label -> look; with very many arms one look (and legend entry) for each architecture x objective."""

    def look(label: str, index: int) -> Look:
        n = len(COLOURS)
        return Look(label, COLOURS[index % n], MARKERS[index % n], DASHES[index // n % len(DASHES)])

    if len(all_arms) <= NAMED_BEST:
        return {arm.label: look(arm.label, index) for index, arm in enumerate(all_arms)}
    families = list(dict.fromkeys(arm.first.model for arm in all_arms))
    return {arm.label: look(arm.first.model, families.index(arm.first.model)) for arm in all_arms}


def curves(panel: Panel, look: dict[str, Look]) -> Figure:
    """Held-out loss of one panel against steps, tokens, training FLOPs and wall time, with the n-grams as levels."""
    n_lines = sum(len(arm.runs) for arm in panel.arms)
    n_points = 200 if n_lines <= 20 else 60
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(10, 6))
        axes = canvas.subplots(2, 2, sharey=True)
        by_axis = dict(zip([name for name, _ in AGAINST], axes.flat, strict=True))
        seconds, unit = _time_scale(max((run.seconds or 0 for arm in panel.arms for run in arm.runs), default=0))
        scales = {"seconds": seconds}
        values, ends = [], []
        drawn: dict[str, object] = {}
        has_train = False
        for arm in panel.arms:
            style = look[arm.label]
            for run in arm.runs:
                key = panel.measure.value_key(run)
                if key is None:
                    continue
                steps, held_out = run.series(key)
                values.append(held_out)
                ends.append(held_out[-1])
                train_steps, train = ([], []) if n_lines > 8 else run.series(key.replace("eval/", "train/"))
                has_train |= len(train_steps) > 3
                for name, axis in by_axis.items():
                    scale = scales.get(name, 1)
                    if len(train_steps):
                        x, y = _binned(run, name, train_steps, train, n_points)
                        if x is not None:
                            axis.plot(x / scale, y, color=style.colour, linewidth=0.8, alpha=0.45)
                    kept = _spread(len(steps), n_points)
                    x = run.at(name, steps[kept])
                    if x is None:
                        continue
                    (line,) = axis.plot(
                        x / scale,
                        held_out[kept],
                        color=style.colour,
                        linestyle=style.dash,
                        marker=style.marker if len(kept) <= 40 and n_lines <= 20 else None,
                        markevery=max(1, len(kept) // 8),
                        alpha=1.0 if n_lines <= 20 else 0.6,
                        linewidth=1.7 if n_lines <= 20 else 0.9,
                    )
                    drawn.setdefault(style.label, line)
        low, high = _limits(values, ends, panel.baselines)
        for (name, label), axis in zip(AGAINST, axes.flat, strict=True):
            axis.set_xlabel(f"{label} ({unit})" if name == "seconds" else label)
            axis.set_ylim(low, high)
            axis.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: quantity(x) if x else "0"))
            if axis.lines:
                axis.set_xlim(left=0)
            else:
                axis.set_xticks([])
                axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color=FAINT)
            for value in panel.baselines.values():
                if low <= value <= high:
                    axis.axhline(value, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)))
        for left, right in axes:
            left.set_ylabel(panel.measure.unit)
            _level_names(right, panel.baselines, low, high)
        _legend(canvas, drawn)
        svg = _svg(canvas)
    note = "Lines with markers: held-out text. " if n_lines <= 20 else "Held-out text; one line a run. "
    if has_train:
        note += "Thin lines: training loss, with dropout where the model has it, averaged over short stretches. "
    if values and max(map(np.max, values)) > high:
        note += "The first steps lie above the axis. "
    if panel.baselines:
        note += "Dotted: n-gram models of the same ids on the same held-out text."
    return Figure(f"curves_{panel.name}", panel.finding, svg, note.strip())


def senses_by_layer(all_arms: Sequence[Arm], look: dict[str, Look]) -> Figure | None:
    """AUC of the pseudo-words by layer: trained, random init, and the static vector at one half."""
    shown = [arm for arm in all_arms if arm.first.senses.get("layers")]
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(10, 3.4))
        axes = canvas.subplots(1, 2, sharey=True)
        drawn: dict[str, object] = {}
        every_name = [arm.first.senses["layers"] for arm in shown]
        names = max(every_name, key=len)
        if len(names) > 7 or any(other != names[: len(other)] for other in every_name):
            names = [str(number) for number in range(len(names))]
        for offset, arm in enumerate(shown):
            style = look[arm.label]
            layers = arm.first.senses["layers"]
            for axis, measure in zip(axes, ("auc", "nearest_neighbour"), strict=True):
                for variant in ("random_init", "trained"):
                    rows = [arm.first.result("pseudo_words", f"{variant}/{measure}/{layer}") for layer in layers]
                    if not all(row and is_finite(row["value"]) for row in rows):
                        continue
                    x = np.arange(len(layers)) + (offset - (len(shown) - 1) / 2) * min(0.08, 0.5 / len(shown))
                    y = 100 * np.array([row["value"] for row in rows])
                    trained = variant == "trained"
                    if trained and all(is_finite(row.get("low")) and is_finite(row.get("high")) for row in rows):
                        low, high = (100 * np.array([row[side] for row in rows]) for side in ("low", "high"))
                        axis.vlines(x, low, high, color=style.colour, linewidth=1.2)
                    (line,) = axis.plot(
                        x,
                        y,
                        color=style.colour,
                        marker=style.marker,
                        linestyle="-" if trained else (0, (4, 2)),
                        markerfacecolor=style.colour if trained else "none",
                        linewidth=1.6 if trained else 1.0,
                    )
                    if trained:
                        drawn.setdefault(style.label, line)
        for axis, name in zip(
            axes, ("AUC over pairs of occurrences", "nearest neighbour is the same word"), strict=True
        ):
            axis.set_title(name, loc="left")
            axis.axhline(50, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)))
            axis.set_xticks(range(len(names)), names)
            axis.set_xlabel("from the input to the top")
        axes[0].set_ylabel("%")
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(min(low, 47), max(high, 60))
        _at_right(axes[1], 50, "static vector")
        _legend(canvas, drawn)
        svg = _svg(canvas)
    note = (
        "Filled: trained; open and dashed: the same model before training; dotted: a static vector, at 50% by "
        "construction. Bars: 95% bootstrap intervals over pairs of words."
    )
    return Figure("senses_by_layer", sense_gain(all_arms), svg, note)


def sense_pictures(all_arms: Sequence[Arm], limit: int = 6) -> Figure | None:
    """One pseudo-word per model: its occurrences in the two main directions, trained beside random init."""
    shown = [arm for arm in all_arms if arm.first.senses.get("picture")][:limit]
    if not shown:
        return None
    n_columns = max(len(shown), 3)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        canvas = Canvas(figsize=(10, 1.1 + 2 * 8.4 / n_columns))
        axes = canvas.subplots(2, n_columns, squeeze=False)
        for axis in axes[:, len(shown) :].flat:
            axis.set_axis_off()
        for column, arm in enumerate(shown):
            picture = arm.first.senses["picture"]
            truth = np.array(picture["truth"])
            for axis, variant in zip(axes[:, column], ("trained", "random_init"), strict=True):
                panel = picture["panels"].get(variant)
                axis.set_xticks([])
                axis.set_yticks([])
                for spine in axis.spines.values():
                    spine.set_visible(True)
                    spine.set_color(GRID)
                if panel is None:
                    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=FAINT)
                    continue
                points = np.array(panel["points"])
                for which, colour, marker in ((0, COLOURS[0], "o"), (1, COLOURS[1], "^")):
                    word = points[truth == which]
                    axis.scatter(*word.T, s=24, color=colour, marker=marker, alpha=0.85, label=picture["words"][which])
                axis.margins(0.12)
                share = 100 * sum(panel["explained"])
                axis.set_xlabel(f"AUC {100 * panel['auc']:.0f}% · {share:.0f}% of variance shown", fontsize=8)
            name = textwrap.shorten(f"{arm.label}, {picture['layer']}", 132 // n_columns, placeholder="…")
            axes[0, column].set_title(name, pad=20)
            axes[0, column].legend(
                loc="lower center",
                bbox_to_anchor=(0.5, 0.98),
                ncols=2,
                fontsize=8,
                handletextpad=0.1,
                columnspacing=0.9,
                borderpad=0.1,
            )
        axes[0, 0].set_ylabel("trained")
        axes[1, 0].set_ylabel("random init")
        svg = _svg(canvas)
    note = (
        "Each point is a held-out sentence in which one written form stands for one of the two words; colour and shape "
        "say for which. Two main directions of the vectors; the pair is the one of median AUC after training."
    )
    return Figure("senses_picture", "One form, two words: the median pair of each model", svg, note)


def parameters_by_part(all_arms: Sequence[Arm], limit: int = 20) -> Figure | None:
    """Stacked bars of the parameters."""
    shown = [arm for arm in all_arms if arm.first.get("parameters")][:limit]
    if not shown:
        return None
    parts = list(dict.fromkeys(part for arm in shown for part in arm.first.get("parameters")))
    with mpl.rc_context(STYLE | {"axes.grid.axis": "x"}):
        canvas = Canvas(figsize=(10, 0.9 + 0.34 * len(shown)))
        axis = canvas.subplots()
        left = np.zeros(len(shown))
        drawn = {}
        for index, part in enumerate(parts):
            sizes = np.array([arm.first.get("parameters").get(part, 0) for arm in shown], float)
            bars = axis.barh(
                range(len(shown)),
                sizes,
                left=left,
                height=0.62,
                color=COLOURS[index % len(COLOURS)],
                hatch="" if index < len(COLOURS) else "//",
                linewidth=0,
            )
            left += sizes
            drawn[part.replace("_", " ")] = bars[0]
        axis.set_yticks(range(len(shown)), [textwrap.shorten(arm.label, 40, placeholder="…") for arm in shown])
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.set_xlabel("parameters")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: quantity(x) if x else "0"))
        _legend(canvas, drawn)
        svg = _svg(canvas)
    return Figure("parameters", "Where the parameters are", svg)


def study_figure(results: Results, drawing: Drawing, name: str) -> Figure | None:
    """A study's curve or bars, mean and spread over pretraining runs, beside the paper's own on axes of its own."""
    study = results.study
    columns = [column for column in study.columns if column.group == drawing.group]
    rows = [row for row in study.rows if any(results.means(row.name, column.name) for column in columns)]
    if not rows or not columns:
        return None
    if drawing.kind == "dots":
        return _dots(results, drawing, rows, columns[0], name)
    draw = _bars if drawing.kind == "bars" else _lines
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(10, 3.6))
        n_axes = 2 if drawing.paper else 1
        axes = canvas.subplots(1, n_axes, squeeze=False)[0]
        drawn: dict[str, object] = {}
        draw(axes[0], results, rows, columns, drawn)
        axes[0].set_xlabel(drawing.x_label)
        axes[0].set_ylabel(drawing.y_label or f"{columns[0].unit}")
        if drawing.logarithmic:
            _logarithmic(axes[0])
        if drawing.paper:
            axes[0].set_title("ours", loc="left")
            axes[1].set_title("the paper's", loc="left")
            axes[1].set_xlabel(drawing.paper_label or drawing.x_label)
            for index, (label, points) in enumerate(drawing.paper.items()):
                x, y = np.array(points, float).T
                place = next((i for i, row in enumerate(rows) if row.label == label), len(rows) + index)
                style = place % len(COLOURS)
                (line,) = axes[1].plot(x, y, color=COLOURS[style], marker=MARKERS[style], linestyle="--")
                drawn.setdefault(label, line)
            if drawing.logarithmic:
                _logarithmic(axes[1])
        if not drawing.paper:
            canvas.set_size_inches(7, 3.6)
        _legend(canvas, drawn)
        svg = _svg(canvas)
    return Figure(name, drawing.title, svg, _runs_note(results, rows, columns))


def _runs_note(results: Results, rows: Sequence, columns: Sequence) -> str:
    most = max(len(results.means(row.name, column.name)) for row in rows for column in columns)
    spread = f"Mean over up to {most} pretraining runs; bars: standard deviation."
    return f"Budget {results.study.budget}. {spread if most > 1 else 'One pretraining run for each arm.'}"


def _dots(results: Results, drawing: Drawing, rows: Sequence, column, name: str) -> Figure:
    """A quantity of every arm, the first on top; the paper's numbers on axes of their own."""
    paper = {row.name: results.study.paper.get(row.name, {}).get(column.name) for row in rows}
    theirs = [(place, paper[row.name]) for place, row in enumerate(rows) if paper[row.name] is not None]
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(10 if theirs else 7, 0.8 + 0.34 * len(rows)))
        axes = canvas.subplots(1, 2 if theirs else 1, squeeze=False, sharey=True)[0]
        for place, row in enumerate(rows):
            values = results.means(row.name, column.name)
            if not values:
                continue
            deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
            colour = COLOURS[-1] if row.control else COLOURS[0]
            axes[0].errorbar(np.mean(values), place, xerr=deviation, color=colour, marker="o", capsize=2)
            axes[0].plot(values, [place] * len(values), color=colour, marker="|", linewidth=0, alpha=0.6)
        axes[0].set_yticks(range(len(rows)), [row.label for row in rows])
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        axes[0].set_xlabel(f"{drawing.y_label or column.label} ({column.unit})" if column.unit else drawing.y_label)
        if theirs:
            axes[0].set_title("ours", loc="left")
            axes[1].set_title("the paper's", loc="left")
            axes[1].plot([x for _, x in theirs], [y for y, _ in theirs], color=COLOURS[0], marker="D", linewidth=0)
            axes[1].set_xlabel(column.unit)
        svg = _svg(canvas)
    return Figure(name, drawing.title, svg, _runs_note(results, rows, [column]))


def _logarithmic(axis) -> None:
    """Plain numbers, few enough not to touch: matplotlib's own names for the ticks of few decades do."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    subs = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}" if x < 1e4 else quantity(x)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _spread_of(results: Results, row: str, columns: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places of the columns that have numbers, means, standard deviations) over pretraining runs."""
    found = [(place, results.means(row, column.name)) for place, column in enumerate(columns)]
    found = [(place, values) for place, values in found if values]
    places = np.array([place for place, _ in found], int)
    means = np.array([np.mean(values) for _, values in found])
    return places, means, np.array([np.std(values, ddof=1) if len(values) > 1 else 0.0 for _, values in found])


def _lines(axis, results: Results, rows: Sequence, columns: Sequence, drawn: dict) -> None:
    x = np.array([column.x for column in columns], float)
    for index, row in enumerate(rows):
        places, means, deviations = _spread_of(results, row.name, columns)
        style = index % len(COLOURS)
        axis.errorbar(x[places], means, deviations, color=COLOURS[style], linewidth=0, elinewidth=1.0, capsize=2)
        (line,) = axis.plot(
            x[places],
            means,
            color=COLOURS[style],
            marker=MARKERS[style],
            linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
        )
        drawn[row.label] = line


def _bars(axis, results: Results, rows: Sequence, columns: Sequence, drawn: dict) -> None:
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        places, means, deviations = _spread_of(results, row.name, columns)
        left = places + (index - (len(rows) - 1) / 2) * width
        bars = axis.bar(
            left,
            means,
            0.9 * width,
            yerr=deviations,
            color=COLOURS[index % len(COLOURS)],
            hatch=("", "//", "..", "xx")[index // len(COLOURS) % 4],
            error_kw={"elinewidth": 1.0, "ecolor": INK},
        )
        drawn[row.label] = bars[0]
    axis.set_xticks(range(len(columns)), [column.label for column in columns])
    axis.grid(visible=False, axis="x")


def _binned(run: Run, axis: str, steps: np.ndarray, values: np.ndarray, n: int):
    """Means of short stretches, at most n of them: (x, y), x None where the run lacks the axis."""
    groups = np.array_split(np.arange(len(steps)), min(n, max(1, len(steps) // 2)))
    x = run.at(axis, np.array([steps[group].mean() for group in groups]))
    return x, np.array([values[group].mean() for group in groups])


def _spread(length: int, n: int) -> np.ndarray:
    """At most n indices, first and last included."""
    return np.unique(np.linspace(0, length - 1, min(length, n)).round().astype(int))


def _limits(values: list[np.ndarray], ends: list[float], baselines: dict[int, float]) -> tuple[float, float]:
    """Axis limits that show the ends and the baselines; a start far above the unigram is cut."""
    everything = [*ends, *baselines.values()]
    if not everything:
        return 0.0, 1.0
    low, high = min(map(np.min, values)), max(map(np.max, values))
    low = min(low, *everything)
    if 1 in baselines:
        high = min(high, max(baselines[1] + 0.15 * (baselines[1] - low), max(ends)))
    high = max(high, *everything)
    room = 0.05 * max(high - low, 1e-3)
    return low - room, high + room


def _time_scale(longest: float) -> tuple[float, str]:
    if longest < 180:
        return 1, "s"
    return (60, "min") if longest < 3 * 3600 else (3600, "h")


def _level_names(axis, baselines: dict[int, float], low: float, high: float) -> None:
    """Names the dotted levels at the right edge, moved apart where they would touch."""
    inside = sorted((value, order) for order, value in baselines.items() if low <= value <= high)
    lowest = -np.inf
    for value, order in inside:
        y = max(value, lowest + 0.065 * (high - low))
        lowest = y
        _at_right(axis, y, f"{ngram_name(order)} {value:.2f}")


def _at_right(axis, y: float, text: str) -> None:
    axis.annotate(
        text,
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=FAINT,
        annotation_clip=False,
    )


def _legend(canvas: Canvas, drawn: dict[str, object]) -> None:
    if not drawn:
        return
    labels = [textwrap.shorten(label, 44, placeholder="…") for label in drawn]
    columns = max(1, min(len(labels), 110 // (max(map(len, labels)) + 8)))
    rows = -(-len(labels) // columns)
    canvas.set_size_inches(canvas.get_figwidth(), canvas.get_figheight() + 0.19 * rows)
    canvas.legend(drawn.values(), labels, loc="outside upper left", ncols=columns, fontsize=9)


def _svg(canvas: Canvas) -> str:
    canvas.set_layout_engine("constrained")
    for axis in canvas.axes:
        axis.patch.set_alpha(0)
    canvas.patch.set_alpha(0)
    target = io.StringIO()
    canvas.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<g) id="[^"]*"', r"\1", text)  # ids repeat from figure to figure; only clip paths need theirs
    text = re.sub(r"font: ([^;\"]*?)'[^\"]*?sans-serif", r"font: \1sans-serif", text)
    names = {INK: "ink", FAINT: "faint", GRID: "grid"} | {c: f"c{i}" for i, c in enumerate(COLOURS)}
    for colour, name in names.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    return text


def standalone(svg: str) -> str:
    """The figure as a file of its own: fixed colours in place of the page's."""
    plain = re.sub(r"var\(--\w+, (#[0-9a-f]{6})\)", r"\1", svg)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{plain}'
