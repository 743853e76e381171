"""What a config computes on a mesh: its batches, its model, THE step and the state that the step takes.

The one place that builds them. `plm.training.loop` runs the program; `plm.plan` compiles it for devices that need not
be there, so nothing here opens a corpus, a workdir or a device before it is asked to.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from plm.data.pipeline import Batches, Corpus, task_layout
from plm.data.pretrain import make_layout
from plm.models.graph import ModelGraph, build
from plm.training import config as configs
from plm.training import optimizer, sharding
from plm.training.objectives import HOST_ONLY, Draw, make_objectives
from plm.training.step import TrainState, make_train_step, new_state

EVAL_SEED = 0  # held-out masks and pairs are the same for every run, whatever its seed
CARRIED_LAYOUTS = ("lanes",)


def _layout(config, corpus: Corpus, mode: str, batch_size: int, seed: int):
    name, split = config.data.layout, corpus.train if mode == "train" else corpus.valid
    if name == "task":
        return task_layout(config, split, corpus.tokenizer, batch_size=batch_size, seed=seed, mode=mode)
    return make_layout(
        name,
        split,
        corpus.tokenizer,
        seq_len=config.seq_len,
        batch_size=batch_size,
        seed=seed,
        settings=config.data.own if configs.is_outside(name) else config.data[name],
        mode=mode,
    )


def make_batches(config, corpus: Corpus, mode: str, mesh) -> Batches:
    """Training or held-out batches of a config on a mesh. mode: "train" | "eval"."""
    evaluation = mode == "eval"
    batch_size = (config.eval.batch_size or config.batch_size) if evaluation else config.batch_size
    seed = EVAL_SEED if evaluation else config.seeds.data
    split = corpus.valid if evaluation else corpus.train
    objectives, _ = make_objectives(config, corpus.tokenizer, evaluation=evaluation)
    return Batches(
        _layout(config, corpus, mode, batch_size, seed),
        objectives,
        batch_size=batch_size,
        draw=lambda step, rows: Draw(seed, step, rows, mode),
        mesh=mesh,
        characters=split.character_rows if config.model.get("input") == "characters" else None,
        # Shared by a batch, words would be encoded anew for each microbatch.
        distinct_words=config.microbatches == 1 or evaluation,
        target_id=corpus.tokenizer.target_id,
        host_only=HOST_ONLY,
    )


def compute_dtype(config) -> jnp.dtype:
    """Of activations and products; parameters, optimizer, softmax, LayerNorm and loss are always float32."""
    return jnp.bfloat16 if config.precision.compute == "bfloat16" else jnp.float32


def carries(config, layout) -> bool:
    """Whether row i of a batch continues row i of the batch before; a layout from outside says so itself."""
    return config.data.layout in CARRIED_LAYOUTS or bool(getattr(layout, "continues_rows", False))


@dataclasses.dataclass(frozen=True)
class Program:
    """A resolved config on a mesh, ready to run or to be compiled under `jax.set_mesh(mesh)`.

    like: the abstract `TrainState` with its shardings; messages: what of it could not be split as the table asks;
    fresh(): the first state, made on its devices; step(state, batch) -> (state, metrics).
    """

    graph: ModelGraph
    objectives: list
    coefficients: dict[str, float]
    optimizer: optax.GradientTransformation
    carried: bool
    like: TrainState
    messages: list[str]
    fresh: Callable[[], TrainState]
    step: Callable[[TrainState, dict], tuple[TrainState, dict]]


def make_program(config, tokenizer, mesh, carried: bool) -> Program:
    """The program of a resolved config.

    tokenizer: only its size and what objectives read of it; mesh: of real devices, or of a described topology's;
    carried: see `carries`. To be called under `jax.set_mesh(mesh)`.

    Errors: UserError for a parameter without a row in the sharding table, and for what objectives refuse.
    """
    objectives, coefficients = make_objectives(config, tokenizer)
    names = tuple(objective.name for objective in objectives)
    graph = build(config, tokenizer.size, names, compute_dtype(config))
    tx = optimizer.make_optimizer(config.optimizer, graph.shapes(), config.optimizer.schedule_steps)
    numbers = optimizer.schedule_numbers(config.optimizer, config.optimizer.schedule_steps)

    def new_key():  # not made here: nothing can be computed on the devices of a described topology
        return jax.random.key(config.seeds.init)

    def create(key) -> TrainState:
        params = graph.init(key)
        carry = graph.bind(params).initial_carry(config.batch_size) if carried else {}
        return new_state(params, tx, carry)

    abstract = jax.eval_shape(lambda: create(new_key()))
    specs, messages = sharding.partition_specs(abstract, mesh, rules=graph.sharding_rules)
    shardings = sharding.shardings(specs, mesh)
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    moving = optimizer.without_frozen(config.optimizer.freeze, graph.shapes())
    step = make_train_step(
        lambda params: graph.bind(moving(params)),
        objectives,
        coefficients,
        tx,
        microbatches=config.microbatches,
        seed=config.seeds.init,
        optimizer_arguments={"schedule_numbers": numbers.on_device()},
        shardings=shardings,
    )
    return Program(
        graph,
        objectives,
        coefficients,
        tx,
        carried,
        like,
        messages,
        fresh=lambda: jax.jit(create, out_shardings=shardings)(new_key()),
        step=step,
    )


def fresh_carry(graph: ModelGraph, batch_size: int, carried: bool, rows: jax.sharding.Sharding):
    """(jitted function of the parameters that makes an evaluation's first carry, its abstract value with sharding)."""

    def fresh(params):
        return graph.bind(params).initial_carry(batch_size) if carried else {}

    shapes = jax.eval_shape(fresh, graph.shapes())
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), shapes)
    return jax.jit(fresh, out_shardings=jax.tree.map(lambda _: rows, shapes)), like
