"""BERT from Flax's and Google's files: the parameters of the same golden model, golden outputs, damage refused."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fixtures import tensor_bundle as peer
from flax import serialization

from plm import weights
from plm.errors import UserError
from plm.models.graph import build
from plm.weights import bert, bert_tf, huggingface, tensor_bundle

GOLDEN = Path(__file__).parent / "golden_weights"
TOLERANCE = 1e-5


def same_params(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


# ----------------------------------------------------------------------------------------------------------------- Flax


def as_flax(arrays: dict[str, np.ndarray]) -> dict:
    """The tree that the Flax classes kept of the same model."""
    tree: dict = {}
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        if path[-1] == "LayerNorm":
            leaf = {"weight": "scale", "bias": "bias"}[leaf]
        elif path[-1].endswith("embeddings"):
            leaf = "embedding"
        elif leaf == "weight":
            leaf, array = "kernel", array.T
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = np.ascontiguousarray(array)
    return tree


def flax_folder(name: str, folder: Path, change=lambda tree: tree) -> Path:
    shutil.copytree(GOLDEN / name, folder)
    tree = as_flax(huggingface.read_arrays(folder))
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(change(tree)))
    return folder


@pytest.mark.parametrize("name", ["bert_pretraining", "bert_masked", "bert_model"])
def test_flax_files_hold_the_same_parameters(name, tmp_path):
    found, original = weights.read(flax_folder(name, tmp_path / "flax")), weights.read(GOLDEN / name)
    assert found.format == "flax_msgpack"
    same_params(found, original)
    assert found.config == original.config
    assert found.report.matched == original.report.matched
    assert len(found.report.left_over) == len(original.report.left_over)


def test_an_untied_flax_head_is_refused(tmp_path):
    def change(tree):
        tree["cls"]["predictions"]["decoder"] = {"kernel": np.ones((16, 27), np.float32)}
        return tree

    with pytest.raises(UserError, match=r"decoder\.kernel differs from bert\.embeddings\.word_embeddings"):
        weights.read(flax_folder("bert_masked", tmp_path / "untied", change))


def test_damaged_flax_files_give_one_line(tmp_path):
    folder = flax_folder("bert_masked", tmp_path / "flax")
    path = folder / "flax_model.msgpack"
    whole = path.read_bytes()
    odd = serialization.msgpack_serialize({"bert": "text"})
    for content in (whole[: len(whole) // 2], b"", b"\xc1" + whole[1:], whole + b"\x00", odd, b"\x93\x01\x02\x03"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"flax_model\.msgpack cannot be read as Flax's parameters") as caught:
            weights.read(folder)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    (folder / "config.json").write_text('{"model_type": "openai-gpt"}')
    with pytest.raises(UserError, match="model_type='openai-gpt' has no Flax class"):
        weights.read(folder)


# --------------------------------------------------------------------------------------------------------------- Google


def test_a_checkpoint_of_tensorflow_holds_the_same_parameters():
    found, original = weights.read(GOLDEN / "google"), weights.read(GOLDEN / "bert_pretraining")
    assert found.format == "bert_tf"
    same_params(found, original)
    assert found.report.left_over == ()
    assert found.tokenizer.fingerprint == original.tokenizer.fingerprint
    assert found.config.model.activation == "gelu_tanh"
    assert any("gelu_erf" in line for line in found.report.lines())


def test_our_peer_writes_what_tensorflow_does(tmp_path):
    slots = re.compile(bert_tf.SLOTS)
    arrays = tensor_bundle.read(epath.Path(GOLDEN / "google" / "bert_model.ckpt"), lambda name: True)
    assert arrays.pop("global_step") == 7
    assert sum(bool(slots.fullmatch(name)) for name in arrays) > 10
    peer.write(tmp_path / "copy.ckpt", arrays)
    copy = tensor_bundle.read(epath.Path(tmp_path / "copy.ckpt"), lambda name: not slots.fullmatch(name))
    assert copy.keys() == {name for name in arrays if not slots.fullmatch(name)}
    for name, array in copy.items():
        np.testing.assert_array_equal(array, arrays[name])
    data = "data-00000-of-00001"
    ours, theirs = tmp_path / f"copy.ckpt.{data}", GOLDEN / "google" / f"bert_model.ckpt.{data}"
    assert len(theirs.read_bytes()) - len(ours.read_bytes()) == 8  # the step


def test_checksums():
    assert tensor_bundle.crc32c(b"123456789") == 0xE3069283  # RFC 3720 and its annotated catalogue
    assert tensor_bundle.crc32c(bytes(32)) == 0x8A9136AA
    assert tensor_bundle.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert tensor_bundle.crc32c(b"") == 0

    def plain(data: bytes) -> int:
        state = 0xFFFFFFFF
        for byte in data:
            state ^= byte
            for _ in range(8):
                state = state >> 1 ^ 0x82F63B78 * (state & 1)
        return state ^ 0xFFFFFFFF

    for length in (1, 3, 1023, 1024, 1025, 3072, 5001):
        data = np.random.default_rng(length).bytes(length)
        assert tensor_bundle.crc32c(data) == plain(data), length


def google_folder(folder: Path, **changed) -> Path:
    shutil.copytree(GOLDEN / "google", folder)
    config = json.loads((folder / "bert_config.json").read_text())
    (folder / "bert_config.json").write_text(json.dumps(config | changed))
    return folder


INDEX, DATA = "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (INDEX, lambda c: c[: len(c) // 2], "its last bytes are not a table's"),
        (INDEX, lambda c: b"", "its last bytes are not a table's"),
        (INDEX, lambda c: c[:50] + bytes([c[50] ^ 1]) + c[51:], "a checksum is wrong"),
        (INDEX, lambda c: c[-48:], "is no whole index"),
        (DATA, lambda c: c[:-100], "it is cut short"),
        (DATA, lambda c: c[:50] + bytes([c[50] ^ 1]) + c[51:], "its checksum is wrong"),
        ("bert_config.json", lambda c: c[:30], "cannot be read as JSON"),
        ("vocab.txt", lambda c: c + b"more\n", "the vocabulary has 26 entries and the embedding 25 rows"),
    ],
)
def test_damaged_checkpoints_give_one_line(file, damage, message, tmp_path):
    folder = google_folder(tmp_path / "damaged")
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        weights.read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_what_is_no_plain_checkpoint_is_refused(tmp_path):
    prefix = epath.Path(tmp_path / "a.ckpt")
    array = {"a": np.ones((2, 3), np.float32)}

    def refused(message, **options):
        peer.write(prefix, array, **options)
        with pytest.raises(UserError, match=message):
            tensor_bundle.read(prefix, lambda name: True)

    refused("is compressed", compression=1)
    refused("stored in slices", extra=peer.field(7, b""))
    refused("has type 7 of TensorFlow's", extra=peer.field(1, 7))
    refused("which shape .* does not take", extra=peer.field(5, 20))
    peer.write(prefix, array)
    (tmp_path / "a.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(UserError, match=r"a\.ckpt\.data-00000-of-00001 cannot be read"):
        tensor_bundle.read(prefix, lambda name: True)

    folder = google_folder(tmp_path / "two")
    shutil.copy(folder / INDEX, folder / "other.ckpt.index")
    with pytest.raises(UserError, match="holds several checkpoints"):
        weights.read(folder)
    with pytest.raises(UserError, match="hidden_act='linear' is not supported; one of gelu, gelu_erf, relu, tanh is"):
        weights.read(google_folder(tmp_path / "linear", hidden_act="linear"))
    with pytest.raises(UserError, match="says 1 layers"):
        weights.read(google_folder(tmp_path / "shallow", num_hidden_layers=1))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("activation", "file"), [("gelu", "expected_forward.npz"), ("gelu_erf", "expected_forward_erf_gelu.npz")]
)
def test_outputs_of_the_official_program(activation, file, real_data, tmp_path):
    oracle = real_data / "oracles" / "bert" / "tiny_google"
    with np.load(oracle / "weights.npz") as stored:
        peer.write(tmp_path / "bert_model.ckpt", dict(stored))
    config = json.loads((oracle / "bert_config.json").read_text())
    (tmp_path / "bert_config.json").write_text(json.dumps(config | {"hidden_act": activation}))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(config["vocab_size"] - 5))]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    found = weights.read(tmp_path)
    with np.load(oracle / "inputs.npz") as stored, np.load(oracle / file) as outputs:
        given, expected = dict(stored), dict(outputs)

    model = build(found.config, found.tokenizer.size, tuple(found.config.objectives), jnp.float32).bind(found.params)
    batch = {
        "tokens": given["input_ids"],
        "segments": given["segment_ids"],
        "length": given["input_mask"].sum(axis=1),
    }
    with jax.default_matmul_precision("float32"):
        outputs, _ = model(batch, {}, layers=True)
        scores = model.heads["masked"].logits(outputs["hidden"])
        pairs = model.heads["next_sentence"].logits(outputs["hidden"])
    at = jnp.take_along_axis(scores, given["masked_lm_positions"][..., None], axis=1)
    log_probs, pair_log_probs = jax.nn.log_softmax(at), jax.nn.log_softmax(pairs)
    chosen = jnp.take_along_axis(log_probs, given["masked_lm_ids"][..., None], axis=-1)[..., 0]
    weight = given["masked_lm_weights"]
    valid = given["input_mask"].astype(bool)
    ours = {
        **{f"encoder_layer_{i}": outputs["layers"][i + 1] for i in range(config["num_hidden_layers"])},
        "embedding_output": outputs["layers"][0],
        "sequence_output": outputs["hidden"],
        "prediction_logits": scores,
        "seq_relationship_logits": pairs,
        "mlm_log_probs": log_probs.reshape(-1, config["vocab_size"]),
        "mlm_example_loss": -chosen.reshape(-1),
        "mlm_loss": -(chosen * weight).sum() / (weight.sum() + 1e-5),  # the official program's guard
        "nsp_log_probs": pair_log_probs,
        "nsp_loss": -jnp.take_along_axis(pair_log_probs, given["next_sentence_labels"], axis=1).mean(),
    }
    checked = ours.keys() & expected.keys()
    assert {"mlm_loss", "nsp_loss", "embedding_output", "encoder_layer_2"} <= checked
    for name in checked:
        one, other = np.asarray(ours[name]), expected[name]
        if one.ndim == 3:
            one, other = one[valid], other[valid]
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def test_the_three_spellings_have_a_name_for_every_parameter():
    objectives = ("masked", "next_sentence")
    tables = [bert.links(spelling, 2, objectives) for spelling in (bert.PYTORCH, bert.FLAX, bert.TENSORFLOW)]
    for table in tables:
        assert [link.ours for link in table] == [link.ours for link in tables[0]]
        assert len({link.theirs for link in table}) == len(table)
