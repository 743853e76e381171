"""ELMo as its authors publish it: `*options.json` + `*.hdf5` (bilm-tf's `dump_weights`; AllenNLP reads the same files).

| official array | shape | here |
| --- | --- | --- |
| `char_embed` | (261, dim): the row of "no token here" is not stored | `table` |
| `CNN/W_cnn_i`, `CNN/b_cnn_i` | (1, width, dim, n), (n,) | `convolutions/i/{kernel,bias}` |
| `CNN_high_i/{W,b}_{transform,carry}` | (n, n), (n,) | `highways/i/{transform,carry}/{kernel,bias}` |
| `CNN_proj/{W,b}_proj` | (n, out), (out,); none where n = out | `projection/{kernel,bias}` |
| `RNN_d/RNN/MultiRNNCell/Celli/LSTMCell/...` | direction d, layer i | `blocks/i/cell/...`, `backward_blocks/...` |
| `.../W_0` | (out + out, 4 cells): input above recurrent; gates i j f o | `kernel_input`, `kernel_recurrent` |
| `.../B` | (4 cells,), without the forget gate's + 1 | `bias` |
| `.../W_P_0` | (cells, out); none where cells = out | `projection` |
| `softmax/W`, `softmax/b` | (V, out), (V,): not in published files | `heads/bidirectional/...` |

Published files hold neither a softmax nor a vocabulary, and need none: words are read by their characters. Their model
gets the objective of none and a tokenizer of the three markers, to which every other word is an open one; text is split
at white space, as ELMo's users do it (`plm.data.tokenizers`, kind `words`). With a vocabulary file (one word a line,
`<S>`, `</S>` and `<UNK>` among them) and the softmax the language model is whole. What `write` makes has both.

The official programs keep the LSTM states of each batch row from call to call, so their vectors depend on what was read
before. Here a text is read with fresh states unless a caller hands the carry on: `outputs, carry = model(batch, carry)`
with `model.initial_carry(rows)` at first gives the official, stateful numbers; `{}` gives the fresh ones, which equal
the official program's first batch.
"""

import io
import json
import re

import h5py
import jax.numpy as jnp
import numpy as np
from etils import epath

from plm import weights
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.char_cnn import MAX_CHARACTERS, N_CHARACTERS
from plm.models.graph import build
from plm.weights import Link, same

OPTIONS, WEIGHTS = "options.json", "weights.hdf5"
WINDOW = 20  # tokens that the published program unrolls in training
TOWERS = ("blocks", "backward_blocks")  # RNN_0 reads forward, RNN_1 backward
_OFFICIAL = re.compile(r"char_embed|CNN/.*|CNN_high_\d+/.*|CNN_proj/.*|RNN_\d+/.*|softmax/.*")


def recognises(directory: epath.Path) -> bool:
    """Published files are called like `elmo_2x4096_512_2048cnn_2xhighway_options.json` and `..._weights.hdf5`."""
    return any(directory.glob(f"*{OPTIONS}")) and any(directory.glob("*.hdf5"))


def read(directory: epath.Path, *, allow_missing: str = "", vocabulary: str = "") -> weights.Foreign:
    """See `plm.weights.read`; also refuses options that contradict the weights in number or shape of any array."""
    options_path, weights_path = _files(epath.Path(directory))
    model = _model_settings(weights.read_json(options_path), options_path)
    arrays = _arrays(weights_path)
    has_softmax = "softmax/W" in arrays
    tokenizer = _tokenizer(epath.Path(directory), vocabulary)
    config = weights.describe(tokenizer, "lanes", WINDOW, model, ("bidirectional",) if has_softmax else ())
    with config.unlocked():
        config.softmax_chunk = 512  # tokens whose logits over 793,471 words are held at once
    if has_softmax:
        weights.check_vocabulary(weights_path, tokenizer.size, len(arrays["softmax/W"]))
    graph = build(config, tokenizer.size, tuple(config.objectives), jnp.float32)
    table = links(config)
    expected = weights.foreign_shapes(graph, table)
    _refuse_contradictions(expected, arrays, options_path, weights_path, missing=bool(allow_missing))
    params, report = weights.assemble(graph, table, arrays, source=weights_path, allow_missing=allow_missing)
    return weights.Foreign("elmo_hdf5", config, tokenizer, params, report)


def write(model, directory: epath.Path) -> None:
    """Writes `options.json`, `weights.hdf5`, `vocab.txt` and the tokenizer's own files; `read` gives them back exactly.

    The softmax goes along as `softmax/W` and `softmax/b`: the official readers look arrays up by name and pass it by.

    Errors: UserError for a model that the format cannot hold, naming the setting.
    """
    config, directory = model.config, epath.Path(directory)
    _refuse_others(config, model.tokenizer)
    arrays = weights.disassemble(model.graph, model.params, links(config))
    options = json.dumps(_options(config.model), indent=1) + "\n"
    # In memory first: a folder may be in a bucket, where HDF5 cannot be written in place.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS).write_bytes(buffer.getvalue())
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in model.tokenizer.vocabulary), encoding="utf-8")
    model.tokenizer.save(directory)
    (directory / OPTIONS).write_text(options)


