"""ELMo, table 1: a task's own model with and without the biLM's vectors (Peters et al. 2018, section 4).

    python -m launch.sweep --config=experiments/ablations/elmo_tasks.py:tiny --root=runs/elmo_tasks
    python -m plm.report runs/elmo_tasks

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 40 on tasks | 2 CPU cores, half an hour | docs/ablations.md |
| small | 5 pretraining, 120 on tasks | one accelerator, an hour | not measured yet |

Both arms are a BiLSTM and a linear output on frozen vectors: those of the tokens without context (`static`, the biLM's
own), or the learned mix of all layers. The paper's task models are larger and have word vectors of their own, so the
sign is what compares. Semantic role labels and coreference have no task here.
"""

from experiments.ablations.common import Maker, Quantity
from plm.reporting.studies import difference

NUMBERS = {  # test
    "static": {"squad": 81.1, "snli": 88.0, "srl": 81.4, "coref": 67.2, "ner": 90.15, "sst5": 51.4},
    "elmo": {"squad": 85.8, "snli": 88.7, "srl": 84.6, "coref": 70.4, "ner": 92.22, "sst5": 54.7},
}
QUANTITIES = (
    Quantity("squad", "SQuAD", "span", paper="squad", small="squad"),
    Quantity("snli", "SNLI", "pair", paper="snli", small="snli"),
    Quantity("ner", "NER", "tagging", paper="conll2003", small="wnut17"),
    Quantity("sst5", "SST-5", "single", paper="sst2", small="sst2"),
)
ROWS = (("static", "vectors without context"), ("elmo", "+ ELMo"))


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="elmo_tasks",
        title="ELMo table 1: with and without",
        source="Peters et al. 2018, table 1, test",
        rows=ROWS,
        numbers=NUMBERS,
        quantities=QUANTITIES,
    )
    elmo = make.pretrain("elmo", "elmo")
    for on in make.on_tasks:
        make.finetune("static", on, elmo, "static")
        make.finetune("elmo", on, elmo, "features", on.mix())
        make.claim("E1", f"ELMo is better on {on.column.label}", difference("elmo", "static", on.column))
    return make.study
