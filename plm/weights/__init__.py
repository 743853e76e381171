"""Weights that others published, in and out: one file per foreign format, one table of names in each.

| format | recognised by | in | out |
| --- | --- | --- | --- |
| `elmo_hdf5` | `options.json` + `*.hdf5` | ELMo as published (bilm-tf, AllenNLP) | yes |
| `openai_npy` | `params_shapes.json` + `params_0.npy` ... | GPT as published (finetune-transformer-lm) | yes |
| `huggingface` | `config.json` + `model.safetensors`, or its shards | BERT, OpenAI GPT | yes |
| `flax_msgpack` | `config.json` + `flax_model.msgpack` | the dropped Flax classes of Transformers | no |
| `bert_tf` | `bert_config.json` + `*.ckpt.index` | google-research/bert | no |

`read(SRC)` finds the format and returns a `Foreign`: a config that describes the model, its tokenizer, the parameters
under this project's names, and a report of what matched. Every reader is strict: see `assemble`.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from etils import epath

from plm.errors import UserError
from plm.training import config as configs

FORMATS = ("elmo_hdf5", "openai_npy", "huggingface", "flax_msgpack", "bert_tf")


@dataclasses.dataclass(frozen=True)
class Link:
    """A foreign array and the parameters of ours that it holds.

    theirs: its name. ours: logical names (`blocks/3/attention/query/kernel`), one or several. split: foreign array ->
    our arrays, in the order of `ours`; join: our arrays -> the foreign one. Both are exact: they only move numbers.
    """

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[np.ndarray], Sequence[np.ndarray]] = lambda array: (array,)
    join: Callable[..., np.ndarray] = lambda array: array


def same(theirs: str, ours: str) -> Link:
    """The same array under another name."""
    return Link(theirs, (ours,))


def transposed(theirs: str, ours: str) -> Link:
    """A matrix stored [outputs, inputs] there and [inputs, outputs] here."""
    return Link(theirs, (ours,), lambda array: (array.T,), lambda array: array.T)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a load did: our names that got their values, ours that were missing and stayed at their initial values
    (allowed by a regex), theirs that nothing here reads, and remarks."""

    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        lines = [f"{len(self.matched)} parameters read"]
        if self.missing:
            lines.append(f"{len(self.missing)} missing, left at random values as allowed: {', '.join(self.missing)}")
        if self.left_over:
            lines.append(f"{len(self.left_over)} left over, not read: {', '.join(self.left_over)}")
        return [*lines, *self.remarks]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A foreign model. config: resolved, `data.tokenizer` and `data.layout` included (they decide how text is framed);
    params: nested dict of NumPy arrays, float32, by stored names; format: one of `FORMATS`."""

    format: str
    config: object
    tokenizer: object
    params: dict
    report: Report

    @property
    def fits_any_vocabulary(self) -> bool:
        """Whether no parameter belongs to an entry of the vocabulary: words are read by their characters alone."""
        return self.config.model.get("input") == "characters" and not self.config.objectives


def format_of(directory: epath.PathLike):
    """The module of the format of a directory, or None for none that is known."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return None
    for name in FORMATS:
        module = importlib.import_module(f"plm.weights.{name}")
        if module.recognises(directory):
            return module
    return None


def read(source: epath.PathLike, *, allow_missing: str = "", vocabulary: str = "") -> Foreign:
    """The model in a foreign directory.

    allow_missing: regex of logical names that may stay at random values. vocabulary: official vocabulary files or their
    directory, where the source has none beside its weights.

    Errors: UserError when the format is not known, a file is damaged, an array has another shape than the config says,
    a parameter is missing, or the vocabulary does not fit the embedding.
    """
    try:
        re.compile(allow_missing)
    except re.error as error:
        raise UserError(f"allow_missing={allow_missing!r} is no regular expression: {error}") from None
    directory = epath.Path(source)
    module = format_of(directory)
    if module is None:
        raise UserError(f"{source}: {_why_not(directory)}")
    return module.read(directory, allow_missing=allow_missing, vocabulary=vocabulary)


