"""The comparison: architecture, objective and input are varied one at a time (docs/protocol.md).

    python -m launch.sweep --config=experiments/compare.py:tiny --root=runs/demo             # the demo: three models
    python -m launch.sweep --config=experiments/compare.py:tiny,cells=all --root=runs/cells  # all six cells
    python -m plm.train --config=experiments/compare.py:tiny,architecture=lstm,objective=masked --workdir=DIR
    python -m launch.sweep --config=experiments/compare.py:laptop --config.data.source='text:...' --root=DIR
    python -m launch.sweep --config=experiments/compare.py:small,cells=all --config.data.source='text:...' --root=DIR
    python -m launch.sweep --config=experiments/compare.py:tiny,cells=all,tune=rates --root=DIR    # protocol 7
    python -m launch.sweep --config=experiments/compare.py:tiny,cells=all,tune=dropout --root=DIR

| budget | body | text | hardware, time a point | expected |
| --- | --- | --- | --- | --- |
| tiny | 0.4M: 2 layers x 128 | embedded corpus | 2 CPU cores, 2 minutes | at least halfway from unigram to bigram |
| laptop | 0.8M: 4 layers x 128 | 4M tokens, 14M read | 2 CPU cores, 20 to 45 minutes | docs/reference_runs.md |
| small | 14.2M: 8 layers x 384 | 15M tokens, 20 passes | one accelerator, minutes | not measured yet |

`arm=controlled` (protocol.md 3) answers what the objective buys: one shared cased byte-level BPE without UNK, the
same documents, the same input embedding, tied output, no next-sentence prediction, the same optimizer. The six cells
are {transformer, lstm} x {causal, bidirectional, masked}: one tower that reads forward, two towers, one body that
sees both sides (an LSTM then joins both directions in each layer). Body parameters agree within 2% by construction:
widths are solved from the budget (`mlp_width`, `cells`), all bodies of an architecture have the same number of
layers, and two towers share the budget (`budget=tower` gives it to each instead). `input=characters` replaces the
input embedding by ELMo's convolutions; the output table stays. LSTMs that read forward or in two towers train on
lanes, with their state carried from batch to batch (`state=fresh` starts every row from zeros, on the blocks that the
Transformers read).

`arm=native` (protocol.md 4) is the papers' own data side and objectives, tiny or laptop: `model=elmo|gpt|bert` are the
presets of those files. Never put both arms on one axis.
"""

import dataclasses

from experiments import bert, common, elmo, gpt
from plm.errors import UserError
from plm.training import config as configs


@dataclasses.dataclass(frozen=True)
class Budget:
    """What all cells of a comparison have in common. Body parameters: those of `transformer_layers`
    blocks with an MLP of four times the width."""

    width: int
    heads: int
    transformer_layers: int
    lstm_layers: int
    batch_size: int
    seq_len: int
    duration: dict[str, float]
    peak_lr: dict[str, float]  # by architecture
    warmup_steps: int
    vocab: int
    filters: tuple[tuple[int, int], ...]
    init: str  # fan_in scales with the width: see common.TINY
    often: dict[str, int]
    multiple: int  # that solved widths are rounded to: chips and the tensor axis like round ones

    @property
    def body(self) -> int:
        return self.transformer_layers * common.transformer_layer(self.width, 4 * self.width)


TINY_STEPS = 900
LAPTOP_STEPS = 7000
BUDGETS = {
    "tiny": Budget(
        width=128,
        heads=2,
        transformer_layers=2,
        lstm_layers=2,
        batch_size=16,
        seq_len=64,
        duration={"total_steps": TINY_STEPS},
        peak_lr={"transformer": 3e-3, "lstm": 3e-3},
        warmup_steps=80,
        vocab=4096,
        filters=((1, 32), (2, 32), (3, 64), (4, 64)),
        init="fan_in",
        often=common.often(TINY_STEPS),
        multiple=2,
    ),
    "laptop": Budget(
        width=128,
        heads=4,
        transformer_layers=4,
        lstm_layers=2,
        batch_size=32,
        seq_len=64,
        duration={"total_steps": LAPTOP_STEPS},
        peak_lr={"transformer": 2e-3, "lstm": 4e-3},
        warmup_steps=200,
        vocab=4096,
        filters=((1, 32), (2, 32), (3, 64), (4, 64)),
        init="fan_in",
        often={"log.every_steps": 50, "eval.every_steps": 500, "checkpoint.every_steps": 1000},
        multiple=2,
    ),
    "small": Budget(
        width=384,
        heads=6,
        transformer_layers=8,
        lstm_layers=2,
        batch_size=256,
        seq_len=128,
        duration={"total_epochs": 20.0},
        peak_lr={"transformer": 6e-4, "lstm": 2e-3},
        warmup_steps=500,
        vocab=8192,
        filters=((1, 32), (2, 32), (3, 64), (4, 128), (5, 256)),
        init="fan_in",
        often={"log.every_steps": 50, "eval.every_steps": 500, "checkpoint.every_steps": 1000},
        multiple=64,
    ),
}
DIRECTIONS = {"causal": "forward", "bidirectional": "both", "masked": "full"}
DEMO = {  # the three models of the demo
    "elmo": "architecture=lstm,objective=bidirectional,input=characters",
    "gpt": "architecture=transformer,objective=causal",
    "bert": "architecture=transformer,objective=masked",
}


