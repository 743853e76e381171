"""What the published formats of BERT share: one reading of the config, one table of names in three spellings.

| Hugging Face | google-research/bert | here |
| --- | --- | --- |
| `embeddings.{word,position,token_type}_embeddings` | the same with `/` | `embedding/{tokens,positions,segments}` |
| `embeddings.LayerNorm` | | `embedding/norm` |
| `encoder.layer.i.attention.self.{query,key,value}` | `layer_i` | `blocks/i/attention/{query,key,value}` |
| `encoder.layer.i.attention.output.{dense,LayerNorm}` | | `blocks/i/{attention/output,attention_norm}` |
| `encoder.layer.i.{intermediate,output}.dense` | | `blocks/i/mlp/{up,down}` |
| `encoder.layer.i.output.LayerNorm` | | `blocks/i/mlp_norm` |
| `cls.predictions.transform.{dense,LayerNorm}` | | `heads/masked/{transform,norm}` |
| `cls.predictions.bias` | `output_bias` | `heads/masked/bias`; the table is that of the embedding |
| `pooler.dense` | | `heads/next_sentence/pooler` |
| `cls.seq_relationship` | `output_weights`, `output_bias` | `heads/next_sentence/output` |

The encoder's names begin with `bert` but in files of the bare encoder. A decoder (`is_decoder`, BERT that reads from
left to right) has the same arrays; its head is `heads/causal`.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from plm import weights
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.graph import build
from plm.training import config as configs
from plm.weights import Link, same, transposed

# ---------------------------------------------------------------------------------------------------------------- names

_EMBEDDING = (
    ("table", "embeddings.word_embeddings", "embedding/tokens"),
    ("table", "embeddings.position_embeddings", "embedding/positions"),
    ("table", "embeddings.token_type_embeddings", "embedding/segments"),
    ("norm", "embeddings.LayerNorm", "embedding/norm"),
)
_BLOCK = (
    ("dense", "attention.self.query", "attention/query"),
    ("dense", "attention.self.key", "attention/key"),
    ("dense", "attention.self.value", "attention/value"),
    ("dense", "attention.output.dense", "attention/output"),
    ("norm", "attention.output.LayerNorm", "attention_norm"),
    ("dense", "intermediate.dense", "mlp/up"),
    ("dense", "output.dense", "mlp/down"),
    ("norm", "output.LayerNorm", "mlp_norm"),
)
_VOCABULARY_HEAD = (
    ("dense", "cls.predictions.transform.dense", "transform"),
    ("norm", "cls.predictions.transform.LayerNorm", "norm"),
    ("bias", "cls.predictions", ""),
)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How a library writes the last part of a name; `*_turned`: its matrices are [outputs, inputs]."""

    table: str
    kernel: str
    turned: bool
    scale: str
    shift: str
    bias: str = "bias"  # of the vocabulary's head
    output: tuple[str, str] = ("kernel", "bias")  # of the sentence head
    output_turned: bool = False
    slashes: bool = False

    def name(self, module: str, leaf: str) -> str:
        """`encoder.layer.3.output.dense` and `kernel` -> the whole name."""
        whole = f"{module}.{leaf}" if leaf else module
        return re.sub(r"\blayer\.", "layer_", whole).replace(".", "/") if self.slashes else whole


PYTORCH = Spelling("weight", "weight", True, "weight", "bias", output=("weight", "bias"), output_turned=True)
FLAX = Spelling("embedding", "kernel", False, "scale", "bias")
TENSORFLOW = Spelling(
    "",
    "kernel",
    False,
    "gamma",
    "beta",
    bias="output_bias",
    output=("output_weights", "output_bias"),
    output_turned=True,
    slashes=True,
)


