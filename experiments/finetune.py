"""Transfer: any of the three models to a labelled task, by the same step (ELMo section 3.3, GPT 3.2, BERT 4 and 5.3).

    python -m plm.train --config=experiments/finetune.py:sst2 --config.init.from=SRC --config.data.task.files=DIR \\
        --workdir=runs/sst2
    python -m plm.train --config=experiments/finetune.py:docstring_package --config.init.from=runs/gpt --workdir=DIR
    python -m plm.train --config=experiments/finetune.py:custom,kind=pair --config.data.task.files=PAIRS.tsv \\
        --config.data.task.text=first+second --config.data.task.label=gold --config.init.from=SRC --workdir=DIR
    python -m launch.sweep --config=experiments/finetune.py:rte --config.init.from=SRC --seeds=3 --root=DIR
    python -m plm.evaluate --model=DIR --suite=task                  # selection and report, predictions files

SRC is a workdir, a converted or a foreign folder; the model and its vocabulary are those of SRC, and how it reads
decides what its paper does with it:

| way | forward (GPT) | full (BERT) | both (ELMo) |
| --- | --- | --- | --- |
| paper (default) | all parameters, 0.5 x LM loss beside; both orders of two like texts; last token | all parameters; \
`[CLS]` through its pooler | frozen; mix of layers into a BiLSTM; two texts apart |
| full | all parameters, one linear output, AdamW | the same | the same, on both towers' ends |
| bert | BERT's way, on the last token (its table 5): dense and tanh before the output, BERT's optimizer | as paper | \
as full, BERT's optimizer |
| features | frozen; learned mix of all layers, BiLSTM of 128 cells, linear | the same | the same |
| probe | frozen; learned mix of all layers, linear | the same | the same |
| static | nothing but the tokens' own vectors, frozen, BiLSTM, linear | the same | the same |

The last three read two texts apart and take the maximum over a row; they and `full` are the same for all models, so
that they compare (protocol 9). Controls: `--config.init.keep=nothing` keeps only the vocabulary (from scratch; with a
frozen way: random features), `--config.data.task.shuffled_labels=true`, `--config.data.task.fraction=0.1`,
`reset_top=K` gives the K uppermost layers random values, `auxiliary=0` leaves GPT's language model out of the loss (it
has `auxiliary` hundredths), `orders=one` reads its like texts in one order only, `--config.data.task.vectors=FILE`
with `--config.objectives.<o>.reads=vectors` reads GloVe or word2vec vectors. `layer_decay=95`: each layer below the
top learns with 0.95 of the rate above it. `select=best` measures dev after each epoch and keeps the best one (`@best`,
protocol 9), which `--suite=task` then reports.

The papers' numbers: GPT 6.25e-5, 32 examples, 3 epochs, linear decay, 0.2% warm-up; BERT 5e-5 to 2e-5, 16 or 32, 2 to
4 epochs, 10% warm-up; ELMo's features 1e-3. A model of 1M parameters wants about ten times the rate of one of 110M; the
sweep goes over rates and epochs.

| task | hardware, time | expected |
| --- | --- | --- |
| docstring_package, docstring_pair, docstring_names | 2 CPU cores, a minute or two | docs/ablations.md |
| those of the papers, models of 110M | one accelerator, minutes to hours | the papers' tables |
"""

import re

from experiments import common
from plm.data.tasks import KINDS, TASKS
from plm.training import config as configs

FROZEN_WAYS = ("features", "probe", "static")
WAYS = ("paper", "full", "bert", *FROZEN_WAYS)
FROZEN = ("^(embedding|blocks|backward_blocks)/",)
CHOICES = {"swag": 4, "dream": 3, "storycloze": 2, "race_middle": 4, "race_high": 4, "docstring_signature": 4}
# Pieces of a row; of other kinds 128. No target word may be cut off, and a sentence is best tagged in one row; a
# passage with its question and an answer is longer.
LENGTHS = {"span": 384, "tagging": 512, "word": 512, "choice": 512}
ALIKE = ("mrpc", "qqp", "stsb")  # two texts without an order: GPT reads them in both
GRID = {"forward": (6.25e-5, 2e-4, 6e-4), "full": (2e-5, 5e-5, 2e-4), "both": (3e-4, 1e-3, 3e-3)}
EPOCHS = (3.0, 6.0)


