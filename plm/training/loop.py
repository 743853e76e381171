"""The loop, in a written order: save(state) -> evaluate(state) -> next batch -> step -> report.

It knows no architecture. Every run, new or resumed, goes through `train`; what it computes is a function of the
resolved config alone, so typing the same command again goes on from the last checkpoint and ends with the same numbers.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from plm.analysis import task_results
from plm.data.pipeline import Batches, Corpus, open_corpus, open_task
from plm.data.task_rows import TaskSplit
from plm.errors import UserError
from plm.models.graph import ModelGraph, build
from plm.training import checkpoint, metrics, sharding
from plm.training import config as configs
from plm.training.best import Best, make_best
from plm.training.objectives import make_objectives
from plm.training.preemption import Notice, Preempted
from plm.training.program import carries, compute_dtype, fresh_carry, make_batches, make_program
from plm.training.record import CONFIG, TOKENIZER, Record
from plm.training.start import first_state, open_source
from plm.training.step import make_eval_step


def open_data(config, **options) -> tuple[object, Corpus]:
    """(config with its seeds and what only a task's data tells, corpus); options: of `open_corpus`."""
    config = configs.resolve_seeds(config)
    if config.data.layout != "task":
        return config, open_corpus(config.data, **options)
    corpus = open_task(config, **options)
    task, vectors = corpus.task, corpus.train.vectors
    width = 0 if vectors is None else vectors.shape[1]
    kind, classes = task.task.kind, len(task.labels)
    return configs.settle(config, task=task.name, kind=kind, classes=classes, vectors=width), corpus


@dataclasses.dataclass
class Evaluator:
    """Held-out numbers: one fixed pass, a fresh carry, sums added in float64 on the host."""

    graph: ModelGraph
    batches: Batches
    objectives: list
    coefficients: dict
    limit: int
    carried: bool
    task: TaskSplit | None = None  # whose metrics are measured as well
    step: Callable | None = None  # the program, of another evaluator of the same model and objectives

    def __post_init__(self):
        if self.step is None:
            self.step = make_eval_step(self.graph.bind, self.objectives, everywhere=self.batches.replicated)
        steps = self.batches.layout.steps
        self.steps = min(steps, self.limit) if self.limit else steps
        batches = self.batches
        self.fresh, _ = fresh_carry(self.graph, batches.batch_size, self.carried, batches.row_sharding)

    def __call__(self, params, stops: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """{eval/name: value}: weighted means of every name, loss, perplexities of next-token losses, a task's metrics;
        and {eval/name_targets: how many things were averaged}. `metrics.held_out` reads it. stops: see `run`."""
        found = self.run(params, stops)
        if found is None:
            return None
        sums, predictions = found
        means = {name: total / weight for name, (total, weight) in sums.items() if weight > 0}
        values = {f"eval/{name}": value for name, value in means.items()}
        values |= {f"eval/{name}{metrics.TARGETS}": float(sums[name][1]) for name in means}
        values["eval/loss"] = sum(factor * means[name] for name, factor in self.coefficients.items())
        for name in self._losses_of_tokens:
            values[f"eval/{name}{metrics.PERPLEXITY}"] = math.exp(min(means[name], 700.0))
        if self.metrics:
            for name, value in task_results.measure(self.task, predictions).items():
                values |= {f"eval/{name}": value, f"eval/{name}{metrics.TARGETS}": float(len(self.task.examples))}
        return values

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.batches.replicated.mesh

    @property
    def _losses_of_tokens(self) -> list[str]:
        return [name for name in self.coefficients if name.split("_")[0] in configs.TOKEN_OBJECTIVES]

    @property
    def losses(self) -> list[str]:
        """Names, without "eval/", of what an evaluation gives and of which less is better."""
        return ["loss", *self.coefficients, *(f"{name}{metrics.PERPLEXITY}" for name in self._losses_of_tokens)]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The task's, the one that selects first: of a whole pass only."""
        whole = self.task is not None and self.steps == self.batches.layout.steps
        return tuple(self.task.task.task.metrics) if whole else ()

    def run(
        self, params, stops: Callable[[], bool] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, dict[int, np.ndarray]]] | None:
        """({name: float64 (sum, weight)}, {objective: {item: what it predicts}}) of the whole pass.

        stops: asked before each batch; None is returned once it says so.
        """
        sums: dict[str, np.ndarray] = {}
        predictions: dict[str, dict[int, np.ndarray]] = {}
        carry = self.fresh(params)
        pending = None

        def add(step, result):
            result, predicted = jax.device_get(result)
            for name, pair in result.items():
                sums[name] = sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
            for name, arrays in predicted.items():
                own = zip(self.batches.layout.items(step).tolist(), arrays, strict=True)
                predictions.setdefault(name, {}).update((item, array) for item, array in own if item >= 0)

        for step, batch in enumerate(self.batches.iterate(0, self.steps)):
            if stops is not None and stops():
                return None
            result, predicted, carry = self.step(params, carry, batch)
            if pending is not None:
                add(*pending)
            pending = step, (result, predicted)
        add(*pending)
        return sums, predictions


def make_evaluator(config, corpus: Corpus) -> Evaluator:
    """An evaluator outside of training: in the loop's own batches and precision, on all devices if they divide the
    batch, else on one. To be called under `jax.set_mesh(evaluator.mesh)`."""
    batch_size = config.eval.batch_size or config.batch_size
    whole = batch_size % (jax.device_count() * configs.rows_per_example(config)) == 0
    everything = type(config.mesh)({"data": -1, "fsdp": 1, "tensor": 1})
    mesh = sharding.make_mesh(everything, jax.devices() if whole else jax.devices()[:1])
    objectives, coefficients = make_objectives(config, corpus.tokenizer, evaluation=True)
    graph = build(config, corpus.tokenizer.size, tuple(config.objectives), compute_dtype(config))
    with jax.set_mesh(mesh):
        batches = make_batches(config, corpus, "eval", mesh)
        carried = carries(config, batches.layout)
        return Evaluator(graph, batches, objectives, coefficients, config.eval.batches, carried)


def train(config, workdir: epath.PathLike) -> dict[str, float]:
    """Trains `config` (validated) in `workdir`, or goes on with it; returns the last evaluation's numbers.

    Files: see `plm.training.metrics`; checkpoints in `workdir/checkpoints`, the tokenizer in `workdir/tokenizer`.

    Errors: UserError for whatever the user can mend, before anything starts where possible.
    """
    workdir = epath.Path(workdir)
    chief = jax.process_index() == 0
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch("batch_size", config.batch_size, mesh, config.microbatches)
    sharding.check_batch("eval.batch_size", config.eval.batch_size or config.batch_size, mesh)
    _check_writable(workdir)

    kept = workdir / TOKENIZER if (workdir / CONFIG).exists() else None
    source = open_source(config.init["from"]) if config.init["from"] and kept is None else None
    config, corpus = open_data(
        config, tokenizer_directory=kept, inherited=source.inherited(config) if source else None, progress=chief
    )
    batches = make_batches(config, corpus, "train", mesh)
    config = configs.resolve(
        config, examples_per_pass=batches.examples_per_pass, platform=mesh.devices.flat[0].platform
    )
    record = Record(workdir, config, enabled=chief)
    record.refuse_another_config(corpus)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("plm: every process has read the workdir")
    with jax.set_mesh(mesh):
        program = make_program(config, corpus.tokenizer, mesh, carries(config, batches.layout))
        graph = program.graph
        for message in program.messages:
            record.say(message)
        evaluator = None
        if corpus.valid.n_tokens:
            held_out = make_batches(config, corpus, "eval", mesh)
            scored, scored_coefficients = make_objectives(config, corpus.tokenizer, evaluation=True)
            limit, measured = config.eval.batches, corpus.valid if corpus.task else None
            evaluator = Evaluator(graph, held_out, scored, scored_coefficients, limit, program.carried, measured)
        else:
            record.say(
                "no document is held out, so nothing will be evaluated: give data.valid_source, more documents or"
                f" a larger data.valid_fraction than {config.data.valid_fraction:g}"
            )
        named = (evaluator.losses, evaluator.metrics) if evaluator else ((), ())
        best = make_best(config, *named, evaluated=evaluator is not None)
        lines = metrics.read_metrics(workdir) if best else []
        with checkpoint.Checkpoints(
            workdir / checkpoint.FOLDER,
            keep=config.checkpoint.keep,
            keep_at=config.checkpoint.keep_at,
            every_steps=config.checkpoint.every_steps,
            best=(record.run.facts.get(checkpoint.BEST) or {}).get("step") if best else None,
        ) as saved:
            resumes = bool(saved.steps())
            state = first_state(config, corpus, graph, source, program.fresh, program.like, saved, record.say)
            start = int(state.step)
            if best:
                best.replay(lines, start, saved.steps())
            ended = start >= config.total_steps or (best and best.exhausted)
            if ended and record.run.facts.get("status") == "complete":
                record.say(f"already complete after {start:,} steps: {workdir}")
                return {}
            if resumes and start < config.total_steps:
                record.say(f"resuming after step {start} of {config.total_steps}")
            lineage = source.lineage() if source else None
            record.begin(start, corpus=corpus, graph=graph, batches=batches, mesh=mesh, starts_from=lineage)
            if best and best.step is not None:
                saved.keep_best(best.step)
                record.best(best)
            try:
                with Notice(mesh) as notice:
                    return _run(config, state, start, program.step, evaluator, batches, saved, record, notice, best)
            except Exception as error:
                record.fail(error)
                raise
            finally:
                record.close()


def _check_writable(workdir: epath.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable.{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # each client of object storage has its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"--workdir={workdir} cannot be written: {reason}") from error


def _due(step: int, every: int, last: int) -> bool:
    return step == last or bool(every and step % every == 0)


def _run(
    config, state, start, train_step, evaluator, batches, saved, record, notice, best: Best | None
) -> dict[str, float]:
    """Steps start .. total_steps. The numbers of a step are fetched while the next one runs."""
    total, values = config.total_steps, {}
    stream = batches.iterate(start, total)
    pending = None

    def report(*, line: bool = False) -> None:
        nonlocal pending
        if pending is None:
            return
        step, numbers = pending
        pending = None
        numbers = {name: float(value) for name, value in jax.device_get(numbers).items()}
        record.train(step, numbers, line=line)
        if numbers["skipped_in_a_row"] >= config.nonfinite.max_in_a_row:
            raise UserError(
                f"the loss or its gradient was not finite in {int(numbers['skipped_in_a_row'])} steps in a row, the"
                f" last of them step {step}: lower optimizer.peak_lr={config.optimizer.peak_lr:g} or warm up longer"
            )

    def leave(step: int) -> None:
        saved.wait()
        record.interrupted(step)
        raise Preempted(step)

    for step in range(start, total + 1):
        stops = step < total and notice.stops_here()
        due = evaluator is not None and _due(step, config.eval.every_steps, total)
        if step == total or stops or saved.due(step) or (due and best and step > 0):
            # First the lines, which no resumed run will make again, and up to here: one of its means starts here.
            report(line=True)
            saved.save(state, step, force=True)
        if stops:
            leave(step)
        if due and (step > start or (step > 0 and not record.has_evaluated)):
            report()
            began = time.perf_counter()
            values = evaluator(state.params, notice.stops_here)
            if values is None:  # the run that goes on from here evaluates first
                saved.save(state, step, force=True)
                leave(step)
            record.evaluation(step, values, time.perf_counter() - began)
            if best and best.add(step, values):
                saved.keep_best(step)
                record.best(best)
        if best and best.exhausted and step < total:
            saved.wait()
            record.finish(step, early=best)
            return values
        if step == total:
            break
        batch = next(stream)
        state, numbers = train_step(state, batch)
        report()
        pending = (step + 1, numbers)
    report()
    saved.wait()
    record.finish(total)
    return values
