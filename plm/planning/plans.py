"""A plan: what a config's program holds, moves and costs on a topology.

On TPUs every number of memory and traffic is the compiler's own, for the very program that `plm.train` would run. GPUs
are not compiled for: there the arguments are exact, activations are counted from the program's residuals, and nothing
is said of traffic.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from etils import epath

from plm.data import placeholder
from plm.data.task_rows import with_task_tokens
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.flops import train_flops
from plm.planning import hlo
from plm.planning.topologies import Topology
from plm.training import checkpoint, sharding
from plm.training import config as configs
from plm.training.metrics import RunRecord
from plm.training.objectives import make_objectives
from plm.training.program import Program, carries, fresh_carry, make_batches, make_program
from plm.training.record import TOKENIZER
from plm.training.step import all_weights, make_eval_step, make_loss

LARGE = 16 * 2**20  # bytes on a chip from which a buffer that need not be there is worth a warning
UNKNOWN_STEPS = 1_000_000  # of a run whose length hangs on a corpus that nobody has counted: changes no shape
LISTED = 8
ROWS_MADE = 16  # of a batch of placeholders; all others have the same shapes


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip. `temporaries` is what the program needs at its peak beside its arguments: activations,
    gradients, updates. exact: the compiler's figures; else counted."""

    available: int
    parameters: int
    optimizer: int
    carry: int
    batch: int
    temporaries: int
    exact: bool

    @property
    def arguments(self) -> int:
        return self.parameters + self.optimizer + self.carry + self.batch

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries

    @property
    def free(self) -> int:
        """Negative: by how much it does not fit."""
        return self.available - self.peak

    @property
    def fits(self) -> bool:
        return self.free >= 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """settings: the keys of the config that shape the program; flops: of a step, by formula, None for a model from
    outside; steps: that the run takes itself, None where its length hangs on the corpus; done_steps: taken before by
    the run that it continues, None if nobody says; evaluation: the peak of held-out scoring, bytes."""

    topology: Topology
    settings: dict
    mesh: dict[str, int]
    tokens_per_step: int
    parameters: int
    memory: Memory
    evaluation: int | None
    flops: float | None
    steps: int | None
    done_steps: int | None
    compute: str
    collectives: list[hlo.Collective] | None
    buffers: list[hlo.Buffer]
    warnings: list[str]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Another setting that was tried: changes {key: value}, and its memory, or why it was refused."""

    changes: dict
    memory: Memory | None
    refusal: str = ""
    traffic: int | None = None


def per_chip(tree) -> int:
    """Bytes of one chip's pieces of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(_piece(leaf) for leaf in jax.tree.leaves(tree))


