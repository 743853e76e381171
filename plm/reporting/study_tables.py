"""A study's results as tables: ours beside the paper's, and for each claim a contrast, its interval and a verdict."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from plm.analysis.overlap import flag
from plm.reporting import studies
from plm.reporting.statistics import (
    FEWEST_SEEDS,
    Contrast,
    Summary,
    Term,
    contrast,
    holm,
    smallest_p,
    summarise,
    verdict,
)
from plm.reporting.studies import Claim, Results, Study
from plm.reporting.tables import Column, Table

LISTED = 6  # places that are named in a note


def identifier(study: Study) -> str:
    """For file names and anchors."""
    return f"{study.name}_{study.budget}"


def summary(results: Results, row: str, column: str) -> Summary | None:
    """Over pretraining runs."""
    return summarise(results.means(row, column))


def _spread_of_curve(study: Study) -> set[str]:
    """Columns that are points of a curve stand in its figure, and in a table of their own."""
    return {column.name for column in study.columns if column.x is not None}


def cells_table(results: Results) -> Table | None:
    """Arms x quantities: mean ± sd over pretraining runs, and the paper's number."""
    study, of_curves = results.study, _spread_of_curve(results.study)
    shown = [column for column in study.columns if column.name not in of_curves]
    if not shown:
        return None
    columns: list[Column] = [Column("arm")]
    for one in shown:
        columns.append(Column(_flagged(results, one), one.unit, f".{one.digits}f", interval=True))
        columns.append(Column(f"{one.label}, paper", one.unit, f".{one.digits}f"))
    rows, muted = [], set()
    for number, row in enumerate(study.rows):
        cells: list[Any] = [row.label]
        for one in shown:
            cells += [summary(results, row.name, one.name), study.paper.get(row.name, {}).get(one.name)]
        rows.append(cells)
        if row.control:
            muted.add(number)
    note = [_measured(study), _seeds(results), _missing(results), _overlap(results, shown)]
    title = f"{study.title}: ours at budget {study.budget}, and the paper's"
    table = Table(f"{identifier(study)}_cells", title, columns, rows, " ".join(filter(None, note)), muted, compact=True)
    return table.without_empty_columns()


def curve_tables(results: Results) -> list[Table]:
    """For each group of columns, arms x points."""
    study, tables = results.study, []
    for drawing in study.drawings:
        own = [column for column in study.columns if column.group == drawing.group and column.x is not None]
        rows = [
            [row.label, *(summary(results, row.name, column.name) for column in own)]
            for row in study.rows
            if any((row.name, column.name) in study.cells for column in own)
        ]
        if rows:
            columns = [Column("arm"), *(Column(c.label, c.unit, f".{c.digits}f") for c in own)]
            note = " ".join(filter(None, [_seeds(results), _missing(results), _overlap(results, own)]))
            name = f"{identifier(study)}_{drawing.group}"
            tables.append(Table(name, drawing.title, columns, rows, note, compact=True))
    return tables


def claims_table(results: Results) -> Table | None:
    """A row for each claim: what the paper found, what we find, and what that allows to say."""
    study = results.study
    if not study.claims:
        return None
    found = [measure(results, claim) for claim in study.claims]
    adjusted = _adjusted(study.claims, found)
    rows = []
    for claim, one, together in zip(study.claims, found, adjusted, strict=True):
        smallest = smallest_effect(results, claim)
        measured = [study.column(name) for _, name, _ in claim.terms]
        units = dict.fromkeys(column.unit or column.label for column in measured)
        unit = "standard deviations" if claim.standardised else " and ".join(units)
        kind = claim.family or ("exploratory" if any(other.family for other in study.claims) else None)
        row = [claim.name, claim.text + _flag_of(results, claim), kind, claim.effect]
        if one is None:
            rows.append([*row, None, None, unit, None, None, None, smallest, _unmeasured(results, claim)])
            continue
        interval = None if one.interval is None else " to ".join(map(Column("", "", _signed).number, one.interval))
        ours, n, word = summarise(one.by_seed), len(one.by_seed), verdict(one, smallest).text()
        rows.append([*row, ours, interval, unit, n, one.p, together, smallest, word])
    columns = [
        Column("claim"),
        Column("what is said"),
        Column("kind"),
        Column("paper", "", _signed),
        Column("ours", "", _signed),
        Column("95% interval"),
        Column("in"),
        Column("pretraining runs", "", ".0f"),
        Column("sign-flip p", "", ".3f"),
        Column("p, Holm", "", ".3f"),
        Column("smallest effect of interest", "", ".2g"),
        Column("verdict"),
    ]
    title = f"{study.title}: what it claims, and what these runs say"
    table = Table(f"{identifier(study)}_claims", title, columns, rows, _how(results), compact=True)
    return table.without_empty_columns()


