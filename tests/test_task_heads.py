"""Heads: the vector of a row has seen all of it, padding changes nothing, the chain over tags is exact."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toys import ToyTokenizer, objective_settings, toy_graph

from plm.models.task_heads import Crf
from plm.training.step import make_eval_step, make_train_step, new_state
from plm.training.task_objectives import TASK_OBJECTIVES

B, T = 4, 6
LENGTH = np.array([6, 3, 5, 1], np.int32)


pytestmark = pytest.mark.usefixtures("quick_compiles")


def drawn(graph) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), graph.shapes())


def rows(width: int = T) -> dict:
    rng = np.random.default_rng(1)
    tokens = np.zeros((B, width), np.int32)
    tokens[:, :T] = np.where(np.arange(T) < LENGTH[:, None], rng.permutation(B * T).reshape(B, T) + 1, 0)
    tags = np.full((B, width), -1, np.int32)
    tags[:, :2] = [[0, 1], [1, 1], [2, -1], [0, -1]]
    positions = np.zeros((B, width), np.int32)
    positions[:, :2] = [[1, 4], [0, 2], [4, 0], [0, 0]]
    return {
        "tokens": tokens,
        "length": LENGTH,
        "row": np.arange(B, dtype=np.int32),
        "labels": np.array([1, 1, 0, 0], np.int32),
        "scores": np.array([0.5, 0.5, 2.0, 2.0], np.float32),
        "marked": np.array([[1, 3], [0, 2], [4, 2], [0, 0]], np.int32),
        "answers": np.array([[1, 3], [0, 0], [2, 4], [0, 0]], np.int32),
        "tags": tags,
        "tag_positions": positions,
        "vectors": np.pad(np.random.default_rng(2).normal(size=(B, T, 3)), [(0, 0), (0, width - T), (0, 0)]),
    }


def made(name: str, architecture: str, direction: str, **settings):
    """(objective, graph, parameters)"""
    settings = objective_settings(name, **settings)
    graph = toy_graph(architecture, direction, (name,), heads={name: settings})
    return TASK_OBJECTIVES[name](settings, ToyTokenizer()), graph, drawn(graph)


def predictions(objective, graph, params, batch):
    found = make_eval_step(graph.bind, [objective])(params, {}, batch | objective.fields(batch, None))
    return found[1][objective.name], found[0]


POOLED = [
    ("transformer", "forward", {"pooling": "last"}),
    ("transformer", "full", {"pooling": "first", "pooler": True}),
    ("transformer", "full", {"pooling": "last"}),
    pytest.param("transformer", "both", {"pooling": "last"}, marks=pytest.mark.slow),
    ("lstm", "both", {"pooling": "last"}),
    ("lstm", "forward", {"pooling": "max"}),
    ("transformer", "forward", {"pooling": "last", "reads": "mix"}),
    ("lstm", "both", {"pooling": "last", "reads": "static", "lstm": 4}),
    pytest.param(
        *("transformer", "forward"),
        {"pooling": "last", "reads": "mix", "lstm": 4, "insert": "both", "lstm_layers": 2},
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *("transformer", "both"),
        {"pooling": "last", "reads": "concat", "layers": (-1, -2), "lstm": 4, "insert": "output"},
        marks=pytest.mark.slow,
    ),
    ("transformer", "forward", {"pooling": "attention", "reads": "static"}),
    ("lstm", "both", {"pooling": "mean", "vectors": 3}),
]


@pytest.mark.parametrize(("architecture", "direction", "settings"), POOLED)
def test_the_vector_of_a_row_has_seen_all_of_it_and_no_padding(architecture, direction, settings):
    """Exactly the row's own tokens have a gradient: under a causal mask the first position would see one."""
    objective, graph, params = made("classify", architecture, direction, classes=3, **settings)
    batch = rows()

    def score(table, row):
        embedding = params["embedding"] | {"tokens": {"table": table}}
        model = graph.bind(params | {"embedding": embedding})
        return objective._scores(model.heads["classify"], model(batch, {})[0], batch, None)[row, 0]

    gradient = jax.jit(jax.grad(score), static_argnums=1)
    for row in (0, 1):
        moved = np.abs(gradient(params["embedding"]["tokens"]["table"], row)).max(axis=-1)
        if settings["pooling"] == "max":  # of each feature one position
            assert set(np.flatnonzero(moved)) <= set(batch["tokens"][row, : LENGTH[row]])
        else:
            assert sorted(np.flatnonzero(moved)) == sorted(batch["tokens"][row, : LENGTH[row]])


