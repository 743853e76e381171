"""THE step: one pure function for every architecture, objective, task and mesh. It imports neither models nor data."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that training carries from step to step, and all that a checkpoint holds.

    step: int32 scalar, steps taken; params: nested dict of float32 arrays; opt: optax state; carry: the model's states,
    rows first, {} for models without; skipped: int32 [2], steps skipped for non-finite gradients (in all, in a row).
    """

    step: jax.Array
    params: Any
    opt: Any
    carry: Any
    skipped: jax.Array


def new_state(params, optimizer: optax.GradientTransformation, carry) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry, jnp.zeros((2,), jnp.int32))


def _strided(tree, n: int, together: int = 1):
    """[B, ...] -> [n, B / n, ...]: microbatch i holds rows i, i + n, ..., so every device keeps its own rows.

    together: rows that stay side by side, those of one example; the stride is then over examples.
    """

    def split(x):
        examples = x.reshape(-1, n, together, *x.shape[1:])
        return jnp.swapaxes(examples, 0, 1).reshape(n, -1, *x.shape[1:])

    return jax.tree.map(split, tree)


def _unstrided(tree, together: int = 1):
    def join(x):
        examples = x.reshape(x.shape[0], -1, together, *x.shape[2:])
        return jnp.swapaxes(examples, 0, 1).reshape(-1, *x.shape[2:])

    return jax.tree.map(join, tree)


def _means(sums: Mapping, weights: Mapping) -> dict:
    return {name: sums[name] / jnp.where(weights[name] > 0, weights[name], 1.0) for name in sums}


def _sums(model, objectives: Sequence, outputs: Mapping, batch: Mapping, key) -> dict:
    sums = {}
    for objective in objectives:
        sums |= objective.sums(model.heads.get(objective.name), outputs, batch, key)
    return sums


def all_weights(objectives: Sequence, batch: Mapping) -> dict:
    weights = {}
    for objective in objectives:
        weights |= objective.weights(batch)
    return weights


def make_loss(bind: Callable, objectives: Sequence, coefficients: Mapping[str, float]) -> Callable:
    """`loss(params, batch, carry, key, weights) -> (value, (sums, new carry))`: what a step differentiates.

    weights: of the whole batch that this batch may be a part of, {name: float32 scalar}.
    """

    def loss(params, batch, carry, key, weights):
        model = bind(params)
        outputs, new_carry = model(batch, carry, key)
        sums = _sums(model, objectives, outputs, batch, key)
        means = _means(sums, weights)
        value = sum(factor * means[name] for name, factor in coefficients.items())
        return value, (sums, jax.lax.stop_gradient(new_carry))

    return loss


def make_train_step(
    bind: Callable,
    objectives: Sequence,
    coefficients: Mapping[str, float],
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    seed: int = 0,
    optimizer_arguments: Mapping[str, Any] | None = None,
    shardings: Any = None,
) -> "TrainStep":
    """`step(state, batch) -> (state, metrics)`, jitted, the state donated.

    bind(params) gives the model: `outputs, carry = model(batch, carry, key)` and `model.heads[objective name]`.
    objectives: see `plm.training.objectives`; coefficients: {name of a sum: its factor in the loss}.
    The weights of the whole batch are taken first, so microbatch gradients simply add and are exact. A step whose loss
    or gradient norm is not finite changes nothing but the counters: parameters, optimizer and carry stay.
    optimizer_arguments: what the optimizer's `update` takes by name; arguments of the program, as the seed is.
    shardings: of the state, pinned on the way out (None on one device).
    metrics: float32 scalars: loss, gradient_norm, skipped, skipped_in_a_row, and the mean of every name.
    """

    loss = make_loss(bind, objectives, coefficients)
    gradient = jax.value_and_grad(loss, has_aux=True)
    together = math.lcm(*(getattr(objective, "rows_per_example", 1) for objective in objectives))

    def step(state: TrainState, batch: dict, seed: jax.Array, optimizer_arguments: dict):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        weights = all_weights(objectives, batch)
        if microbatches == 1:
            (value, (sums, carry)), gradients = gradient(state.params, batch, state.carry, key, weights)
        else:
            shared = {"shared": batch["shared"]} if "shared" in batch else {}
            rows = _strided({k: v for k, v in batch.items() if k != "shared"}, microbatches, together)

            def accumulate(total, inputs):
                microbatch, carry = inputs
                (value, (sums, carry)), gradients = gradient(state.params, microbatch | shared, carry, key, weights)
                return jax.tree.map(jnp.add, total, (value, sums, gradients)), carry

            first = jax.eval_shape(
                lambda: gradient(
                    state.params,
                    jax.tree.map(lambda x: x[0], rows) | shared,
                    jax.tree.map(lambda x: x[0], _strided(state.carry, microbatches, together)),
                    key,
                    weights,
                )
            )
            ((value, (sums, _)), gradients) = first
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, sums, gradients))
            (value, sums, gradients), carry = jax.lax.scan(
                accumulate, zeros, (rows, _strided(state.carry, microbatches, together))
            )
            carry = _unstrided(carry, together)
        norm = optax.tree.norm(gradients)
        updates, opt = optimizer.update(gradients, state.opt, state.params, **optimizer_arguments)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        params, opt, carry = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.params, updates), opt, carry),
            (state.params, state.opt, state.carry),
        )
        bad = jnp.where(finite, 0, 1).astype(jnp.int32)
        skipped = jnp.stack([state.skipped[0] + bad, (state.skipped[1] + 1) * bad])
        metrics = {
            "loss": value,
            "gradient_norm": norm,
            "skipped": skipped[0],
            "skipped_in_a_row": skipped[1],
            **_means(sums, weights),
        }
        return TrainState(state.step + 1, params, opt, carry, skipped), metrics

    jitted = jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
    return TrainStep(jitted, (np.uint32(seed % 2**32), dict(optimizer_arguments or {})))


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """`step(state, batch) -> (state, metrics)`. Seed and numbers of the schedule are arguments of the program and no
    part of it, so that the seeds, rates and durations of a sweep share a compiled one."""

    jitted: Any
    of_run: tuple

    def __call__(self, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        return self.jitted(state, batch, *self.of_run)

    def lower(self, state, batch):
        """As of a jitted function."""
        return self.jitted.lower(state, batch, *self.of_run)


def make_eval_step(bind: Callable, objectives: Sequence, *, everywhere: Any = None) -> Callable:
    """`eval_step(params, carry, batch) -> (sums, predictions, carry)`, jitted; no dropout.

    sums: {name: (sum, weight)}, to be added over batches in float64 on the host; predictions: {objective: array} of
    those that predict something of each example, placed as `everywhere` says: whole on every process.
    """
    predicting = [objective for objective in objectives if hasattr(objective, "predictions")]

    def step(params, carry, batch):
        model = bind(params)
        outputs, carry = model(batch, carry)
        sums, weights = _sums(model, objectives, outputs, batch, None), all_weights(objectives, batch)
        predictions = {o.name: o.predictions(model.heads[o.name], outputs, batch) for o in predicting}
        return {name: (sums[name], weights[name]) for name in sums}, predictions, carry

    return jax.jit(step, donate_argnums=1, out_shardings=(None, everywhere, None))
