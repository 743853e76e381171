"""Pieces that experiments share. Nothing here is an experiment."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from plm.training import config as configs

# BERT's and GPT's weight decay leaves out biases and the gains of LayerNorm, and nothing else: embeddings are decayed.
NO_DECAY_ON_BIAS_AND_NORM = ((r"(bias$|norm/scale$)", 0.0),)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of a preset for CPUs that are tuned together."""

    vocab: int
    batch_size: int
    seq_len: int
    total_steps: int
    peak_lr: float
    warmup_steps: int


# The tiny presets of elmo.py, gpt.py and bert.py, on the embedded corpus `pydocs`: about two minutes on two cores. A
# 2 x 128 model with init N(0, 0.02) stays at the unigram for a million tokens; with N(0, 1 / fan_in) it is past the
# bigram gate in minutes. So every preset for CPUs scales its init with its width (`init="fan_in"`), unlike the papers'.
TINY = {
    "elmo": Recipe(vocab=8000, batch_size=64, seq_len=20, total_steps=600, peak_lr=0.2, warmup_steps=0),
    "gpt": Recipe(vocab=4096, batch_size=16, seq_len=128, total_steps=500, peak_lr=2e-3, warmup_steps=50),
    "bert": Recipe(vocab=4096, batch_size=16, seq_len=128, total_steps=500, peak_lr=5e-4, warmup_steps=50),
}
# The laptop presets, on text of the user's own: 40 minutes to two hours each on one core (docs/transfer.md). BERT
# predicts one piece in seven: it stays near the unigram of its targets for 6,000 updates, and leaves it then.
LAPTOP = {
    "elmo": Recipe(vocab=16000, batch_size=64, seq_len=20, total_steps=4000, peak_lr=0.2, warmup_steps=0),
    "gpt": Recipe(vocab=4096, batch_size=16, seq_len=128, total_steps=6000, peak_lr=2e-3, warmup_steps=200),
    "bert": Recipe(vocab=4096, batch_size=16, seq_len=128, total_steps=24000, peak_lr=1e-3, warmup_steps=500),
}
# Positions of their Transformers: texts of tasks are longer than the rows of pretraining here and there.
POSITIONS = {"tiny": 128, "laptop": 512}


def configure(settings: Mapping[str, Any]) -> ConfigDict:
    """`base()` with dotted settings; one that names an unknown key is an error of the experiment file."""
    config = configs.base()
    configs.apply(config, settings)
    return config


def transformer_layer(width: int, mlp_width: int) -> int:
    """Parameters of a block: four square maps, the MLP, two LayerNorms."""
    return 4 * (width * width + width) + 2 * width * mlp_width + mlp_width + width + 4 * width


def lstm_layer(inputs: int, cells: int, outputs: int) -> int:
    """Parameters of a projected LSTM layer of one direction: four gates with biases, the projection."""
    return (inputs + outputs) * 4 * cells + 4 * cells + cells * outputs


def often(total_steps: int) -> dict[str, int]:
    """Intervals of a short run: about 50 log lines, 10 evaluations, 4 checkpoints."""
    return {
        "log.every_steps": max(total_steps // 50, 1),
        "eval.every_steps": max(total_steps // 10, 1),
        "checkpoint.every_steps": max(total_steps // 4, 1),
    }


def on_cpu(recipe: Recipe, source: str = "") -> dict[str, Any]:
    """What every preset for CPUs says of data and duration."""
    return {
        "data.source": source,
        "data.tokenizer.vocab": recipe.vocab,
        "batch_size": recipe.batch_size,
        "seq_len": recipe.seq_len,
        "total_steps": recipe.total_steps,
        "optimizer.peak_lr": recipe.peak_lr,
        "optimizer.warmup_steps": recipe.warmup_steps,
        "eval.batches": 0,
        **often(recipe.total_steps),
    }
