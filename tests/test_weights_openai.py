"""OpenAI's own files: order and shapes, round trips, the official hidden states and losses, damaged shards."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

from plm import weights
from plm.errors import UserError
from plm.inference.model import load
from plm.weights import openai_npy

WIDTH, HEADS, LAYERS, POSITIONS = 12, 3, 2, 16
PIECES = ["<unk>", *"abcd", *(f"{letter}</w>" for letter in "abcd"), "ab</w>", "cd", "\n</w>"]
MERGES = "#version: 0.2\na b</w>\nc d\n"
BLOCK = [
    ("attn/c_attn/w", (1, WIDTH, 3 * WIDTH)),
    ("attn/c_attn/b", (3 * WIDTH,)),
    ("attn/c_proj/w", (1, WIDTH, WIDTH)),
    ("attn/c_proj/b", (WIDTH,)),
    ("ln_1/g", (WIDTH,)),
    ("ln_1/b", (WIDTH,)),
    ("mlp/c_fc/w", (1, WIDTH, 4 * WIDTH)),
    ("mlp/c_fc/b", (4 * WIDTH,)),
    ("mlp/c_proj/w", (1, 4 * WIDTH, WIDTH)),
    ("mlp/c_proj/b", (WIDTH,)),
    ("ln_2/g", (WIDTH,)),
    ("ln_2/b", (WIDTH,)),
]


pytestmark = pytest.mark.usefixtures("quick_compiles")


def drawn_arrays(pieces: int = len(PIECES)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"positions": (POSITIONS, WIDTH), "tokens": (pieces, WIDTH)}
    shapes |= {f"h{layer}/{name}": shape for layer in range(LAYERS) for name, shape in BLOCK}
    return {name: (0.4 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def write_vocabulary(folder, pieces: list[str], merges: str) -> None:
    (folder / openai_npy.ENCODER).write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / openai_npy.MERGES).write_text(merges)


def write_files(folder, arrays: dict, shards: int = 3):
    """As published: the arrays end to end, cut into equal files."""
    folder.mkdir(exist_ok=True)
    flat = np.concatenate([array.ravel() for array in arrays.values()])
    for number, shard in enumerate(np.array_split(flat, shards)):
        np.save(folder / f"params_{number}.npy", shard)
    (folder / openai_npy.SHAPES).write_text(json.dumps([array.shape for array in arrays.values()]))
    (folder / openai_npy.HPARAMS).write_text(json.dumps({"n_head": HEADS}))
    write_vocabulary(folder, PIECES, MERGES)
    return folder


def official_hidden(arrays: dict, ids: np.ndarray, heads: int, layers: int) -> list[np.ndarray]:
    """float64 hidden states [T, W], the embedding first: the published program on one row of ids."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}

    def norm(x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * arrays[f"{name}/g"] + arrays[f"{name}/b"]

    def dense(x, name):
        return x @ arrays[f"{name}/w"][0] + arrays[f"{name}/b"]

    T = len(ids)
    x = arrays["tokens"][ids] + arrays["positions"][:T]
    hidden = [x]
    for layer in range(layers):
        q, k, v = (part.reshape(T, heads, -1) for part in np.split(dense(x, f"h{layer}/attn/c_attn"), 3, axis=-1))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(T, dtype=bool), scores, -1e9)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", shares, v).reshape(T, -1)
        n = norm(x + dense(attended, f"h{layer}/attn/c_proj"), f"h{layer}/ln_1")
        up = dense(n, f"h{layer}/mlp/c_fc")
        up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = norm(n + dense(up, f"h{layer}/mlp/c_proj"), f"h{layer}/ln_2")
        hidden.append(x)
    return hidden


def test_files_give_the_hidden_states_of_the_official_program(tmp_path):
    arrays = drawn_arrays()
    model = load(str(write_files(tmp_path, arrays)))
    assert (model.report.missing, model.report.left_over) == ((), ())
    assert model.tokenizer.encode(["ab cda"]) == [[9, 10, 5]]
    expected = np.stack(official_hidden(arrays, np.array([9, 10, 5]), HEADS, LAYERS))
    found = model.embed(["ab cda"], layers="all", units="subwords")[0]
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=1e-5)


def test_what_is_written_is_read_back_exactly(tmp_path):
    arrays = drawn_arrays()
    first = load(str(write_files(tmp_path / "a", arrays)))
    openai_npy.write(first, epath.Path(tmp_path / "b"))
    assert len(list((tmp_path / "b").glob("params_*.npy"))) == 10
    again = load(str(tmp_path / "b"))
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    assert again.config == first.config
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    for name, array in openai_npy.read_arrays(tmp_path / "b").items():
        np.testing.assert_array_equal(array, arrays[name])
    for name in (openai_npy.ENCODER, openai_npy.MERGES):
        read = [(tmp_path / folder / name).read_text() for folder in "ab"]
        assert read[0] == read[1]


