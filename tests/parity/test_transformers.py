"""Transformers and plm compute the same from the same files, whoever wrote them: 1e-5 on hidden vectors and logits."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from fixtures import exports
from fixtures.exports import OURS, differences, made
from fixtures.make_golden_weights import bert_vocabulary, expected, gpt_vocabulary, inputs, randomise
from flax import serialization
from test_weights_bert import as_flax

import plm
from plm import weights
from plm.weights import huggingface

TOLERANCE = 1e-5
GOLDEN = Path(__file__).resolve().parent.parent / "golden_weights"
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 20,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 20}
TEXTS = ["Bakelimo ramose, bali!", "Mo zazu ra.", "keli xyzzy kelikeli", "don't U.S. e.g. -- Mr. Keli, U.K.\n\n ra ?!"]


def their_folder(name: str, folder: Path, *, seed: int = 5, **settings):
    """A folder of Transformers' own making with random weights; (model, vocabulary size)."""
    if name.startswith("OpenAIGPT"):
        vocabulary, merges = gpt_vocabulary()
        tokenizer = transformers.OpenAIGPTTokenizer(vocab=vocabulary, merges=merges)
        config = transformers.OpenAIGPTConfig(vocab_size=len(vocabulary), **{**GPT, **settings})
    else:
        vocabulary = {piece: i for i, piece in enumerate(bert_vocabulary(False))}
        tokenizer = transformers.BertTokenizer(vocab=vocabulary)
        config = transformers.BertConfig(vocab_size=len(vocabulary), **{**BERT, **settings})
    model = randomise(getattr(transformers, name)(config), seed)
    tokenizer.save_pretrained(folder)
    return model, len(vocabulary)


def outputs_of(model, given: dict) -> dict[str, np.ndarray]:
    """As `expected`; the sentence scores are called so whatever the class calls them."""
    found = expected(model, given)
    if type(model).__name__ == "BertForNextSentencePrediction":
        found["seq_relationship_logits"] = found.pop("logits")
    return found


def agrees(model, folder: Path, size: int, **options) -> dict[str, float]:
    """The largest differences between `model` of Transformers and ours, read from `folder`."""
    ours = plm.load(str(folder), **options)
    errors = differences(ours, outputs_of(model, inputs(size, 6)))
    assert "hidden_states" in errors
    assert max(errors.values()) < TOLERANCE, errors
    return errors


# ---------------------------------------------------------------------------------------------------- theirs, read here


@pytest.mark.parametrize(
    ("name", "settings", "outputs"),
    [
        ("BertForPreTraining", {}, 3),
        ("BertForPreTraining", {"hidden_act": "gelu_new", "type_vocab_size": 4, "layer_norm_eps": 1e-5}, 3),
        ("BertForMaskedLM", {"hidden_act": "relu"}, 2),
        ("BertForMaskedLM", {"hidden_act": "gelu_pytorch_tanh"}, 2),
        ("BertForNextSentencePrediction", {}, 2),
        ("BertForSequenceClassification", {}, 1),
        ("BertForTokenClassification", {}, 1),
        ("BertForQuestionAnswering", {}, 1),
        ("BertModel", {"hidden_act": "tanh"}, 1),
        ("BertLMHeadModel", {"is_decoder": True}, 2),
        ("OpenAIGPTLMHeadModel", {}, 2),
        ("OpenAIGPTLMHeadModel", {"afn": "relu", "layer_norm_epsilon": 1e-3}, 2),
        ("OpenAIGPTModel", {}, 1),
        ("OpenAIGPTDoubleHeadsModel", {}, 2),
    ],
)
def test_their_classes(name, settings, outputs, tmp_path):
    model, size = their_folder(name, tmp_path, **settings)
    model.save_pretrained(tmp_path)
    if name == "OpenAIGPTDoubleHeadsModel":  # its own forward wants choices
        language = transformers.OpenAIGPTLMHeadModel.from_pretrained(tmp_path)
        assert len(agrees(language.eval(), tmp_path, size)) == outputs
        assert len(plm.load(str(tmp_path)).report.left_over) == 2
        return
    # The scores of a task's head are not read here.
    assert len(agrees(model, tmp_path, size)) == outputs


def test_shards_of_theirs(tmp_path):
    for name in ("BertForPreTraining", "OpenAIGPTLMHeadModel"):
        model, size = their_folder(name, tmp_path / name)
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 2
        agrees(model, tmp_path / name, size)


