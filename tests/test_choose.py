"""GPT's multiple choice, and its one matrix: an example's rows together, scores by the right vector, one softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from toys import ToyTokenizer, objective_settings, toy_batch, toy_graph

from plm.errors import UserError
from plm.training import config as configs
from plm.training.objectives import Causal, Draw
from plm.training.step import make_eval_step, make_train_step, new_state
from plm.training.task_objectives import Choose

SETTINGS = objective_settings("choose", choices=3)
B, T = 12, 8


def task_batch(objective, **extra) -> dict:
    """Four examples of three choices, of different lengths; the last example only pads the batch."""
    length = np.array([3, 8, 5, 4, 4, 1, 7, 2, 6, 0, 0, 0], np.int32)
    rows = {"length": length, "labels": np.repeat(np.array([0, 2, 1, 0], np.int32), 3)}
    batch = toy_batch("forward", B, T) | rows | objective.fields(rows, Draw(0, 0, range(B)))
    causal = np.arange(T)[None] < length[:, None]
    return batch | {"causal_weights": causal.astype(np.float32)} | extra


pytestmark = pytest.mark.usefixtures("quick_compiles")


def drawn(graph) -> dict:
    """Parameters that cost no compilation; rows that only pad a vocabulary are 0."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), graph.shapes())
    params["embedding"]["tokens"]["table"][50:] = 0
    return params


def graph_of(direction: str = "forward", head=SETTINGS, **settings):
    names = ("causal", "choose") if direction == "forward" else ("choose",)
    return toy_graph("transformer", direction, names, heads={"choose": head}, head_bias=False, **settings)


def test_scores_are_those_of_the_last_token_and_padding_counts_nothing():
    objective, graph = Choose(SETTINGS, ToyTokenizer()), graph_of()
    batch, params = task_batch(objective), drawn(graph)
    sums, _, _ = make_eval_step(graph.bind, [objective])(params, {}, batch)
    hidden = np.asarray(graph.bind(params)(batch, {})[0]["hidden"])
    head = params["heads"]["choose"]["output"]
    last = hidden[np.arange(B), np.maximum(batch["length"] - 1, 0)]
    scores = (last @ head["kernel"] + head["bias"]).reshape(4, 3)[:3]
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    right = [0, 2, 1]
    np.testing.assert_allclose(sums["choose"], (-np.log(p[np.arange(3), right]).sum(), 3), rtol=1e-5)
    assert tuple(map(float, sums["choose_accuracy"])) == ((p.argmax(1) == right).sum(), 3)


