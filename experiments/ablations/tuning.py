"""The learning rates and durations of the ablations' runs on tasks, tried on a pretraining seed that no table uses.

    python -m launch.sweep --config=experiments/ablations/tuning.py:tiny --root=runs/tuning
    python -m plm.report runs/tuning --table_by_corpus      # under "Transfer": what the selection parts choose

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 3 pretraining runs, 60 on tasks | 2 CPU cores, half an hour | `TUNED` in common.py |
| small | 3, 60 | one accelerator, two hours | not run yet |

Each of ELMo, GPT and BERT on single texts and on words, tuned (GPT, BERT) and frozen: three rates x two durations, as
protocol 9 says. One setting for GPT's rule, one for BERT's, one for all frozen models, so that no arm of a table is
better tuned than another.
"""

from experiments.ablations.common import BUDGETS, EMBEDDED, FINETUNE, PRESETS
from plm.training import config as configs

SEED = 1000
RATES = {"tuned": (1e-4, 3e-4, 1e-3), "frozen": (1e-3, 3e-3, 1e-2)}
EPOCHS = (3.0, 6.0)
TASKS = {"tiny": (EMBEDDED["single"], EMBEDDED["tagging"]), "small": ("sst2", "wnut17"), "paper": ("sst2", "conll2003")}


def sweep(add, arguments: str = "") -> None:
    budget = configs.arguments(arguments, budget=BUDGETS).budget
    for paper in ("elmo", "gpt", "bert"):
        preset, settings = PRESETS[paper, budget]
        defaults = {"data.source": "pydocs#without_tasks"} if budget == "tiny" else None
        options = {"file": f"experiments/{paper}.py", "defaults": defaults}
        model = add(f"{paper}-seed{SEED}", preset, {**settings, "seed": SEED}, **options)
        for task in TASKS[budget]:
            for kind, way in (("tuned", "bert" if paper == "bert" else "paper"), ("frozen", "features")):
                if (paper, kind) == ("elmo", "tuned"):
                    continue
                for rate in RATES[kind]:
                    for epochs in EPOCHS:
                        add(
                            f"{paper}-{task}-{kind}-lr{rate:g}-epochs{epochs:g}",
                            f"{task},way={way}",
                            {"optimizer.peak_lr": rate, "total_epochs": epochs, "seed": SEED},
                            file=FINETUNE,
                            start=model,
                            measure=("--suite=task",),
                        )
