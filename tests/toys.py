"""Small models and batches that several test files share, and parts from outside the package (module:function)."""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from plm.models.graph import build
from plm.training import config as configs

VOCABULARY = 50


def model_config(architecture: str, direction: str, **settings) -> ConfigDict:
    """The keys that models read, at toy size; LSTM layers always give the residual width."""
    model = {
        "name": "language_model",
        "architecture": architecture,
        "direction": direction,
        "input": "tokens",
        "width": 16,
        "layers": 2,
        "segments": 0,
        "embedding_norm": False,
        "dropout": 0.0,
        "embedding_dropout": 0.0,
        "embedding_dropout_on": "sum",
        "tied": True,
        "head_transform": False,
        "head_bias": True,
        "norm_epsilon": 1e-5,
        "init": "fan_in",
        "init_stddev": 0.02,
        "activation": "gelu",
    }
    if architecture == "transformer":
        model |= {"heads": 2, "mlp_width": 32, "max_positions": 32, "attention_dropout": 0.0}
    else:
        projection = 8 if direction == "full" else 16
        model["lstm"] = {
            "cells": 24,
            "projection": projection,
            "cell_clip": 3.0,
            "projection_clip": 3.0,
            "residual": True,
        }
    top = {"vocabulary_multiple": 16, "softmax_chunk": 0, "remat": "none", "scan": {"unroll": False}}
    top |= {key: settings.pop(key) for key in list(settings) if key in top}
    return ConfigDict({"model": model | settings, **top})


OBJECTIVE_OF = {"forward": "causal", "both": "bidirectional", "full": "masked"}


def objective_settings(name: str, **settings) -> ConfigDict:
    """The group of an objective with its defaults."""
    config = configs.base()
    configs.add_objective(config, name, **settings)
    return config.objectives[name]


def toy_graph(architecture: str, direction: str, objectives=None, *, heads=None, **settings):
    """heads: {task objective: its settings}."""
    config = model_config(architecture, direction, **settings)
    config.objectives = heads or {}
    return build(config, VOCABULARY, objectives or (OBJECTIVE_OF[direction],), jnp.float32)


def toy_batch(direction: str, B: int = 4, T: int = 8, seed: int = 0, **extra) -> dict:
    """A batch with every field that the objective of this direction reads; rows of weights differ in their sums."""
    rng = np.random.default_rng(seed)
    ids = lambda *shape: rng.integers(0, VOCABULARY, shape).astype(np.int32)  # noqa: E731
    weights = lambda *shape: (rng.random(shape) < 0.7).astype(np.float32)  # noqa: E731
    batch = {"tokens": ids(B, T), "row": np.arange(B, dtype=np.int32), "length": np.full(B, T, np.int32)}
    if direction == "forward":
        batch |= {"causal_targets": ids(B, T), "causal_weights": weights(B, T)}
    elif direction == "both":
        batch |= {"tokens_backward": ids(B, T)}
        batch |= {"bidirectional_targets": ids(B, T), "bidirectional_weights": weights(B, T)}
        batch |= {"bidirectional_backward_targets": ids(B, T), "bidirectional_backward_weights": weights(B, T)}
    else:
        P = 3
        positions = np.stack([rng.permutation(T)[:P] for _ in range(B)]).astype(np.int32)
        batch |= {"masked_positions": positions, "masked_targets": ids(B, P), "masked_weights": weights(B, P)}
    return batch | extra


class ToyTokenizer:
    """What objectives read of a tokenizer, without text: ids 0..4 are [PAD] [UNK] [CLS] [SEP] [MASK]."""

    size = VOCABULARY
    kind = "toy"
    byte_lengths = None
    continuations = np.arange(VOCABULARY) >= 40

    def role(self, name: str) -> int:
        return {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}[name]

    def target_id(self, ids: np.ndarray) -> np.ndarray:
        return np.where(ids >= self.size, 1, ids)
