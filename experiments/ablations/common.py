"""What the ablations share: budgets, the papers' models at each of them, and what stands for the papers' tasks.

A budget changes sizes, lengths and tasks, never the mathematics.

| budget | models | text | tasks | pretraining seeds x head seeds |
| --- | --- | --- | --- | --- |
| tiny | 2 layers x 128 | a million tokens of the embedded corpus | embedded ones, one for each kind | 5 x 1 |
| small | 8 layers x 384; ELMo 1024 / 256 | 295 M pieces (ELMo 184 M words), your text | your files, or TFDS | 5 x 3 |
| paper | the paper's | the paper's, which you have to have | the paper's | 1 x 1 |

`paper` is there to be planned (`python -m plm.plan`) and to be started by whoever has the machines. `--seeds=N` gives
another number of pretraining seeds.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.finetune import FROZEN_WAYS
from plm.data.tasks import TASKS
from plm.errors import UserError
from plm.reporting.studies import Claim, Column, Drawing, Row, Study
from plm.training import config as configs

BUDGETS = ("tiny", "small", "paper")
ABOUT = {
    "tiny": "2 layers x 128, about a million tokens of the documentation inside CPython, tasks made of its docstrings:"
    " minutes on two CPU cores",
    "laptop": "the presets laptop, your text, your tasks: hours to days on two CPU cores",
    "small": "8 layers x 384, 295 million pieces (ELMo: 184 million words) of text: an hour on one accelerator",
    "paper": "the paper's own recipe",
}
SEEDS = {"tiny": (5, 1), "laptop": (1, 3), "small": (5, 3), "paper": (1, 1)}  # of pretraining, and of heads in each
FINETUNE = "experiments/finetune.py"
KINDS = {
    "single": "single texts",
    "pair": "pairs of texts",
    "alike": "like texts",
    "similarity": "similarity",
    "word": "words in context",
    "choice": "choices",
    "tagging": "words",
    "span": "spans",
}
EMBEDDED = {
    "single": "docstring_package",
    "pair": "docstring_pair",
    "alike": "docstring_pair",
    "choice": "docstring_signature",
    "tagging": "docstring_names",
    "span": "docstring_span",
}
SMALLEST = {"tagging": 0.5}  # effect of interest in points, by kind (protocol 15); 1 for the others


# ------------------------------------------------------------------------------------------------------- the models

# What the presets of elmo.py, gpt.py and bert.py become; those of the paper stay as they are.
_SMALL = {
    "elmo": {
        "model.lstm.cells": 1024,
        "model.lstm.projection": 256,
        "model.width": 256,
        "data.tokenizer.vocab": 50_000,
        "batch_size": 1024,
        "total_steps": 9000,
        "checkpoint.every_steps": 2000,
        "eval.every_steps": 4000,
    },
    "bert": {
        "model.layers": 8,
        "model.width": 384,
        "model.heads": 6,
        "model.mlp_width": 1536,
        "data.tokenizer.vocab": 8192,
        "total_steps": 9000,
        "checkpoint.every_steps": 2000,
        "eval.every_steps": 2000,
        "optimizer.schedule_steps": 0,
        "optimizer.peak_lr": 6e-4,
        "optimizer.warmup_steps": 500,
    },
}
PRESETS = {
    ("elmo", "tiny"): ("tiny", {}),
    ("gpt", "tiny"): ("tiny", {}),
    ("bert", "tiny"): ("tiny", {}),
    **{(paper, "laptop"): ("laptop", {}) for paper in ("elmo", "gpt", "bert")},
    ("elmo", "small"): ("small", _SMALL["elmo"]),
    ("gpt", "small"): ("small", {}),
    ("bert", "small"): ("base", _SMALL["bert"]),
    ("elmo", "paper"): ("original", {}),
    ("gpt", "paper"): ("base", {}),
    ("bert", "paper"): ("base", {}),
}
# Updates whose parameters are kept for ever, for what is measured over pretraining. The paper's of BERT's figure 5 are
# those of its first phase.
KEPT = {
    ("gpt", "tiny"): (8, 16, 31, 62, 125, 250, 500),
    ("gpt", "small"): (140, 281, 562, 1125, 2250, 4500, 9000),
    ("gpt", "paper"): (1000, 3000, 10_000, 30_000, 100_000, 300_000),
    ("bert", "tiny"): (15, 25, 50, 100, 200, 300, 400, 500),
    ("bert", "small"): (270, 450, 900, 1800, 3600, 5400, 7200, 9000),
    ("bert", "paper"): (30_000, 50_000, 100_000, 200_000, 400_000, 600_000, 800_000),
}
# Whose rate and duration in `TUNED` a model has whose parameters are all tuned, by how it reads, or from scratch.
FULL = {reads: f"full-{reads}" for reads in ("causal", "bidirectional", "masked", "scratch")}
# A model of a million parameters wants about ten times the rate of one of a hundred million. Those of tiny were chosen
# by tuning.py, each entry's by the same number of trials, elmo's excepted; those of small are guesses until they are.
TUNED: dict[tuple[str, str], dict[str, Any]] = {
    ("tiny", "gpt"): {"optimizer.peak_lr": 1e-3, "total_epochs": 6.0},
    ("tiny", "bert"): {"optimizer.peak_lr": 3e-4, "total_epochs": 6.0},
    ("tiny", "frozen"): {"optimizer.peak_lr": 3e-3, "total_epochs": 6.0},
    ("tiny", "elmo"): {"optimizer.peak_lr": 1e-3, "total_epochs": 6.0},
    ("small", "gpt"): {"optimizer.peak_lr": 2e-4, "total_epochs": 3.0},
    ("small", "bert"): {"optimizer.peak_lr": 1e-4, "total_epochs": 3.0},
    ("small", "frozen"): {"optimizer.peak_lr": 1e-3, "total_epochs": 6.0},
    ("small", "elmo"): {"optimizer.peak_lr": 2e-4, "total_epochs": 3.0},
    ("paper", "gpt"): {},
    ("paper", "bert"): {},
    ("paper", "frozen"): {},
}
TUNED |= {("tiny", name): TUNED["tiny", "gpt"] for name in FULL.values()}
# Guesses, where nothing was tried: scratch like its model, and tuned by the common rule like by the paper's.
for _budget in ("tiny", "small", "paper"):
    for _way in ("gpt", "bert", "elmo"):
        if (_budget, _way) in TUNED:
            TUNED.setdefault((_budget, f"{_way}-scratch"), TUNED[_budget, _way])
    for _way, _like in (("causal", "gpt"), ("bidirectional", "gpt"), ("masked", "bert"), ("scratch", "bert")):
        TUNED.setdefault((_budget, f"full-{_way}"), TUNED[_budget, _like])
# Chosen by stage=tuning of transfer.py.
TUNED |= {
    ("laptop", "frozen"): {"optimizer.peak_lr": 1e-2, "total_epochs": 6.0},
    ("laptop", "gpt"): {"optimizer.peak_lr": 3e-3, "total_epochs": 6.0},
    ("laptop", "gpt-scratch"): {"optimizer.peak_lr": 3e-4, "total_epochs": 6.0},
    ("laptop", "bert"): {"optimizer.peak_lr": 3e-4, "total_epochs": 6.0},
    ("laptop", "bert-scratch"): {"optimizer.peak_lr": 1e-3, "total_epochs": 6.0},
}
BEST_EPOCH = "select=best"  # of finetune.py: protocol 9


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A column of a paper's table that is measured on a task. small, paper: the tasks at these budgets, "" for none."""

    name: str
    label: str
    kind: str
    paper: str = ""
    small: str = ""
    metric: str = ""

    def task(self, budget: str) -> str:
        return {"tiny": EMBEDDED.get(self.kind, ""), "paper": self.paper}.get(budget, self.small)


