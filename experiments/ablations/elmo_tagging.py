"""ELMo, table 6: parts of speech by a linear classifier, a layer at a time (section 5.3).

    python -m launch.sweep --config=experiments/ablations/elmo_tagging.py:tiny --root=runs/elmo_tagging
    python -m plm.report runs/elmo_tagging

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 5 measured | 2 CPU cores, 10 minutes | docs/ablations.md |
| small | 5 pretraining, 5 measured | one accelerator, half an hour | not measured yet |

At budget tiny the tags are those of docstring_names (names of parameters in prose), else UD English EWT, whose texts
and tags are others than the paper's Penn Treebank. E7 needs table 5 too: the two layers' order is the other one there.
"""

from experiments.ablations.common import SMALLEST, Column, Drawing, Maker
from plm.reporting.studies import difference

NUMBERS = {"layer_1": 97.3, "layer_2": 96.8}
ROWS = (
    ("word", "the commonest tag of the word"),
    ("embedding", "biLM, vectors without context"),
    ("layer_1", "biLM, layer 1"),
    ("layer_2", "biLM, layer 2"),
    ("mix", "learned mix of all layers"),
)


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="elmo_tagging",
        title="ELMo table 6: tagging by layer",
        source="Peters et al. 2018, table 6, Penn Treebank",
        rows=ROWS,
    )
    elmo = make.pretrain("elmo", "elmo")
    task = "docstring_names" if make.budget == "tiny" else "ud_ewt"
    metric = "entity_f1" if make.budget == "tiny" else "accuracy"
    make.measure("probes", elmo, ["--suite=probes", f"--task={make.files_of(task)}"])
    column = make.add_column(
        Column(
            "pos", "PTB tagging", "probes", "", "", f"{task}, {metric}", smallest=SMALLEST["tagging"], group="layers"
        ),
        NUMBERS,
    )
    make.draw(
        Drawing("layers", "What a linear classifier reads off each layer", y_label=f"{task}, {metric}", kind="dots")
    )
    layers = {"embedding": "embedding", "layer_1": "layer 1", "layer_2": "layer 2", "mix": "mix"}
    make.read("word", column, elmo, f"{task}/word_majority/{metric}")
    for row, layer in layers.items():
        make.read(row, column, elmo, f"{task}/trained/last/{layer}/{metric}")
    make.claim("E6", "layer 1 is better for tags than layer 2", difference("layer_1", "layer_2", column))
    return make.study
