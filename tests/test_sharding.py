"""Every parameter has a place on the mesh, optimizer leaves follow theirs, and impossible meshes are refused."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from plm.errors import UserError
from plm.models.graph import build
from plm.training.config import load
from plm.training.optimizer import make_optimizer
from plm.training.sharding import check_batch, make_mesh, partition_specs, paths_and_leaves

REPOSITORY = Path(__file__).resolve().parent.parent
MESH = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def nested(shapes: dict[str, tuple]) -> dict:
    tree: dict = {}
    for path, shape in shapes.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf(*shape)
    return tree


TRANSFORMER = {
    "embedding/tokens/table": (256, 8),
    "embedding/positions/table": (16, 8),
    "embedding/segments/table": (2, 8),
    "embedding/norm/scale": (8,),
    "blocks/stacked/attention/query/kernel": (3, 8, 8),
    "blocks/stacked/attention/query/bias": (3, 8),
    "blocks/stacked/attention/output/kernel": (3, 8, 8),
    "blocks/stacked/attention/output/bias": (3, 8),
    "blocks/stacked/attention_norm/bias": (3, 8),
    "blocks/stacked/mlp/up/kernel": (3, 8, 32),
    "blocks/stacked/mlp/up/bias": (3, 32),
    "blocks/stacked/mlp/down/kernel": (3, 32, 8),
    "blocks/stacked/mlp/down/bias": (3, 8),
    "heads/masked/transform/kernel": (8, 8),
    "heads/masked/transform/bias": (8,),
    "heads/masked/norm/scale": (8,),
    "heads/masked/bias": (256,),
    "heads/next_sentence/pooler/kernel": (8, 8),
    "heads/next_sentence/output/kernel": (8, 2),
    "heads/next_sentence/output/bias": (2,),
}
LSTM = {
    "embedding/characters/table": (262, 16),
    "embedding/characters/convolutions/0/kernel": (3, 16, 32),
    "embedding/characters/convolutions/0/bias": (32,),
    "embedding/characters/highways/1/carry/kernel": (32, 32),
    "embedding/characters/highways/1/transform/bias": (32,),
    "embedding/characters/projection/kernel": (32, 8),
    "embedding/characters/projection/bias": (8,),
    "blocks/stacked/cell/kernel_input": (2, 8, 4, 16),
    "blocks/stacked/cell/kernel_recurrent": (2, 8, 4, 16),
    "blocks/stacked/cell/bias": (2, 4, 16),
    "blocks/stacked/cell/projection": (2, 16, 8),
    "backward_blocks/stacked/forward/kernel_input": (2, 8, 4, 16),
    "backward_blocks/stacked/backward/bias": (2, 4, 16),
    "heads/bidirectional/table/table": (256, 8),
    "heads/bidirectional/bias": (256,),
}


def by_path(specs) -> dict:
    return dict(paths_and_leaves(jax.tree.map(lambda s: s, specs, is_leaf=lambda s: isinstance(s, P))))


def test_specs_of_every_kind_of_parameter():
    specs, messages = partition_specs(nested(TRANSFORMER | LSTM), MESH)
    assert messages == []
    got = by_path(specs)
    assert set(got) == set(TRANSFORMER | LSTM)
    assert got["embedding/tokens/table"] == P(("tensor", "fsdp"), None)
    assert got["heads/bidirectional/table/table"] == P(("tensor", "fsdp"), None)
    assert got["heads/masked/bias"] == P(("tensor", "fsdp"))
    # The stacked axis comes first and is never split.
    assert got["blocks/stacked/attention/query/kernel"] == P(None, "fsdp", "tensor")
    assert got["blocks/stacked/attention/output/kernel"] == P(None, "tensor", "fsdp")
    assert got["blocks/stacked/attention/output/bias"] == P(None)
    assert got["blocks/stacked/mlp/up/bias"] == P(None, "tensor")
    assert got["blocks/stacked/cell/kernel_recurrent"] == P(None, "fsdp", None, "tensor")
    assert got["blocks/stacked/cell/bias"] == P(None, None, "tensor")
    assert got["blocks/stacked/cell/projection"] == P(None, "tensor", "fsdp")
    assert got["embedding/characters/highways/1/carry/kernel"] == P("fsdp", "tensor")


def test_optimizer_leaves_follow_their_parameter_and_carry_follows_the_rows():
    params = nested(TRANSFORMER)
    optimizer = optax.chain(
        optax.clip(1.0), optax.scale_by_adam(), optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    )
    opt = jax.eval_shape(optimizer.init, params)
    state = {"params": params, "opt": opt, "carry": {"blocks": {"cell": leaf(4, 2, 16)}}, "step": leaf()}
    got = by_path(partition_specs(state, MESH)[0])
    assert got["opt/1/mu/blocks/stacked/mlp/up/kernel"] == P(None, "fsdp", "tensor")
    assert got["opt/1/nu/embedding/tokens/table"] == got["params/embedding/tokens/table"] == P(("tensor", "fsdp"), None)
    assert got["opt/1/count"] == got["step"] == P()
    # A factored second moment has not its parameter's shape: it stays whole.
    assert got["opt/2/v_row/blocks/stacked/mlp/up/kernel"] == P()
    assert got["carry/blocks/cell"] == P(("data", "fsdp"), None, None) or got["carry/blocks/cell"] == P(
        ("data", "fsdp")
    )
    assert by_path(partition_specs(opt, MESH, params=params)[0])["1/mu/heads/masked/bias"] == P(("tensor", "fsdp"))


def test_an_axis_that_does_not_divide_is_dropped_for_that_leaf_and_told():
    shapes = {"embedding/tokens/table": (6, 8), "blocks/stacked/mlp/up/kernel": (3, 8, 31)}
    specs, messages = partition_specs(nested(shapes), MESH)
    assert by_path(specs) == {
        "embedding/tokens/table": P("tensor", None),
        "blocks/stacked/mlp/up/kernel": P(None, "fsdp", None),
    }
    assert len(messages) == 2
    assert any("embedding/tokens/table: not split over fsdp (2)" in m and "axis 0 of (6, 8)" in m for m in messages)
    # An axis of size 1 divides everything: nothing to tell.
    assert partition_specs(nested(shapes), AbstractMesh((8, 1, 1), ("data", "fsdp", "tensor")))[1] == []


def test_a_parameter_without_a_row_is_refused_unless_its_model_brings_one():
    toy = nested({"toy/weights": (4, 4)})
    with pytest.raises(UserError, match=r"parameter toy/weights \(4, 4\) matches no row"):
        partition_specs(toy, MESH)
    specs, _ = partition_specs(toy, MESH, rules=((r"^toy/weights$", P("fsdp", None)),))
    assert by_path(specs) == {"toy/weights": P("fsdp", None)}


@pytest.mark.parametrize(
    "spec",
    [
        "bert.py:tiny",
        "gpt.py:tiny",
        "elmo.py:tiny",
        "compare.py:tiny,architecture=lstm,objective=masked",
        "compare.py:tiny,architecture=transformer,objective=bidirectional",
    ],
)
def test_every_parameter_of_the_real_models_has_a_place_and_their_tables_of_regexes_match(spec):
    config = load(str(REPOSITORY / "experiments" / spec), complete=False)
    params = build(config, 1000, tuple(config.objectives), jnp.float32).shapes()
    optimizer = make_optimizer(config.optimizer, params, total_steps=10**7)
    state = {"params": params, "opt": jax.eval_shape(optimizer.init, params)}
    specs, messages = partition_specs(state, MESH)
    assert messages == []
    # Nearly everything is split: what stays whole are vectors and small tables.
    placed = by_path(specs)
    whole = sum(leaf.size for path, leaf in paths_and_leaves(state) if not any(placed[path]))
    assert whole < 0.02 * sum(leaf.size for leaf in jax.tree.leaves(state))


def mesh_config(data=-1, fsdp=1, tensor=1):
    return SimpleNamespace(data=data, fsdp=fsdp, tensor=tensor)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (mesh_config(fsdp=16), r"mesh.fsdp=16 x mesh.tensor=1 does not divide the 8 devices"),
        (mesh_config(fsdp=3), r"mesh.fsdp=3 x mesh.tensor=1 does not divide the 8 devices"),
        (mesh_config(data=4, tensor=4), r"needs 16 devices and this run has 8 devices"),
        (mesh_config(data=3), r"uses 3 of 8 devices"),
        (mesh_config(fsdp=0), r"mesh.fsdp=0 must be at least 1"),
        (mesh_config(data=0), r"mesh.data=0 must be at least 1 or -1"),
    ],
)
def test_impossible_meshes_are_refused_in_one_line(mesh, message):
    with pytest.raises(UserError, match=message):
        make_mesh(mesh, devices=[None] * 8)


def test_batches_must_divide():
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    check_batch("batch_size", 24, mesh, microbatches=3)
    for size, microbatches in ((6, 1), (12, 2), (0, 1)):
        with pytest.raises(UserError, match=rf"batch_size={size} must be a positive multiple of {4 * microbatches} "):
            check_batch("batch_size", size, mesh, microbatches)


EIGHT_DEVICES = """
import json
from types import SimpleNamespace
import jax, numpy as np
from plm.training.sharding import batch_sharding, make_mesh, partition_specs, place, shardings

