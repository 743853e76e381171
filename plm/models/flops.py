"""Floating-point operations by formula: what a step must compute, not what a compiler makes of it."""

from plm.models.char_cnn import MAX_CHARACTERS
from plm.models.graph import ModelGraph

ON_ONE_VECTOR = ("next_sentence", "classify", "regress", "choose")  # objectives whose head reads one position of a row
ON_EVERY_POSITION = ("tag", "span")


def forward_flops(graph: ModelGraph, config, vocabulary_size: int, predictions: float) -> float:
    """Operations of one row of `seq_len` tokens, forward, a multiply-add counted as two.

    Every kernel: 2 x its size for each token that it is applied to (a convolution: each of its positions). Attention:
    4 x seq_len x width for each token and layer, causal or not. Output: 2 x vocabulary x width for each predicted
    position; `predictions` is their number in a row and direction. Gathers, norms and activations: not counted.
    """
    model, T = config.model, config.seq_len
    towers = 2 if model.direction == "both" else 1
    total = 0.0
    for parameter in graph.parameters:
        leaf = parameter.path.rsplit("/", 1)[-1]
        if leaf == "table" or leaf in ("bias", "scale"):
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
    if model.architecture == "transformer":
        total += 4.0 * T * T * model.width * model.layers * towers
    vocabulary_heads = sum(name not in (*ON_ONE_VECTOR, *ON_EVERY_POSITION) for name in config.objectives)
    return total + 2.0 * vocabulary_size * model.width * predictions * towers * vocabulary_heads


def train_flops(graph: ModelGraph, config, vocabulary_size: int) -> float | None:
    """Operations of one training step: three times the forward pass (each product has two in the backward pass).

    None for a model from outside, whose formula is not known here. The sampled softmax counts its samples.
    """
    if config.model.name != "language_model":
        return None
    predictions, size = float(config.seq_len), vocabulary_size
    if "masked" in config.objectives:
        masked = config.objectives.masked
        predictions = min(masked.rate * config.seq_len, masked.max_predictions)
    if "bidirectional" in config.objectives:
        size = config.objectives.bidirectional.samples or vocabulary_size
    return 3.0 * config.batch_size * forward_flops(graph, config, size, predictions)
