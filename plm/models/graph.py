"""A model as two halves: a description captured once, and its parameters as a nested dict of plain arrays."""

import dataclasses
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plm.errors import UserError
from plm.models.layers import STACKED, logical_names


def import_from_outside(name: str, what: str):
    """The object that "module:function" names, for a user's own model, objective, layout, source or optimizer."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{what}={name!r} cannot be imported: {error}") from error


@dataclasses.dataclass(frozen=True)
class Parameter:
    """path: stored path; shape: stored shape; count: numbers that train (padding of vocabulary tables left out); rows:
    entries of the vocabulary, where axis 0 is one."""

    path: str
    shape: tuple[int, ...]
    count: int
    rows: int | None = None

    @property
    def logical_names(self) -> list[str]:
        return logical_names(self.path, self.shape[0] if STACKED in self.path.split("/") else 0)


class ModelGraph:
    """`graph.init(key)` -> parameters; `graph.bind(parameters)` -> a module to call inside a plain JAX transform.

    make(rngs) builds the module. It is called under `jax.eval_shape` to describe it and, in `init`, inside `jax.jit`,
    so parameters come to life on the devices that `shardings` name and nowhere else.

    sharding_rules: further rows of the sharding table, (regex, PartitionSpec of one layer), that the module brings as
    an attribute of this name (`plm.training.sharding.RULES`).
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make
        module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        self.sharding_rules = tuple(getattr(module, "sharding_rules", ()))
        self._definition, self._abstract = nnx.split(module)
        self._keys = [path for path, _ in nnx.to_flat_state(self._abstract)]
        self.paths = ["/".join(str(part) for part in path) for path in self._keys]
        self.parameters = []
        for path, (_, variable) in zip(self.paths, nnx.to_flat_state(self._abstract), strict=True):
            shape = tuple(variable.get_value().shape)
            real = variable.get_metadata().get("real_rows")
            count = int(np.prod(shape)) if real is None else int(np.prod((real, *shape[1:])))
            self.parameters.append(Parameter(path, shape, count, real))

    def _nest(self, values) -> dict:
        tree: dict = {}
        for path, value in zip(self.paths, values, strict=True):
            *parents, leaf = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return tree

    def shapes(self) -> dict:
        """The parameters as a nested dict of `jax.ShapeDtypeStruct`."""
        return self._nest([jax.ShapeDtypeStruct(p.shape, jnp.float32) for p in self.parameters])

    def init(self, key: jax.Array, shardings=None) -> dict:
        """Fresh parameters, a nested dict of float32 arrays, made where `shardings` (a tree like `shapes()`) say."""

        def create(key):
            flat = nnx.to_flat_state(nnx.state(self._make(nnx.Rngs(key))))
            return self._nest([variable.get_value() for _, variable in flat])

        return jax.jit(create, out_shardings=shardings)(key)

    def bind(self, parameters: dict) -> nnx.Module:
        """The module with these parameters."""

        def at(path):
            node = parameters
            for part in path.split("/"):
                node = node[part]
            return node

        flat = [
            (key, variable.replace(at(path)))
            for path, (key, variable) in zip(self.paths, nnx.to_flat_state(self._abstract), strict=True)
        ]
        return nnx.merge(self._definition, nnx.from_flat_state(flat))

    def counts(self) -> dict[str, int]:
        """Trained numbers by part: body (the blocks), embedding, heads, and their total."""
        parts = {"body": 0, "embedding": 0, "heads": 0}
        for parameter in self.parameters:
            top = parameter.path.split("/")[0]
            part = {"embedding": "embedding", "heads": "heads"}.get(top, "body")
            parts[part] += parameter.count
        return {**parts, "total": sum(parts.values())}


def build(config, vocabulary_size: int, objectives: tuple[str, ...], dtype: jnp.dtype) -> ModelGraph:
    """The model that `config.model` describes, as a `ModelGraph`.

    A user's own model is `model.name='module:function'`: function(config, vocabulary_size, objectives, dtype=, rngs=)
    returns an nnx module with the call of `LanguageModel`, `initial_carry` and `heads`. Parameters whose names have no
    row in the sharding table need one in the module's attribute `sharding_rules`.
    """
    from plm.models.language_model import LanguageModel

    make = LanguageModel
    if ":" in config.model.name:
        make = import_from_outside(config.model.name, "model.name")
    elif config.model.name != "language_model":
        raise UserError(f"model.name={config.model.name!r} must be 'language_model' or 'module:function'")
    return ModelGraph(lambda rngs: make(config, vocabulary_size, objectives, dtype=dtype, rngs=rngs))