def _arguments(text: str):
    return configs.arguments(
        text,
        task=("docstring_package", *(name for name in TASKS if name != "docstring_package"), "custom"),
        way=WAYS,
        kind=("", *KINDS),
        choices=configs.Number(0, 0, 100),
        reset_top=configs.Number(0),
        layer_decay=configs.Number(100, 1, 100),
        auxiliary=configs.Number(50, 0, 1000),
        orders=("paper", "both", "one"),
        select=("last", "best"),
    )


def get_config(arguments: str = "", source=None):
    """arguments: task=docstring_package|sst2|...|custom, way=paper|full|bert|features|probe|static, kind=... (custom),
    choices=N (custom, kind choice), reset_top=K, layer_decay=PERCENT, auxiliary=PERCENT, orders=paper|both|one,
    select=last|best.
    source: the config of the model in init.from."""
    given = _arguments(arguments)
    if given.kind and given.task != "custom":
        raise configs.UserError(f"config argument kind={given.kind} is for task=custom; {given.task} has its own")
    kind = TASKS[given.task].kind if given.task != "custom" else given.kind or "single"
    source = source or _stand_in()
    config = common.configure(_common(kind, source))
    buckets = tuple(n for n in (32, 64, 128, 256) if n < config.seq_len)
    # BERT's questions have 64 pieces at most; of a model with few positions they leave half a row to the context.
    question = {"question": min(64, config.seq_len // 2)} if kind == "span" else {}
    configs.set_task(config, {"name": given.task, "kind": given.kind, "buckets": buckets, **question})
    with config.unlocked():
        config.model = source.model.copy_and_resolve_references()
    _recipe(config, given, kind, source)
    layers = source.model.get("layers", 0)
    if given.reset_top > layers:
        raise configs.UserError(f"config argument reset_top={given.reset_top}: the model has {layers} layers")
    if given.select == "best":
        configs.apply(config, {"eval.every_epochs": 1.0, "checkpoint.keep_best": "selects"})
    if given.reset_top:
        top = "|".join(str(layer) for layer in range(layers - given.reset_top, layers))
        config.init.reset = rf"^(backward_)?blocks/({top})/"
    if given.layer_decay < 100:
        config.optimizer.lr_factors = tuple(_layer_factors(layers, given.layer_decay / 100))
    return config


def _stand_in():
    """What the file describes where no model is named: BERT base."""
    from experiments import bert

    return bert.get_config("base")


def _common(kind: str, source) -> dict:
    """What all ways have in common: the vocabulary of the source, rows that it can hold, a short run."""
    tokenizer = source.data.tokenizer
    longest = source.model.get("max_positions") or max(LENGTHS.values())
    return {
        "data.layout": "task",
        "data.source": "",
        **{f"data.tokenizer.{key}": tokenizer[key] for key in ("kind", "vocab", "lowercase", "pretokenized")},
        "vocabulary_multiple": source.vocabulary_multiple,
        "seq_len": min(LENGTHS.get(kind, 128), longest),
        "total_epochs": 3.0,
        "init.allow_missing": "^heads/",
        "checkpoint.keep": 1,
        "eval.every_steps": 0,
        "log.every_steps": 20,
    }


def _recipe(config, given, kind: str, source) -> None:
    """The head, the optimizer and what is frozen."""
    direction, objective = source.model.get("direction", "forward"), configs.OBJECTIVE_OF_KIND[kind]
    frozen = given.way in FROZEN_WAYS or (given.way == "paper" and direction == "both")
    as_bert = given.way == "bert" or (given.way == "paper" and direction == "full")
    choices = given.choices or CHOICES.get(given.task, 2)
    head: dict = {"dropout": 0.1, "pooling": "first" if direction == "full" else "last"}
    pairs = "joined"
    if frozen:
        reads = "static" if given.way == "static" else "mix"
        head |= {"reads": reads, "pooling": "max", "lstm": 0 if given.way == "probe" else 128, "input_dropout": 0.1}
        head |= {"mix_penalty": 0.001} if given.way == "paper" else {}
        pairs = "apart"
    elif as_bert:
        head["pooler"] = objective in ("classify", "regress", "choose")
        if objective == "span":
            head["dropout"] = 0.0  # BERT's classifiers have it, its run_squad.py has none
    elif given.way == "paper":
        both = given.orders == "both" or (given.orders == "paper" and given.task in ALIKE)
        pairs = "both_orders" if both else "joined"
    two_texts = kind in ("pair", "similarity", "word")
    if objective in ("classify", "regress"):
        head["pairs"] = pairs if two_texts and not (kind == "word" and pairs == "both_orders") else "joined"
    if objective == "choose":
        head["choices"] = choices
    if objective in ("tag", "span"):
        head.pop("pooling")
    configs.add_objective(config, objective, **head)
    if given.way == "paper" and direction == "forward" and "causal" in source.objectives and given.auxiliary:
        configs.add_objective(config, "causal", given.auxiliary / 100, per_row=True)
    rows = choices if objective == "choose" else 1 if head.get("pairs", "joined") == "joined" else 2
    # A word's last piece is the first that has seen all of it, reading from the left.
    settings = {"batch_size": 32 * rows, "data.task.word_piece": "first" if direction == "full" else "last"}
    rule = "frozen" if frozen else "bert" if as_bert else given.way
    configs.apply(config, settings | _optimizer(rule, "full" if given.way == "bert" else direction))
    if frozen:
        quiet = ("dropout", "embedding_dropout", "attention_dropout")
        configs.apply(config, {f"model.{key}": 0.0 for key in quiet if key in config.model})
        config.optimizer.freeze = FROZEN


def _optimizer(rule: str, direction: str) -> dict:
    """rule: frozen, bert, paper (of what reads forward), or full, one for all models; the rate is a beginning, that of
    how the model reads."""
    clip = {"optimizer.clip_norm": 1.0}
    if rule == "frozen":
        return clip | {"optimizer.name": "adamw", "optimizer.peak_lr": 1e-3, "optimizer.schedule": "linear"}
    if rule == "bert":
        settings = {"name": "bert_adam", "schedule": "bert_linear", "warmup_fraction": 0.1, "eps": 1e-6}
    elif rule == "paper":
        settings = {"name": "gpt_adam", "schedule": "openai_linear", "warmup_fraction": 0.002}
    else:
        settings = {"name": "adamw", "schedule": "linear", "warmup_fraction": 0.1}
    settings["peak_lr"] = {"forward": 6.25e-5, "full": 5e-5, "both": 1e-3}[direction]
    decay = {"optimizer.weight_decay": 0.01, "optimizer.decay": common.NO_DECAY_ON_BIAS_AND_NORM}
    return clip | decay | {f"optimizer.{key}": value for key, value in settings.items()}


def _layer_factors(layers: int, factor: float):
    """The head learns with the whole rate, each layer with `factor` of the one above it, the embedding least."""
    for layer in range(layers):
        yield rf"^(backward_)?blocks/{layer}/", round(factor ** (layers - layer), 6)
    yield "^embedding/", round(factor ** (layers + 1), 6)


def sweep(add, arguments: str = "") -> None:
    """Rates x epochs: those of all papers' ways where all is tuned, of protocol 9 where a model is frozen; `--seeds=N`
    runs each with N seeds."""
    given = _arguments(arguments)
    rates = GRID["both"] if given.way in FROZEN_WAYS else sorted({rate for grid in GRID.values() for rate in grid})
    for rate in rates:
        for epochs in EPOCHS:
            name = re.sub(r"[^\w.-]", "_", f"{given.task}-{given.way}-lr{rate:g}-epochs{epochs:g}")
            add(name, arguments, {"optimizer.peak_lr": rate, "total_epochs": epochs})
