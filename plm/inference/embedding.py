"""Contextual vectors of texts: batches of windows through the model, layers mixed on the device, pieces to words."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plm.data import reading
from plm.data.reading import Reading, Text, Window
from plm.errors import UserError
from plm.inference import batches
from plm.models import scalar_mix
from plm.models.graph import ModelGraph

UNITS = ("words", "subwords")
POOLINGS = ("mean", "first", "last")
MIXES = ("none", "sum", "mean", "concat", "scalar")
LAYER_NORMS = ("none", "bilm", "allennlp")
CNN_WORDS = 256  # distinct words that pass ELMo's convolutions together


@dataclasses.dataclass(frozen=True)
class ScalarMix:
    """ELMo's mix (section 3.2): gamma x sum over layers of softmax(weights) x layer.

    weights: one for each layer, before the softmax; None: all equal. layer_norm: each layer is first brought to mean 0
    and variance 1 over all that a text has in it; "bilm" (bilm-tf) leaves the sentence markers out of both numbers and
    gives them zeros, "allennlp" counts them. Both published programs take the numbers of whatever batch a text stands
    in; here each text (or window) is a batch of its own, so that its vectors are its own.
    """

    weights: tuple[float, ...] | None = None
    gamma: float = 1.0
    layer_norm: str = "none"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is wanted, checked. layers: numbers from 0; several: whether the result has an axis of layers; mix: "none",
    "concat", a float for each layer, or a ScalarMix with weights; room, stride: pieces of a text in a window (None: no
    limit) and from one window's start to the next one's."""

    layers: tuple[int, ...]
    several: bool
    units: str
    pooling: str
    specials: bool
    mix: Any
    room: int | None
    stride: int


