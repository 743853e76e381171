"""Each model on a task of each kind, in its paper's way, beside features, and beside the same model from scratch.

    python -m launch.sweep --config=experiments/transfer.py:tiny --root=runs/transfer
    python -m launch.sweep --config=experiments/transfer.py:laptop --root=runs/transfer --workers=2 \\
        --config.data.source='text:BOOKS/*.txt.xz' --config.data.task.files='DATA/{task}'
    python -m launch.sweep --config=experiments/transfer.py:laptop,stage=tuning ...    # `TUNED` in ablations/common.py
    python -m plm.report runs/transfer

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 15 pretraining, 250 on tasks | 2 CPU cores, two hours | not measured yet |
| laptop | 3 pretraining, 15 of tuning, 168 on tasks | 2 CPU cores, three to six hours | docs/transfer.md |
| small | 15 pretraining, 1050 on tasks | one accelerator, half a day | not measured yet |

`laptop` takes the presets of that name, which read 5 to 49 million tokens of your text in 40 minutes to two hours on
one core; every task gives a fixed part of its examples (`PARTS`), so that a run takes 15 seconds to eight minutes; one
pretraining run of each model, three seeds on each task. Controls (protocol 13): every model from scratch by the same
way, random features under ELMo's BiLSTM, and word2vec on the pretraining text under it. `laptop` has no rows of ELMo
with all parameters trained.
Every way has rates and durations of its own, the controls too, chosen on selection parts by the same number of trials,
from the first pretraining run and with a seed that the table does not use (`stage=tuning`); the best epoch on the
selection part is reported (protocol 9).
"""

from experiments.ablations.common import BEST_EPOCH, FINETUNE, Maker, Quantity
from plm.reporting.studies import difference

BUDGETS = ("tiny", "laptop", "small")
QUANTITIES = (
    Quantity("single", "single texts", "single", small="sst2"),
    Quantity("pair", "pairs", "alike", small="mrpc", metric="accuracy"),
    Quantity("similarity", "similarity", "similarity", small="stsb"),
    Quantity("choice", "choices", "choice", small="dream"),
    Quantity("tagging", "tags", "tagging", small="ud_ewt"),
    Quantity("span", "spans", "span", small="squad"),
    Quantity("word", "words in context", "word", small="mclwic"),
)
# Task -> shares of the training examples, and of those that select and report: 400 (of three choices 120), and 200 to
# 1,000.
PARTS = {
    "sst2": (0.06, 0.4),
    "mrpc": (0.11, 0.6),
    "stsb": (0.07, 0.25),
    "dream": (0.02, 0.1),
    "ud_ewt": (0.03, 0.17),
    "squad": (0.0046, 0.08),
    "mclwic": (0.05, 0.8),
}
# Row -> label, the model that it starts from, way, whose rate and duration, from scratch.
ROWS = {
    "elmo": ("ELMo: frozen, mix, BiLSTM", "elmo", "paper", "frozen", False),
    "gpt": ("GPT", "gpt", "paper", "gpt", False),
    "gpt-scratch": ("GPT, from scratch", "gpt", "paper", "gpt-scratch", True),
    "bert": ("BERT", "bert", "paper", "bert", False),
    "bert-scratch": ("BERT, from scratch", "bert", "paper", "bert-scratch", True),
    "elmo-tuned": ("ELMo, tuned", "elmo", "full", "elmo", False),
    "elmo-scratch": ("ELMo, tuned, from scratch", "elmo", "full", "elmo-scratch", True),
    "word2vec": ("word2vec, BiLSTM", "elmo", "features", "frozen", False),
    "bert-features": ("BERT: frozen, mix, BiLSTM", "bert", "features", "frozen", False),
    "elmo-random": ("random features, mix, BiLSTM", "elmo", "paper", "frozen", True),
}
WITHOUT = {"laptop": ("elmo-tuned", "elmo-scratch")}  # a fifth of its runs; the paper's way is frozen
CONTROLS = ("elmo-scratch", "gpt-scratch", "bert-scratch", "elmo-random", "word2vec")
# Fewer steps on a task and smaller models want higher rates.
RATES = {"tiny": (1e-4, 3e-4, 1e-3), "laptop": (3e-4, 1e-3, 3e-3), "small": (1e-4, 3e-4, 1e-3)}
FROZEN_RATES = (1e-3, 3e-3, 1e-2)
# The best of the laptop's epochs is kept: to try 3 beside 6 would double its tuning for the shape of a schedule.
EPOCHS = {"tiny": (3.0, 6.0), "laptop": (6.0,), "small": (3.0, 6.0)}
TUNED_ON = {"tiny": ("single", "tagging"), "laptop": ("single",), "small": ("single", "tagging")}
SEED = 1000  # of heads that rates are tried with


