"""Heads of tasks: from what a model says of a row to classes, a number, a choice, tags or a span.

A head reads the last layer, a learned mix of the layers, layers side by side, or vectors without context; a BiLSTM of
its own may stand on that (ELMo section 3.3, BERT section 5.3). What it reads comes in parts, each with what its vectors
have seen: the row up to them, the row from them on, all of it, or nothing but their own token. Where one vector stands
for a row, a part gives the one that has seen the whole row: the last of what reads from the left, the first of what
reads from the right.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx

from plm.models.heads import HIDDEN_LOGIT
from plm.models.layers import Dense, Noise, dropout
from plm.models.lstm import LstmCell, reverse_within
from plm.models.scalar_mix import ScalarMix

LEFT, RIGHT, ALL, ITSELF = "left", "right", "all", "itself"


@dataclasses.dataclass(frozen=True)
class Part:
    """x: [B, T, features]; sees: what a vector of it has seen of its row."""

    x: jax.Array
    sees: str


def joined(parts: list[Part]) -> jax.Array:
    """[B, T, all features]"""
    return parts[0].x if len(parts) == 1 else jnp.concatenate([part.x for part in parts], axis=-1)


def valid_positions(length: jax.Array, T: int) -> jax.Array:
    """bool [B, T]"""
    return jnp.arange(T)[None] < length[:, None]


class BiLstm(nnx.Module):
    """One layer in both directions: [B, T, inputs] -> two parts of [B, T, cells], aligned with the tokens."""

    def __init__(self, inputs: int, cells: int, init: str, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = SimpleNamespace(cells=cells, projection=0, cell_clip=0.0, projection_clip=0.0)
        settings = SimpleNamespace(lstm=shape, init=init)
        self.forward = LstmCell(inputs, settings, dtype=dtype, rngs=rngs)
        self.backward = LstmCell(inputs, settings, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, length: jax.Array) -> list[Part]:
        valid = valid_positions(length, x.shape[1])
        ahead, _ = self.forward(x, None, valid)
        back, _ = self.backward(reverse_within(x, length), None, valid)
        return [Part(ahead, LEFT), Part(reverse_within(back, length), RIGHT)]


def chosen_layers(config, settings) -> tuple[int, ...]:
    """Numbers of the layers that a head reads, 0 for the vectors below the first. Arguments as `Reader`'s."""
    layers = range(config.layers + 1)
    return tuple(layers[layer] for layer in settings.layers) or tuple(layers)


