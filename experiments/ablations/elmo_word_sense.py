"""ELMo, table 5: word senses by the nearest neighbour, a layer at a time (section 5.3).

    python -m launch.sweep --config=experiments/ablations/elmo_word_sense.py:tiny --root=runs/elmo_word_sense
    python -m launch.sweep --config=experiments/ablations/elmo_word_sense.py:small --root=DIR \\
        --config.data.source='text:...' --config.data.task.files='DATA/{task}'       # DATA/wsd: SemCor and test sets
    python -m plm.report runs/elmo_word_sense

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 5 pretraining, 5 measured | 2 CPU cores, 15 minutes | docs/ablations.md |
| small | 5 pretraining, 5 measured | one accelerator, half an hour | not measured yet |

At budget tiny, which has no sense-tagged text: two words written as one form, whose occurrences have to be told apart
(`pseudo_words`: the share of nearest neighbours of the same word), so that only the order of the layers compares.
"""

from experiments.ablations.common import Column, Drawing, Maker
from plm.reporting.studies import difference

NUMBERS = {"first_sense": {"f1": 65.9}, "layer_1": {"f1": 67.4}, "layer_2": {"f1": 69.0}}
ROWS = (("first_sense", "first sense (tiny: by chance)"), ("layer_1", "biLM, layer 1"), ("layer_2", "biLM, layer 2"))


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="elmo_word_sense",
        title="ELMo table 5: word senses",
        source="Peters et al. 2018, table 5, four test sets",
        rows=ROWS,
    )
    elmo = make.pretrain("elmo", "elmo")
    if make.budget == "tiny":
        suite, flags, measured = "pseudo_words", ["--suite=pseudo_words"], "nearest neighbours, two words written alike"
        metrics = {"first_sense": "static/nearest_neighbour/form"}
        metrics |= {f"layer_{n}": f"trained/nearest_neighbour/layer {n}" for n in (1, 2)}
    else:
        suite, flags, measured = "word_sense", ["--suite=word_sense", f"--wsd={make.folder('wsd')}"], "F1, all sets"
        metrics = {"first_sense": "first_sense/all"} | {f"layer_{n}": f"trained/last/layer {n}/all" for n in (1, 2)}
    numbers = {row: own["f1"] for row, own in NUMBERS.items()}
    column = make.add_column(Column("f1", "F1", suite, "", part="", measured=measured, group="layers"), numbers)
    make.draw(Drawing("layers", "Senses told apart by each layer", y_label=measured, kind="dots"))
    make.measure("senses", elmo, flags)
    for row, metric in metrics.items():
        make.read(row, column, elmo, metric)
    make.claim("E5", "layer 2 tells senses apart better than layer 1", difference("layer_2", "layer_1", column))
    return make.study
