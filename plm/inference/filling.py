"""The likeliest pieces for each [MASK] of a text."""

import re
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from plm.errors import UserError
from plm.inference import batches
from plm.models.graph import ModelGraph

MASK = "[MASK]"  # how users write a masked place, whatever the tokenizer calls it


def fill(model, texts: Sequence[str], top_k: int) -> list[list[list[tuple[str, float]]]]:
    """See `Model.fill_mask`."""
    if model.head != "masked":
        raise UserError(
            f"{model.source} was trained to continue text (direction={model.direction!r}) and cannot fill masks:"
            " use generate, or a masked model"
        )
    if top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1")
    tokenizer = model.tokenizer
    mask, (before, after) = tokenizer.role("mask"), model.frame
    ids = []
    for text in texts:
        if MASK not in text:
            raise UserError(f"text {text!r} has no {MASK}: write it where a piece is to be filled in")
        ids.append([*before, *_masked_ids(tokenizer, text, mask), *after])
        if model.longest is not None and len(ids[-1]) > model.longest:
            raise UserError(
                f"a text has {len(ids[-1])} pieces and the model reads at most {model.longest} (model.max_positions)"
            )
    places = [np.flatnonzero(np.array(row) == mask) for row in ids]
    filled: list = [None] * len(texts)
    for indices, rows, width in batches.batches([len(row) for row in ids], model.longest):
        batch = model.batch([ids[index] for index in indices], rows, width, [])
        most = batches.power_of_two(max(len(places[index]) for index in indices))
        batch["positions"] = np.zeros((rows, most), np.int32)
        for row, index in enumerate(indices):
            batch["positions"][row, : len(places[index])] = places[index]
        scores = np.asarray(model.run(_masks_program, batch)).astype(np.float64)
        scores[..., list(tokenizer.roles.values())] = -np.inf
        for row, index in enumerate(indices):
            filled[index] = [_best(tokenizer, scores[row, slot], top_k) for slot in range(len(places[index]))]
    return filled


def _masked_ids(tokenizer, text: str, mask: int) -> list[int]:
    """Ids of a text in which each [MASK] is the mask token, in place of one piece and the space before it."""
    ids: list[int] = []
    for number, part in enumerate(re.split(re.escape(MASK), text)):
        if number:
            ids.append(mask)
        stripped = part.strip()
        if not stripped:
            continue
        if tokenizer.lossless and number and not part[0].isspace():
            # Directly behind the mask: no space before it, unlike at the start of a sentence.
            ids += tokenizer.backend.encode(stripped, add_special_tokens=False).ids
        else:
            ids += tokenizer.encode([stripped])[0]
    return ids


def _best(tokenizer, scores: np.ndarray, top_k: int) -> list[tuple[str, float]]:
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")[: min(top_k, np.count_nonzero(probabilities))]
    return [(_written(tokenizer, int(i)), float(probabilities[i])) for i in best]


def _written(tokenizer, piece: int) -> str:
    if tokenizer.lossless:
        return tokenizer.backend.decode([piece], skip_special_tokens=False)
    return tokenizer.pieces([piece])[0].removesuffix("</w>")


def _masks_program(graph: ModelGraph) -> Callable:
    def program(params, batch):
        model = graph.bind(params)
        batch = dict(batch)
        positions = batch.pop("positions")
        hidden = model(batch, {})[0]["hidden"]
        return model.heads["masked"].logits(jnp.take_along_axis(hidden, positions[..., None], axis=1))

    return program