def test_gamma_and_beta_as_transformers_read_them(tmp_path):
    model, size = their_folder("BertForPreTraining", tmp_path)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = safetensors.numpy.load(path.read_bytes())
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {re.sub("|".join(names), lambda found: names[found[0]], key): array for key, array in arrays.items()}
    assert old.keys() != arrays.keys()
    path.write_bytes(safetensors.numpy.save(old, metadata={"format": "pt"}))
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).eval()
    agrees(theirs, tmp_path, size)
    agrees(model, tmp_path, size)


def test_half_precision(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        model, size = their_folder("BertForMaskedLM", folder)
        model.to(dtype).save_pretrained(folder)
        agrees(model.float(), folder, size)


def test_flax_files_compute_what_transformers_do(tmp_path):
    """Transformers have no Flax classes any more: the file has the arrays that these kept."""
    for name in ("BertForPreTraining", "BertForMaskedLM", "BertModel"):
        folder = tmp_path / name
        model, size = their_folder(name, folder)
        model.save_pretrained(folder)
        tree = as_flax(huggingface.read_arrays(folder))
        (folder / "model.safetensors").unlink()
        (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
        assert weights.read(folder).format == "flax_msgpack"
        agrees(model, folder, size)


def test_the_words_of_bert_are_theirs(real_data, tmp_path):
    """The published vocabulary, SQuAD's questions: the ids of their tokenizer, of ours, and of what we write."""
    path = real_data / "oracles" / "bert"
    model, _ = their_folder("BertModel", tmp_path / "bert")
    model.resize_token_embeddings(30522)
    model.save_pretrained(tmp_path / "bert")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bert" / file).unlink()
    (tmp_path / "bert" / "vocab.txt").write_text((path / "vocab.txt").read_text(encoding="utf-8"), encoding="utf-8")
    lines = (path / "tokenization" / "squad_questions_0_2999.jsonl").read_text(encoding="utf-8").splitlines()[:500]
    texts = [json.loads(line)["text"] for line in lines]
    ours = plm.load(str(tmp_path / "bert"))
    huggingface.write(ours, tmp_path / "back")
    for folder in ("bert", "back"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        bare = theirs(texts, add_special_tokens=False)["input_ids"]
        assert bare == ours.tokenizer.encode(texts)


# ----------------------------------------------------------------------------------------------------- ours, read there

AUTO = {
    "BertForPreTraining": transformers.AutoModelForPreTraining,
    "BertForMaskedLM": transformers.AutoModelForMaskedLM,
    "BertForNextSentencePrediction": transformers.AutoModelForNextSentencePrediction,
    "BertLMHeadModel": transformers.AutoModelForCausalLM,
    "OpenAIGPTLMHeadModel": transformers.AutoModelForCausalLM,
}


@pytest.fixture(scope="module")
def vocabularies():
    return exports.vocabularies()


@pytest.mark.parametrize("name", list(OURS))
def test_our_models_in_transformers(name, vocabularies, tmp_path):
    experiment, arguments, kind, settings, objectives, architecture = OURS[name]
    model = made(experiment, arguments, vocabularies[kind], settings, objectives=objectives)
    huggingface.write(model, tmp_path)
    theirs, loading = AUTO[architecture].from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == architecture
    assert not any(loading.values()), loading
    given = inputs(model.tokenizer.size, 7)
    if not model.config.model.segments:
        given["token_type_ids"] = torch.zeros_like(given["token_type_ids"])
    errors = differences(model, outputs_of(theirs.eval(), given))
    assert len(errors) >= 2
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("name", ["bert", "bert_plain", "gpt", "gpt_bytes"])
def test_texts_in_both(name, vocabularies, tmp_path):
    """From a string to its vectors: their tokenizer and their model, ours and ours."""
    experiment, arguments, kind, settings, objectives, architecture = OURS[name]
    model = made(experiment, arguments, vocabularies[kind], settings, objectives=objectives)
    huggingface.write(model, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = AUTO[architecture].from_pretrained(tmp_path).eval()
    before, after = (list(part) for part in model.frame)
    for text, vectors in zip(TEXTS, model.embed(TEXTS, units="subwords"), strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert bare == model.tokenizer.encode([text])[0], text
        assert encoded["input_ids"][0].tolist() == [*before, *bare, *after]
        with torch.no_grad():
            hidden = theirs(**encoded, output_hidden_states=True).hidden_states[-1][0].numpy()
        hidden = hidden[len(before) : len(hidden) - len(after)]
        if hidden.shape == vectors.shape:  # plm reads a text word by word, so a line break is none of its pieces
            np.testing.assert_allclose(vectors, hidden, atol=TOLERANCE)
        else:
            assert "\n" in text


def test_generation_and_filling_in_both(vocabularies, tmp_path):
    experiment, arguments, kind, settings, objectives, _ = OURS["gpt_bytes"]
    model = made(experiment, arguments, vocabularies[kind], settings, objectives=objectives)
    huggingface.write(model, tmp_path / "gpt")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt").eval()
    roles = sorted(model.tokenizer.roles.values())
    encoded = tokenizer("keli ra", return_tensors="pt")
    made_ids = theirs.generate(**encoded, max_new_tokens=8, do_sample=False, suppress_tokens=roles, pad_token_id=0)
    assert tokenizer.decode(made_ids[0, encoded["input_ids"].shape[1] :]) == model.generate(
        "keli ra", tokens=8, temperature=0
    )

    experiment, arguments, kind, settings, objectives, _ = OURS["bert"]
    model = made(experiment, arguments, vocabularies[kind], settings, objectives=["masked"])
    huggingface.write(model, tmp_path / "bert")
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "bert"))
    allowed = set(range(model.tokenizer.size)) - set(roles)
    answers = [answer for answer in fill("keli [MASK] ra", top_k=20) if answer["token"] in allowed]
    (ours,) = model.fill_mask("keli [MASK] ra", top_k=5)
    assert [piece for piece, _ in ours] == [model.tokenizer.vocabulary[answer["token"]] for answer in answers[:5]]


# ------------------------------------------------------------------------------------------------- through both formats


def test_googles_checkpoint_in_transformers(tmp_path):
    ours = plm.load(str(GOLDEN / "google"))
    huggingface.write(ours, tmp_path)
    theirs = transformers.AutoModelForPreTraining.from_pretrained(tmp_path).eval()
    assert theirs.config.hidden_act == "gelu_new"
    errors = differences(ours, outputs_of(theirs, inputs(ours.tokenizer.size, 8)))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.real_data
def test_openais_files_in_transformers(real_data, tmp_path):
    """The official program's numbers: the same hidden vectors from their GPT class and from ours."""
    oracle = real_data / "oracles" / "gpt1"
    folder = oracle / "tiny_openai"
    settings = json.loads((folder / "config.json").read_text())
    source = tmp_path / "openai"
    source.mkdir()
    for path in (folder / "model").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    found = openai_arrays(source)
    with np.load(folder / "expected_forward.npz") as stored:
        wanted = {name: stored[name] for name in stored.files}
    with np.load(folder / "inputs.npz") as stored, np.load(folder / "extra_weights.npz") as more:
        tokens, special = stored["X"][..., 0], more["special_rows"]
    arrays = found | {
        "transformer.tokens_embed.weight": np.concatenate([found["transformer.tokens_embed.weight"], special])
    }
    size = len(arrays["transformer.tokens_embed.weight"])
    positions, width = arrays["transformer.positions_embed.weight"].shape
    n_layer = sum(name.endswith("ln_2.bias") for name in arrays)
    config = {"vocab_size": size, "n_positions": positions, "n_embd": width, "n_layer": n_layer}
    config |= {"n_head": settings["n_head"], "model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"]}
    out = tmp_path / "huggingface"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    (out / "model.safetensors").write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
    pieces = ["<unk>", *(chr(ord("a") + i // 26) + chr(ord("a") + i % 26) for i in range(size - 2)), "\n</w>"]
    (out / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (out / "merges.txt").write_text("#version: 0.2\n")
    theirs = transformers.OpenAIGPTLMHeadModel.from_pretrained(out).eval()
    ids = torch.tensor(tokens.reshape(-1, tokens.shape[-1]).astype(np.int64))
    with torch.no_grad():
        hidden = torch.stack(theirs(ids, output_hidden_states=True).hidden_states).numpy()
    ours = plm.load(str(out))
    given = {
        "input_ids": ids.numpy().astype(np.int32),
        "attention_mask": np.ones(ids.shape, np.int32),
        "hidden_states": hidden,
    }
    assert differences(ours, given)["hidden_states"] < TOLERANCE
    for layer in range(n_layer + 1):
        official = wanted[f"hidden_{layer}"].reshape(hidden[layer].shape)
        np.testing.assert_allclose(hidden[layer], official, atol=TOLERANCE)


def openai_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The official shards under Transformers' names."""
    from plm.weights import openai_npy

    read = openai_npy.read_arrays(folder)
    ours = {link.ours: read[link.theirs] for link in openai_npy.links(sum(n.endswith("ln_2/b") for n in read))}
    arrays = {}
    for link in huggingface.gpt_links(sum(n.endswith("ln_2/b") for n in read)):
        array = ours[link.ours]
        arrays[link.theirs] = np.ascontiguousarray(array[0] if array.ndim == 3 else array)
    return arrays
