"""GPT, figure 2 left: the more layers are taken over, the better (section 5).

    python -m launch.sweep --config=experiments/ablations/gpt_layers_transferred.py:tiny --root=runs/gpt_layers
    python -m plm.report runs/gpt_layers

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 40 on tasks | 2 CPU cores, 50 minutes | docs/ablations.md |
| small | 5 pretraining, 180 on tasks | one accelerator, two hours | not measured yet |

`k` layers and the embedding are the pretrained ones, what is above them starts at random; `nothing` takes over neither.
The figure's values are not published as numbers; its text: each layer helps, and all of them give up to 9 points on
MultiNLI. RACE is the other task of the figure.
"""

from experiments.ablations.common import Column, Drawing, Maker, Quantity
from plm.reporting.studies import trend

QUANTITIES = (
    Quantity("race", "RACE", "choice", paper="race_high", small="dream"),
    Quantity("mnli", "MultiNLI", "pair", paper="mnli", small="snli"),
)
LAYERS = {"tiny": (0, 1, 2), "small": (0, 2, 4, 6, 8), "paper": tuple(range(13))}
TOP = {"tiny": 2, "small": 8, "paper": 12}
ROWS = (("transferred", "pretrained layers"),)


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="gpt_layers_transferred",
        title="GPT figure 2, left: layers transferred",
        source="Radford et al. 2018, figure 2, left",
        rows=ROWS,
        quantities=QUANTITIES,
    )
    gpt = make.pretrain("gpt", "gpt")
    make.study.columns = []
    layers, top = LAYERS[make.budget], TOP[make.budget]
    for on in make.on_tasks:
        group, columns = on.column.name, []
        for k in (-1, *layers):
            label = "nothing" if k < 0 else str(k)
            name = f"{group}_{label}"
            column = Column(name, label, "task", on.column.metric, smallest=on.column.smallest, group=group, x=float(k))
            columns.append(make.add_column(column))
            overrides = {"init.keep": "nothing"} if k < 0 else {}
            arguments = f"reset_top={top - k}" if 0 <= k < top else ""
            options = {"overrides": overrides, "arguments": arguments, "column": name, "name": name}
            make.finetune("transferred", on, gpt, **options)
        make.draw(Drawing(group, f"Layers transferred: {on.column.label}", "pretrained layers (-1: no embedding)", "%"))
        cells = [("transferred", column.name) for column in columns]
        make.claim("G4", f"more layers are better: {on.column.label}", trend(cells[1:], layers))
        alone = ((*cells[1], 1.0), (*cells[0], -1.0))
        make.claim("G5", f"the embedding alone helps: {on.column.label}", alone)
    return make.study
