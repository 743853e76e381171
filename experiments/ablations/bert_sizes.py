"""BERT, table 6: sizes, and heads at one size (section 5.2).

    python -m launch.sweep --config=experiments/ablations/bert_sizes.py:tiny --root=runs/bert_sizes
    python -m plm.report runs/bert_sizes

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 30 pretraining, 60 on tasks | 2 CPU cores, 90 minutes | docs/ablations.md |
| small | 30 pretraining, 270 on tasks | one accelerator, four hours | not measured yet |

The paper's six sizes; at budget tiny a third of their layers, up to six, and a sixth of their width. Perplexity is that
of masked pieces, of held-out text of the pretraining corpus.
"""

import itertools

from experiments.ablations.common import Column, Maker, Quantity
from plm.reporting.studies import difference

NUMBERS = {  # dev, mean of 5 restarts
    "L3-H768-A12": {"perplexity": 5.84, "mnli": 77.9, "mrpc": 79.8, "sst2": 88.4},
    "L6-H768-A3": {"perplexity": 5.24, "mnli": 80.6, "mrpc": 82.2, "sst2": 90.7},
    "L6-H768-A12": {"perplexity": 4.68, "mnli": 81.9, "mrpc": 84.8, "sst2": 91.3},
    "L12-H768-A12": {"perplexity": 3.99, "mnli": 84.4, "mrpc": 86.7, "sst2": 92.9},
    "L12-H1024-A16": {"perplexity": 3.54, "mnli": 85.7, "mrpc": 86.9, "sst2": 93.3},
    "L24-H1024-A16": {"perplexity": 3.23, "mnli": 86.6, "mrpc": 87.8, "sst2": 93.7},
}
QUANTITIES = (
    Quantity("mnli", "MNLI-m", "pair", paper="mnli", small="snli"),
    Quantity("mrpc", "MRPC", "alike", paper="mrpc", small="mrpc", metric="accuracy"),
    Quantity("sst2", "SST-2", "single", paper="sst2", small="sst2"),
)
_SIZES = {  # layers, width, heads, in the order of the paper's rows
    "tiny": ((1, 128, 4), (2, 128, 1), (2, 128, 4), (4, 128, 4), (4, 192, 6), (6, 192, 6)),
    "small": ((2, 384, 6), (4, 384, 2), (4, 384, 6), (8, 384, 6), (8, 512, 8), (16, 512, 8)),
    "paper": ((3, 768, 12), (6, 768, 3), (6, 768, 12), (12, 768, 12), (12, 1024, 16), (24, 1024, 16)),
}
SIZES = {budget: dict(zip(NUMBERS, sizes, strict=True)) for budget, sizes in _SIZES.items()}


# One rate for all sizes, as in the paper. The preset's 5e-4 is for two layers: four stay at the unigram with it
# (docs/ablations.md has the trials).
RATES = {"tiny": {"optimizer.peak_lr": 2e-4}}


BERT = "L12-H768-A12"  # the size of `bert` itself, which other tables need too


def pretrain(make: Maker, row: str) -> str:
    """`Maker.pretrain` of one of the paper's sizes."""
    if row == BERT and make.budget not in RATES:
        return make.pretrain("bert", "bert")
    layers, width, heads = SIZES[make.budget][row]
    size = {"model.layers": layers, "model.width": width, "model.heads": heads, "model.mlp_width": 4 * width}
    return make.pretrain(f"bert-{layers}x{width}x{heads}", "bert", overrides=size | RATES.get(make.budget, {}))


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="bert_sizes",
        title="BERT table 6: sizes",
        source="Devlin et al. 2019, table 6, dev, mean of 5 restarts",
        rows=(),
        numbers=NUMBERS,
        quantities=QUANTITIES,
    )
    perplexity = make.add_column(
        Column(
            "perplexity",
            "masked perplexity",
            "pretraining",
            "masked_perplexity",
            part="",
            unit="",
            factor=1.0,
            digits=2,
            smallest=0.05,
            lower_is_better=True,
        ),
        {row: own["perplexity"] for row, own in NUMBERS.items()},
    )
    for row, (layers, width, heads) in SIZES[make.budget].items():
        of = row.replace("-", ", ").replace("L", "").replace("H", "").replace("A", "")
        make.row(row, f"{layers} layers x {width}, {heads} heads (paper: {of})")
        model = pretrain(make, row)
        make.read(row, perplexity, model)
        for on in make.on_tasks:
            make.finetune(row, on, model, "bert")
    columns = make.columns()
    bigger = ("L3-H768-A12", "L6-H768-A12", "L12-H768-A12", "L12-H1024-A16", "L24-H1024-A16")
    for worse, better in itertools.pairwise(bigger):
        make.claim("B5", f"{better} is better than {worse} on tasks", difference(better, worse, *columns))
        make.claim("B5", "... and in perplexity", difference(better, worse, perplexity))
    make.claim("B6", "12 heads are better than 3 at one size", difference("L6-H768-A12", "L6-H768-A3", *columns))
    return make.study
