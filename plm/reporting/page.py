"""The page: sections of figures and tables as one self-contained HTML file, and the same tables as Markdown and CSV.

No server, no script that is needed for reading (one short script saves a figure as SVG), no font or style from
elsewhere. Everything that comes from a run passes `html.escape`.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template

from plm.reporting import plots, statements, study_tables, tables, transfer
from plm.reporting.plots import Figure
from plm.reporting.runs import Arm, Run, arms
from plm.reporting.statistics import Summary
from plm.reporting.studies import Results
from plm.reporting.tables import Table


@dataclass
class Section:
    """A heading, a sentence or two, and blocks: figures, tables, or ready HTML (already escaped)."""

    title: str
    intro: str = ""
    blocks: list[Figure | Table | str] = field(default_factory=list)
    anchor: str = ""


def sections(runs: Sequence[Run]) -> list[Section]:
    """All sections for runs that may share tables (`runs.by_corpus`)."""
    every = arms(runs)
    look = plots.looks(every)
    panels = tables.panels(every)
    on_task = transfer.table(runs)
    result = [Section("Transfer", "", [on_task])] if on_task else []
    if every:
        result.append(Section("At a glance", tables.seed_note(every), [_cards(panels)]))
    else:
        intro = "No run has logged a step together with its corpus yet: there is nothing to compare, only to list."
        result.append(Section("At a glance", intro))
    if panels:
        curves = Section(
            "Learning curves",
            "Each panel holds one quantity. Left-to-right, right-to-left and masked predictions are different "
            "questions, and tokens of different vocabularies different units: they never share an axis, nor a ranking.",
        )
        for panel in panels:
            curves.blocks += [f"<h3>{escape(panel.heading)}</h3>", plots.curves(panel, look), tables.panel_table(panel)]
        result.append(curves)
    if every:
        size = Section("Sizes and budgets", "", [tables.corpus_table(runs), plots.parameters_by_part(every)])
        size.blocks += [tables.parameter_table(every), tables.cost_table(every)]
        result.append(size)
    samples = _samples(every)
    if samples:
        intro = "Nothing here was selected: the first of each kind that the run wrote."
        result.append(Section("Samples", intro, samples))
    senses = [plots.senses_by_layer(every, look), plots.sense_pictures(every), tables.sense_table(every)]
    reasons = {arm.first.senses["reason"] for arm in every if arm.first.senses.get("reason")}
    if any(senses) or reasons:
        rules = {arm.first.senses["rule"] for arm in every if arm.first.senses.get("rule")}
        intro = "A word's meaning depends on its context; do the vectors? " + " ".join(
            f"Rule: {r}." for r in sorted(rules)
        )
        intro += " ".join(f" Not measured: {reason}." for reason in sorted(reasons))
        result.append(Section("Senses by pseudo-words", intro, [*senses, _examples(every)]))
    result.append(Section("Further evaluations", "", [tables.further_table(every)]))
    result.append(
        Section(
            "Runs and provenance",
            "Every started run is listed.",
            [tables.run_table(runs), tables.provenance_table(runs), tables.settings_table(every)],
        )
    )
    return _kept(result)


@dataclass
class Part:
    """The runs of one corpus, or the studies, and their sections. mark: begins the names of its files; studies: their
    titles."""

    runs: Sequence[Run]
    heading: str
    sections: list[Section]
    mark: str = ""
    studies: Sequence[str] = ()


def of_studies(all_results: Sequence[Results], runs: Sequence[Run]) -> Part:
    """The studies first, then what their runs are. runs: those on tasks, which are cells of them."""
    titles = [results.study.title for results in all_results]
    found = [Section("Claims", CLAIMS, [study_tables.overview(all_results)])] if len(all_results) > 1 else []
    for results in all_results:
        study = results.study
        title = study.title if len(titles) > 1 else "Results"  # the page has the title of its only study
        title += f", budget {study.budget}" if titles.count(title) > 1 else ""
        section = Section(title, f"{study.source}. Budget {study.budget}: {study.about}.")
        section.blocks = [study_tables.facts_table(study), study_tables.cells_table(results)]
        section.blocks.append(study_tables.claims_table(results))
        for number, drawing in enumerate(study.drawings):
            name = f"{study_tables.identifier(study)}_{drawing.group}_{number}"
            section.blocks.append(plots.study_figure(results, drawing, name))
        section.blocks += [*study_tables.curve_tables(results), study_tables.runs_table(results)]
        found.append(section)
    if runs:
        listed = [tables.run_table(runs), tables.provenance_table(runs)]
        for table in listed:
            table.name, table.folded = f"task_{table.name}", True
        found.append(Section("Runs on tasks", "Every started run is listed, failures too.", listed))
    return Part(runs, "Studies" if len(titles) > 1 else "Study", _kept(found), studies=titles)


def _kept(found: Sequence[Section]) -> list[Section]:
    """Those that hold something, with names to go to, each its own: one study may be there at two budgets."""
    taken: Counter[str] = Counter()
    for section in found:
        section.blocks = [block for block in section.blocks if block]
        anchor = re.sub(r"\W+", "-", section.title.lower()).strip("-")
        taken[anchor] += 1
        section.anchor = anchor if taken[anchor] == 1 else f"{anchor}-{taken[anchor]}"
    return [section for section in found if section.blocks or section.intro]


def prepare(
    groups: Sequence[Sequence[Run]], all_results: Sequence[Results] = (), on_tasks: Sequence[Run] = ()
) -> list[Part]:
    """Draws every figure and fills every table, once for all outputs.

    groups: runs that may share tables; all_results: of studies; on_tasks: runs that are nothing but cells of them.
    """
    parts = [of_studies(all_results, on_tasks)] if all_results else []
    groups = [runs for runs in groups if runs] or ([] if parts else [[]])
    for number, runs in enumerate(groups, 1):
        name = next((run.get("corpus", "source") for run in runs if run.corpus), "unknown source")
        fingerprint = next((run.corpus for run in runs if run.corpus), "unknown")
        mark = f"corpus{number}_" if len(groups) > 1 else ""
        heading = f"Corpus {number}: {name} (fingerprint {fingerprint[:12]})"
        parts.append(Part(runs, heading, sections(runs), mark))
    everything = [run for part in parts for run in part.runs]
    statement = Section("Reproducibility", statements.reproducibility(everything, [r.study for r in all_results]))
    statement.blocks = [statements.data_card(everything)]
    parts[-1].sections += _kept([statement])
    return parts


def title(parts: Sequence[Part]) -> str:
    """Of the page: what it is about."""
    titles = [study for part in parts for study in part.studies]
    if len(titles) > 1:
        return f"{len(titles)} studies"
    return titles[0] if titles else "Language models compared"


def html(parts: Sequence[Part]) -> str:
    """The whole page; several corpora come one after another, each with all its sections."""
    body, links = [], []
    for number, part in enumerate(parts):
        mark = f"{number}-" if len(parts) > 1 else ""
        if mark:
            body.append(f'<h1 class="corpus" id="{mark}corpus">{_breakable(escape(part.heading))}</h1>')
            links.append(f'<a href="#{mark}corpus"><b>{_breakable(escape(part.heading))}</b></a>')
        for section in part.sections:
            body.append(_section(section, mark))
            links.append(f'<a href="#{mark}{section.anchor}">{escape(section.title)}</a>')
    everything = [run for part in parts for run in part.runs]
    started = sorted(str(run.get("started"))[:16].replace("T", " ") for run in everything if run.get("started"))
    when = f", started {started[0]}" + (f" to {started[-1]}" if started[-1] != started[0] else "") if started else ""
    complete = sum(run.complete for run in everything)
    return PAGE.substitute(
        title=escape(title(parts)),
        lead=escape(f"{len(everything)} runs, {complete} complete{when}"),
        links="\n".join(links),
        body="\n".join(body),
        style=STYLE,
        script=SCRIPT,
    )


def markdown(parts: Sequence[Part]) -> str:
    """Every table of the page as Markdown."""
    lines = [f"# {title(parts)}\n"]
    for part in parts:
        if len(parts) > 1:
            lines.append(f"# {part.heading}\n")
        for section in part.sections:
            found = [block for block in section.blocks if isinstance(block, Table)]
            if found:
                lines += [f"## {section.title}\n", *([f"{section.intro}\n"] if section.intro else [])]
                lines += [table.markdown() for table in found]
    return "\n".join(lines)


NOTES = "tables.txt"


def files(parts: Sequence[Part], kinds: Sequence[str]) -> dict[str, str]:
    """File name -> text: `<table>.csv` and `<table>.tex` for each table, `<figure>.svg` for each figure, and with the
    CSV files NOTES, which has what stands below the tables; of several corpora those of each get its number. A second
    one of a name (a study of two roots) is `<name>-2`."""
    result, notes = {}, []
    taken: Counter[tuple[str, str]] = Counter()
    for part in parts:
        for block in (block for section in part.sections for block in section.blocks):
            if not isinstance(block, Table | Figure):
                continue
            name = f"{part.mark}{block.name}"
            kind = "figure" if isinstance(block, Figure) else "table"
            taken[kind, name] += 1
            name += f"-{taken[kind, name]}" if taken[kind, name] > 1 else ""
            if isinstance(block, Figure):
                if "svg" in kinds:
                    result[f"{name}.svg"] = plots.standalone(block.svg)
                continue
            if "csv" in kinds:
                target = io.StringIO()
                csv.writer(target, lineterminator="\n").writerows(block.csv_rows())
                result[f"{name}.csv"] = target.getvalue()
                notes.append(f"{name}.csv: {block.title}" + (f"\n    {block.note}" if block.note else ""))
            if "tex" in kinds:
                result[f"{name}.tex"] = block.latex()
    return result | ({NOTES: "\n".join(notes) + "\n"} if notes else {})


def _section(section: Section, mark: str) -> str:
    blocks = []
    for block in section.blocks:
        if isinstance(block, Figure):
            blocks.append(_figure(block))
        elif isinstance(block, Table):
            blocks.append(_table(block))
        else:
            blocks.append(block)
    intro = f'<p class="intro">{escape(section.intro)}</p>' if section.intro else ""
    return f'<section id="{mark}{section.anchor}"><h2>{escape(section.title)}</h2>{intro}{"".join(blocks)}</section>'


def _figure(figure: Figure) -> str:
    note = f'<p class="note">{escape(figure.note)}</p>' if figure.note else ""
    points = float(re.search(r'viewBox="0 0 ([\d.]+)', figure.svg)[1])
    return (
        f'<figure style="--points: {points:g}"><figcaption><b>{escape(figure.title)}</b> '
        f'<button type="button" class="save" data-name="{escape(figure.name)}.svg">save SVG</button></figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(figure.title)}">{figure.svg}</div>{note}</figure>'
    )


def _table(table: Table) -> str:
    numeric = [table.is_numeric(i) for i in range(len(table.columns))]

    def heading(i: int) -> str:
        column = table.columns[i]
        unit = f' <span class="unit">{escape(column.unit)}</span>' if column.unit else ""
        length = len(column.name)
        kinds = [*(["number"] if numeric[i] else []), *(["short"] if length < 13 else ["wide"] if length > 30 else [])]
        return f'<th scope="col" class="{" ".join(kinds)}">{escape(column.name)}{unit}</th>'

    def cell(i: int, value) -> str:
        column = table.columns[i]
        text = escape(column.text(value)[: column.at_most])
        detail = escape(column.detail(value)) if isinstance(value, Summary) and value.n > 1 else ""
        if detail:
            text = f'<span tabindex="0" title="{detail}">{text}</span><span class="values">{detail}</span>'
        length = len(text) if isinstance(value, str) else 0
        if i == 0:
            return f'<th scope="row"{LABEL if length > 6 else ""}>{_breakable(text)}</th>'
        kind = NUMBER if numeric[i] else LONG if length > 60 else SHORT if length < 30 else ""
        return f"<td{kind}>{text}</td>"

    head = "".join(heading(i) for i in range(len(table.columns)))
    rows = []
    for number, row in enumerate(table.rows):
        muted = ' class="muted"' if number in table.muted else ""
        rows.append(f"<tr{muted}>{''.join(cell(i, value) for i, value in enumerate(row))}</tr>")
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    kind = ' class="compact"' if table.compact else ""
    body = (
        f'<div class="table"><table{kind} aria-label="{escape(table.title)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
    )
    if table.folded:
        return f'<details><summary class="caption">{escape(table.title)}</summary>{body}</details>'
    return f'<p class="caption">{escape(table.title)}</p>{body}'


def _breakable(text: str) -> str:
    """Escaped names of runs and settings wrap after their signs, not inside a word."""
    return re.sub(r"(?<=[._/=,])(?=[A-Za-z])", "<wbr>", text)


def _cards(panels: Sequence[tables.Panel]) -> str:
    """One card per panel: the finding in words. Not one ranking: every card has its own unit."""
    cards = []
    for panel in panels:
        details = "".join(f"<li>{escape(line)}</li>" for line in panel.distances)
        details = f"<ul>{details}</ul>" if details else ""
        cards.append(
            f'<div class="card"><h4>{escape(panel.heading)}</h4><p>{escape(panel.finding)}.</p>{details}</div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _samples(every: Sequence[Arm], limit: int = 12, per_kind: int = 3) -> list[str]:
    cards = []
    for arm in every:
        parts = []
        for kind, show in (("continuation", _continuation), ("fill_mask", _filled)):
            latest = max((s.get("step") or 0 for s in arm.first.samples if s.get("kind") == kind), default=0)
            chosen = [s for s in arm.first.samples if s.get("kind") == kind and (s.get("step") or 0) == latest]
            parts += [show(sample) for sample in chosen[:per_kind]]
        if parts:
            cards.append(f'<div class="sample"><h4>{escape(arm.label)}</h4>{"".join(parts)}</div>')
    if len(cards) > limit:
        cards = [*cards[:limit], f"<p>{len(cards) - limit} more models wrote samples; see their samples.json.</p>"]
    return [f'<div class="samples">{"".join(cards)}</div>'] if cards else []


def _continuation(sample: dict) -> str:
    settings = f'<span class="unit"> {escape(str(sample["settings"]))}</span>' if sample.get("settings") else ""
    prompt, text = escape(str(sample.get("prompt", ""))), escape(str(sample.get("text", "")))
    return f'<p class="text">{prompt}<mark>{text}</mark>{settings}</p>'


def _filled(sample: dict) -> str:
    pieces = escape(str(sample.get("text", ""))).split("[MASK]")
    masks = sample.get("masked") or []
    out, rows = pieces[0], []
    for number, piece in enumerate(pieces[1:]):
        guesses = (masks[number].get("predictions") or []) if number < len(masks) else []
        truth = masks[number].get("truth") if number < len(masks) else None
        top = escape(str(guesses[0][0])) if guesses else "▁"
        out += f"<mark>{top}</mark>{piece}"
        if guesses:
            listed = ", ".join(f"{escape(str(word))} {100 * float(share):.0f}%" for word, share in guesses[:5])
            right = f" (was: <b>{escape(str(truth))}</b>)" if truth is not None else ""
            rows.append(f"<li>{listed}{right}</li>")
    return f'<p class="text">{out}</p><ol class="guesses">{"".join(rows)}</ol>'


def _examples(every: Sequence[Arm]) -> str:
    """The sentences behind the first model's picture."""
    for arm in every:
        picture = arm.first.senses.get("picture")
        if picture and picture.get("examples"):
            form = escape(picture["form"])
            rows = "".join(
                f"<li>{escape(before)} <mark>{form}</mark> {escape(after)} "
                f'<span class="unit">(was: {escape(picture["words"][truth])})</span></li>'
                for before, after, truth in picture["examples"]
            )
            return f"<h4>Some sentences behind the first picture</h4><ul class='examples'>{rows}</ul>"
    return ""


