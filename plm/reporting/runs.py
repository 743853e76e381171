"""Workdirs in: everything the report knows it reads here, from JSON files alone, and groups for tables and figures.

A workdir is a folder with any of config.json, run.json, metrics.jsonl. Every file and every field may be missing (a run
that died early is listed, with what is missing); a torn last line is left out. Fields that are read:

run.json
| field | shape | for |
| --- | --- | --- |
| name | str | label; a trailing seed (`-seed3`, `/seed=3`, `_s3`) is cut where seeds are averaged |
| architecture, direction | str | label |
| objectives | [str] | label |
| parameters | {part: int} | parameters by part; `body` is compared, the sum is the total |
| tokens_per_step, total_steps | int | token axis where metrics.jsonl has none; is the run complete? |
| seeds | {init, data: int} | listed |
| corpus | {fingerprint, source, licence} | runs of one table share the fingerprint |
| tokenizer | {fingerprint, kind, size, lossless} | nats per token share a panel only with equal fingerprints |
| store | {train, valid: {n_tokens, n_sentences, n_documents, n_bytes, n_words, n_unknown}} | passes, bytes |
| peak_memory | {process, device: bytes} | cost |
| flops_per_step | float or null | training FLOPs by formula |
| protocol | str, optional | hash of the protocol; runs of one table share it |
| status, error | "running", "interrupted", "complete" or "failed"; str | run list |
| stopped_early | int, optional: the step at which `eval.patience` ended the run | run list |
| command, commit, uncommitted, started | str, str, str or null, ISO time | provenance |
| devices, versions | {count, kind, platform, processes, ...}, {name: str} | provenance |

metrics.jsonl, one object a line (lines of one step are merged): step, seconds (of wall time since the start, resumes
added), train/loss, train/<objective>, train/epochs (passes over the text) or train/tokens (both cumulative),
train/tokens_per_second, train/step_seconds, train/mfu; eval/loss, eval/causal, eval/bidirectional_forward and
eval/bidirectional_backward (nats per token), the same with _bits_per_byte, eval/masked (nats per masked piece),
eval/masked_accuracy, eval/next_sentence, eval/next_sentence_accuracy.

results.jsonl, one tidy row a line: run, step, suite, metric, seed, head_seed, split, n, value, predictions, and low,
high where the suite gives an interval. Of rows of one number the highest step counts, of one step the last written.
Suites with a table of their own: `ngrams`
(kneser_ney_<order>/<forward|backward>[_bits_per_byte], unigram/masked: `plm.analysis.ngrams.baselines`) and
`pseudo_words` (`plm.analysis.pseudo_words.evaluate`); `samples` points to samples.json; the others are listed.

samples.json: [{kind: "continuation", step, prompt, text, settings: str}] and
[{kind: "fill_mask", step, text with the mask written [MASK], masked: [{truth: str or null, predictions: [[str,
probability]]}]}].  senses.json: the record of `plm.analysis.pseudo_words.evaluate`.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from plm.command import is_failure
from plm.errors import UserError
from plm.reporting.statistics import Summary, summarise
from plm.training.metrics import counted_before

MARKS = ("run.json", "config.json", "metrics.jsonl")
POINT = "point.json"  # what a sweep notes of a point; alone in a workdir where the run failed before it began
NOT_A_SETTING = ("seed", "seeds", "mesh", "microbatches", "checkpoint", "eval", "log", "workdir", "name")
SEED_SUFFIX = re.compile(r"([-_/., ]+(seed|s)[-_= ]?\d+)+$")


@dataclass
class Run:
    """One started run: what its files say, and what is missing."""

    path: str
    config: dict = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    senses: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def get(self, *keys: str, default=None):
        """A nested field of run.json, `default` where any part of the way is missing."""
        value: Any = self.record
        for key in keys:
            if not isinstance(value, dict) or value.get(key) is None:
                return default
            value = value[key]
        return value

    @property
    def name(self) -> str:
        return self.get("name") or self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def corpus(self) -> str | None:
        return self.get("corpus", "fingerprint")

    @property
    def is_task(self) -> bool:
        """Whether it moved a model to a labelled task."""
        return (self.config.get("data") or {}).get("layout") == "task"

    @property
    def vocabulary(self) -> str:
        """What makes two nats per token comparable: the tokenizer's fingerprint."""
        return self.get("tokenizer", "fingerprint", default="unknown tokenizer")

    @property
    def vocabulary_label(self) -> str:
        kind, size = self.get("tokenizer", "kind"), self.get("tokenizer", "size")
        return f"{kind}, {size:,} ids" if kind and size else "unknown tokenizer"

    @property
    def model(self) -> str:
        objectives = " + ".join(self.get("objectives", default=[])).replace("_", " ")
        parts = [self.get("architecture", default=""), objectives]
        return " × ".join(part for part in parts if part) or "—"

    @property
    def last_step(self) -> int | None:
        return self.metrics[-1]["step"] if self.metrics else None

    @property
    def total_steps(self) -> int | None:
        return self.get("total_steps") or self.config.get("total_steps")

    @property
    def complete(self) -> bool:
        if self.get("status") == "failed" or self.last_step is None:
            return False
        if self.get("stopped_early") and self.get("status") == "complete":  # eval.patience: sooner, but at its end
            return True
        return self.last_step >= self.total_steps if self.total_steps else self.get("status") == "complete"

    @property
    def status(self) -> str:
        of = f" of {self.total_steps:,}" if self.total_steps else ""
        at = f"step {self.last_step:,}{of}" if self.metrics else "no step logged"
        if self.get("status") == "failed":
            return f"failed, {at}: {self.get('error', default='no reason given')}"
        if self.complete:
            early = self.get("stopped_early")
            return f"complete, stopped early at step {early:,}" if early else "complete"
        return f"unfinished, {at}" if self.metrics else "not started"

    @property
    def missing(self) -> list[str]:
        """What a complete run would have and this one has not."""
        found = list(self.problems)
        if self.metrics and not any(key.startswith("eval/") for line in self.metrics for key in line):
            found.append("no held-out evaluation")
        elif self.complete and not any(key.startswith("eval/") for key in self.metrics[-1]):
            found.append("no held-out evaluation at the last step")
        if self.record and not self.corpus:
            found.append("run.json has no corpus fingerprint: left out of the tables")
        if self.metrics:
            have = {row.get("suite") for row in self.results if row.get("suite") != "task" or row.get("predictions")}
            if self.is_task:
                return found if "task" in have else [*found, "no results on the task: --suite=task"]
            names = {"ngrams": "n-grams", "pseudo_words": "pseudo-words"}
            found += [f"no {name}" for suite, name in names.items() if suite not in have]
            if not self.samples:
                found.append("no samples")
        return found

    @cached_property
    def _axes(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        axes = {}
        for key in ("train/epochs", "train/tokens", "seconds"):
            known = [(line["step"], line[key]) for line in self.metrics if is_finite(line.get(key))]
            axes[key] = tuple(np.array(known, float).T) if known else (np.empty(0), np.empty(0))
        return axes

    def at(self, axis: str, steps: np.ndarray) -> np.ndarray | None:
        """Steps as `step`, `tokens`, `flops` or `seconds`; between logged steps interpolated; None where the run has
        none."""
        if axis == "step":
            return steps
        if axis == "flops":
            per_step = self.get("flops_per_step")
            begins, before = self._earlier("flops")
            return before + (steps - begins) * per_step if per_step else None
        n_tokens = self.get("store", "train", "n_tokens")
        factor, key = 1, "seconds"
        if axis == "tokens":
            # Passes say it exactly: train/tokens counts markers and padding, too.
            by_pass = n_tokens and len(self._axes["train/epochs"][1])
            factor, key = (n_tokens, "train/epochs") if by_pass else (1, "train/tokens")
        known_steps, known = self._axes[key]
        if len(known):
            return factor * np.interp(steps, np.append(0, known_steps), np.append(0, known))
        per_step = self.get("tokens_per_step")
        begins, before = self._earlier("tokens")
        return before + (steps - begins) * per_step if axis == "tokens" and per_step else None

    def _earlier(self, name: str) -> tuple[int, float]:
        """(steps, what they took) of the run that this one goes on from, counting its steps."""
        begins, counts = counted_before(self.record, self.settings.get("init.keep"))
        return (begins, counts[name]) if is_finite(counts.get(name)) else (0, 0.0)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [n], values [n]) of the finite values of one metric."""
        points = [(line["step"], line[key]) for line in self.metrics if is_finite(line.get(key))]
        return tuple(np.array(points, float).T) if points else (np.empty(0), np.empty(0))

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else None

    def best(self, key: str) -> tuple[float, int] | None:
        """The value at the step with the lowest held-out pretraining loss (eval/loss), and that step."""
        steps, values = self.series(key)
        if not len(values):
            return None
        loss_steps, losses = self.series("eval/loss")
        chosen = loss_steps[losses.argmin()] if len(losses) else steps[values.argmin()]
        index = int(np.abs(steps - chosen).argmin())
        return float(values[index]), int(steps[index])

    def median(self, key: str) -> float | None:
        """Median over the logged steps but the first, which holds the compilation."""
        values = self.series(key)[1]
        return float(np.median(values[1:] if len(values) > 1 else values)) if len(values) else None

    def result(self, suite: str, metric: str) -> dict | None:
        return self._results.get((suite, metric))

    @cached_property
    def _results(self) -> dict[tuple, dict]:
        return {(row.get("suite"), row.get("metric")): row for row in self.results}

    @property
    def tokens(self) -> float | None:
        if self.last_step is None:
            return None
        at = self.at("tokens", np.array([self.last_step]))
        return None if at is None else float(at[0])

    @property
    def flops(self) -> float | None:
        """Of training, by formula."""
        if self.last_step is None:
            return None
        at = self.at("flops", np.array([self.last_step]))
        return None if at is None else float(at[0])

    @property
    def seconds(self) -> float | None:
        known = self._axes["seconds"][1]
        return float(known[-1]) if len(known) else None

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved config, flat, without what does not make an arm of its own (seeds, mesh, logging, ...), be it
        that of the model that it starts from."""
        kept = dict(_flat({key: value for key, value in self.config.items() if key not in NOT_A_SETTING}))
        if kept.get("init.from"):
            kept["init.from"] = without_seed(str(kept["init.from"]))
        return kept


