"""Training is theirs too: the original programs' losses, gradients, carried states and parameters after their steps.

The golden outputs were made by the authors' own code from seeded random weights. Everything here goes through this
project's objectives, optimizers and THE step. Gradients are what the step hands to its optimizer.

Left out, as the golden outputs' own description says: GPT's classifier bias and key biases after the steps. Their true
gradient is 0 (a softmax does not see a constant), and Adam makes steps out of the rounding noise.
"""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import common
from plm import weights
from plm.data.tokenizers import Tokenizer
from plm.models.graph import build
from plm.training import config as configs
from plm.training.objectives import Draw, make_objectives
from plm.training.optimizer import make_optimizer
from plm.training.sharding import paths_and_leaves
from plm.training.step import make_eval_step, make_train_step, new_state
from plm.weights import bert, bert_tf, elmo_hdf5, openai_npy

pytestmark = [pytest.mark.real_data, pytest.mark.usefixtures("quick_compiles")]
FORWARD = {"rtol": 1e-5, "atol": 1e-5}
GRADIENT = {"rtol": 1e-4, "atol": 1e-5}
# What the losses' own description gives for independent programs: paths within 2e-5, parameters within 2.5e-5.
AFTER_STEPS = {"rtol": 1e-5, "atol": 2.5e-5}


def gradients_recorded() -> optax.GradientTransformation:
    """An optimizer that moves nothing and keeps the gradients that the step gave it."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )


def compare(graph, found: dict, expected: dict, tolerance: dict, leave_out: str = "^$") -> None:
    """Compares parameters or gradients by logical name, without padding."""
    ours, theirs = (weights.logical_values(graph, jax.device_get(tree)) for tree in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        if re.search(leave_out, name):
            continue
        np.testing.assert_allclose(array, theirs[name], err_msg=name, **tolerance)


def padding(graph, tree: dict) -> float:
    """The largest number in rows that only pad a vocabulary."""
    named = dict(paths_and_leaves(jax.device_get(tree)))
    return max(float(np.abs(named[p.path][p.rows :]).max(initial=0)) for p in graph.parameters if p.rows is not None)


# ---------------------------------------------------------------------------------------------------------------- ELMo


@pytest.fixture(scope="module")
def elmo(real_data, tmp_path_factory):
    """(config, graph, params, objectives, coefficients, batches, folder) of the official biLM with its softmax."""
    folder = real_data / "oracles/elmo_bilm_train_tiny"
    copy = tmp_path_factory.mktemp("elmo")
    options = json.loads((folder / "options.json").read_text())
    # Words of 9 characters: what a reader of text refuses, and the model does not mind.
    options["char_cnn"]["max_characters_per_token"] = 50
    (copy / "options.json").write_text(json.dumps(options))
    shutil.copy(folder / "lm_weights.hdf5", copy / "weights.hdf5")
    words = ["<S>", "</S>", "<UNK>", *(f"w{i}" for i in range(50))]
    (copy / "vocab.txt").write_text("\n".join(words) + "\n")
    foreign = weights.read(copy)
    assert foreign.report.missing == foreign.report.left_over == ()
    graph = build(foreign.config, foreign.tokenizer.size, tuple(foreign.config.objectives), jnp.float32)
    objectives, coefficients = make_objectives(foreign.config, foreign.tokenizer)
    inputs = np.load(folder / "inputs.npz")
    batches = []
    for i in range(3):
        ahead, back = inputs[f"next_token_id_{i}"], inputs[f"next_token_id_reverse_{i}"]
        rows = {"next_tokens": ahead, "next_tokens_backward": back, "tokens_backward": back}
        (objective,) = objectives
        batch = objective.fields(rows, Draw(0, i, range(3)))
        batch |= {
            "characters": inputs[f"tokens_characters_{i}"] + 1,
            "characters_backward": inputs[f"tokens_characters_reverse_{i}"] + 1,
            "row": np.arange(3, dtype=np.int32),
        }
        batches.append(batch)
    return foreign.config, graph, foreign.params, objectives, coefficients, batches, folder


def state_by_name(carry: dict, i: int) -> dict[str, np.ndarray]:
    """Carried states under the official program's names; its h is the projected state."""
    return {
        f"final_state_{i}_{direction}_layer{layer}_{theirs}": np.asarray(carry[direction][ours])[:, layer]
        for direction in ("forward", "backward")
        for layer in range(2)
        for ours, theirs in (("c", "c"), ("m", "h"))
    }