def rows(budget: str) -> dict[str, tuple[str, str, str, str, bool]]:
    """Those of `ROWS` that a budget has."""
    return {row: own for row, own in ROWS.items() if row not in WITHOUT.get(budget, ())}


def ways(budget: str) -> tuple[str, ...]:
    """Whose rates and durations a budget needs in `TUNED`."""
    return tuple(dict.fromkeys(tuned for _, _, _, tuned, _ in rows(budget).values()))


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="transfer",
        title="Each model in its paper's way, on a task of each kind",
        source="ways as in the papers; models and tasks are ours",
        rows=(),
        quantities=QUANTITIES,
        budgets=BUDGETS,
        stage=("table", "tuning"),
    )
    if make.given.stage == "tuning":
        _tuning(make)
        return None
    models = {paper: make.pretrain(paper, paper) for paper in ("elmo", "gpt", "bert")}
    own = rows(make.budget)
    for row, (label, paper, way, tuned, scratch) in own.items():
        make.row(row, label, control=row in CONTROLS)
        for on in make.on_tasks:
            settings = _settings(make, row, on, scratch)
            make.finetune(row, on, models[paper], way, settings, arguments=BEST_EPOCH, tuned=tuned)
    columns = make.columns()
    elmo = ("elmo-tuned", "elmo-scratch") if "elmo-tuned" in own else ("elmo", "elmo-random")
    for text, pair in (("ELMo", elmo), ("GPT", ("gpt", "gpt-scratch")), ("BERT", ("bert", "bert-scratch"))):
        terms = difference(*pair, *columns)
        make.claim("pretraining", f"{text}: pretrained is better than from scratch", terms, standardised=True)
    frozen = difference("elmo", "word2vec", *columns)
    make.claim("context", "ELMo's features are better than word2vec's", frozen, standardised=True)
    return make.study


def _settings(make: Maker, row: str, on, scratch: bool) -> dict:
    settings: dict = {"init.keep": "nothing"} if scratch else {}
    if make.budget == "laptop":
        settings["data.task.fraction"], settings["data.task.held_out_fraction"] = PARTS[on.task]
        # As long as what the models were pretrained on.
        if on.kind == "span":
            settings |= {"seq_len": 128, "data.task.buckets": ()}
        elif on.kind == "choice":
            settings |= {"seq_len": 128, "data.task.buckets": (32, 64)}
        if on.kind != "span" and ROWS[row][1] != "elmo":
            # Few of them: to compile one takes as long as a Transformer's hundred batches, if not an LSTM's.
            settings["data.task.buckets"] = (64, 128) if on.kind in ("tagging", "word") else (64,)
    if row == "word2vec":
        text = make.add.given("data.source") or "pydocs#without_tasks"
        settings |= {f"objectives.{on.objective}.reads": "vectors", "data.task.vectors": f"word2vec:{text}"}
    return settings


def _tuning(make: Maker) -> None:
    """Each way on the tasks of `TUNED_ON`: three rates x `EPOCHS`."""
    make.seeds = range(1)
    models = {paper: f"{make.pretrain(paper, paper)}-seed0" for paper in ("elmo", "gpt", "bert")}
    tasks = [on for on in make.on_tasks if on.kind in TUNED_ON[make.budget]]
    for tuned in ways(make.budget):
        row = next(row for row, own in ROWS.items() if own[3] == tuned)
        _, paper, way, _, scratch = ROWS[row]
        for on in tasks:
            for rate in FROZEN_RATES if tuned == "frozen" else RATES[make.budget]:
                for epochs in EPOCHS[make.budget]:
                    own = {"optimizer.peak_lr": rate, "total_epochs": epochs, "seed": SEED}
                    make.add(
                        f"{tuned}-{on.task}-lr{rate:g}-epochs{epochs:g}",
                        f"{on.task},way={way},{BEST_EPOCH}",
                        own | _settings(make, row, on, scratch),
                        file=FINETUNE,
                        start=models[paper],
                        measure=("--suite=task",),
                    )
