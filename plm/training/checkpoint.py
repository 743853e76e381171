"""Checkpoints over Orbax: saved in the background, checked leaf by leaf, restored on any mesh and process count.

A checkpoint is the directory `<workdir>/checkpoints/<step>/` with the items

    params      parameters, a nested dict of arrays
    carry       the model's states, if it has any
    rest        everything else of the train state (step, optimizer, counters)
    manifest    JSON: shape, type and checksum of every leaf by its path

Trees are stored as nested dicts of arrays by their paths, so nothing is pickled and no class must exist to read them.
Orbax writes a step under a temporary name and renames it when it is complete (object storage: marks it complete), so a
process killed at any moment leaves only whole checkpoints and debris that the next start clears away. Orbax does not
notice damage that happens later; the checksums do. They are computed on the devices before the save and again after
the restore.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy

from plm.errors import UserError
from plm.training.metrics import RunRecord
from plm.training.sharding import PyTree, paths_and_leaves

FOLDER = "checkpoints"
_PARAMS, _CARRY, _REST, _MANIFEST = "params", "carry", "rest", "manifest"
_DAMAGED = ".damaged"
_REMOVED = ".removed"
_SHOWN = 3  # differences that a message spells out


# Orbax tells every phase of every save through absl's logger and warns of defaults that are meant here. What goes wrong
# in it also arrives as an exception, and is told once, by us.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)


@contextlib.contextmanager
def _hushed():
    """Inside, reads that were abandoned because another one failed are not each told with a traceback."""
    hook, asyncio_logger = sys.unraisablehook, logging.getLogger("asyncio")
    was_disabled = asyncio_logger.disabled
    sys.unraisablehook, asyncio_logger.disabled = lambda _: None, True
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
            gc.collect()  # drops the abandoned coroutines while nobody listens
    finally:
        sys.unraisablehook, asyncio_logger.disabled = hook, was_disabled


class _UnusableError(Exception):
    """A checkpoint that is damaged, half gone or unreadable; the message names what is wrong in one line."""


# Checksums


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit over all (the finalizer of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _checksum(x: jax.Array) -> jax.Array:
    """uint32 of an array's bits and their positions, equal on every mesh: a sum modulo 2^32 has no order.

    A change of one element always shows, since each term is a bijection of the element's bits.
    """
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        size = min(x.dtype.itemsize, 4)
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mix(bits + position * jnp.uint32(0x9E3779B1)), dtype=jnp.uint32)


def _checksums_of_list(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


@functools.cache
def _checksum_program(mesh: Mesh | None) -> Callable[[list], jax.Array]:
    """On a mesh the result must lie whole on every process."""
    return jax.jit(_checksums_of_list, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def checksums(leaves: dict[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Path -> checksum (uint32) of every leaf, computed on the devices that hold it."""
    values = list(leaves.values())
    if not values:
        return {}
    meshes = (leaf.sharding.mesh for leaf in values if isinstance(getattr(leaf, "sharding", None), NamedSharding))
    compute = _checksum_program(next((mesh for mesh in meshes if mesh.size > 1), None))
    return {path: int(value) for path, value in zip(leaves, np.asarray(compute(values)), strict=True)}


# Manifests: what a checkpoint holds


def _item_of(path: str) -> str:
    top = path.split("/")[0]
    return top if top in (_PARAMS, _CARRY) else _REST


def _digest(leaves: dict) -> str:
    return hashlib.blake2b(json.dumps(leaves, sort_keys=True).encode(), digest_size=16).hexdigest()


def _manifest(leaves: dict[str, jax.Array]) -> dict:
    sums = checksums(leaves)
    described = {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": f"{sums[path]:08x}"}
        for path, leaf in leaves.items()
    }
    return {"format": 1, "leaves": described, "digest": _digest(described)}


def _read_manifest(directory: epath.Path) -> dict[str, dict]:
    try:
        manifest = ocp.JsonCheckpointHandler().restore(directory / _MANIFEST)
        leaves = manifest["leaves"]
        if _digest(leaves) != manifest["digest"]:
            raise ValueError("its checksum differs")
    except Exception as error:  # whatever damaged JSON can raise
        _raise_if_not_damage(error)
        raise _UnusableError(f"its manifest is damaged or missing ({_one_line(error)})") from error
    return leaves