def options(model, layers, units, pooling, specials, mix, window, stride) -> Options:
    """Errors: UserError for what a model or this module does not have."""
    if units not in UNITS:
        raise UserError(f"units={units!r} must be 'words' or 'subwords'")
    if pooling not in POOLINGS:
        raise UserError(f"pooling={pooling!r} must be one of {', '.join(POOLINGS)}")
    wanted, several = _layers(layers, model.n_layers)
    framed = sum(map(len, model.frame))
    if window is None:
        window = model.longest
    elif window <= framed or (model.longest is not None and window > model.longest):
        most = f"{model.longest}, the positions of the model" if model.longest else "any number"
        raise UserError(f"window={window} must be from {framed + 1} to {most}")
    room = None if window is None else window - framed
    if stride is not None and room is None:
        raise UserError(f"stride={stride} needs a window: this model reads texts of any length whole")
    if stride is None:
        stride = max((room or 1) // 2, 1)
    elif not 1 <= stride <= room:
        raise UserError(f"stride={stride} must be from 1 to {room}, the pieces of a text in a window of {window}")
    mix = _mix(mix, wanted)
    return Options(wanted, several and mix == "none", units, pooling, specials, mix, room, stride)


def _layers(layers, n: int) -> tuple[tuple[int, ...], bool]:
    if isinstance(layers, str) and layers == "all":
        return tuple(range(n)), True
    if isinstance(layers, slice):
        wanted = tuple(range(n)[layers])
        if not wanted:
            raise UserError(f"layers={layers}: none of the layers 0 to {n - 1}")
        return wanted, True
    several = not isinstance(layers, int | np.integer)
    wanted = list(layers) if several else [layers]
    for layer in wanted:
        if not isinstance(layer, int | np.integer) or not -n <= layer < n:
            raise UserError(f"layers={layers!r}: {layer!r} must be a number from {-n} to {n - 1}, or say 'all'")
    if not wanted:
        raise UserError(f"layers={layers!r} names no layer")
    return tuple(int(layer) % n for layer in wanted), several


def _mix(mix, layers: tuple[int, ...]):
    if mix is None or (isinstance(mix, str) and mix == "none"):
        return "none"
    if isinstance(mix, str):
        if mix not in MIXES:
            raise UserError(f"mix={mix!r} must be one of {', '.join(MIXES)}, or a weight for each layer")
        n = len(layers)
        scalar = ScalarMix((0.0,) * n)
        return {"concat": "concat", "sum": (1.0,) * n, "mean": (1.0 / n,) * n, "scalar": scalar}[mix]
    scalar = isinstance(mix, ScalarMix)
    if scalar and mix.layer_norm not in LAYER_NORMS:
        raise UserError(f"layer_norm={mix.layer_norm!r} must be one of {', '.join(LAYER_NORMS)}")
    if scalar and mix.weights is None:
        return dataclasses.replace(mix, weights=(0.0,) * len(layers))
    weights = tuple(float(weight) for weight in (mix.weights if scalar else mix))
    if len(weights) != len(layers) or not np.isfinite(weights).all():
        raise UserError(f"mix={weights} must have a finite weight for each of the {len(layers)} layers")
    return dataclasses.replace(mix, weights=weights) if scalar else weights


# ---------------------------------------------------------------------------------------------------------- the texts


def each(model, texts: Sequence[Text], options: Options) -> Iterator[tuple[int, np.ndarray]]:
    """(index, vectors) of each text, shortest windows first."""
    read = reading.read(model.tokenizer, texts)
    sees_right = model.direction != "forward"
    windows = [
        window
        for text, ids in enumerate(read.ids)
        for window in reading.windows(text, len(ids), options.room, options.stride, sees_right=sees_right)
    ]
    parts: dict[int, dict[int, np.ndarray]] = {}
    missing = np.bincount([window.text for window in windows], minlength=len(texts))
    for window, vectors in _of_windows(model, read, windows, options):
        parts.setdefault(window.text, {})[window.start] = vectors
        missing[window.text] -= 1
        if not missing[window.text]:
            found = parts.pop(window.text)
            joined = np.concatenate([found[start] for start in sorted(found)], axis=1)
            yield window.text, _units(joined, read, window.text, model.frame, options)


def _of_windows(model, read: Reading, windows: list[Window], options: Options) -> Iterator[tuple[Window, np.ndarray]]:
    """(window, [layers, positions, features] of what is taken from it, the frame at a text's ends included)."""
    before, after = map(len, model.frame)
    source = _Source(model, read)
    lengths = [before + window.stop - window.start + after for window in windows]
    held: tuple | None = None  # the batch before, so that the device works while its vectors are cut up
    for indices, rows, width in [*batches.batches(lengths, model.longest), (None, 0, 0)]:
        now = None
        if indices is not None:
            batch = source.batch([windows[index] for index in indices], rows, width)
            now = indices, _run(model, batch, options, source.looked_up)
        if held is not None:
            vectors = np.asarray(held[1])
            for row, index in enumerate(held[0]):
                window = windows[index]
                first = before + window.first - window.start if window.first else 0
                last = before + window.last - window.start
                last += after if window.last == len(read.ids[window.text]) else 0
                yield window, vectors[:, row, first:last]
        held = now


def in_order(
    model, documents: Sequence[Sequence[Text]], options: Options, carry: dict | None
) -> tuple[Iterator[tuple[int, np.ndarray]], Callable[[], dict]]:
    """Texts that begin with the LSTM states in which the text before them in their document ended.

    carry: the states, without rows, with which the first document goes on (None: fresh). Returns (index counted over
    all documents, vectors) and, when those have all been taken, a function that gives the states after the last text.
    """
    state = {} if model.direction == "full" else model.graph.bind(model.params).initial_carry(1)
    if not state:
        raise UserError("stateful: this model carries nothing from text to text; LSTM language models do")
    if options.room is not None:
        raise UserError("stateful reads each text whole: leave out the window")
    fresh = jax.tree.map(lambda leaf: np.asarray(leaf[0]), state)
    states = [carry if number == 0 and carry is not None else fresh for number in range(len(documents))]

    def found() -> Iterator[tuple[int, np.ndarray]]:
        texts = [text for document in documents for text in document]
        firsts = np.cumsum([0, *map(len, documents)])
        read = reading.read(model.tokenizer, texts)
        source = _Source(model, read)
        framed = sum(map(len, model.frame))
        for step in range(max(map(len, documents), default=0)):
            going = [number for number, document in enumerate(documents) if step < len(document)]
            windows = [Window(i, 0, len(read.ids[i]), 0, len(read.ids[i])) for i in (firsts[n] + step for n in going)]
            for indices, rows, width in batches.batches([window.stop + framed for window in windows]):
                here = [going[index] for index in indices]
                carries = [states[number] for number in here] + [fresh] * (rows - len(here))
                batch = source.batch([windows[index] for index in indices], rows, width)
                batch["carry"] = jax.tree.map(lambda *leaves: np.stack(leaves), *carries)
                vectors, after = jax.tree.map(np.asarray, _run(model, batch, options, source.looked_up))
                for row, number in enumerate(here):
                    window = windows[indices[row]]
                    if window.stop + framed:  # a row of nothing is padded with one token, which is no part of the text
                        states[number] = jax.tree.map(lambda leaf, row=row: leaf[row], after)
                    taken = vectors[:, row, : window.stop + framed]
                    yield int(window.text), _units(taken, read, window.text, model.frame, options)

    return found(), lambda: states[-1]


def _units(vectors: np.ndarray, read: Reading, text: int, frame, options: Options) -> np.ndarray:
    """[layers, framed pieces, features] -> the units that are wanted."""
    before, after = map(len, frame)
    inner = vectors[:, before : vectors.shape[1] - after]
    if options.units == "words":
        inner = _pool(inner, read.word[text], len(read.words[text]), options.pooling)
    if options.specials:
        inner = np.concatenate([vectors[:, :before], inner, vectors[:, vectors.shape[1] - after :]], axis=1)
    # A copy: what is a view would keep its whole batch in memory.
    return np.array(inner if options.several else inner[0])


def _pool(vectors: np.ndarray, word: np.ndarray, n_words: int, pooling: str) -> np.ndarray:
    """[layers, pieces, features] -> [layers, words, features]; a word without pieces is zeros."""
    counts = np.bincount(word, minlength=n_words)
    if (counts == 1).all():
        return vectors
    stops = np.cumsum(counts)
    starts = stops - counts
    result = np.zeros((vectors.shape[0], n_words, vectors.shape[2]), vectors.dtype)
    there = counts > 0
    if pooling == "first":
        result[:, there] = vectors[:, starts[there]]
    elif pooling == "last":
        result[:, there] = vectors[:, stops[there] - 1]
    elif there.any():
        # Words follow each other without gaps, so each sum ends where the next begins.
        sums = np.add.reduceat(vectors, starts[there], axis=1)
        result[:, there] = sums / counts[there][None, :, None].astype(vectors.dtype)
    return result


def static(model, words: Sequence[str]) -> np.ndarray:
    """See `Model.static`."""
    read = reading.read(model.tokenizer, [[word] for word in words])
    if model.reads_characters:
        distinct, table = _context_free(model, read, framed=False)
        places = [np.searchsorted(distinct, ids) for ids in read.ids]
        rows = np.asarray(table)
    else:
        places = [model.tokenizer.target_id(ids) for ids in read.ids]
        rows = np.asarray(model.params["embedding"]["tokens"]["table"], np.float32)
    nothing = np.zeros(rows.shape[1], np.float32)
    return np.stack([rows[at].mean(axis=0) if len(at) else nothing for at in places]) if words else rows[:0]


# -------------------------------------------------------------------------------------------------------- the device


class _Source:
    """Batches of windows; a model that reads characters gets rows of a table of its distinct words' vectors."""

    def __init__(self, model, read: Reading):
        self.model, self.read = model, read
        self.looked_up = model.reads_characters
        if self.looked_up:
            self.distinct, self.table = _context_free(model, read, framed=True)

    def batch(self, windows: Sequence[Window], rows: int, width: int) -> dict:
        before, after = self.model.frame
        ids = [[*before, *self.read.ids[w.text][w.start : w.stop].tolist(), *after] for w in windows]
        if not self.looked_up:
            return self.model.batch(ids, rows, width, self.read.open_words)
        tokens, length = batches.pad(ids, rows, width, int(self.distinct[0]))
        places = np.searchsorted(self.distinct, tokens).astype(np.int32)
        return {"length": length, "characters": places, "shared": {"vectors": self.table}}


def _context_free(model, read: Reading, *, framed: bool) -> tuple[np.ndarray, jax.Array]:
    """(distinct ids, sorted; their vectors [padded, width]).

    ELMo's convolutions look at one word alone and are most of its arithmetic: each word passes them once.
    """
    frame = [np.array([*model.frame[0], *model.frame[1], 0], np.int64)] if framed else []
    distinct = np.unique(np.concatenate([*frame, *read.ids]))
    characters = model.characters(distinct, read.open_words)
    n = -(-max(len(distinct), 1) // CNN_WORDS)
    padded = np.zeros((n * CNN_WORDS, *characters.shape[1:]), characters.dtype)
    padded[: len(characters)] = characters
    parts = [model.run(_words_program, {"characters": part}) for part in np.split(padded, n)]
    # A power of two of parts, so that the programs that read the table see few shapes.
    parts += [jnp.zeros_like(parts[0])] * (batches.power_of_two(n) - n)
    return distinct, jnp.concatenate(parts)


class _Lookup:
    """Stands in for the character encoder: rows of vectors made once for each distinct word."""

    def __init__(self, table: jax.Array):
        self.table = table

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.table, ids, axis=0, mode="clip")


def _run(model, batch: dict, options: Options, looked_up: bool):
    """[layers, rows, T, features] float32 of a batch, and the states after it if it brought some."""
    kind, mix = options.mix, options.mix
    if isinstance(mix, ScalarMix):
        kind = f"scalar {mix.layer_norm}"
        weights = {"weights": np.array(mix.weights, np.float32), "gamma": np.float32(mix.gamma)}
        batch["shared"] = batch.get("shared", {}) | weights
    elif not isinstance(mix, str):
        kind = "weights"
        batch["shared"] = batch.get("shared", {}) | {"weights": np.array(mix, np.float32)}
    frame = tuple(map(len, model.frame))
    return model.run(_layers_program, batch, layers=options.layers, mix=kind, frame=frame, looked_up=looked_up)


def _layers_program(
    graph: ModelGraph, layers: tuple[int, ...], mix: str, frame: tuple[int, int], looked_up: bool
) -> Callable:
    def program(params, batch):
        model = graph.bind(params)
        batch = dict(batch)
        shared, carry = batch.pop("shared", {}), batch.pop("carry", {})
        if looked_up:
            model.embedding.characters = _Lookup(shared["vectors"])
        outputs, after = model(batch, carry, layers=True)
        found = jnp.stack([outputs["layers"][layer] for layer in layers]).astype(jnp.float32)
        if mix == "concat":
            found = jnp.concatenate(list(found), axis=-1)[None]
        elif mix == "weights":
            found = jnp.einsum("lbtf,l->btf", found, shared["weights"])[None]
        elif mix.startswith("scalar"):
            found = _scalar_mix(found, shared, batch["length"], mix.removeprefix("scalar "), frame)[None]
        return (found, after) if carry else found

    return program


def _scalar_mix(layers_LxBxTxF, shared: dict, length_B, layer_norm: str, frame: tuple[int, int]) -> jax.Array:
    """[B, T, F]; each row by itself."""
    before, after = frame if layer_norm == "bilm" else (0, 0)
    at = jnp.arange(layers_LxBxTxF.shape[2])[None]
    mask_BxT = (at >= before) & (at < length_B[:, None] - after)

    def row(layers_LxTxF, mask_T):
        mask = None if layer_norm == "none" else mask_T[None]
        options = {"layer_norm": layer_norm != "none"}
        return scalar_mix.mix(layers_LxTxF[:, None], shared["weights"], shared["gamma"], mask, **options)[0]

    return jax.vmap(row, in_axes=(1, 0))(layers_LxBxTxF, mask_BxT)


def _words_program(graph: ModelGraph) -> Callable:
    return lambda params, batch: graph.bind(params).embedding.characters(batch["characters"])
