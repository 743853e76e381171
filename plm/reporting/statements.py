"""What a paper has to say of its runs and its data, from what the runs wrote: a statement and a data card."""

from collections import Counter
from collections.abc import Iterable, Sequence

from plm.reporting.runs import Run
from plm.reporting.studies import Study
from plm.reporting.tables import Column, Table, duration, quantity

NAMED = 4  # different values that are listed by name


def reproducibility(runs: Sequence[Run], studies: Iterable[Study] = ()) -> str:
    """A paragraph: what ran, on what, of which code, and how to run it again."""
    pretrained = [run for run in runs if not run.is_task]
    on_tasks = len(runs) - len(pretrained)
    failed = [run for run in runs if run.get("status") == "failed"]
    unfinished = [run for run in runs if not run.complete and run not in failed]
    parts = [
        f"{_count(len(pretrained), 'pretraining run')} and {_count(on_tasks, 'run')} on tasks were started; "
        f"{len(failed)} failed and {len(unfinished)} are unfinished, all of them are listed."
    ]
    seconds = sum(run.seconds or 0.0 for run in runs)
    flops = sum(float(run.get("flops") or 0.0) for run in runs)
    spent = f"Training took {duration(seconds)} of wall time in all"
    parts.append(spent + (f" and {quantity(flops)}FLOP by formula." if flops else "."))
    parts.append(_listed("Commit", (run.get("commit") for run in runs)))
    if changed := sum(bool(run.get("uncommitted")) for run in runs):
        parts.append(f"{_count(changed, 'run')} had uncommitted changes, whose hash is in run.json.")
    parts.append(_listed("Devices", (_device(run) for run in runs)))
    parts.append(_listed("Versions", (_versions(run) for run in runs)))
    parts.append(_listed("Protocol", (run.get("protocol") for run in runs)))
    seeds = sorted({run.get("seeds", "init") for run in pretrained if run.get("seeds", "init") is not None})
    if seeds:
        parts.append(f"Pretraining seeds: {', '.join(map(str, seeds))}.")
    parts.append(
        "Batches, masks and noise are functions of the seed and the step: the same command on the same devices and "
        "versions gives the same parameters, bit for bit."
    )
    if commands := [study.command for study in studies if study.command]:
        parts.append("To run it again: " + "; ".join(dict.fromkeys(commands)) + ".")
    return " ".join(part for part in parts if part)


def data_card(runs: Sequence[Run]) -> Table | None:
    """A row for each corpus and task that the runs read."""
    found: dict[tuple, Run] = {}
    for run in runs:
        if run.corpus:
            found.setdefault((run.get("corpus", "source"), run.corpus), run)
    if not found:
        return None
    rows = []
    for (source, fingerprint), run in found.items():
        licence = run.get("corpus", "licence")
        train, valid = (run.get("store", split, default={}) for split in ("train", "valid"))
        rows.append(
            [
                source,
                "a labelled task" if run.is_task else "pretraining",
                licence or "not stated by the data",
                train.get("n_documents"),
                train.get("n_words"),
                train.get("n_bytes"),
                valid.get("n_words"),
                fingerprint,
            ]
        )
    columns = [
        Column("data"),
        Column("used for"),
        Column("licence"),
        Column("documents or examples, training", "", ",.0f"),
        Column("words, training", "", ",.0f"),
        Column("bytes, training", "", ",.0f"),
        Column("words, held out", "", ",.0f"),
        Column("fingerprint", at_most=12),
    ]
    return Table("data_card", "Data", columns, rows).without_empty_columns()


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _listed(what: str, values: Iterable[str | None]) -> str:
    counts = Counter(value for value in values if value)
    if not counts:
        return ""
    shown = [f"{value} ({n} runs)" if len(counts) > 1 else str(value) for value, n in counts.most_common(NAMED)]
    more = f" and {len(counts) - NAMED} more" if len(counts) > NAMED else ""
    return f"{what}: {', '.join(shown)}{more}."


def _device(run: Run) -> str | None:
    devices = run.get("devices")
    if not isinstance(devices, dict):
        return None
    return f"{devices.get('count', 1)} x {devices.get('kind') or devices.get('platform')}"


def _versions(run: Run) -> str | None:
    versions = run.get("versions")
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else None
