"""From hidden vectors to losses over the vocabulary, without ever holding all logits; and next-sentence prediction."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plm.models.layers import ACTIVATIONS, Dense, LayerNorm, Table

HIDDEN_LOGIT = -1e30  # logit of padding rows of a table and of accidental hits


def _chunks(B: int, T: int, chunk: int) -> int:
    """Number of equal parts of T such that a part holds about `chunk` of the B x T tokens at most (0 = one part)."""
    if not chunk or chunk >= B * T:
        return 1
    return next(n for n in range(-(-B * T // chunk), T + 1) if T % n == 0) if chunk >= B else T


def _logits(x_NxW, table_VxW, bias_V):
    return jnp.einsum("nw,vw->nv", x_NxW, table_VxW, preferred_element_type=jnp.float32) + bias_V[None]


def _chunk_sums(logits_NxV, targets_N, weights_N):
    """Weighted sums of the negative log-likelihood and of top-1 hits, and what the gradient needs."""
    top_N = jnp.max(logits_NxV, axis=-1)
    log_total_N = top_N + jnp.log(jnp.sum(jnp.exp(logits_NxV - top_N[:, None]), axis=-1))
    target_N = jnp.take_along_axis(logits_NxV, targets_N[:, None], axis=-1)[:, 0]
    nll = jnp.sum(weights_N * (log_total_N - target_N))
    hits = jnp.sum(weights_N * (target_N >= top_N))
    return nll, hits, log_total_N


def _slice(x, index, n):
    """Part `index` of `n` along axis 1 of [B, T, ...], flattened to [B T / n, ...]."""
    width = x.shape[1] // n
    part = jax.lax.dynamic_slice_in_dim(x, index * width, width, axis=1)
    return part.reshape(-1, *x.shape[2:])


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def vocabulary_nll(x_BxTxW, table_VxW, bias_V, targets_BxT, weights_BxT, chunk):
    """Weighted sums over [B, T] of -log softmax(x table^T + bias)[target] and of top-1 hits, both float32 scalars.

    The softmax runs in float32 over chunks of about `chunk` tokens, cut along T (0 = all at once). Where a gradient is
    wanted it is made chunk by chunk in the forward pass, while the logits are there: no logits outlive their turn and
    none is computed twice. The weights and the hits have no gradient.
    """
    n = _chunks(*targets_BxT.shape, chunk)

    def body(sums, index):
        x, targets, weights = (_slice(a, index, n) for a in (x_BxTxW, targets_BxT, weights_BxT))
        nll, hits, _ = _chunk_sums(_logits(x, table_VxW, bias_V), targets, weights)
        return (sums[0] + nll, sums[1] + hits), None

    zero = jnp.zeros((), jnp.float32)
    if n == 1:
        return body((zero, zero), 0)[0]
    return jax.lax.scan(body, (zero, zero), jnp.arange(n))[0]


def _vocabulary_nll_forward(x_BxTxW, table_VxW, bias_V, targets_BxT, weights_BxT, chunk):
    B, T = targets_BxT.shape
    n = _chunks(B, T, chunk)

    def body(sums, index):
        x, targets, weights = (_slice(a, index, n) for a in (x_BxTxW, targets_BxT, weights_BxT))
        logits = _logits(x, table_VxW, bias_V)
        nll, hits, log_total = _chunk_sums(logits, targets, weights)
        is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]
        d_logits = (jnp.exp(logits - log_total[:, None]) - is_target) * weights[:, None]
        low = d_logits.astype(x.dtype)
        d_x = jnp.einsum("nv,vw->nw", low, table_VxW, preferred_element_type=jnp.float32).astype(x.dtype)
        # Width first: XLA's CPU product is twice as fast with the short side of its result in front (measured).
        d_table = jnp.einsum("nw,nv->wv", x, low, preferred_element_type=jnp.float32)
        new = (nll, hits, d_table, jnp.sum(d_logits, axis=0))
        return (new if sums is None else jax.tree.map(jnp.add, sums, new)), d_x.reshape(B, T // n, -1)

    if n == 1:
        (nll, hits, d_table, d_bias), d_x = body(None, 0)
    else:
        zero = jnp.zeros((), jnp.float32)
        sums = (zero, zero, jnp.zeros(table_VxW.shape[::-1], jnp.float32), jnp.zeros(bias_V.shape, jnp.float32))
        (nll, hits, d_table, d_bias), d_x = jax.lax.scan(body, sums, jnp.arange(n))
        d_x = jnp.moveaxis(d_x, 0, 1).reshape(x_BxTxW.shape)
    # Without the barrier the transposition would be folded into the product again.
    return (nll, hits), (d_x, jax.lax.optimization_barrier(d_table).T.astype(table_VxW.dtype), d_bias)


def _vocabulary_nll_backward(chunk, kept, cotangents):
    d_x, d_table, d_bias = kept
    scale = cotangents[0]
    return (
        d_x * scale.astype(d_x.dtype),
        d_table * scale.astype(d_table.dtype),
        d_bias * scale.astype(d_bias.dtype),
        None,
        None,
    )


vocabulary_nll.defvjp(_vocabulary_nll_forward, _vocabulary_nll_backward)


def log_uniform_expected(ids, size: int, tries):
    """log of the expected count of `ids` among the unique negatives of `tries` draws: log(1 - (1 - p)^tries).

    p(k) = log((k + 2) / (k + 1)) / log(size + 1), TensorFlow's log-uniform sampler; ids must be in order of falling
    frequency.
    """
    rank = ids.astype(jnp.float32)
    p = jnp.log1p(1.0 / (rank + 1.0)) / math.log(size + 1)
    return jnp.log(-jnp.expm1(tries.astype(jnp.float32) * jnp.log1p(-p)))


def sampled_nll(x_BxTxW, table_VxW, bias_V, targets_BxT, weights_BxT, negatives_K, tries, size: int):
    """As `vocabulary_nll`, under a softmax over the target and `negatives_K` shared by the batch (Jean et al. 2015).

    negatives_K: int32 unique ids; tries: int32 scalar, the draws that it took to find them. Accidental hits are
    removed and logits are corrected by the log of the expected counts. `size` is the unpadded vocabulary.
    """
    x = x_BxTxW
    sampled_KxW = jnp.take(table_VxW, negatives_K, axis=0)
    logits_BxTxK = jnp.einsum("btw,kw->btk", x, sampled_KxW, preferred_element_type=jnp.float32)
    correction_K = jnp.take(bias_V, negatives_K) - log_uniform_expected(negatives_K, size, tries)
    logits_BxTxK = logits_BxTxK + correction_K[None, None]
    hit = targets_BxT[..., None] == negatives_K[None, None]
    logits_BxTxK = jnp.where(hit, HIDDEN_LOGIT, logits_BxTxK)
    target_rows = jnp.take(table_VxW, targets_BxT, axis=0)
    true_BxT = jnp.einsum("btw,btw->bt", x, target_rows, preferred_element_type=jnp.float32)
    true_BxT = true_BxT + jnp.take(bias_V, targets_BxT) - log_uniform_expected(targets_BxT, size, tries)
    log_total = jax.nn.logsumexp(jnp.concatenate([true_BxT[..., None], logits_BxTxK], axis=-1), axis=-1)
    nll = jnp.sum(weights_BxT * (log_total - true_BxT))
    hits = jnp.sum(weights_BxT * (true_BxT >= jnp.max(logits_BxTxK, axis=-1)))
    return nll, jax.lax.stop_gradient(hits)


class VocabularyHead(nnx.Module):
    """Scores over the vocabulary from hidden vectors [B, T, W].

    `table` is the input table where tied (a shared module, one parameter) or a table of its own; `bias` [V padded] and
    BERT's transform (dense, activation, LayerNorm) by config. Padding rows of the table score `HIDDEN_LOGIT`.
    """

    def __init__(self, config, table: Table | None, size: int, width: int, multiple: int, chunk: int, *, dtype, rngs):
        if table is None:
            # ELMo's softmax: N(0, 1 / sqrt(width)), whatever the other tables' initial values.
            table = Table(size, width, "normal", width**-0.5, multiple=multiple, rngs=rngs)
        self.table = table
        bias = config.head_bias
        self.bias = nnx.Param(jnp.zeros(table.table.shape[:1]), real_rows=size) if bias else None
        transform = config.head_transform
        self.transform = (
            Dense(width, width, config.init, config.init_stddev, dtype=dtype, rngs=rngs) if transform else None
        )
        self.norm = LayerNorm(width, config.norm_epsilon, rngs=rngs) if transform else None
        self.activation, self.size, self.chunk, self.dtype = config.activation, size, chunk, dtype

    def features(self, x: jax.Array) -> jax.Array:
        """What the table is multiplied with: BERT's transform of x, or x."""
        if self.transform is None:
            return x
        return self.norm(ACTIVATIONS[self.activation](self.transform(x)))

    def parameters(self, table: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(table in the compute type [V padded, W], bias float32 [V padded] that hides padding rows).

        `table` replaces the stored one, for GPT's dropped embedding matrix; rows of it behind the stored ones are
        further classes, without a bias: GPT's positions.
        """
        stored = self.table.table[...]
        table = stored if table is None else table
        bias = jnp.zeros(stored.shape[:1]) if self.bias is None else self.bias[...]
        row, more = jnp.arange(table.shape[0]), table.shape[0] - stored.shape[0]
        is_class = (row < self.size) | (row >= stored.shape[0])
        return table.astype(self.dtype), jnp.where(is_class, jnp.pad(bias, (0, more)), HIDDEN_LOGIT)

    def logits(self, x: jax.Array) -> jax.Array:
        """All scores, float32 [B, T, size]: for generation and filling, not for training."""
        scores = _logits(self.features(x).reshape(-1, x.shape[-1]), *self.parameters())
        return scores.reshape(*x.shape[:-1], -1)[..., : self.size]

    def nll(self, x, targets, weights, *, table=None, shared: dict | None = None):
        """(sum of weighted nll, sum of weighted top-1 hits); the sampled softmax if `shared` holds negatives."""
        rows, bias = self.parameters(table)
        x = self.features(x).astype(self.dtype)
        if shared and "negatives" in shared:
            return sampled_nll(x, rows, bias, targets, weights, shared["negatives"], shared["tries"], self.size)
        return vocabulary_nll(x, rows, bias, targets, weights, self.chunk)


class NextSentenceHead(nnx.Module):
    """BERT's pooler (dense + tanh on the first position) and the two-way output; label 0 = B really follows A."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.pooler = Dense(config.width, config.width, config.init, config.init_stddev, dtype=dtype, rngs=rngs)
        self.output = Dense(config.width, 2, config.init, config.init_stddev, dtype=dtype, rngs=rngs)

    def logits(self, x_BxTxW: jax.Array) -> jax.Array:
        """float32 [B, 2]."""
        return self.output(jnp.tanh(self.pooler(x_BxTxW[:, 0]))).astype(jnp.float32)


def log_uniform_probabilities(size: int) -> np.ndarray:
    """float64 [size]: TensorFlow's log-uniform (Zipf) distribution over ranks."""
    rank = np.arange(size, dtype=np.float64)
    return np.log1p(1.0 / (rank + 1.0)) / math.log(size + 1)
