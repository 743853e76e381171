"""GPT as OpenAI published it: `params_shapes.json` + `params_0.npy`, `params_1.npy`, ... (finetune-transformer-lm).

The shards are one flat float32 array cut into equal pieces; the shapes cut it anew, in this order:

| array | shape | here |
| --- | --- | --- |
| positions | (n_ctx, W) | `embedding/positions/table` |
| tokens | (V, W) | `embedding/tokens/table`, input and output |
| then for each block | | `blocks/i/...` |
| `attn/c_attn/{w,b}` | (1, W, 3 W), (3 W,): query, key, value | `attention/{query,key,value}/{kernel,bias}` |
| `attn/c_proj/{w,b}` | (1, W, W), (W,) | `attention/output/{kernel,bias}` |
| `ln_1/{g,b}` | (W,), (W,) | `attention_norm/{scale,bias}` |
| `mlp/c_fc/{w,b}` | (1, W, 4 W), (4 W,) | `mlp/up/{kernel,bias}` |
| `mlp/c_proj/{w,b}` | (1, 4 W, W), (W,) | `mlp/down/{kernel,bias}` |
| `ln_2/{g,b}` | (W,), (W,) | `mlp_norm/{scale,bias}` |

The vocabulary is `encoder_bpe_40000.json` + `vocab_40000.bpe`, beside the weights or given. The files do not say the
number of heads: it is `n_head` of `hparams.json` where there is one (OpenAI's name for it later, and what `write`
makes), else one for every 64 units, as published.

The program that fine-tunes lays the vocabulary, new rows for special tokens and the positions into one matrix, all of
whose rows are classes of its softmax: that is `model.positions_in_softmax`, a matter of the run and not of the weights.
"""

import io
import json
import re

import jax.numpy as jnp
import numpy as np
from etils import epath

from plm import weights
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.graph import build
from plm.weights import Link, same

SHAPES, HPARAMS = "params_shapes.json", "hparams.json"
ENCODER, MERGES = "encoder_bpe_40000.json", "vocab_40000.bpe"
SHARDS = 10
HEAD_WIDTH = 64
# What the published program cannot vary.
FIXED = {
    "tied": True,
    "segments": 0,
    "embedding_norm": False,
    "head_transform": False,
    "head_bias": False,
    "activation": "gelu_tanh",
    "norm_epsilon": 1e-5,
}


def recognises(directory: epath.Path) -> bool:
    return (directory / SHAPES).exists() and any(directory.glob("params_*.npy"))


def read(directory: epath.Path, *, allow_missing: str = "", vocabulary: str = "") -> weights.Foreign:
    """See `plm.weights.read`; also refuses shards that do not hold as many numbers as the shapes say."""
    directory = epath.Path(directory)
    shapes = _shapes(directory / SHAPES)
    (n_positions, width), (n_tokens, _) = shapes[:2]
    n_layers = (len(shapes) - 2) // 12
    mlp_width, heads = shapes[8][-1], _heads(directory, width)
    tokenizer = _tokenizer(directory, vocabulary)
    weights.check_vocabulary(directory, tokenizer.size, n_tokens)
    model = {
        "architecture": "transformer",
        "direction": "forward",
        "width": width,
        "layers": n_layers,
        "heads": heads,
        "mlp_width": mlp_width,
        "max_positions": n_positions,
        # The rates of the published program; they say nothing without training.
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "embedding_dropout": 0.1,
        "embedding_dropout_on": "matrix",
        **FIXED,
    }
    config = weights.describe(tokenizer, "blocks", n_positions, model, ("causal",))
    graph = build(config, tokenizer.size, tuple(config.objectives), jnp.float32)
    table = links(n_layers)
    expected = weights.foreign_shapes(graph, table)
    for number, (found, (name, wanted)) in enumerate(zip(shapes, expected.items(), strict=True)):
        if found != wanted:
            raise UserError(f"{directory / SHAPES}: shape {number} ({name}) is {list(found)} and not {list(wanted)}")
    params, report = weights.assemble(
        graph, table, read_arrays(directory), source=directory, allow_missing=allow_missing
    )
    return weights.Foreign("openai_npy", config, tokenizer, params, report)