def changed(model, **settings):
    """The model with other settings in its config, which is all that `write` looks at before it refuses."""
    config = model.config.copy_and_resolve_references().unlock()
    for key, value in settings.items():
        config.model[key] = value
    return dataclasses.replace(model, config=config)


def test_models_that_the_format_cannot_hold_are_refused(tmp_path):
    model = load(str(write_files(tmp_path / "a", drawn_arrays())))
    for settings, message in [
        ({"activation": "gelu"}, "model.activation='gelu': it must be 'gelu_tanh'"),
        ({"direction": "full"}, "model.direction='full'"),
        ({"head_bias": True}, "model.head_bias=True"),
        ({"tied": False}, "model.tied=False"),
        ({"mlp_width": 50}, "model.mlp_width=50: it must be 4 x model.width"),
        ({"norm_epsilon": 1e-6}, "model.norm_epsilon=1e-06"),
        ({"max_positions": 0}, "model.max_positions=0"),
    ]:
        with pytest.raises(UserError, match=message):
            openai_npy.write(changed(model, **settings), epath.Path(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def refused(folder) -> str:
    with pytest.raises(UserError) as error:
        weights.read(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_damaged_files_are_one_line(tmp_path):
    arrays = drawn_arrays()
    write_files(tmp_path, arrays)
    shard = tmp_path / "params_1.npy"
    whole = shard.read_bytes()
    for keep in (0, 5, 40, 200, len(whole) - 4):
        shard.write_bytes(whole[:keep])
        assert "params_1.npy cannot be read as an array, it is damaged or cut short" in refused(tmp_path)
    np.save(shard, np.array([{"a": 1}], object))
    assert "params_1.npy cannot be read as an array" in refused(tmp_path)  # a pickle is never opened
    np.save(shard, np.zeros(5, np.float64))
    assert "params_1.npy holds no flat array of float32 numbers" in refused(tmp_path)
    np.save(shard, np.zeros(5, np.float32))
    assert "a shard is missing, or they are not the same model's" in refused(tmp_path)
    shard.unlink()
    assert "params_1.npy is not there" in refused(tmp_path)
    write_files(tmp_path, arrays)
    (tmp_path / "params_2.npy").unlink()
    assert f"numbers and {openai_npy.SHAPES} describes" in refused(tmp_path)


def test_shapes_vocabulary_and_heads_must_fit(tmp_path):
    write_files(tmp_path, drawn_arrays())
    shapes = json.loads((tmp_path / openai_npy.SHAPES).read_text())
    for broken, message in [
        ({"a": 1}, "is no list of the shapes of GPT"),
        (shapes[:-1], "is no list of the shapes of GPT"),
        ([[16], *shapes[1:]], "is no list of the shapes of GPT"),
        ([*shapes[:3], [WIDTH], *shapes[4:]], r"shape 3 (h0/attn/c_attn/b) is [12] and not [36]"),
    ]:
        (tmp_path / openai_npy.SHAPES).write_text(json.dumps(broken))
        assert message in refused(tmp_path)
    (tmp_path / openai_npy.SHAPES).write_text(json.dumps(shapes))
    (tmp_path / openai_npy.HPARAMS).write_text('{"n_head": 5}')
    assert "n_head=5 must be a whole number that divides the width 12" in refused(tmp_path)
    (tmp_path / openai_npy.HPARAMS).unlink()
    assert "the width 12 is no multiple of 64" in refused(tmp_path)
    write_files(tmp_path, drawn_arrays(pieces=20))
    assert "the vocabulary has 12 entries and the embedding 20 rows" in refused(tmp_path)
    (tmp_path / openai_npy.ENCODER).unlink()
    assert f"holds no {openai_npy.ENCODER} and {openai_npy.MERGES}" in refused(tmp_path)


def test_a_vocabulary_from_elsewhere(tmp_path):
    folder = write_files(tmp_path / "weights", drawn_arrays())
    (tmp_path / "vocabulary").mkdir()
    write_vocabulary(tmp_path / "vocabulary", PIECES, MERGES)
    (folder / openai_npy.ENCODER).unlink()
    read = weights.read(folder, vocabulary=str(tmp_path / "vocabulary"))
    assert read.tokenizer.encode(["ab"]) == [[9]]


@pytest.mark.real_data
def test_official_shapes_are_those_of_the_published_order(real_data):
    shapes = json.loads((real_data / "oracles/gpt1/params_shapes.json").read_text())
    names = [link.theirs for link in openai_npy.links(12)]
    assert len(names) == len(shapes) == 146
    assert sum(int(np.prod(shape)) for shape in shapes) == 116_534_784
    assert (names[0], shapes[0], names[1], shapes[1]) == ("positions", [512, 768], "tokens", [40478, 768])
    for name, shape in zip(names[2:14], shapes[2:14], strict=True):
        stated = dict(BLOCK)[name.removeprefix("h0/")]
        assert shape == [n if n == 1 else n // WIDTH * 768 for n in stated]
