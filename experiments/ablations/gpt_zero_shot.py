"""GPT, figure 2 right: tasks without training, over the steps of pretraining; Transformer and LSTM (section 5).

    python -m launch.sweep --config=experiments/ablations/gpt_zero_shot.py:tiny --root=runs/gpt_zero_shot
    python -m plm.report runs/gpt_zero_shot

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 10 pretraining, 10 measured | 2 CPU cores, 20 minutes | docs/ablations.md |
| small | 10 pretraining, 10 measured | one accelerator, an hour | not measured yet |

The checkpoints that pretraining keeps for ever, evenly on a logarithmic axis. At budget tiny the rule for multiple
choice is asked of docstring_signature, and the made minimal pairs stand for acceptability; else SST-2 and DREAM. The
figure's ends on its scale from chance to the best trained model (Transformer): sentiment .68, Winograd .55,
acceptability .43, question answering .25, read off by others. The claims are about the slope against
the logarithm of the updates, times its range.
"""

import math

from experiments.ablations.common import KEPT, Column, Drawing, Maker
from plm.reporting.studies import trend

ROWS = (("transformer", "Transformer"), ("lstm", "LSTM of the same size"))
TASKS = {  # task, metric, what it is called
    "tiny": (("docstring_signature", "accuracy", "choices"),),
    "small": (("sst2", "auc", "sentiment (AUC)"), ("dream", "accuracy", "question answering")),
    "paper": (
        ("sst2", "accuracy", "sentiment"),
        ("cola", "matthews", "acceptability"),
        ("race_high", "accuracy", "question answering"),
    ),
}


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="gpt_zero_shot",
        title="GPT figure 2, right: zero-shot over steps",
        source="Radford et al. 2018, figure 2, right",
        rows=ROWS,
    )
    models = {
        "transformer": make.pretrain("gpt", "gpt"),
        "lstm": make.pretrain("gpt-matched", "gpt", "body=matched"),
    }
    steps = KEPT["gpt", make.budget]
    tasks = TASKS[make.budget]
    flags = ["--suite=zero_shot,minimal_pairs", *(f"--task={make.files_of(task)}" for task, _, _ in tasks)]
    for row, model in models.items():
        make.measure(f"{row}-zero_shot", model, flags, "@all")
    quantities = [(task, "zero_shot", f"{task}/trained/{metric}", label) for task, metric, label in tasks]
    quantities.append(("pairs", "minimal_pairs", "trained/forward/mean over phenomena", "minimal pairs"))
    for group, suite, metric, label in quantities:
        columns = [
            make.add_column(
                Column(f"{group}_{step}", f"{step:,}", suite, metric, "", step=step, group=group, x=float(step))
            )
            for step in steps
        ]
        for row in models:
            for column in columns:
                make.read(row, column, models[row])
        make.draw(Drawing(group, f"Zero-shot: {label}", "updates", "%", logarithmic=True))
        logarithms = [math.log(step) for step in steps]
        for row, name in ROWS:
            cells = [(row, column.name) for column in columns]
            make.claim("G6", f"{label} rises with the updates: {name}", trend(cells, logarithms))
    return make.study