def published_names(arrays) -> dict[str, np.ndarray]:
    """TensorFlow's names of variables -> those of the published files, which call them otherwise."""
    parts = (
        ("rnn/multi_rnn_cell/cell_", "RNN/MultiRNNCell/Cell"),
        ("lstm_cell/projection/kernel", "LSTMCell/W_P_0"),
        ("lstm_cell/kernel", "LSTMCell/W_0"),
        ("lstm_cell/bias", "LSTMCell/B"),
    )
    renamed = {}
    for name in arrays.files:
        new = name
        for old, published in parts:
            new = new.replace(old, published)
        renamed[new] = arrays[name]
    return renamed


def official_gradients(config, graph, folder) -> dict:
    with np.load(folder / "expected_grads_batch0.npz") as file:
        arrays = published_names(file)
    expected, report = weights.assemble(graph, elmo_hdf5.links(config), arrays, source=folder)
    assert report.left_over == ()
    return expected


def test_elmo_losses_gradients_and_carried_states(elmo):
    config, graph, params, objectives, coefficients, batches, folder = elmo
    expected = np.load(folder / "expected_forward.npz")
    step = make_train_step(graph.bind, objectives, coefficients, gradients_recorded())
    state = new_state(jax.device_put(params), gradients_recorded(), graph.bind(params).initial_carry(3))
    for i, batch in enumerate(batches):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], expected[f"total_loss_{i}"], **FORWARD)
        both = [metrics[f"bidirectional_{direction}"] for direction in ("forward", "backward")]
        np.testing.assert_allclose(both, expected[f"individual_losses_{i}"], **FORWARD)
        for name, array in state_by_name(state.carry, i).items():
            np.testing.assert_allclose(array, expected[name], err_msg=name, **FORWARD)
        if i == 0:
            compare(graph, state.opt, official_gradients(config, graph, folder), GRADIENT)
        assert padding(graph, state.opt) == 0


@pytest.mark.slow
def test_elmo_adagrad_update(elmo):
    """The official recipe from the official gradients: x 20, clipped at norm 10, Adagrad 0.2 from accumulator 1."""
    config, graph, params, objectives, coefficients, batches, folder = elmo
    expected = official_gradients(config, graph, folder)
    config = config.copy_and_resolve_references().unlock()
    settings = {"name": "adagrad", "peak_lr": 0.2, "schedule": "constant", "gradient_scale": 20.0, "clip_norm": 10.0}
    config.optimizer.update(settings)
    tx = make_optimizer(config.optimizer, graph.shapes(), total_steps=10)
    step = make_train_step(graph.bind, objectives, coefficients, tx)
    state, _ = step(new_state(jax.device_put(params), tx, graph.bind(params).initial_carry(3)), batches[0])
    scaled = jax.tree.map(lambda g: 20.0 * g.astype(np.float64), expected)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(scaled)))
    assert norm > 10  # so the clip is on
    clipped = jax.tree.map(lambda g: g * 10 / norm, scaled)
    after = jax.tree.map(lambda p, g: p - 0.2 * g / np.sqrt(1 + g**2), params, clipped)
    compare(graph, state.params, after, AFTER_STEPS)


# ----------------------------------------------------------------------------------------------------------------- GPT


