"""The dropped Flax classes of Transformers: `config.json` + `flax_model.msgpack`, a nested dict of arrays.

BERT alone: OpenAI GPT never had a Flax class. The names are those of `plm.weights.bert` with Flax's last parts;
matrices are [inputs, outputs], as here. Config and tokenizer are Hugging Face's.
"""

import numpy as np
from etils import epath
from flax import serialization

from plm import weights
from plm.errors import UserError
from plm.weights import bert, huggingface

WEIGHTS = "flax_model.msgpack"


def recognises(directory: epath.Path) -> bool:
    return (directory / huggingface.CONFIG).exists() and (directory / WEIGHTS).exists()


def read(directory: epath.Path, *, allow_missing: str = "", vocabulary: str = "") -> weights.Foreign:
    """See `plm.weights.read`; also refuses a config that names another model or a variant with other mathematics."""
    directory = epath.Path(directory)
    path = directory / huggingface.CONFIG
    values = huggingface.read_config(path)
    if values["model_type"] != "bert":
        raise UserError(f"{path}: model_type={values['model_type']!r} has no Flax class in Transformers; 'bert' has")
    return bert.foreign(
        "flax_msgpack",
        directory,
        bert.model_settings(values, path),
        huggingface.vocabulary_size(values, path),
        read_arrays(directory / WEIGHTS),
        bert.FLAX,
        huggingface.bert_tokenizer(directory, vocabulary),
        allow_missing=allow_missing,
    )


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """{names joined by dots: array}."""
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        return dict(_flatten(tree, ""))
    except Exception as error:  # damaged bytes make the libraries raise almost anything
        raise UserError(
            f"{path} cannot be read as Flax's parameters, it is damaged or cut short: {type(error).__name__}: {error}"
        ) from None


def _flatten(tree: dict, prefix: str):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, np.ndarray):
            yield f"{prefix}{key}", value
        else:
            raise TypeError(f"{prefix}{key} is no array")
