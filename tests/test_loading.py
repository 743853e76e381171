"""A loaded model reads text as it was trained to: framed, aligned, padded without effect, and refused in one line."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.models import one_piece

import plm
from plm.errors import UserError
from plm.inference.model import load
from plm.training import checkpoint
from plm.training import config as configs
from plm.training.optimizer import make_optimizer
from plm.training.step import new_state

TEXTS = [
    "Bakelimo ramose, bali!",
    "",
    "Mo zazu ra.",
    "keli " * 3 + "xyzzy",
]


pytestmark = pytest.mark.usefixtures("quick_compiles")


def run(model, batch, head=None):
    """All layers, and the head's logits at every position, of one batch as it is."""

    def program(params):
        module = model.graph.bind(params)
        outputs, _ = module(batch, {}, layers=True)
        return outputs["layers"], module.heads[head].logits(outputs["hidden"]) if head else None

    return jax.jit(program)(model.params)


def by_hand(model, words: list[str]) -> np.ndarray:
    """All layers [L, pieces, features] of one text, in the row that the model's pretraining would make of it."""
    tokenizer, roles = model.tokenizer, model.tokenizer.roles
    (ids,), extra = tokenizer.encode_open([" ".join(words)])
    kind = tokenizer.kind
    frame = {"wordpiece": ("cls", "sep"), "words": ("bos", "eos")}.get(kind)
    if frame:
        ids = [roles[frame[0]], *ids, roles[frame[1]]]
    batch = {"tokens": jnp.array([ids])}
    if kind == "words":
        rows = np.concatenate([tokenizer.character_rows(), tokenizer.character_rows(extra)])
        batch = {"characters": jnp.array(rows[ids].astype(np.int32) + 1)[None]}
    if kind == "wordpiece":
        batch["segments"] = jnp.zeros((1, len(ids)), jnp.int32)
    layers = run(model, batch)[0][:, 0]
    return np.asarray(layers[:, 1:-1] if frame else layers)


@pytest.mark.parametrize("name", ["elmo", "gpt", "bert", "masked"])
def test_embed_is_the_model_on_the_framed_text_alone(models, name):
    """Sorting, padding, batches and ELMo's words-once leave no trace; unknown words keep their spelling."""
    model = models[name]
    subwords, words = model.embed(TEXTS, "all", "subwords"), model.embed(TEXTS, "all")
    assert [len(pieces) for pieces in model.tokenize(TEXTS)] == [v.shape[1] for v in subwords]
    assert subwords[1].shape == words[1].shape == (model.n_layers, 0, words[0].shape[2])
    for text, pieces, pooled in zip(TEXTS, subwords, words, strict=True):
        assert pooled.dtype == np.float32
        at = 0
        for unit, word in enumerate(text.split()):
            n = len(model.tokenizer.encode([word])[0])
            assert np.abs(pooled[:, unit] - pieces[:, at : at + n].mean(axis=1)).max() < 1e-6
            at += n
        assert at == pieces.shape[1]
    wanted = by_hand(model, TEXTS[3].split())
    assert np.abs(subwords[3] - wanted).max() < 2e-5 * np.abs(wanted).max()
    if name == "elmo":
        other = model.embed([*TEXTS[:3], "keli keli keli xyzzx"], "all")[3]
        assert np.abs(other[0, 3] - words[3][0, 3]).max() > 1e-3, "an unknown word is read by its characters"


def test_pooling_and_words_of_which_nothing_is_left(models):
    text = ["bakelimoramose", "\u200b", "keli"]
    model = models["bert"]
    pieces = model.embed([text], units="subwords")[0]
    n = len(pieces) - len(model.tokenize([["keli"]])[0])
    assert n > 1
    for pooling, wanted in (("mean", pieces[:n].mean(0)), ("first", pieces[0]), ("last", pieces[n - 1])):
        vectors = model.embed([text], pooling=pooling)[0]
        assert np.allclose(vectors[0], wanted, atol=1e-6)
        assert not vectors[1].any()
        assert np.allclose(vectors[2], model.embed([text], pooling=pooling, layers=[-1])[0][0, 2])


def test_a_given_word_is_one_unit(models):
    model = models["elmo"]
    assert len(model.tokenize(["don't stop."])[0]) == 4
    assert len(model.tokenize([["don't", "stop."]])[0]) == 2
    assert model.embed([["don't", "stop."]])[0].shape == model.embed(["don't stop."])[0].shape


