"""BERT and OpenAI GPT as Hugging Face's Transformers keep them: `config.json` + `model.safetensors`, one or in shards.

In: the bare models, those with pretraining heads and those with a task's head, whose encoder is read; old names of
LayerNorm (`gamma`, `beta`), old buffers and copies of tied tables. BERT's names are in `plm.weights.bert`, GPT's are

| Hugging Face, behind `transformer.` or bare | here |
| --- | --- |
| `tokens_embed.weight`, `positions_embed.weight` | `embedding/{tokens,positions}/table` |
| `h.i.attn.c_attn.{weight,bias}`, [W, 3 W]: query, key, value | `blocks/i/attention/{query,key,value}/{kernel,bias}` |
| `h.i.attn.c_proj.{weight,bias}` | `blocks/i/attention/output/{kernel,bias}` |
| `h.i.{ln_1,ln_2}.{weight,bias}` | `blocks/i/{attention_norm,mlp_norm}/{scale,bias}` |
| `h.i.mlp.{c_fc,c_proj}.{weight,bias}`, [inputs, outputs] | `blocks/i/mlp/{up,down}/{kernel,bias}` |

Out: what these classes compute, to the last setting, as

| our model | class |
| --- | --- |
| BERT's, `masked` and `next_sentence` | BertForPreTraining |
| BERT's, one of the two or none | BertForMaskedLM, BertForNextSentencePrediction, BertModel |
| BERT's from left to right, `causal` | BertLMHeadModel (`is_decoder`) |
| GPT's, `causal` | OpenAIGPTLMHeadModel |

BERT without segments gets a table of zeros, without the head's bias zeros. Every other model is refused, naming the
setting. The tokenizer goes along as `tokenizer.json`, which gives the same ids (with the exceptions that
`Tokenizer.standalone` names), and in the files of old, `vocab.txt` or `vocab.json` and `merges.txt`.
"""

import json
from collections.abc import Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from tokenizers import AddedToken, processors

from plm import weights
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.graph import build
from plm.training import config as configs
from plm.training import metrics
from plm.weights import Link, bert, same

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BUFFERS = (r".*\.position_ids", r".*\.token_type_ids", r".*\.attn\.bias", r".*\.attn\.masked_bias")
MODEL_TYPES = ("bert", "openai-gpt")


def recognises(directory: epath.Path) -> bool:
    return (directory / CONFIG).exists() and any((directory / name).exists() for name in (WEIGHTS, INDEX))


# ------------------------------------------------------------------------------------------------------------------- in


def read(directory: epath.Path, *, allow_missing: str = "", vocabulary: str = "") -> weights.Foreign:
    """See `plm.weights.read`; also refuses a config that names another model or a variant with other mathematics."""
    directory = epath.Path(directory)
    values = read_config(directory / CONFIG)
    arrays = read_arrays(directory)
    if values["model_type"] == "bert":
        return bert.foreign(
            "huggingface",
            directory,
            bert.model_settings(values, directory / CONFIG),
            vocabulary_size(values, directory / CONFIG),
            arrays,
            bert.PYTORCH,
            bert_tokenizer(directory, vocabulary),
            allow_missing=allow_missing,
            ignore=BUFFERS,
        )
    return _read_gpt(directory, values, arrays, allow_missing, vocabulary)


def read_config(path: epath.Path) -> dict:
    """`config.json`, with `model_type` filled in where an old file has only `architectures`."""
    values = weights.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is no config: it must hold one JSON object")
    kind = values.get("model_type")
    if kind is None:
        named = str((values.get("architectures") or [""])[0])
        kind = "bert" if named.startswith("Bert") else "openai-gpt" if named.startswith("OpenAIGPT") else None
    if kind not in MODEL_TYPES:
        raise UserError(f"{path}: model_type={kind!r} is not read; {' and '.join(map(repr, MODEL_TYPES))} are")
    return values | {"model_type": kind}


def vocabulary_size(values: Mapping, path: epath.Path) -> int:
    default = 30522 if values.get("model_type", "bert") == "bert" else 40478
    return bert.number(values, "vocab_size", default, configs.whole(1), path)


