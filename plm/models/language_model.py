"""The language model: an embedding, one tower of blocks or two, and a head for each objective.

Architecture (`transformer` or `lstm`), direction and input are independent choices; ELMo, GPT and BERT are three
points among them (`elmo.py`, `gpt.py`, `bert.py` of experiments/ give their settings). Parameter names:

| part | names |
| --- | --- |
| embedding | `embedding/tokens/table` or `embedding/characters/...`, `embedding/{positions,segments}/table`, |
| | `embedding/norm/*` |
| body | `blocks/<layer>/...`; with two towers the second is `backward_blocks/<layer>/...` |
| heads | `heads/<objective>/...`; a tied table is counted and stored once, as `embedding/tokens/table` |
"""

import jax
import jax.numpy as jnp
from flax import nnx

from plm.errors import UserError
from plm.models.char_cnn import CharacterEncoder
from plm.models.heads import NextSentenceHead, VocabularyHead
from plm.models.layers import LayerNorm, Noise, Stack, Table, constrain_rows, dropout, dropout_parameter
from plm.models.lstm import LstmBlock, reverse_within
from plm.models.task_heads import TASK_HEADS
from plm.models.transformer import TransformerBlock, attention_mask, continued_mask

DIRECTIONS = ("forward", "both", "full")


class Embedding(nnx.Module):
    """Token (or character) vectors + positions + segments, LayerNorm and dropout as the config says."""

    def __init__(self, config, size: int, multiple: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        table = {"init": config.init, "stddev": config.init_stddev, "rngs": rngs}
        by_characters = config.input == "characters"
        self.characters = CharacterEncoder(config, dtype=dtype, rngs=rngs) if by_characters else None
        by_tokens = not by_characters or config.tied
        self.tokens = Table(size, config.width, multiple=multiple, **table) if by_tokens else None
        n_positions, n_segments = config.get("max_positions"), config.get("segments")
        self.positions = Table(n_positions, config.width, **table) if n_positions else None
        self.segments = Table(n_segments, config.width, **table) if n_segments else None
        self.norm = LayerNorm(config.width, config.norm_epsilon, rngs=rngs) if config.embedding_norm else None
        self.input, self.dtype, self.rate = config.input, dtype, config.embedding_dropout
        self.on_matrix = config.embedding_dropout_on == "matrix"
        self.position_classes = config.get("positions_in_softmax") or 0

    def dropped_table(self, noise: Noise | None) -> jax.Array | None:
        """GPT drops elements of the embedding matrix itself, once a step, and ties the output to the dropped one."""
        if not self.on_matrix or noise is None or self.tokens is None:
            return None
        return dropout_parameter(self.tokens.table[...], self.rate, noise, "embedding/tokens")

    def position_rows(self, T: int, noise: Noise | None) -> jax.Array:
        """At least T rows of the position table, dropped alike wherever a step uses them if the matrix is dropped."""
        rows = self.positions.table[: max(T, self.position_classes)]
        return dropout_parameter(rows, self.rate, noise, "embedding/positions") if self.on_matrix else rows

    def classes(self, T: int, noise: Noise | None, table: jax.Array | None) -> jax.Array | None:
        """The rows that the output is multiplied with where they are not the stored table's: the dropped `table`, and
        in GPT's fine-tuning code the first positions behind it."""
        if not self.position_classes:
            return table
        tokens = self.tokens.table[...] if table is None else table
        return jnp.concatenate([tokens, self.position_rows(T, noise)[: self.position_classes]])

    def word_vectors(self, batch: dict) -> jax.Array | None:
        """[U, width]: each distinct word of the batch encoded once, if the batch lists them."""
        words = batch.get("shared", {}).get("words")
        return None if words is None else constrain_rows(self.characters(constrain_rows(words)))

    def without_context(self, tokens, table: jax.Array | None) -> jax.Array:
        """[B, T, width]: the vectors of the tokens alone, as in `__call__`."""
        if self.input == "characters" and table is None:
            return self.characters(tokens)
        if table is not None:
            return jnp.take(table, tokens, axis=0, mode="clip").astype(self.dtype)
        return self.tokens(tokens, self.dtype)

    def __call__(self, tokens, segments, noise: Noise | None, table: jax.Array | None, name: str, start=None):
        """-> [B, T, width]; `name` keeps the noise of two towers apart. start: int32 [B], the first token's position.

        tokens: ids [B, T]; characters [B, T, 50]; or, with `table`, rows of it: the distinct words' vectors, or GPT's
        dropped matrix.
        """
        x = self.without_context(tokens, table)
        if self.segments is not None:
            # Rows that name no segments are of the first one, as in BERT's code.
            x = x + self.segments(jnp.zeros((1, 1), jnp.int32) if segments is None else segments, self.dtype)
        if self.positions is not None and start is not None:
            x = x + self.positions(start[:, None] + jnp.arange(x.shape[1])[None], self.dtype)
        elif self.positions is not None:
            x = x + self.position_rows(x.shape[1], noise)[: x.shape[1]].astype(self.dtype)[None]
        if self.norm is not None:
            x = self.norm(x)
        return x if self.on_matrix else dropout(x, self.rate, noise, f"embedding/{name}")


class LanguageModel(nnx.Module):
    """`outputs, carry = model(batch, carry, key=None, layers=False)`; no key, no dropout.

    Reads from the batch (rows first): tokens [B, T], characters [B, T, 50] or words [B, T] (places in shared/words);
    optional length [B], segments [B, T], row [B] (global row, for the noise), start [B] (position of the first token,
    where a Transformer goes on with a cache); with two towers optionally the inputs
    with `_backward`, the backward stream in its own reading order, else the tokens reversed within their length.

    Outputs: `hidden` [B, T, W] (direction forward or full), or `forward` and `backward` [B, T, W] (two towers).
    `backward` is in the reading order of the backward stream if the batch gave one, else aligned with the tokens.
    `table`: the rows of the softmax where they are not the stored table: the dropped embedding matrix, GPT's positions
    behind it (`positions_in_softmax`). `layers` [L + 1, B, T, features], the embedding
    first, both towers concatenated and aligned, on request or where a head reads them; `static` [B, T, W], the tokens'
    vectors without context, where a head reads them.

    carry: {"forward": {"c" [B, L, C], "m" [B, L, P]}, "backward": ...} float32 for LSTM towers that read left to right
    or right to left; `{}` in means fresh zeros and `{}` out, and is the only carry of every other model in training.
    {"forward": `initial_cache(...)`} continues rows token by token, without dropout.
    """

    def __init__(self, config, size: int, objectives: tuple[str, ...], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        model = config.model
        if model.direction not in DIRECTIONS:
            raise UserError(f"model.direction={model.direction!r} must be one of {', '.join(DIRECTIONS)}")
        self.direction, self.architecture = model.direction, model.architecture
        self.embedding = Embedding(model, size, config.vocabulary_multiple, dtype=dtype, rngs=rngs)
        if model.architecture == "transformer":
            if model.width % model.heads:
                raise UserError(f"model.width={model.width} must be divisible by model.heads={model.heads}")
            outputs = model.width

            def make(rngs):
                return TransformerBlock(model, dtype=dtype, rngs=rngs)
        else:
            outputs = (model.lstm.projection or model.lstm.cells) * (2 if model.direction == "full" else 1)
            if outputs != model.width:
                raise UserError(
                    f"model.width={model.width} must equal the LSTM layers' output width {outputs}"
                    " (model.lstm.projection, or model.lstm.cells without one; twice that in direction 'full')"
                )

            def make(rngs):
                return LstmBlock(model, model.direction, dtype=dtype, rngs=rngs)

        self.blocks = Stack(make, model.layers, rngs=rngs)
        self.backward_blocks = Stack(make, model.layers, rngs=rngs) if model.direction == "both" else None
        self.tied = model.tied
        heads = {}
        for name in objectives:
            if name == "next_sentence":
                heads[name] = NextSentenceHead(model, dtype=dtype, rngs=rngs)
            elif name in TASK_HEADS:
                heads[name] = TASK_HEADS[name](model, config.objectives[name], dtype=dtype, rngs=rngs)
            else:
                heads[name] = VocabularyHead(
                    model,
                    self.embedding.tokens if model.tied else None,
                    size,
                    outputs,
                    config.vocabulary_multiple,
                    config.softmax_chunk,
                    dtype=dtype,
                    rngs=rngs,
                )
        self.heads = nnx.Dict(heads)
        self.needs = frozenset().union(*(heads[name].reader.needs for name in heads if name in TASK_HEADS))
        self.remat, self.unroll = config.remat == "blocks", config.scan.unroll
        self.output_dropout = model.dropout if model.architecture == "lstm" else 0.0
        self.n_layers, self.max_positions = model.layers, model.get("max_positions") or 0
        if model.architecture == "transformer":
            self.head_shape = (model.heads, model.width // model.heads)
        else:
            self.state_widths = (model.lstm.cells, model.lstm.projection or model.lstm.cells)

    def initial_carry(self, batch_size: int) -> dict:
        """Fresh zeros for `batch_size` rows, or {} for a model that carries nothing."""
        if self.architecture != "lstm" or self.direction == "full":
            return {}
        cells, outputs = self.state_widths

        def zeros():
            return {
                "c": jnp.zeros((batch_size, self.n_layers, cells)),
                "m": jnp.zeros((batch_size, self.n_layers, outputs)),
            }

        return {"forward": zeros(), "backward": zeros()} if self.direction == "both" else {"forward": zeros()}

    def initial_cache(self, batch_size: int, length: int) -> dict:
        """What the forward tower remembers of rows of up to `length` tokens, before the first one.

        LSTMs: their state, of one size for any length. Transformers: key and value [L, B, length, H, D]; with
        batch["start"] tokens read, the places from there on are free and what they hold is never seen. Layers are
        first there, so that no step of generation has to turn them.
        """
        if self.direction == "full":
            raise UserError("a model that sees both sides of each token cannot be continued token by token")
        if self.architecture == "lstm":
            return self.initial_carry(batch_size)["forward"]
        shape = (self.n_layers, batch_size, length, *self.head_shape)
        return {"key": jnp.zeros(shape, self.embedding.dtype), "value": jnp.zeros(shape, self.embedding.dtype)}

    def _continue(self, cache: dict, x, start, options: dict):
        """A Transformer's forward tower behind the `start` [B] tokens of the cache; returns (last, cache, layers)."""
        B, T = x.shape[:2]
        mask = continued_mask(start, cache["key"].shape[2], T)
        y, new, outputs = self.blocks(x, cache, None, mask=mask, **options)
        places = start[:, None] + jnp.arange(T)[None]
        rows = jnp.arange(B)[:, None]
        return y, jax.tree.map(lambda old, n: old.at[:, rows, places].set(n, mode="drop"), cache, new), outputs

    def _tower(self, stack: Stack, x, state, noise: Noise | None, length, layers: bool, start=None):
        """Runs one tower; `state` rows-first or None. Returns (last, new state rows-first or None, layers or None)."""
        T = x.shape[1]
        options = {"remat": self.remat, "unroll": self.unroll, "collect": layers}
        if self.architecture == "transformer" and state is not None:
            return self._continue(state, x, start, options)
        if self.architecture == "transformer":
            mask = attention_mask(length, T, causal=self.direction != "full")
            y, _, outputs = stack(x, None, noise, mask=mask, **options)
            return y, None, outputs
        valid = None if length is None else jnp.arange(T)[None, :] < length[:, None]
        by_layer = None if state is None else jax.tree.map(lambda s: jnp.swapaxes(s, 0, 1), state)
        y, new, outputs = stack(x, by_layer, noise, valid=valid, length=length, **options)
        y = dropout(y, self.output_dropout, noise, "lstm/output")
        return y, None if new is None else jax.tree.map(lambda s: jnp.swapaxes(s, 0, 1), new), outputs

    @staticmethod
    def _inputs(batch: dict, suffix: str) -> jax.Array | None:
        """Ids, characters or places of words, whichever the batch has."""
        names = (f"{name}{suffix}" for name in ("tokens", "characters", "words"))
        return next((batch[name] for name in names if name in batch), None)

    def __call__(self, batch: dict, carry: dict, key: jax.Array | None = None, layers: bool = False):
        inputs, length, segments = self._inputs(batch, ""), batch.get("length"), batch.get("segments")
        B, T = inputs.shape[:2]
        if self.max_positions and self.max_positions < T:
            raise UserError(f"a sequence of {T} tokens is longer than model.max_positions={self.max_positions}")
        layers = layers or "layers" in self.needs
        noise = None if key is None else Noise(key, batch.get("row", jnp.arange(B)))
        forward_noise = None if noise is None else noise.named("forward")
        table = self.embedding.dropped_table(noise)
        rows = self.embedding.word_vectors(batch) if table is None else table
        outputs, new_carry = {}, {}

        if "static" in self.needs:
            outputs["static"] = self.embedding.without_context(inputs, rows)
        start = batch.get("start")
        x = self.embedding(inputs, segments, noise, rows, "forward", start)
        y, state, by_layer = self._tower(self.blocks, x, carry.get("forward"), forward_noise, length, layers, start)
        if layers:
            by_layer = jnp.concatenate([x[None], by_layer])
        if carry:
            new_carry["forward"] = state
        if self.direction != "both":
            outputs["hidden"] = y
        else:
            own = self._inputs(batch, "_backward") is not None
            if own:
                inputs_b, segments_b = self._inputs(batch, "_backward"), None
            else:
                inputs_b, segments_b = (None if a is None else reverse_within(a, length) for a in (inputs, segments))
            backward_noise = None if noise is None else noise.named("backward")
            x_b = self.embedding(inputs_b, segments_b, noise, rows, "backward")
            y_b, state, by_layer_b = self._tower(
                self.backward_blocks, x_b, carry.get("backward"), backward_noise, length, layers
            )
            if carry:
                new_carry["backward"] = state
            outputs["forward"], outputs["backward"] = y, y_b if own else reverse_within(y_b, length)
            if layers:
                by_layer_b = jnp.concatenate([x_b[None], by_layer_b])
                aligned = jax.vmap(lambda a: reverse_within(a, length))(by_layer_b)
                by_layer = jnp.concatenate([by_layer, aligned], axis=-1)
        classes = self.embedding.classes(T, noise, table) if self.tied else None
        if classes is not None:
            outputs["table"] = classes
        if layers:
            outputs["layers"] = by_layer
        return outputs, new_carry