@dataclasses.dataclass(frozen=True)
class OnTask:
    """A column of a study that is measured on a task, and what of the paper's table it stands for."""

    column: Column
    task: str
    kind: str
    of: tuple[str, ...]

    @property
    def objective(self) -> str:
        return configs.OBJECTIVE_OF_KIND[TASKS[self.task].kind]

    def mix(self, penalty: float = 0.001, **settings) -> dict[str, Any]:
        """Overrides for ELMo's mix of layers in this task's head (`mix_gamma`, `insert`, ...).

        penalty: lambda; the better one of ELMo's table 2, which AllenNLP advises, wherever a table says no other.
        """
        settings["mix_penalty"] = penalty
        return {f"objectives.{self.objective}.{key}": value for key, value in settings.items()}

    @property
    def aligned(self) -> dict[str, str]:
        """Overrides for protocol 11: a word's last piece stands for it, however the model reads."""
        return {"data.task.word_piece": "last"} if self.kind == "tagging" else {}


class Maker:
    """Makes a study's points and notes which cells they are.

    add: of `launch.sweep`; name: of the file; numbers: the paper's, {row: {quantity: value}}; quantities: its columns
    on tasks. At budget tiny the columns of a kind become one, whose number is their mean.
    """

    def __init__(
        self,
        add,
        arguments: str,
        *,
        name: str,
        title: str,
        source: str,
        rows: Sequence[tuple[str, str]],
        numbers: Mapping[str, Mapping[str, float]] | None = None,
        quantities: Sequence[Quantity] = (),
        budgets: Sequence[str] = BUDGETS,
        **options,
    ):
        self.given = configs.arguments(arguments, budget=tuple(budgets), **options)
        self.budget, self.add = self.given.budget, add
        seeds, self.heads = SEEDS[self.budget]
        self.seeds = range(add.seeds or seeds)
        self.study = Study(name, title, source, self.budget, ABOUT[self.budget])
        self.study.rows = [Row(*row) for row in rows]
        self.numbers = numbers or {}
        self._pretrained: dict[str, tuple[str, dict[str, Any]]] = {}  # model -> spec, overrides
        self.on_tasks = self._columns(quantities)
        for one in self.on_tasks:
            self.add_column(one.column, {row: self._mean(own, one.of) for row, own in self.numbers.items()})

    def _columns(self, quantities: Sequence[Quantity]) -> list[OnTask]:
        by_task: dict[str, list[Quantity]] = {}
        for quantity in quantities:
            if task := quantity.task(self.budget):
                by_task.setdefault(task, []).append(quantity)
        found = []
        for task, own in by_task.items():
            first, labels = own[0], ", ".join(quantity.label for quantity in own)
            label = f"{KINDS[first.kind]} ({labels})" if self.budget == "tiny" else labels
            metric = (own[0].metric if self.budget != "tiny" else "") or TASKS[task].metrics[0]
            found.append(
                OnTask(
                    Column(
                        first.name,
                        label,
                        "task",
                        f"{task}/{metric}",
                        measured=f"{task}, {metric.replace('_', ' ')}",
                        smallest=SMALLEST.get(first.kind, 1.0),
                    ),
                    task,
                    first.kind,
                    tuple(quantity.name for quantity in own),
                )
            )
        return found

    @staticmethod
    def _mean(own: Mapping[str, float], of: Sequence[str]) -> float | None:
        """Of the paper's numbers, where it has all of them."""
        values = [own.get(name) for name in of]
        return None if None in values else round(sum(values) / len(values), 2)

    def add_column(self, column: Column, numbers: Mapping[str, float | None] | None = None) -> Column:
        """numbers: {row: the paper's}."""
        self.study.columns.append(column)
        for row, value in (numbers or {}).items():
            if value is not None:
                self.study.paper.setdefault(row, {})[column.name] = value
        return column

    def columns(self, *kinds: str) -> list[Column]:
        """Those on tasks of these kinds; all of them without."""
        return [one.column for one in self.on_tasks if not kinds or one.kind in kinds]

    def claim(self, name: str, text: str, terms, effect: float | None = None, **options) -> None:
        """Only where its cells are measured: a budget may lack a column. options: of `Claim`.

        effect: the paper's where its table does not have all of these cells; else the same contrast of its numbers.
        """
        if not terms:
            return
        numbers = [self.study.paper.get(row, {}).get(column) for row, column, _ in terms]
        if None not in numbers and not options.get("standardised"):
            effect = round(sum(weight * number for (_, _, weight), number in zip(terms, numbers, strict=True)), 2)
        self.study.claims.append(Claim(name, text, tuple(terms), effect, **options))

    def draw(self, drawing: Drawing) -> None:
        self.study.drawings.append(drawing)

    # Points

    def pretrain(
        self,
        model: str,
        paper: str,
        arguments: str = "",
        overrides: Mapping[str, Any] | None = None,
        *,
        file: str = "",
        size: str = "",
    ) -> str:
        """A pretraining run for each seed, shared by all tables that need it; returns what `finetune` and `measure`
        take for it. model: its name; paper: elmo, gpt or bert, whose preset it is; arguments: behind the size;
        overrides: of the preset; file, size: of another experiment file.
        """
        preset, own = ("", {}) if file else PRESETS[paper, self.budget]
        kept = {"checkpoint.keep_at": KEPT[paper, self.budget]} if (paper, self.budget) in KEPT else {}
        settings = {**own, **kept, **(overrides or {})}
        name = f"{self.budget}-{model}"
        file_name, text = file or f"experiments/{paper}.py", ",".join(filter(None, (size or preset, arguments)))
        self._pretrained[name] = self._pretrained[f"{name}-512"] = f"{file_name}:{text}", settings
        for seed in self.seeds:
            point = self.add(
                f"{name}-seed{seed}",
                text,
                {**settings, "seed": seed},
                file=file_name,
                shared=True,
                defaults={"data.source": "pydocs#without_tasks"} if self.budget == "tiny" else None,
            )
            if (paper, self.budget) == ("bert", "paper") and not file:
                second = ",".join(filter(None, (preset, "phase=2", arguments)))
                self.add(
                    f"{name}-512-seed{seed}",
                    second,
                    {**settings, "seed": seed},
                    file="experiments/bert.py",
                    start=point,
                    shared=True,
                )
        return f"{name}-512" if (paper, self.budget) == ("bert", "paper") and not file else name

    def layers(self, model: str) -> int:
        """How many a model of `pretrain` has."""
        spec, overrides = self._pretrained[model]
        return configs.load(spec, overrides, complete=False).model.layers

    def finetune(
        self,
        row: str,
        on: OnTask,
        model: str,
        way: str = "paper",
        overrides: Mapping[str, Any] | None = None,
        *,
        arguments: str = "",
        column: str | None = "",
        name: str = "",
        step: int | None = None,
        tuned: str = "",
    ) -> list[str]:
        """Runs on a task from each pretraining seed, with each head seed, which become cells; returns their names.

        way: of finetune.py; column: of the cell, by default that of the task, None for no cell; name: of the points;
        tuned: whose rate and duration, by default what the way says ("paper" and "full": GPT's).
        """
        tuned = tuned or {"bert": "bert", **dict.fromkeys(FROZEN_WAYS, "frozen")}.get(way, "gpt")
        settings = {**TUNED[self.budget, tuned], **(overrides or {})}
        names = []
        for seed in self.seeds:
            for head in range(self.heads):
                suffix = f"-seed{seed}" + (f"-head{head}" if self.heads > 1 else "")
                point = self.add(
                    f"{name or f'{row}-{on.column.name}'}{suffix}",
                    ",".join(filter(None, (on.task, f"way={way}", arguments))),
                    {**settings, "seed": seed * self.heads + head},
                    file=FINETUNE,
                    start=f"{model}-seed{seed}",
                    step=step,
                    measure=("--suite=task",),
                )
                if column is not None:
                    self.study.cell(row, column or on.column.name, point, seed, head)
                names.append(point)
        return names

    def cells(self, row: str, column: str, points: Sequence[str], metric: str = "") -> None:
        """Notes runs on a task that are there already as those of another cell, too."""
        for index, point in enumerate(points):
            self.study.cell(row, column, point, *divmod(index, self.heads), metric)

    def further(self, name: str, model: str, paper: str, overrides: Mapping[str, Any]) -> str:
        """Pretraining that goes on from each seed's model with fresh optimizer and schedule; like `pretrain`."""
        preset, own = PRESETS[paper, self.budget]
        durations = dict.fromkeys(configs.DURATIONS)
        settings = {key: value for key, value in {**own, **durations, **overrides}.items() if value is not None}
        full = f"{self.budget}-{name}"
        for seed in self.seeds:
            file, start = f"experiments/{paper}.py", f"{model}-seed{seed}"
            self.add(f"{full}-seed{seed}", preset, {**settings, "seed": seed}, file=file, start=start)
        return full

    def row(self, name: str, label: str, *, control: bool = False) -> str:
        """Adds an arm; returns its name."""
        self.study.rows.append(Row(name, label, control))
        return name

    def measure(self, name: str, model: str, flags: Sequence[str], at: str = "") -> None:
        """A measurement of each pretraining seed's model, for `read`. at: see `launch.sweep.Add.measure`."""
        for seed in self.seeds:
            self.add.measure(f"{name}-seed{seed}", f"{model}-seed{seed}", flags, at)

    def read(self, row: str, column: Column, model: str, metric: str = "", suite: str = "") -> None:
        """Numbers of the pretraining runs themselves, measured there or on the way, as a cell.

        metric, suite: of this row, if they are others than the column's.
        """
        for seed in self.seeds:
            self.study.cell(row, column.name, f"{model}-seed{seed}", seed, metric=metric, suite=suite)

    def copy_column(self, column: Column, name: str, label: str, numbers: Mapping[str, float]) -> Column:
        """Another column for the same quantity."""
        return self.add_column(dataclasses.replace(column, name=name, label=label), numbers)

    def files_of(self, task: str) -> str:
        """`NAME[,files=...]` of a task, for suites and sources."""
        files = "" if self.budget == "tiny" else self.add.given("data.task.files")
        return f"{task},files={files.replace('{task}', task)}" if files else task

    def folder(self, name: str) -> str:
        """A folder beside those of the tasks.

        Errors: UserError where --config.data.task.files names no pattern for it.
        """
        files = self.add.given("data.task.files")
        if "{task}" not in files:
            raise UserError(
                f"budget {self.budget} reads {name}: --config.data.task.files='DIR/{{task}}' says where DIR/{name} and"
                " the tasks lie"
            )
        return files.replace("{task}", name)
