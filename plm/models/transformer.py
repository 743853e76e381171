"""The attention block that GPT and BERT share: post-LayerNorm, exactly as both papers' code has it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from plm.models.layers import ACTIVATIONS, Dense, LayerNorm, Noise, dropout

MASKED_SCORE = -1e9  # exp() of it is exactly 0 in float32: the papers' -1e9 and -10000 give the same probabilities


class Attention(nnx.Module):
    """Multi-head self-attention; softmax in float32; dropout on the probabilities.

    past: {"key", "value"} [B, S, H, D] of S places before these T tokens, or None. Returns (output [B, T, W], {"key",
    "value"} [B, T, H, D] of these tokens). The mask's last axis is S + T then, the past first.
    """

    def __init__(self, config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def dense():
            return Dense(config.width, config.width, config.init, config.init_stddev, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value, self.output = dense(), dense(), dense(), dense()
        self.heads = config.heads
        self.rate = config.attention_dropout

    def __call__(self, x_BxTxW: jax.Array, mask: jax.Array | None, noise: Noise | None, past: dict | None = None):
        B, T, W = x_BxTxW.shape
        heads = (B, T, self.heads, W // self.heads)
        q_BxTxHxD = self.query(x_BxTxW).reshape(heads) * jnp.asarray(1.0 / math.sqrt(W // self.heads), x_BxTxW.dtype)
        k_BxTxHxD = self.key(x_BxTxW).reshape(heads)
        v_BxTxHxD = self.value(x_BxTxW).reshape(heads)
        s_BxHxTxT = jnp.einsum("bqhd,bkhd->bhqk", q_BxTxHxD, k_BxTxHxD, preferred_element_type=jnp.float32)
        if past is not None:
            # The past stays where it is: joining it with the new keys would copy it in every layer for every token.
            s_past = jnp.einsum("bqhd,bkhd->bhqk", q_BxTxHxD, past["key"], preferred_element_type=jnp.float32)
            s_BxHxTxT = jnp.concatenate([s_past, s_BxHxTxT], axis=-1)
        if mask is not None:
            s_BxHxTxT = jnp.where(mask[:, None], s_BxHxTxT, MASKED_SCORE)
        p_BxHxTxT = jax.nn.softmax(s_BxHxTxT, axis=-1).astype(x_BxTxW.dtype)
        p_BxHxTxT = dropout(p_BxHxTxT, self.rate, noise, "attention/probabilities")
        if past is None:
            o_BxTxHxD = jnp.einsum("bhqk,bkhd->bqhd", p_BxHxTxT, v_BxTxHxD)
        else:
            p_past, p_new = jnp.split(p_BxHxTxT, [past["key"].shape[1]], axis=-1)
            o_BxTxHxD = jnp.einsum("bhqk,bkhd->bqhd", p_past, past["value"])
            o_BxTxHxD = o_BxTxHxD + jnp.einsum("bhqk,bkhd->bqhd", p_new, v_BxTxHxD)
        return self.output(o_BxTxHxD.reshape(B, T, W)), {"key": k_BxTxHxD, "value": v_BxTxHxD}


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
        """x [B, T, W], mask bool [B or 1, T, T] (query, key) or None. state: keys and values of what was read before,
        see `Attention`; returned are those of x, or None where there was none."""
        attended, new = self.attention(x, mask, noise, state)
        n = self.attention_norm(x + dropout(attended, self.rate, noise, "attention/output"))
        y = self.mlp_norm(n + dropout(self.mlp(n), self.rate, noise, "mlp/output"))
        return y, None if state is None else new


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


def continued_mask(start: jax.Array, S: int, T: int) -> jax.Array:
    """bool [B, T, S + T]: T tokens behind `start` [B] filled places of S; each sees those and up to itself."""
    past = jnp.arange(S)[None, None, :] < start[:, None, None]
    new = jnp.tril(jnp.ones((1, T, T), bool))
    B = start.shape[0]
    return jnp.concatenate([jnp.broadcast_to(past, (B, T, S)), jnp.broadcast_to(new, (B, T, T))], axis=-1)