def without_seed(source: str) -> str:
    """A run's name, folder or DIR@STEP without the number of its seed at the end."""
    folder, at, step = source.partition("@")
    return SEED_SUFFIX.sub("", folder) + at + step


def failed_early(folder: epath.Path) -> dict:
    """What stands for run.json of a point that failed before it wrote one; {} for any other folder."""
    try:
        code = json.loads((folder / POINT).read_text()).get("return_code")
        code = int((folder / "return_code").read_text()) if code is None else code  # a job of Slurm wrote it
        if not is_failure(code):  # 0: a measurement, which is no run
            return {}
    except (OSError, ValueError, AttributeError):
        return {}
    logs = [log for log in (folder / "log.txt", folder / "log.0.txt") if log.exists()]  # the second one is Slurm's
    lines = logs[0].read_bytes().decode(errors="replace").splitlines() if logs else []
    said = [line for line in lines if line.strip()]
    return {"status": "failed", "error": said[-1].removeprefix("error: ") if said else f"exit code {code}"}


def find(directories: Sequence[str], *, may_be_none: bool = False) -> list[Run]:
    """All workdirs in or below the directories, in the order of their paths.

    may_be_none: the runs of a study may all lie elsewhere. Errors: UserError when there is no workdir at all else.
    """
    found: dict[str, Run] = {}
    for directory in directories:
        root = epath.Path(directory)
        if not root.is_dir():
            raise UserError(f"{directory}: no such directory; give workdirs or a folder that holds some")
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            children = sorted(folder.iterdir(), key=lambda child: child.name)
            names = {child.name for child in children}
            if names.intersection(MARKS) or (POINT in names and failed_early(folder)):
                found.setdefault(str(folder), read(folder, names))
            else:
                waiting += [child for child in children[::-1] if not child.name.startswith(".") and child.is_dir()]
    if not found and not may_be_none:
        raise UserError(f"no workdir in {', '.join(directories)}: a workdir holds one of {', '.join(MARKS)}")
    return list(found.values())


