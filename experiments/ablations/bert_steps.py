"""BERT, figure 5: more updates help, and masked overtakes left to right (appendix C.1).

    python -m launch.sweep --config=experiments/ablations/bert_steps.py:tiny --root=runs/bert_steps
    python -m plm.report runs/bert_steps

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 10 pretraining, 80 on tasks | 2 CPU cores, 50 minutes | docs/ablations.md |
| small | 10 pretraining, 240 on tasks | one accelerator, two hours | not measured yet |

Checkpoints on the way of one run each, tuned on the task, at the same parts of the whole as the figure's: 3, 5, 10, 20,
40, 60, 80 and 100%. The figure's own curve (read off its vector paths) has left to right ahead at 30,000 and 50,000
updates, whatever its text says of "almost immediately".
"""

from experiments.ablations.common import KEPT, Column, Drawing, Maker, Quantity
from plm.reporting.studies import trend

UPDATES = (30, 50, 100, 200, 400, 600, 800, 1000)  # thousands
NUMBERS = {
    "masked": (78.6, 79.6, 80.5, 82.2, 83.2, 84.0, 84.3, 84.4),
    "ltr": (79.4, 79.8, 80.3, 81.0, 81.7, 81.9, 82.1, 82.2),
}
QUANTITIES = (Quantity("mnli", "MNLI", "pair", paper="mnli", small="snli"),)
ROWS = (("masked", "masked LM (and NSP)"), ("ltr", "left to right"))


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="bert_steps",
        title="BERT figure 5: number of updates",
        source="Devlin et al. 2019, figure 5, MNLI dev",
        rows=ROWS,
        quantities=QUANTITIES,
    )
    models = {
        "masked": make.pretrain("bert", "bert"),
        "ltr": make.pretrain("bert-left_to_right", "bert", "pretraining=left_to_right"),
    }
    (on,) = make.on_tasks
    make.study.columns = []
    kept = KEPT["bert", make.budget]
    steps = kept if make.budget != "paper" else (*kept, 1_000_000)  # its second phase has the last of them
    columns = []
    for number, step in enumerate(steps):
        column = Column(f"step_{step}", f"{step:,}", "task", on.column.metric, group="steps", x=float(step))
        columns.append(make.add_column(column, {row: values[number] for row, values in NUMBERS.items()}))
    for row, model in models.items():
        for step, column in zip(steps, columns, strict=True):
            source, at = (model.removesuffix("-512"), step) if step in kept else (model, None)
            make.finetune(row, on, source, "bert", column=column.name, name=f"{row}-{column.name}", step=at)
    labels = dict(ROWS)
    make.draw(
        Drawing(
            "steps",
            f"Updates of pretraining: {on.column.label}",
            "updates",
            "%",
            logarithmic=True,
            paper={labels[row]: list(zip(UPDATES, values, strict=True)) for row, values in NUMBERS.items()},
            paper_label="thousands of updates",
        )
    )
    for row, label in ROWS:
        cells = [(row, column.name) for column in columns]
        make.claim("B10", f"more updates help: {label}", trend(cells, range(len(cells))))
    gap = [
        (row, column, sign)
        for column, s in ((columns[-1].name, 1.0), (columns[0].name, -1.0))
        for row, sign in (("masked", s), ("ltr", -s))
    ]
    make.claim("B10", "masked gains on left to right from the first checkpoint to the last", gap)
    last = ((ROWS[0][0], columns[-1].name, 1.0), (ROWS[1][0], columns[-1].name, -1.0))
    make.claim("B10", "masked is ahead at the end", last)
    return make.study