def _why_not(directory: epath.Path) -> str:
    if not directory.exists():
        return "there is no such folder"
    if not directory.is_dir():
        return "is a file: give the folder that holds the weights, their config and their vocabulary"
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"{pickles[0]} is a PyTorch pickle, which can run any code when it is opened, so it is never read: where it"
            " comes from, save it again with save_pretrained(..., safe_serialization=True), which writes"
            " model.safetensors"
        )
    return (
        "no weights that are known here: a run's workdir (config.json, checkpoints/), or a folder with options.json and"
        " weights.hdf5 (ELMo), params_shapes.json and params_*.npy (GPT), config.json and model.safetensors or"
        " flax_model.msgpack (Hugging Face), or bert_config.json and bert_model.ckpt.index (BERT)"
    )


def assemble(
    graph,
    links: Iterable[Link],
    arrays: Mapping[str, np.ndarray],
    *,
    source: object,
    allow_missing: str = "",
    ignore: Sequence[str] = (),
    copies: Mapping[str, str] | None = None,
    remarks: Sequence[str] = (),
) -> tuple[dict, Report]:
    """Parameters of `graph` by stored names from foreign `arrays`, and what was done.

    Tables of a vocabulary are padded with zero rows as they are stored. Everything becomes float32.

    ignore: regexes (fullmatch) of foreign names that hold no parameter (position ids, an optimizer's slots). copies:
    {foreign name: foreign name of the array that it must equal}: tied weights stored twice.

    Errors: UserError for a parameter without a value that `allow_missing` (search) does not allow, a shape that is not
    the graph's, a copy that differs. What is left over is reported and is no error.
    """
    wanted = dict(_logical_shapes(graph))
    values: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for link in links:
        if link.theirs not in arrays:
            continue
        used.add(link.theirs)
        array = np.asarray(arrays[link.theirs])
        if not np.issubdtype(array.dtype, np.floating):
            array = array.astype(np.float32)  # bfloat16 of ml_dtypes among them
        try:
            parts = list(link.split(array))
        except (ValueError, IndexError, TypeError):
            raise UserError(
                f"{source}: {link.theirs} has shape {list(array.shape)}, which does not fit {', '.join(link.ours)}"
            ) from None
        for name, part in zip(link.ours, parts, strict=True):
            if name not in wanted:
                raise ValueError(f"{name} is not a parameter of the model")
            real, stored = wanted[name]
            if part.shape != real:
                raise UserError(
                    f"{source}: {link.theirs} has shape {list(array.shape)}; {name} of the model that the config"
                    f" describes takes {list(part.shape)} of it and needs {list(real)}"
                )
            padding = [(0, there - here) for there, here in zip(stored, real, strict=True)]
            values[name] = np.pad(np.asarray(part, np.float32), padding)
    for copy, original in (copies or {}).items():
        if copy in arrays:
            used.add(copy)
            if original in arrays and not np.array_equal(np.asarray(arrays[copy]), np.asarray(arrays[original])):
                raise UserError(f"{source}: {copy} differs from {original}, and the model here has one table for both")
    missing = [name for name in wanted if name not in values]
    refused = [name for name in missing if not (allow_missing and re.search(allow_missing, name))]
    left_over = [
        name for name in arrays if name not in used and not any(re.fullmatch(pattern, name) for pattern in ignore)
    ]
    if refused:
        shown = ", ".join(refused[:5]) + (f" and {len(refused) - 5} more" if len(refused) > 5 else "")
        beside = f"; left over there: {', '.join(left_over[:5])}" if left_over else ""
        raise UserError(
            f"{source}: {len(refused)} of {len(wanted)} parameters are missing: {shown}{beside}; a regex of names that"
            " may stay random (--allow_missing) lets it pass"
        )
    params = _stored(graph, values)
    return params, Report(tuple(values), tuple(missing), tuple(left_over), tuple(remarks))


def disassemble(graph, params: dict, links: Iterable[Link]) -> dict[str, np.ndarray]:
    """The foreign arrays that hold `params` (by stored names), without the padding of vocabulary tables.

    Errors: ValueError when a parameter has no place in `links`: the format cannot hold the model.
    """
    values = logical_values(graph, params)
    arrays, used = {}, set()
    for link in links:
        if any(name not in values for name in link.ours):
            continue
        arrays[link.theirs] = np.ascontiguousarray(link.join(*(values[name] for name in link.ours)))
        used.update(link.ours)
    if homeless := [name for name in values if name not in used]:
        raise ValueError(f"no place for {', '.join(homeless)}")
    return arrays


