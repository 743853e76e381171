"""The step: microbatches are the full batch, bad gradients change nothing, one compile, and every cell learns.

`GOLDEN` was printed by `PYTHONPATH=.:tests python tests/test_step.py`; a change of it is a change of what is computed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from toys import OBJECTIVE_OF, VOCABULARY, ToyTokenizer, toy_batch, toy_graph

from experiments import bert, elmo, gpt
from plm.models.graph import build
from plm.randomness import stable_hash
from plm.training.objectives import make_objectives
from plm.training.optimizer import make_optimizer, schedule_numbers
from plm.training.sharding import paths_and_leaves
from plm.training.step import make_eval_step, make_train_step, new_state

B, T = 8, 8
CELLS = [(a, d) for a in ("transformer", "lstm") for d in ("forward", "both", "full")]
cells = pytest.mark.parametrize(("architecture", "direction"), CELLS)


pytestmark = pytest.mark.usefixtures("quick_compiles")


def exact_uniforms(n: int, *name) -> np.ndarray:
    """float64 [n] in [0, 1) by integer arithmetic alone (splitmix64): the same on every machine and version."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, n + 1, dtype=np.uint64) + np.uint64(stable_hash(*name))) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 2**53


def exact_parameters(graph) -> dict:
    """Parameters of about the usual size, padding rows too, that depend on no random generator."""
    tree = graph.shapes()

    def make(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        values = exact_uniforms(int(np.prod(leaf.shape)), name).reshape(leaf.shape) * 2 - 1
        if name.endswith("scale"):
            return jnp.asarray(1 + 0.1 * values, jnp.float32)
        inputs = leaf.shape[-1] if name.endswith("table") else int(np.prod(leaf.shape[-2:-1])) or 1
        return jnp.asarray(values * (0.1 if name.endswith("bias") else (3 / inputs) ** 0.5), jnp.float32)

    return jax.tree_util.tree_map_with_path(make, tree)


def exact_batch(direction: str, size: int, characters: bool, n: int = 4, length: int = 12, P: int = 3) -> dict:
    """A batch as `toy_batch` has it, by `exact_uniforms`."""

    def ids(name, *shape, high=size):
        return (exact_uniforms(int(np.prod(shape)), "golden", name) * high).astype(np.int32).reshape(shape)

    def weights(name, *shape):
        return (ids(name, *shape, high=10) < 7).astype(np.float32)

    lengths = np.resize(np.array([length, length - 3, length, 5], np.int32), n)
    batch = {"row": np.arange(n, dtype=np.int32), "length": lengths}
    inputs = ["tokens", "tokens_backward"] if direction == "both" else ["tokens"]
    for name in inputs:
        if characters:
            batch[name.replace("tokens", "characters")] = ids(name, n, length, 50, high=262)
        else:
            batch[name] = ids(name, n, length)
    valid = (np.arange(length) < batch["length"][:, None]).astype(np.float32)
    for infix in {"forward": ["causal"], "both": ["bidirectional", "bidirectional_backward"]}.get(direction, []):
        batch |= {
            f"{infix}_targets": ids(infix, n, length),
            f"{infix}_weights": weights(infix + "w", n, length) * valid,
        }
    if direction == "full":
        batch |= {"masked_positions": np.tile(np.array([0, 2, 4], np.int32), (n, 1))}
        batch |= {"masked_targets": ids("masked", n, P), "masked_weights": weights("maskedw", n, P)}
        batch |= {"segments": (np.arange(length)[None] > 2).astype(np.int32).repeat(n, axis=0)}
        batch |= {"next_sentence_labels": ids("next", n, high=2), "next_sentence_weights": np.ones(n, np.float32)}
    return batch


@functools.cache
def objectives_of(direction: str, samples: int = 0, sentences: bool = False):
    """The objective of a direction as configs name it, read with the toy tokenizer."""
    settings = {"causal": {}, "bidirectional": {"samples": samples}}
    settings["masked"] = {"mask": 0.8, "random": 0.1, "keep": 0.1, "whole_word": False, "static": False, "rate": 0.15}
    names = (OBJECTIVE_OF[direction], *(("next_sentence",) if sentences else ()))
    config = {"objectives": {name: {"coefficient": 1.0, **settings.get(name, {})} for name in names}}
    return make_objectives(ConfigDict(config), ToyTokenizer())


@functools.cache
def graph_of(architecture: str, direction: str, noise: bool, init: str = "fan_in", sentences: bool = False):
    settings = {"init": init, "dropout": 0.3 if noise else 0.0, "embedding_dropout": 0.2 if noise else 0.0}
    if architecture == "transformer":
        # GPT drops elements of the matrix itself: one mask for the whole batch, whatever the microbatches.
        settings |= {"attention_dropout": 0.3 if noise else 0.0}
        settings |= {"embedding_dropout_on": "matrix" if direction == "forward" else "sum"}
    names = (OBJECTIVE_OF[direction], *(("next_sentence",) if sentences else ()))
    return toy_graph(architecture, direction, names, **settings)


@functools.cache
def train_step(cell, optimizer, *, noise=False, microbatches=1, samples=0, sentences=False):
    objectives, coefficients = objectives_of(cell[1], samples, sentences)
    graph = graph_of(*cell, noise, sentences=sentences)
    return make_train_step(graph.bind, objectives, coefficients, optimizer, microbatches=microbatches)


@functools.cache
def _first_state(cell, optimizer, noise, carried, sentences):
    graph = graph_of(*cell, noise, sentences=sentences)
    params = exact_parameters(graph)
    return host(new_state(params, optimizer, graph.bind(params).initial_carry(B) if carried else {}))


def first_state(cell, optimizer, *, noise=False, carried=True, sentences=False):
    """A state of its own for every caller: steps donate it."""
    return jax.tree.map(jnp.array, _first_state(cell, optimizer, noise, carried, sentences))


def batch_of(direction: str, seed: int, **extra) -> dict:
    """Rows with very different sums of weights: dividing for each microbatch would show."""
    batch = toy_batch(direction, B, T, seed=seed, **extra)
    for name in batch:
        if name.endswith("_weights"):
            batch[name] = batch[name] * (np.arange(B) % 4 * 1.5 + 0.1).astype(np.float32)[:, None]
    return batch


def host(tree):
    return jax.tree.map(np.array, tree)


def run(step, state, batches):
    """(final state, metrics of every step) on the host."""
    metrics = []
    for batch in batches:
        state, numbers = step(state, batch)
        metrics.append(host(numbers))
    return host(state), metrics


# Parameters after a step are linear in the gradients, so equal parameters are equal gradients; Adam would blur that.
PLAIN = optax.sgd(1.0, momentum=0.5)


def assert_microbatches_are_the_batch(cell, batches, **options):
    """Measured: metrics agree to 2.2e-7, parameters, momenta and carry after three steps to 2.2e-6 (rates of 1)."""
    whole, expected = run(train_step(cell, PLAIN, noise=True, **options), first_state(cell, PLAIN, noise=True), batches)
    parts = train_step(cell, PLAIN, noise=True, microbatches=4, **options)
    got_state, got = run(parts, first_state(cell, PLAIN, noise=True), batches)
    for a, b in zip(expected, got, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, got_state)
    start = _first_state(cell, PLAIN, True, True, False)
    for (path, old), (_, new) in zip(paths_and_leaves(start.params), paths_and_leaves(whole.params), strict=True):
        # A bias on attention's keys shifts all scores of a query alike: its gradient is 0 but for rounding.
        assert np.abs(old - new).max() > 1e-4 or path.endswith("key/bias"), path
    assert parts.jitted._cache_size() == 1


# What a cell adds: GPT's dropped matrix, shared negatives, carried states. The rest is in `make test-full`.
FAST = (("transformer", "forward"), ("transformer", "both"), ("lstm", "both"))


@pytest.mark.parametrize(
    ("architecture", "direction"),
    [pytest.param(*cell, marks=() if cell in FAST else pytest.mark.slow) for cell in CELLS],
)
def test_microbatches_are_the_full_batch(architecture, direction):
    cell = (architecture, direction)
    options, extra = {}, {}
    if cell == ("transformer", "both"):
        # Sampled softmax: the negatives have no rows and must not be split.
        options = {"samples": 6}
        extra = {"shared": {"negatives": np.array([3, 0, 41, 7, 11, 2], np.int32), "tries": np.int32(9)}}
    if cell == ("lstm", "both"):
        assert {leaf.shape[0] for leaf in jax.tree.leaves(first_state(cell, PLAIN).carry)} == {B}
    assert_microbatches_are_the_batch(cell, [batch_of(direction, seed, **extra) for seed in range(3)], **options)


def test_dropout_is_new_at_every_step_and_off_in_evaluation():
    cell, batch = ("transformer", "full"), batch_of("full", 0)
    step = train_step(cell, PLAIN, noise=True)
    losses = []
    for number in (0, 1, 2, 2):
        state = dataclasses.replace(first_state(cell, PLAIN, noise=True), step=jnp.asarray(number, jnp.int32))
        losses.append(float(step(state, batch)[1]["loss"]))
    assert len(set(losses)) == 3
    assert losses[2] == losses[3]
    evaluate = make_eval_step(graph_of(*cell, True).bind, objectives_of("full")[0])
    params = first_state(cell, PLAIN, noise=True).params
    once, again = (host(evaluate(params, {}, batch)[0]) for _ in range(2))
    assert once == again
    assert evaluate._cache_size() == 1


# Steps that are skipped


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    cell = ("lstm", "both")
    step = train_step(cell, PLAIN, noise=True)
    good = [batch_of("both", seed) for seed in range(3)]
    broken = dict(good[1], bidirectional_weights=np.full((B, T), np.inf, np.float32))
    state, _ = step(first_state(cell, PLAIN, noise=True), good[0])
    before = host(state)
    after_bad, metrics = run(step, state, [broken, broken])
    for name in ("params", "opt", "carry"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after_bad, name))
    assert not any(np.isfinite(numbers["loss"]) for numbers in metrics)
    assert [int(numbers["skipped_in_a_row"]) for numbers in metrics] == [1, 2]
    assert (int(after_bad.step), after_bad.skipped.tolist()) == (3, [2, 2])
    after, metrics = run(step, jax.tree.map(jnp.asarray, after_bad), [good[2]])
    assert np.isfinite(metrics[0]["loss"])
    assert (int(after.step), after.skipped.tolist()) == (4, [2, 0])
    assert np.any(after.carry["forward"]["c"] != before.carry["forward"]["c"])
    assert step.jitted._cache_size() == 1