@pytest.mark.parametrize("name", TASK_OBJECTIVES)
def test_padding_changes_no_prediction_and_no_sum(name):
    settings = {"classify": {"classes": 3, "marked": 2, "vectors": 3}, "tag": {"classes": 3, "crf": True}}
    settings |= {"regress": {"pairs": "both_orders"}, "choose": {"reads": "mix", "lstm": 4}}
    objective, graph, params = made(name, "transformer", "full", **settings.get(name, {}))
    (short, sums), (long, padded) = (predictions(objective, graph, params, rows(width)) for width in (T, T + 3))
    width = short.shape[1] if name in ("tag", "span") else None
    if name == "tag":
        valid = rows()["tags"] >= 0
        np.testing.assert_array_equal(short[valid], long[:, :width][valid])
    elif name == "span":
        valid = np.arange(T) < LENGTH[:, None]
        np.testing.assert_allclose(short[valid], long[:, :width][valid], atol=1e-5)
    else:
        np.testing.assert_allclose(short, long, atol=1e-5)
    for key, (total, weight) in sums.items():
        np.testing.assert_allclose(padded[key][0], total, rtol=1e-5, err_msg=key)
        assert padded[key][1] == weight


def test_a_mix_is_that_of_the_papers_and_its_penalty_pulls_to_the_mean():
    objective, graph, params = made("regress", "transformer", "full", reads="mix", pooling="mean", mix_penalty=0.5)
    batch = rows()
    weights = np.array([0.3, -0.2, 0.5], np.float32)
    params["heads"]["regress"]["reader"]["mixes"]["0"] = {"weights": weights, "gamma": np.float32(1.5)}
    layers = np.asarray(graph.bind(params)(batch, {}, layers=True)[0]["layers"])
    shares = np.exp(weights) / np.exp(weights).sum()
    valid = (np.arange(T) < LENGTH[:, None])[..., None]
    mixed = 1.5 * (shares[:, None, None, None] * layers).sum(0) * valid
    head = params["heads"]["regress"]["output"]
    wanted = (mixed.sum(1) / LENGTH[:, None]) @ head["kernel"] + head["bias"]
    found, sums = predictions(objective, graph, params, batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums["regress"], (((wanted[:, 0] - batch["scores"]) ** 2).sum(), 4), rtol=1e-5)
    np.testing.assert_allclose(sums["regress_mix_penalty"][0] / 4, (weights**2).sum(), rtol=1e-6)
    assert objective.coefficients(2.0) == {"regress": 2.0, "regress_mix_penalty": 1.0}