def body(budget: Budget, architecture: str, objective: str, *, per_tower: bool = False) -> dict[str, int]:
    """The settings of `config.model` that spend the budget.

    A count is linear in the width that is solved for (hidden units of the MLP, LSTM cells); it is rounded to
    `budget.multiple`, which costs at most 1% of the budget at the sizes here (tests count the built models).
    """

    def rounded(width: float) -> int:
        return budget.multiple * max(round(width / budget.multiple), 1)

    towers = 2 if objective == "bidirectional" and not per_tower else 1
    if architecture == "transformer":
        layer = budget.body / (towers * budget.transformer_layers)
        fixed = common.transformer_layer(budget.width, 0)
        mlp_width = rounded((layer - fixed) / (common.transformer_layer(budget.width, 1) - fixed))
        return {
            "layers": budget.transformer_layers,
            "heads": budget.heads,
            "mlp_width": mlp_width,
            "max_positions": budget.seq_len,
        }
    joined = 2 if objective == "masked" else 1  # directions within a layer
    outputs = budget.width // joined
    layer = budget.body / (towers * joined * budget.lstm_layers)
    return {
        "layers": budget.lstm_layers,
        "lstm.cells": rounded(layer / common.lstm_layer(budget.width, 1, outputs)),
        "lstm.projection": outputs,
    }


def read_arguments(text: str):
    """size=tiny|laptop|small, arm, architecture, objective, input, budget, state, model (native), cells (sweeps)."""
    given = configs.arguments(
        text,
        size=tuple(BUDGETS),
        arm=("controlled", "native"),
        architecture=("transformer", "lstm"),
        objective=("causal", "bidirectional", "masked"),
        input=("tokens", "characters"),
        budget=("shared", "tower"),
        state=("carried", "fresh"),
        model=("none", "elmo", "gpt", "bert"),
        cells=("demo", "all"),
        tune=("none", "rates", "dropout"),
    )
    named = {item.split("=")[0] for item in text.split(",")}
    if given.arm == "native":
        wrong = named & {"architecture", "objective", "input", "budget", "state", "cells"}
        if wrong:
            raise UserError(
                f"config argument {min(wrong)!r} belongs to arm=controlled; arm=native has model=elmo|gpt|bert"
            )
        if given.size == "small":
            raise UserError(
                f"config argument size={given.size!r} is for arm=controlled; arm=native has the sizes tiny and laptop"
            )
    elif given.model != "none":
        raise UserError(
            f"config argument model={given.model!r} belongs to arm=native; here it is architecture and objective"
        )
    return given


# Of the peak learning rates that protocol 7 tries, a quarter of the budget each; the best at an edge extends its grid.
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DROPOUTS = (0.0, 0.1)  # protocol 7, at the chosen rate
NATIVE_RATES = {"elmo": (0.06, 0.2, 0.6, 2.0), "gpt": RATES, "bert": (1e-4, 3e-4, 1e-3, 3e-3)}
LANES = {("lstm", "causal"), ("lstm", "bidirectional")}