CLAIMS = (
    "A verdict needs five pretraining runs: reproduced or reversed where the 95% interval leaves 0 out, equivalent "
    "where the 90% interval lies inside the smallest effect of interest, else inconclusive. Rest the pointer on a "
    "mean, or tap it, to see every seed."
)
NUMBER, LONG, SHORT, LABEL = (f' class="{name}"' for name in ("number", "long", "short", "label"))

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1><p class="intro">$lead</p><nav>$links</nav></header>
<main>
$body
</main>
<script>$script</script>
</body>
</html>
""")

STYLE = """
:root { --ink: #1b1f24; --faint: #5b6570; --grid: #d9dee3; --paper: #ffffff; --panel: #f5f7f9; --accent: #0072b2;
  --mark: #d8ecf8; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9;
  --c6: #333333; --shade: #0003; }
@media screen and (prefers-color-scheme: dark) { :root {
  --ink: #e8eaed; --faint: #a4adb6; --grid: #353c44; --paper: #14171a; --panel: #1c2024;
  --accent: #7cc4f0; --mark: #24425a; --c0: #4ba6e0; --c1: #f08a3c; --c2: #2fc294; --c3: #e09cc4; --c4: #f0b53c;
  --c5: #8fd0f5; --c6: #c9ced3; --shade: #fff3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
  overflow-wrap: break-word; }
h1, h2, h3, .caption, figcaption b { text-wrap: balance; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; }
h1.corpus { margin-top: 4rem; border-top: 3px solid var(--ink); padding-top: 1rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1.05rem; margin: 2.25rem 0 .25rem; }
h4 { font-size: .9rem; margin: 0 0 .35rem; }
.intro { color: var(--faint); max-width: 48rem; margin: .25rem 0 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .9rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.cards, .samples { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); }
.card, .sample { background: var(--panel); border-radius: 6px; padding: .8rem 1rem; overflow-wrap: anywhere; }
.card h4 { color: var(--faint); font-weight: 600; font-size: .8rem; }
.card ul { margin: .3rem 0 0; padding-left: 1.1rem; font-size: .85rem; color: var(--faint); }
.card p { margin: 0; font-size: 1rem; line-height: 1.4; }
figure { margin: .75rem 0 0; }
figcaption { display: flex; gap: 1rem; align-items: baseline; justify-content: space-between; }
figcaption b { min-width: 0; }
.save { font: inherit; font-size: .78rem; color: var(--faint); background: none; border: 1px solid var(--grid);
  border-radius: 4px; padding: .1rem .5rem; cursor: pointer; white-space: nowrap; }
.save:hover { color: var(--ink); }
/* What does not fit scrolls by itself; its edges are shaded where more follows. */
.plot, .table { overflow-x: auto; background: linear-gradient(90deg, var(--paper) .7rem, #0000) 0 / 2rem 100% local,
  linear-gradient(270deg, var(--paper) .7rem, #0000) 100% / 2rem 100% local,
  linear-gradient(90deg, var(--shade), #0000) 0 / .7rem 100% scroll,
  linear-gradient(270deg, var(--shade), #0000) 100% / .7rem 100% scroll;
  background-repeat: no-repeat; }
/* --points: the figure's width. Its text of 8 and 9 points is at least 9 pixels high, and no higher than the page's. */
.plot svg { display: block; width: 100%; height: auto; font-family: inherit;
  min-width: calc(1.125px * var(--points)); max-width: calc(1.5px * var(--points)); }
.note { color: var(--faint); font-size: .83rem; margin: .3rem 0 1.4rem; max-width: 60rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; min-width: min(30rem, 100%); }
.caption { font-weight: 600; font-size: .95rem; margin: 1.4rem 0 .4rem; }
th, td { text-align: left; vertical-align: top; padding: .28rem .8rem .28rem 0;
  border-bottom: 1px solid var(--grid); }
thead th { vertical-align: bottom; border-bottom: 1.5px solid var(--faint); font-weight: 600; line-height: 1.25; }
tbody th { font-weight: 600; max-width: 22rem; }
.label { min-width: 7rem; }
.wide { min-width: 8rem; }
td:not([class]) { min-width: 10rem; }
.number { text-align: right; padding: .28rem .35rem .28rem .7rem; white-space: nowrap; }
thead .number { white-space: normal; }
@media (max-width: 40rem) { thead th.short { white-space: nowrap; } }
td.number + td:not(.number), th.number + th:not(.number) { padding-left: .9rem; }
.unit { color: var(--faint); font-weight: 400; font-size: .8rem; }
.values { display: block; color: var(--faint); font-size: .75rem; white-space: normal;
  min-width: 8rem; max-width: 15rem; margin-left: auto; }
.compact .values { display: none; }
.compact span[title] { border-bottom: 1px dotted var(--faint); cursor: help; }
.compact span:focus + .values { display: block; }
summary { cursor: pointer; }
.muted th, .muted td { color: var(--faint); font-weight: 400; font-style: italic; }
.short { white-space: nowrap; }
.long { min-width: 16rem; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; padding: 0 .12em; border-radius: 2px; }
.text { margin: 0 0 .5rem; white-space: pre-wrap; font-family: Georgia, "DejaVu Serif", serif; font-size: .93rem; }
.guesses { margin: 0 0 .9rem; padding-left: 1.3rem; font-size: .8rem; color: var(--faint); }
.examples { font-size: .87rem; padding-left: 1.1rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .save { display: none; }
  .note { font-size: 8pt; }
  .unit, .values { font-size: 7pt; }
  summary { list-style: none; }
  figure, .card, .sample, tr { break-inside: avoid; }
  h2, h3, figcaption, .caption { break-after: avoid; }
  .plot, .table { overflow: visible; background: none; }
  .plot svg { min-width: 0; }
  details::details-content { content-visibility: visible; }
  table { font-size: 7.5pt; min-width: 0; width: 100%; }
  th, td, .number, .short, thead th.short { white-space: normal; padding-left: .2rem; padding-right: .2rem; }
  .label { min-width: 5rem; }
  .values, .long, .wide, td:not([class]) { min-width: 0; }
  .compact .values { display: block; }
  .card, .sample { border: 1px solid var(--grid); }
  mark { text-decoration: underline; }
}
"""

SCRIPT = """
for (const button of document.querySelectorAll("button.save")) {
  button.addEventListener("click", () => {
    const figure = button.closest("figure").querySelector("svg");
    const svg = new XMLSerializer().serializeToString(figure)
      .replace(/var\\(--\\w+, (#[0-9a-f]+)\\)/g, "$1");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([svg], {type: "image/svg+xml"}));
    link.download = button.dataset.name;
    link.click();
  });
}
"""
