"""Schedules and optax chains, the papers' own update rules included.

An optimizer is one chain, in this order:

    frozen parameters' gradients -> 0           (so that they take no part in the norm)
    gradient_scale                              (ELMo multiplies the loss by its 20 unrolled steps)
    clip by global norm                         (0 = no clipping)
    the rule's direction                        (keeps float32 moments or accumulators)
    + weight_decay * decay factor * parameter   (decoupled)
    * learning-rate factor                      (0 where frozen)
    * -learning rate

The regexes of `config.decay`, `config.lr_factors` and `config.freeze` are searched (`re.search`) in *logical* names:
the stored parameter `blocks/stacked/mlp/up/kernel` answers to `blocks/0/mlp/up/kernel`, `blocks/1/...`, so that a row
may name one layer; its factors are then a vector along the stacked axis. The first row that matches wins, a parameter
that no row matches has factor 1, and a row that matches no parameter at all is refused.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from plm.errors import UserError
from plm.models.graph import import_from_outside
from plm.models.layers import logical_names
from plm.training.sharding import PyTree, paths_and_leaves

SCHEDULES = ("bert_linear", "linear", "cosine", "constant", "openai_linear", "openai_cosine")
OPTIMIZERS = ("bert_adam", "gpt_adam", "adagrad", "adamw")


def schedule(config, total_steps: int) -> Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]:
    """The learning rate as a function of the number of updates done before (0 for the first update).

    Args:
      config: `config.optimizer`: `schedule`, `peak_lr`, `warmup_steps` (W below) and `schedule_steps` are read.
      total_steps: updates in the whole run. T below is `schedule_steps`, or this if that is 0 or absent; from T on a
        decaying schedule stays at 0.

    Returns:
      A function of an integer (a NumPy or Python one gives float64 on the host, a JAX one float32 in the graph).
      In units of `peak_lr`, with a warm-up of s / W while s < W unless said otherwise:

      * `bert_linear`: 1 - s / T. The decay counts from step 0, not from the end of the warm-up, so the rate drops by
        W / T there, and the first update has rate 0 (google-research/bert, optimization.py).
      * `linear`: (T - s) / (T - W).
      * `cosine`: (1 + cos(pi (s - W) / (T - W))) / 2 (GPT section 4.1).
      * `constant`: 1 (ELMo).
      * `openai_linear`, `openai_cosine`: the helpers of GPT's fine-tuning code, whose decay counts from step 0 too:
        warm-up * (1 - s / T) throughout, and (1 + cos(pi s / T)) / 2 after the warm-up.

    Raises:
      UserError: an unknown schedule.
    """
    kind = config.schedule
    if kind not in SCHEDULES:
        raise UserError(f"optimizer.schedule={kind!r} is unknown; it is one of {', '.join(SCHEDULES)}")
    return functools.partial(_learning_rate, kind, schedule_numbers(config, total_steps))


class ScheduleNumbers(NamedTuple):
    """What a schedule has beside its kind: float32 scalars in a compiled step, whose arguments they are, so that runs
    that differ in nothing else share a program; Python's numbers on the host. span: updates between warm-up and end."""

    peak: Any
    warmup: Any
    total: Any
    span: Any

    def on_device(self) -> "ScheduleNumbers":
        return ScheduleNumbers(*map(np.float32, self))


def schedule_numbers(config, total_steps: int) -> ScheduleNumbers:
    """Arguments: as for `schedule`."""
    warmup = int(config.warmup_steps)
    total = int(getattr(config, "schedule_steps", 0) or total_steps)
    return ScheduleNumbers(float(config.peak_lr), warmup, max(total, 1), max(total - warmup, 1))


def _learning_rate(kind: str, numbers: ScheduleNumbers, step):
    xp = jnp if isinstance(step, jax.Array) else np
    step = xp.asarray(step, xp.float32 if xp is jnp else xp.float64)
    peak, warmup, total, span = numbers
    done = xp.minimum(step / total, 1.0)
    after = xp.clip((step - warmup) / span, 0.0, 1.0)
    ramp = step / xp.maximum(warmup, 1)
    if kind == "openai_linear":
        return peak * xp.where(step < warmup, ramp, 1.0) * (1.0 - done)
    decayed = {
        "bert_linear": lambda: 1.0 - done,
        "linear": lambda: 1.0 - after,
        "cosine": lambda: 0.5 * (1.0 + xp.cos(math.pi * after)),
        "constant": lambda: xp.ones_like(step),
        "openai_cosine": lambda: 0.5 * (1.0 + xp.cos(math.pi * done)),
    }[kind]()
    return peak * xp.where(step < warmup, ramp, decayed)


