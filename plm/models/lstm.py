"""ELMo's projected LSTM with both clips, and the stack of it that serves ELMo and the LSTM ablations.

Equations: papers' reference implementation (bilm-tf `LSTMCell` with projection, cell clip and projection clip); gate
order input, candidate, forget, output; 1.0 is added to the forget gate at run time and is not part of the bias.

The input product x W of all times is one matrix product before the recurrence. The backward pass is written out: its
scan yields the gradients of the gates, and the gradients of the recurrent kernel and of the projection are then one
matrix product each over all times. (Differentiating the scan would add a [P, 4C] outer product at every time.)
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from plm.models.layers import Noise, dropout, weight_initializer


def _cell(z_Bx4xC: jax.Array, c_BxC: jax.Array, clip: float) -> tuple[jax.Array, jax.Array]:
    """Gates -> (output before the projection, new cell state after its clip)."""
    i, j, f, o = (z_Bx4xC[:, gate] for gate in range(4))
    c = jax.nn.sigmoid(f + 1.0) * c_BxC + jax.nn.sigmoid(i) * jnp.tanh(j)
    if clip:
        c = jnp.clip(c, -clip, clip)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _product(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """Contracts the last axis of x with `axis` of w, accumulating in float32."""
    dimensions = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x.astype(w.dtype), w, dimensions, preferred_element_type=jnp.float32)


def _forward(clips, gates_TxBx4xC, recurrent_Px4xC, projection_CxP, c_BxC, m_BxP, valid_TxB):
    cell_clip, projection_clip = clips

    def step(state, inputs):
        c, m = state
        z, valid = inputs
        z = z.astype(jnp.float32) + _product(m, recurrent_Px4xC)
        h, c_new = _cell(z, c, cell_clip)
        m_new = h if projection_CxP is None else _product(h, projection_CxP)
        if projection_clip:
            m_new = jnp.clip(m_new, -projection_clip, projection_clip)
        out = m_new
        if valid is not None:
            keep = valid[:, None]
            c_new, m_new, out = jnp.where(keep, c_new, c), jnp.where(keep, m_new, m), jnp.where(keep, out, 0.0)
        return (c_new, m_new), (out, z, c, m)

    return jax.lax.scan(step, (c_BxC, m_BxP), (gates_TxBx4xC, valid_TxB))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(clips, gates_TxBx4xC, recurrent_Px4xC, projection_CxP, c_BxC, m_BxP, valid_TxB):
    """Runs the LSTM over time.

    clips: (cell clip, projection clip), 0 for none; gates: x W + bias of all times; projection: None for an LSTM whose
    output is its cell's width; valid: bool, None for full rows; where False the state passes through and the output
    is 0. Returns (outputs float32 [T, B, P], last c float32 [B, C], last m float32 [B, P]).
    """
    (c, m), (out, *_) = _forward(clips, gates_TxBx4xC, recurrent_Px4xC, projection_CxP, c_BxC, m_BxP, valid_TxB)
    return out, c, m


def _recurrence_forward(clips, gates, recurrent, projection, c, m, valid):
    (c_last, m_last), (out, z, c_before, m_before) = _forward(clips, gates, recurrent, projection, c, m, valid)
    # The gates are kept in the compute type, as the products that made them were.
    kept = (z.astype(gates.dtype), c_before, m_before, out, recurrent, projection, valid)
    return (out, c_last, m_last), kept


def _recurrence_backward(clips, kept, cotangents):
    cell_clip, projection_clip = clips
    z, c_before, m_before, out, recurrent, projection, valid = kept
    d_out, d_c_last, d_m_last = cotangents
    # Turned once, not at every time: a twentieth of a step of the benchmark's biLM on CPU.
    turned_4xCxP = jax.lax.optimization_barrier(jnp.moveaxis(recurrent, 0, -1))

    def step(state, inputs):
        d_c, d_m = state
        d_out_t, z_t, c_t, out_t, valid_t = inputs
        d_new, d_c_new = d_out_t + d_m, d_c
        if valid_t is not None:
            keep = valid_t[:, None]
            d_new, d_c_new = jnp.where(keep, d_new, 0.0), jnp.where(keep, d_c, 0.0)
        if projection_clip:
            d_new = jnp.where(jnp.abs(out_t) < projection_clip, d_new, 0.0)
        (h, _), pull = jax.vjp(lambda z, c: _cell(z, c, cell_clip), z_t.astype(jnp.float32), c_t)
        d_h = d_new if projection is None else _product(d_new, projection, axis=1)
        d_z, d_c_before = pull((d_h, d_c_new))
        low = d_z.astype(recurrent.dtype)
        d_m_before = jax.lax.dot_general(
            low, turned_4xCxP, (((1, 2), (0, 1)), ((), ())), preferred_element_type=jnp.float32
        )
        if valid_t is not None:
            d_c_before = d_c_before + jnp.where(keep, 0.0, d_c)
            d_m_before = d_m_before + jnp.where(keep, 0.0, d_m)
        h_and_d_new = None if projection is None else (h.astype(recurrent.dtype), d_new.astype(recurrent.dtype))
        return (d_c_before, d_m_before), (low, h_and_d_new)

    (d_c, d_m), (d_z, h_and_d_new) = jax.lax.scan(
        step, (d_c_last, d_m_last), (d_out, z, c_before, out, valid), reverse=True
    )

    def over_all_times(a, b):
        # Times and rows are not merged into one axis: rows that lie on several devices would be gathered for it.
        a, b = (x.astype(recurrent.dtype) for x in (a, b))
        return jnp.einsum("tna,tnb->ab", a, b, preferred_element_type=jnp.float32).astype(recurrent.dtype)

    # Gate by gate: XLA's CPU backend has no bfloat16 product whose result has three axes.
    d_recurrent = jnp.stack([over_all_times(m_before, d_z[:, :, gate]) for gate in range(4)], axis=1)
    d_projection = None if projection is None else over_all_times(*h_and_d_new)
    return d_z.astype(z.dtype), d_recurrent, d_projection, d_c, d_m, None


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


class LstmCell(nnx.Module):
    """One direction of one layer: [B, T, inputs] -> [B, T, outputs], outputs = projection, or cells without one.

    Parameters: kernel_input [inputs, 4, C], kernel_recurrent [P, 4, C], bias [4, C], projection [C, P]. The initial
    values are Glorot-uniform over the joint [inputs + P, 4 C] kernel, TensorFlow's default that the ELMo code relies
    on, or N(0, 1 / fan_in) with init `fan_in`.
    """

    def __init__(self, inputs: int, config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        lstm = config.lstm
        cells, outputs = lstm.cells, lstm.projection or lstm.cells
        joint_shape = (inputs + outputs, 4, cells)
        if config.init == "fan_in":
            joint = (inputs + outputs) ** -0.5 * jax.random.normal(rngs.params(), joint_shape)
        else:
            limit = (6.0 / (inputs + outputs + 4 * cells)) ** 0.5
            joint = jax.random.uniform(rngs.params(), joint_shape, minval=-limit, maxval=limit)
        self.kernel_input = nnx.Param(joint[:inputs])
        self.kernel_recurrent = nnx.Param(joint[inputs:])
        self.bias = nnx.Param(jnp.zeros((4, cells)))
        glorot = nnx.initializers.glorot_uniform()
        project = weight_initializer("fan_in", 0.0) if config.init == "fan_in" else glorot
        self.projection = nnx.Param(project(rngs.params(), (cells, outputs), jnp.float32)) if lstm.projection else None
        self.clips = (lstm.cell_clip, lstm.projection_clip if lstm.projection else 0.0)
        self.cells, self.outputs, self.dtype = cells, outputs, dtype

    def __call__(self, x_BxTxI: jax.Array, state: dict | None, valid_BxT: jax.Array | None):
        """state: {"c" [B, C], "m" [B, P]} float32, None for zeros. Returns (outputs [B, T, P], last state)."""
        B = x_BxTxI.shape[0]
        if state is None:
            state = {"c": jnp.zeros((B, self.cells)), "m": jnp.zeros((B, self.outputs))}
        x_TxBxI = jnp.swapaxes(x_BxTxI, 0, 1).astype(self.dtype)
        gates = jnp.einsum("tbi,igc->tbgc", x_TxBxI, self.kernel_input[...].astype(self.dtype))
        gates = gates + self.bias[...].astype(self.dtype)[None, None]
        out_TxBxP, c, m = recurrence(
            self.clips,
            gates,
            self.kernel_recurrent[...].astype(self.dtype),
            None if self.projection is None else self.projection[...].astype(self.dtype),
            state["c"],
            state["m"],
            None if valid_BxT is None else valid_BxT.T,
        )
        return jnp.swapaxes(out_TxBxP, 0, 1).astype(self.dtype), {"c": c, "m": m}


def reverse_within(x: jax.Array, length: jax.Array | None) -> jax.Array:
    """Reverses axis 1 of `x` [B, T, ...] within each row's length (int32 [B], None for full rows); padding stays."""
    if length is None:
        return x[:, ::-1]
    T = x.shape[1]
    at = jnp.arange(T)[None, :]
    source = jnp.where(at < length[:, None], length[:, None] - 1 - at, at)
    return jnp.take_along_axis(x, source.reshape(source.shape + (1,) * (x.ndim - 2)), axis=1)


