"""A fine-tuned run on its task: what settings are selected by, and what is reported once (protocol 10).

The selection part is dev (without a labelled test its first half, by the hash of the ids), the report part test (else
the second half). A null threshold is chosen on the selection part and applied to the report part. Predictions of every
part, and of a test set without labels, are written in the task's submission format.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from plm.analysis import task_metrics, task_results
from plm.analysis.results import counts_file
from plm.data.examples import Example, has_gold
from plm.data.pipeline import Corpus, load_task, task_splits
from plm.data.task_rows import TaskSplit
from plm.data.tasks import TaskData
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.training import config as configs
from plm.training import metrics
from plm.training.loop import Evaluator, make_evaluator
from plm.training.program import make_batches

FOLDER = "predictions"
MIX = "mix"  # metric: the share of a layer in a learned mix
_ENDS = {"squad": "json", "mclwic": "json", "jsonl": "jsonl", "wic": "txt", "conll": "conll", "glue": "tsv"}


@dataclasses.dataclass(frozen=True)
class Scored:
    """name: of the part; ids: of its examples; values: {metric: value} and counts: {metric: [(a, b) of each example]}
    (`task_metrics.counts`), {} without labels; majority: {metric: value} of the commonest class; text: of its
    predictions."""

    name: str
    ids: list[str]
    values: dict[str, float]
    counts: dict[str, list[tuple[float, float]]]
    majority: dict[str, float]
    text: str

    @property
    def n(self) -> int:
        return len(self.ids)


def task_of(config) -> TaskData:
    """The task of a fine-tuned run, by its config. Errors: UserError for another run."""
    if config.data.layout != "task":
        raise UserError("suite task is for runs of experiments/finetune.py: this run's data.layout is no task")
    return load_task(config.data)


class Predictor:
    """Predictions of a fine-tuned model for examples of its task.

    config, tokenizer, params: of the run. task: where it is read already; else data.task.files of the config says where
    it is. A run's copy of the config is resolved, so classes and widths are known.
    """

    def __init__(
        self, config, tokenizer: Tokenizer, params: dict, *, task: TaskData | None = None, progress: bool = True
    ):
        self.config, self.tokenizer, self.params, self.progress = config, tokenizer, params, progress
        self.task = task or task_of(config)
        self._evaluator: Evaluator | None = None

    def splits(self, parts: Mapping[str, Sequence[Example]]) -> list[TaskSplit]:
        return task_splits(self.config, self.task, parts, self.tokenizer, progress=self.progress)

    def __call__(self, split: TaskSplit) -> list:
        """One prediction for each example, of spans before their null threshold (`task_results.answers`)."""
        corpus = Corpus(self.tokenizer, split, split, {}, self.task)
        if self._evaluator is None:
            evaluator = make_evaluator(self.config, corpus)
            self.params = jax.device_put(self.params, evaluator.batches.replicated)
        else:
            # The programs are those of the split before.
            batches = make_batches(self.config, corpus, "eval", self._evaluator.mesh)
            evaluator = dataclasses.replace(self._evaluator, batches=batches)
        self._evaluator = dataclasses.replace(evaluator, limit=0)
        with jax.set_mesh(evaluator.mesh):
            _, predictions = self._evaluator.run(self.params)
        name = configs.OBJECTIVE_OF_KIND[self.task.task.kind]
        return task_results.answers(split, predictions[name])


def evaluate(predictor: Predictor) -> list[Scored]:
    """Selection, report, and a test set without labels, in this order."""
    task = predictor.task
    parts = dict(task.selection_and_report(predictor.config.data.task.held_out_fraction))
    if "test" in task.splits and not all(has_gold(task.task, example) for example in task.examples("test")):
        parts["test"] = task.examples("test")
    scored, threshold = [], None
    for number, split in enumerate(predictor.splits(parts)):
        found = predictor(split)
        if number == 0 and task.task.kind == "span":
            threshold = task_results.null_threshold(split, found)
        scored.append(_scored(split, task_results.final(split, found, threshold)))
    return scored


def majority(task: TaskData, examples: Sequence[Example]) -> dict[str, float]:
    """{metric: value} of always answering labelled examples with the commonest class of the training examples; {} where
    an answer is no class."""
    if task.task.kind in ("span", "similarity"):
        return {}
    train = task.examples("train") if "train" in task.splits else ()
    predictions = task_metrics.majority(train, examples)
    return task_metrics.score(task.task, examples, predictions, task.labels) if predictions else {}


def _scored(split: TaskSplit, predictions: list) -> Scored:
    task = split.task
    labelled = all(has_gold(task.task, example) for example in split.examples)
    values = task_results.score(split, predictions) if labelled else {}
    counts = task_metrics.counts(task.task, split.examples, predictions, task.labels) if labelled else {}
    text = task_metrics.submission(task.task, split.examples, predictions, task.labels)
    always = majority(task, split.examples) if labelled else {}
    return Scored(split.name, [example.id for example in split.examples], values, counts, always, text)


def write_predictions(workdir: epath.Path, task, step: int, part: Scored) -> str:
    """Writes a part's predictions, and beside them what each example counts (NAME.counts.json); returns the file's name
    in the workdir."""
    end = _ENDS.get(task.task.submission, "txt")
    name = f"{FOLDER}/{task.name}-{part.name.replace(', ', '-').replace(' ', '_')}-{step}.{end}"
    (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(workdir / name, part.text)
    if part.counts:
        record = {"ids": part.ids, "metrics": part.counts}
        metrics.write_atomically(workdir / counts_file(name), json.dumps(record) + "\n")
    return name