def read_arrays(directory: epath.Path) -> dict[str, np.ndarray]:
    """{name: array} in the order of the file, under the names of `links`."""
    directory = epath.Path(directory)
    shapes = _shapes(directory / SHAPES)
    flat = _flat(directory, sum(map(_size, shapes)))
    ends = np.cumsum([_size(shape) for shape in shapes])[:-1]
    names = [link.theirs for link in links((len(shapes) - 2) // 12)]
    parts = zip(names, np.split(flat, ends), shapes, strict=True)
    return {name: part.reshape(shape) for name, part, shape in parts}


def write(model, directory: epath.Path) -> None:
    """Writes ten shards, the shapes, `hparams.json`, the vocabulary's two files and the tokenizer's own; `read` gives
    them back exactly.

    Errors: UserError for a model that the format cannot hold, naming the setting.
    """
    config, directory = model.config, epath.Path(directory)
    _refuse_others(config, model.tokenizer)
    arrays = weights.disassemble(model.graph, model.params, links(config.model.layers))
    flat = np.concatenate([array.ravel() for array in arrays.values()])
    directory.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(np.array_split(flat, SHARDS)):
        buffer = io.BytesIO()
        np.save(buffer, shard)
        (directory / f"params_{number}.npy").write_bytes(buffer.getvalue())
    tokenizer = model.tokenizer
    hparams = {
        "n_vocab": tokenizer.size,
        "n_ctx": config.model.max_positions,
        "n_embd": config.model.width,
        "n_head": config.model.heads,
        "n_layer": config.model.layers,
    }
    (directory / HPARAMS).write_text(json.dumps(hparams, indent=1) + "\n")
    ids = {piece: number for number, piece in enumerate(tokenizer.vocabulary)}
    (directory / ENCODER).write_text(json.dumps(ids), encoding="utf-8")
    merges = "".join(f"{first} {second}\n" for first, second in tokenizer.merges)
    (directory / MERGES).write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    tokenizer.save(directory)
    # Last: a folder without it is no model.
    (directory / SHAPES).write_text(json.dumps([list(array.shape) for array in arrays.values()]))


def links(n_layers: int) -> list[Link]:
    """The table above, in the order of the file."""

    def convolution(there: str, here: str) -> Link:
        return Link(there, (here,), lambda kernel: (kernel[0],), lambda kernel: kernel[None])

    found = [same("positions", "embedding/positions/table"), same("tokens", "embedding/tokens/table")]
    for i in range(n_layers):
        there, here = f"h{i}", f"blocks/{i}"
        heads = [f"{here}/attention/{part}" for part in ("query", "key", "value")]
        found += [
            Link(
                f"{there}/attn/c_attn/w",
                tuple(f"{part}/kernel" for part in heads),
                lambda kernel: np.split(kernel[0], 3, axis=1),
                lambda *parts: np.concatenate(parts, axis=1)[None],
            ),
            Link(
                f"{there}/attn/c_attn/b",
                tuple(f"{part}/bias" for part in heads),
                lambda bias: np.split(bias, 3),
                lambda *parts: np.concatenate(parts),
            ),
            convolution(f"{there}/attn/c_proj/w", f"{here}/attention/output/kernel"),
            same(f"{there}/attn/c_proj/b", f"{here}/attention/output/bias"),
            same(f"{there}/ln_1/g", f"{here}/attention_norm/scale"),
            same(f"{there}/ln_1/b", f"{here}/attention_norm/bias"),
            convolution(f"{there}/mlp/c_fc/w", f"{here}/mlp/up/kernel"),
            same(f"{there}/mlp/c_fc/b", f"{here}/mlp/up/bias"),
            convolution(f"{there}/mlp/c_proj/w", f"{here}/mlp/down/kernel"),
            same(f"{there}/mlp/c_proj/b", f"{here}/mlp/down/bias"),
            same(f"{there}/ln_2/g", f"{here}/mlp_norm/scale"),
            same(f"{there}/ln_2/b", f"{here}/mlp_norm/bias"),
        ]
    return found


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _shapes(path: epath.Path) -> list[tuple[int, ...]]:
    shapes = weights.read_json(path)
    good = (
        isinstance(shapes, list)
        and all(isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) for shape in shapes)
        and len(shapes) >= 14
        and (len(shapes) - 2) % 12 == 0
        and all(len(shape) == 2 for shape in shapes[:2])
        and all(shapes[8])
    )
    if not good:
        raise UserError(f"{path} is no list of the shapes of GPT: positions, tokens and 12 arrays for each block")
    return [tuple(shape) for shape in shapes]


def _flat(directory: epath.Path, wanted: int) -> np.ndarray:
    """All shards, joined; float32 [wanted]."""
    found = {}
    for path in directory.glob("params_*.npy"):
        if match := re.fullmatch(r"params_(\d+)\.npy", path.name):
            found[int(match[1])] = path
    absent = [number for number in range(max(found, default=0)) if number not in found]
    if absent or not found:
        raise UserError(f"{directory}: params_{absent[0] if absent else 0}.npy is not there")
    shards = []
    for _, path in sorted(found.items()):
        try:
            shard = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError, MemoryError) as error:  # what np.load says of damaged files
            raise UserError(f"{path} cannot be read as an array, it is damaged or cut short: {error}") from None
        if not isinstance(shard, np.ndarray) or shard.ndim != 1 or shard.dtype != np.float32:
            raise UserError(f"{path} holds no flat array of float32 numbers")
        shards.append(shard)
    there = sum(shard.size for shard in shards)
    if there != wanted:
        raise UserError(
            f"{directory}: params_0.npy to params_{len(shards) - 1}.npy hold {there:,} numbers and {SHAPES} describes"
            f" {wanted:,}: a shard is missing, or they are not the same model's"
        )
    return np.concatenate(shards)