def elsewhere(places: Sequence[str]) -> list[Run]:
    """The runs of these folders, as far as they are there: pretraining that several sweeps share lies beside them."""
    found = []
    for place in places:
        folder = epath.Path(place)
        names = {child.name for child in folder.iterdir()} if folder.is_dir() else set()
        if names.intersection(MARKS):
            found.append(read(folder, names))
    return found


def read(folder: epath.Path, names: set[str]) -> Run:
    """One workdir; whatever cannot be read becomes a line in `problems`."""
    run = Run(str(folder))

    def load(name: str, kind: type, required: bool = False):
        if name not in names:
            if required:
                run.problems.append(f"no {name}")
            return kind()
        try:
            value = json.loads((folder / name).read_text())
        except (OSError, ValueError) as error:
            run.problems.append(f"{name} cannot be read ({error.__class__.__name__})")
            return kind()
        if not isinstance(value, kind):
            run.problems.append(f"{name} does not hold a {kind.__name__}")
            return kind()
        return value

    def lines(name: str, required: bool = False) -> list[dict]:
        if name not in names:
            if required:
                run.problems.append(f"no {name}")
            return []
        try:
            text = (folder / name).read_text().splitlines()
        except (OSError, ValueError) as error:
            run.problems.append(f"{name} cannot be read ({error.__class__.__name__})")
            return []
        rows = []
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                if number < len(text):  # a torn last line is what a kill leaves; the run cuts it when it resumes
                    run.problems.append(f"{name} line {number} is no JSON")
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows

    run.config = load("config.json", dict, required=True)
    run.record = load("run.json", dict, required=True) or failed_early(folder)
    by_step: dict[int, dict] = {}  # training and held-out numbers of a step are lines of their own
    for line in lines("metrics.jsonl", required=True):
        if is_finite(line.get("step")):
            by_step.setdefault(line["step"], {}).update(line)
    run.metrics = [by_step[step] for step in sorted(by_step)]
    run.results = _newest(row for row in lines("results.jsonl") if "metric" in row and "value" in row)
    run.samples = [sample for sample in load("samples.json", list) if isinstance(sample, dict)]
    run.senses = load("senses.json", dict)
    return run