def test_seeds_rates_and_durations_share_one_program():
    """So that a sweep over them compiles once: their numbers are arguments of the program."""
    cell, text, losses = ("transformer", "forward"), set(), []
    objectives, coefficients = objectives_of("forward")
    graph, batches = graph_of(*cell, noise=False), [batch_of("forward", 0)] * 3
    for seed, changes, steps in ((0, {}, 50), (1, {"peak_lr": 3e-2}, 50), (0, {"warmup_steps": 2}, 80)):
        config = gpt.get_config("tiny").optimizer
        config.update({"peak_lr": 1e-2, "warmup_steps": 0} | changes)
        tx = make_optimizer(config, graph.shapes(), steps)
        numbers = schedule_numbers(config, steps)
        arguments = {"schedule_numbers": numbers.on_device()}
        step = make_train_step(graph.bind, objectives, coefficients, tx, seed=seed, optimizer_arguments=arguments)
        state = new_state(exact_parameters(graph), tx, {})
        text.add(step.lower(state, batches[0]).as_text())
        # The same as with the numbers in the program.
        constant = make_train_step(graph.bind, objectives, coefficients, tx, seed=seed)
        _, expected = run(constant, jax.tree.map(jnp.copy, state), batches)
        _, found = run(step, state, batches)
        assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-5)
        losses.append(float(found[-1]["loss"]))
    assert len(text) == 1
    assert len(set(losses)) == 3