@pytest.fixture(scope="module")
def gpt(real_data, tmp_path_factory):
    """(config, graph, params, objectives, coefficients, batch, links, folder): GPT as it fine-tunes on two choices."""
    folder = real_data / "oracles/gpt1/tiny_openai"
    settings = json.loads((folder / "config.json").read_text())
    copy = tmp_path_factory.mktemp("gpt") / "model"
    shutil.copytree(folder / "model", copy)
    (copy / openai_npy.HPARAMS).write_text(json.dumps({"n_head": settings["n_head"]}))
    pieces = ["<unk>", *(f"{i}</w>" for i in range(settings["n_vocab"] - 2)), "\n</w>"]
    (copy / openai_npy.ENCODER).write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (copy / openai_npy.MERGES).write_text("#version: 0.2\n")
    foreign = weights.read(copy)
    # The program that fine-tunes adds rows for start, delimiter and classify, and a classifier.
    arrays, extra = openai_npy.read_arrays(copy), np.load(folder / "extra_weights.npz")
    arrays["tokens"] = np.concatenate([arrays["tokens"], extra["special_rows"]])
    arrays |= {"clf/w": extra["clf_w"], "clf/b": extra["clf_b"]}
    links = [
        *openai_npy.links(settings["n_layer"]),
        weights.same("clf/w", "heads/choose/output/kernel"),
        weights.same("clf/b", "heads/choose/output/bias"),
    ]
    config = foreign.config.copy_and_resolve_references().unlock()
    config.model.update({"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0})
    config.model.positions_in_softmax = settings["n_ctx"]
    del config.objectives["causal"]
    configs.add_objective(config, "causal", coefficient=settings["lm_coef"], per_row=True)
    configs.add_objective(config, "choose", choices=2)
    configs.set_task(config, {"name": "storycloze"})
    config.data.layout = "task"
    config.batch_size = 6
    optimizer = settings["optimizer"]
    config.optimizer.update(
        {
            "name": "gpt_adam",
            "peak_lr": optimizer["lr"],
            "schedule": "openai_linear",
            "schedule_steps": optimizer["n_updates_total"],
            "warmup_steps": round(optimizer["lr_warmup"] * optimizer["n_updates_total"]),
            "b1": optimizer["b1"],
            "b2": optimizer["b2"],
            "eps": optimizer["e"],
            "weight_decay": optimizer["l2"],
            "decay": common.NO_DECAY_ON_BIAS_AND_NORM,  # vector_l2 is off
            "clip_norm": float(optimizer["max_grad_norm"]),
        }
    )
    configs.validate(config, complete=False)
    graph = build(config, settings["n_vocab"] + settings["n_special"], tuple(config.objectives), jnp.float32)
    params, report = weights.assemble(graph, links, arrays, source=copy)
    assert (report.missing, report.left_over) == ((), ())
    objectives, coefficients = make_objectives(config, foreign.tokenizer)
    inputs = np.load(folder / "inputs.npz")
    tokens, mask = inputs["X"][..., 0].reshape(6, -1), inputs["M"].reshape(6, -1)
    length = mask.sum(axis=1).astype(np.int32)
    assert (np.take_along_axis(tokens, length[:, None] - 1, axis=1) == settings["special_ids"]["_classify_"]).all()
    following = np.full_like(tokens, -1)
    following[:, :-1] = np.where(mask[:, 1:] > 0, tokens[:, 1:], -1)
    rows = {"tokens": tokens, "length": length, "next_tokens": following, "labels": np.repeat(inputs["Y"], 2)}
    batch = dict(rows, row=np.arange(6, dtype=np.int32))
    del batch["next_tokens"]
    for objective in objectives:
        batch |= objective.fields(rows, Draw(0, 0, range(6)))
    return config, graph, params, objectives, coefficients, batch, links, folder


def gpt_tree(graph, links, file, folder) -> dict:
    """The parameters of a file of the program's variables, in whose one matrix the positions stand last."""
    arrays = {name.removeprefix("model/"): file[name] for name in file.files if name != "losses"}
    n_positions = graph.bind(graph.shapes()).embedding.positions.size
    arrays["tokens"], arrays["positions"] = np.split(arrays.pop("we"), [-n_positions])
    tree, report = weights.assemble(graph, links, arrays, source=folder)
    assert (report.missing, report.left_over) == ((), ())
    return tree


def test_gpt_hidden_states_and_logits_of_tokens_and_positions(gpt):
    _, graph, params, _, _, batch, _, folder = gpt
    expected = np.load(folder / "expected_forward.npz")

    def program(params):
        # Like the program: padding is read too, no row sees what follows.
        model = graph.bind(params)
        outputs, _ = model({"tokens": batch["tokens"]}, {}, layers=True)
        table, bias = model.heads["causal"].parameters(outputs["table"])
        return outputs["layers"], outputs["hidden"] @ table.T + bias[None, None]

    layers, logits = jax.jit(program)(params)
    for layer, hidden in enumerate(layers):
        np.testing.assert_allclose(hidden, expected[f"hidden_{layer}"], **FORWARD)
    n_positions = 20
    tokens, hidden_rows, positions = np.split(logits, [100, -n_positions], axis=-1)
    np.testing.assert_allclose(np.concatenate([tokens, positions], -1), expected["lm_logits"], **FORWARD)
    assert (hidden_rows <= -1e29).all()


@pytest.mark.slow
def test_gpt_losses_of_each_sequence_and_example(gpt):
    _, graph, params, objectives, _, batch, _, folder = gpt
    expected = np.load(folder / "expected_forward.npz")
    evaluate = make_eval_step(graph.bind, objectives)
    for row in range(6):
        alone = dict(batch, causal_weights=batch["causal_weights"] * (np.arange(6) == row)[:, None])
        alone["choose_weights"] = batch["choose_weights"] * (np.arange(6) // 2 == row // 2)
        sums, _, _ = evaluate(params, {}, alone)
        means = {name: float(total / weight) for name, (total, weight) in sums.items()}
        np.testing.assert_allclose(means["causal"], expected["lm_losses"][row], **FORWARD)
        np.testing.assert_allclose(means["choose"], expected["clf_losses"][row // 2], **FORWARD)
    model = graph.bind(params)
    outputs, _ = model(batch, {})
    scores = model.heads["choose"].of_rows(outputs, batch, None, None)
    np.testing.assert_allclose(scores.reshape(3, 2), expected["clf_logits"], **FORWARD)


def test_gpt_gradients(gpt):
    _, graph, params, objectives, coefficients, batch, links, folder = gpt
    with np.load(folder / "expected_grads.npz") as file:
        expected = gpt_tree(graph, links, file, folder)
    step = make_train_step(graph.bind, objectives, coefficients, gradients_recorded())
    state, metrics = step(new_state(jax.device_put(params), gradients_recorded(), {}), batch)
    np.testing.assert_allclose(metrics["loss"], np.load(folder / "expected_forward.npz")["total_loss"], **FORWARD)
    compare(graph, state.opt, expected, GRADIENT)
    assert padding(graph, state.opt) == 0


def test_gpt_six_steps(gpt):
    config, graph, params, objectives, coefficients, batch, links, folder = gpt
    with np.load(folder / "expected_after_6_steps.npz") as file:
        expected, losses = gpt_tree(graph, links, file, folder), file["losses"]
    tx = make_optimizer(config.optimizer, graph.shapes(), total_steps=20)
    step = make_train_step(graph.bind, objectives, coefficients, tx)
    state = new_state(jax.device_put(params), tx, {})
    for loss in losses:
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5, atol=2e-5)
    compare(graph, state.params, expected, AFTER_STEPS, leave_out="key/bias|choose/output/bias")


# ---------------------------------------------------------------------------------------------------------------- BERT


def bert_of(folder, activation: str):
    """(config, graph, links, objectives, coefficients, batch) of the official pretraining program, dropout off."""
    values = json.loads((folder / "bert_config.json").read_text()) | {"hidden_act": activation}
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = specials + [f"w{i}" for i in range(values["vocab_size"] - len(specials))]
    roles = {name.strip("[]").lower(): i for i, name in enumerate(specials)}
    tokenizer = Tokenizer("wordpiece", vocabulary, roles)
    model = bert.model_settings(values, folder, bert_tf.ACTIVATIONS)
    names = ("masked", "next_sentence")
    config = weights.describe(tokenizer, "pairs", 24, model, names).copy_and_resolve_references().unlock()
    graph = build(config, tokenizer.size, names, jnp.float32)
    objectives, coefficients = make_objectives(config, tokenizer)
    inputs = np.load(folder / "inputs.npz")
    batch = {
        "tokens": inputs["input_ids"],
        "segments": inputs["segment_ids"],
        "length": inputs["input_mask"].sum(axis=1).astype(np.int32),
        "masked_positions": inputs["masked_lm_positions"],
        "masked_targets": inputs["masked_lm_ids"],
        "masked_weights": inputs["masked_lm_weights"],
        "next_sentence_labels": inputs["next_sentence_labels"][:, 0],
        "row": np.arange(4, dtype=np.int32),
    }
    batch |= objectives[1].fields(batch, Draw(0, 0, range(4)))
    return config, graph, bert.links(bert.TENSORFLOW, model["layers"], names), objectives, coefficients, batch


def bert_tree(graph, links, path) -> dict:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "losses"}
    tree, report = weights.assemble(graph, links, arrays, source=path)
    assert (report.missing, report.left_over) == ((), ())
    return tree


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "infix"), [("gelu", ""), ("gelu_erf", "_erf_gelu")])
def test_bert_losses_and_gradients(real_data, activation, infix):
    folder = real_data / "oracles/bert/tiny_google"
    _, graph, links, objectives, coefficients, batch = bert_of(folder, activation)
    params = bert_tree(graph, links, folder / "weights.npz")
    expected = np.load(folder / f"expected_forward{infix}.npz")
    step = make_train_step(graph.bind, objectives, coefficients, gradients_recorded())
    state, metrics = step(new_state(jax.device_put(params), gradients_recorded(), {}), batch)
    np.testing.assert_allclose(metrics["masked"], expected["mlm_loss"], **FORWARD)
    np.testing.assert_allclose(metrics["next_sentence"], expected["nsp_loss"], **FORWARD)
    compare(graph, state.opt, bert_tree(graph, links, folder / f"expected_grads{infix}.npz"), GRADIENT)
    assert padding(graph, state.opt) == 0


def test_bert_five_steps(real_data):
    folder = real_data / "oracles/bert/tiny_google"
    config, graph, links, objectives, coefficients, batch = bert_of(folder, "gelu")
    settings = json.loads((folder / "train_steps.json").read_text())
    config.optimizer.update(
        {
            "name": "bert_adam",
            "peak_lr": settings["init_lr"],
            "schedule": "bert_linear",
            "schedule_steps": settings["num_train_steps"],
            "warmup_steps": settings["num_warmup_steps"],
            "b1": settings["beta1"],
            "b2": settings["beta2"],
            "eps": settings["epsilon"],
            "weight_decay": settings["weight_decay_rate"],
            "decay": common.NO_DECAY_ON_BIAS_AND_NORM,
            "clip_norm": settings["clip_global_norm"],
        }
    )
    tx = make_optimizer(config.optimizer, graph.shapes(), total_steps=8)
    step = make_train_step(graph.bind, objectives, coefficients, tx)
    state = new_state(jax.device_put(bert_tree(graph, links, folder / "weights.npz")), tx, {})
    for loss in settings["losses_before_each_step"]:
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5, atol=2e-5)
    compare(graph, state.params, bert_tree(graph, links, folder / "expected_after_5_steps.npz"), AFTER_STEPS)
