"""ELMo, table 3: where the biLM's vectors join the task's model (section 5.2).

    python -m launch.sweep --config=experiments/ablations/elmo_insertion.py:tiny --root=runs/elmo_insertion
    python -m plm.report runs/elmo_insertion

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 45 on tasks | 2 CPU cores, 45 minutes | docs/ablations.md |
| small | 5 pretraining, 135 on tasks | one accelerator, an hour | not measured yet |

In front of the task's BiLSTM, behind it, or both, each place with a mix of its own. Behind it only, the BiLSTM reads
the biLM's vectors without context. The paper explains what it finds by the attention behind the BiLSTM of its SQuAD and
SNLI models; the ones here have none. SRL has no task here; named entities take its place.
"""

from experiments.ablations.common import Maker, Quantity
from plm.reporting.studies import difference

NUMBERS = {  # dev
    "input": {"squad": 85.1, "snli": 88.9, "srl": 84.7},
    "both": {"squad": 85.6, "snli": 89.5, "srl": 84.3},
    "output": {"squad": 84.8, "snli": 88.7, "srl": 80.9},
}
QUANTITIES = (
    Quantity("squad", "SQuAD", "span", paper="squad", small="squad"),
    Quantity("snli", "SNLI", "pair", paper="snli", small="snli"),
    Quantity("ner", "NER", "tagging", paper="conll2003", small="wnut17"),
)
ROWS = (("input", "input only"), ("both", "input and output"), ("output", "output only"))


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="elmo_insertion",
        title="ELMo table 3: where",
        source="Peters et al. 2018, table 3, dev",
        rows=ROWS,
        numbers=NUMBERS,
        quantities=QUANTITIES,
    )
    elmo = make.pretrain("elmo", "elmo")
    for on in make.on_tasks:
        for row, _ in ROWS:
            make.finetune(row, on, elmo, "features", on.mix(insert=row))
    pairs = make.columns("span", "pair")
    both = difference("both", "input", *pairs)
    make.claim("E4", "with pairs of texts, both places are better than the input", both)
    words = make.columns("tagging")
    make.claim("E4", "with words, the input is better than both places", difference("input", "both", *words), 0.4)
    make.claim("E4", "with words, the input is better than the output", difference("input", "output", *words), 3.8)
    return make.study
