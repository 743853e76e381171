"""Checkpoints come back bit for bit on any mesh and process count; damage and kill -9 cost one checkpoint at most."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from plm.errors import UserError
from plm.training.checkpoint import Checkpoints, checksums, restore_params, restore_state
from plm.training.sharding import paths_and_leaves
from plm.training.start import start_from
from plm.training.step import TrainState


def make_state(step: int, rows: int = 8) -> TrainState:
    """A train state that depends on `step` in every leaf, with every type that states have."""
    keys = iter(jax.random.split(jax.random.key(step), 8))
    params = {
        "embedding": {"tokens": {"table": jax.random.normal(next(keys), (128, 16))}},
        "blocks": {"stacked": {"mlp": {"up": {"kernel": jax.random.normal(next(keys), (3, 16, 32))}}}},
        "half": {"precision": jax.random.normal(next(keys), (7,), jnp.bfloat16)},
        "flags": jax.random.bernoulli(next(keys), 0.5, (5,)),
    }
    moments = {"embedding": params["embedding"], "blocks": params["blocks"]}
    opt = optax.adam(1e-3).init(moments)
    key = next(keys)
    opt = jax.tree.map(lambda x: jax.random.normal(key, x.shape) if x.ndim else x + step, opt)
    carry = {"forward": {"c": jax.random.normal(next(keys), (rows, 2, 64))}}
    return TrainState(jnp.int32(step), params, opt, carry, jnp.asarray([step, 0], jnp.int32))


def same_bits(a, b) -> bool:
    same = lambda x, y: x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()  # noqa: E731
    return jax.tree.structure(a) == jax.tree.structure(b) and all(map(same, jax.tree.leaves(a), jax.tree.leaves(b)))


LIKE = jax.eval_shape(lambda: make_state(0))


def save_all(folder: Path, steps, **options) -> None:
    with Checkpoints(folder / "checkpoints", every_steps=1, **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(make_state(step))


def data_file(folder: Path, step: int, item: str) -> Path:
    """The file that holds the arrays' values: the largest one."""
    files = [path for path in (folder / "checkpoints" / str(step) / item).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


def test_a_state_comes_back_bit_for_bit_although_it_was_donated_after_the_save(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", every_steps=2) as checkpoints:
        assert checkpoints.restore_latest(LIKE) is None
        assert not checkpoints.save(make_state(3))  # not due
        state = make_state(4)
        # Large enough that the write is still under way when the next step reuses its memory.
        state.params["large"] = jnp.arange(2_000_000, dtype=jnp.float32)
        like = jax.eval_shape(lambda: state)
        assert checkpoints.save(state)
        overwrite = jax.jit(lambda s: jax.tree.map(lambda x: (x * 0).astype(x.dtype), s), donate_argnums=0)
        jax.block_until_ready(overwrite(state))
        assert not checkpoints.save(make_state(4))  # there already
        assert checkpoints.save(make_state(5), force=True) is True
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [4, 5]
        got, step = checkpoints.restore_latest(LIKE)
        assert step == 5
        assert same_bits(got, make_state(5))
        assert isinstance(got, TrainState)
    shutil.rmtree(tmp_path / "checkpoints" / "5")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        got, step = checkpoints.restore_latest(like)
    large = got.params.pop("large")
    assert step == 4
    assert same_bits(got, make_state(4))
    np.testing.assert_array_equal(large, np.arange(2_000_000))


def test_checksums_see_every_bit_and_every_position():
    rng = np.random.default_rng(0)
    arrays = {
        "f32": rng.normal(size=(3, 5)).astype(np.float32),
        "bf16": np.asarray(jnp.asarray(rng.normal(size=(6,)), jnp.bfloat16)),
        "i32": rng.integers(0, 9, (4,), np.int32),
        "u8": rng.integers(0, 9, (4,), np.uint8),
        "scalar": np.int32(7),
    }
    before = checksums(arrays)
    for name, array in arrays.items():
        raw = np.array(array).reshape(-1).view(np.uint8)
        for bit in range(raw.size * 8):
            changed = raw.copy()
            changed[bit // 8] ^= 1 << (bit % 8)
            new = changed.view(array.dtype).reshape(array.shape)
            assert checksums({name: new})[name] != before[name], (name, bit)
    flags = np.array([True, False, True])
    assert checksums({"x": flags}) != checksums({"x": ~flags})
    swapped = arrays["f32"].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert checksums({"f32": swapped})["f32"] != before["f32"]
    assert checksums({"x": np.float32(0.0)}) != checksums({"x": np.float32(-0.0)})


@pytest.mark.parametrize("item", ["params", "rest", "carry"])
def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_used(tmp_path, item):
    save_all(tmp_path, [1, 2, 3])
    flip_a_bit(data_file(tmp_path, 3, item))
    lines = []
    with Checkpoints(tmp_path / "checkpoints", every_steps=1, report=lines.append) as checkpoints:
        got, step = checkpoints.restore_latest(LIKE)
        assert step == 2
        assert same_bits(got, make_state(2))
        assert len(lines) == 1
        assert "checkpoint 3" in lines[0]
        assert "\n" not in lines[0]
        assert any(name in lines[0] for name, _ in paths_and_leaves(LIKE))
        # It no longer stands in the way: the step is saved again and found.
        assert (tmp_path / "checkpoints" / "3.damaged").is_dir()
        assert checkpoints.save(make_state(3))
        assert checkpoints.restore_latest(LIKE)[1] == 3


def test_half_written_unreadable_and_missing_pieces(tmp_path):
    save_all(tmp_path, [1, 2, 3], keep=5)
    folder = tmp_path / "checkpoints"
    # What a kill in the middle of a write leaves: a temporary directory.
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    file = data_file(tmp_path, 3, "rest")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (folder / "2" / "manifest" / "metadata").unlink()
    lines = []
    with Checkpoints(folder, report=lines.append, keep=5) as checkpoints:
        got, step = checkpoints.restore_latest(LIKE)
    assert step == 1
    assert same_bits(got, make_state(1))
    assert [line.split(" in ")[0] for line in lines] == ["checkpoint 3", "checkpoint 2"]
    assert "cannot be read" in lines[0]
    assert "manifest" in lines[1]
    assert not (folder / "4.orbax-checkpoint-tmp").exists()


def test_nothing_usable_is_an_error_and_renames_nothing(tmp_path):
    save_all(tmp_path, [1, 2])
    for step in (1, 2):
        flip_a_bit(data_file(tmp_path, step, "params"))
    lines = []
    with (
        Checkpoints(tmp_path / "checkpoints", report=lines.append) as checkpoints,
        pytest.raises(UserError, match=r"no checkpoint in .* can be resumed from: \[2, 1\] are damaged"),
    ):
        checkpoints.restore_latest(LIKE)
    assert len(lines) == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_another_structure_is_one_clear_line_and_not_damage(tmp_path):
    save_all(tmp_path, [1])
    sgd = TrainState(LIKE.step, LIKE.params, optax.EmptyState(), LIKE.carry, LIKE.skipped)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(UserError, match=r"\(opt\): opt/0/count is only in the checkpoint; .* and \d+ more"):
            checkpoints.restore_latest(sgd)
        with pytest.raises(
            UserError,
            match=r"\(carry\): carry/forward/c is float32\[8, 2, 64\] in the checkpoint and float32\[4, 2, 64\] here",
        ):
            checkpoints.restore_latest(jax.eval_shape(lambda: make_state(1, rows=4)))
        assert checkpoints.restore_latest(LIKE)[1] == 1


def test_retention_and_parameters_kept_for_ever(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=2, keep_at=(1, 3), every_steps=2) as checkpoints:
        for step in range(1, 11):
            assert checkpoints.save(make_state(step)) == (step in (1, 3) or step % 2 == 0)
    assert sorted(int(path.name) for path in folder.iterdir()) == [1, 3, 8, 10]
    assert {path.name for path in (folder / "1").iterdir() if path.is_dir()} == {"params", "manifest"}
    params, step = restore_params(tmp_path, 3)
    assert step == 3
    assert same_bits(jax.tree.map(jnp.asarray, params), make_state(3).params)
    assert restore_params(tmp_path)[1] == 10
    # A checkpoint of parameters alone cannot be resumed from.
    for step in (8, 10):
        shutil.rmtree(folder / str(step))
    with (
        Checkpoints(folder, keep_at=(1, 3)) as checkpoints,
        pytest.raises(UserError, match="they hold parameters only"),
    ):
        checkpoints.restore_latest(LIKE)


def test_reading_another_run(tmp_path):
    save_all(tmp_path, [1, 2])
    flip_a_bit(data_file(tmp_path, 2, "params"))
    lines = []
    params, step = restore_params(tmp_path, report=lines.append)
    assert step == 1
    assert same_bits(jax.tree.map(jnp.asarray, params), make_state(1).params)
    assert len(lines) == 1
    # Everything but the carry, which is returned as it was given, in another batch size.
    like = make_state(9, rows=2)
    got, step = restore_state(tmp_path, like, 1)
    assert same_bits(got.opt, make_state(1).opt)
    assert same_bits(got.carry, like.carry)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]  # nothing renamed
    for source, step, message in [
        (tmp_path / "nowhere", None, "nowhere has no checkpoint"),
        (tmp_path, 7, "has no checkpoint of step 7; it has 1, 2"),
        (tmp_path, 2, "2 damaged"),
    ]:
        with pytest.raises(UserError, match=message):
            restore_params(source, step, report=lines.append)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints to"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_starting_from_other_parameters_reports_by_logical_name():
    kernel = lambda layers, value: {"stacked": {"up": {"kernel": jnp.full((layers, 2, 2), value)}}}  # noqa: E731
    fresh = {
        "blocks": kernel(3, 0.0),
        "embedding": {"positions": {"table": jnp.zeros((8, 2))}},
        "heads": {"classify": {"bias": jnp.zeros((2,))}},
    }
    loaded = {
        "blocks": {"stacked": {"up": {"kernel": np.arange(2.0)[:, None, None] + np.ones((2, 2, 2), np.float32)}}},
        "embedding": {"positions": {"table": np.ones((4, 2), np.float32)}},
        "heads": {"masked": {"bias": np.ones((2,), np.float32)}},
    }
    params, report = start_from(fresh, loaded)
    assert report.matched == ("blocks/0/up/kernel", "blocks/1/up/kernel")
    assert report.missing == ("blocks/2/up/kernel", "heads/classify/bias")
    assert report.left_over == ("heads/masked/bias",)
    assert report.mismatched == (("embedding/positions/table", (4, 2), (8, 2)),)
    assert len(report.lines()) == 4
    np.testing.assert_array_equal(params["blocks"]["stacked"]["up"]["kernel"][:, 0, 0], [1.0, 2.0, 0.0])
    np.testing.assert_array_equal(params["heads"]["classify"]["bias"], np.zeros(2))
    # A deeper source fills a shallower model, and names may be logical already.
    shallow, report = start_from({"blocks": kernel(1, 0.0)}, loaded)
    assert report.left_over[:1] == ("blocks/1/up/kernel",)
    again, _ = start_from({"blocks": kernel(1, 0.0)}, {"blocks": {"0": {"up": {"kernel": np.ones((2, 2))}}}})
    assert same_bits(again, shallow)
    with pytest.raises(UserError, match="no parameter of the source fits this model"):
        start_from(fresh, {"other": np.ones(3)})


TRAINER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from plm.training.checkpoint import Checkpoints

def state(step):
    return {"step": jnp.int32(step), "params": {name: jnp.full((400_000,), step, jnp.float32) for name in "abc"}}

with Checkpoints(sys.argv[1], keep=2, every_steps=1) as checkpoints:
    found = checkpoints.restore_latest(jax.eval_shape(lambda: state(0)))
    step = 0
    if found:
        got, step = found
        assert all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(got)), "a torn checkpoint"
    print("at", step, flush=True)
    while True:
        step += 1
        checkpoints.save(state(step), step)
        print("begun", step, flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_usable_directory(tmp_path):
    folder = tmp_path / "checkpoints"
    begun = 0
    for delay in (0.0, *random.Random(0).choices([0.05, 0.1, 0.2, 0.3], k=2)):
        trainer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TRAINER), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        first = trainer.stdout.readline().split()
        assert first, trainer.stderr.read()
        # Only the save that was being written may be lost.
        assert begun - 1 <= int(first[1]) <= begun
        trainer.stdout.readline()  # a save is under way
        time.sleep(delay)
        trainer.send_signal(signal.SIGKILL)
        begun = max([int(first[1]) + 1, *map(int, re.findall(r"begun (\d+)\n", trainer.stdout.read()))])
        errors = trainer.stderr.read()
        trainer.wait()
        assert errors == ""  # no noise, and nothing was found damaged
    like = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": {name: jax.ShapeDtypeStruct((400_000,), jnp.float32) for name in "abc"},
    }
    with Checkpoints(folder, keep=2) as checkpoints:
        got, step = checkpoints.restore_latest(like)
        assert begun - 1 <= step <= begun
        assert (np.asarray(got["params"]["c"]) == step).all()
        assert len(checkpoints.steps()) <= 3  # debris is cleared away