def _newest(rows: Iterable[dict]) -> list[dict]:
    """One row for each number that was measured: of its highest step, and of several there the one written last.

    What the loop measured on the way has no predictions and is a number of its own: the step that was chosen, and
    measured with them, may be an earlier one.
    """
    newest: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("suite", "metric", "split", "pretrain_seed", "head_seed"))
        key += (bool(row.get("predictions")),)
        if key not in newest or (row.get("step") or 0) >= (newest[key].get("step") or 0):
            newest[key] = row
    return list(newest.values())


@dataclass
class Arm:
    """Runs that differ only in their seeds."""

    label: str
    runs: list[Run]

    @property
    def counted(self) -> list[Run]:
        """The complete runs; the others, as long as there are no complete ones."""
        return [run for run in self.runs if run.complete] or self.runs

    @property
    def unfinished(self) -> bool:
        return not any(run.complete for run in self.runs)

    @property
    def first(self) -> Run:
        return self.counted[0]

    def summary(self, value: Callable[[Run], float | None]) -> Summary | None:
        return summarise([value(run) for run in self.counted])


def by_corpus(runs: Iterable[Run], *, separate: bool = False) -> list[list[Run]]:
    """Groups of runs that may share a table: one corpus, one protocol. Runs that do not say come with the first.

    Raises UserError, naming two runs, when there is more than one group and `separate` is false.
    """
    groups: dict[tuple, list[Run]] = {}
    silent = []
    for run in runs:
        if run.corpus is None:
            silent.append(run)
        else:
            groups.setdefault((run.corpus, run.get("protocol")), []).append(run)
    if len(groups) > 1 and not separate:
        (key, (one, *_)), (other_key, (other, *_)), *_ = groups.items()
        what, index = ("corpora", 0) if key[0] != other_key[0] else ("protocols", 1)
        raise UserError(
            f"{one.path} and {other.path} belong to different {what} (fingerprints {key[index]} and "
            f"{other_key[index]}): report them separately, or with --table_by_corpus in tables of their own"
        )
    result = list(groups.values()) or [[]]
    result[0] = result[0] + silent
    return result


def arms(runs: Iterable[Run]) -> list[Arm]:
    """Runs with metrics and a corpus, grouped by their settings; labels are unique."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if not run.metrics or run.corpus is None:
            continue
        settings = run.settings or {"path": run.path}  # without a config nothing says that two runs are alike
        key = json.dumps([settings, run.vocabulary], sort_keys=True, default=str)
        groups.setdefault(hashlib.sha256(key.encode()).hexdigest(), []).append(run)
    result = [Arm(without_seed(group[0].name) if len(group) > 1 else group[0].name, group) for group in groups.values()]
    _make_unique(result)
    return result


def _make_unique(result: list[Arm]) -> None:
    by_label: dict[str, list[Arm]] = {}
    for arm in result:
        by_label.setdefault(arm.label, []).append(arm)
    for label, same in by_label.items():
        if len(same) == 1:
            continue
        differing = differing_settings([arm.first.settings for arm in same])
        for number, arm in enumerate(same, 1):
            marks = [f"{key.rsplit('.', 1)[-1]}={arm.first.settings.get(key)}" for key in differing[:2]]
            arm.label = f"{label} [{', '.join(marks) or arm.first.path}]"
            if any(other.label == arm.label for other in same[: number - 1]):
                arm.label += f" #{number}"


def differing_settings(settings: Sequence[dict]) -> list[str]:
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({json.dumps(one.get(key), default=str) for one in settings}) > 1]


def _flat(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
