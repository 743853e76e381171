"""ELMo's token encoder: characters -> convolutions -> max -> highways -> projection (ELMo section 3.4, bilm-tf)."""

import jax
import jax.numpy as jnp
from flax import nnx

from plm.models.layers import ACTIVATIONS

N_CHARACTERS = 261  # 256 bytes, begin and end of sentence, begin and end of word, padding
MAX_CHARACTERS = 50


class _Affine(nnx.Module):
    """x @ kernel + bias with given initial values."""

    def __init__(self, inputs: int, outputs: int, stddev: float, bias: float, *, dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(stddev)(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.full((outputs,), bias, jnp.float32))
        self.dtype = dtype

    def __call__(self, x):
        return x @ self.kernel[...].astype(self.dtype) + self.bias[...].astype(self.dtype)


class _Highway(nnx.Module):
    """g * relu(transform(x)) + (1 - g) * x; the gate that the official code calls "carry" multiplies the TRANSFORM."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.transform = _Affine(width, width, width**-0.5, 0.0, dtype=dtype, rngs=rngs)
        self.carry = _Affine(width, width, width**-0.5, -2.0, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        gate = jax.nn.sigmoid(self.carry(x))
        return gate * jax.nn.relu(self.transform(x)) + (1 - gate) * x


class _Convolution(nnx.Module):
    """Cross-correlation over positions: kernel [width, dim, filters], bias [filters], no padding."""

    def __init__(self, width: int, dim: int, filters: int, activation: str, init: str, *, rngs: nnx.Rngs):
        if activation == "relu" and init != "fan_in":
            draw = jax.random.uniform(rngs.params(), (width, dim, filters), minval=-0.05, maxval=0.05)
        else:
            draw = (width * dim) ** -0.5 * jax.random.normal(rngs.params(), (width, dim, filters))
        self.kernel = nnx.Param(draw)
        self.bias = nnx.Param(jnp.zeros((filters,)))


class CharacterEncoder(nnx.Module):
    """Context-free vectors from character ids, bilm-tf's `_build_word_char_embeddings`.

    Input ids int [..., 50]: 0 = no token here, 1..261 = ELMo's byte symbols shifted by one (papers' convention at
    inference, used in training too). The within-word padding symbol is learned and takes part in the max; a missing
    token still yields a vector, which no loss reads. Output [..., width].
    """

    def __init__(self, config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        characters = config.characters
        self.table = nnx.Param(
            jax.random.uniform(rngs.params(), (N_CHARACTERS, characters.dim), minval=-1.0, maxval=1.0)
        )
        self.convolutions = nnx.List(
            [
                _Convolution(width, characters.dim, filters, characters.activation, config.init, rngs=rngs)
                for width, filters in characters.filters
            ]
        )
        total = sum(filters for _, filters in characters.filters)
        self.highways = nnx.List([_Highway(total, dtype=dtype, rngs=rngs) for _ in range(characters.highways)])
        # bilm-tf skips the projection where the filters already have the output width.
        same = total == config.width
        self.projection = None if same else _Affine(total, config.width, total**-0.5, 0.0, dtype=dtype, rngs=rngs)
        self.activation, self.dtype, self.width = characters.activation, dtype, config.width

    def __call__(self, ids: jax.Array) -> jax.Array:
        shape = ids.shape[:-1]
        flat_NxM = ids.reshape(-1, ids.shape[-1])
        table = jnp.pad(self.table[...], ((1, 0), (0, 0))).astype(self.dtype)
        x_NxMxD = jnp.take(table, flat_NxM, axis=0, mode="clip")
        pooled = []
        for convolution in self.convolutions:
            y_NxMxF = jax.lax.conv_general_dilated(
                x_NxMxD,
                convolution.kernel[...].astype(self.dtype),
                window_strides=(1,),
                padding="VALID",
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
            # Max first, then bias and activation: both are monotone, and it is fifty times less work.
            best_NxF = jnp.max(y_NxMxF, axis=1) + convolution.bias[...].astype(self.dtype)[None]
            pooled.append(ACTIVATIONS[self.activation](best_NxF))
        x = jnp.concatenate(pooled, axis=-1)
        for highway in self.highways:
            x = highway(x)
        if self.projection is not None:
            x = self.projection(x)
        return x.reshape(*shape, self.width)
