"""Runs on tasks: of each cell the setting that its selection part chose, and what that gave on the report part.

A cell is what is compared: a model, the way in which it is moved to the task, a control. Its trials are the learning
rates and durations that were tried, its runs their seeds. Selection and report are the rows of the suite `task`
(`plm.analysis.task_suite`): a setting is chosen by the mean over its seeds on the selection part, and only that one's
report is shown, so nothing is chosen by what is reported (protocol 10).
"""

import json
import re
from collections.abc import Sequence

from plm.analysis.overlap import PRETRAINED, flag
from plm.analysis.results import MAJORITY
from plm.reporting.runs import Run, is_finite
from plm.reporting.statistics import Summary, summarise
from plm.reporting.studies import is_selection
from plm.reporting.tables import Column, Table

# What a grid goes over: learning rate and duration, with what is resolved from them.
TRIED = ("optimizer.peak_lr", "total_steps")
_DEPENDENT = ("optimizer.warmup_steps", "optimizer.schedule_steps")
SUITE = "task"
NO_SPLIT = ("all", "learned")  # rows that are no score: the overlap with the pretraining text, shares in a mix


def _measured(run: Run) -> dict[str, dict[str, dict]]:
    """{metric: {"selection" or "report": row}} of the suite, in the order in which they were written."""
    found: dict[str, dict[str, dict]] = {}
    for row in run.results:
        if row.get("suite") != SUITE or not row.get("predictions") or not is_finite(row.get("value")):
            continue
        if row.get("split") in NO_SPLIT or f"/{MAJORITY}/" in str(row["metric"]):
            continue
        part = "selection" if is_selection(row.get("split")) else "report"
        found.setdefault(str(row["metric"]), {})[part] = row
    return found


def _cell(run: Run) -> str:
    settings = {key: value for key, value in run.settings.items() if key not in (*TRIED, *_DEPENDENT)}
    return json.dumps([settings, run.vocabulary], sort_keys=True, default=str)


def _label(run: Run) -> str:
    """What the cell is, in words: the model that it starts from, what is trained, what its head reads."""
    settings = run.settings
    source = str(settings.get("init.from", "")).rstrip("/").rsplit("/", 1)[-1] or "no model"
    start = {"nothing": "from scratch, vocabulary of", "all": "going on from"}.get(str(settings.get("init.keep")), "")
    parts = [f"{start} {source}".strip()]
    frozen = settings.get("optimizer.freeze")
    parts += ["frozen"] if frozen else []
    heads = {key.split(".")[1] for key in settings if re.fullmatch(r"objectives\.\w+\.reads", key)}
    for head in sorted(heads):
        reads, lstm = settings[f"objectives.{head}.reads"], settings.get(f"objectives.{head}.lstm")
        parts += [f"{reads}{' + BiLSTM' if lstm else ''}"] if reads != "last" or lstm else []
    if settings.get("init.reset"):
        parts.append(f"reset {settings['init.reset']}")
    if settings.get("data.task.shuffled_labels"):
        parts.append("shuffled labels")
    if settings.get("data.task.fraction", 1.0) != 1.0:
        parts.append(f"{100 * settings['data.task.fraction']:g}% of the labels")
    if settings.get("data.task.held_out_fraction", 1.0) != 1.0:
        parts.append(f"measured on {100 * settings['data.task.held_out_fraction']:g}% of the examples")
    return ", ".join(parts)


def _pretrained(runs: Sequence[Run]) -> str | None:
    """The largest share of 8-grams that a model of these runs was pretrained on."""
    rows = (row for run in runs for row in run.results if str(row.get("metric")).endswith(f"/{PRETRAINED}"))
    shares = [row["value"] for row in rows if is_finite(row.get("value"))]
    if not shares:
        return None
    return f"{100 * max(shares):.2f}{flag(max(shares))}"


def _trial(run: Run) -> tuple:
    return tuple(run.settings.get(key) for key in TRIED)


def _summary(runs: Sequence[Run], metric: str, part: str) -> Summary | None:
    rows = (_measured(run).get(metric, {}).get(part) for run in runs)
    return summarise([100 * row["value"] for row in rows if row])


def table(runs: Sequence[Run]) -> Table | None:
    """A row for each cell and metric; None without runs on tasks."""
    tuned = [run for run in runs if run.is_task]
    cells: dict[str, list[Run]] = {}
    for run in tuned:
        cells.setdefault(_cell(run), []).append(run)
    rows = []
    for group in cells.values():
        done = [run for run in group if _measured(run)]
        trials: dict[tuple, list[Run]] = {}
        for run in done:
            trials.setdefault(_trial(run), []).append(run)
        tried = len({_trial(run) for run in group})
        if not trials:
            rows.append([_label(group[0]), None, None, tried, len(group), None, None, None, None])
            continue
        first = next(iter(_measured(done[0])))
        means = {trial: _summary(own, first, "selection") for trial, own in trials.items()}
        chosen = max(trials, key=lambda trial: means[trial].mean if means[trial] else float("-inf"))
        setting = f"{chosen[0]:g}, {chosen[1]:,} steps" if chosen[0] and chosen[1] else str(chosen)
        for metric in _measured(trials[chosen][0]):
            own = trials[chosen]
            n = _measured(own[0])[metric].get("report", {}).get("n")
            selection, report = (_summary(own, metric, part) for part in ("selection", "report"))
            seen = _pretrained(own)
            rows.append([_label(group[0]), metric, setting, tried, len(group), selection, report, n, seen])
    if not rows:
        return None
    columns = [
        Column("cell"),
        Column("metric"),
        Column("chosen rate and duration"),
        Column("trials"),
        Column("runs"),
        Column("selection", "%", ".1f"),
        Column("report", "%", ".1f", interval=True),
        Column("examples reported", "", ",.0f"),
        Column("8-grams pretrained on", "%"),
    ]
    note = (
        "Rate and duration are chosen by the mean over seeds on the selection part; the report part is measured for the"
        " chosen setting only. ± is over runs that differ in their seeds; every value is listed."
    )
    return Table("transfer", "On the task", columns, rows, note).without_empty_columns()
