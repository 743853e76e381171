"""The papers' update rules and schedules give their reference traces; regex tables speak logical names, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from plm.errors import UserError
from plm.training.optimizer import learning_rate_at, make_optimizer, schedule


def config(**changes) -> ConfigDict:
    values = {
        "name": "adamw",
        "peak_lr": 0.1,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "gradient_scale": 1.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-6,
        "accumulator": 1.0,
        "decay": (),
        "lr_factors": (),
        "freeze": (),
    }
    assert set(changes) <= set(values)
    return ConfigDict({**values, **changes})


def tree(value=1.0, layers=3) -> dict:
    full = lambda *shape: jnp.full(shape, value, jnp.float32)  # noqa: E731
    block = {
        "mlp": {"up": {"kernel": full(layers, 4, 8), "bias": full(layers, 8)}},
        "mlp_norm": {"scale": full(layers, 4)},
    }
    return {"blocks": {"stacked": block}, "embedding": {"tokens": {"table": full(10, 4)}}}


def run(settings, params, gradients: list, total_steps=100) -> list:
    optimizer = make_optimizer(settings, jax.eval_shape(lambda: params), total_steps)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    trace = []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        trace.append(params)
    assert {x.dtype for x in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    return trace


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # p = 1, g = 0.5 at every step, learning rate 0.1, decay 0.01: the released optimizers' own numbers.
        (config(name="bert_adam", weight_decay=0.01), [0.68279223, 0.25716928, -0.23809334]),
        (config(name="gpt_adam", weight_decay=0.01, eps=1e-8), [0.89968384, 0.79947217, 0.69931070]),
    ],
)
def test_adam_traces_of_the_released_code(settings, expected):
    p = {"p": jnp.ones((), jnp.float32)}
    trace = run(settings, p, [{"p": jnp.float32(0.5)}] * 3)
    np.testing.assert_allclose([x["p"] for x in trace], expected, rtol=0, atol=2e-7)


def test_adamw_is_bias_corrected():
    trace = run(config(weight_decay=0.01, eps=1e-8), {"p": jnp.ones(())}, [{"p": jnp.float32(0.5)}] * 2)
    # With a constant gradient m / sqrt(v) is 1 at every step; the decay is 0.01 * p.
    np.testing.assert_allclose([x["p"] for x in trace], [0.899, 0.798101], atol=1e-5)


def test_adagrad_with_elmo_scale_and_clip_after_the_scale():
    rng = np.random.default_rng(0)
    gradients = [{"p": rng.normal(size=(5,)).astype(np.float32)} for _ in range(4)]
    settings = config(name="adagrad", peak_lr=0.2, gradient_scale=20.0, clip_norm=10.0)
    trace = run(settings, {"p": jnp.ones((5,))}, gradients)
    p, accumulator = np.ones(5), np.ones(5)
    for gradient, got in zip(gradients, trace, strict=True):
        g = gradient["p"].astype(np.float64) * 20
        norm = np.linalg.norm(g)
        assert norm > 10  # clipped before the scale, nothing would be: the order shows
        g *= 10 / norm
        accumulator += g * g
        p -= 0.2 * g / np.sqrt(accumulator)
        np.testing.assert_allclose(got["p"], p, rtol=1e-5, atol=1e-6)


def test_bert_schedule_with_its_kink():
    rate = schedule(config(schedule="bert_linear", peak_lr=1e-4, warmup_steps=10_000), 1_000_000)
    steps = [0, 5000, 9999, 10_000, 500_000, 1_000_000, 1_000_001]
    expected = [0, 5e-5, 9.999e-5, 9.9e-5, 5e-5, 0, 0]
    np.testing.assert_allclose([rate(s) for s in steps], expected, rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(jnp.asarray(steps)), expected, rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # W = 10, T = 110 at steps 0, 5, 10, 60, 110, 200
        ("linear", [0, 0.5, 1, 0.5, 0, 0]),
        ("cosine", [0, 0.5, 1, 0.5, 0, 0]),
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("openai_linear", [0, 0.5 * (1 - 5 / 110), 1 - 10 / 110, 1 - 60 / 110, 0, 0]),
        ("openai_cosine", [0, 0.5, (1 + np.cos(np.pi / 11)) / 2, (1 + np.cos(np.pi * 6 / 11)) / 2, 0, 0]),
    ],
)
def test_schedules(kind, expected):
    settings = config(schedule=kind, peak_lr=1.0, warmup_steps=10)
    steps = [0, 5, 10, 60, 110, 200]
    np.testing.assert_allclose([learning_rate_at(settings, 110, s) for s in steps], expected, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(schedule(settings, 110))(jnp.asarray(steps)), expected, atol=1e-6)
    if kind == "cosine":  # tells a cosine from a line
        np.testing.assert_allclose(learning_rate_at(settings, 110, 35), (1 + np.cos(np.pi / 4)) / 2)


def test_a_run_may_be_a_part_of_its_schedule():
    settings = config(schedule="linear", peak_lr=1.0)
    settings.schedule_steps = 200
    assert learning_rate_at(settings, 100, 50) == 0.75
    settings.schedule_steps = 0
    assert learning_rate_at(settings, 100, 50) == 0.5


def test_without_warm_up_the_first_update_has_the_peak_rate():
    for kind in ("bert_linear", "linear", "cosine", "constant", "openai_linear", "openai_cosine"):
        assert learning_rate_at(config(schedule=kind, peak_lr=3.0), 10, 0) == 3.0


def test_the_learning_rate_follows_the_count_of_updates():
    settings = config(name="bert_adam", schedule="linear", warmup_steps=2, peak_lr=1.0)
    p = {"p": jnp.ones(())}
    first, second = run(settings, p, [{"p": jnp.float32(1.0)}] * 2, total_steps=4)
    assert first["p"] == 1.0  # the first update has rate 0
    assert second["p"] < 1.0


def test_tables_speak_logical_names_and_the_first_row_wins():
    settings = config(
        name="adagrad",
        weight_decay=0.5,
        decay=((r"(norm|bias)", 0.0), (r"^blocks/2/", 2.0)),
        lr_factors=((r"blocks/0/", 0.5), (r"blocks/[01]/", 0.25)),
    )
    (got,) = run(settings, tree(), [tree(0.0)])  # no gradient: what moves is the decay
    expected = np.array([1 - 0.1 * 0.5 * 0.5, 1 - 0.1 * 0.25 * 0.5, 1 - 0.1 * 0.5 * 2.0])
    stacked = got["blocks"]["stacked"]
    np.testing.assert_allclose(stacked["mlp"]["up"]["kernel"], np.ones((3, 4, 8)) * expected[:, None, None], rtol=1e-6)
    np.testing.assert_array_equal(stacked["mlp"]["up"]["bias"], np.ones((3, 8)))
    np.testing.assert_array_equal(stacked["mlp_norm"]["scale"], np.ones((3, 4)))
    np.testing.assert_allclose(got["embedding"]["tokens"]["table"], np.full((10, 4), 0.95), rtol=1e-6)


def test_frozen_parameters_stay_keep_no_state_and_do_not_count_in_the_norm():
    settings = config(name="bert_adam", clip_norm=1.0, weight_decay=0.1, freeze=("^embedding/", "blocks/1/"))
    gradients = tree(0.5)
    gradients["embedding"]["tokens"]["table"] = jnp.full((10, 4), jnp.nan)  # must be ignored, not multiplied by 0
    params = tree()
    (got,) = run(settings, params, [gradients])
    np.testing.assert_array_equal(got["embedding"]["tokens"]["table"], params["embedding"]["tokens"]["table"])
    kernel = np.asarray(got["blocks"]["stacked"]["mlp"]["up"]["kernel"])
    assert (kernel[1] == 1.0).all()
    assert (kernel[0] < 1.0).all()
    assert (kernel[2] < 1.0).all()
    optimizer = make_optimizer(settings, params, 100)
    moments = [x for x in jax.tree.leaves(optimizer.init(params)) if x.shape]
    assert (10, 4) not in {x.shape for x in moments}
    assert len(moments) == 6


def doubled(settings, params):
    del settings, params
    return optax.scale(2.0)


def test_a_rule_from_outside_the_package():
    (got,) = run(config(name=f"{__name__}:doubled"), {"p": jnp.ones(())}, [{"p": jnp.float32(1.0)}])
    np.testing.assert_allclose(got["p"], 1 - 0.1 * 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": (("layernorm", 0.0),)}, "optimizer.decay: 'layernorm' matches no parameter"),
        ({"freeze": ("blocks/3/",)}, "optimizer.freeze: 'blocks/3/' matches no parameter"),
        ({"lr_factors": (("stacked", 0.1),)}, "optimizer.lr_factors: 'stacked' matches no parameter"),
        ({"lr_factors": (("(", 0.1),)}, "not a regular expression"),
        ({"name": "adm"}, "optimizer.name='adm' is unknown"),
        ({"name": "no_such_module:f"}, "optimizer.name='no_such_module:f' cannot be imported"),
        ({"schedule": "cosin"}, "optimizer.schedule='cosin' is unknown"),
    ],
)
def test_bad_input_is_one_line(changes, message):
    with pytest.raises(UserError) as error:
        make_optimizer(config(**changes), tree(), 100)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