class Root:
    """A model of one number whose loss sqrt(w) is 0 at 0, where its gradient is infinite."""

    def __init__(self, params):
        self.w, self.heads = params["w"], {}

    def __call__(self, batch, carry, key=None):
        return {"root": jnp.sqrt(self.w)}, carry

    name = "root"
    sums = staticmethod(lambda head, outputs, batch, key: {"root": outputs["root"]})
    weights = staticmethod(lambda batch: {"root": jnp.float32(1)})


def test_a_finite_loss_with_an_infinite_gradient_is_skipped():
    step = make_train_step(Root, [Root({"w": None})], {"root": 1.0}, PLAIN)
    state, metrics = step(new_state({"w": jnp.zeros(())}, PLAIN, {}), {"row": jnp.arange(2)})
    assert float(metrics["loss"]) == 0.0
    assert (float(state.params["w"]), state.skipped.tolist(), int(state.step)) == (0.0, [1, 1], 1)


def test_the_state_is_donated():
    cell = ("transformer", "forward")
    state = first_state(cell, PLAIN, noise=True)
    train_step(cell, PLAIN, noise=True)(state, batch_of("forward", 0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.step)))


# Learning


@cells
def test_initial_loss_is_that_of_guessing(architecture, direction):
    sentences = (architecture, direction) == ("transformer", "full")
    graph = graph_of(architecture, direction, False, "normal", sentences)
    evaluate = make_eval_step(graph.bind, objectives_of(direction, 0, sentences)[0])
    params = graph.init(jax.random.key(0))
    for seed in range(2):
        batch = {**batch_of(direction, seed), **sentence_fields(sentences)}
        sums, predictions, carry = evaluate(params, {}, batch)
        assert (predictions, carry) == ({}, {})
        for name, (total, weight) in sums.items():
            guessing = np.log(2) if name == "next_sentence" else np.log(VOCABULARY)
            assert name.endswith("accuracy") or abs(float(total / weight) - guessing) < 0.05, name
    assert evaluate._cache_size() == 1


