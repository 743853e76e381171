"""GPT, table 5: without pretraining, without the auxiliary language model, an LSTM in place of the Transformer.

    python -m launch.sweep --config=experiments/ablations/gpt_objectives.py:tiny --root=runs/gpt_objectives
    python -m plm.report runs/gpt_objectives

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 15 pretraining, 50 on tasks | 2 CPU cores, 45 minutes | docs/ablations.md |
| small | 15 pretraining, 300 on tasks | one accelerator, two hours | not measured yet |

The paper's LSTM has one layer of 2,048 units, a sixth of the Transformer's parameters; `matched` has as many as the
Transformer (at budget tiny the two are of one size by chance).
"""

from experiments.ablations.common import Maker, Quantity
from plm.reporting.studies import difference

NUMBERS = {  # GLUE: CoLA Matthews, MRPC and QQP F1, STS-B Pearson, accuracy else
    "full": {
        "cola": 45.4, "sst2": 91.3, "mrpc": 82.3, "stsb": 82.0, "qqp": 70.3, "mnli": 81.8, "qnli": 88.1, "rte": 56.0,
    },
    "scratch": {
        "cola": 18.9, "sst2": 84.0, "mrpc": 79.4, "stsb": 30.9, "qqp": 65.5, "mnli": 75.7, "qnli": 71.2, "rte": 53.8,
    },
    "no_auxiliary": {
        "cola": 47.9, "sst2": 92.0, "mrpc": 84.9, "stsb": 83.2, "qqp": 69.8, "mnli": 81.1, "qnli": 86.9, "rte": 54.4,
    },
    "lstm": {
        "cola": 30.3, "sst2": 90.5, "mrpc": 83.2, "stsb": 71.8, "qqp": 68.1, "mnli": 73.7, "qnli": 81.1, "rte": 54.6,
    },
}  # fmt: skip
QUANTITIES = (
    Quantity("cola", "CoLA", "single", paper="cola"),
    Quantity("sst2", "SST-2", "single", paper="sst2", small="sst2"),
    Quantity("mrpc", "MRPC", "alike", paper="mrpc", small="mrpc"),
    Quantity("stsb", "STS-B", "alike", paper="stsb", small="stsb", metric="pearson"),
    Quantity("qqp", "QQP", "alike", paper="qqp"),
    Quantity("mnli", "MNLI", "pair", paper="mnli", small="snli"),
    Quantity("qnli", "QNLI", "pair", paper="qnli"),
    Quantity("rte", "RTE", "pair", paper="rte"),
)
# Of the training sets: 100,000 examples and more, below 10,000. (SST-2 has 67,000.)
LARGE, SMALL = {"qqp", "mnli", "qnli"}, {"cola", "mrpc", "stsb", "rte"}
ROWS = (
    ("full", "Transformer, auxiliary LM"),
    ("scratch", "no pretraining"),
    ("no_auxiliary", "no auxiliary LM"),
    ("lstm", "LSTM, one layer of 2,048 units"),
    ("matched", "LSTM of the same size"),
)


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="gpt_objectives",
        title="GPT table 5: ablations",
        source="Radford et al. 2018, table 5",
        rows=ROWS,
        numbers=NUMBERS,
        quantities=QUANTITIES,
    )
    gpt = make.pretrain("gpt", "gpt")
    lstm = make.pretrain("gpt-lstm", "gpt", "body=lstm")
    matched = make.pretrain("gpt-matched", "gpt", "body=matched")
    for on in make.on_tasks:
        make.finetune("full", on, gpt)
        make.finetune("scratch", on, gpt, overrides={"init.keep": "nothing"}, tuned="gpt-scratch")
        make.finetune("no_auxiliary", on, gpt, arguments="auxiliary=0")
        make.finetune("lstm", on, lstm)
        make.finetune("matched", on, matched)
    columns = make.columns()
    make.claim("G1", "pretraining helps", difference("full", "scratch", *columns))
    make.claim("G2", "the Transformer is better than the LSTM", difference("full", "lstm", *columns))
    make.claim("G2", "... and than an LSTM of its size", difference("full", "matched", *columns))
    make.claim("G3", "the auxiliary LM does not help on the mean", difference("no_auxiliary", "full", *columns))
    of_size = [[one.column for one in make.on_tasks if set(one.of) <= size] for size in (LARGE, SMALL)]
    if all(of_size):
        large, small = (difference("full", "no_auxiliary", *own) for own in of_size)
        more = (*large, *((row, column, -weight) for row, column, weight in small))
        make.claim("G3", "... and helps large tasks more than small ones", more)
    return make.study