def links(spelling: Spelling, n_layers: int, objectives: Collection[str], *, bare: bool = False) -> list[Link]:
    """The table above in a spelling, for the heads of `objectives`; bare: the encoder's names have no `bert`."""
    found: list[Link] = []
    body = "" if bare else "bert."

    def dense(theirs: str, ours: str, leaves: tuple[str, str], turned: bool) -> None:
        kernel = spelling.name(theirs, leaves[0])
        found.append((transposed if turned else same)(kernel, f"{ours}/kernel"))
        found.append(same(spelling.name(theirs, leaves[1]), f"{ours}/bias"))

    def add(kind: str, theirs: str, ours: str) -> None:
        if kind == "dense":
            dense(theirs, ours, (spelling.kernel, "bias"), spelling.turned)
        elif kind == "norm":
            found.append(same(spelling.name(theirs, spelling.scale), f"{ours}/scale"))
            found.append(same(spelling.name(theirs, spelling.shift), f"{ours}/bias"))
        elif kind == "table":
            found.append(same(spelling.name(theirs, spelling.table), f"{ours}/table"))
        else:
            found.append(same(spelling.name(theirs, spelling.bias), f"{ours}bias"))

    for kind, theirs, ours in _EMBEDDING:
        add(kind, body + theirs, ours)
    for i in range(n_layers):
        for kind, theirs, ours in _BLOCK:
            add(kind, f"{body}encoder.layer.{i}.{theirs}", f"blocks/{i}/{ours}")
    for objective in objectives:
        head = f"heads/{objective}/"
        if objective == "next_sentence":
            add("dense", f"{body}pooler.dense", f"{head}pooler")
            dense("cls.seq_relationship", f"{head}output", spelling.output, spelling.output_turned)
        else:
            for kind, theirs, ours in _VOCABULARY_HEAD:
                add(kind, theirs, head + ours)
    return found


def _as_stored(link: Link, arrays: Mapping[str, np.ndarray]) -> Link:
    """`link` under an older or another name that the array may have."""
    others = (
        (r"LayerNorm\.(weight|scale)$", "LayerNorm.gamma"),
        (r"LayerNorm\.bias$", "LayerNorm.beta"),
        # Of tensors that are one, only one is stored, under either name.
        (r"cls\.predictions\.bias$", "cls.predictions.decoder.bias"),
        (r"^(bert\.)?embeddings\.word_embeddings\.weight$", "cls.predictions.decoder.weight"),
    )
    for pattern, other in others:
        name = re.sub(pattern, other, link.theirs)
        if link.theirs not in arrays and name in arrays:
            return dataclasses.replace(link, theirs=name)
    return link


# --------------------------------------------------------------------------------------------------------------- config

# Values of hidden_act -> ours. Hugging Face's "gelu" is the erf form.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
}


def number(values: Mapping, key: str, default, rule: configs.Rule, path: object):
    """A number of a config file; UserError in one line if it is not what `rule` says."""
    return rule(f"{path}: {key}", values.get(key, default))


def choice(values: Mapping, key: str, default: str, choices: Mapping[str, str], path: object) -> str:
    """Our word for one of a config file; UserError for one that has none."""
    value = values.get(key, default)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{path}: {key}={value!r} is not supported; one of {', '.join(choices)} is")
    return choices[value]


def refuse_variants(values: Mapping, usual: Mapping[str, tuple], path: object) -> None:
    """UserError for a key whose value is not among its usual ones; a key that is not there is as usual."""
    for key, right in usual.items():
        if key in values and values[key] not in right:
            raise UserError(f"{path}: {key}={values[key]!r} is a variant that is not supported; {right[0]!r} is")


def model_settings(values: Mapping, path: object, activations: Mapping[str, str] = ACTIVATIONS) -> dict:
    """`config.model` of BERT's config; absent keys have the published defaults.

    Errors: UserError for values that are no sizes or rates, and for variants with other mathematics.
    """
    usual = {
        "position_embedding_type": ("absolute", None),
        "add_cross_attention": (False, None),
        "is_encoder_decoder": (False, None),
        "pruned_heads": ({}, None),
        "quantization_config": (None,),
    }
    refuse_variants(values, usual, path)
    size, rate = configs.whole(1), configs.real(0.0, 0.95)
    model = {
        "architecture": "transformer",
        "direction": "forward" if values.get("is_decoder") else "full",
        "width": number(values, "hidden_size", 768, size, path),
        "layers": number(values, "num_hidden_layers", 12, size, path),
        "heads": number(values, "num_attention_heads", 12, size, path),
        "mlp_width": number(values, "intermediate_size", 3072, size, path),
        "max_positions": number(values, "max_position_embeddings", 512, size, path),
        "segments": number(values, "type_vocab_size", 2, size, path),
        "embedding_norm": True,
        "dropout": number(values, "hidden_dropout_prob", 0.1, rate, path),
        "attention_dropout": number(values, "attention_probs_dropout_prob", 0.1, rate, path),
        "head_transform": True,
        "head_bias": True,
        "activation": choice(values, "hidden_act", "gelu", activations, path),
        "norm_epsilon": number(values, "layer_norm_eps", 1e-12, configs.real(0.0, above=True), path),
        "init": "truncated_normal",
        "init_stddev": number(values, "initializer_range", 0.02, configs.real(0.0, above=True), path),
    }
    refuse_heads(model, path, "hidden_size", "num_attention_heads")
    return model | {"embedding_dropout": model["dropout"]}


