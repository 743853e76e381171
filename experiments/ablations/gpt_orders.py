"""GPT: two like texts read in both orders, or in one (section 3.3; the paper does not ablate it).

    python -m launch.sweep --config=experiments/ablations/gpt_orders.py:tiny --root=runs/gpt_orders
    python -m plm.report runs/gpt_orders

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 10 on tasks | 2 CPU cores, 25 minutes | docs/ablations.md |
| small | 5 pretraining, 60 on tasks | one accelerator, half an hour | not measured yet |

Both orders cost twice the time. The tasks are those whose texts have no order, paraphrase and
similarity; at budget tiny, which has none, a pair of texts whose order tells nothing new.
"""

from experiments.ablations.common import Maker, Quantity
from plm.reporting.studies import difference

QUANTITIES = (
    Quantity("mrpc", "MRPC", "alike", paper="mrpc", small="mrpc"),
    Quantity("stsb", "STS-B", "alike", paper="stsb", small="stsb"),
)
ROWS = (("both", "both orders, added"), ("one", "one order"))


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="gpt_orders",
        title="GPT: both orders of two like texts",
        source="Radford et al. 2018, section 3.3; no numbers",
        rows=ROWS,
        quantities=QUANTITIES,
    )
    gpt = make.pretrain("gpt", "gpt")
    for on in make.on_tasks:
        make.finetune("both", on, gpt, arguments="orders=both")
        make.finetune("one", on, gpt, arguments="orders=one")
    make.claim("G8", "both orders are better than one", difference("both", "one", *make.columns()))
    return make.study