class LstmBlock(nnx.Module):
    """A layer of the stack. Dropout on its input (per step, not variational); from the second layer on the dropped
    input is added to the output (ELMo: the wrapper is outside the residual, and the first layer has none).

    direction "forward": one cell. "full": one cell in each direction, outputs concatenated, so that the next layer
    sees both sides (what a masked objective needs); no state is carried.
    """

    def __init__(self, config, direction: str, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.direction = direction
        if direction == "full":
            self.forward = LstmCell(config.width, config, dtype=dtype, rngs=rngs)
            self.backward = LstmCell(config.width, config, dtype=dtype, rngs=rngs)
        else:
            self.cell = LstmCell(config.width, config, dtype=dtype, rngs=rngs)
        self.rate, self.residual = config.dropout, config.lstm.residual

    def __call__(self, x, state, layer, noise: Noise | None, *, valid, length):
        x = dropout(x, self.rate, noise, "lstm/input")
        if self.direction == "full":
            ahead, _ = self.forward(x, None, valid)
            back, _ = self.backward(reverse_within(x, length), None, valid)
            y, new = jnp.concatenate([ahead, reverse_within(back, length)], axis=-1), state
        else:
            y, new = self.cell(x, state, valid)
            new = None if state is None else new
        if self.residual:
            y = y + jnp.where(layer > 0, x, jnp.zeros((), x.dtype)).astype(y.dtype)
        return y, new