def links(config) -> list[Link]:
    """The table above for the model of `config`."""
    model = config.model
    characters, cells = "embedding/characters", model.lstm.cells
    found = [same("char_embed", f"{characters}/table")]
    for i in range(len(model.characters.filters)):
        kernel = f"{characters}/convolutions/{i}/kernel"
        found.append(Link(f"CNN/W_cnn_{i}", (kernel,), _without_height, lambda kernel: kernel[None]))
        found.append(same(f"CNN/b_cnn_{i}", f"{characters}/convolutions/{i}/bias"))
    for i in range(model.characters.highways):
        for part in ("transform", "carry"):
            found.append(same(f"CNN_high_{i}/W_{part}", f"{characters}/highways/{i}/{part}/kernel"))
            found.append(same(f"CNN_high_{i}/b_{part}", f"{characters}/highways/{i}/{part}/bias"))
    if sum(n for _, n in model.characters.filters) != model.width:
        found.append(same("CNN_proj/W_proj", f"{characters}/projection/kernel"))
        found.append(same("CNN_proj/b_proj", f"{characters}/projection/bias"))
    for tower, ours in enumerate(TOWERS):
        for layer in range(model.layers):
            there, here = f"RNN_{tower}/RNN/MultiRNNCell/Cell{layer}/LSTMCell", f"{ours}/{layer}/cell"
            found.append(
                Link(
                    f"{there}/W_0",
                    (f"{here}/kernel_input", f"{here}/kernel_recurrent"),
                    lambda joint: np.split(joint.reshape(len(joint), 4, cells), [model.width]),
                    lambda *parts: np.concatenate(parts).reshape(-1, 4 * cells),
                )
            )
            found.append(
                Link(f"{there}/B", (f"{here}/bias",), lambda bias: (bias.reshape(4, cells),), lambda bias: bias.ravel())
            )
            if model.lstm.projection:
                found.append(same(f"{there}/W_P_0", f"{here}/projection"))
    if "bidirectional" in config.objectives:
        found.append(same("softmax/W", "heads/bidirectional/table/table"))
        found.append(same("softmax/b", "heads/bidirectional/bias"))
    return found


def _without_height(kernel: np.ndarray) -> tuple[np.ndarray]:
    (only,) = kernel  # TensorFlow's two-dimensional convolution over an image of height 1
    return (only,)


def _files(directory: epath.Path) -> tuple[epath.Path, epath.Path]:
    """(options, weights) of a folder that may hold other HDF5 files, of embeddings for example."""

    def only(pattern: str, preferred: str) -> epath.Path:
        found = sorted(directory.glob(pattern))
        best = [path for path in found if path.name.endswith(preferred)] or found
        if len(best) != 1:
            names = ", ".join(path.name for path in best)
            raise UserError(f"{directory}: {names} could all be meant; give a folder with one *{preferred}")
        return best[0]

    return only(f"*{OPTIONS}", OPTIONS), only("*.hdf5", WEIGHTS)


def _arrays(path: epath.Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}

    def take(name: str, item) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if not np.issubdtype(item.dtype, np.floating):
            raise UserError(f"{path}: {name} holds {item.dtype}, not floating-point numbers")
        if item.chunks is None and item.id.get_storage_size() < item.nbytes:
            raise UserError(f"{path} is damaged: {name} is not all there")
        arrays[name] = item[()]

    try:
        with path.open("rb") as raw, h5py.File(raw, "r") as file:
            file.visititems(take)
    except (OSError, RuntimeError, KeyError, ValueError, MemoryError) as error:  # whatever h5py says of damaged files
        raise UserError(f"{path} cannot be read as HDF5, it is damaged or cut short: {error}") from None
    return arrays


