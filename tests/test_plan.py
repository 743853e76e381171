"""A plan says what a program holds and moves; what it cannot know it refuses in one line. No TPU's compiler."""

import json
import math

import jax
import pytest
from fixtures import children, corpus
from fixtures.children import RUNS

from plm.data import placeholder
from plm.data.pipeline import open_corpus
from plm.errors import UserError
from plm.planning import hlo, plans, text, topologies
from plm.training import config as configs
from plm.training import sharding
from plm.training.chips import CHIPS
from plm.training.program import make_batches

HLO = """
HloModule jit_step, is_scheduled=true

%fused (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %all-gather.7 = f32[8]{0} all-gather(%p), channel_id=9, dimensions={0}, metadata={op_name="jit(step)/gather"}
}

%fused.again (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %all-gather.8 = f32[8]{0} all-gather(%p), channel_id=9, dimensions={0}, metadata={op_name="jit(step)/gather"}
}

%inner.body (s: (s32[], bf16[2,3])) -> (s32[], bf16[2,3]) {
  %s = (s32[]{:T(128)}, bf16[2,3]{1,0:T(8,128)}) parameter(0)
  %x = bf16[2,3]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %all-reduce.1 = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}) all-reduce(%x, %x), channel_id=1, @
  ROOT %out = (s32[], bf16[2,3]) tuple(%s, %x)
}

%inner.condition (s: (s32[], bf16[2,3])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%s, %limit), direction=LT
}

%outer.body (s: (s32[], bf16[2,3])) -> (s32[], bf16[2,3]) {
  ROOT %loop = (s32[]{:T(128)}, bf16[2,3]{1,0}) while(%s), condition=%inner.condition, body=%inner.body
}

%outer.condition (s: (s32[], bf16[2,3])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%s, %limit), direction=LT
}

%never (p: f32[4]) -> f32[9999] {
  ROOT %all-gather.9 = f32[9999]{0} all-gather(%p), channel_id=3, dimensions={0}
}

ENTRY %main (p: f32[4]) -> f32[100,10] {
  %p = f32[4]{0} parameter(0)
  %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
  %g = f32[8]{0:T(128)S(1)} fusion(%p), kind=kLoop, calls=%fused.again
  %w = (s32[]{:T(128)}, bf16[2,3]{1,0}) while(%p), condition=%outer.condition, body=%outer.body
  %rs = f32[2]{0} reduce-scatter(%g), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %ag = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}
  %agd = f32[16]{0} all-gather-done(%ag)
  ROOT %big = f32[100,10]{1,0} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/jvp()/big"}
}
"""

META = 'metadata={op_name="jit(step)/transpose(jvp())/while/body/closed_call/na,nb->ab/dot_general" stack_frame_id=2}'
HLO = HLO.replace("@", META)


def test_collectives_count_as_often_as_they_run_and_pieces_once():
    found = {(c.kind, c.shapes): (c.bytes, c.times) for c in hlo.collectives(HLO)}
    assert found == {
        ("all-reduce", ("bf16[2,3]", "f32[]")): (16, 15),
        ("all-gather", ("f32[8]",)): (32, 1),
        ("reduce-scatter", ("f32[2]",)): (32, 1),
        ("all-gather", ("f32[16]",)): (64, 1),
    }
    names = {c.kind: c.where for c in hlo.collectives(HLO)}
    assert names["all-reduce"] == "na,nb->ab/dot_general (backward)"


def test_buffers_are_results_in_main_memory():
    found = hlo.buffers(HLO)
    assert (found[0].shape, found[0].dimensions, found[0].bytes, found[0].where) == (
        "f32[100,10]",
        (100, 10),
        4000,
        "big",
    )
    shapes = [buffer.shape for buffer in found]
    assert "f32[9999]" not in shapes
    assert "bf16[2,3]" not in shapes  # in the chip's fast memory


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "v5e:16x16"),
        ("v7:2x2", "must be v4"),
        ("v5e:2x", "v5e:16x16"),
        ("gpu:2x2", "gpu:COUNT"),
        ("gpu:0", "gpu:COUNT"),
    ],
)
def test_a_topology_that_is_not_understood_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        topologies.describe(name)


def test_a_gpu_that_is_not_in_the_table_is_refused():
    with pytest.raises(UserError, match="NVIDIA H200"):
        topologies.describe("gpu:8", "NVIDIA GT 710")


def toy(kind: str, **overrides):
    return configs.load(f"{RUNS}:{kind}", overrides, complete=False)


