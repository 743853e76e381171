"""A study: which runs of a sweep are which cells of a paper's table, what the paper has there, and what it claims.

An experiment file describes one and `launch.sweep` writes it to ROOT/study.json; reports read that file and the runs'
JSON files, never the experiment. A cell is a row (an arm) and a column (a quantity); it has a run for each pretraining
seed and, nested in it, each head seed. Head seeds are averaged; the pretraining run is the unit (docs/protocol.md, 8).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from plm.analysis.minimal_pairs import GENERATED_SET
from plm.analysis.overlap import task_of
from plm.analysis.results import counts_file
from plm.errors import UserError
from plm.reporting.runs import failed_early

FILE = "study.json"
SELECTION = ("dev", "dev, first half")


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm. control: one that is no model of the paper's table, such as a shuffled twin."""

    name: str
    label: str
    control: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """A quantity: rows of results.jsonl with this suite and metric, of this part.

    label: what the paper calls it; measured: what stands for it here. part: of suite task "report" or "selection", of
    others the split, "" for any (of minimal pairs for the generated set); step: of the rows, None for the highest of a
    run that is complete. Values are shown times `factor` in `unit`, and so is `smallest`, the smallest effect of
    interest (protocol 15). group, x: columns of one group are points of a curve.
    """

    name: str
    label: str
    suite: str
    metric: str
    part: str = "report"
    measured: str = ""
    step: int | None = None
    unit: str = "%"
    factor: float = 100.0
    digits: int = 1
    smallest: float = 1.0
    lower_is_better: bool = False
    group: str = ""
    x: float | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """A linear contrast of cells that is above 0 if what the paper says is so here.

    name: as docs/ablations.md lists them; terms: (row, column, weight); effect: the paper's, in the columns' unit, None
    where it gives no number. standardised: each column is divided by its deviation over all runs of the arms that are
    no controls, so that columns of any spread add. family: claims that are tested together (Holm).
    """

    name: str
    text: str
    terms: tuple[tuple[str, str, float], ...]
    effect: float | None = None
    standardised: bool = False
    family: str = ""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure of the columns of a group. kind: lines over `x`, bars of one row's columns, or dots of the arms,
    of the group's first column. paper: {row label: [(x, y)]}, the paper's own curve, on axes of its own."""

    group: str
    title: str
    x_label: str = ""
    y_label: str = ""
    kind: str = "lines"
    logarithmic: bool = False
    paper: Mapping[str, Sequence[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    paper_label: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of a cell. place: the point's name, or after reading its folder; metric, suite: of this row, where they are
    others than the column's."""

    place: str
    seed: int
    head: int = 0
    metric: str = ""
    suite: str = ""


@dataclasses.dataclass
class Study:
    """name: of the experiment file; source: of the paper's table; budget: its name; about: what that is in a sentence;
    facts: a table of words beside the numbers, heading first; command: what made the sweep; models: the points that
    others start from, after reading their folders."""

    name: str
    title: str
    source: str
    budget: str
    about: str = ""
    rows: list[Row] = dataclasses.field(default_factory=list)
    columns: list[Column] = dataclasses.field(default_factory=list)
    claims: list[Claim] = dataclasses.field(default_factory=list)
    drawings: list[Drawing] = dataclasses.field(default_factory=list)
    paper: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    facts: list[list[str]] = dataclasses.field(default_factory=list)
    command: str = ""
    models: list[str] = dataclasses.field(default_factory=list)
    cells: dict[tuple[str, str], list[Cell]] = dataclasses.field(default_factory=dict)

    def cell(
        self, row: str, column: str, point: str, seed: int, head: int = 0, metric: str = "", suite: str = ""
    ) -> None:
        """Notes that a point is a run of the cell."""
        self.cells.setdefault((row, column), []).append(Cell(point, seed, head, metric, suite))

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    def label(self, row: str) -> str:
        return next(one.label for one in self.rows if one.name == row)

    def record(self, workdirs: Mapping[str, epath.Path], root: epath.Path) -> dict[str, Any]:
        """The file's content. workdirs: of the points; where they lie below or beside the root, their relative path.

        Errors: ValueError for a cell, a number or a claim of a row or column that is not there.
        """
        rows, columns = {row.name for row in self.rows}, {column.name for column in self.columns}
        named = [*self.cells, *((row, column) for row, own in self.paper.items() for column in own)]
        named += [term[:2] for claim in self.claims for term in claim.terms]
        for row, column in named:
            if row not in rows or column not in columns:
                raise ValueError(f"{self.name}: no such cell: {row!r}, {column!r}")

        def place(point: str) -> str:
            workdir, here = str(workdirs[point]), str(root)
            return workdir if "://" in workdir else os.path.relpath(workdir, here)

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("rows", "columns", "claims", "drawings"):
            values[name] = [dataclasses.asdict(one) for one in values[name]]
        values["cells"] = [
            {"row": row, "column": column, **dataclasses.asdict(cell), "place": place(cell.place)}
            for (row, column), own in self.cells.items()
            for cell in own
        ]
        values["models"] = [place(model) for model in self.models]
        return values


