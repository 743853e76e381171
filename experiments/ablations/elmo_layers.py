"""ELMo, table 2: the last layer alone, or all layers with a strong or a weak pull to their mean (section 5.1).

    python -m launch.sweep --config=experiments/ablations/elmo_layers.py:tiny --root=runs/elmo_layers
    python -m plm.report runs/elmo_layers

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 60 on tasks | 2 CPU cores, 45 minutes | docs/ablations.md |
| small | 5 pretraining, 180 on tasks | one accelerator, an hour | not measured yet |

The penalty is lambda times the sum of the squared weights before their softmax. The paper's SRL has no task here; named
entities take its place at budget paper.
"""

from experiments.ablations.common import Maker, Quantity
from plm.reporting.studies import difference

NUMBERS = {  # dev
    "static": {"squad": 80.8, "snli": 88.1, "srl": 81.6},
    "last": {"squad": 84.7, "snli": 89.1, "srl": 84.1},
    "all_1": {"squad": 85.0, "snli": 89.3, "srl": 84.6},
    "all_0.001": {"squad": 85.2, "snli": 89.5, "srl": 84.8},
}
QUANTITIES = (
    Quantity("squad", "SQuAD", "span", paper="squad", small="squad"),
    Quantity("snli", "SNLI", "pair", paper="snli", small="snli"),
    Quantity("ner", "NER", "tagging", paper="conll2003", small="wnut17"),
)
ROWS = (
    ("static", "baseline: vectors without context"),
    ("last", "last layer only"),
    ("all_1", "all layers, lambda = 1"),
    ("all_0.001", "all layers, lambda = 0.001"),
)


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="elmo_layers",
        title="ELMo table 2: which layers",
        source="Peters et al. 2018, table 2, dev",
        rows=ROWS,
        numbers=NUMBERS,
        quantities=QUANTITIES,
    )
    elmo = make.pretrain("elmo", "elmo")
    for on in make.on_tasks:
        make.finetune("static", on, elmo, "static")
        # A mix of one layer: gamma is learned as in the other rows.
        make.finetune("last", on, elmo, "features", on.mix(layers=(-1,)))
        for penalty in (1.0, 0.001):
            make.finetune(f"all_{penalty:g}", on, elmo, "features", on.mix(penalty))
    columns = make.columns()
    make.claim("E2", "all layers are better than the last one", difference("all_0.001", "last", *columns), 0.5)
    make.claim("E3", "learned weights are better than the mean", difference("all_0.001", "all_1", *columns), 0.2)
    return make.study