def runs_table(results: Results) -> Table | None:
    """Every cell's runs with their numbers, a row each: what the means are made of."""
    study, rows = results.study, []
    titles = {drawing.group: drawing.title for drawing in study.drawings}
    facts = {cell.place: results.facts(cell.place) for own in study.cells.values() for cell in own}
    for (row, name), cells in study.cells.items():
        column = study.column(name)
        found = {value.cell: value.value for value in results.values[row, name]}
        for cell in cells:
            run, devices = facts[cell.place], facts[cell.place].get("devices") or {}
            hardware = f"{devices['count']} x {devices['kind']}" if "kind" in devices else None
            run_name = cell.place.rstrip("/").rpartition("/")[2]
            # A point of a curve has no name but its place on the axis.
            label = column.label if column.x is None else f"{titles.get(column.group, column.group)}: {column.label}"
            own = [study.label(row), label, column.unit, cell.seed, cell.head, found.get(cell), run_name]
            rows.append([*own, run.get("status", "not started"), run.get("commit"), hardware, run.get("seconds")])
    if not rows:
        return None
    columns = [
        Column("arm"),
        Column("quantity"),
        Column("unit"),
        Column("pretraining seed", "", ".0f"),
        Column("head seed", "", ".0f"),
        Column("value", "", ".4g"),
        Column("run"),
        Column("status"),
        Column("commit", at_most=7),
        Column("hardware"),
        Column("training", "s", ".0f"),
    ]
    note = f"Made by: {study.command}" if study.command else ""
    title = f"{study.title}: the {len(rows):,} numbers behind it, and the run of each"
    return Table(f"{identifier(study)}_numbers", title, columns, rows, note, folded=True)


def _adjusted(claims: Sequence[Claim], found: Sequence[Contrast | None]) -> list[float | None]:
    """Holm's p of each claim in its family, those of it that are not measured yet counted."""
    adjusted: list[float | None] = [None] * len(claims)
    for family in dict.fromkeys(claim.family for claim in claims if claim.family):
        members = [i for i, claim in enumerate(claims) if claim.family == family]
        own = [i for i in members if found[i] is not None]
        for index, p in zip(own, holm([found[i].p for i in own], len(members)), strict=True):
            adjusted[index] = p
    return adjusted


def facts_table(study: Study) -> Table | None:
    """The study's table of words."""
    if not study.facts:
        return None
    heading, *rows = study.facts
    return Table(f"{identifier(study)}_facts", "What each is", [Column(name) for name in heading], rows)


def _signed(value: float) -> str:
    text = f"{value:+.1f}" if abs(value) >= 0.095 else f"{value:+.2f}"
    return text if float(text) else "0.0"


def smallest_effect(results: Results, claim: Claim) -> float | None:
    """Of the columns that the claim is about, in the claim's own unit; None where that is not known (`_scales`)."""
    scale = _scales(results, claim)
    if None in scale.values():
        return None
    return float(np.mean([results.study.column(column).smallest / scale[column] for _, column, _ in claim.terms]))


def measure(results: Results, claim: Claim) -> Contrast | None:
    """Over the pretraining runs that all cells of the claim have; None where there is none, or where a column that has
    to be divided by its deviation has none."""
    scale = _scales(results, claim)
    if None in scale.values():
        return None
    cells = [(results.by_seed(row, column), weight / scale[column], column) for row, column, weight in claim.terms]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed, _, _ in cells)))
    if not seeds:
        return None
    terms = []
    for by_seed, weight, column in cells:
        own = [by_seed[seed] for seed in seeds]
        values = [[value.value for value in heads] for heads in own]
        sets = {value.examples for heads in own for value in heads}
        counted = len(sets) == 1 and all(value.counts is not None for heads in own for value in heads)
        counts = [[value.counts for value in heads] for heads in own] if counted else None
        factor = results.study.column(column).factor
        terms.append(Term(weight, values, counts, sets.pop() if counted else 0, factor))
    return contrast(terms)


def _scales(results: Results, claim: Claim) -> dict[str, float | None]:
    """{column: what its numbers are divided by}: if the claim is standardised their deviation over the runs of all arms
    that are no controls, None where there are fewer than two or all are equal."""
    columns = dict.fromkeys(column for _, column, _ in claim.terms)
    if not claim.standardised:
        return dict.fromkeys(columns, 1.0)
    models, scales = [row.name for row in results.study.rows if not row.control], {}
    for column in columns:
        values = [value for row in models for value in results.means(row, column)]
        scales[column] = float(np.std(values, ddof=1)) if len(values) > 1 and np.ptp(values) > 0 else None
    return scales


