"""ELMo: the LSTM states carried from batch to batch, or every row from zeros (the released code carries them).

    python -m launch.sweep --config=experiments/ablations/elmo_state.py:tiny --root=runs/elmo_state
    python -m plm.report runs/elmo_state

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 10 pretraining | 2 CPU cores, 25 minutes | docs/ablations.md |
| small | 10 pretraining | one accelerator, an hour | not measured yet |

Two towers of LSTMs in the comparison's controlled arm (experiments/compare.py): the same text, vocabulary and predicted
pieces. Each direction stands for itself. The paper gives no numbers; the authors of the code call the loss without
carried states substantial.
"""

from experiments.ablations.common import Column, Maker
from plm.reporting.studies import difference

ROWS = (("carried", "states carried"), ("fresh", "every row from zeros"))
SIZES = {"tiny": "tiny", "small": "small", "paper": "small"}


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="elmo_state",
        title="ELMo: carried states",
        source="the released training code; no numbers",
        rows=ROWS,
    )
    columns = [
        make.add_column(
            Column(
                direction,
                f"nats per piece, {words}",
                "pretraining",
                f"bidirectional_{direction}",
                part="",
                unit="",
                factor=1.0,
                digits=3,
                smallest=0.01,
                lower_is_better=True,
            )
        )
        for direction, words in (("forward", "left to right"), ("backward", "right to left"))
    ]
    size = SIZES[make.budget]
    for row, _ in ROWS:
        arguments = f"architecture=lstm,objective=bidirectional,state={row}"
        name = "lstm-bidirectional" + ("" if row == "carried" else "-fresh")
        model = make.pretrain(name, "", arguments, file="experiments/compare.py", size=size)
        for column in columns:
            make.read(row, column, model)
    make.claim("E12", "carried states predict better", difference("carried", "fresh", *columns))
    return make.study
