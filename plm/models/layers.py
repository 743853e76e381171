"""What all models share: named noise, parameter names, tables, norms, dense layers and stacks of blocks.

Modules describe parameters and mathematics with `flax.nnx`; the transforms around them are plain JAX. Two names of a
parameter: the *stored* path `blocks/stacked/attention/query/kernel`, whose array has a leading layer axis, and its
*logical* names `blocks/0/attention/query/kernel`, `blocks/1/...`, one for each layer. Everything that people write
(regex tables, reports) speaks logical names.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from plm.randomness import stable_hash

STACKED = "stacked"
ROW_AXES = ("data", "fsdp")


def logical_names(stored_path: str, n_layers: int) -> list[str]:
    """The logical names of a stored path: one for each layer below a `stacked` component, else the path itself."""
    parts = stored_path.split("/")
    if STACKED not in parts:
        return [stored_path]
    at = parts.index(STACKED)
    return ["/".join([*parts[:at], str(layer), *parts[at + 1 :]]) for layer in range(n_layers)]


def constrain_rows(x: jax.Array) -> jax.Array:
    """Pins axis 0 of an activation to the mesh's row axes and leaves the others whole.

    Without such constraints at block borders the TPU compiler replicates batch-sized buffers. Outside a mesh (single
    device, inference) this does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(axis not in mesh.axis_names for axis in ROW_AXES):
        return x
    shards = mesh.shape[ROW_AXES[0]] * mesh.shape[ROW_AXES[1]]
    if shards == 1 or x.shape[0] % shards:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES, *[None] * (x.ndim - 1)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """Dropout noise as a function of (seed, step, name, layer, global row), on any mesh and in any microbatch.

    key: the key of (seed, step), folded with every name and layer on the way down; rows: int32 [B], the global row of
    each row of the arrays that it is applied to.
    """

    key: jax.Array
    rows: jax.Array

    def named(self, name: str) -> "Noise":
        return Noise(jax.random.fold_in(self.key, stable_hash(name)), self.rows)

    def layer(self, index: jax.Array | int) -> "Noise":
        return Noise(jax.random.fold_in(self.key, index), self.rows)


def _keep_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Bernoulli(1 - rate) as bool `shape`, from 16 random bits an element (the rate is met to within 1 / 65,536)."""
    size = 1
    for length in shape:
        size *= length
    words = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
    return (halves >= jnp.uint16(round(rate * 65536))).reshape(shape)


def dropout(x: jax.Array, rate: float, noise: Noise | None, name: str) -> jax.Array:
    """Drops elements of `x` [B, ...] and scales the rest by 1 / (1 - rate); without noise or rate `x` itself."""
    if noise is None or rate == 0.0:
        return x
    noise = noise.named(name)
    keys = jax.vmap(lambda row: jax.random.fold_in(noise.key, row))(noise.rows)
    keep = jax.vmap(lambda key: _keep_mask(key, x.shape[1:], rate))(keys)
    # In float32: rounded to bfloat16 the factor itself would be off, by 0.2% at a rate of 0.1, the same way each time.
    scaled = x.astype(jnp.float32) * (1.0 / (1.0 - rate))
    return jnp.where(keep, scaled.astype(x.dtype), jnp.zeros((), x.dtype))


def dropout_parameter(parameter: jax.Array, rate: float, noise: Noise | None, name: str) -> jax.Array:
    """Dropout on a parameter: one mask for the whole batch, so the row takes no part in it."""
    if noise is None or rate == 0.0:
        return parameter
    keep = _keep_mask(noise.named(name).key, parameter.shape, rate)
    return jnp.where(keep, parameter / (1.0 - rate), 0.0)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


def weight_initializer(kind: str, stddev: float) -> nnx.initializers.Initializer:
    """Initializer of matrices and tables.

    normal: N(0, stddev), GPT and Hugging Face; truncated_normal: redrawn beyond two sigma with no correction of the
    variance, as TensorFlow's and BERT's; fan_in: N(0, 1 / fan_in) for a matrix and N(0, 1 / width) for a table, which
    narrow models need to leave the unigram (the tiny presets).
    """
    if kind == "normal":
        return nnx.initializers.normal(stddev)
    if kind == "truncated_normal":
        return lambda key, shape, dtype=jnp.float32: (
            jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) * jnp.asarray(stddev, dtype)
        )
    if kind == "fan_in":
        return nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    raise ValueError(f"unknown initializer {kind!r}")


class Table(nnx.Module):
    """Rows of an embedding, stored padded to a multiple; padding rows are zero, never read and never counted.

    `table` float32 [ceil(size / multiple) * multiple, width]; metadata `real_rows` = size.
    """

    def __init__(self, size: int, width: int, init: str, stddev: float, *, multiple: int = 1, rngs: nnx.Rngs):
        padded = -(-size // multiple) * multiple
        initializer = nnx.initializers.normal(width**-0.5) if init == "fan_in" else weight_initializer(init, stddev)
        rows = initializer(rngs.params(), (size, width), jnp.float32)
        self.table = nnx.Param(jnp.pad(rows, ((0, padded - size), (0, 0))), real_rows=size)
        self.size = size

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of `ids` [...] -> [..., width]."""
        return jnp.take(self.table[...], ids, axis=0, mode="clip").astype(dtype)