def refuse_heads(model: Mapping, path: object, width: str, heads: str) -> None:
    if model["width"] % model["heads"]:
        raise UserError(f"{path}: {width}={model['width']} must be divisible by {heads}={model['heads']}")


# ----------------------------------------------------------------------------------------------------------------- read


def foreign(
    format: str,
    source: object,
    model: dict,
    rows: int,
    arrays: Mapping[str, np.ndarray],
    spelling: Spelling,
    tokenizer: Tokenizer,
    *,
    allow_missing: str,
    ignore: Sequence[str] = (),
    remarks: Sequence[str] = (),
) -> weights.Foreign:
    """The model in `arrays`, with an objective for each of BERT's heads that is there.

    rows: the vocabulary's size by the config. A pooler without the sentence output is left over, unless `allow_missing`
    matches `heads/next_sentence/output`: then the head is made, with the pooler that is there.

    Errors: as `weights.assemble`; UserError for arrays of the encoder that the config knows nothing of, which would
    make another model.
    """
    weights.check_vocabulary(source, tokenizer.size, rows)
    bare = not any(re.match(r"bert[./]", name) for name in arrays)
    body = "" if bare else "bert."
    objectives = _objectives(spelling, arrays, body, model["direction"], allow_missing)
    arrays = _without_tied(source, spelling, arrays, body)
    table = [_as_stored(link, arrays) for link in links(spelling, model["layers"], objectives, bare=bare)]
    known = {link.theirs for link in table}
    encoder = tuple(spelling.name(f"{body}{part}", "") for part in ("embeddings.", "encoder."))
    for name in arrays:
        if name.startswith(encoder) and name not in known and not any(re.fullmatch(p, name) for p in ignore):
            raise UserError(
                f"{source}: {name} is a part of the encoder that its config knows nothing of, which says"
                f" {model['layers']} layers: they are not the same model's"
            )
    config = weights.describe(tokenizer, "pairs", model["max_positions"], model, objectives)
    graph = build(config, tokenizer.size, objectives, jnp.float32)
    params, report = weights.assemble(
        graph, table, arrays, source=source, allow_missing=allow_missing, ignore=ignore, remarks=remarks
    )
    return weights.Foreign(format, config, tokenizer, params, report)


def _objectives(
    spelling: Spelling, arrays: Mapping[str, np.ndarray], body: str, direction: str, allow_missing: str
) -> tuple[str, ...]:
    def there(module: str) -> bool:
        start = spelling.name(f"{module}.", "")
        return any(name.startswith(start) for name in arrays)

    objectives = []
    if there("cls.predictions"):
        objectives.append("causal" if direction == "forward" else "masked")
    if direction == "full":
        head = "heads/next_sentence/output"
        wanted = allow_missing and all(re.search(allow_missing, f"{head}/{leaf}") for leaf in ("kernel", "bias"))
        if there("cls.seq_relationship") or (wanted and there(f"{body}pooler")):
            objectives.append("next_sentence")
    return tuple(objectives)


def _without_tied(source, spelling: Spelling, arrays: Mapping[str, np.ndarray], body: str) -> dict[str, np.ndarray]:
    """`arrays` without copies of the tied table and of its bias, which must be equal."""
    arrays = dict(arrays)
    decoder = spelling.name("cls.predictions.decoder", spelling.kernel)
    table = spelling.name(f"{body}embeddings.word_embeddings", spelling.table)
    pairs = [(decoder, table)]
    bias, copy = (spelling.name(module, "bias") for module in ("cls.predictions", "cls.predictions.decoder"))
    if bias in arrays:
        pairs.append((copy, bias))
    for name, original in pairs:
        if name not in arrays or original not in arrays:
            continue
        array = np.asarray(arrays.pop(name))
        if not np.array_equal(array if spelling.turned or array.ndim == 1 else array.T, np.asarray(arrays[original])):
            raise UserError(
                f"{source}: {name} differs from {original}: only tied tables are supported (tie_word_embeddings=true)"
            )
    return arrays