@pytest.mark.parametrize("kind", ["lanes", "blocks", "pairs"])
def test_a_planned_batch_has_the_shapes_of_a_real_one(kind, tmp_path):
    config = configs.resolve_seeds(toy(kind))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    words = placeholder.tokenizer(config.data.tokenizer.kind, 64)
    planned = make_batches(config, placeholder.corpus(words, config.seq_len, tmp_path / "p"), "train", mesh)
    config = config.copy_and_resolve_references().unlock()
    config.data.source = f"text:{corpus.write(tmp_path / 'corpus.txt')}"
    real = make_batches(config, open_corpus(config.data, progress=False), "train", mesh)
    got, expected = planned.abstract(mesh, config.batch_size), real(0)
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), got) == jax.tree.map(
        lambda a: (a.shape, a.dtype, a.sharding), expected
    )


def test_a_plan_counts_what_a_chip_holds():
    config = toy("blocks", total_steps="50")
    plan = plans.make_plan(config, topologies.describe("gpu:1"))
    assert plan.memory.parameters >= 4 * plan.parameters  # tables are padded
    assert plan.memory.optimizer == pytest.approx(2 * plan.memory.parameters, rel=0.01)
    assert plan.memory.carry == 0
    assert plan.memory.temporaries > plan.memory.parameters  # the gradients alone
    assert plan.memory.fits
    assert plan.memory.free + plan.memory.peak == int(0.95 * 80 * 2**30) == int(CHIPS["NVIDIA H100 80GB HBM3"].memory)
    assert plan.collectives is None
    costs = text.cost(plan, 0.5, 3.0)
    assert costs.compute_seconds == pytest.approx(plan.flops / (989.4e12 * 0.5))
    assert costs.price == pytest.approx(3.0 * costs.compute_seconds * 50 / 3600)
    shown = text.to_text(plan, costs, [])
    assert "FITS" in shown
    assert "estimate" in shown
    json.dumps(text.to_json(plan, costs, []))


def test_activations_grow_with_rows_and_microbatches_make_them_smaller():
    topology = topologies.describe("gpu:1")
    temporaries = {
        (size, pieces): plans.make_plan(
            toy("lanes", batch_size=str(size), microbatches=str(pieces)), topology
        ).memory.temporaries
        for size, pieces in ((64, 1), (128, 1), (128, 2))
    }
    assert temporaries[128, 1] > 1.5 * temporaries[64, 1]
    assert temporaries[128, 2] < 0.8 * temporaries[128, 1]


@pytest.mark.slow
def test_residuals_are_what_a_backward_pass_keeps():
    """The count against what XLA's CPU compiler gives the same step: within a factor of two."""
    config = toy("blocks", batch_size="64", **{"precision.compute": "float32"})
    plan = plans.make_plan(config, topologies.describe("gpu:1"))
    with plans._setup(config, topologies.describe("gpu:1"), 0) as setup:
        compiled = setup.program.step.lower(setup.program.like, setup.batch).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert 0.5 < plan.memory.temporaries / temporaries < 2


def test_the_length_of_a_run_of_epochs_needs_the_corpus():
    config, topology = toy("blocks", total_epochs="2"), topologies.describe("gpu:1")
    unknown = plans.make_plan(config, topology)
    assert unknown.steps is None
    assert any("--corpus_tokens" in line for line in unknown.warnings)
    assert text.cost(unknown, 0.4, 1.0).hours is None
    known = plans.make_plan(config, topology, corpus_tokens=6400)
    assert known.steps == math.ceil(2 * 6400 / 64)


def test_the_steps_of_the_run_that_is_continued_are_not_paid_again(tmp_path):
    topology, total = topologies.describe("gpu:1"), configs.flatten(toy("blocks"))["total_steps"]
    kept = {"init.keep": "all"}
    whole = plans.make_plan(toy("blocks"), topology)
    assert (whole.steps, whole.done_steps) == (total, 0)
    unknown = plans.make_plan(toy("blocks", **kept), topology)
    assert (unknown.steps, unknown.done_steps) == (total, None)
    assert any("--done_steps" in line for line in unknown.warnings)
    said = plans.make_plan(toy("blocks", **kept), topology, done_steps=total - 1)
    assert (said.steps, said.done_steps) == (1, total - 1)
    assert not any("--done_steps" in line for line in said.warnings)
    hours = [text.cost(plan, 0.4, 1.0).hours for plan in (whole, said)]
    assert hours[0] == pytest.approx(total * hours[1])
    assert f"1 steps after {total - 1:,} of another run" in text.to_text(said, text.cost(said, 0.4, 1.0), [])
    (tmp_path / "run.json").write_text('{"step": 3}')
    for name, done in ((str(tmp_path), 3), (f"{tmp_path}@2", 2)):
        found = plans.make_plan(toy("blocks", **kept, **{"init.from": name}), topology)
        assert (found.steps, found.done_steps) == (total - done, done)
    with pytest.raises(UserError, match=rf"{total} steps were done before, which total_steps={total} counts"):
        plans.make_plan(toy("blocks", **kept), topology, done_steps=total)
    of_epochs = toy("blocks", total_epochs="2", **kept)
    assert plans.make_plan(of_epochs, topology, corpus_tokens=6400, done_steps=150).steps == 50
    with pytest.raises(UserError, match=r"200 steps were done before, which total_steps=200 counts"):
        plans.make_plan(of_epochs, topology, corpus_tokens=6400, done_steps=200)
    with pytest.raises(UserError, match=r"--done_steps=3 is for a run that goes on"):
        plans.make_plan(toy("blocks"), topology, done_steps=3)