_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_arrays(directory: epath.Path) -> dict[str, np.ndarray]:
    """{name: array} of `model.safetensors`, or of all shards that its index lists."""
    if (directory / WEIGHTS).exists():
        return _read_file(directory / WEIGHTS)
    index = directory / INDEX
    content = weights.read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index} is no index: it must have weight_map, array name -> file")
    arrays = {}
    for file in sorted(set(files.values())):
        if "/" in file or "\\" in file:
            raise UserError(f"{index}: {file!r} must be the name of a file beside it")
        if not (directory / file).exists():
            raise UserError(f"{directory / file} is missing, which {INDEX} lists")
        held = _read_file(directory / file)
        arrays |= {name: array for name, array in held.items() if files.get(name) == file}
    if absent := [name for name in files if name not in arrays]:
        raise UserError(f"{index}: {absent[0]} is not in {files[absent[0]]}, where it should be")
    return arrays


def _read_file(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        held = safetensors.deserialize(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors, it is damaged or cut short: {error}") from None
    arrays = {}
    for name, array in held:
        if array["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {name} has type {array['dtype']}, and only {', '.join(_DTYPES)} are read")
        arrays[name] = np.frombuffer(array["data"], _DTYPES[array["dtype"]]).reshape(array["shape"])
    return arrays


def gpt_links(n_layers: int, prefix: str = "transformer.") -> list[Link]:
    """The table of the module for GPT."""
    found = [same(f"{prefix}{part}_embed.weight", f"embedding/{part}/table") for part in ("tokens", "positions")]
    for i in range(n_layers):
        there, here = f"{prefix}h.{i}", f"blocks/{i}"
        heads = [f"{here}/attention/{part}" for part in ("query", "key", "value")]
        for theirs, ours in (("weight", "kernel"), ("bias", "bias")):
            joint = Link(
                f"{there}.attn.c_attn.{theirs}",
                tuple(f"{part}/{ours}" for part in heads),
                lambda array: np.split(array, 3, axis=-1),
                lambda *parts: np.concatenate(parts, axis=-1),
            )
            found.append(joint)
            for layer, name in (
                ("attn.c_proj", "attention/output"),
                ("mlp.c_fc", "mlp/up"),
                ("mlp.c_proj", "mlp/down"),
            ):
                found.append(same(f"{there}.{layer}.{theirs}", f"{here}/{name}/{ours}"))
        for theirs, ours in (("weight", "scale"), ("bias", "bias")):
            found.append(same(f"{there}.ln_1.{theirs}", f"{here}/attention_norm/{ours}"))
            found.append(same(f"{there}.ln_2.{theirs}", f"{here}/mlp_norm/{ours}"))
    return found


def _read_gpt(directory, values: Mapping, arrays: dict, allow_missing: str, vocabulary: str) -> weights.Foreign:
    path = directory / CONFIG
    model = _gpt_settings(values, path)
    tokenizer = gpt_tokenizer(directory, vocabulary)
    weights.check_vocabulary(directory, tokenizer.size, vocabulary_size(values, path))
    prefix = "transformer." if any(name.startswith("transformer.") for name in arrays) else ""
    tied = f"{prefix}tokens_embed.weight"
    if tied not in arrays and "lm_head.weight" in arrays:  # of tensors that are one, only one is stored
        arrays = arrays | {tied: arrays["lm_head.weight"]}
    table = gpt_links(model["layers"], prefix)
    known = {link.theirs for link in table}
    for name in arrays:
        if name.startswith(f"{prefix}h.") and name not in known and not name.endswith((".attn.bias", ".masked_bias")):
            raise UserError(
                f"{directory}: {name} is a part of the body that its config knows nothing of, which says"
                f" n_layer={model['layers']}: they are not the same model's"
            )
    config = weights.describe(tokenizer, "blocks", model["max_positions"], model, ("causal",))
    graph = build(config, tokenizer.size, ("causal",), jnp.float32)
    params, report = weights.assemble(
        graph,
        table,
        arrays,
        source=directory,
        allow_missing=allow_missing,
        ignore=BUFFERS,
        copies={"lm_head.weight": tied},
    )
    return weights.Foreign("huggingface", config, tokenizer, params, report)


_GPT_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu"}  # its "gelu" is the tanh form


def _gpt_settings(values: Mapping, path: epath.Path) -> dict:
    """`config.model`; absent keys have the published defaults."""
    bert.refuse_variants(values, {"add_cross_attention": (False, None), "quantization_config": (None,)}, path)
    size, rate = configs.whole(1), configs.real(0.0, 0.95)
    width = bert.number(values, "n_embd", 768, size, path)
    model = {
        "architecture": "transformer",
        "direction": "forward",
        "width": width,
        "layers": bert.number(values, "n_layer", 12, size, path),
        "heads": bert.number(values, "n_head", 12, size, path),
        "mlp_width": 4 * width,
        "max_positions": bert.number(values, "n_positions", 512, size, path),
        "dropout": bert.number(values, "resid_pdrop", 0.1, rate, path),
        "attention_dropout": bert.number(values, "attn_pdrop", 0.1, rate, path),
        "embedding_dropout": bert.number(values, "embd_pdrop", 0.1, rate, path),
        "embedding_dropout_on": "matrix",  # as GPT was trained; Transformers drop the summed vectors
        "activation": bert.choice(values, "afn", "gelu", _GPT_ACTIVATIONS, path),
        "norm_epsilon": bert.number(values, "layer_norm_epsilon", 1e-5, configs.real(0.0, above=True), path),
        "init": "normal",
        "init_stddev": bert.number(values, "initializer_range", 0.02, configs.real(0.0, above=True), path),
    }
    bert.refuse_heads(model, path, "n_embd", "n_head")
    return model


# -------------------------------------------------------------------------------------------------------- tokenizers in

TOKENIZER, TOKENIZER_CONFIG, OURS = "tokenizer.json", "tokenizer_config.json", "tokenizer_settings.json"


def bert_tokenizer(directory: epath.Path, vocabulary: str = "") -> Tokenizer:
    """From `vocabulary`, the files that `write` made, `vocab.txt`, or `tokenizer.json`; letter case as
    `tokenizer_config.json` says, else `tokenizer.json`, else as the vocabulary has capital letters or not.

    Words of 101 to 200 characters are read in pieces, as by Google's program; Transformers make them [UNK].

    Errors: UserError for text cleaning that is not the published one.
    """
    if not vocabulary and (directory / OURS).exists():
        return Tokenizer.load(directory)
    settings: dict = {}
    if (directory / TOKENIZER_CONFIG).exists():
        settings = weights.read_json(directory / TOKENIZER_CONFIG)
        if not isinstance(settings, dict):
            raise UserError(f"{directory / TOKENIZER_CONFIG} is no config: it must hold one JSON object")
    lowercase = settings.get("do_lower_case")
    cleaning = {"tokenize_chinese_chars": (True, None), "strip_accents": (None, lowercase)}
    bert.refuse_variants(settings, cleaning, directory / TOKENIZER_CONFIG)
    listed = directory / "vocab.txt"
    if vocabulary or listed.exists():
        tokenizer = Tokenizer.from_official(vocabulary or listed, lowercase=lowercase)
    elif (directory / TOKENIZER).exists():
        tokenizer = _wordpiece(directory / TOKENIZER, lowercase)
    else:
        raise UserError(f"{directory} has no vocab.txt or {TOKENIZER}: put one there, or name it with --vocabulary")
    absent = [role for role in ("pad", "unk", "cls", "sep", "mask") if role not in tokenizer.roles]
    if tokenizer.kind != "wordpiece" or absent:
        why = f"has no [{absent[0].upper()}]" if absent else f"is of kind {tokenizer.kind!r}"
        raise UserError(f"{vocabulary or directory}: the vocabulary {why}; BERT's is WordPiece with [PAD] and [MASK]")
    return tokenizer


def _wordpiece(path: epath.Path, lowercase: bool | None) -> Tokenizer:
    content, model = _model_of(path, "WordPiece")
    normalizer = content.get("normalizer") or {}
    if lowercase is None:
        lowercase = bool(normalizer.get("lowercase", True))
    usual = {
        "type": ("BertNormalizer",),
        "clean_text": (True,),
        "handle_chinese_chars": (True,),
        "strip_accents": (None, lowercase),
    }
    bert.refuse_variants({"type": None} | normalizer, usual, path)
    entries = _entries(path, model)
    roles = {role: entries.index(f"[{role.upper()}]") for role in BERT_ROLES if f"[{role.upper()}]" in entries}
    return Tokenizer("wordpiece", entries, roles, lowercase=lowercase)


BERT_ROLES = ("pad", "unk", "cls", "sep", "mask")


def gpt_tokenizer(directory: epath.Path, vocabulary: str = "") -> Tokenizer:
    """From `vocabulary`, the files that `write` made, `vocab.json` + `merges.txt`, or `tokenizer.json`.

    The splitting into words is `plm.data.tokenizers`', nearer to the published one than Transformers' own.
    """
    if not vocabulary and (directory / OURS).exists():
        return Tokenizer.load(directory)
    if vocabulary or (directory / "vocab.json").exists():
        tokenizer = Tokenizer.from_official(vocabulary or directory / "vocab.json")
        if tokenizer.kind != "bpe":
            raise UserError(f"{vocabulary}: a vocabulary of kind {tokenizer.kind!r}; GPT's is vocab.json + merges.txt")
        return tokenizer
    path = directory / TOKENIZER
    if not path.exists():
        raise UserError(f"{directory} has no vocab.json or {TOKENIZER}: put one there, or name it with --vocabulary")
    _, model = _model_of(path, "BPE")
    entries = _entries(path, model)
    bert.refuse_variants(
        {"end_of_word_suffix": model.get("end_of_word_suffix")}, {"end_of_word_suffix": ("</w>",)}, path
    )
    try:
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        roles = {"unk": entries.index("<unk>"), "eod": entries.index("\n</w>")}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not GPT's: it must have merges, <unk> and \\n</w>") from None
    return Tokenizer("bpe", entries, roles, merges=merges)


def _model_of(path: epath.Path, kind: str) -> tuple[dict, dict]:
    content = weights.read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type", kind) != kind:
        raise UserError(f"{path} holds no {kind} vocabulary")
    return content, model


def _entries(path: epath.Path, model: Mapping) -> list[str]:
    ids = model.get("vocab")
    if not isinstance(ids, dict) or sorted(ids.values()) != list(range(len(ids))):
        raise UserError(f"{path}: the vocabulary must give its entries the ids 0, 1, 2, ...")
    return sorted(ids, key=ids.__getitem__)


# ------------------------------------------------------------------------------------------------------------------ out


def write(model, folder: epath.Path) -> None:
    """Writes a folder that Transformers read (`AutoModel...`, `AutoTokenizer.from_pretrained`), and `read` too.

    model.safetensors, config.json, the tokenizer's files, README.md: a model card with the config and, where `model` is
    from a run, what was measured. Errors: UserError for a model that no class computes, naming the setting.
    """
    folder, kind = epath.Path(folder), class_of(model.config)
    settings, arrays = (_bert_out if kind.startswith("Bert") else _gpt_out)(model)
    settings = {"architectures": [kind], **settings}
    settings |= {"vocab_size": model.tokenizer.size, "tie_word_embeddings": True, "dtype": "float32"}
    roles = model.tokenizer.roles
    settings |= {f"{role}_token_id": roles[role] for role in ("pad", "bos", "eos") if role in roles}
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(model, folder)
    (folder / "README.md").write_text(model_card(model, kind), encoding="utf-8")
    # Transformers ask for this remark, that the arrays lie as PyTorch's do.
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
    # Last: a folder without it is no model.
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


_BERT_CLASSES = {
    frozenset(): "BertModel",
    frozenset({"masked"}): "BertForMaskedLM",
    frozenset({"next_sentence"}): "BertForNextSentencePrediction",
    frozenset({"masked", "next_sentence"}): "BertForPreTraining",
    frozenset({"causal"}): "BertLMHeadModel",
}
_ACTIVATIONS_OUT = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "tanh": "tanh"}


def class_of(config) -> str:
    """The class of Transformers that computes what a model of `config` does.

    Errors: UserError that names the first setting that none has.
    """
    model, objectives = config.model, frozenset(config.objectives)
    usual = {"name": ("language_model",), "architecture": ("transformer",), "input": ("tokens",), "tied": (True,)}
    if model.get("embedding_norm") or model.get("direction") != "forward":
        what = "BERT"
        usual |= {"direction": ("full", "forward"), "embedding_norm": (True,)}
        usual |= {"head_transform": (True,)} if objectives - {"next_sentence"} else {}
        kind = _BERT_CLASSES.get(objectives)
    else:
        what = "OpenAI GPT"
        usual |= {"segments": (0,), "head_transform": (False,), "head_bias": (False,)}
        usual |= {"activation": tuple(_GPT_ACTIVATIONS.values()), "mlp_width": (4 * model.get("width", 0),)}
        kind = "OpenAIGPTLMHeadModel" if objectives <= {"causal"} else None
    for key, right in usual.items():
        if model.get(key) not in right:
            must = " or ".join(map(repr, right))
            raise UserError(
                f"Hugging Face's {what} computes no model with model.{key}={model.get(key)!r}: it must be {must}"
            )
    if not model.max_positions:
        raise UserError(f"Hugging Face's {what} computes no model with model.max_positions=0: it must be 1 at least")
    own = [name for name in config.objectives if config.objectives[name].get("name")]
    if kind is None or own:
        names = ", ".join(own or config.objectives)
        raise UserError(f"no class of Hugging Face's {what} has the heads of objectives {names}")
    return kind


def _bert_out(model) -> tuple[dict, dict[str, np.ndarray]]:
    """(config.json, arrays) of a model with BERT's mathematics."""
    config, settings = model.config, model.config.model
    language = [name for name in config.objectives if name != "next_sentence"]
    links = bert.links(bert.PYTORCH, settings.layers, tuple(config.objectives), bare=not config.objectives)
    arrays = weights.disassemble(model.graph, model.params, links)
    zeros = {"embedding/segments/table": (2, settings.width)}
    zeros |= {f"heads/{name}/bias": (model.tokenizer.size,) for name in language}
    for link in links:  # in the order of the table, whether the model has them or not
        if link.theirs not in arrays:
            arrays[link.theirs] = np.zeros(zeros[link.ours[0]], np.float32)
    return {
        "model_type": "bert",
        "is_decoder": settings.direction == "forward",
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "intermediate_size": settings.mlp_width,
        "hidden_act": _ACTIVATIONS_OUT[settings.activation],
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": settings.attention_dropout,
        "max_position_embeddings": settings.max_positions,
        "type_vocab_size": settings.segments or 2,
        "initializer_range": settings.init_stddev,
        "layer_norm_eps": settings.norm_epsilon,
        "position_embedding_type": "absolute",
    }, {link.theirs: arrays[link.theirs] for link in links}


def _gpt_out(model) -> tuple[dict, dict[str, np.ndarray]]:
    """(config.json, arrays) of a model with GPT's mathematics."""
    settings = model.config.model
    theirs = {ours: theirs for theirs, ours in _GPT_ACTIVATIONS.items()}
    return {
        "model_type": "openai-gpt",
        "n_embd": settings.width,
        "n_layer": settings.layers,
        "n_head": settings.heads,
        "n_positions": settings.max_positions,
        "afn": theirs[settings.activation],
        "resid_pdrop": settings.dropout,
        "embd_pdrop": settings.embedding_dropout,
        "attn_pdrop": settings.attention_dropout,
        "layer_norm_epsilon": settings.norm_epsilon,
        "initializer_range": settings.init_stddev,
    }, weights.disassemble(model.graph, model.params, gpt_links(settings.layers))


def write_tokenizer(model, folder: epath.Path) -> None:
    """`tokenizer.json`, its settings, and the vocabulary in the files of old."""
    tokenizer, roles = model.tokenizer, model.tokenizer.roles
    pieces = {role: tokenizer.vocabulary[number] for role, number in roles.items()}
    whole = tokenizer.standalone()
    # GPT's end of a document is a line break, which is text too.
    special = [piece for role, piece in pieces.items() if not (tokenizer.kind == "bpe" and role == "eod")]
    whole.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    if model.config.data.layout == "pairs":
        ends = [(pieces[role], roles[role]) for role in ("cls", "sep")]
        (cls, _), (sep, _) = ends
        whole.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0", pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1", special_tokens=ends
        )
    tokenizer.save(folder)  # its settings; the file of the library is replaced now
    (folder / TOKENIZER).write_text(whole.to_str(pretty=True), encoding="utf-8")
    named = {
        f"{role}_token": pieces[role] for role in ("unk", "pad", "cls", "sep", "mask", "bos", "eos") if role in pieces
    }
    is_bert = tokenizer.kind == "wordpiece"
    settings = {
        # The class that takes tokenizer.json as it is; others build rules of their own around the vocabulary.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.model.max_positions,
        "model_input_names": ["input_ids", *(["token_type_ids"] if is_bert else []), "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **({"do_lower_case": tokenizer.lowercase} if is_bert else {}),
        **named,
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2) + "\n")
    if is_bert:
        text = "".join(f"{piece}\n" for piece in tokenizer.vocabulary)
        (folder / "vocab.txt").write_text(text, encoding="utf-8")
    elif tokenizer.merges:
        ids = {piece: number for number, piece in enumerate(tokenizer.vocabulary)}
        (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        merges = "".join(f"{first} {second}\n" for first, second in tokenizer.merges)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")


def model_card(model, kind: str) -> str:
    """README.md: what the model is, how it is loaded, what was measured, and its whole config."""
    config = model.config
    counts = model.graph.counts()
    auto = {"BertForPreTraining": "PreTraining", "BertForMaskedLM": "MaskedLM", "BertLMHeadModel": "CausalLM"}
    auto |= {"BertForNextSentencePrediction": "NextSentencePrediction", "OpenAIGPTLMHeadModel": "CausalLM"}
    loader = f"AutoModelFor{auto[kind]}" if kind in auto else "AutoModel"
    task = {"AutoModelForMaskedLM": "fill-mask", "AutoModelForPreTraining": "fill-mask"}
    task |= {"AutoModelForCausalLM": "text-generation"}
    heads = f"with the heads of {' and '.join(config.objectives)}" if config.objectives else "without heads"
    positions = config.model.get("positions_in_softmax")
    softmax = (
        f" Its softmax had {positions} rows of positions among its classes; here it has none." if positions else ""
    )
    trained = bool(config.data.source)
    described = ("model.", "objectives.", "data.layout", "data.tokenizer.")
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {task.get(loader, 'feature-extraction')}",
        "tags: [plm]",
        "---",
        "",
        f"# {epath.Path(model.source).name}",
        "",
        f"A {config.model.architecture} {heads}: {config.model.layers} layers of width {config.model.width},"
        f" {counts['total']:,} parameters, {model.tokenizer.kind} vocabulary of {model.tokenizer.size:,}; "
        + (f"trained by plm (JAX/Flax), step {model.step:,}." if trained else "converted by plm (JAX/Flax).")
        + softmax,
        "",
        "```python",
        f"from transformers import {loader}, AutoTokenizer",
        f'model, tokenizer = {loader}.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")',
        "",
        "import plm",
        'same = plm.load("FOLDER")',
        "```",
        "",
        *_measured(model),
        "## Config",
        "",
        "The run's, resolved." if trained else "What describes the model; nothing is known of its training.",
        "",
        "```",
        *(line for line in configs.to_text(config).splitlines() if trained or line.startswith(described)),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _measured(model) -> list[str]:
    """The last evaluation of the run that the model is from, at its step, and the rows of its results."""
    try:
        lines = [line for line in metrics.read_metrics(model.source) if line["step"] <= model.step]
        results = [row for row in metrics.read_results(model.source) if row.step == model.step]
    except (UserError, OSError, KeyError):
        return []  # a damaged record is no reason not to export the weights
    evaluated = next((line for line in reversed(lines) if any(key.startswith("eval/") for key in line)), {})
    rows = [
        (key, f"held-out, step {evaluated['step']:,}", value)
        for key, value in evaluated.items()
        if key.startswith("eval/") and isinstance(value, int | float)
    ]
    rows += [(row.metric, f"{row.suite}, {row.split}", row.value) for row in results]
    if not rows:
        return []
    table = [f"| {name} | {where} | {value:.6g} |" for name, where, value in rows]
    return ["## Measured", "", "| metric | on | value |", "| --- | --- | ---: |", *table, ""]
