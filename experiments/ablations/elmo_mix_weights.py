"""ELMo, figure 2: what the learned mixes weigh, at the task's input and at its output (section 5.5).

    python -m launch.sweep --config=experiments/ablations/elmo_mix_weights.py:tiny --root=runs/elmo_mix
    python -m plm.report runs/elmo_mix

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 15 on tasks | 2 CPU cores, 40 minutes | docs/ablations.md |
| small | 5 pretraining, 45 on tasks | one accelerator, an hour | not measured yet |

The figure's values are not published as numbers. Its text: at the input the first LSTM layer has most weight, strongly
for coreference and SQuAD; at the output the weights are nearly equal, with a slight preference for lower layers.
"""

from experiments.ablations.common import Column, Drawing, Maker, Quantity
from plm.analysis.results import layer_name

QUANTITIES = (
    Quantity("squad", "SQuAD", "span", paper="squad", small="squad"),
    Quantity("snli", "SNLI", "pair", paper="snli", small="snli"),
    Quantity("ner", "NER", "tagging", paper="conll2003", small="wnut17"),
)
PLACES = ("input", "output")
LAYERS = 3


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="elmo_mix_weights",
        title="ELMo figure 2: the learned mixes",
        source="Peters et al. 2018, figure 2",
        rows=(),
        quantities=QUANTITIES,
    )
    elmo = make.pretrain("elmo", "elmo")
    make.study.columns, rows = [], []
    columns = {
        layer: make.add_column(
            Column(f"share_{layer}", layer_name(layer), "task", "", "", unit="% of the mix", smallest=5.0, group="mix")
        )
        for layer in range(LAYERS)
    }
    for on in make.on_tasks:
        names = [make.row(f"{on.column.name}_{place}", f"{on.column.label}, {place}") for place in PLACES]
        rows += names
        points = make.finetune(names[0], on, elmo, "features", on.mix(insert="both"), column=None, name=on.column.name)
        for number, row in enumerate(names):
            for layer, column in columns.items():
                make.cells(row, column.name, points, f"{on.task}/mix/mix {number}/{layer_name(layer)}")
    make.draw(Drawing("mix", "Shares of the layers in the learned mixes", y_label="% of the mix", kind="bars"))
    inputs = [row for row in rows if row.endswith("input")]
    for layer, name in ((0, "the input vectors"), (2, "layer 2")):
        terms = [(row, f"share_{n}", sign / len(inputs)) for row in inputs for n, sign in ((1, 1), (layer, -1))]
        make.claim("E10", f"at the input, layer 1 has more than {name}", terms)
    return make.study