def record() -> optax.GradientTransformation:
    """An optimizer that moves nothing and keeps the gradients."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )


def test_microbatches_do_not_part_an_example():
    # With dropout: the noise of a row is the same whichever microbatch it comes in.
    head = objective_settings("choose", choices=3, dropout=0.3)
    dropped = {"dropout": 0.2, "embedding_dropout": 0.2, "embedding_dropout_on": "matrix"}
    graph = graph_of(head=head, positions_in_softmax=T, **dropped)
    objectives = [Causal({}, ToyTokenizer()), Choose(head, ToyTokenizer())]
    batch = task_batch(objectives[1])
    results = []
    for n in (1, 2):
        step = make_train_step(graph.bind, objectives, {"causal": 0.5, "choose": 1.0}, record(), microbatches=n)
        state, metrics = step(new_state(drawn(graph), record(), {}), batch)
        results.append((state.opt, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), *results)


def test_choices_of_an_example_share_their_dropout_mask():
    settings = objective_settings("choose", choices=3, dropout=0.5)
    objective, graph = Choose(settings, ToyTokenizer()), graph_of(head=settings)
    head = graph.bind(drawn(graph)).heads["choose"]
    batch = task_batch(objective)
    batch["choose_weights"] = np.ones(B, np.float32)
    alike = {"hidden": jnp.ones((B, T, 16))}  # rows that do not differ: their scores differ by their masks alone
    sums = objective.sums(head, alike, batch, jax.random.key(3))
    np.testing.assert_allclose(sums["choose"], 4 * np.log(3), rtol=1e-6)
    shifted = dict(batch, row=batch["row"] + 1)  # rows 1..12: examples are cut elsewhere, so masks differ
    assert abs(float(objective.sums(head, alike, shifted, jax.random.key(3))["choose"]) - 4 * np.log(3)) > 1e-3


def test_a_row_counts_once():
    following = np.array([[5, 6, 7, -1], [5, -1, -1, -1], [-1, -1, -1, -1]])
    rows = {"next_tokens": following}
    fields = Causal(ConfigDict({"per_row": True}), ToyTokenizer()).fields(rows, Draw(0, 0, range(3)))
    np.testing.assert_allclose(fields["causal_weights"], [[1 / 3, 1 / 3, 1 / 3, 0], [1, 0, 0, 0], [0] * 4])


def test_positions_are_classes_behind_the_vocabulary():
    graph, plain = graph_of(positions_in_softmax=5), graph_of()
    params = drawn(graph)
    assert jax.tree.structure(params) == jax.tree.structure(plain.shapes())  # a matter of the loss alone
    batch = toy_batch("forward", B, T)
    outputs, _ = graph.bind(params)(batch, {})
    hidden, table = np.asarray(outputs["hidden"], np.float64), np.asarray(params["embedding"]["tokens"]["table"])
    positions = np.asarray(params["embedding"]["positions"]["table"])[:5]
    logits = hidden @ np.concatenate([table[:50], positions]).T
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logits, batch["causal_targets"][..., None], axis=-1)[..., 0]
    sums, _, _ = make_eval_step(graph.bind, [Causal({}, ToyTokenizer())])(params, {}, batch)
    np.testing.assert_allclose(sums["causal"][0], -(picked * batch["causal_weights"]).sum(), rtol=1e-5)
    # Where text is written, positions are no pieces.
    np.testing.assert_allclose(
        graph.bind(params).heads["causal"].logits(outputs["hidden"]),
        plain.bind(params).heads["causal"].logits(outputs["hidden"]),
    )


def test_the_dropped_positions_are_the_same_at_both_ends():
    graph = graph_of(positions_in_softmax=5, embedding_dropout=0.5, embedding_dropout_on="matrix")
    params = drawn(graph)
    batch = toy_batch("forward", B, T)
    outputs, _ = graph.bind(params)(batch, {}, jax.random.key(0), layers=True)
    padded = params["embedding"]["tokens"]["table"].shape[0]
    tokens, positions = np.split(np.asarray(outputs["table"]), [padded])
    assert positions.shape == (5, 16)
    assert 0.2 < (positions == 0).mean() < 0.8
    embedded = np.asarray(outputs["layers"])[0, :, :5]
    np.testing.assert_allclose(embedded, tokens[batch["tokens"][:, :5]] + positions[None], atol=1e-6)


def task_config(**settings):
    config = configs.base()
    configs.set_task(config, {"name": "swag"})
    run = {"eval.batch_size": settings.pop("eval_batch_size", 0), "microbatches": settings.pop("microbatches", 1)}
    configs.apply(config, {"total_steps": 1, "batch_size": 12, "seq_len": 8, "data.layout": "task", **run})
    model = {key[6:]: settings.pop(key) for key in list(settings) if key.startswith("model_")}
    configs.set_model(config, {"direction": "forward", **model})
    configs.add_objective(config, "choose", **settings)
    return config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "first"}, "pooling='first' needs model.direction='full': under a causal mask"),
        ({"pooling": "first", "model_direction": "both"}, "pooling='first' needs model.direction='full'"),
        ({"reads": "static"}, "pooling='last' with reads='static' sees one token of a row"),
        ({"reads": "vectors"}, "with reads='vectors' sees one token"),
        ({"reads": "vectors", "pooling": "mean"}, "reads='vectors' needs a file of them: data.task.vectors"),
        ({"reads": "mix", "layers": (0, 3)}, "names layer 3: the model has 0 .its embedding. to 2"),
        ({"choices": 5}, "batch_size=12 must be divisible by microbatches=1 x the 5 rows that objectives.choose has"),
        ({"choices": 3, "eval_batch_size": 64}, "eval.batch_size=64 must be divisible by the 3 rows that objectives.c"),
        ({"reads": "mix", "mix_norm": True, "microbatches": 2}, "choose.mix_norm normalises over the rows of a micro"),
        ({"choices": 1}, "objectives.choose.choices=1 must be a whole number of at least 2"),
        ({"model_positions_in_softmax": 200}, "positions_in_softmax=200 must be at most model.max_positions=128"),
        ({"model_positions_in_softmax": 8, "model_tied": False}, "positions_in_softmax needs model.tied=True"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        configs.validate(task_config(**settings))


def test_text_without_labels_is_refused():
    configs.validate(task_config(choices=3))
    with pytest.raises(UserError, match=r"needs a task's rows, data.layout='task': text has no labels"):
        Choose(SETTINGS, ToyTokenizer()).fields({"length": np.ones(3, np.int32)}, Draw(0, 0, range(3)))
