"""Floating-point operations by formula: what a step must compute, not what a compiler makes of it."""

import re

from plm.models.char_cnn import MAX_CHARACTERS
from plm.models.graph import ModelGraph

ON_ONE_VECTOR = ("next_sentence", "classify", "regress", "choose")  # objectives whose head reads one position of a row
ON_EVERY_POSITION = ("tag", "span")
# Last names of parameters that no vector is multiplied with as with a matrix: looked up, added, a mix's, a chain's.
NO_PRODUCTS = ("table", "bias", "scale", "weights", "gamma", "transitions", "first", "last")


def forward_flops(
    graph: ModelGraph, config, vocabulary_size: int, predictions: float, *, seq_len: int = 0, heads_only=False
) -> float:
    """Operations of one row of `seq_len` tokens (0: of the config's), forward, a multiply-add counted as two.

    Every kernel: 2 x its size for each token that it is applied to (a convolution: each of its positions). Attention:
    4 x seq_len x width for each token and layer, causal or not. Output: 2 x vocabulary x width for each predicted
    position; `predictions` is their number in a row and direction. Gathers, norms, mixes and activations: not counted.
    heads_only: without embedding and body.
    """
    model, T = config.model, seq_len or config.seq_len
    towers = 2 if model.direction == "both" else 1
    total = 0.0
    for parameter in graph.parameters:
        leaf = parameter.path.rsplit("/", 1)[-1]
        if leaf in NO_PRODUCTS or (heads_only and not parameter.path.startswith("heads/")):
            continue
        tokens = T
        if parameter.path.startswith("embedding/"):
            tokens = T * towers
            if "/convolutions/" in parameter.path:
                tokens *= MAX_CHARACTERS - parameter.shape[0] + 1
        elif parameter.path.startswith(tuple(f"heads/{name}/" for name in ON_ONE_VECTOR)):
            tokens = T if "/reader/" in parameter.path else 1
        elif parameter.path.startswith(tuple(f"heads/{name}/" for name in ON_EVERY_POSITION)):
            tokens = T
        elif parameter.path.startswith("heads/"):
            tokens = predictions
        total += 2.0 * parameter.count * tokens
    if model.architecture == "transformer" and not heads_only:
        total += 4.0 * T * T * model.width * model.layers * towers
    vocabulary_heads = sum(name not in (*ON_ONE_VECTOR, *ON_EVERY_POSITION) for name in config.objectives)
    return total + 2.0 * vocabulary_size * model.width * predictions * towers * vocabulary_heads


def train_flops(graph: ModelGraph, config, vocabulary_size: int, seq_len: int = 0) -> float | None:
    """Operations of one training step: three times the forward pass (each product has two in the backward pass), once
    for what lies below the heads where none of that trains.

    seq_len: of its rows, 0: the config's. None for a model from outside, whose formula is not known here. The sampled
    softmax counts its samples.
    """
    if config.model.name != "language_model":
        return None
    T = seq_len or config.seq_len
    predictions, size = float(T), vocabulary_size
    if "masked" in config.objectives:
        masked = config.objectives.masked
        predictions = min(masked.rate * T, masked.max_predictions)
    if "bidirectional" in config.objectives:
        size = config.objectives.bidirectional.samples or vocabulary_size
    whole = forward_flops(graph, config, size, predictions, seq_len=T)
    heads = forward_flops(graph, config, size, predictions, seq_len=T, heads_only=True)
    return config.batch_size * ((1.0 if _only_heads_train(graph, config) else 3.0) * (whole - heads) + 3.0 * heads)


def _only_heads_train(graph: ModelGraph, config) -> bool:
    frozen = [re.compile(pattern) for pattern in config.optimizer.freeze]
    below = (name for p in graph.parameters if not p.path.startswith("heads/") for name in p.logical_names)
    return bool(frozen) and all(any(regex.search(name) for regex in frozen) for name in below)
