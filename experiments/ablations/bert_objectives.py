"""BERT, table 5: without next-sentence prediction, left to right, and a BiLSTM on top of that (section 5.1).

    python -m launch.sweep --config=experiments/ablations/bert_objectives.py:tiny --root=runs/bert_objectives
    python -m plm.report runs/bert_objectives

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 15 pretraining, 60 on tasks | 2 CPU cores, 45 minutes | docs/ablations.md |
| small | 15 pretraining, 240 on tasks | one accelerator, two hours | not measured yet |

All arms read the same rows and are tuned by BERT's recipe; the left-to-right arms keep their causal mask, as in the
paper, and classify their last token: under a causal mask the first one has seen nothing.
"""

from experiments.ablations.common import Maker, Quantity
from plm.reporting.studies import difference

NUMBERS = {  # dev; SQuAD F1, accuracy else
    "bert": {"mnli": 84.4, "qnli": 88.4, "mrpc": 86.7, "sst2": 92.7, "squad": 88.5},
    "no_nsp": {"mnli": 83.9, "qnli": 84.9, "mrpc": 86.5, "sst2": 92.6, "squad": 87.9},
    "ltr": {"mnli": 82.1, "qnli": 84.3, "mrpc": 77.5, "sst2": 92.1, "squad": 77.8},
    "bilstm": {"mnli": 82.1, "qnli": 84.1, "mrpc": 75.7, "sst2": 91.6, "squad": 84.9},
}
QUANTITIES = (
    Quantity("mnli", "MNLI-m", "pair", paper="mnli", small="snli"),
    Quantity("qnli", "QNLI", "pair", paper="qnli"),
    Quantity("mrpc", "MRPC", "alike", paper="mrpc", small="mrpc", metric="accuracy"),
    Quantity("sst2", "SST-2", "single", paper="sst2", small="sst2"),
    Quantity("squad", "SQuAD F1", "span", paper="squad", small="squad"),
)
ROWS = (
    ("bert", "masked LM and NSP (BERT)"),
    ("no_nsp", "no NSP"),
    ("ltr", "left to right, no NSP"),
    ("bilstm", "left to right, no NSP, + BiLSTM"),
)


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="bert_objectives",
        title="BERT table 5: pretraining tasks",
        source="Devlin et al. 2019, table 5, dev",
        rows=ROWS,
        numbers=NUMBERS,
        quantities=QUANTITIES,
    )
    models = {
        "bert": make.pretrain("bert", "bert"),
        "no_nsp": make.pretrain("bert-masked", "bert", "pretraining=masked"),
        "ltr": make.pretrain("bert-left_to_right", "bert", "pretraining=left_to_right"),
    }
    for on in make.on_tasks:
        for row, model in models.items():
            make.finetune(row, on, model, "bert")
        make.finetune("bilstm", on, models["ltr"], "bert", {f"objectives.{on.objective}.lstm": 128})
    pairs, spans, every = make.columns("pair", "alike"), make.columns("span"), make.columns("pair", "alike", "single")
    make.claim("B1", "masked is better than left to right on spans", difference("no_nsp", "ltr", *spans))
    make.claim("B2", "masked is better than left to right on texts", difference("no_nsp", "ltr", *every))
    make.claim("B3", "a BiLSTM makes up for a part of it on spans", difference("bilstm", "ltr", *spans))
    make.claim("B3", "... and does not help on texts", difference("ltr", "bilstm", *every))
    make.claim("B4", "next-sentence prediction helps on pairs", difference("bert", "no_nsp", *pairs))
    make.claim("B4", "... and on spans", difference("bert", "no_nsp", *spans))
    return make.study