config = lambda **axes: SimpleNamespace(**{"data": -1, "fsdp": 1, "tensor": 1, **axes})
shapes = [dict(make_mesh(config(**axes)).shape) for axes in ({}, {"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2})]
mesh = make_mesh(config(fsdp=2, tensor=2))
assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)

table = np.arange(128 * 8, dtype=np.float32).reshape(128, 8)
params = {"embedding": {"tokens": {"table": table}}}
where = shardings(partition_specs(params, mesh)[0], mesh)
placed = place(params, where)
again = place(placed, shardings(partition_specs(params, make_mesh(config()))[0], make_mesh(config())))
donated = jax.jit(lambda p: jax.tree.map(lambda x: x * 0 - 1, p), donate_argnums=0)(placed)
leaf = jax.tree.leaves(donated)[0]
assert (table == np.arange(128 * 8).reshape(128, 8)).all(), "a donated step wrote into the caller's array"
assert (np.asarray(jax.tree.leaves(again)[0]) == table).all()
rows = place(np.arange(16), batch_sharding(mesh))
print(json.dumps({"shapes": shapes, "pieces": [list(s.data.shape) for s in leaf.addressable_shards][:1],
    "rows": sorted({tuple(s.data.tolist()) for s in rows.addressable_shards})}))
"""


def test_meshes_and_placement_on_eight_devices(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)], env=environment, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    got = json.loads(output.stdout.splitlines()[-1])
    axes = ("data", "fsdp", "tensor")
    assert [tuple(s[a] for a in axes) for s in got["shapes"]] == [(8, 1, 1), (2, 2, 2), (2, 1, 2)]
    assert got["pieces"] == [[32, 8]]
    np.testing.assert_array_equal(got["rows"], np.arange(16).reshape(4, 4))