def get_config(arguments: str = ""):
    """One point; see `read_arguments`."""
    given = read_arguments(arguments)
    if given.cells != "demo" or given.tune != "none":
        what = "cells='all'" if given.cells != "demo" else f"tune={given.tune!r}"
        raise UserError(f"config argument {what} names a sweep: python -m launch.sweep --config=... --root=DIR")
    if given.budget == "tower" and given.objective != "bidirectional":
        raise UserError("config argument budget='tower' is for objective=bidirectional: the others have one tower")
    if given.state == "fresh" and (given.architecture, given.objective) not in LANES:
        raise UserError(
            "config argument state='fresh' is for lstm with causal or bidirectional: the others carry nothing"
        )
    if given.arm == "native":
        if given.model == "none":
            raise UserError("config argument arm='native' needs model=elmo|gpt|bert, or launch.sweep for all three")
        return {"elmo": elmo, "gpt": gpt, "bert": bert}[given.model].get_config(given.size)
    budget = BUDGETS[given.size]
    lanes = (given.architecture, given.objective) in LANES and given.state == "carried"
    config = common.configure(
        {
            "data.source": "pydocs" if given.size == "tiny" else "",  # protocol.md 1: the user's to bring
            "data.layout": "lanes" if lanes else "blocks",
            "data.lanes.block_windows": 16,
            "data.tokenizer.kind": "byte_bpe",
            "data.tokenizer.vocab": budget.vocab,
            "batch_size": budget.batch_size,
            "seq_len": budget.seq_len,
            **budget.duration,
            "optimizer.name": "adamw",
            "optimizer.peak_lr": budget.peak_lr[given.architecture],
            "optimizer.schedule": "linear",
            "optimizer.warmup_steps": budget.warmup_steps,
            "optimizer.weight_decay": 0.01,
            "optimizer.decay": common.NO_DECAY_ON_BIAS_AND_NORM,
            "optimizer.clip_norm": 1.0,
            **budget.often,
        }
    )
    model = {
        "architecture": given.architecture,
        "direction": DIRECTIONS[given.objective],
        "input": given.input,
        "width": budget.width,
        "embedding_norm": True,
        "tied": True,
        "head_bias": True,
        "init": budget.init,
        **body(budget, given.architecture, given.objective, per_tower=given.budget == "tower"),
    }
    if given.architecture == "lstm":
        model |= {"lstm.cell_clip": 3.0, "lstm.projection_clip": 3.0, "lstm.residual": True}
    if given.input == "characters":
        model |= {"characters.filters": budget.filters, "characters.highways": 1}
    configs.set_model(config, model)
    configs.add_objective(config, given.objective)
    return config


def sweep(add, arguments: str = "") -> None:
    """The demo's three models; with cells=all the six cells; with arm=native the three papers' models. With tune=rates
    or dropout each at several of them and a quarter of the length (protocol 7). budget=tower is for the points with two
    towers, state=fresh for those with a state to carry; the others are as without."""
    given = read_arguments(arguments)
    one_cell = {item.split("=")[0] for item in arguments.split(",")} & {"architecture", "objective", "input", "model"}
    if one_cell:
        raise UserError(
            f"config argument {min(one_cell)!r} names one point; a sweep takes size, arm, budget, state, cells and tune"
        )
    size, points = given.size, {}
    if given.arm == "native":
        points = {name: f"{size},arm=native,model={name}" for name in ("elmo", "gpt", "bert")}
    elif given.cells == "all":
        for architecture in ("transformer", "lstm"):
            for objective in DIRECTIONS:
                points[f"{architecture}-{objective}"] = f"{size},architecture={architecture},objective={objective}"
    else:
        points = {name: f"{size},{point}" for name, point in DEMO.items()}
    for name, point in points.items():
        cell = read_arguments(point)
        if given.budget == "tower" and cell.objective == "bidirectional":
            point += ",budget=tower"
        if given.state == "fresh" and (cell.architecture, cell.objective) in LANES:
            point += ",state=fresh"
        if given.tune == "none":
            add(name, point)
            continue
        config = get_config(point)
        quarter = {key: config[key] / 4 for key in configs.DURATIONS if config[key] is not None}
        quarter = {key: value if key == "total_epochs" else round(value) for key, value in quarter.items()}
        if given.tune == "dropout":
            keys = [key for key in ("dropout", "embedding_dropout", "attention_dropout") if key in config.model]
            tried = {f"dropout{share:g}": dict.fromkeys((f"model.{key}" for key in keys), share) for share in DROPOUTS}
        else:
            rates = NATIVE_RATES[name] if given.arm == "native" else RATES
            tried = {f"lr{rate:g}": {"optimizer.peak_lr": rate} for rate in rates}
        for label, settings in tried.items():
            add(f"{name}-{label}", point, settings | quarter | {"eval.every_steps": 0})