def _piece(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


@functools.lru_cache(maxsize=1)
def _tokenizer(kind: str, size: int, path: str, lowercase: bool) -> Tokenizer:
    if not path:
        return placeholder.tokenizer(kind, size, lowercase=lowercase)
    return Tokenizer.read(path)


def _inherited(config) -> str:
    """The folder of the tokenizer of the run that `init.from` names; "" where it names none."""
    folder = epath.Path(checkpoint.split_step(config.init["from"])[0]) / TOKENIZER
    return str(folder) if config.init["from"] and folder.exists() else ""


def _resolved(config, corpus_tokens: int, platform: str):
    """(config with everything said, its steps or None): the length of a run of epochs needs the corpus' tokens."""
    unknown = config.total_epochs is not None and not corpus_tokens
    epochs = config.total_epochs or 1
    rows = corpus_tokens / config.seq_len if corpus_tokens else UNKNOWN_STEPS * config.batch_size / epochs
    resolved = configs.resolve(config, examples_per_pass=rows, platform=platform)
    return resolved, None if unknown else resolved.total_steps


def _done(config, steps: int | None, done_steps: int | None) -> int | None:
    """Steps that a continued run (`init.keep="all"`) does not take: those said, or those that `init.from` is at."""
    if config.init.keep != "all":
        if done_steps:
            raise UserError(
                f"--done_steps={done_steps} is for a run that goes on with another's steps: init.keep='all'"
            )
        return 0
    if done_steps is None and config.init["from"]:
        source, step = checkpoint.split_step(config.init["from"])
        done_steps = step if step is not None else RunRecord(epath.Path(source), enabled=False).facts.get("step")
    if steps is not None and (done_steps or 0) >= steps:
        raise UserError(f"{done_steps} steps were done before, which total_steps={steps} counts, too: it must be more")
    return done_steps


@dataclasses.dataclass(frozen=True)
class _Setup:
    config: object
    steps: int | None
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    program: Program
    batch: dict
    held_out: dict
    counts: dict


@contextlib.contextmanager
def _setup(config, topology: Topology, corpus_tokens: int) -> Iterator[_Setup]:
    """The program of a config on a topology and the shapes of its batches, inside the mesh."""
    devices = topology.devices if topology.devices is not None else jax.devices("cpu")[: topology.count]
    mesh = sharding.make_mesh(config.mesh, devices)
    _check_rows(config, mesh)
    config, steps = _resolved(config, corpus_tokens, topology.platform)
    wanted = config.data.tokenizer
    vocabulary = _tokenizer(wanted.kind, wanted.vocab, wanted.path or _inherited(config), wanted.lowercase)
    if config.data.layout == "task":
        vocabulary = with_task_tokens(vocabulary)
        name, kind, classes = placeholder.task(config)
        config = configs.settle(config, task=name, kind=kind, classes=classes, vectors=0)
    here = sharding.make_mesh(type(config.mesh)({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices("cpu")[:1])
    with tempfile.TemporaryDirectory() as folder:
        together = configs.rows_per_example(config)
        if config.data.layout == "task":
            corpus = placeholder.task_corpus(config, vocabulary, together)
        else:
            corpus = placeholder.corpus(vocabulary, config.seq_len, Path(folder))
        few = config.copy_and_resolve_references().unlock()
        few.batch_size = few.eval.batch_size = ROWS_MADE * together
        batches, held_out = (make_batches(few, corpus, mode, here) for mode in ("train", "eval"))
        shapes = batches.abstract(mesh, config.batch_size), held_out.abstract(mesh, _held_out_rows(config))
    with jax.set_mesh(mesh):
        program = make_program(config, vocabulary, mesh, carries(config, batches.layout))
        counts = program.graph.counts()
        yield _Setup(config, steps, vocabulary, mesh, program, *shapes, counts)


def _held_out_rows(config) -> int:
    return config.eval.batch_size or config.batch_size


def _check_rows(config, mesh) -> None:
    try:
        sharding.check_batch("batch_size", config.batch_size, mesh, config.microbatches)
        sharding.check_batch("eval.batch_size", _held_out_rows(config), mesh)
    except UserError as error:
        rows = math.gcd(config.batch_size // config.microbatches, mesh.size)
        tensor = mesh.size // rows
        raise UserError(f"{error}; --config.mesh.tensor={tensor} would leave {rows} pieces for the rows") from None


def make_plan(
    config,
    topology: Topology,
    *,
    corpus_tokens: int = 0,
    done_steps: int | None = None,
    evaluation: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plans a validated config.

    corpus_tokens: tokens of the training split, for a run of epochs; done_steps: those of the run that is continued,
    None for as many as `init.from` has; evaluation: plan held-out scoring too.

    Raises:
      UserError: a mesh that the topology has not, a batch that does not divide, more steps done than there are.
    """
    with _setup(config, topology, corpus_tokens) as setup:
        began = time.monotonic()
        program, batch, config = setup.program, setup.batch, setup.config
        done = _done(config, setup.steps, done_steps)
        arguments = {
            "parameters": per_chip(program.like.params),
            "optimizer": per_chip(program.like.opt),
            "carry": per_chip(program.like.carry),
            "batch": per_chip(batch),
        }
        collectives, scoring, buffers = None, None, _state_buffers(program)
        if topology.platform == "tpu":
            say(f"compiling a step for {topology.count} x {topology.kind}")
            text, peak = _compile(program.step, program.like, batch)
            if evaluation and text is not None:
                say("compiling held-out scoring")
                scoring = _scoring_peak(setup)
            if text is not None:
                collectives = hlo.collectives(text)
                buffers += hlo.buffers(text)
            temporaries = max(peak - sum(arguments.values()), 0)
        else:
            temporaries = _estimate(setup)
        memory = Memory(
            available=int(topology.chip.memory),
            temporaries=temporaries,
            exact=topology.platform == "tpu",
            **arguments,
        )
        flops = train_flops(program.graph, config, setup.tokenizer.size)
        plan = Plan(
            topology=topology,
            settings={key: configs.flatten(config)[key] for key in _SHAPING},
            mesh=dict(setup.mesh.shape),
            tokens_per_step=config.batch_size * config.seq_len,
            parameters=setup.counts["total"],
            memory=memory,
            evaluation=scoring,
            flops=flops,
            steps=None if setup.steps is None else setup.steps - (done or 0),
            done_steps=done,
            compute=config.precision.compute,
            collectives=collectives,
            buffers=sorted(buffers, key=lambda buffer: -buffer.bytes),
            warnings=[],
            compile_seconds=time.monotonic() - began,
        )
        return dataclasses.replace(plan, warnings=_warnings(plan, setup))


_SHAPING = (
    "batch_size",
    "seq_len",
    "microbatches",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "remat",
    "precision.compute",
    "softmax_chunk",
)


def _compile(function, *arguments) -> tuple[str | None, int]:
    """(the compiled program's text, its peak of memory in bytes); no text where the compiler finds it too much."""
    lowered = function.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return None, needed
    return compiled.as_text(), int(compiled.memory_analysis().peak_memory_in_bytes)


def _needed(message: str) -> int | None:
    """Bytes that a refused program would have needed, from the TPU compiler's message; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds available", message) or re.search(
        r"[Uu]sed ([\d.]+)([KMGT]) of", message
    )
    return int(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1)) if match else None


def _scoring_peak(setup: _Setup) -> int:
    program, config = setup.program, setup.config
    size = _held_out_rows(config)
    rows = sharding.batch_sharding(setup.mesh)
    _, carry = fresh_carry(program.graph, size, program.carried, rows)
    objectives, _ = make_objectives(config, setup.tokenizer, evaluation=True)
    step = make_eval_step(program.graph.bind, objectives)
    _, peak = _compile(step, program.like.params, carry, setup.held_out)
    # The optimizer stays where it is while held-out text is scored.
    return peak + per_chip(program.like.opt) + per_chip(program.like.carry)


def _state_buffers(program: Program) -> list[hlo.Buffer]:
    """The largest leaves of the state, as one chip holds them."""
    return [
        hlo.Buffer(f"{leaf.dtype.name}{list(leaf.sharding.shard_shape(leaf.shape))}", (), _piece(leaf), path)
        for path, leaf in sharding.paths_and_leaves(program.like)
    ]


# Without a compiler: estimates


def _estimate(setup: _Setup) -> int:
    """Bytes that a step needs beside its arguments, by counting: residuals, gradients, and a chunk of logits.

    Residuals are what the backward pass reads of the forward pass. What belongs to rows grows with them, so two sizes
    tell both parts. A compiler keeps less (it recomputes what is cheap) and moves more: this is an estimate.
    """
    config, program = setup.config, setup.program
    together = math.lcm(*(getattr(o, "rows_per_example", 1) for o in program.objectives))
    one, two = (_residuals(setup, program, n * together) for n in (1, 2))
    rows = config.batch_size // sharding.row_shards(setup.mesh) // config.microbatches
    residuals = (two - one) / together * rows + max(2 * one - two, 0)
    if config.remat == "blocks":
        # One block at a time is computed anew, and keeps what it would have kept.
        plain = config.copy_and_resolve_references().unlock()
        plain.remat = "none"
        kept = _residuals(setup, make_program(plain, setup.tokenizer, setup.mesh, program.carried), together)
        residuals += max(kept - one, 0) / together * rows / config.model.get("layers", 1)
    gradients = per_chip(program.like.params) * (1 if config.microbatches == 1 else 2)
    tokens = rows * config.seq_len
    if "masked" in config.objectives:
        tokens = rows * min(config.objectives.masked.max_predictions, config.seq_len)
    chunk = min(config.softmax_chunk or tokens, tokens)
    logits = 6 * chunk * setup.tokenizer.size / setup.mesh.shape["tensor"]
    return int(residuals + gradients + logits)


def _residuals(setup: _Setup, program: Program, rows: int) -> int:
    batch = setup.batch
    loss = make_loss(program.graph.bind, program.objectives, program.coefficients)

    def of(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), tree)

    shared = {"shared": batch["shared"]} if "shared" in batch else {}
    inputs = of({name: leaf for name, leaf in batch.items() if name != "shared"}) | shared
    carry = of(program.like.carry)

    def kept(params, inputs, carry):
        key = jax.random.key(0)
        weights = all_weights(program.objectives, inputs)
        return jax.vjp(lambda p: loss(p, inputs, carry, key, weights), params, has_aux=True)[1]

    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), program.like.params)
    leaves = jax.tree.leaves(jax.eval_shape(kept, params, inputs, carry))
    given = {leaf.shape for leaf in jax.tree.leaves(params)}
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves if a.shape not in given)


# Warnings


def _warnings(plan: Plan, setup: _Setup) -> list[str]:
    config, mesh = setup.config, setup.mesh
    lines = [f"{message}" for message in setup.program.messages]
    state = plan.memory.parameters + plan.memory.optimizer
    if plan.mesh["fsdp"] * plan.mesh["tensor"] == 1 and mesh.size > 1 and state > plan.memory.available / 5:
        lines.append(
            f"parameters and optimizer, {gib(state)}, lie whole on every chip; mesh.fsdp=8 would leave"
            f" {gib(state / 8)} of them"
        )
    if plan.collectives is not None:
        lines += _replicated(plan, config, mesh)
        lines += _gathered_logits(plan, setup)
    if plan.evaluation is not None and plan.evaluation > plan.memory.available:
        lines.append(
            f"training fits, but scoring held-out text needs {gib(plan.evaluation)}: a smaller eval.batch_size or"
            " softmax_chunk"
        )
    if "words" in setup.batch.get("shared", {}):
        lines.append("shared/words is planned at its largest: as if every token of a batch were another word")
    if plan.done_steps is None:
        lines.append(
            "this run goes on with the steps of another one, and nobody says how many: --done_steps=N leaves them out"
            " of the hours and the cost"
        )
    if plan.steps is None:
        lines.append(
            "the run's length is in epochs of a corpus of unknown size: --corpus_tokens=TOKENS tells its hours and cost"
        )
    return lines


def _replicated(plan: Plan, config, mesh) -> Iterator[str]:
    """Activations with the rows of the whole batch on one chip, where rows are split over chips.

    Told by their sizes, so a width that equals the batch's could pass for it: what has a chip's own rows is left out.
    """
    if sharding.row_shards(mesh) == 1:
        return
    B, T = config.batch_size // config.microbatches, config.seq_len
    own = B // sharding.row_shards(mesh)
    for buffer in plan.buffers:
        sides = buffer.dimensions
        whole = B * T in sides or any({a, b} == {B, T} and a != b for a, b in itertools.pairwise(sides))
        has_own_rows = own > 1 and own in sides
        if whole and not has_own_rows and buffer.bytes >= LARGE and re.match(r"b?f\d", buffer.shape):
            yield f"the whole batch on every chip: {buffer.shape}, {gib(buffer.bytes)}, of {buffer.where}"


def _gathered_logits(plan: Plan, setup: _Setup) -> Iterator[str]:
    size, multiple = setup.tokenizer.size, setup.config.vocabulary_multiple
    padded = -(-size // multiple) * multiple
    width = setup.config.model.get("width")
    for collective in plan.collectives:
        for shape in collective.shapes if collective.kind == "all-gather" else ():
            sides = [int(side) for side in re.findall(r"\d+", shape.partition("[")[2])]
            if padded in sides and width not in sides and math.prod(sides) > padded:
                yield f"an all-gather of logits: {shape}, {gib(collective.bytes)} x {collective.times}"


def gib(size: float) -> str:
    """3.20 GiB, 12.5 MiB, 7 KiB."""
    if abs(size) >= 2**29:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if abs(size) >= 2**19 else f"{size / 2**10:.0f} KiB"


# Other settings


def attempt(config, topology: Topology, changes: Mapping, *, corpus_tokens: int = 0, say=lambda line: None) -> Attempt:
    """Plans a config with other values; one that is refused says why."""
    config = config.copy_and_resolve_references().unlock()
    say(", ".join(f"{key}={value}" for key, value in changes.items()))
    try:
        configs.apply(config, changes)
        configs.validate(config, complete=False).lock()
        plan = make_plan(config, topology, corpus_tokens=corpus_tokens, evaluation=False)
    except UserError as error:
        return Attempt(dict(changes), None, str(error))
    moved = None if plan.collectives is None else sum(c.bytes * c.times for c in plan.collectives)
    return Attempt(dict(changes), plan.memory, traffic=moved)


def changes_that_save(config, mesh: Mapping[str, int]) -> Iterator[dict]:
    """Settings that save memory, from the cheapest on: first those that change no number and cost little."""
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"])
    pieces = [n for n in (2, 4, 8, 16, 32) if rows % (n * config.microbatches) == 0]
    splits = [n for n in (2, 4, 8, 16, 32, 64) if mesh["data"] % n == 0]
    remat = [{"remat": "blocks"}] if config.remat == "none" else []
    microbatches = [{"microbatches": n * config.microbatches} for n in pieces]
    fsdp = [{"mesh.fsdp": n * mesh["fsdp"]} for n in splits]
    # Recomputing the blocks costs a third of a step's operations; splitting the state costs gathers; small
    # microbatches starve the chip. So: one of each first, then more of it, then together.
    yield from microbatches[:1]
    yield from remat
    yield from (change for pair in itertools.zip_longest(microbatches[1:], fsdp[2:3]) for change in pair if change)
    for more in (*microbatches, *fsdp[2:]):
        if remat:
            yield {**remat[0], **more}
    if microbatches and fsdp:
        yield {**(remat[0] if remat else {}), **microbatches[-1], **fsdp[-1]}


def smallest_change(config, topology: Topology, plan: Plan, say=lambda line: None) -> list[Attempt]:
    """What was tried to make a config fit, in order; the last attempt fits if any does."""
    tried = []
    for changes in changes_that_save(config, plan.mesh):
        tried.append(attempt(config, topology, changes, say=say))
        if tried[-1].memory is not None and tried[-1].memory.fits:
            break
    return tried


def sweep(config, topology: Topology, fsdp, tensor, microbatches, say=lambda line: None) -> list[Attempt]:
    """Every mesh and number of microbatches of the product."""
    points = itertools.product(fsdp, tensor, microbatches)
    return [
        attempt(config, topology, {"mesh.fsdp": f, "mesh.tensor": t, "microbatches": m, "mesh.data": -1}, say=say)
        for f, t, m in points
    ]