@pytest.mark.parametrize("name", ["bert", "masked"])
def test_fill_mask_gives_the_softmax_at_the_mask(models, name):
    model, tokenizer = models[name], models[name].tokenizer
    (first, second), (alone,) = model.fill_mask(["keli [MASK], ra [MASK].", "Bake [MASK] keli"], top_k=999)
    assert abs(sum(share for _, share in alone) - 1) < 1e-6
    assert first != second
    # The text with a one-piece word in the mask's place has the same ids but for that one.
    word = one_piece(model)
    (ids,) = tokenizer.encode([f"keli {word}, ra {word}."])
    places = [at for at, i in enumerate(ids) if i == tokenizer.encode([word])[0][0]][-2:]
    for at in places:
        ids[at] = tokenizer.role("mask")
    inputs, shift = {"tokens": jnp.array([ids])}, 0
    if name == "bert":
        shift, ids = 1, [tokenizer.role("cls"), *ids, tokenizer.role("sep")]
        inputs = {"tokens": jnp.array([ids]), "segments": jnp.zeros((1, len(ids)), jnp.int32)}
    scores = np.array(run(model, inputs, "masked")[1][0], np.float64)
    scores[:, list(tokenizer.roles.values())] = -np.inf
    for place, guesses in zip(places, (first, second), strict=True):
        shares = np.exp(scores[place + shift] - scores[place + shift].max())
        shares /= shares.sum()
        assert np.allclose([share for _, share in guesses], np.sort(shares)[::-1][: len(guesses)], atol=1e-5)
        top = int(scores[place + shift].argmax())
        assert guesses[0][0].strip() == (tokenizer.decode([top]) if name == "masked" else tokenizer.pieces([top])[0])


def test_a_checkpoint_comes_back_and_a_wrong_one_is_refused(workdirs, models):
    folder, model = workdirs["gpt"], models["gpt"]
    tx = make_optimizer(model.config.optimizer, model.graph.shapes(), 10)
    params = jax.tree.map(lambda leaf: leaf + 1, model.params)
    with checkpoint.Checkpoints(folder / "checkpoints", keep=2, keep_at=(), every_steps=1) as saved:
        for step, tree in ((3, params), (4, model.params)):
            state = new_state(tree, tx, {})
            saved.save(dataclasses.replace(state, step=jnp.int32(step)), step, force=True)
        saved.wait()
    begun = load(folder, random=True)
    key = jax.random.key(model.config.seeds.init)
    initial = model.graph.init(key)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (begun.params, initial)), strict=True))
    loaded = plm.load(f"{folder}@3")
    assert loaded.step == 3
    assert plm.load(folder).step == 4
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (loaded.params, params)), strict=True))
    with pytest.raises(UserError, match="no checkpoint of step 9; it has 3, 4"):
        load(f"{folder}@9")
    config = configs.from_json((folder / "config.json").read_text()).unlock()
    config.model.mlp_width = 24
    (folder / "config.json").write_text(configs.to_json(config))
    with pytest.raises(UserError, match=r"parameter blocks/\S+ is .* in the checkpoint and .*24"):
        load(folder)


def test_what_a_model_cannot_do_is_said_in_one_line(models, tmp_path):
    gpt_model, bert_model = models["gpt"], models["bert"]
    long = " ".join([one_piece(gpt_model)] * 50)
    for call, words in (
        (lambda: bert_model.generate("keli"), "cannot continue a text"),
        (lambda: gpt_model.fill_mask("keli [MASK]"), "cannot fill masks"),
        (lambda: bert_model.fill_mask("keli"), r"has no \[MASK\]"),
        (lambda: bert_model.fill_mask(long + " [MASK]"), "at most 40"),
        (lambda: gpt_model.embed("keli"), "must be a list"),
        (lambda: gpt_model.embed([[1, 2]]), "lists of int"),
        (lambda: gpt_model.embed(["keli"], layers=5), "from -3 to 2"),
        (lambda: gpt_model.embed(["keli"], units="lines"), "'words' or 'subwords'"),
        (lambda: load(tmp_path), "no weights that are known here"),
        (lambda: load(f"{tmp_path}@last"), "must be the step"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_importing_the_package_loads_no_jax():
    code = "import sys, plm; plm.load; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
