"""BERT, table 8: what becomes of the pieces that are to be predicted (appendix C.2).

    python -m launch.sweep --config=experiments/ablations/bert_masking.py:tiny --root=runs/bert_masking
    python -m plm.report runs/bert_masking

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 30 pretraining, 90 on tasks | 2 CPU cores, 50 minutes | docs/ablations.md |
| small | 30 pretraining, 270 on tasks | one accelerator, four hours | not measured yet |

Of the chosen pieces some become [MASK], some stay, some become a random piece. Features are the upper third of the
layers side by side under a BiLSTM, as in table 7, whose numbers are not comparable with these (the paper's are a point
apart for the same setting).
"""

from experiments.ablations.bert_features import under_bilstm, upper_third
from experiments.ablations.common import Maker, Quantity
from plm.reporting.studies import difference

SHARES = {  # mask, same, random
    "80-10-10": (0.8, 0.1, 0.1),
    "100-0-0": (1.0, 0.0, 0.0),
    "80-0-20": (0.8, 0.0, 0.2),
    "80-20-0": (0.8, 0.2, 0.0),
    "0-20-80": (0.0, 0.2, 0.8),
    "0-0-100": (0.0, 0.0, 1.0),
}
NUMBERS = {  # dev: accuracy of MNLI, F1 of NER tuned and by features
    "80-10-10": {"mnli": 84.2, "ner": 95.4, "features": 94.9},
    "100-0-0": {"mnli": 84.3, "ner": 94.9, "features": 94.0},
    "80-0-20": {"mnli": 84.1, "ner": 95.2, "features": 94.6},
    "80-20-0": {"mnli": 84.4, "ner": 95.2, "features": 94.7},
    "0-20-80": {"mnli": 83.7, "ner": 94.8, "features": 94.6},
    "0-0-100": {"mnli": 83.6, "ner": 94.9, "features": 94.6},
}
QUANTITIES = (
    Quantity("mnli", "MNLI, tuned", "pair", paper="mnli", small="snli"),
    Quantity("ner", "NER, tuned", "tagging", paper="conll2003", small="wnut17"),
)


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="bert_masking",
        title="BERT table 8: masking",
        source="Devlin et al. 2019, table 8, dev",
        rows=(),
        numbers=NUMBERS,
        quantities=QUANTITIES,
    )
    tuned, tags = make.on_tasks
    features = make.copy_column(
        tags.column, "features", "NER, features", {r: n["features"] for r, n in NUMBERS.items()}
    )
    layers, width = {"tiny": (2, 128), "small": (8, 384), "paper": (12, 768)}[make.budget]  # of `bert`
    on_top = under_bilstm(tags.objective, "concat", upper_third(layers), width)
    for row, (mask, keep, random) in SHARES.items():
        make.row(row, f"{100 * mask:g}% [MASK], {100 * keep:g}% same, {100 * random:g}% random")
        shares = {"objectives.masked.mask": mask, "objectives.masked.keep": keep, "objectives.masked.random": random}
        own = row == "80-10-10"  # BERT itself
        model = make.pretrain("bert" if own else f"bert-mask-{row}", "bert", overrides={} if own else shares)
        make.finetune(row, tuned, model, "bert")
        make.finetune(row, tags, model, "bert")
        make.finetune(row, tags, model, "features", on_top, column=features.name, name=f"{row}-features")
    on_features, on_tuned = (difference("80-10-10", "100-0-0", column) for column in (features, tags.column))
    make.claim("B8", "80/10/10 is better than always [MASK], with features", on_features)
    more = [*on_features, *((row, column, -weight) for row, column, weight in on_tuned)]
    make.claim("B8", "... and that matters more with features than when tuned", more)
    worse = difference("80-10-10", "0-0-100", tuned.column)
    make.claim("B9", "always random is worse, on pairs", worse)
    return make.study