def learning_rate_at(config, total_steps: int, updates: int) -> float:
    """The learning rate of the update that follows `updates` applied ones, for logs; touches no device."""
    return float(schedule(config, total_steps)(int(updates)))


class MomentsState(NamedTuple):
    """First and second moment, each float32 and shaped as the parameters."""

    mu: PyTree
    nu: PyTree


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps) with no bias correction: the direction of BERT's AdamWeightDecay and of GPT's Adam.

    GPT's code corrects through the learning rate (`eps` is then Kingma & Ba's epsilon-hat); BERT's does not correct.
    """

    def init(params):
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)  # noqa: E731
        return MomentsState(zeros(), zeros())

    def update(gradients, state, params=None):
        del params
        mu = jax.tree.map(lambda g, m: b1 * m + (1.0 - b1) * g, gradients, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1.0 - b2) * g * g, gradients, state.nu)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), MomentsState(mu, nu)

    return optax.GradientTransformation(init, update)


def bias_correction(b1: float, b2: float) -> Callable[[jax.Array], jax.Array]:
    """sqrt(1 - b2^t) / (1 - b1^t) for t = updates done before + 1, to float32 accuracy at t = 1 too."""

    def one_minus_power(b, t):
        # 1 - b**t in float32 loses 5e-5 at b = 0.999 and t = 1; expm1 does not.
        return -jnp.expm1(t * math.log(b)) if b > 0.0 else jnp.ones_like(t)

    def correction(step):
        t = jnp.asarray(step, jnp.float32) + 1.0
        return jnp.sqrt(one_minus_power(b2, t)) / one_minus_power(b1, t)

    return correction


def names_of(params: PyTree) -> dict[str, list[str]]:
    """Stored path -> logical names, in the order of the tree's leaves."""
    return {path: logical_names(path, leaf.shape[0] if leaf.shape else 0) for path, leaf in paths_and_leaves(params)}


def _compiled(key: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"optimizer.{key}: {pattern!r} is not a regular expression ({error})") from None


def factors(
    key: str, table: Iterable[tuple[str, float]], params: PyTree, default: float = 1.0
) -> dict[str, float | np.ndarray]:
    """Stored path -> factor of the first row whose regex is found in the logical name, else `default`.

    A stacked parameter whose layers differ gets a float32 vector shaped [L, 1, ...], else every entry is a float.

    Raises:
      UserError: a row that matches no parameter, or is no regular expression.
    """
    rows = [(pattern, _compiled(key, pattern), float(factor)) for pattern, factor in table]
    named = names_of(params)
    for pattern, regex, _ in rows:
        if not any(regex.search(name) for names in named.values() for name in names):
            some = ", ".join(names[0] for names in list(named.values())[:3] if names)
            raise UserError(f"optimizer.{key}: {pattern!r} matches no parameter; their names are like {some}")

    def factor_of(name: str) -> float:
        return next((factor for _, regex, factor in rows if regex.search(name)), default)

    result = {}
    for path, leaf in paths_and_leaves(params):
        values = [factor_of(name) for name in named[path]]
        if len(set(values)) <= 1:
            result[path] = values[0] if values else default
        else:
            result[path] = np.asarray(values, np.float32).reshape(-1, *[1] * (len(leaf.shape) - 1))
    return result


def _map(function: Callable, factor: dict[str, float | np.ndarray], tree: PyTree, *rest: PyTree) -> PyTree:
    """tree.map of `function(factor of the leaf, leaf, ...)`; the factors are looked up by path."""

    def apply(path, leaf, *others):
        return function(factor[jax.tree_util.keystr(path, simple=True, separator="/")], leaf, *others)

    return jax.tree_util.tree_map_with_path(apply, tree, *rest)


def _direction(config, params: PyTree) -> optax.GradientTransformation:
    """The rule's direction of descent before weight decay and learning rate; minus signs come later."""
    name = config.name
    if name in ("bert_adam", "gpt_adam"):
        return scale_by_uncorrected_adam(float(config.b1), float(config.b2), float(config.eps))
    if name == "adamw":
        return optax.scale_by_adam(float(config.b1), float(config.b2), float(config.eps))
    if name == "adagrad":  # TensorFlow's: g / sqrt(accumulator), no epsilon
        return optax.scale_by_rss(float(config.accumulator), eps=0.0)
    if ":" not in name:
        raise UserError(f"optimizer.name={name!r} is unknown; it is one of {', '.join(OPTIMIZERS)} or module:function")
    return import_from_outside(name, "optimizer.name")(config, params)