def test_both_orders_are_added_and_texts_apart_are_compared():
    batch = rows()
    objective, graph, params = made("regress", "transformer", "full", pairs="both_orders")
    hidden = np.asarray(graph.bind(params)(batch, {})[0]["hidden"])
    last = hidden[np.arange(B), LENGTH - 1].reshape(2, 2, -1)
    head = params["heads"]["regress"]["output"]
    found, _ = predictions(objective, graph, params, batch)
    np.testing.assert_allclose(found, last.sum(axis=1) @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-6)
    objective, graph, params = made("regress", "transformer", "full", pairs="apart")
    u, v = (
        np.asarray(graph.bind(params)(batch, {})[0]["hidden"])[np.arange(B), LENGTH - 1]
        .reshape(2, 2, -1)
        .swapaxes(0, 1)
    )
    head = params["heads"]["regress"]["output"]
    wanted = np.concatenate([u, v, abs(u - v), u * v], axis=-1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(predictions(objective, graph, params, batch)[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_choice_that_is_not_there_is_never_chosen():
    objective, graph, params = made("choose", "transformer", "forward", choices=2)
    batch = rows() | {"length": np.array([6, 0, 5, 1], np.int32), "labels": np.zeros(4, np.int32)}
    found, sums = predictions(objective, graph, params, batch)
    assert found[0, 1] < -1e29
    assert np.isfinite(found[1]).all()
    loss = -jax.nn.log_softmax(found[1])[0]
    np.testing.assert_allclose(sums["choose"], (loss, 2), rtol=1e-5)  # the first example's is exactly 0


def test_a_span_is_two_softmaxes_over_the_row():
    objective, graph, params = made("span", "transformer", "full")
    batch = rows()
    found, sums = predictions(objective, graph, params, batch)
    loss = 0.0
    for row in range(B):
        for end in range(2):
            scores = np.asarray(found[row, : LENGTH[row], end], np.float64)
            loss += 0.5 * (np.log(np.exp(scores).sum()) - scores[batch["answers"][row, end]])
    np.testing.assert_allclose(sums["span"], (loss, B), rtol=1e-5)


def test_a_chain_over_tags_is_exact():
    """Against all 3^n paths."""
    rng = np.random.default_rng(0)
    crf = Crf(3)
    first, last, between = rng.normal(size=3), rng.normal(size=3), rng.normal(size=(3, 3))
    crf.first[...], crf.last[...], crf.transitions[...] = (jnp.asarray(x, jnp.float32) for x in (first, last, between))
    scores = rng.normal(size=(3, 4, 3)).astype(np.float32)
    tags = rng.integers(0, 3, (3, 4)).astype(np.int32)
    n = [4, 1, 0]
    valid = np.arange(4) < np.array(n)[:, None]
    nll, best = crf.nll(scores, tags, valid), crf.best(scores, valid)
    for row, length in enumerate(n[:2]):

        def value(path, row=row):
            steps = sum(between[a, b] for a, b in itertools.pairwise(path))
            return first[path[0]] + last[path[-1]] + steps + sum(scores[row, i, t] for i, t in enumerate(path))

        paths = {path: value(path) for path in itertools.product(range(3), repeat=length)}
        total = np.log(sum(np.exp(v) for v in paths.values()))
        np.testing.assert_allclose(nll[row], total - paths[tuple(tags[row, :length].tolist())], rtol=1e-5)
        assert tuple(np.asarray(best)[row, :length].tolist()) == max(paths, key=paths.get)
    assert nll[2] == 0


def test_what_is_frozen_gets_no_gradient_and_does_not_move():
    from ml_collections import ConfigDict

    from plm.training import config as configs
    from plm.training.optimizer import make_optimizer, without_frozen

    objective, graph, params = made("classify", "transformer", "full", classes=3)
    config = configs.base()
    configs.apply(config, {"optimizer.freeze": ("^embedding/", "^blocks/0/")})
    settings = ConfigDict(config.optimizer)
    stop = without_frozen(settings.freeze, graph.shapes())
    tx = make_optimizer(settings, graph.shapes(), 10)
    step = make_train_step(lambda p: graph.bind(stop(p)), [objective], {"classify": 1.0}, tx)
    batch = rows() | objective.fields(rows(), None)
    state, metrics = step(new_state(jax.tree.map(jnp.array, params), tx, {}), batch)
    assert metrics["gradient_norm"] > 0
    same = jax.tree.map(lambda a, b: np.asarray(a == b), state.params, params)
    assert all(jax.tree.leaves(jax.tree.map(np.all, same["embedding"])))
    for leaf in jax.tree.leaves(same["blocks"]):
        assert leaf[0].all()
    moved = [not leaf[1].all() for leaf in jax.tree.leaves(same["blocks"])]
    assert all(moved)


def test_operations_of_a_frozen_body_are_counted_once():
    from plm.models.flops import forward_flops, train_flops
    from plm.training import config as configs

    _, graph, _ = made("classify", "transformer", "full", classes=3, reads="mix", lstm=4)
    config = configs.base().copy_and_resolve_references().unlock()
    config.model = {
        "architecture": "transformer",
        "name": "language_model",
        "direction": "full",
        "width": 16,
        "layers": 2,
    }
    config.objectives = {"classify": {}}
    config.batch_size, config.seq_len = 4, T
    whole, heads = (forward_flops(graph, config, 50, 0.0, heads_only=only) for only in (False, True))
    # A BiLSTM of 4 cells over 16 features at T positions, and 3 classes on its 8 outputs.
    assert heads == 2 * T * 2 * (16 + 4) * 4 * 4 + 2 * 8 * 3
    assert train_flops(graph, config, 50) == 3 * 4 * whole
    config.optimizer.freeze = ("^(embedding|blocks)/",)
    assert train_flops(graph, config, 50) == 4 * (whole - heads) + 3 * 4 * heads


def test_nnx_lists_have_plain_names():
    _, graph, _ = made("tag", "lstm", "both", classes=2, reads="mix", lstm=4, lstm_layers=2, crf=True)
    heads = [path for path in graph.paths if path.startswith("heads/")]
    assert "heads/tag/reader/mixes/0/weights" in heads
    assert "heads/tag/reader/lstm/1/backward/kernel_recurrent" in heads
    assert isinstance(graph.bind(graph.shapes()), nnx.Module)
