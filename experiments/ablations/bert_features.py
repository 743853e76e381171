"""BERT, table 7: the model's layers as features, for named entities (section 5.3).

    python -m launch.sweep --config=experiments/ablations/bert_features.py:tiny --root=runs/bert_features
    python -m plm.report runs/bert_features

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 35 on tasks | 2 CPU cores, 20 minutes | docs/ablations.md |
| small | 5 pretraining, 105 on tasks | one accelerator, an hour | not measured yet |

A BiLSTM of two layers of 768 cells (a width's worth here) and a linear output on frozen layers, no CRF; and the
whole model tuned. "The last four" of the paper's twelve layers are the upper third: two of four at budget tiny, which
uses the four-layer model of table 6. `weighted sum` is a learned mix of the layers without the embedding.
"""

from typing import Any

from experiments.ablations.bert_sizes import BERT, SIZES, pretrain
from experiments.ablations.common import Maker, Quantity
from plm.reporting.studies import difference

NUMBERS = {  # dev F1
    "tuned": {"ner": 96.4},
    "embeddings": {"ner": 91.0},
    "second_to_last": {"ner": 95.6},
    "last": {"ner": 94.9},
    "sum_last": {"ner": 95.9},
    "concat_last": {"ner": 96.1},
    "sum_all": {"ner": 95.5},
}
QUANTITIES = (Quantity("ner", "CoNLL-2003 NER", "tagging", paper="conll2003", small="wnut17"),)
ROWS = (
    ("tuned", "fine-tuned"),
    ("embeddings", "embeddings"),
    ("second_to_last", "second-to-last layer"),
    ("last", "last layer"),
    ("sum_last", "weighted sum of the upper third"),
    ("concat_last", "upper third side by side"),
    ("sum_all", "weighted sum of all layers"),
)


def upper_third(layers: int) -> tuple[int, ...]:
    """The paper's last four of twelve."""
    return tuple(range(-max(2, round(layers / 3)), 0))


def under_bilstm(objective: str, reads: str, layers: tuple[int, ...], width: int) -> dict[str, Any]:
    """Settings of a head that reads these layers under two BiLSTM layers of the model's width."""
    head = f"objectives.{objective}"
    return {f"{head}.reads": reads, f"{head}.layers": layers, f"{head}.lstm": width, f"{head}.lstm_layers": 2}


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="bert_features",
        title="BERT table 7: features",
        source="Devlin et al. 2019, table 7, dev",
        rows=ROWS,
        numbers=NUMBERS,
        quantities=QUANTITIES,
    )
    layers, width, _ = SIZES[make.budget][BERT]
    model = pretrain(make, BERT)
    upper = upper_third(layers)
    chosen = {
        "embeddings": ("mix", (0,)),
        "second_to_last": ("mix", (-2,)),
        "last": ("mix", (-1,)),
        "sum_last": ("mix", upper),
        "concat_last": ("concat", upper),
        "sum_all": ("mix", tuple(range(1, layers + 1))),
    }
    (on,) = make.on_tasks
    make.finetune("tuned", on, model, "bert")
    for row, (reads, own) in chosen.items():
        make.finetune(row, on, model, "features", under_bilstm(on.objective, reads, own, width))
    column = on.column
    make.claim("B7", "side by side is better than the last layer", difference("concat_last", "last", column))
    make.claim("B7", "the last layer is better than the embeddings", difference("last", "embeddings", column))
    make.claim("B7", "fine-tuning is better than side by side", difference("tuned", "concat_last", column))
    return make.study