def make_optimizer(config, params: PyTree, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """The chain described at the top of this file.

    Args:
      config: `config.optimizer`. `name` chooses the rule: `bert_adam` (BERT's AdamWeightDecay: no bias correction, eps
        outside the root), `gpt_adam` (GPT's Adam: bias correction and weight decay ride on the learning rate, eps not
        rescaled), `adagrad` (ELMo's: `accumulator` 1.0 and no epsilon), `adamw` (bias-corrected), or
        `module:function`, called as `function(config, params)` for the direction, a `GradientTransformation`.
      params: the parameters or their `jax.ShapeDtypeStruct`s, nested dicts with the names of the models.
      total_steps: updates in the whole run, for the schedule.

    Returns:
      A transformation with `init(params)` and `update(gradients, state, params) -> (updates, state)`. All state is
      float32 but for int32 counts; parameters that are frozen in every layer keep none. A step that is skipped must
      also keep the old state: the schedule counts applied updates. `update` also takes `schedule_numbers=`, those of
      the config as arguments of the program that it is compiled into.

    Raises:
      UserError: an unknown rule or schedule, a regex that matches nothing.
    """
    weight_decay, gradient_scale, clip_norm = map(float, (config.weight_decay, config.gradient_scale, config.clip_norm))
    decay = factors("decay", config.decay, params)
    lr_factors = factors("lr_factors", config.lr_factors, params)
    moving = factors("freeze", [(pattern, 0.0) for pattern in config.freeze], params)
    lr_factors = {path: lr_factors[path] * moving[path] for path in moving}

    steps: list[optax.GradientTransformation] = []
    if not _all_one(moving.values()):
        steps.append(
            optax.stateless(lambda g, _: _map(lambda m, x: jnp.where(m != 0.0, x, jnp.zeros_like(x)), moving, g))
        )
    if gradient_scale != 1.0:
        steps.append(optax.scale(gradient_scale))
    if clip_norm:
        steps.append(optax.clip_by_global_norm(clip_norm))

    direction = _direction(config, params)
    has_state = {path: bool(np.any(np.asarray(factor))) for path, factor in moving.items()}
    if not all(has_state.values()):
        # optax.masked passes the other leaves through: their gradients, which are zero by now.
        direction = optax.masked(direction, _map(lambda kept, _: kept, has_state, params))
    steps.append(direction)

    if weight_decay:
        steps.append(
            optax.stateless(
                lambda u, p: _map(lambda f, u, p: u if _is(f, 0.0) else u + (weight_decay * f) * p, decay, u, p)
            )
        )
    if not _all_one(lr_factors.values()):
        steps.append(optax.stateless(lambda u, _: _map(lambda f, u: u if _is(f, 1.0) else u * f, lr_factors, u)))

    steps.append(_minus_learning_rate(config, schedule(config, total_steps)))
    return optax.chain(*steps)


def _minus_learning_rate(config, rate: Callable) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_schedule` whose numbers `update(..., schedule_numbers=)` may give."""
    corrected = config.name == "gpt_adam"
    correction = bias_correction(float(config.b1), float(config.b2)) if corrected else lambda count: 1.0

    def by(rate) -> optax.GradientTransformation:
        return optax.scale_by_schedule(lambda count: -rate(count) * correction(count))

    def update(updates, state, params=None, *, schedule_numbers: ScheduleNumbers | None = None, **others):
        numbered = functools.partial(_learning_rate, config.schedule, schedule_numbers)
        return by(rate if schedule_numbers is None else numbered).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(by(rate).init, update)


def without_frozen(freeze: Iterable[str], params: PyTree) -> Callable[[PyTree], PyTree]:
    """`stop(params)`: the same parameters, those that `freeze` names cut off from the gradient, so that nothing is
    computed for them backwards. params: as for `make_optimizer`."""
    moving = factors("freeze", [(pattern, 0.0) for pattern in freeze], params)

    def stop(factor, leaf):
        if not np.any(np.asarray(factor)):
            return jax.lax.stop_gradient(leaf)
        return leaf if _is(factor, 1.0) else jnp.where(factor != 0.0, leaf, jax.lax.stop_gradient(leaf))

    return lambda params: params if _all_one(moving.values()) else _map(stop, moving, params)


def _is(factor: float | np.ndarray, value: float) -> bool:
    return isinstance(factor, float) and factor == value


def _all_one(values: Iterable[float | np.ndarray] | Sequence) -> bool:
    return all(_is(value, 1.0) for value in values)
