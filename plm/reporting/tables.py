"""Runs in, tables out: raw values with units, printed as HTML (`page`), Markdown and CSV.

What is read from a workdir, field by field, is the table at the top of `plm.reporting.runs`.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from plm.analysis.overlap import flag, task_of
from plm.reporting.runs import Arm, Run, differing_settings, is_finite
from plm.reporting.statistics import Summary, smallest_p, summarise


@dataclass(frozen=True)
class Column:
    """A heading, its unit, how numbers are printed (a format spec or a function), and whether with intervals."""

    name: str
    unit: str = ""
    format: str | Callable[[float], str] = ""
    interval: bool = False
    at_most: int | None = None  # characters on the page (a hash needs no more); files have all of them

    @property
    def heading(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def text(self, value: Any) -> str:
        """A cell as text; a Summary as mean ± sd."""
        if value is None:
            return "—"
        if isinstance(value, Summary):
            spread = f" ± {self.spread(value)}" if value.sd else ""
            return f"{self.number(value.mean)}{spread}"
        return self.number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)

    def detail(self, value: Any) -> str:
        """What stands below a mean over seeds: n and every value, and the 95% interval where the column wants it."""
        if not isinstance(value, Summary) or value.n < 2:
            return ""
        if not value.sd:
            return f"all {value.n} equal"
        text = f"n = {value.n}: {', '.join(map(self.number, value.values))}"
        if self.interval and value.interval:
            text += f"; 95% interval {self.number(value.interval[0])} to {self.number(value.interval[1])}"
        return text

    def spread(self, value: Summary) -> str:
        """A deviation has no sign, whatever its column's numbers have."""
        return self.number(value.sd).lstrip("+")

    def number(self, value: float) -> str:
        if not math.isfinite(value):
            return "not finite"
        text = self.format(value) if callable(self.format) else f"{value:{self.format or 'g'}}"
        return text.replace("-", "−") if text.startswith("-") else text


