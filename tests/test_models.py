"""Models: no look at the future, the papers' sizes, and stacks, remat and chunks that change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import VOCABULARY, toy_batch, toy_graph

from plm.errors import UserError
from plm.models import lstm
from plm.models.heads import sampled_nll, vocabulary_nll
from plm.models.layers import Noise, dropout

pytestmark = pytest.mark.usefixtures("quick_compiles")
B, T = 2, 7


def sensitivity(architecture, direction, output):
    """|d output[t] / d embedding of token s| summed over features, [T, T]: who sees whom. Token s is word s."""
    graph = toy_graph(architecture, direction)
    params = graph.init(jax.random.key(0))
    table = params["embedding"]["tokens"]["table"]

    def run(rows):
        with_rows = {**params, "embedding": {**params["embedding"], "tokens": {"table": table.at[:T].set(rows)}}}
        return graph.bind(with_rows)({"tokens": jnp.arange(T)[None]}, {})[0][output][0]

    return np.abs(np.asarray(jax.jacobian(run)(table[:T]))).sum(axis=(1, 3))


@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
@pytest.mark.parametrize(("direction", "output"), [("forward", "hidden"), ("both", "forward")])
def test_forward_never_sees_the_right(architecture, direction, output):
    seen = sensitivity(architecture, direction, output)
    assert np.all(np.triu(seen, 1) == 0.0)
    assert np.all(np.tril(seen)[np.tril_indices(T)] > 0.0)


@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
def test_full_sees_both_sides(architecture):
    assert np.all(sensitivity(architecture, "full", "hidden") > 0.0)


@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
def test_backward_tower_sees_only_the_right_of_the_token(architecture):
    graph = toy_graph(architecture, "both")
    model = graph.bind(graph.init(jax.random.key(0)))
    tokens = np.arange(B * T).reshape(B, T) % VOCABULARY
    changed = tokens.copy()
    changed[:, 3] += 1
    before, after = (model({"tokens": jnp.asarray(t)}, {})[0]["backward"] for t in (tokens, changed))
    differs = np.any(np.asarray(before != after), axis=(0, 2))
    assert differs.tolist() == [True] * 4 + [False] * 3


@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
@pytest.mark.parametrize("direction", ["forward", "both", "full"])
def test_padding_changes_nothing(architecture, direction):
    graph = toy_graph(architecture, direction)
    model = graph.bind(graph.init(jax.random.key(0)))
    tokens = jnp.asarray([[3, 4, 5, 6, 7]])
    padded = jnp.asarray([[3, 4, 5, 6, 7, 9, 9]])
    short, _ = model({"tokens": tokens, "length": jnp.asarray([5])}, {})
    long, _ = model({"tokens": padded, "length": jnp.asarray([5])}, {})
    for name in short:
        np.testing.assert_allclose(short[name], long[name][:, :5], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
@pytest.mark.parametrize("direction", ["forward", "both", "full"])
def test_rows_without_segments_are_of_the_first_one(architecture, direction):
    graph = toy_graph(architecture, direction, segments=2)
    model = graph.bind(graph.init(jax.random.key(0)))
    tokens = jnp.arange(B * T).reshape(B, T)
    without, first, second = (
        model({"tokens": tokens} | given, {})[0]
        for given in ({}, *({"segments": jnp.full((B, T), row, jnp.int32)} for row in (0, 1)))
    )
    for name in without:
        np.testing.assert_array_equal(without[name], first[name])
        assert np.abs(without[name] - second[name]).max() > 1e-3


@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
@pytest.mark.parametrize("direction", ["forward", "both", "full"])
def test_unrolled_and_remat_compute_the_same(architecture, direction):
    batch = toy_batch(direction)

    def gradient(**settings):
        graph = toy_graph(architecture, direction, dropout=0.3, **settings)
        params = graph.init(jax.random.key(0))

        def loss(params):
            model = graph.bind(params)
            outputs, _ = model(batch, model.initial_carry(4), jax.random.key(1))
            return sum(jnp.sum(jnp.sin(x)) for x in outputs.values())

        return jax.value_and_grad(loss)(params)

    plain = gradient()
    for other in (gradient(scan={"unroll": True}), gradient(remat="blocks")):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), plain, other)


def test_carried_state_continues_the_row():
    graph = toy_graph("lstm", "both")
    model = graph.bind(graph.init(jax.random.key(0)))
    tokens = np.arange(B * 12).reshape(B, 12) % VOCABULARY
    backward = tokens[:, ::-1]
    whole, _ = model({"tokens": tokens, "tokens_backward": backward}, {})
    carry, parts = model.initial_carry(B), []
    for at in range(0, 12, 4):
        part, carry = model({"tokens": tokens[:, at : at + 4], "tokens_backward": backward[:, at : at + 4]}, carry)
        parts.append(part)
    for name in ("forward", "backward"):
        np.testing.assert_allclose(whole[name], np.concatenate([p[name] for p in parts], axis=1), atol=1e-6)
    fresh, empty = model({"tokens": tokens[:, 4:8]}, {})
    assert empty == {}
    assert np.abs(np.asarray(fresh["forward"] - parts[1]["forward"])).max() > 1e-3


def test_lstm_gradients_equal_those_of_the_differentiated_scan():
    rng = np.random.default_rng(0)
    n, cells, out = 3, 5, 4
    make = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.9, jnp.float32)  # noqa: E731
    gates, recurrent, projection = make(T, n, 4, cells), make(out, 4, cells), make(cells, out)
    c, m = make(n, cells), make(n, out)
    valid = jnp.asarray(np.arange(T)[:, None] < np.array([[7, 3, 5]]))

    def loss(run, *arguments):
        y, c, m = run(*arguments)
        return jnp.sum(jnp.sin(3 * y)) + jnp.sum(c**2) + jnp.sum(jnp.cos(m))

    def plain(clips, *arguments):
        (c, m), (out, *_) = lstm._forward(clips, *arguments)
        return out, c, m

    for clips in ((0.0, 0.0), (0.7, 0.4)):
        for project in (projection, None):
            r, m0 = (recurrent, m) if project is not None else (make(cells, 4, cells), make(n, cells))
            for mask in (None, valid):
                arguments = (gates, r, project, c, m0)

                def gradient(run, clips=clips, mask=mask, arguments=arguments):
                    return jax.grad(lambda *given: loss(run, clips, *given, mask), argnums=(0, 1, 3, 4))(*arguments)

                wanted, got = gradient(plain), gradient(lstm.recurrence)
                for a, b in zip(wanted, got, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 4, 1000])
def test_vocabulary_nll_is_the_softmax_cross_entropy(chunk):
    rng = np.random.default_rng(1)
    x, table = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 6, 5), (11, 5)))
    bias = jnp.asarray(rng.normal(size=11), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (2, 6)), jnp.int32)
    weights = jnp.asarray(rng.random((2, 6)), jnp.float32)

    def dense(x, table, bias):
        log_p = jax.nn.log_softmax(jnp.einsum("btw,vw->btv", x, table) + bias)
        return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])

    def chunked(x, table, bias):
        return vocabulary_nll(x, table, bias, targets, weights, chunk)[0]

    wanted = jax.value_and_grad(lambda *a: 3.0 * dense(*a), argnums=(0, 1, 2))(x, table, bias)
    got = jax.jit(jax.value_and_grad(lambda *a: 3.0 * chunked(*a), argnums=(0, 1, 2)))(x, table, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), wanted, got)
    hits = vocabulary_nll(x, table, bias, targets, weights, chunk)[1]
    best = jnp.argmax(jnp.einsum("btw,vw->btv", x, table) + bias, axis=-1)
    np.testing.assert_allclose(hits, jnp.sum(weights * (best == targets)), rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_of_its_own_is_what_trains_where_the_input_matrix_is_dropped(tied):
    settings = {"tied": tied, "embedding_dropout": 0.5, "embedding_dropout_on": "matrix"}
    graph = toy_graph("transformer", "forward", **settings)
    params = graph.init(jax.random.key(0))
    batch, key = toy_batch("forward"), jax.random.key(1)

    def loss(params):
        model = graph.bind(params)
        outputs, _ = model(batch, {}, key)
        head = model.heads["causal"]
        return head.nll(
            outputs["hidden"], batch["causal_targets"], batch["causal_weights"], table=outputs.get("table")
        )[0]

    gradient = jax.grad(loss)(params)
    tables = [
        gradient["embedding"]["tokens"]["table"],
        *([] if tied else [gradient["heads"]["causal"]["table"]["table"]]),
    ]
    assert all(np.abs(table).max() > 0 for table in tables)


def test_padding_rows_of_the_table_get_no_probability_and_no_gradient():
    graph = toy_graph("transformer", "forward")
    params = graph.init(jax.random.key(0))
    batch = toy_batch("forward")

    def loss(params):
        model = graph.bind(params)
        outputs, _ = model(batch, {})
        return model.heads["causal"].nll(outputs["hidden"], batch["causal_targets"], batch["causal_weights"])[0]

    value, gradient = jax.value_and_grad(loss)(params)
    table = gradient["embedding"]["tokens"]["table"]
    assert table.shape == (64, 16)
    assert np.all(np.asarray(table[VOCABULARY:]) == 0.0)
    assert np.all(np.asarray(table[:VOCABULARY]).any(axis=1))
    model = graph.bind(params)
    scores = model.heads["causal"].logits(model(batch, {})[0]["hidden"])
    assert scores.shape == (4, 8, VOCABULARY)
    log_p = jax.nn.log_softmax(scores)
    dense = -np.sum(
        batch["causal_weights"] * np.take_along_axis(np.asarray(log_p), batch["causal_targets"][..., None], -1)[..., 0]
    )
    np.testing.assert_allclose(value, dense, rtol=1e-5)


def test_sampled_softmax_with_all_negatives_is_corrected_to_the_full_one():
    # Drawing every word almost surely makes the expected counts 1, so the correction vanishes and what is left is the
    # full softmax (the target itself among the negatives is an accidental hit).
    rng = np.random.default_rng(2)
    x, table = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 5), (9, 5)))
    targets = jnp.asarray(rng.integers(0, 9, (2, 3)), jnp.int32)
    arguments = (x, table, jnp.zeros(9), targets, jnp.ones((2, 3)))
    got, _ = sampled_nll(*arguments, jnp.arange(9, dtype=jnp.int32), jnp.asarray(100_000), 9)
    np.testing.assert_allclose(got, vocabulary_nll(*arguments, 0)[0], rtol=1e-5)


def test_dropout_of_a_row_depends_on_its_global_number_only():
    x = jnp.ones((8, 5, 6))
    key = jax.random.key(3)
    whole = dropout(x, 0.4, Noise(key, jnp.arange(8)), "here")
    some = dropout(x[:3], 0.4, Noise(key, jnp.asarray([6, 1, 3])), "here")
    np.testing.assert_array_equal(some, whole[jnp.asarray([6, 1, 3])])
    assert set(np.unique(np.asarray(whole)).round(4)) == {0.0, np.float32(1 / 0.6).round(4)}
    assert abs(float((whole == 0).mean()) - 0.4) < 0.1
    assert not np.array_equal(whole, dropout(x, 0.4, Noise(key, jnp.arange(8)), "there"))
    big = dropout(jnp.ones((4, 50_000)), 0.1, Noise(key, jnp.arange(4)), "rate")
    assert abs(float((big == 0).mean()) - 0.1) < 4 * (0.09 / 200_000) ** 0.5


def test_dropout_keeps_the_mean_in_bfloat16():
    key = jax.random.key(3)
    x = jax.random.uniform(key, (4, 50_000), minval=1.0, maxval=2.0).astype(jnp.bfloat16)
    dropped = dropout(x, 0.1, Noise(key, jnp.arange(4)), "rate")
    assert dropped.dtype == jnp.bfloat16
    before, after = (np.asarray(values, np.float64) for values in (x, dropped))
    kept = after != 0
    assert after[kept].sum() / before[kept].sum() == pytest.approx(1 / 0.9, rel=1e-4)


def test_too_long_a_sequence_is_refused():
    graph = toy_graph("transformer", "forward")
    with pytest.raises(UserError, match="33 tokens is longer than model"):
        graph.bind(graph.init(jax.random.key(0)))({"tokens": jnp.zeros((1, 33), jnp.int32)}, {})


def test_encoding_each_distinct_word_once_changes_nothing():
    characters = {"dim": 4, "filters": ((1, 8), (2, 8)), "highways": 1, "activation": "relu"}
    graph = toy_graph("lstm", "both", input="characters", tied=False, characters=characters)
    params = graph.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    words = rng.integers(1, 262, (5, 50)).astype(np.int32)
    places = rng.integers(0, 5, (2, 4, 6)).astype(np.int32)
    by_token = {"characters": words[places[0]], "characters_backward": words[places[1]]}
    by_word = {"words": places[0], "words_backward": places[1], "shared": {"words": words}}

    def run(params, batch):
        outputs, _ = graph.bind(params)(batch, {})
        return sum(jnp.sum(jnp.sin(x)) for x in outputs.values())

    wanted, got = (jax.jit(jax.value_and_grad(run))(params, batch) for batch in (by_token, by_word))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), wanted, got)