def difference(better: str, worse: str, *columns: Column) -> tuple[tuple[str, str, float], ...]:
    """Terms of a claim: one row is better than another on the mean of these columns."""
    terms = []
    for column in columns:
        weight = (-1.0 if column.lower_is_better else 1.0) / len(columns)
        terms += [(better, column.name, weight), (worse, column.name, -weight)]
    return tuple(terms)


def trend(rows_and_columns: Sequence[tuple[str, str]], xs: Sequence[float]) -> tuple[tuple[str, str, float], ...]:
    """Terms of a claim: cells rise with x; the least-squares slope times the range of x."""
    x = np.asarray(xs, float) - np.mean(xs)
    weights = x / np.sum(x**2) * np.ptp(x)
    return tuple((row, column, float(w)) for (row, column), w in zip(rows_and_columns, weights, strict=True))


# ------------------------------------------------------------------------------------------------------------- reading


def read(folder: epath.PathLike) -> Study:
    """What `record` wrote; places of cells are folders. Errors: UserError for a file that holds no study."""
    folder = epath.Path(folder)

    def place(written: str) -> str:
        return written if "://" in written else os.path.normpath(folder / written)

    try:
        values = json.loads((folder / FILE).read_text())
        study = Study(**{key: value for key, value in values.items() if key in _PLAIN})
        study.rows = [Row(**one) for one in values["rows"]]
        study.columns = [Column(**one) for one in values["columns"]]
        study.claims = [Claim(**{**one, "terms": tuple(map(tuple, one["terms"]))}) for one in values["claims"]]
        study.drawings = [Drawing(**one) for one in values["drawings"]]
        for one in values["cells"]:
            where = (one["row"], one["column"], place(one["place"]), one["seed"], one["head"])
            study.cell(*where, one["metric"], one.get("suite", ""))
        study.models = [place(model) for model in values["models"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / FILE} holds no study ({type(error).__name__}: {error})") from None
    return study


_PLAIN = ("name", "title", "source", "budget", "about", "paper", "facts", "command")


def is_selection(split: Any) -> bool:
    """Whether a split of a task is what settings are selected by, and not what is reported."""
    return split in SELECTION


@dataclasses.dataclass(frozen=True)
class Value:
    """A cell's number in one run, in the column's unit; counts: float64 [examples, 2], whose sums' ratio it is, and
    `examples`, which tells whether two runs counted the same ones; None where the metric is no such ratio."""

    cell: Cell
    value: float
    counts: np.ndarray | None = None
    examples: int = 0


class Results:
    """The numbers of a study's cells, as far as they are there."""

    def __init__(self, study: Study):
        self.study = study
        self._read = functools.cache(_rows)
        self.facts = functools.cache(_facts)  # of a place: run.json, {} where there is none
        columns = {column.name: column for column in study.columns}
        self.values = {
            (row, column): [value for cell in own if (value := self._value(cell, columns[column])) is not None]
            for (row, column), own in study.cells.items()
        }

    def _value(self, cell: Cell, column: Column) -> Value | None:
        column = dataclasses.replace(column, metric=cell.metric or column.metric, suite=cell.suite or column.suite)
        rows = [row for row in self._read(cell.place) if _fits(row, column)]
        # A run that is going on or has failed has numbers of its way, which are not its result.
        if not rows or (column.step is None and self.facts(cell.place).get("status") != "complete"):
            return None
        row = max(enumerate(rows), key=lambda one: (one[1].get("step") or 0, one[0]))[1]  # of one step the last written
        counts, examples = _counts(cell.place, str(row.get("predictions") or ""), column)
        return Value(cell, column.factor * float(row["value"]), counts, examples)

    def pretrained(self, column: Column) -> float:
        """The largest share of the task's 8-grams that a model of this column was pretrained on, as far as measured."""
        cells = (cell for (_, name), own in self.study.cells.items() if name == column.name for cell in own)
        shares = (
            row["value"]
            for cell in cells
            for row in self._read(cell.place)
            if task_of(row) == (cell.metric or column.metric).partition("/")[0]
        )
        return max(shares, default=0.0)

    @property
    def missing(self) -> list[str]:
        """The places of cells without a number."""
        have = {(key, value.cell) for key, own in self.values.items() for value in own}
        cells = ((key, cell) for key, own in self.study.cells.items() for cell in own)
        return list(dict.fromkeys(cell.place for key, cell in cells if (key, cell) not in have))

    def by_seed(self, row: str, column: str) -> dict[int, list[Value]]:
        """{pretraining seed: values of its head seeds}."""
        found: dict[int, list[Value]] = {}
        for value in self.values.get((row, column), []):
            found.setdefault(value.cell.seed, []).append(value)
        return dict(sorted(found.items()))

    def means(self, row: str, column: str) -> list[float]:
        """One number for each pretraining seed."""
        return [float(np.mean([value.value for value in own])) for own in self.by_seed(row, column).values()]


def _facts(place: str) -> dict:
    try:
        facts = json.loads((epath.Path(place) / "run.json").read_text())
    except (OSError, ValueError):
        return failed_early(epath.Path(place))
    return facts if isinstance(facts, dict) else {}


def _rows(place: str) -> list[dict]:
    try:
        lines = (epath.Path(place) / "results.jsonl").read_text().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn
        if isinstance(row, dict) and isinstance(row.get("value"), int | float) and np.isfinite(row["value"]):
            rows.append(row)
    return rows


def _fits(row: dict, column: Column) -> bool:
    if row.get("suite") != column.suite or row.get("metric") != column.metric:
        return False
    if column.step is not None and row.get("step") != column.step:
        return False
    if column.suite in ("minimal_pairs", "pair_ngrams") and column.part in ("", "report"):
        # Rows that did not say yet which pairs they are of have the split "test".
        return row.get("split") in (GENERATED_SET, "test")
    if column.suite != "task":
        return column.part in ("", "report") or row.get("split") == column.part
    if not row.get("predictions"):
        return False  # what the loop measured on the way
    return column.part == "" or is_selection(row.get("split")) == (column.part == "selection")


def _counts(place: str, predictions: str, column: Column) -> tuple[np.ndarray | None, int]:
    if not predictions:
        return None, 0
    try:
        record = json.loads((epath.Path(place) / counts_file(predictions)).read_text())
    except (OSError, ValueError):
        return None, 0
    pairs = record["metrics"].get(column.metric.partition("/")[2])
    if pairs is None:
        return None, 0
    return np.asarray(pairs, np.float64), hash(tuple(record["ids"]))


def find(directories: Iterable[str]) -> dict[str, Study]:
    """{folder: study} of all folders with a study in or below the directories."""
    found = {}
    for directory in directories:
        root = epath.Path(directory)
        waiting = [root] if root.is_dir() else []
        while waiting:
            folder = waiting.pop()
            if (folder / FILE).exists():
                found[str(folder)] = read(folder)
            elif not (folder / "config.json").exists() and not (folder / "results.jsonl").exists():
                children = sorted((child for child in folder.iterdir() if child.is_dir()), key=lambda child: child.name)
                waiting += [child for child in reversed(children) if not child.name.startswith(".")]
    return found