def _model_settings(options, path: epath.Path) -> dict:
    """The settings of `config.model` that options describe."""

    def wrong(key: str, value, right: str) -> UserError:
        return UserError(f"{path}: {key}={value!r} must be {right}")

    def get(key: str, right: str, fits, *default):
        value = options
        for part in key.split("."):
            value = value.get(part, *default) if isinstance(value, dict) else None
            if value is None:
                break
        if value is None and default:
            return default[0]
        if not fits(value):
            raise wrong(key, value, right)
        return value

    def whole(low: int):
        return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low

    def clip(value) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0

    if not isinstance(options, dict):
        raise UserError(f"{path} holds no options of a biLM: an object with lstm and char_cnn is right")
    count, size = "a whole number from 1", whole(1)
    cells, projection = get("lstm.dim", count, size), get("lstm.projection_dim", count, size)
    if projection > cells:
        raise wrong("lstm.projection_dim", projection, f"at most lstm.dim={cells}")
    if get("bidirectional", "true", lambda v: isinstance(v, bool), True) is not True:
        raise wrong("bidirectional", False, "true: ELMo is two language models")
    # 261 symbols in training; the inference programs count the row of zeros too. The file has 261 rows in both cases.
    both = (N_CHARACTERS, N_CHARACTERS + 1)
    get("char_cnn.n_characters", f"{both[0]} or {both[1]}", lambda v: v in both, both[1])
    get("char_cnn.max_characters_per_token", str(MAX_CHARACTERS), lambda v: v == MAX_CHARACTERS)

    def are_filters(value) -> bool:
        pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        return bool(pairs and value and all(size(n) and size(w) and w <= MAX_CHARACTERS for w, n in value))

    filters = get("char_cnn.filters", "a list of [width, number]", are_filters)
    skips = get("lstm.use_skip_connections", "true or false", lambda v: isinstance(v, bool), False)
    dropout = get("dropout", "a number from 0 to below 0.95", lambda v: clip(v) and v < 0.95, 0.0)
    return {
        "architecture": "lstm",
        "direction": "both",
        "input": "characters",
        "width": projection,
        "layers": get("lstm.n_layers", count, size),
        "dropout": float(dropout),
        "tied": False,
        "head_bias": True,
        "lstm.cells": cells,
        "lstm.projection": projection if projection < cells else 0,
        "lstm.cell_clip": float(get("lstm.cell_clip", "a number from 0", clip, 0)),
        "lstm.projection_clip": float(get("lstm.proj_clip", "a number from 0", clip, 0)),
        "lstm.residual": skips,
        "characters.dim": get("char_cnn.embedding.dim", count, size),
        "characters.filters": tuple((width, n) for width, n in filters),
        "characters.highways": get("char_cnn.n_highway", "a whole number from 0", whole(0), 0),
        "characters.activation": get("char_cnn.activation", "'relu' or 'tanh'", lambda v: v in ("relu", "tanh")),
    }


def _options(model) -> dict:
    lstm, characters = model.lstm, model.characters
    return {
        "bidirectional": True,
        "lstm": {
            "use_skip_connections": bool(lstm.residual),
            "projection_dim": model.width,
            # The official programs would clip at 0 what has 0 here; none is null there.
            "cell_clip": lstm.cell_clip or None,
            "proj_clip": lstm.projection_clip or None,
            "dim": lstm.cells,
            "n_layers": model.layers,
        },
        "char_cnn": {
            "activation": characters.activation,
            "filters": [list(pair) for pair in characters.filters],
            "n_highway": characters.highways,
            "embedding": {"dim": characters.dim},
            "n_characters": N_CHARACTERS + 1,
            "max_characters_per_token": MAX_CHARACTERS,
        },
        "dropout": model.dropout,
    }


def _tokenizer(directory: epath.Path, vocabulary: str) -> Tokenizer:
    if not vocabulary and (directory / "tokenizer_settings.json").exists():
        return Tokenizer.load(directory)
    if vocabulary or (directory / "vocab.txt").exists():
        path = vocabulary or directory / "vocab.txt"
        tokenizer = Tokenizer.from_official(path)
        if tokenizer.kind != "words":
            raise UserError(f"{path} is a vocabulary of kind {tokenizer.kind!r}; ELMo's is words, <UNK> among them")
        for role in ("bos", "eos"):
            tokenizer.role(role)
        return tokenizer
    return Tokenizer("words", ("<S>", "</S>", "<UNK>"), {"bos": 0, "eos": 1, "unk": 2}, pretokenized=True)


def _refuse_contradictions(expected: dict, arrays: dict, options: epath.Path, path: epath.Path, missing: bool) -> None:
    """Refuses arrays that the options do not describe, and described ones that have another shape or (unless `missing`
    ones may be) are not there."""
    contradiction = f"{options.name} contradicts {path}"
    for name, array in arrays.items():
        if name in expected and array.shape != expected[name]:
            raise UserError(
                f"{contradiction}: {name} is {list(array.shape)} and the options make it {list(expected[name])}"
            )
        if name not in expected and _OFFICIAL.fullmatch(name):
            raise UserError(f"{contradiction}: it holds {name}, which the options leave no place for")
    absent = [name for name in expected if name not in arrays]
    if absent and not missing:
        raise UserError(f"{contradiction}: by the options there is {absent[0]}, and it does not hold it")


def _refuse_others(config, tokenizer: Tokenizer) -> None:
    """Refuses models that the official programs cannot run."""
    wanted = {
        "name": "language_model",
        "architecture": "lstm",
        "direction": "both",
        "input": "characters",
        "tied": False,
        "segments": 0,
        "embedding_norm": False,
        "head_transform": False,
        **({"head_bias": True} if "bidirectional" in config.objectives else {}),
    }
    for key, right in wanted.items():
        if config.model.get(key) != right:
            value = config.model.get(key)
            raise UserError(f"ELMo's format holds no model with model.{key}={value!r}: it must be {right!r}")
    if others := [name for name in config.objectives if name != "bidirectional"]:
        raise UserError(f"ELMo's format has no place for the head of objectives.{others[0]}: only bidirectional's")
    if tokenizer.kind != "words":
        raise UserError(
            f"ELMo's format holds no model with data.tokenizer.kind={tokenizer.kind!r}: it must be 'words',"
            " whose characters the official programs read"
        )