def sentence_fields(wanted: bool) -> dict:
    if not wanted:
        return {}
    return {"next_sentence_labels": np.arange(B, dtype=np.int32) // 2 % 2, "next_sentence_weights": np.ones(B, "f")}


ADAM = optax.adam(2e-2)


def golden_numbers(cell) -> list[float]:
    """[loss, its gradient's norm, loss after one update of Adam] of a cell of the comparison, at toy size."""
    return learn(cell, 2)


def learn(cell, steps: int) -> list[float]:
    """[loss, gradient norm] of the first of some steps on one batch, and the losses of the others."""
    sentences = cell == ("transformer", "full")
    batch = {**exact_batch(cell[1], VOCABULARY, False, B, T), **sentence_fields(sentences)}
    step = train_step(cell, ADAM, sentences=sentences)
    state = first_state(cell, ADAM, carried=False, sentences=sentences)
    numbers = []
    for number in range(steps):
        state, metrics = step(state, batch)
        numbers += [float(metrics["loss"])] + [float(metrics["gradient_norm"])] * (number == 0)
    assert step.jitted._cache_size() == 1
    return numbers


def golden_numbers_of_a_paper(name: str, size: int = 300) -> list[float]:
    """The same of a paper's tiny preset with its update rule; the rate is fixed here, so that tuning moves nothing."""
    config = ConfigDict(PAPERS[name].get_config("tiny").to_dict())
    config.optimizer.warmup_steps, config.optimizer.peak_lr = 0, 0.2 if name == "elmo" else 2e-3
    graph = build(config, size, tuple(config.objectives), jnp.float32)
    objectives, coefficients = make_objectives(config, ToyTokenizer())
    tx = make_optimizer(config.optimizer, graph.shapes(), 100)
    step = make_train_step(graph.bind, objectives, coefficients, tx)
    params = exact_parameters(graph)
    carry = graph.bind(params).initial_carry(4)
    batch = exact_batch(config.model.direction, size, config.model.input == "characters")
    _, metrics = run(step, jax.jit(lambda p: new_state(p, tx, carry))(params), [batch] * 2)
    return [float(metrics[0]["loss"]), float(metrics[0]["gradient_norm"]), float(metrics[1]["loss"])]


PAPERS = {"elmo": elmo, "gpt": gpt, "bert": bert}
GOLDEN = {
    "transformer forward": [4.103854, 1.756618, 3.006598],
    "transformer both": [4.256968, 1.411286, 3.473304],
    "transformer full": [5.345941, 4.498005, 3.816339],
    "lstm forward": [3.96235, 0.4575615, 3.730039],
    "lstm both": [3.905832, 0.3461956, 3.635518],
    "lstm full": [3.902689, 0.6270626, 3.493773],
    "elmo": [5.768943, 13.16247, 5.691729],
    "gpt": [6.305154, 5.534813, 3.666977],
    "bert": [6.91011, 14.85452, 3.702145],
}


# Tolerance: other CPUs and versions add in another order (measured: 2e-6 between compiler options).


@cells
def test_a_cell_gives_its_golden_numbers_and_learns_one_batch_by_heart(architecture, direction):
    losses = learn((architecture, direction), 200)
    np.testing.assert_allclose(losses[:3], GOLDEN[f"{architecture} {direction}"], rtol=1e-4)
    assert losses[-1] < 0.1, losses[::20]


@pytest.mark.parametrize("name", list(PAPERS))
def test_a_paper_gives_its_golden_numbers(name):
    numbers = golden_numbers_of_a_paper(name)
    np.testing.assert_allclose(numbers, GOLDEN[name], rtol=1e-4)


if __name__ == "__main__":
    for cell in CELLS:
        print(f'    "{" ".join(cell)}": {[float(f"{x:.7g}") for x in golden_numbers(cell)]},', flush=True)
    for name in PAPERS:
        numbers = golden_numbers_of_a_paper(name)
        print(f'    "{name}": {[float(f"{x:.7g}") for x in numbers]},', flush=True)
