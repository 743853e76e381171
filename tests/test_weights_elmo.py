"""ELMo's own files: the official numbers, stateful and in order; round trips; what contradicts or is damaged."""

import json
import shutil

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import plm
from plm import weights
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.inference.model import Model, load
from plm.models.graph import build
from plm.models.scalar_mix import ScalarMix, mix
from plm.training import config as configs
from plm.weights import elmo_hdf5

TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}
OPTIONS = {
    "lstm": {
        "use_skip_connections": True,
        "projection_dim": 6,
        "cell_clip": 3,
        "proj_clip": 3,
        "dim": 10,
        "n_layers": 2,
    },
    "char_cnn": {
        "activation": "relu",
        "filters": [[1, 4], [3, 5]],
        "n_highway": 1,
        "embedding": {"dim": 3},
        "n_characters": 262,
        "max_characters_per_token": 50,
    },
}


pytestmark = pytest.mark.usefixtures("quick_compiles")


def with_options(**changes) -> dict:
    """OPTIONS with `lstm__dim=8` and the like."""
    options = json.loads(json.dumps(OPTIONS))
    for key, value in changes.items():
        node, *rest = key.split("__")
        if rest:
            options[node][rest[0]] = value
        else:
            options[node] = value
    return options


def drawn_arrays(options: dict, scale: float = 0.3) -> dict[str, np.ndarray]:
    """Seeded arrays under the official names, in the shapes that the official program gives its variables."""
    rng = np.random.default_rng(0)
    lstm, cnn = options["lstm"], options["char_cnn"]
    cells, out, filters = lstm["dim"], lstm["projection_dim"], cnn["filters"]
    total = sum(n for _, n in filters)
    shapes = {"char_embed": (261, cnn["embedding"]["dim"])}
    for i, (width, n) in enumerate(filters):
        shapes |= {f"CNN/W_cnn_{i}": (1, width, cnn["embedding"]["dim"], n), f"CNN/b_cnn_{i}": (n,)}
    for i in range(cnn.get("n_highway", 0)):
        for name in ("carry", "transform"):
            shapes |= {f"CNN_high_{i}/W_{name}": (total, total), f"CNN_high_{i}/b_{name}": (total,)}
    if total != out:
        shapes |= {"CNN_proj/W_proj": (total, out), "CNN_proj/b_proj": (out,)}
    for direction in range(2):
        for layer in range(lstm["n_layers"]):
            cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            shapes |= {f"{cell}/W_0": (2 * out, 4 * cells), f"{cell}/B": (4 * cells,)}
            if out != cells:
                shapes[f"{cell}/W_P_0"] = (cells, out)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def write_files(folder, options: dict, arrays: dict, prefix: str = ""):
    folder.mkdir(exist_ok=True)
    (folder / f"{prefix}options.json").write_text(json.dumps(options))
    with h5py.File(folder / f"{prefix}weights.hdf5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return folder


def official_forward(options: dict, arrays: dict, ids: np.ndarray) -> np.ndarray:
    """float64 [layers + 1, T, 2 out]: bilm-tf's program for one sentence (shifted ids [T, 50]), zero state."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    lstm, cnn = options["lstm"], options["char_cnn"]
    cells, out = lstm["dim"], lstm["projection_dim"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    x = np.concatenate([np.zeros((1, cnn["embedding"]["dim"])), arrays["char_embed"]])[ids]
    pooled = []
    for i, (width, _) in enumerate(cnn["filters"]):
        kernel, bias = arrays[f"CNN/W_cnn_{i}"][0], arrays[f"CNN/b_cnn_{i}"]
        windows = np.stack([x[:, at : at + width] for at in range(50 - width + 1)], axis=1)
        activation = np.tanh if cnn["activation"] == "tanh" else lambda y: np.maximum(y, 0)
        pooled.append(activation((np.einsum("tpwd,wdn->tpn", windows, kernel) + bias).max(axis=1)))
    x = np.concatenate(pooled, axis=-1)
    for i in range(cnn.get("n_highway", 0)):
        part = {
            name: x @ arrays[f"CNN_high_{i}/W_{name}"] + arrays[f"CNN_high_{i}/b_{name}"]
            for name in ("carry", "transform")
        }
        gate = sigmoid(part["carry"])
        x = gate * np.maximum(part["transform"], 0) + (1 - gate) * x
    if "CNN_proj/W_proj" in arrays:
        x = x @ arrays["CNN_proj/W_proj"] + arrays["CNN_proj/b_proj"]
    layers = [np.concatenate([x, x], axis=-1)]
    towers = []
    for direction in range(2):
        inputs, outputs = (x if direction == 0 else x[::-1]), []
        for layer in range(lstm["n_layers"]):
            cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            c, m, run = np.zeros(cells), np.zeros(out), []
            for x_t in inputs:
                i, j, f, o = np.split(np.concatenate([x_t, m]) @ arrays[f"{cell}/W_0"] + arrays[f"{cell}/B"], 4)
                c = np.clip(sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j), -lstm["cell_clip"], lstm["cell_clip"])
                m = sigmoid(o) * np.tanh(c)
                if out != cells:
                    m = np.clip(m @ arrays[f"{cell}/W_P_0"], -lstm["proj_clip"], lstm["proj_clip"])
                run.append(m)
            skip = inputs if lstm["use_skip_connections"] and layer else 0
            inputs = np.stack(run) + skip
            outputs.append(inputs if direction == 0 else inputs[::-1])
        towers.append(outputs)
    return np.stack(layers + [np.concatenate(pair, axis=-1) for pair in zip(*towers, strict=True)])


VARIANTS = {
    "published": {},
    "no skip connections": {"lstm__use_skip_connections": False, "lstm__cell_clip": 0.2, "lstm__proj_clip": 0.3},
    "no projections, no highways": {"lstm__dim": 9, "lstm__projection_dim": 9, "char_cnn__n_highway": 0},
    "tanh, three layers": {"char_cnn__activation": "tanh", "lstm__n_layers": 3, "char_cnn__n_highway": 2},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_files_give_the_vectors_of_the_official_program(changes, tmp_path):
    options = with_options(**changes)
    arrays = drawn_arrays(options)
    model = load(str(write_files(tmp_path, options, arrays, prefix="elmo_2x10_")))
    assert (model.report.missing, model.report.left_over, model.tokenizer.size) == ((), (), 3)
    words = ["An", "é", "of", "<UNK>", "play", "."]
    spelled = model.tokenizer.character_rows().astype(np.int32)
    ids = np.concatenate([spelled[:1], model.tokenizer.character_rows(words), spelled[1:2]]).astype(np.int32) + 1
    expected = official_forward(options, arrays, ids)[:, 1:-1]
    np.testing.assert_allclose(model.embed([words], layers="all")[0], expected, atol=2e-6, rtol=1e-5)


def test_what_is_written_is_read_back_exactly(tmp_path):
    first = load(str(write_files(tmp_path / "a", with_options(), drawn_arrays(OPTIONS))))
    elmo_hdf5.write(first, tmp_path / "b")
    again = load(str(tmp_path / "b"))
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    assert again.config == first.config
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    with h5py.File(tmp_path / "a/weights.hdf5") as a, h5py.File(tmp_path / "b/weights.hdf5") as b:
        for name, array in drawn_arrays(OPTIONS).items():
            np.testing.assert_array_equal(b[name], a[name])
            np.testing.assert_array_equal(b[name], array)


def own_model(tmp_path, **settings):
    """A model of ours as a run would leave it, its vocabulary and softmax included."""
    words = ["<S>", "</S>", "<UNK>", "the", "play", "was", "good"]
    tokenizer = Tokenizer("words", words, {"bos": 0, "eos": 1, "unk": 2})
    config = configs.base()
    configs.apply(config, {"data.layout": "lanes", "data.tokenizer.kind": "words", "total_steps": 1})
    model = {
        "architecture": "lstm",
        "direction": "both",
        "input": "characters",
        "width": 6,
        "layers": 2,
        "tied": False,
        "head_bias": True,
        "lstm.cells": 10,
        "lstm.projection": 6,
        "lstm.cell_clip": 3.0,
        "characters.dim": 3,
        "characters.filters": ((1, 4), (3, 5)),
        "characters.highways": 1,
    }
    if settings.get("architecture") == "transformer":
        model = {key: value for key, value in model.items() if not key.startswith("lstm.")} | {"heads": 2}
    if settings.get("input") == "tokens":
        model = {key: value for key, value in model.items() if not key.startswith("characters.")}
    configs.set_model(config, model | settings)
    if config.model.direction == "both":
        configs.add_objective(config, "bidirectional")
    elif config.model.direction == "forward":
        configs.add_objective(config, "causal")
    config = configs.resolve(config)
    graph = build(config, tokenizer.size, tuple(config.objectives), jnp.float32)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), graph.shapes())
    return Model(config, tokenizer, graph, params, 0, str(tmp_path))


def test_a_model_trained_here_keeps_its_softmax_and_its_vocabulary(tmp_path):
    ours = own_model(tmp_path)
    elmo_hdf5.write(ours, tmp_path / "out")
    assert (tmp_path / "out/vocab.txt").read_text() == "<S>\n</S>\n<UNK>\nthe\nplay\nwas\ngood\n"
    again = load(str(tmp_path / "out"))
    assert again.tokenizer.fingerprint == ours.tokenizer.fingerprint
    theirs, mine = (weights.logical_values(model.graph, model.params) for model in (again, ours))
    assert theirs.keys() == mine.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(theirs[name], array)
    # As the official programs have it, with the vocabulary's file alone.
    for name in ("tokenizer.json", "tokenizer_settings.json"):
        (tmp_path / "out" / name).unlink()
    bare = load(str(tmp_path / "out"))
    assert bare.tokenizer.vocabulary == ours.tokenizer.vocabulary
    assert bare.tokenizer.pretokenized
    (tmp_path / "out/vocab.txt").unlink()
    with pytest.raises(UserError, match=r"the vocabulary has 3 entries and the embedding 7 rows"):
        load(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "tokens"}, "model.input='tokens'"),
        ({"architecture": "transformer", "direction": "forward"}, "model.architecture='transformer'"),
        ({"direction": "forward"}, "model.direction='forward'"),
        ({"tied": True}, "model.tied=True"),
        ({"embedding_norm": True}, "model.embedding_norm=True"),
        ({"head_bias": False}, "model.head_bias=False"),
    ],
)
def test_models_that_the_format_cannot_hold_are_refused(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        elmo_hdf5.write(own_model(tmp_path, **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (with_options(lstm__n_layers=3), "options.json contradicts .*weights.hdf5: .*Cell2/LSTMCell/W_0"),
        (with_options(lstm__n_layers=1), "contradicts .*Cell1.*which the options leave no place for"),
        (with_options(lstm__dim=12), r"contradicts .*LSTMCell/B is \[40\] and the options make it \[48\]"),
        (with_options(char_cnn__filters=[[1, 4], [2, 5]]), r"W_cnn_1 is \[1, 3, 3, 5\]"),
        (with_options(char_cnn__n_highway=0), "CNN_high_0/.*, which the options leave no place for"),
        (with_options(lstm__dim=5), "lstm.projection_dim=6 must be at most lstm.dim=5"),
        (with_options(char_cnn__activation="selu"), "char_cnn.activation='selu' must be 'relu' or 'tanh'"),
        (with_options(char_cnn__max_characters_per_token=40), "max_characters_per_token=40 must be 50"),
        (with_options(char_cnn__n_characters=300), "n_characters=300 must be 261 or 262"),
        (with_options(char_cnn__filters=[[1]]), r"char_cnn.filters=\[\[1\]\] must be"),
        (with_options(lstm=None), "lstm.dim=None must be a whole number"),
        ([1], "holds no options of a biLM"),
    ],
)
def test_options_that_are_wrong_or_contradict_the_weights(options, message, tmp_path):
    write_files(tmp_path, options, drawn_arrays(OPTIONS))
    with pytest.raises(UserError, match=message) as error:
        weights.read(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_files_are_one_line(tmp_path):
    arrays = drawn_arrays(OPTIONS)
    write_files(tmp_path, OPTIONS, arrays)
    whole = (tmp_path / "weights.hdf5").read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 8):
        (tmp_path / "weights.hdf5").write_bytes(whole[:keep])
        with pytest.raises(
            UserError, match=r"weights.hdf5 cannot be read as HDF5, it is damaged or cut short"
        ) as error:
            weights.read(tmp_path)
        assert "\n" not in str(error.value)
    write_files(tmp_path, OPTIONS, arrays | {"char_embed": np.zeros((261, 3), np.int32)})
    with pytest.raises(UserError, match="char_embed holds int32"):
        weights.read(tmp_path)
    (tmp_path / "options.json").write_text('{"lstm": ')
    with pytest.raises(UserError, match=r"options.json cannot be read as JSON"):
        weights.read(tmp_path)
    write_files(tmp_path, OPTIONS, arrays)
    shutil.copy(tmp_path / "weights.hdf5", tmp_path / "other_weights.hdf5")
    with pytest.raises(UserError, match=r"other_weights.hdf5, weights.hdf5 could all be meant"):
        weights.read(tmp_path)


def test_the_mix_is_learned_and_leaves_out_what_is_masked():
    rng = np.random.default_rng(0)
    layers = jnp.asarray(rng.normal(size=(3, 2, 5, 4)), jnp.float32)
    mask = np.arange(5)[None] < np.array([[5], [3]])
    module = ScalarMix(3)
    np.testing.assert_allclose(module(layers), layers.mean(axis=0), atol=1e-6)
    mixed = mix(layers, jnp.array([0.1, 0.3, 0.5]), 2.0, mask)
    shares = np.array([0.2693075, 0.3289329, 0.4017596])  # the softmax of these weights, to seven places
    np.testing.assert_allclose(mixed[1, :3], 2 * np.einsum("l,ltf->tf", shares, layers[:, 1, :3]), atol=1e-6)
    assert not mixed[1, 3:].any()
    # With layer norm what is masked takes no part in the statistics.
    changed = layers.at[:, 1, 3:].set(100.0)
    normed = mix(layers, jnp.zeros(3), 1.0, mask, layer_norm=True)
    np.testing.assert_array_equal(mix(changed, jnp.zeros(3), 1.0, mask, layer_norm=True), normed)
    one = mix(layers[:1], jnp.zeros(1), 1.0, mask, layer_norm=True)[mask]
    np.testing.assert_allclose([one.mean(), one.var()], [0, 1], atol=1e-6)


# ------------------------------------------------------------------------------------------------ the official fixtures


def rows_of(tokenizer, sentences: list[list[str]], width: int = 0) -> dict:
    """A batch of sentences between their markers, as the official batcher makes it; at least `width` wide."""
    markers = tokenizer.character_rows()
    width = max(width, max(map(len, sentences)) + 2)
    characters = np.zeros((len(sentences), width, 50), np.int32)
    for row, words in zip(characters, sentences, strict=True):
        spelled = np.concatenate([markers[:1], tokenizer.character_rows(words), markers[1:2]])
        row[: len(spelled)] = spelled.astype(np.int32) + 1
    return {"characters": characters, "length": np.array([len(words) + 2 for words in sentences], np.int32)}


@pytest.mark.real_data
def test_official_vectors_stateful_and_in_order(real_data):
    folder = real_data / "oracles/elmo_bilm_tf"
    model = plm.load(str(folder))
    sentences = [
        [s.split() for s in part] for part in json.loads((folder / "lm_embeddings_sentences.json").read_text())
    ]
    files = [h5py.File(folder / f"lm_embeddings_{row}.hdf5") for row in range(3)]
    run = jax.jit(lambda params, batch, carry: model.graph.bind(params)(batch, carry, layers=True))
    carry = model.graph.bind(model.params).initial_carry(3)
    width = max(len(words) for part in sentences for words in part) + 2  # one shape, one compile
    for i in range(10):
        batch = [part[i] for part in sentences]
        outputs, carry = run(model.params, rows_of(model.tokenizer, batch, width), carry)
        for row, words in enumerate(batch):
            ahead, back = np.split(np.asarray(outputs["layers"])[-1, row, 1 : len(words) + 1], 2, axis=-1)
            np.testing.assert_allclose(np.stack([ahead, back]), files[row][str(i)], **TOLERANCE)
            if i == 0:  # fresh states are the official program's before its first batch
                fresh = model.embed([words], layers=-1)[0]
                np.testing.assert_allclose(fresh, np.concatenate([*files[row]["0"]], axis=-1), **TOLERANCE)


@pytest.mark.real_data
def test_official_mixes_of_layers(real_data):
    folder = real_data / "oracles/elmo_bilm_tf"
    model = plm.load(str(folder))
    expected = np.load(folder / "weighted_layers_expected.npz")
    sentences = [text.split() for text in ("The first sentence .", "The second", "Third")]
    batch, mask = rows_of(model.tokenizer, sentences), expected["mask"]
    outputs, _ = jax.jit(lambda params: model.graph.bind(params)(batch, {}, layers=True))(model.params)
    layers = outputs["layers"][:, :, 1:-1]
    theirs = np.moveaxis(expected["lm_embeddings"], 1, 0)
    np.testing.assert_allclose(np.where(mask[..., None], layers, 0), np.where(mask[..., None], theirs, 0), **TOLERANCE)
    for n, (w, gamma) in enumerate([([0.1, 0.3, 0.5], 1.1), ([0.2, 0.4, 0.6], 0.88)]):
        for layer_norm in (False, True):
            mixed = mix(layers, jnp.array(w), gamma, mask, layer_norm=layer_norm)
            np.testing.assert_allclose(mixed, expected[f"elmo_{n}_layernorm{int(layer_norm)}"], **TOLERANCE)
        top = mix(layers[-1:], jnp.zeros(1), gamma, mask)
        np.testing.assert_allclose(top, expected[f"elmo_{n}_top_only"], **TOLERANCE)


@pytest.mark.real_data
def test_official_cached_token_vectors(real_data):
    folder = real_data / "oracles/elmo_bilm_tf"
    model = plm.load(str(folder))
    words = (folder / "vocab_test.txt").read_text("utf-8").split("\n")[:448]
    characters = rows_of(model.tokenizer, [words])["characters"][0, 1:-1]
    markers = {"<S>": 0, "</S>": 1}
    for at, word in enumerate(words):
        if word in markers:
            characters[at] = model.tokenizer.character_rows()[markers[word]].astype(np.int32) + 1
    vectors = jax.jit(lambda params: model.graph.bind(params).embedding.characters(characters))(model.params)
    with h5py.File(folder / "elmo_token_embeddings.hdf5") as file:
        np.testing.assert_allclose(vectors, file["embedding"], **TOLERANCE)
