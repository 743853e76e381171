"""The device mesh, and one table from parameter name to how its axes lie on it.

The mesh has three axes. Batch rows are split over `data` and `fsdp`; parameters and everything that an optimizer keeps
about them are split over `fsdp` (stored in pieces, gathered for use) and `tensor` (used in pieces). Nothing of a
parameter is split over `data`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from plm.errors import UserError
from plm.models.layers import ROW_AXES, STACKED

PyTree = Any
AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(ROW_AXES)

_VOCABULARY = ("tensor", "fsdp")
_INTO = PartitionSpec("fsdp", "tensor")  # a kernel [in, out] whose outputs the tensor axis shares out
_OUT_OF = PartitionSpec("tensor", "fsdp")  # a kernel [in, out] whose inputs are shared out: partial sums are added up
_WHOLE = PartitionSpec()

# A row describes one layer: the leading axis of stacked blocks is never split. The first regex found in the path wins.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Embeddings. Vocabulary-sized arrays are padded to a multiple, so they divide on every usual mesh.
    (r"(^|/)embedding/tokens/table$", PartitionSpec(_VOCABULARY, None)),
    (r"(^|/)embedding/positions/table$", PartitionSpec("fsdp", None)),
    (r"(^|/)embedding/segments/table$", _WHOLE),
    (r"(^|/)characters/table$", _WHOLE),
    (r"(^|/)convolutions/\d+/kernel$", PartitionSpec(None, None, "fsdp")),
    (r"(^|/)convolutions/\d+/bias$", _WHOLE),
    (r"(^|/)highways/\d+/(transform|carry)/kernel$", _INTO),
    (r"(^|/)highways/\d+/(transform|carry)/bias$", PartitionSpec("tensor")),
    (r"(^|/)characters/projection/kernel$", _OUT_OF),
    (r"(^|/)characters/projection/bias$", _WHOLE),
    # Every LayerNorm
    (r"(^|/)(\w+_)?norm/(scale|bias)$", _WHOLE),
    # Transformer blocks: heads and hidden units of the MLP are shared out
    (r"(^|/)attention/(query|key|value)/kernel$", _INTO),
    (r"(^|/)attention/(query|key|value)/bias$", PartitionSpec("tensor")),
    (r"(^|/)attention/output/kernel$", _OUT_OF),
    (r"(^|/)attention/output/bias$", _WHOLE),
    (r"(^|/)mlp/up/kernel$", _INTO),
    (r"(^|/)mlp/up/bias$", PartitionSpec("tensor")),
    (r"(^|/)mlp/down/kernel$", _OUT_OF),
    (r"(^|/)mlp/down/bias$", _WHOLE),
    # LSTM blocks: cells [C] are shared out, so the four gates of a cell stay together
    (r"(^|/)kernel_(input|recurrent)$", PartitionSpec("fsdp", None, "tensor")),
    (r"(^|/)(cell|forward|backward)/bias$", PartitionSpec(None, "tensor")),
    (r"(^|/)(cell|forward|backward)/projection$", _OUT_OF),
    # Heads
    (r"(^|/)heads/\w+/(table/)?table$", PartitionSpec(_VOCABULARY, None)),
    (r"(^|/)heads/\w+/bias$", PartitionSpec(_VOCABULARY)),
    (r"(^|/)heads/\w+/(transform|pooler)/kernel$", _INTO),
    (r"(^|/)heads/\w+/(transform|pooler)/bias$", PartitionSpec("tensor")),
    (r"(^|/)heads/\w+/(output|attend)/(kernel|bias)$", _WHOLE),
    (r"(^|/)heads/\w+/reader/mixes/\d+/(weights|gamma)$", _WHOLE),
    (r"(^|/)heads/\w+/crf/(transitions|first|last)$", _WHOLE),
)


def paths_and_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """(path with "/" between its parts, leaf) of any pytree, in the order of its leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def make_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`: axes data, fsdp, tensor, all of them Auto (the compiler places what is not said).

    Args:
      config: `config.mesh`; `data=-1` takes all devices that `fsdp` and `tensor` leave.
      devices: all of the run's by default. A single process may use the first few of its devices only.

    Raises:
      UserError: a mesh larger than the devices, one that does not divide them, an impossible axis.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: int(getattr(config, axis)) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and not (axis == "data" and size == -1):
            raise UserError(f"mesh.{axis}={size} must be at least 1" + (" or -1 (the rest)" if axis == "data" else ""))
    inner = sizes["fsdp"] * sizes["tensor"]
    count = f"{len(devices)} device{'s' * (len(devices) != 1)}"
    if sizes["data"] == -1:
        if inner > len(devices) or len(devices) % inner:
            raise UserError(
                f"mesh.fsdp={sizes['fsdp']} x mesh.tensor={sizes['tensor']} does not divide the {count}"
                " that this run has; choose a divisor"
            )
        sizes["data"] = len(devices) // inner
    wanted = sizes["data"] * inner
    shape = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if wanted > len(devices):
        raise UserError(f"{shape} needs {wanted} devices and this run has {count}; use a smaller mesh")
    if len(devices) % wanted or (wanted < len(devices) and jax.process_count() > 1):
        raise UserError(f"{shape} uses {wanted} of {count}; it must use all of them (mesh.data=-1 takes the rest)")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:wanted])


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many pieces the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(key: str, batch_size: int, mesh: Mesh | AbstractMesh, microbatches: int = 1) -> None:
    """Refuses a batch whose microbatches the mesh's row axes do not divide; `key` is the config's name for its size."""
    if microbatches < 1:
        raise UserError(f"microbatches={microbatches} must be at least 1")
    shards = row_shards(mesh)
    if batch_size < 1 or batch_size % (shards * microbatches):
        raise UserError(
            f"{key}={batch_size} must be a positive multiple of {shards * microbatches}"
            f" (mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']} x microbatches={microbatches})"
        )


def _fit(
    path: str, spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, messages: list[str]
) -> PartitionSpec:
    """`spec` without the axes that do not divide `shape`; those are put into `messages`."""
    fitted = []
    for dimension, names in enumerate(spec):
        axes = [] if names is None else [names] if isinstance(names, str) else list(names)
        while axes and shape[dimension] % int(np.prod([mesh.shape[axis] for axis in axes])):
            dropped = axes.pop()
            if mesh.shape[dropped] > 1:
                messages.append(
                    f"{path}: not split over {dropped} ({mesh.shape[dropped]}),"
                    f" which does not divide axis {dimension} of {shape}"
                )
        fitted.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*fitted)


def _parameter_spec(path: str, shape: tuple[int, ...], rules: Iterable[tuple[str, PartitionSpec]]) -> PartitionSpec:
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
    if spec is None:
        raise UserError(
            f"parameter {path} {shape} matches no row of the sharding table: add one (a model from outside names its"
            " own rows)"
        )
    if STACKED in path.split("/"):
        spec = PartitionSpec(None, *spec)
    if len(spec) > len(shape):
        raise UserError(f"parameter {path} has shape {shape}, but its row of the sharding table is {spec}")
    return spec


def partition_specs(
    tree: PyTree,
    mesh: Mesh | AbstractMesh,
    *,
    params: PyTree | None = None,
    rules: Sequence[tuple[str, PartitionSpec]] = (),
) -> tuple[PyTree, list[str]]:
    """A `PartitionSpec` for every leaf of `tree`, and what could not be split.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s. Either parameters; or a train state with `params` and, beside them,
        `carry` (rows-first: split as the batch) and any others: a leaf whose path ends with a parameter's path and
        which has that parameter's shape takes its spec (moments, accumulators), everything else is kept whole.
      mesh: only its axis sizes are read.
      params: the parameters, where `tree` is an optimizer state without them.
      rules: further rows (regex, spec of one layer), tried before `RULES`: the parameters of a model from outside.

    Returns:
      (tree of PartitionSpecs, messages): a message for every leaf with an axis that was left out since it does not
      divide the leaf's dimension.

    Raises:
      UserError: a parameter that no row matches.
    """
    rules = (*rules, *RULES)
    leaves = paths_and_leaves(tree)
    prefix = "params/"
    if params is not None:
        known = {path: tuple(leaf.shape) for path, leaf in paths_and_leaves(params)}
        is_parameter = lambda path: False  # noqa: E731
    elif any(path.startswith(prefix) for path, _ in leaves):
        known = {path[len(prefix) :]: tuple(leaf.shape) for path, leaf in leaves if path.startswith(prefix)}
        is_parameter = lambda path: path.startswith(prefix)  # noqa: E731
    else:
        known = {path: tuple(leaf.shape) for path, leaf in leaves}
        is_parameter = lambda path: True  # noqa: E731

    messages: list[str] = []
    specs = []
    for path, leaf in leaves:
        shape = tuple(leaf.shape)
        name = path.removeprefix(prefix)
        if is_parameter(path):
            spec = _parameter_spec(name, shape, rules)
        elif path.split("/")[0] == "carry":
            spec = ROWS if shape else _WHOLE
        else:
            owner = _owner(path, known)
            spec = _parameter_spec(owner, shape, rules) if owner and known[owner] == shape else _WHOLE
        specs.append(_fit(name, spec, shape, mesh, messages))
    return jax.tree.unflatten(jax.tree.structure(tree), specs), messages


def _owner(path: str, parameters: dict[str, tuple[int, ...]]) -> str | None:
    """The parameter whose path is the longest suffix of an optimizer leaf's path, as in `1/mu/blocks/.../kernel`."""
    parts = path.split("/")
    return next((name for at in range(len(parts)) if (name := "/".join(parts[at:])) in parameters), None)


def shardings(specs: PyTree, mesh: Mesh) -> PyTree:
    """Tree of PartitionSpecs -> tree of NamedShardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a batch that has rows: axis 0 over data and fsdp."""
    return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device: `batch["shared"]`, scalars."""
    return NamedSharding(mesh, _WHOLE)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts arrays where `shardings` (a tree like `tree`, or one sharding for all) say, bit for bit.

    A host array or an array of this process alone must be equal on every process; each takes the pieces that its
    devices hold. An array that already lies on the same devices is moved among them.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_place, tree, shardings)


def _place(leaf, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding.device_set == sharding.device_set:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    # A copy of each piece: on a CPU, JAX may otherwise keep the caller's memory as the buffer of a donated argument.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: np.array(host[index]))