@dataclass
class Table:
    """Rows of raw values under columns; `title` says what is seen, `note` what to know when reading it.

    compact: the values behind a mean are shown where the pointer rests, not below it. folded: shown when it is opened.
    """

    name: str
    title: str
    columns: list[Column]
    rows: list[list[Any]]
    note: str = ""
    muted: set[int] = field(default_factory=set)  # rows that are baselines, not models
    compact: bool = False
    folded: bool = False

    def without_empty_columns(self) -> "Table":
        keep = [i for i in range(len(self.columns)) if i == 0 or any(row[i] is not None for row in self.rows)]
        self.columns = [self.columns[i] for i in keep]
        self.rows = [[row[i] for i in keep] for row in self.rows]
        return self

    def markdown(self) -> str:
        def escape(text: str) -> str:
            return text.replace("|", "\\|").replace("\n", " ")

        def cell(column: Column, value: Any) -> str:
            detail = column.detail(value)
            return escape(column.text(value) + (f" ({detail})" if detail else ""))

        numeric = [i for i in range(len(self.columns)) if self.is_numeric(i)]
        lines = [f"**{escape(self.title)}**", ""]
        lines.append("| " + " | ".join(escape(column.heading) for column in self.columns) + " |")
        lines.append("|" + "|".join(" ---: " if i in numeric else " --- " for i in range(len(self.columns))) + "|")
        for row in self.rows:
            lines.append("| " + " | ".join(cell(c, v) for c, v in zip(self.columns, row, strict=True)) + " |")
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"

    def latex(self) -> str:
        """A `tabular` with booktabs' rules; mean and deviation of a cell as $a \\pm b$."""

        def escape(text: str) -> str:
            return "".join(_LATEX.get(letter, letter) for letter in text)

        def cell(column: Column, value: Any) -> str:
            if isinstance(value, Summary):
                spread = f" \\pm {column.spread(value)}" if value.sd else ""
                return f"${column.number(value.mean)}{spread}$".replace("−", "-")
            return escape(column.text(value))

        sides = "".join("r" if self.is_numeric(i) else "l" for i in range(len(self.columns)))
        lines = [f"% {self.title}", rf"\begin{{tabular}}{{{sides}}}", r"\toprule"]
        lines += [" & ".join(escape(column.heading) for column in self.columns) + r" \\", r"\midrule"]
        for row in self.rows:
            lines.append(" & ".join(cell(c, v) for c, v in zip(self.columns, row, strict=True)) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", *([f"% {self.note}"] if self.note else [])]
        return "\n".join(lines) + "\n"

    def csv_rows(self) -> list[list[Any]]:
        """Heading and rows at full precision; a column with means over seeds gets sd, n and values beside it."""
        summaries = [any(isinstance(row[i], Summary) for row in self.rows) for i in range(len(self.columns))]
        heading: list[Any] = []
        for column, summary in zip(self.columns, summaries, strict=True):
            heading.append(column.heading)
            if summary:
                heading += [f"{column.heading}: {what}" for what in ("sd", "n", "values")]
        rows = [heading]
        for row in self.rows:
            cells: list[Any] = []
            for value, summary in zip(row, summaries, strict=True):
                if not summary:
                    cells.append(value)
                elif isinstance(value, Summary):
                    cells += [value.mean, value.sd, value.n, " ".join(map(repr, value.values))]
                else:
                    cells += [value, None, None, None]
            rows.append(cells)
        return rows

    def is_numeric(self, column: int) -> bool:
        values = [row[column] for row in self.rows if row[column] is not None]
        return bool(values) and all(isinstance(v, int | float | Summary) and not isinstance(v, bool) for v in values)


_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_LATEX |= {"−": "$-$", "—": "---", "×": r"$\times$", "†": r"$\dagger$", "λ": r"$\lambda$", "…": r"\dots{}"}


def duration(seconds: float) -> str:
    """A wall time as a person says it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def quantity(value: float) -> str:
    """Three digits and a word of scale: 12,345 -> 12.3 k."""
    for scale, sign in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {sign}"
    return f"{value:.3g}"


# One panel, one table: a quantity that may stand on one axis (protocol 12). `metrics` are eval keys without `eval/`.
@dataclass(frozen=True)
class Measure:
    """A family of comparable numbers."""

    name: str
    title: str
    unit: str
    metrics: tuple[str, ...]
    baseline: str
    per_vocabulary: bool = True
    lower_bound: float | None = None

    @property
    def in_bits(self) -> bool:
        return self.unit == "bits per byte"

    def value_key(self, run: Run) -> str | None:
        """The eval key of this run, None where the run does not have this quantity."""
        if self.in_bits and not run.get("tokenizer", "lossless"):
            return None
        for metric in self.metrics:
            if any(is_finite(line.get(f"eval/{metric}")) for line in run.metrics):
                return f"eval/{metric}"
        return None

    def baseline_of(self, run: Run, order: int) -> float | None:
        if self.baseline == "masked":
            row = run.result("ngrams", "unigram/masked") if order == 1 else None
        else:
            row = run.result("ngrams", f"kneser_ney_{order}/{self.baseline}")
        return row["value"] if row and is_finite(row["value"]) else None


MEASURES = (
    Measure("left_to_right", "Left to right", "nats per token", ("causal", "bidirectional_forward"), "forward"),
    Measure(
        "left_to_right_bits",
        "Left to right",
        "bits per byte",
        ("causal_bits_per_byte", "bidirectional_forward_bits_per_byte"),
        "forward_bits_per_byte",
        per_vocabulary=False,
    ),
    Measure("right_to_left", "Right to left", "nats per token", ("bidirectional_backward",), "backward"),
    Measure(
        "right_to_left_bits",
        "Right to left",
        "bits per byte",
        ("bidirectional_backward_bits_per_byte",),
        "backward_bits_per_byte",
        per_vocabulary=False,
    ),
    Measure("masked", "Masked pieces", "nats per masked piece", ("masked",), "masked"),
)
# Suites with tables of their own; `pretraining` repeats the held-out lines of metrics.jsonl.
SHOWN_ELSEWHERE = ("pretraining", "ngrams", "pseudo_words", "samples", "task")
NGRAM_NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}


def ngram_name(order: int) -> str:
    return NGRAM_NAMES.get(order, f"{order}-gram")


@dataclass
class Panel:
    """The arms that share one axis, with their baselines."""

    measure: Measure
    vocabulary: str
    arms: list[Arm]

    @property
    def name(self) -> str:
        if not self.measure.per_vocabulary:
            return self.measure.name
        kind = self.arms[0].first.get("tokenizer", "kind", default="tokenizer")
        return f"{self.measure.name}_{kind}_{hashlib.sha256(self.vocabulary.encode()).hexdigest()[:6]}"

    @property
    def heading(self) -> str:
        suffix = f" ({self.arms[0].first.vocabulary_label})" if self.measure.per_vocabulary else ""
        return f"{self.measure.title}, {self.measure.unit}{suffix}"

    @cached_property
    def baselines(self) -> dict[int, float]:
        """Order -> value, from the first run that has it."""
        found: dict[int, float] = {}
        for arm in self.arms:
            for run in arm.counted:
                for order in _orders(run):
                    value = self.measure.baseline_of(run, order)
                    if value is not None:
                        found.setdefault(order, value)
        return dict(sorted(found.items()))

    @property
    def finding(self) -> str:
        """What is seen, as a sentence."""
        unit = self.measure.unit
        ends = {}
        for arm in [arm for arm in self.arms if not arm.unfinished] or self.arms:
            summary = arm.summary(lambda run: run.last(self.measure.value_key(run)))
            if summary:
                ends[arm.label] = summary.mean
        if not ends:
            return f"No held-out {unit} yet"
        low, high = min(ends.values()), max(ends.values())
        if len(ends) == 1:
            text = f"{next(iter(ends))} reaches {low:.2f} {unit}"
        elif len(ends) == 2:
            text = " and ".join(f"{label} {value:.2f}" for label, value in ends.items()) + f" {unit}"
        else:
            text = f"{len(ends)} models end between {low:.2f} and {high:.2f} {unit}"
        beaten = [order for order, value in self.baselines.items() if value > high]
        not_beaten = [order for order, value in self.baselines.items() if value <= low]
        if beaten:
            order = min(beaten, key=self.baselines.get)
            text += f", below the {ngram_name(order)} ({self.baselines[order]:.2f})"
        elif not_beaten:
            order = max(not_beaten, key=self.baselines.get)
            text += f", not yet below the {ngram_name(order)} ({self.baselines[order]:.2f})"
        return text

    @property
    def distances(self) -> list[str]:
        """Per arm, how far from the n-grams it stands; nothing for very many arms."""
        lines = []
        for arm in self.arms if len(self.arms) <= 6 else ():
            last = arm.summary(lambda run: run.last(self.measure.value_key(run)))
            if last is None or 1 not in self.baselines:
                continue
            gain = self.baselines[1] - last.mean
            if 2 in self.baselines:
                share = 100 * gain / (self.baselines[1] - self.baselines[2])
                lines.append(f"{arm.label}: {share:.0f}% of the way from unigram to bigram")
            else:
                lines.append(f"{arm.label}: {abs(gain):.2f} nats {'below' if gain >= 0 else 'above'} the unigram")
        return lines


def _orders(run: Run) -> list[int]:
    found = {1}
    for row in run.results:
        if row.get("suite") == "ngrams":
            match = re.match(r"kneser_ney_(\d+)/", str(row["metric"]))
            if match:
                found.add(int(match[1]))
    return sorted(found)


def panels(all_arms: Sequence[Arm]) -> list[Panel]:
    """Every axis that the arms need: by quantity and direction, and by vocabulary where the unit is per piece."""
    result = []
    for measure in MEASURES:
        groups: dict[str, list[Arm]] = {}
        for arm in all_arms:
            if measure.value_key(arm.first):
                groups.setdefault(arm.first.vocabulary if measure.per_vocabulary else "", []).append(arm)
        result += [Panel(measure, vocabulary, members) for vocabulary, members in groups.items()]
    return result


def panel_table(panel: Panel) -> Table:
    """The models of one panel beside its n-grams: last and best held-out value, perplexity, and the way covered."""
    measure, baselines = panel.measure, panel.baselines
    masked = measure.name == "masked"
    columns = [
        Column("model"),
        Column("last", measure.unit, ".3f", interval=True),
        Column("best", measure.unit, ".3f", interval=True),
        Column("best at step", "", ",.0f"),
        Column("perplexity, last", "", ",.1f"),
    ]
    if masked:
        columns += [
            Column("gain over unigram", "nats", ".2f", interval=True),
            Column("masked accuracy", "%", ".1f"),
            Column("next sentence", "nats", ".3f"),
            Column("next-sentence accuracy", "%", ".1f"),
        ]
    else:
        columns += [Column("way from unigram to bigram", "%", ".0f"), Column("way from unigram to trigram", "%", ".0f")]

    def perplexity(value: float | None) -> float | None:
        return None if value is None or measure.in_bits else math.exp(min(value, 700))

    def baseline(run: Run, order: int) -> float | None:
        own = measure.baseline_of(run, order)  # an unfinished run has none of its own yet
        return baselines.get(order) if own is None else own

    def way(run: Run, value: float | None, order: int) -> float | None:
        low, high = baseline(run, order), baseline(run, 1)
        if value is None or low is None or high is None or high <= low:
            return None
        return 100 * (high - value) / (high - low)

    rows: list[list[Any]] = []
    muted = set()
    for order, value in baselines.items():
        muted.add(len(rows))
        rows.append([ngram_name(order), value, None, None, perplexity(value), *[None] * (len(columns) - 5)])
    for arm in panel.arms:

        def last(run: Run) -> float | None:
            return run.last(measure.value_key(run))

        def best(run: Run, index: int) -> float | None:
            found = run.best(measure.value_key(run))
            return found[index] if found else None

        def percent(key: str) -> Callable[[Run], float | None]:
            return lambda run: None if run.last(key) is None else 100 * run.last(key)

        row = [
            arm.label + ("\N{NO-BREAK SPACE}†" if arm.unfinished else ""),
            arm.summary(last),
            arm.summary(lambda run: best(run, 0)),
            arm.summary(lambda run: best(run, 1)),
            arm.summary(lambda run: perplexity(last(run))),
        ]
        if masked:

            def gain(run: Run) -> float | None:
                start = baseline(run, 1)
                return None if start is None or last(run) is None else start - last(run)

            row += [arm.summary(gain), arm.summary(percent("eval/masked_accuracy"))]
            row += [arm.summary(lambda run: run.last("eval/next_sentence"))]
            row += [arm.summary(percent("eval/next_sentence_accuracy"))]
        else:
            row += [arm.summary(lambda run: way(run, last(run), 2)), arm.summary(lambda run: way(run, last(run), 3))]
        rows.append(row)
    note = "Best: at the held-out evaluation with the run's own lowest pretraining loss. "
    if masked:
        note += (
            "A masked model sees both sides and is asked about some pieces only: its nats are comparable with those of "
            "no other panel. "
        )
        note += "Unigram: expected over which pieces are masked. " if baselines else ""
    elif measure.in_bits:
        note += "Bits per byte of text: comparable across vocabularies without UNK. "
    else:
        note += "Nats per token compare only within this vocabulary. "
    if baselines and not masked:
        note += "n-grams: interpolated modified Kneser-Ney over the same ids and held-out targets. "
    if any(arm.unfinished for arm in panel.arms):
        note += "† not finished yet."
    title = f"{panel.heading}: held-out values" + (" beside the n-grams" if baselines else "")
    return Table(panel.name, title, columns, rows, note.strip(), muted).without_empty_columns()


def corpus_table(runs: Sequence[Run]) -> Table:
    """What was read, per vocabulary."""
    columns = [
        Column("vocabulary"),
        Column("without UNK"),
        Column("split"),
        Column("documents", "", ",.0f"),
        Column("sentences", "", ",.0f"),
        Column("words", "", ",.0f"),
        Column("tokens", "", ",.0f"),
        Column("bytes", "", ",.0f"),
        Column("bytes per token", "", ".2f"),
        Column("unknown tokens", "%", ".2f"),
    ]
    rows = []
    seen = set()
    for run in runs:
        if run.vocabulary in seen or not run.get("store"):
            continue
        seen.add(run.vocabulary)
        lossless = run.get("tokenizer", "lossless")
        for split in ("train", "valid"):
            counts = run.get("store", split, default={})
            tokens, n_bytes, unknown = (counts.get(key) for key in ("n_tokens", "n_bytes", "n_unknown"))
            rows.append(
                [
                    run.vocabulary_label,
                    None if lossless is None else ("yes" if lossless else "no"),
                    split,
                    *(counts.get(f"n_{what}") for what in ("documents", "sentences", "words")),
                    tokens,
                    n_bytes,
                    n_bytes / tokens if tokens and n_bytes else None,
                    100 * unknown / tokens if tokens and unknown is not None else None,
                ]
            )
    source = next((run.get("corpus", "source") for run in runs if run.get("corpus", "source")), "unknown source")
    licence = next((run.get("corpus", "licence") for run in runs if run.get("corpus", "licence")), None)
    note = f"Source {source}; licence: {licence or 'not stated'}; fingerprint {runs[0].corpus if runs else '—'}."
    return Table("corpus", "The text and its vocabularies", columns, rows, note).without_empty_columns()


def parameter_table(all_arms: Sequence[Arm]) -> Table:
    """Parameters by part."""
    parts = list(dict.fromkeys(part for arm in all_arms for part in arm.first.get("parameters", default={})))
    columns = [Column("model"), Column("architecture × objective"), Column("direction")]
    columns += [Column(part.replace("_", " "), "", ",.0f") for part in parts]
    columns += [Column("all", "", ",.0f")]
    rows = []
    for arm in all_arms:
        counts = arm.first.get("parameters", default={})
        total = sum(counts.values()) if counts else None
        rows.append(
            [arm.label, arm.first.model, arm.first.get("direction"), *(counts.get(part) for part in parts), total]
        )
    note = "Budgets are compared by the body. Rows that only pad a vocabulary table are not counted."
    return Table("parameters", "Parameters by part", columns, rows, note).without_empty_columns()


def cost_table(all_arms: Sequence[Arm]) -> Table:
    """What each model has read and what it cost."""
    columns = [
        Column("model"),
        Column("runs", "", ",.0f"),
        Column("steps", "", ",.0f"),
        Column("tokens", "", quantity),
        Column("bytes of text", "", quantity),
        Column("passes over the text", "", ".3g"),
        Column("training FLOPs", "", quantity),
        Column("wall time", "", duration),
        Column("tokens per second", "", quantity),
        Column("step", "ms", _milliseconds),
        Column("MFU", "%", ".1f"),
        Column("peak memory of a process", "GiB", ".2f"),
        Column("of a device", "GiB", ".2f"),
        Column("all runs together", "", duration),
    ]

    def scaled(run: Run, what: str) -> float | None:
        n_tokens, size = run.get("store", "train", "n_tokens"), run.get("store", "train", what)
        return None if not n_tokens or size is None or run.tokens is None else run.tokens * size / n_tokens

    def passes(run: Run) -> float | None:
        n_tokens = run.get("store", "train", "n_tokens")
        return run.tokens / n_tokens if n_tokens and run.tokens is not None else None

    def times(factor: float, value: float | None) -> float | None:
        return None if value is None else factor * value

    rows = [
        [
            arm.label + ("\N{NO-BREAK SPACE}†" if arm.unfinished else ""),
            len(arm.counted),
            arm.summary(lambda run: run.last_step),
            arm.summary(lambda run: run.tokens),
            arm.summary(lambda run: scaled(run, "n_bytes")),
            arm.summary(passes),
            arm.summary(lambda run: run.flops),
            arm.summary(lambda run: run.seconds),
            arm.summary(lambda run: run.median("train/tokens_per_second")),
            arm.summary(lambda run: times(1000, run.median("train/step_seconds"))),
            arm.summary(lambda run: times(100, run.median("train/mfu"))),
            arm.summary(lambda run: times(2.0**-30, run.get("peak_memory", "process"))),
            arm.summary(lambda run: times(2.0**-30, run.get("peak_memory", "device"))),
            sum(run.seconds or 0 for run in arm.runs) or None,
        ]
        for arm in all_arms
    ]
    note = (
        "Tokens and bytes: of text, without markers and padding, where the run counts passes. Rates are medians over "
        "logged steps, without the first. The last column counts unfinished and failed runs too."
    )
    if any(arm.unfinished for arm in all_arms):
        note += " † not finished yet."
    return Table(
        "cost", "Budgets: what each model has read, and what it cost", columns, rows, note
    ).without_empty_columns()


def sense_table(all_arms: Sequence[Arm]) -> Table | None:
    """Nearest neighbour and AUC by layer, beside the random-init control and the static vector."""
    columns = [
        Column("model"),
        Column("layer"),
        Column("AUC, trained", "%", ".1f"),
        Column("AUC, random init", "%", ".1f"),
        Column("AUC, gain", "points", "+.1f", interval=True),
        Column("95% interval over pairs", "points"),
        Column("nearest neighbour, trained", "%", ".1f"),
        Column("nearest neighbour, random init", "%", ".1f"),
        Column("pairs", "", ",.0f"),
    ]
    rows: list[list[Any]] = []
    static: dict[str, float] = {}
    for arm in all_arms:
        for layer in _layers(arm.first):
            gain = arm.first.result("pseudo_words", f"trained-random_init/auc/{layer}") or {}
            low, high = gain.get("low"), gain.get("high")
            one_run = len(arm.counted) == 1 and is_finite(low) and is_finite(high)
            interval = f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−") if one_run else None
            trained, control, difference = (
                arm.summary(_percent_of("pseudo_words", f"{variant}/auc/{layer}"))
                for variant in ("trained", "random_init", "trained-random_init")
            )
            neighbours = [
                arm.summary(_percent_of("pseudo_words", f"{variant}/nearest_neighbour/{layer}"))
                for variant in ("trained", "random_init")
            ]
            pairs = (arm.first.result("pseudo_words", f"trained/auc/{layer}") or {}).get("n")
            rows.append([arm.label, layer, trained, control, difference, interval, *neighbours, pairs])
        for measure in ("nearest_neighbour", "auc"):
            found = arm.first.result("pseudo_words", f"static/{measure}/form")
            if found and is_finite(found["value"]):
                static[measure] = 100 * found["value"]
    if not rows:
        return None
    muted = set()
    if static:
        muted.add(len(rows))
        auc, neighbour = static.get("auc"), static.get("nearest_neighbour")
        rows.append(["static vector", "the form", auc, None, None, None, neighbour, None, None])
    note = (
        "Two words are written as one form in held-out sentences. AUC: how often two occurrences of one word are "
        "nearer than two of different words; nearest neighbour: how often it is the same word. Chance is 50%, and a "
        "static vector is at chance by construction. Means over pairs of words; layers from the bottom to the top."
    )
    return Table("senses", sense_finding(all_arms), columns, rows, note, muted).without_empty_columns()


def sense_finding(all_arms: Sequence[Arm]) -> str:
    """What the senses show, as a sentence, in the layer that the rule fixes (the top one)."""
    parts = []
    for arm in all_arms:
        layers = _layers(arm.first)
        if layers:
            layer = arm.first.senses.get("headline_layer", layers[-1])
            trained = arm.summary(_percent_of("pseudo_words", f"trained/auc/{layer}"))
            control = arm.summary(_percent_of("pseudo_words", f"random_init/auc/{layer}"))
            if trained:
                parts.append(
                    f"{arm.label} {trained.mean:.0f}%" + (f" (untrained {control.mean:.0f}%)" if control else "")
                )
    if len(parts) > 3:
        return f"Which of two words was it? AUC of {len(parts)} models, layer by layer"
    return "AUC in the top layer: " + ", ".join(parts)


def sense_gain(all_arms: Sequence[Arm]) -> str:
    """In how many models training helps the headline layer, as a sentence."""
    gains = []
    for arm in all_arms:
        layer = arm.first.senses.get("headline_layer")
        row = arm.first.result("pseudo_words", f"trained-random_init/auc/{layer}")
        if row and is_finite(row.get("low")):
            gains.append(row["low"] > 0)
    if not gains:
        return "Which of two words was it? Layer by layer"
    models = "model" if len(gains) == 1 else "models"
    return (
        f"Training raises the top layer's AUC in {sum(gains)} of {len(gains)} {models} "
        "(95% interval over pairs above zero)"
    )


def _layers(run: Run) -> list[str]:
    found = [str(row["metric"]).split("/", 2) for row in run.results if row.get("suite") == "pseudo_words"]
    return list(dict.fromkeys(parts[2] for parts in found if parts[:2] == ["trained", "auc"] and len(parts) == 3))


def _percent_of(suite: str, metric: str) -> Callable[[Run], float | None]:
    def value(run: Run) -> float | None:
        row = run.result(suite, metric)
        return 100 * row["value"] if row and is_finite(row["value"]) else None

    return value


def further_table(all_arms: Sequence[Arm]) -> Table | None:
    """Rows of all other suites, averaged over head seeds within a run first, then over runs."""
    columns = [
        Column("suite"),
        Column("metric"),
        Column("split"),
        Column("model"),
        Column("value", "", ".4g", interval=True),
    ]
    columns += [Column("n", "", ",.0f")]
    rows = []
    for arm in all_arms:
        found: dict[tuple, dict[int, dict]] = {}
        seen: dict[str, float] = {}  # task -> the largest share of its 8-grams
        for index, run in enumerate(arm.counted):
            for row in run.results:
                if (task := task_of(row)) and is_finite(row["value"]):
                    seen[task] = max(seen.get(task, 0.0), row["value"])
                if row.get("suite") not in SHOWN_ELSEWHERE and is_finite(row["value"]):
                    key = (str(row.get("suite")), str(row["metric"]), row.get("split"))
                    found.setdefault(key, {}).setdefault(index, {})[row.get("head_seed")] = row
        for (suite, metric, split), by_run in found.items():
            values = [float(np.mean([row["value"] for row in heads.values()])) for heads in by_run.values()]
            n = next(iter(next(iter(by_run.values())).values())).get("n")
            rows.append(
                [suite, metric + flag(seen.get(metric.partition("/")[0], 0.0)), split, arm.label, summarise(values), n]
            )
    if not rows:
        return None
    rows.sort(key=lambda row: (row[0], row[1], str(row[2])))
    note = "Head seeds are averaged within each pretraining run; the spread is over pretraining runs."
    return Table("further_results", "Further evaluations", columns, rows, note).without_empty_columns()


def settings_table(all_arms: Sequence[Arm], limit: int = 40) -> Table | None:
    """The settings in which the arms differ: one row a setting for few arms, one row an arm for many."""
    if len(all_arms) < 2:
        return None
    every = [arm.first.settings for arm in all_arms]
    differing = differing_settings(every)
    if not differing:
        return None

    def text(settings: dict, key: str) -> str | None:
        return None if key not in settings else str(settings[key])

    note = ""
    if len(all_arms) <= 8:
        columns = [Column("setting"), *(Column(arm.label) for arm in all_arms)]
        rows = [[key, *(text(settings, key) for settings in every)] for key in differing]
    else:
        if len(differing) > limit:
            note = f"{len(differing) - limit} more settings differ; --export=csv has no limit on rows."
        columns = [Column("model"), *(Column(key) for key in differing[:limit])]
        rows = [
            [arm.label, *(text(s, key) for key in differing[:limit])] for arm, s in zip(all_arms, every, strict=True)
        ]
    return Table("settings", "The settings in which the models differ", columns, rows, note)


def run_table(runs: Sequence[Run]) -> Table:
    """Every started run, failures too."""
    columns = [
        Column("run"),
        Column("status"),
        Column("seed, init"),
        Column("seed, data"),
        Column("wall time", "", duration),
        Column("missing"),
        Column("workdir"),
    ]
    rows: list[list[Any]] = []
    for run in runs:
        default = run.config.get("seed")
        seeds = [run.get("seeds", what, default=default) for what in ("init", "data")]
        printed = [None if seed is None else str(seed) for seed in seeds]
        rows.append([run.name, run.status, *printed, run.seconds, "; ".join(run.missing) or None, run.path])
    complete = sum(run.complete for run in runs)
    title = f"{len(runs)} run{'s' if len(runs) != 1 else ''} started, {complete} complete"
    note = "Tables use the complete runs of a model; a model without one is shown as far as it got and marked †."
    return Table("runs", title, columns, rows, note).without_empty_columns()


def provenance_table(runs: Sequence[Run]) -> Table:
    """Where each number comes from."""
    columns = [
        Column("run"),
        Column("started"),
        Column("command"),
        Column("commit", at_most=12),
        Column("uncommitted changes", at_most=12),
        Column("devices"),
        Column("versions"),
        Column("tokenizer", at_most=12),
        Column("protocol", at_most=12),
    ]
    rows: list[list[Any]] = []
    for run in runs:
        versions = run.get("versions", default={})
        rows.append(
            [
                run.name,
                str(run.get("started", default=""))[:19].replace("T", " ") or None,
                run.get("command"),
                run.get("commit"),
                run.get("uncommitted"),
                _devices(run.get("devices")),
                ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
                run.get("tokenizer", "fingerprint"),
                run.get("protocol"),
            ]
        )
    table = Table("provenance", "Command, commit, devices and versions", columns, rows, folded=True)
    return table.without_empty_columns()


def _devices(devices: Any) -> str | None:
    if not isinstance(devices, dict):
        return None if devices is None else str(devices)
    text = f"{devices.get('count', 1)} × {devices.get('kind') or devices.get('platform')}"
    return text + (f", {devices['processes']} processes" if devices.get("processes", 1) > 1 else "")


def seed_note(all_arms: Sequence[Arm]) -> str:
    """What the number of seeds allows to say."""
    counts = sorted({len(arm.counted) for arm in all_arms})
    if not counts:
        return ""
    if counts[-1] == 1:
        return "One run each: differences between models include the chance of the seed."
    n = counts[-1]
    text = f"± is the standard deviation over {'–'.join(map(str, {counts[0]: 0, n: 0}))} pretraining seeds; "
    text += "every value is listed. "
    if n < 5:
        return text + "Fewer than five seeds: intervals, no verdicts."
    return text + f"An exact sign-flip test over {n} seeds cannot go below p = {smallest_p(n):.3g}."
