"""The attention block that GPT and BERT share: post-LayerNorm, exactly as both papers' code has it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from plm.models.layers import ACTIVATIONS, Dense, LayerNorm, Noise, dropout

MASKED_SCORE = -1e9  # exp() of it is exactly 0 in float32: the papers' -1e9 and -10000 give the same probabilities


class Attention(nnx.Module):
    """Multi-head self-attention; softmax in float32; dropout on the probabilities."""

    def __init__(self, config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def dense():
            return Dense(config.width, config.width, config.init, config.init_stddev, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value, self.output = dense(), dense(), dense(), dense()
        self.heads = config.heads
        self.rate = config.attention_dropout

    def __call__(self, x_BxTxW: jax.Array, mask_BxTxT: jax.Array | None, noise: Noise | None) -> jax.Array:
        B, T, W = x_BxTxW.shape
        heads = (B, T, self.heads, W // self.heads)
        q_BxTxHxD = self.query(x_BxTxW).reshape(heads) * jnp.asarray(1.0 / math.sqrt(W // self.heads), x_BxTxW.dtype)
        k_BxTxHxD = self.key(x_BxTxW).reshape(heads)
        v_BxTxHxD = self.value(x_BxTxW).reshape(heads)
        s_BxHxTxT = jnp.einsum("bqhd,bkhd->bhqk", q_BxTxHxD, k_BxTxHxD, preferred_element_type=jnp.float32)
        if mask_BxTxT is not None:
            s_BxHxTxT = jnp.where(mask_BxTxT[:, None], s_BxHxTxT, MASKED_SCORE)
        p_BxHxTxT = jax.nn.softmax(s_BxHxTxT, axis=-1).astype(x_BxTxW.dtype)
        p_BxHxTxT = dropout(p_BxHxTxT, self.rate, noise, "attention/probabilities")
        return self.output(jnp.einsum("bhqk,bkhd->bqhd", p_BxHxTxT, v_BxTxHxD).reshape(B, T, W))


class Mlp(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(self, config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = Dense(config.width, config.mlp_width, config.init, config.init_stddev, dtype=dtype, rngs=rngs)
        self.down = Dense(config.mlp_width, config.width, config.init, config.init_stddev, dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class TransformerBlock(nnx.Module):
    """n = LN(x + dropout(attention(x))); y = LN(n + dropout(mlp(n))): GPT section 4.1, BERT section 3."""

    def __init__(self, config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(config.width, config.norm_epsilon, rngs=rngs)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, config.norm_epsilon, rngs=rngs)
        self.rate = config.dropout

    def __call__(self, x, state, layer, noise: Noise | None, *, mask):
        """x [B, T, W], mask bool [B or 1, T, T] (query, key) or None; `state` is unused and returned as it came."""
        attended = dropout(self.attention(x, mask, noise), self.rate, noise, "attention/output")
        n = self.attention_norm(x + attended)
        return self.mlp_norm(n + dropout(self.mlp(n), self.rate, noise, "mlp/output")), state


def attention_mask(length: jax.Array | None, T: int, causal: bool) -> jax.Array | None:
    """bool [B or 1, T, T], True where query row may see key column; None where everything sees everything.

    length: int32 [B] valid positions, or None for full rows. Keys at or beyond the length are hidden; queries there
    still produce values, which no loss reads.
    """
    mask = None
    if causal:
        mask = jnp.tril(jnp.ones((1, T, T), bool))
    if length is not None:
        keys = (jnp.arange(T)[None, :] < length[:, None])[:, None, :]
        mask = keys & (mask if mask is not None else jnp.ones((1, T, 1), bool))
    return mask