def _raise_if_not_damage(error: Exception) -> None:
    """Running out of memory says nothing about the files."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        raise error


def _one_line(error: object) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= 120 else line[:120] + "..."


def _describe(leaf) -> str:
    shape, dtype = (leaf["shape"], leaf["dtype"]) if isinstance(leaf, dict) else (leaf.shape, leaf.dtype)
    return f"{dtype}{list(shape)}"


def _differences(stored: dict[str, dict], wanted: dict[str, Any]) -> list[str]:
    """What stands in the way of reading `wanted` (path -> leaf) from a checkpoint with the leaves `stored`."""
    lines = [f"{path} is missing in the checkpoint" for path in wanted if path not in stored]
    lines += [f"{path} is only in the checkpoint" for path in stored if path not in wanted]
    for path in wanted:
        if path in stored and _describe(stored[path]) != _describe(wanted[path]):
            lines.append(f"{path} is {_describe(stored[path])} in the checkpoint and {_describe(wanted[path])} here")
    return lines


def spell_out(lines: Sequence[str]) -> str:
    """The first few for a message, and how many more there are."""
    more = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


# Trees and files


def nest(leaves: dict[str, Any]) -> dict:
    """Path -> leaf as nested dicts."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _below(item: str, leaves: dict[str, Any]) -> dict[str, Any]:
    """The leaves of one item, by their paths inside it: `params` and `carry` are the item itself."""
    prefix = "" if item == _REST else item + "/"
    return {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if _item_of(path) == item}