WORKER = """
import sys
from types import SimpleNamespace
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, process, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
import numpy as np
from tests.test_checkpoint import LIKE, make_state
from plm.training.checkpoint import Checkpoints, checksums, restore_params
from plm.training.sharding import make_mesh, partition_specs, paths_and_leaves, shardings
from jax.sharding import PartitionSpec as P

assert jax.process_count() == 2 and jax.device_count() == 4
mesh = make_mesh(SimpleNamespace(data=-1, fsdp=2, tensor=2))
rules = (("^half/precision$", P()), ("^flags$", P()))
specs, _ = partition_specs(LIKE, mesh, rules=rules)
placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
like = jax.tree.map(placed, LIKE, shardings(specs, mesh))
lines = []
with Checkpoints(folder + "/checkpoints", every_steps=1, report=lines.append) as checkpoints:
    state, step = checkpoints.restore_latest(like)
    assert step == 2, step  # 3 is damaged, for both
    assert len(lines) == 1 and "checkpoint 3" in lines[0], lines
    kernel = state.params["blocks"]["stacked"]["mlp"]["up"]["kernel"]
    assert not kernel.is_fully_addressable and kernel.addressable_shards[0].data.shape == (3, 8, 16)
    assert checksums(dict(paths_and_leaves(state))) == checksums(dict(paths_and_leaves(make_state(2))))
    grow = jax.jit(lambda x: (x + x.dtype.type(1)) if x.dtype == np.int32 else -x, out_shardings=None)
    state.params["blocks"]["stacked"]["mlp"]["up"]["kernel"] = grow(kernel)
    state.step = grow(state.step)
    assert checkpoints.save(state)
params, step = restore_params(folder)
assert step == 3 and (params["flags"] == np.asarray(make_state(2).params["flags"])).all()
print("done")
"""


def test_two_processes_on_a_mesh_continue_one_process_and_the_other_way_round(tmp_path):
    save_all(tmp_path, [1, 2, 3])
    flip_a_bit(data_file(tmp_path, 3, "params"))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), str(port), str(process), str(tmp_path)],
            env=environment,
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        got, step = checkpoints.restore_latest(LIKE)
    expected = make_state(2)
    expected.step += 1
    expected.params["blocks"]["stacked"]["mlp"]["up"]["kernel"] *= -1
    assert step == 3
    assert same_bits(got, expected)
