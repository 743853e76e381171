"""ELMo: the mix's factor gamma learned, or fixed at 1 (section 3.2, which calls it important for optimization).

    python -m launch.sweep --config=experiments/ablations/elmo_gamma.py:tiny --root=runs/elmo_gamma
    python -m plm.report runs/elmo_gamma

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 40 on tasks | 2 CPU cores, 45 minutes | docs/ablations.md |
| small | 5 pretraining, 120 on tasks | one accelerator, an hour | not measured yet |

With the last layer only and all layers, each with gamma learned and fixed. The paper gives no numbers: without gamma
"last only" was below the baseline on SNLI, and SRL did not train.
"""

from experiments.ablations.common import Maker, Quantity
from plm.reporting.studies import difference

QUANTITIES = (
    Quantity("snli", "SNLI", "pair", paper="snli", small="snli"),
    Quantity("ner", "NER", "tagging", paper="conll2003", small="wnut17"),
)
ROWS = (
    ("last", "last layer, gamma learned"),
    ("last_fixed", "last layer, gamma = 1"),
    ("all", "all layers, gamma learned"),
    ("all_fixed", "all layers, gamma = 1"),
)


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="elmo_gamma",
        title="ELMo: is gamma needed?",
        source="Peters et al. 2018, section 3.2 and supplement; no numbers",
        rows=ROWS,
        quantities=QUANTITIES,
    )
    elmo = make.pretrain("elmo", "elmo")
    for on in make.on_tasks:
        for row, _ in ROWS:
            layers = {"layers": (-1,)} if row.startswith("last") else {}  # a mix of one layer: gamma alone is learned
            settings = on.mix(mix_gamma=not row.endswith("fixed"), **layers)
            make.finetune(row, on, elmo, "features", settings)
    columns = make.columns()
    make.claim("E11", "the last layer needs gamma", difference("last", "last_fixed", *columns))
    make.claim("E11", "all layers need gamma", difference("all", "all_fixed", *columns))
    return make.study