def _heads(directory: epath.Path, width: int) -> int:
    path = directory / HPARAMS
    if path.exists():
        settings = weights.read_json(path)
        heads = settings.get("n_head") if isinstance(settings, dict) else None
        if type(heads) is not int or heads < 1 or width % heads:
            raise UserError(f"{path}: n_head={heads!r} must be a whole number that divides the width {width}")
        return heads
    if width % HEAD_WIDTH:
        raise UserError(
            f"{directory}: the width {width} is no multiple of {HEAD_WIDTH}, so the published rule gives no number of"
            f' heads: say it in {HPARAMS}, for example {{"n_head": 12}}'
        )
    return width // HEAD_WIDTH


def _tokenizer(directory: epath.Path, vocabulary: str) -> Tokenizer:
    if not vocabulary and (directory / "tokenizer_settings.json").exists():
        return Tokenizer.load(directory)
    if not vocabulary and not (directory / ENCODER).exists():
        raise UserError(
            f"{directory} holds no {ENCODER} and {MERGES}: put them there, or name their folder with --vocabulary"
        )
    tokenizer = Tokenizer.from_official(vocabulary or directory / ENCODER)
    if tokenizer.kind != "bpe":
        raise UserError(f"{vocabulary} is a vocabulary of kind {tokenizer.kind!r}; GPT's is {ENCODER} and {MERGES}")
    return tokenizer


def _refuse_others(config, tokenizer: Tokenizer) -> None:
    """Refuses models that the official program cannot run."""
    model = config.model
    wanted = {"name": "language_model", "architecture": "transformer", "direction": "forward", "input": "tokens"}
    for key, right in (wanted | FIXED).items():
        if model.get(key) != right:
            raise UserError(f"GPT's format holds no model with model.{key}={model.get(key)!r}: it must be {right!r}")
    if not model.max_positions:
        raise UserError("GPT's format holds no model with model.max_positions=0: it must be 1 at least")
    if model.mlp_width != 4 * model.width:
        raise UserError(
            f"GPT's format holds no model with model.mlp_width={model.mlp_width}: it must be 4 x model.width"
        )
    if others := [name for name in config.objectives if name != "causal"]:
        raise UserError(f"GPT's format has no place for the head of objectives.{others[0]}: only causal's")
    if tokenizer.kind != "bpe":
        raise UserError(
            f"GPT's format holds no model with data.tokenizer.kind={tokenizer.kind!r}: it must be 'bpe',"
            " which the official program reads"
        )
