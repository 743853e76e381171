"""ELMo: the biLM trained on, one pass over the task's own text without its labels (supplement; section 3.4).

    python -m launch.sweep --config=experiments/ablations/elmo_further.py:tiny --root=runs/elmo_further
    python -m plm.report runs/elmo_further

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 5 further, 10 on tasks, 10 measured | 2 CPU cores, 20 minutes | docs/ablations.md |
| small | 5 pretraining, 15 further, 90 on tasks, 30 measured | one accelerator, an hour | not measured yet |

Perplexity of the task's dev text before and after, the mean of both directions' losses; and the task with both models.
The paper's SNLI: 72.1 -> 16.8, and 0.6 points of accuracy on dev. Adagrad starts anew, as its accumulators belong to
the first text.
"""

from experiments.ablations.common import Column, Maker, Quantity
from plm.reporting.studies import difference

NUMBERS = {  # perplexity of dev text, the mean of both directions
    "before": {"snli": 72.1, "ner": 103.2, "sst": 131.5},
    "after": {"snli": 16.8, "ner": 46.3, "sst": 78.6},
}
QUANTITIES = {
    "tiny": (Quantity("snli", "SNLI", "single", paper="snli", small="snli"),),
    "small": (
        Quantity("snli", "SNLI", "pair", paper="snli", small="snli"),
        Quantity("ner", "NER", "tagging", paper="conll2003", small="wnut17"),
        Quantity("sst", "SST", "single", paper="sst2", small="sst2"),
    ),
}
ROWS = (("before", "pretrained"), ("after", "and one pass over the task's text"))


def sweep(add, arguments: str = ""):
    budget = arguments.partition(",")[0].removeprefix("budget=")
    make = Maker(
        add,
        arguments,
        name="elmo_further",
        title="ELMo: one pass over the task's text",
        source="Peters et al. 2018, supplement",
        rows=ROWS,
        quantities=QUANTITIES["tiny" if budget in ("", "tiny") else "small"],
    )
    elmo = make.pretrain("elmo", "elmo")
    for on in make.on_tasks:
        text = f"task:{make.files_of(on.task)}"
        further = make.further(f"elmo-{on.task}", elmo, "elmo", {"data.source": text, "total_epochs": 1.0})
        columns = [_perplexity(make, on, direction) for direction in ("forward", "backward")]
        for row, model in (("before", elmo), ("after", further)):
            make.measure(f"{row}-{on.column.name}_text", model, ["--suite=text", f"--text={text}#dev"])
            for column in columns:
                make.read(row, column, model)
            make.finetune(row, on, model, "features", on.mix())
        lower = difference("after", "before", *columns)
        make.claim("E9", f"it lowers the perplexity of {on.task}", lower)
        effect = {"snli": 0.6}.get(on.column.name)  # in words only; "about the same" for sentiment
        make.claim("E9", f"it helps on {on.column.label}", difference("after", "before", on.column), effect)
    return make.study


def _perplexity(make: Maker, on, direction: str) -> Column:
    """Of the task's dev text; the paper's number is the mean of both directions."""
    way = {"forward": "left to right", "backward": "right to left"}[direction]
    column = Column(
        f"{on.column.name}_{direction}",
        f"perplexity, {on.column.label}, {way}",
        "text",
        f"bidirectional_{direction}_perplexity",
        part=f"task:{make.files_of(on.task)}#dev",
        measured=f"dev text of {on.task}",
        unit="",
        factor=1.0,
        lower_is_better=True,
    )
    return make.add_column(column, {row: own.get(on.column.name) for row, own in NUMBERS.items()})