def _steps(directory: epath.Path) -> list[int]:
    """Complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def _agree(error: str | None) -> None:
    """Raises `_UnusableError` on every process if any met an error: they must all turn to the same checkpoint."""
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))
    if failed:
        raise _UnusableError(error or "another process could not read it")


def _read_item(directory: epath.Path, wanted: dict[str, Any], restore_args: Callable[[Any], Any], **options) -> dict:
    """Path inside the item in `directory` -> array, for all its leaves (or, `partial_restore=True`, some of them).

    Uses the handler and not a `Checkpointer`, whose barrier would hang the other processes if one of them met damage.
    """
    tree = nest(wanted)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    arguments = ocp.args.PyTreeRestore(item=abstract, restore_args=jax.tree.map(restore_args, tree), **options)
    return dict(paths_and_leaves(ocp.PyTreeCheckpointHandler().restore(directory, args=arguments)))


def _unreadable(directory: epath.Path, prefix: str, wanted: dict[str, Any], problem: Exception) -> str:
    """One line that names the leaves that cannot be read, found by reading them one by one."""
    bad = []
    for path, leaf in wanted.items():
        try:
            _read_item(directory, {path: leaf}, _to_host, partial_restore=True)
        except Exception:
            bad.append(prefix + path)
    if 0 < len(bad) < len(wanted):
        return f"{spell_out(bad)} cannot be read"
    return f"its item {directory.name} cannot be read ({_one_line(problem)})"


def _read(
    directory: epath.Path, wanted: dict[str, Any], items: Iterable[str], restore_args: Callable[[Any], Any]
) -> dict[str, Any]:
    """Path -> array for the `wanted` leaves (path -> shape, dtype), which are all leaves of `items`.

    Raises:
      _UnusableError: damaged or unreadable.
      UserError: whole, but with other leaves than `wanted`.
    """
    items = tuple(items)
    error, stored = None, {}
    try:
        stored = {path: leaf for path, leaf in _read_manifest(directory).items() if _item_of(path) in items}
    except _UnusableError as problem:
        error = str(problem)
    _agree(error)
    if differences := _differences(stored, wanted):
        tops = ", ".join(sorted({line.split("/")[0].split(" ")[0] for line in differences}))
        raise UserError(
            f"checkpoint {directory} does not fit this run ({tops}): {spell_out(differences)}; resume with the config"
            " it was made with, or use a new workdir"
        )
    result: dict[str, Any] = {}
    with _hushed():
        for item in items:
            prefix = "" if item == _REST else item + "/"
            leaves = _below(item, wanted)
            try:
                if leaves:
                    read = _read_item(directory / item, leaves, restore_args)
                    result |= {prefix + path: leaf for path, leaf in read.items()}
            except Exception as problem:  # TensorStore and Orbax raise many kinds for damaged files
                _raise_if_not_damage(problem)
                error = error or _unreadable(directory / item, prefix, leaves, problem)
    _agree(error)
    result = {path: result[path] for path in wanted}
    wrong = [path for path, value in checksums(result).items() if f"{value:08x}" != stored[path]["checksum"]]
    if wrong:
        raise _UnusableError(f"{spell_out(wrong)} {'is' if len(wrong) == 1 else 'are'} damaged (the checksum differs)")
    return result


def _to_devices(leaf) -> ocp.ArrayRestoreArgs:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype)


def _to_host(leaf) -> ocp.RestoreArgs:
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)


def _restore_state(directory: epath.Path, like: PyTree, items: Sequence[str] = (_PARAMS, _CARRY, _REST)) -> PyTree:
    """A tree like `like`, with the leaves of `items` from the checkpoint and the others as they are in `like`."""
    leaves = dict(paths_and_leaves(like))
    wanted = {path: leaf for path, leaf in leaves.items() if _item_of(path) in items}
    leaves |= _read(directory, wanted, items, _to_devices)
    return jax.tree.unflatten(jax.tree.structure(like), list(leaves.values()))


def _tell(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass
class _Step(preservation_policy.PreservationPolicy):
    """Preserves one checkpoint, which may become another one."""

    step: int | None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one run: `save` as training goes, `restore_latest` at its start.

    Args:
      directory: usually `<workdir>/checkpoints`; local or object storage. Made if it does not exist.
      keep: how many of the newest checkpoints stay.
      keep_at: steps whose parameters stay for ever; the rest of such a checkpoint goes when it is no longer one of the
        newest `keep`.
      best: the step of the best evaluation so far, kept in the same way until `keep_best` names another one.
      every_steps: `save` saves at multiples of it and at `keep_at`; 0 = only at `keep_at` and when forced.
      report: takes one line for each checkpoint that cannot be used; standard error by default.

    Every process of a run makes one and calls its methods in the same order. Use as a context manager, or `close`.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int = 3,
        keep_at: Iterable[int] = (),
        every_steps: int = 0,
        best: int | None = None,
        report: Callable[[str], None] = _tell,
    ):
        if keep < 1:
            raise UserError(f"checkpoint.keep={keep} must be at least 1")
        self.directory = epath.Path(directory).absolute() if "://" not in str(directory) else epath.Path(directory)
        self._keep, self._keep_at, self._every, self._report = keep, frozenset(keep_at), every_steps, report
        self._best = _Step(best)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.AnyPreservationPolicy(
                        [
                            preservation_policy.LatestN(keep),
                            preservation_policy.CustomSteps(sorted(self._keep_at)),
                            self._best,
                        ]
                    ),
                    cleanup_tmp_directories=True,
                    save_root_metadata=False,
                ),
            )
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.directory}: {_one_line(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _kept(self, step: int) -> bool:
        return step in self._keep_at or step == self._best.step

    def keep_best(self, step: int) -> None:
        """Keeps the saved checkpoint of this step, and no longer that of the best one before."""
        before, self._best.step = self._best.step, step
        self.wait()
        saved = sorted(self._manager.all_steps())
        if before is not None and before in saved[: -self._keep] and not self._kept(before):
            self._manager.delete(before)

    def due(self, step: int) -> bool:
        """Whether `save` would save at this step."""
        return step in self._keep_at or bool(self._every and step > 0 and step % self._every == 0)

    def save(self, state: PyTree, step: int | None = None, *, force: bool = False) -> bool:
        """Saves `state` if its step is due (or `force`) and is not saved yet; returns whether it did.

        Blocks until the state is computed and copied to the host; files are written in the background, while training
        may already donate the state's buffers. Waits first for a save that is still being written.

        Args:
          state: a train state (any pytree whose leaves are arrays; `params` and `carry` at the top are items).
          step: `state.step` if not given.
        """
        step = int(state.step) if step is None else int(step)
        if not (force or self.due(step)):
            return False
        self.wait()
        if step in self._manager.all_steps():
            return False
        self._forget_rest()
        leaves = {
            path: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for path, leaf in paths_and_leaves(state)
        }
        items: dict[str, Any] = {_MANIFEST: ocp.args.JsonSave(_manifest(leaves))}
        for item in (_PARAMS, _CARRY, _REST):
            if below := _below(item, leaves):
                items[item] = ocp.args.PyTreeSave(nest(below))
        return self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore_latest(self, like: PyTree) -> tuple[PyTree, int] | None:
        """The newest checkpoint that is whole, as (state, step); None if there is no checkpoint at all.

        Args:
          like: arrays or `jax.ShapeDtypeStruct`s with the shardings that the state shall have, on the current mesh.

        A damaged or unreadable checkpoint is reported and the one before it is read. Once one could be read, the newer
        ones are renamed to `<step>.damaged`, so that this run can save those steps again.

        Raises:
          UserError: no checkpoint is usable, or the newest whole one has other leaves than `like`.
        """
        self.wait()
        unusable = []
        steps = _steps(self.directory)
        for step in reversed(steps):
            directory = self.directory / str(step)
            if not (directory / _REST).exists():
                if not self._kept(step):
                    self._report(f"checkpoint {step} in {self.directory} is not used: it holds parameters only")
                continue
            try:
                state = _restore_state(directory, like)
            except _UnusableError as problem:
                self._report(f"checkpoint {step} in {self.directory} is not used: {problem}")
                unusable.append(step)
                continue
            self._set_aside(unusable)
            return state, step
        if steps:
            reason = f"{unusable} are damaged" if unusable else "they hold parameters only"
            raise UserError(f"no checkpoint in {self.directory} can be resumed from: {reason}; use a new workdir")
        return None

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first, those with parameters only included."""
        return _steps(self.directory)

    def wait(self) -> None:
        """Returns when nothing is being written; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._forget_rest()
        self._manager.close()

    def _forget_rest(self) -> None:
        """Leaves only the parameters of `keep_at` checkpoints that are no longer among the newest."""
        if jax.process_index() > 0 or not (self._keep_at or self._best.step is not None):
            return
        for step in sorted(self._manager.all_steps())[: -self._keep]:
            for item in (_REST, _CARRY):
                path = self.directory / str(step) / item
                removed = path.with_name(item + _REMOVED)
                if removed.exists():  # of a start that was killed here
                    removed.rmtree()
                if self._kept(step) and path.exists():
                    # At once: a kill in the middle leaves no half of an item. Object storage renames file by file:
                    # there the half that is left goes the next time.
                    path.rename(removed)
                    removed.rmtree()

    def _set_aside(self, steps: Iterable[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                target = self.directory / f"{step}{_DAMAGED}"
                if target.exists():
                    target.rmtree()
                (self.directory / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("plm:damaged checkpoints set aside")
        self._manager.reload()


# Reading from another run

BEST = "best"


def split_step(spec: str) -> tuple[str, int | None]:
    """`SRC`, `SRC@STEP` or `SRC@best` -> (SRC, step), None for the newest.

    Errors: UserError for another word behind the @, or a run without a best checkpoint.
    """
    source, at, step = spec.rpartition("@")
    if not at or "/" in step:
        return spec, None
    if step == BEST:
        best = RunRecord(source, enabled=False).facts.get(BEST) or {}
        if best.get("step") is None:
            raise UserError(f"{spec}: the run in {source} kept no best checkpoint (checkpoint.keep_best)")
        return source, best["step"]
    if not step.isdecimal():
        if epath.Path(spec).exists():  # a folder with such a name
            return spec, None
        raise UserError(f"{spec!r}: what follows @ must be the step of a checkpoint, a whole number, or {BEST}")
    return source, int(step)


def kept_steps(source: epath.PathLike) -> list[int]:
    """Steps of the checkpoints in the workdir `source`, oldest first. Errors: UserError without one."""
    return _candidates(source, None)[1][::-1]


def _candidates(source: epath.PathLike, step: int | None) -> tuple[epath.Path, list[int]]:
    directory = epath.Path(source) / FOLDER
    if "://" not in str(source):
        directory = directory.absolute()
    steps = _steps(directory)
    if not steps:
        raise UserError(f"{source} has no checkpoint: {directory} is missing or empty")
    if step is not None:
        if step not in steps:
            raise UserError(f"{source} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        steps = [step]
    return directory, steps[::-1]


def restore_params(
    source: epath.PathLike, step: int | None = None, *, report: Callable[[str], None] = _tell
) -> tuple[dict, int]:
    """Parameters of the run in the workdir `source` as a nested dict of NumPy arrays by stored names, and their step.

    Reads only the parameters, changes nothing in `source`, and may be called while that run trains.

    Args:
      step: the newest that is whole if not given; a damaged one is reported and the one before it is read.

    Raises:
      UserError: no such run or step, or nothing usable.
    """
    directory, steps = _candidates(source, step)
    for candidate in steps:
        try:
            stored = _read_manifest(directory / str(candidate))
            wanted = {
                path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))
                for path, leaf in stored.items()
                if _item_of(path) == _PARAMS
            }
            params = _read(directory / str(candidate), wanted, (_PARAMS,), _to_host)
        except _UnusableError as problem:
            report(f"checkpoint {candidate} in {directory} is not used: {problem}")
            continue
        return nest(_below(_PARAMS, params)), candidate
    raise UserError(f"no checkpoint of {source} can be read: {', '.join(map(str, steps))} damaged")


def restore_state(
    source: epath.PathLike, like: PyTree, step: int | None = None, *, report: Callable[[str], None] = _tell
) -> tuple[PyTree, int]:
    """Everything but the carry from the run in the workdir `source` (`init.keep=all`), and its step.

    `carry` is returned as it is in `like`: another run reads other text, perhaps in other batches. Arguments and errors
    otherwise as `restore_params` and `Checkpoints.restore_latest`; nothing in `source` changes.
    """
    directory, steps = _candidates(source, step)
    for candidate in steps:
        if not (directory / str(candidate) / _REST).exists():
            continue
        try:
            return _restore_state(directory / str(candidate), like, (_PARAMS, _REST)), candidate
        except _UnusableError as problem:
            report(f"checkpoint {candidate} in {directory} is not used: {problem}")
    raise UserError(f"no checkpoint of {source} can be continued with its optimizer: damaged, or parameters only")
