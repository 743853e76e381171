"""ELMo's mix of a language model's layers into one vector a token (ELMo section 3.2, equation 1)."""

import jax
import jax.numpy as jnp
from flax import nnx

VARIANCE_EPSILON = 1e-12  # bilm-tf; AllenNLP's 1e-13 differs in no digit of float32 at any variance that occurs


def normalize_layer(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """One mean and one variance over all positions and features of a batch, without gain and bias.

    x [..., features]; mask: bool [...], positions that count (None = all). bilm-tf counts the tokens without the
    sentence markers, AllenNLP with them: the mask says which. Positions that do not count are normalised too.
    """
    x = x.astype(jnp.float32)
    counts = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
    number = jnp.maximum(jnp.sum(counts) * x.shape[-1], 1.0)
    mean = jnp.sum(x * counts[..., None]) / number
    variance = jnp.sum(jnp.square(x - mean) * counts[..., None]) / number
    return (x - mean) * jax.lax.rsqrt(variance + VARIANCE_EPSILON)


def mix(
    layers: jax.Array, weights: jax.Array, gamma: jax.Array | float, mask: jax.Array | None, *, layer_norm: bool = False
) -> jax.Array:
    """gamma x sum over layers of softmax(weights) x layer, float32 [B, T, features]; 0 where the mask is False.

    layers [L, B, T, features], the token vectors first (`outputs["layers"]` of a model); weights [L], before the
    softmax, so that adding a constant to all of them (bilm-tf adds 1 / L) changes nothing; gamma: a scalar; mask: bool
    [B, T], None for all; layer_norm: each layer through `normalize_layer` first. Both kinds are published. One layer
    alone, `layers[-1:]`, is bilm-tf's "top only".
    """
    shares = jax.nn.softmax(weights.astype(jnp.float32))
    if layer_norm:
        layers = jax.vmap(lambda layer: normalize_layer(layer, mask))(layers)
    mixed = gamma * jnp.einsum("l,lbtf->btf", shares, layers.astype(jnp.float32))
    return mixed if mask is None else jnp.where(mask[..., None], mixed, 0.0)


class ScalarMix(nnx.Module):
    """`mix` with learned weights [L], from 0, and gamma, from 1 (fixed there without `gamma`): a task's own, one for
    each place of insertion."""

    def __init__(self, n_layers: int, layer_norm: bool = False, gamma: bool = True):
        self.weights = nnx.Param(jnp.zeros(n_layers))
        self.gamma = nnx.Param(jnp.ones(())) if gamma else None
        self.layer_norm = layer_norm

    def __call__(self, layers: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[L, B, T, features], bool [B, T] -> [B, T, features]."""
        gamma = 1.0 if self.gamma is None else self.gamma[...]
        return mix(layers, self.weights[...], gamma, mask, layer_norm=self.layer_norm)
