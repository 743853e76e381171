"""ELMo, figure 1: fewer labels are enough (section 5.4).

    python -m launch.sweep --config=experiments/ablations/elmo_sample_efficiency.py:tiny --root=runs/elmo_labels
    python -m plm.report runs/elmo_labels

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 60 on tasks | 2 CPU cores, 45 minutes | docs/ablations.md |
| small | 5 pretraining, 300 on tasks | one accelerator, two hours | not measured yet |

Nested parts of the training examples, each for as many updates as all of them would get in the first place: epochs grow
as the part shrinks, up to ten times. The figure's values are not published as numbers; its text says that the SRL model
with ELMo needs 1% of the training set for what the baseline needs 10% of.
"""

from experiments.ablations.common import TUNED, Column, Drawing, Maker, Quantity
from plm.reporting.studies import difference

QUANTITIES = (
    Quantity("snli", "SNLI", "pair", paper="snli", small="snli"),
    Quantity("ner", "SRL, here names", "tagging", paper="conll2003", small="wnut17"),
)
ROWS = (("static", "vectors without context"), ("elmo", "+ ELMo"))
PARTS = {"tiny": (0.1, 0.3, 1.0), "small": (0.01, 0.03, 0.1, 0.3, 1.0), "paper": (0.001, 0.01, 0.1, 0.3, 1.0)}
MOST_EPOCHS = 10


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="elmo_sample_efficiency",
        title="ELMo figure 1: fewer labels",
        source="Peters et al. 2018, figure 1, section 5.4",
        rows=ROWS,
        quantities=QUANTITIES,
    )
    elmo = make.pretrain("elmo", "elmo")
    epochs = TUNED[make.budget, "frozen"].get("total_epochs", 3.0)
    make.study.columns = []
    for on in make.on_tasks:
        group, columns = on.column.name, {}
        for part in PARTS[make.budget]:
            columns[part] = make.add_column(
                Column(
                    f"{group}_{part:g}",
                    f"{100 * part:g}%",
                    "task",
                    on.column.metric,
                    smallest=on.column.smallest,
                    group=group,
                    x=100 * part,
                )
            )
            settings = {"data.task.fraction": part, "total_epochs": round(epochs * min(1 / part, MOST_EPOCHS), 3)}
            name = columns[part].name
            make.finetune("static", on, elmo, "static", settings, column=name, name=f"static-{name}")
            make.finetune("elmo", on, elmo, "features", settings | on.mix(), column=name, name=f"elmo-{name}")
        make.draw(Drawing(group, f"Labels: {on.column.label}", "% of the training examples", "%", logarithmic=True))
        few, every = columns[PARTS[make.budget][0]], columns[1.0]
        gains = [*difference("elmo", "static", few), *((r, c, -w) for r, c, w in difference("elmo", "static", every))]
        make.claim("E8", f"ELMo gains more with few labels than with all: {on.column.label}", gains)
    return make.study