class Reader(nnx.Module):
    """`reader(outputs, batch, noise)` -> the parts that a head works on, `width` features in all.

    config: of the model; settings: of the objective (`plm.training.config.TASK_OBJECTIVE`). needs: the outputs that the
    model must give beside its last layer: "layers", "static".

    `insert` says where the model's vectors join a BiLSTM: at its input, behind its output, or both, each with a mix of
    its own (ELMo section 3.3 and table 3). Vectors from a file (batch["vectors"]) always stand at the input; without
    them a BiLSTM that has the model's vectors at its output only reads the model's own vectors without context.
    """

    def __init__(self, config, settings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.direction, self.reads, self.insert = config.direction, settings.reads, settings.insert
        self.rate, self.with_vectors, self.dtype = settings.input_dropout, settings.vectors > 0, dtype
        self.chosen = chosen_layers(config, settings)
        places = 2 if settings.lstm and settings.insert == "both" else 1
        mixes = [ScalarMix(len(self.chosen), settings.mix_norm, settings.mix_gamma) for _ in range(places)]
        self.mixes = nnx.List(mixes) if settings.reads == "mix" else None

        layer_width = config.width * (2 if config.direction == "both" else 1)
        widths = {"concat": layer_width * len(self.chosen), "static": config.width, "vectors": 0}
        read = widths.get(settings.reads, layer_width)
        self.own_static = bool(settings.lstm) and settings.insert == "output" and not settings.vectors
        static = config.width if self.own_static else settings.vectors
        below = static + (read if settings.insert != "output" else 0)
        sizes = [below, *[2 * settings.lstm] * (settings.lstm_layers - 1)] if settings.lstm else []
        layers = [BiLstm(n, settings.lstm, config.init, dtype=dtype, rngs=rngs) for n in sizes]
        self.lstm = nnx.List(layers) if layers else None
        behind = read if settings.insert != "input" else 0
        self.width = 2 * settings.lstm + behind if layers else settings.vectors + read
        needs = {"layers"} if settings.reads in ("mix", "concat") else set()
        self.needs = frozenset(needs | ({"static"} if self.own_static or settings.reads == "static" else set()))

    def _towers(self, x: jax.Array) -> list[Part]:
        """Both towers side by side -> a part each; else one part."""
        if self.direction != "both":
            return [Part(x, ALL if self.direction == "full" else LEFT)]
        ahead, back = jnp.split(x, 2, axis=-1)
        return [Part(ahead, LEFT), Part(back, RIGHT)]

    def _read(self, outputs: dict, batch: dict, place: int) -> list[Part]:
        """The model's own vectors, for one place of insertion."""
        match self.reads:
            case "last" if self.direction == "both":
                return [Part(outputs["forward"], LEFT), Part(outputs["backward"], RIGHT)]
            case "last":
                return self._towers(outputs["hidden"])
            case "mix":
                layers = outputs["layers"][jnp.asarray(self.chosen)]
                mask = valid_positions(batch["length"], layers.shape[2])
                return self._towers(self.mixes[place](layers, mask).astype(self.dtype))
            case "concat":
                layers = (outputs["layers"][layer] for layer in self.chosen)
                return [part for layer in layers for part in self._towers(layer)]
            case "static":
                return [Part(outputs["static"], ITSELF)]
            case _:
                return []

    def __call__(self, outputs: dict, batch: dict, noise: Noise | None) -> list[Part]:
        given = [Part(batch["vectors"].astype(self.dtype), ITSELF)] if self.with_vectors else []
        read = self._dropped(self._read(outputs, batch, 0), noise, "read")
        if self.lstm is None:
            return [*self._dropped(given, noise, "vectors"), *read]
        own = [Part(outputs["static"], ITSELF)] if self.own_static else given
        parts = self._dropped(own, noise, "vectors") + (read if self.insert != "output" else [])
        for number, layer in enumerate(self.lstm):
            parts = self._dropped(layer(joined(parts), batch["length"]), noise, f"lstm/{number}")
        if self.insert == "both":
            read = self._dropped(self._read(outputs, batch, 1 if self.reads == "mix" else 0), noise, "read again")
        return parts + (read if self.insert != "input" else [])

    def _dropped(self, parts: list[Part], noise: Noise | None, name: str) -> list[Part]:
        named = enumerate(parts)
        return [Part(dropout(part.x, self.rate, noise, f"reader/{name}/{i}"), part.sees) for i, part in named]

    def penalty(self) -> jax.Array:
        """Sum over the mixes of |w|^2, which pulls their weights to the mean of the layers (ELMo section 3.2)."""
        mixes = [] if self.mixes is None else self.mixes
        return sum((jnp.sum(jnp.square(mix.weights[...])) for mix in mixes), start=jnp.zeros(()))


class TaskHead(nnx.Module):
    """A task's output on the reader's parts: a linear map of one vector a row, or of every position's.

    outputs: numbers that it gives. marked: further positions of a row whose vectors stand beside the row's own (the
    target words of word in context). compared: an example's two rows are texts of their own, u and v, and become
    [u; v; |u - v|; u * v].
    """

    def __init__(
        self,
        config,
        settings,
        outputs: int,
        *,
        marked: int = 0,
        compared: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.reader = Reader(config, settings, dtype=dtype, rngs=rngs)
        self.pooling, self.rate, self.marked, self.compared = settings.pooling, settings.dropout, marked, compared
        init = {"dtype": dtype, "rngs": rngs}
        width = self.reader.width
        stddev = (config.init, config.init_stddev)
        self.attend = Dense(width, 1, *stddev, **init) if settings.pooling == "attention" else None
        self.pooler = Dense(width, width, *stddev, **init) if settings.pooler else None
        width *= (1 + marked) * (4 if compared else 1)
        self.output = Dense(width, outputs, *stddev, **init)

    def row_vectors(self, outputs: dict, batch: dict, noise: Noise | None) -> jax.Array:
        """[B, width]: one vector a row, and those of its marked positions."""
        parts = self.reader(outputs, batch, noise)
        vectors = self._pooled(parts, batch["length"])
        if self.pooler is not None:
            vectors = jnp.tanh(self.pooler(vectors))
        if not self.marked:
            return vectors
        x = joined(parts)
        at = batch["marked"]
        words = jnp.take_along_axis(x, at[..., None], axis=1).reshape(x.shape[0], -1)
        return jnp.concatenate([vectors, words], axis=-1)

    def _pooled(self, parts: list[Part], length: jax.Array) -> jax.Array:
        x = joined(parts)
        valid = valid_positions(length, x.shape[1])[..., None]
        match self.pooling:
            case "mean":
                return jnp.sum(jnp.where(valid, x, 0), axis=1) / jnp.maximum(length, 1)[:, None].astype(x.dtype)
            case "max":
                return jnp.where(length[:, None] > 0, jnp.max(jnp.where(valid, x, HIDDEN_LOGIT), axis=1), 0)
            case "attention":
                scores = jnp.where(valid, self.attend(x).astype(jnp.float32), HIDDEN_LOGIT)
                return jnp.sum(jax.nn.softmax(scores, axis=1).astype(x.dtype) * x, axis=1)
        last = jnp.maximum(length - 1, 0)
        first = jnp.zeros_like(last)
        # What reads from the right has seen the row at its first token, whatever the others are asked for.
        at = [first if part.sees == RIGHT or (self.pooling == "first" and part.sees == ALL) else last for part in parts]
        ends = [jnp.take_along_axis(p.x, i[:, None, None], axis=1)[:, 0] for p, i in zip(parts, at, strict=True)]
        return jnp.concatenate(ends, axis=-1)

    def of_rows(self, outputs: dict, batch: dict, noise: Noise | None, shared: Noise | None) -> jax.Array:
        """float32 [B, outputs], a row at a time. shared: the noise on its vector, with the rows that it is of."""
        vectors = self.row_vectors(outputs, batch, noise)
        return self.output(dropout(vectors, self.rate, shared, "head/input")).astype(jnp.float32)

    def of_examples(self, outputs: dict, batch: dict, noise: Noise | None, rows: int) -> jax.Array:
        """float32 [B / rows, outputs]: the vectors of an example's rows are added, or compared."""
        vectors = self.row_vectors(outputs, batch, noise)
        each = vectors.reshape(-1, rows, vectors.shape[-1])
        if self.compared:
            u, v = each[:, 0], each[:, 1]
            vectors = jnp.concatenate([u, v, jnp.abs(u - v), u * v], axis=-1)
        else:
            vectors = jnp.sum(each, axis=1)
        shared = None if noise is None else Noise(noise.key, noise.rows[::rows] // rows)
        return self.output(dropout(vectors, self.rate, shared, "head/input")).astype(jnp.float32)

    def of_positions(self, outputs: dict, batch: dict, noise: Noise | None, at: jax.Array | None = None) -> jax.Array:
        """float32 [B, T or as many as `at` int32 [B, n] names, outputs]."""
        x = joined(self.reader(outputs, batch, noise))
        if at is not None:
            x = jnp.take_along_axis(x, at[..., None], axis=1)
        return self.output(dropout(x, self.rate, noise, "head/input")).astype(jnp.float32)


class Crf(nnx.Module):
    """A linear chain over tags (Lafferty et al. 2001): transitions [from, to], and scores of the first and last tag."""

    def __init__(self, tags: int):
        self.transitions = nnx.Param(jnp.zeros((tags, tags)))
        self.first, self.last = nnx.Param(jnp.zeros(tags)), nnx.Param(jnp.zeros(tags))

    def nll(self, scores_BxNxK: jax.Array, tags_BxN: jax.Array, valid_BxN: jax.Array) -> jax.Array:
        """[B]: -log p(tags) of each row's first words, as many as are valid; 0 for a row without."""
        scores, n = scores_BxNxK, jnp.sum(valid_BxN, axis=1)
        transitions = self.transitions[...]

        def step(alpha_BxK, inputs):
            score_BxK, valid_B = inputs
            moved = jax.nn.logsumexp(alpha_BxK[:, :, None] + transitions[None], axis=1) + score_BxK
            return jnp.where(valid_B[:, None], moved, alpha_BxK), None

        start = self.first[...][None] + scores[:, 0]
        by_word = (jnp.swapaxes(scores, 0, 1)[1:], valid_BxN.T[1:])
        total = jax.nn.logsumexp(jax.lax.scan(step, start, by_word)[0] + self.last[...][None], axis=-1)
        own = jnp.take_along_axis(scores, tags_BxN[..., None], axis=-1)[..., 0]
        between = transitions[tags_BxN[:, :-1], tags_BxN[:, 1:]]
        final = jnp.take_along_axis(tags_BxN, jnp.maximum(n - 1, 0)[:, None], axis=1)[:, 0]
        gold = self.first[...][tags_BxN[:, 0]] + self.last[...][final]
        gold = gold + jnp.sum(jnp.where(valid_BxN, own, 0), 1) + jnp.sum(jnp.where(valid_BxN[:, 1:], between, 0), 1)
        return jnp.where(n > 0, total - gold, 0.0)

    def best(self, scores_BxNxK: jax.Array, valid_BxN: jax.Array) -> jax.Array:
        """int32 [B, N]: the most probable tags (Viterbi); behind a row's valid words the last one again."""
        transitions = self.transitions[...]

        def step(alpha, inputs):
            score, valid = inputs
            paths = alpha[:, :, None] + transitions[None]
            stay = jnp.broadcast_to(jnp.arange(alpha.shape[1])[None], alpha.shape)
            back = jnp.where(valid[:, None], jnp.argmax(paths, axis=1), stay)
            return jnp.where(valid[:, None], jnp.max(paths, axis=1) + score, alpha), back

        start = self.first[...][None] + scores_BxNxK[:, 0]
        by_word = (jnp.swapaxes(scores_BxNxK, 0, 1)[1:], valid_BxN.T[1:])
        alpha, back = jax.lax.scan(step, start, by_word)
        final = jnp.argmax(alpha + self.last[...][None], axis=-1)

        def follow(tag, pointers):
            before = jnp.take_along_axis(pointers, tag[:, None], axis=1)[:, 0]
            return before, tag

        first, rest = jax.lax.scan(follow, final, back, reverse=True)
        return jnp.concatenate([first[None], rest]).T.astype(jnp.int32)


class TagHead(TaskHead):
    """Scores of tags, with a `Crf` over them if the settings ask for one."""

    def __init__(self, config, settings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, settings, settings.classes, dtype=dtype, rngs=rngs)
        self.crf = Crf(settings.classes) if settings.crf else None


def _classify(config, settings, **options) -> TaskHead:
    compared = settings.pairs == "apart"
    return TaskHead(config, settings, settings.classes, marked=settings.marked, compared=compared, **options)


# Objective -> its head, called with (config of the model, settings of the objective, dtype=, rngs=).
TASK_HEADS = {
    "classify": _classify,
    "regress": lambda config, s, **options: TaskHead(config, s, 1, compared=s.pairs == "apart", **options),
    "choose": lambda config, s, **options: TaskHead(config, s, 1, **options),
    "tag": TagHead,
    "span": lambda config, s, **options: TaskHead(config, s, 2, **options),
}