class Dense(nnx.Linear):
    """x @ kernel + bias in the compute type, parameters in float32."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        init: str,
        stddev: float,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        bias: bool = True,
    ):
        super().__init__(
            inputs,
            outputs,
            use_bias=bias,
            kernel_init=weight_initializer(init, stddev),
            dtype=dtype,
            param_dtype=jnp.float32,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] -> [..., outputs]. The product is over a matrix of rows: with more leading axes XLA's CPU
        compiler transposes the activations once more for the kernel's gradient (measured: 1.4 times the time)."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm computed in float32 whatever the compute type, with the two-pass variance; returns the input's type."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        super().__init__(
            width, epsilon=epsilon, dtype=jnp.float32, param_dtype=jnp.float32, use_fast_variance=False, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


class Stack(nnx.Module):
    """Blocks of one kind with their parameters stacked along a leading layer axis, run by `jax.lax.scan`.

    `make(rngs)` builds one block; `block(x, state, layer, noise) -> (y, state)`. `states` and `outputs` have a leading
    layer axis. `unroll` only unrolls the scan and `remat` only recomputes: neither changes what is stored.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], n_layers: int, *, rngs: nnx.Rngs):
        base = rngs.params()
        keys = jax.vmap(lambda layer: jax.random.fold_in(base, layer))(jnp.arange(n_layers))
        parameters = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key)), nnx.Param))(keys)
        self.stacked = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0)))), parameters)
        self.n_layers = n_layers

    def __call__(
        self,
        x: jax.Array,
        states,
        noise: Noise | None,
        *,
        remat: bool,
        unroll: bool,
        collect: bool = False,
        **inputs,
    ):
        """Returns (x after the last block, new states, outputs of every block [L, ...] if `collect` else None)."""
        graph, parameters = nnx.split(self.stacked)

        def body(x, layer_inputs):
            block_parameters, state, layer = layer_inputs
            block_noise = None if noise is None else noise.layer(layer)
            y, state = nnx.merge(graph, block_parameters)(x, state, layer, block_noise, **inputs)
            y = constrain_rows(y)
            return y, (state, y if collect else None)

        if remat:
            # Inside a scan the usual guard against common-subexpression elimination is not needed and costs time.
            body = jax.checkpoint(body, prevent_cse=unroll)
        layers = jnp.arange(self.n_layers)
        x, (states, outputs) = jax.lax.scan(
            body, constrain_rows(x), (parameters, states, layers), unroll=self.n_layers if unroll else 1
        )
        return x, states, outputs