def foreign_shapes(graph, links: Iterable[Link]) -> dict[str, tuple[int, ...]]:
    """{their name: shape that it must have to hold the parameters of `graph`}, in the order of `links`."""
    wanted = {name: real for name, (real, _) in _logical_shapes(graph)}
    return {link.theirs: link.join(*(np.zeros(wanted[name], np.int8) for name in link.ours)).shape for link in links}


def logical_values(graph, params: dict) -> dict[str, np.ndarray]:
    """{logical name: array without padding} of parameters by stored names."""
    values = {}
    for parameter in graph.parameters:
        leaf: object = params
        for part in parameter.path.split("/"):
            leaf = leaf[part]
        leaf = np.asarray(leaf)
        names = parameter.logical_names
        rows = real_shape(parameter)
        if names == [parameter.path]:
            values[parameter.path] = leaf[tuple(slice(length) for length in rows)]
        else:
            values |= dict(zip(names, leaf, strict=True))
    return values


def real_shape(parameter) -> tuple[int, ...]:
    """The stored shape without the rows that only pad a vocabulary."""
    rest = int(np.prod(parameter.shape[1:]))
    return (parameter.count // rest, *parameter.shape[1:]) if parameter.shape else ()


def _logical_shapes(graph):
    """(logical name, (shape without padding, stored shape)) of every parameter, layer by layer."""
    for parameter in graph.parameters:
        names = parameter.logical_names
        if names == [parameter.path]:
            yield parameter.path, (real_shape(parameter), parameter.shape)
        else:
            for name in names:
                yield name, (parameter.shape[1:], parameter.shape[1:])


def _stored(graph, values: dict[str, np.ndarray]) -> dict:
    """`values` by logical names -> the nested dict by stored names; what is missing gets initial values of seed 0."""
    fresh = None
    tree: dict = {}
    for parameter in graph.parameters:
        names = parameter.logical_names
        if any(name not in values for name in names) and fresh is None:
            import jax  # reading alone needs no device

            fresh = logical_fresh(graph, jax.random.key(0))
        layers = [values[name] if name in values else fresh[name] for name in names]
        *parents, leaf = parameter.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = layers[0] if names == [parameter.path] else np.stack(layers)
    return tree


def logical_fresh(graph, key) -> dict[str, np.ndarray]:
    """Initial values by logical names, padding rows included."""
    import jax

    params = jax.device_get(graph.init(key))
    values = {}
    for parameter in graph.parameters:
        leaf: object = params
        for part in parameter.path.split("/"):
            leaf = leaf[part]
        names = parameter.logical_names
        values |= {parameter.path: leaf} if names == [parameter.path] else dict(zip(names, leaf, strict=True))
    return values


def read_json(path: epath.Path):
    """The content of a JSON file; UserError in one line if there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def describe(tokenizer, layout: str, seq_len: int, model: Mapping, objectives: Iterable[str]):
    """The resolved config of a model from elsewhere: what it is and how its text is read, nothing of its training."""
    config = configs.base()
    settings = {
        "data.source": "",
        "data.layout": layout,
        "data.tokenizer.kind": tokenizer.kind,
        "data.tokenizer.vocab": tokenizer.size,
        "data.tokenizer.lowercase": tokenizer.lowercase,
        "data.tokenizer.pretokenized": tokenizer.pretokenized,
        "seq_len": seq_len,
        "total_steps": 1,
    }
    configs.apply(config, settings)
    configs.set_model(config, model)
    for objective in objectives:
        configs.add_objective(config, objective)
    return configs.resolve(config)


def check_vocabulary(source: object, tokenizer_size: int, rows: int) -> None:
    """Refuses a vocabulary that does not fit the embedding."""
    if tokenizer_size != rows:
        raise UserError(
            f"{source}: the vocabulary has {tokenizer_size:,} entries and the embedding {rows:,} rows; they must be the"
            " same model's"
        )