def _unmeasured(results: Results, claim: Claim) -> str:
    """Why `measure` has no number of a claim."""
    if all(results.means(row, column) for row, column, _ in claim.terms):
        flat = [results.study.column(name).label for name, scale in _scales(results, claim).items() if scale is None]
        if flat:
            return f"cannot be standardised: all arms are equal on {', '.join(flat)}"
    return "not measured yet"


def _measured(study: Study) -> str:
    named = [f"{column.label}: here {column.measured}" for column in study.columns if column.measured]
    return "; ".join(dict.fromkeys(named)) + "." if named else ""


def _flagged(results: Results, column: studies.Column) -> str:
    """The column's label, and protocol 1's flag."""
    return column.label + flag(results.pretrained(column))


def _flag_of(results: Results, claim: Claim) -> str:
    """Protocol 1's flag of a claim, if one of its columns has it."""
    return flag(max(results.pretrained(results.study.column(name)) for name in {name for _, name, _ in claim.terms}))


def _overlap(results: Results, columns: Sequence[studies.Column]) -> str:
    shares = {column.metric.partition("/")[0]: results.pretrained(column) for column in columns}
    named = [f"{task} {share:.1%}" for task, share in shares.items() if flag(share)]
    return f"FLAGGED: of the task's 8-grams these were in the pretraining text: {', '.join(named)}." if named else ""


def _seeds(results: Results) -> str:
    counts = sorted({len(results.by_seed(*key)) for key in results.study.cells})
    if not counts:
        return ""
    heads = max((len(own) for key in results.study.cells for own in results.by_seed(*key).values()), default=1)
    nested = f", each the mean of {heads} head seeds" if heads > 1 else ""
    if counts[-1] <= 1:
        return "One pretraining run for each arm: differences include the chance of the seed."
    return f"± is over {counts[-1]} pretraining runs{nested}."


def _missing(results: Results) -> str:
    missing = results.missing
    if not missing:
        return ""
    listed = ", ".join(place.rstrip("/").rpartition("/")[2] for place in missing[:LISTED])
    more = f" and {len(missing) - LISTED:,} more" if len(missing) > LISTED else ""
    return f"Not there yet: {listed}{more}."


def _how(results: Results) -> str:
    n = max((len(results.by_seed(*key)) for key in results.study.cells), default=0)
    found = [c for c in (measure(results, claim) for claim in results.study.claims) if c is not None]
    text = (
        "Runs with the same seed are paired. Intervals: crossed bootstrap over pretraining runs and examples, 10,000."
    )
    if found and not all(one.over_examples for one in found):
        text += " Where a quantity is no ratio of counts, or has none, only over runs."
    if n > 1:
        text += f" The exact sign-flip test over {n} runs cannot go below p = {smallest_p(n):.3g};"
        text += " a bootstrap over so few is narrow: read " + ("a verdict" if n >= FEWEST_SEEDS else "it")
        text += " together with p."
    if n < FEWEST_SEEDS:
        text += f" Fewer than {FEWEST_SEEDS} pretraining runs: no verdicts."
    if not any(claim.family for claim in results.study.claims):
        text += " None of these contrasts is a primary one of the protocol: they are exploratory."
    return text + " Verdicts as docs/protocol.md, 15."


def overview(all_results: Sequence[Results]) -> Table | None:
    """Every claim of every study, a row each."""
    rows = []
    for results in all_results:
        study = results.study
        for claim in study.claims:
            found = measure(results, claim)
            word = (
                _unmeasured(results, claim) if found is None else verdict(found, smallest_effect(results, claim)).text()
            )
            ours = None if found is None else summarise(found.by_seed)
            n = None if found is None else len(found.by_seed)
            text, kind = claim.text + _flag_of(results, claim), claim.family or "exploratory"
            rows.append([claim.name, study.title, text, kind, study.budget, claim.effect, ours, n, word])
    if not rows:
        return None
    columns = [
        Column("claim"),
        Column("table"),
        Column("what is said"),
        Column("kind"),
        Column("budget"),
        Column("paper", "", _signed),
        Column("ours", "", _signed),
        Column("pretraining runs", "", ".0f"),
        Column("verdict"),
    ]
    return Table("claims", "Every claim and its verdict", columns, rows, compact=True).without_empty_columns()
