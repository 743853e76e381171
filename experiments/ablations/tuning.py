"""The learning rates and durations of the ablations' runs on tasks, tried on a pretraining seed that no table uses.

    python -m launch.sweep --config=experiments/ablations/tuning.py:tiny --root=runs/tuning
    python -m plm.report runs/tuning --table_by_corpus      # under "Transfer": what the selection parts choose

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 6 pretraining runs, 120 on tasks | 2 CPU cores, an hour | `TUNED` in common.py |
| small | 6, 120 | one accelerator, four hours | not run yet |

Each entry of `TUNED` on single texts and on words: three rates x two durations, as protocol 9 says. One setting for
GPT's rule, one for BERT's, one for all frozen models (tried on each of the three), and for the comparison, which tunes
all parameters of every model by one rule, one for each direction of reading; those that start from random values have
their own (protocol 13). No arm of a table is better tuned than another.
"""

from experiments.ablations.common import BEST_EPOCH, BUDGETS, EMBEDDED, FINETUNE, FULL, PRESETS
from plm.training import config as configs

SEED = 1000
RATES = {"tuned": (1e-4, 3e-4, 1e-3), "frozen": (1e-3, 3e-3, 1e-2)}
EPOCHS = (3.0, 6.0)
TASKS = {"tiny": (EMBEDDED["single"], EMBEDDED["tagging"]), "small": ("sst2", "wnut17"), "paper": ("sst2", "conll2003")}
CELLS = {reads: f"architecture=transformer,objective={reads}" for reads in ("causal", "bidirectional", "masked")}
# Entry of `TUNED` -> models that it is tried on, way, from scratch.
ENTRIES = {
    "gpt": (("gpt",), "way=paper", False),
    "gpt-scratch": (("gpt",), "way=paper", True),
    "bert": (("bert",), "way=bert", False),
    "frozen": (("elmo", "gpt", "bert"), "way=features", False),
    **{FULL[reads]: ((reads,), f"way=full,{BEST_EPOCH}", False) for reads in CELLS},
    FULL["scratch"]: (("masked",), f"way=full,{BEST_EPOCH}", True),
}


def sweep(add, arguments: str = "") -> None:
    budget = configs.arguments(arguments, budget=BUDGETS).budget
    defaults = {"data.source": "pydocs#without_tasks"} if budget == "tiny" else None
    models = {}
    for paper in ("elmo", "gpt", "bert"):
        preset, settings = PRESETS[paper, budget]
        options = {"file": f"experiments/{paper}.py", "defaults": defaults}
        models[paper] = add(f"{paper}-seed{SEED}", preset, {**settings, "seed": SEED}, **options)
    for reads, cell in CELLS.items():
        size = "tiny" if budget == "tiny" else "small"
        options = {"file": "experiments/compare.py", "defaults": defaults}
        models[reads] = add(f"{reads}-seed{SEED}", f"{size},{cell}", {"seed": SEED}, **options)
    for entry, (tried_on, way, scratch) in ENTRIES.items():
        for model in tried_on:
            name = entry if len(tried_on) == 1 else f"{entry}-{model}"
            for task in TASKS[budget]:
                for rate in RATES["frozen" if entry == "frozen" else "tuned"]:
                    for epochs in EPOCHS:
                        settings = {"optimizer.peak_lr": rate, "total_epochs": epochs, "seed": SEED}
                        add(
                            f"{name}-{task}-lr{rate:g}-epochs{epochs:g}",
                            f"{task},{way}",
                            settings | ({"init.keep": "nothing"} if scratch else {}),
                            file=FINETUNE,
                            start=models[model],
                            measure=("--suite=task",),
                        )