def test_a_sweep_lists_what_is_refused_too():
    attempts = plans.sweep(toy("blocks"), topologies.describe("gpu:1"), (1, 2), (1,), (1,))
    assert [attempt.memory is None for attempt in attempts] == [False, True]
    lines = text.attempts_table(attempts)
    assert len(lines) == 3
    assert "--config.mesh.fsdp=1" in lines[1]
    assert "refused" in lines[2]
    assert "does not divide the 1 device" in lines[2]


def test_the_vocabulary_is_that_of_the_run_to_start_from(tmp_path):
    placeholder.tokenizer("byte_bpe", 500).save(tmp_path / "run" / "tokenizer")
    config = toy("blocks", **{"init.from": f"{tmp_path / 'run'}@12"})
    with plans._setup(config, topologies.describe("gpu:1"), 0) as setup:
        assert setup.tokenizer.size == 500


def test_changes_are_tried_from_the_cheapest_on():
    config = toy("blocks", batch_size="64")
    mesh = {"data": 8, "fsdp": 1, "tensor": 1}
    first, second, *others = list(plans.changes_that_save(config, mesh))
    assert (first, second) == ({"microbatches": 2}, {"remat": "blocks"})
    assert others[0] == {"microbatches": 4}
    assert {"remat", "microbatches", "mesh.fsdp"} == others[-1].keys()


def test_the_compiler_s_refusal_is_read():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (31.85G)"
        " exceeds available HBM (15.75G)."
    )
    assert plans._needed(message) == int(31.85 * 2**30)
    assert plans._needed("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded by 4.75G.") == int(20.5 * 2**30)
    assert plans._needed("INVALID_ARGUMENT: (31.85G) exceeds available") is None


def test_a_batch_that_does_not_divide_names_the_mesh_that_would():
    mesh = jax.sharding.AbstractMesh((256, 1, 1), sharding.AXES)
    with pytest.raises(UserError, match=r"--config.mesh.tensor=4 would leave 64 pieces"):
        plans._check_rows(toy("blocks", batch_size="64"), mesh)


def test_the_command(tmp_path):
    def run(*flags):
        child = children.start("plm.plan", *flags, output=tmp_path / f"{len(list(tmp_path.iterdir()))}.txt")
        return child.wait(), child.text

    run_of = f"--config={RUNS}:blocks"
    code, shown = run(run_of, "--topology=gpu:4", "--config.mesh.fsdp=2", "--json")
    assert code == 0, shown
    plan = json.loads(shown)
    assert (plan["mesh"], plan["fits"], plan["exact"]) == ({"data": 2, "fsdp": 2, "tensor": 1}, True, False)
    too_large = ("--config.batch_size=67108864", "--config.microbatches=1")
    code, shown = run(run_of, "--topology=gpu:4", "--gpu=NVIDIA A100-SXM4-40GB", "--config.seq_len=16", *too_large)
    assert code == 1, shown
    assert "DOES NOT FIT" in shown
    assert "the smallest change that fits: --config.microbatches=" in shown
    for wrong in ("--topology=v5e:banana", "--topology=gpu:3"):
        code, shown = run(run_of, wrong)
        assert code == 2
        assert len(shown.splitlines()) == 1
        assert shown.startswith("error: ")


def test_dtypes_have_sizes():
    shapes = "(bf16[2], f32[3]{0}, s32[4], pred[5], u8[6], s64[7])"
    assert [size for _, _, size, _ in hlo._arrays(shapes)] == [4, 12, 16, 5, 6, 56]
