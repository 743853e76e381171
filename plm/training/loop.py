"""The loop, in a written order: save(state) -> evaluate(state) -> next batch -> step -> report.

It knows no architecture. Every run, new or resumed, goes through `train`; what it computes is a function of the
resolved config alone, so typing the same command again goes on from the last checkpoint and ends with the same numbers.
"""

import dataclasses
import math
import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from plm import weights
from plm.data.pipeline import Batches, Corpus, open_corpus
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.graph import ModelGraph
from plm.training import checkpoint, sharding
from plm.training import config as configs
from plm.training.objectives import make_objectives
from plm.training.program import carries, fresh_carry, make_batches, make_program
from plm.training.record import CONFIG, TOKENIZER, Record
from plm.training.step import TrainState, make_eval_step


@dataclasses.dataclass
class Evaluator:
    """Held-out numbers: one fixed pass, a fresh carry, sums added in float64 on the host."""

    graph: ModelGraph
    batches: Batches
    objectives: list
    coefficients: dict
    limit: int
    carried: bool

    def __post_init__(self):
        self.step = make_eval_step(self.graph.bind, self.objectives)
        steps = self.batches.layout.steps
        self.steps = min(steps, self.limit) if self.limit else steps
        batches = self.batches
        self.fresh, _ = fresh_carry(self.graph, batches.batch_size, self.carried, batches.row_sharding)

    def __call__(self, params, progress=None) -> dict[str, float]:
        """{eval/name: value}: weighted means of every name, loss, perplexities of next-token losses, targets."""
        sums: dict[str, np.ndarray] = {}
        carry = self.fresh(params)
        pending = None

        def add(result):
            for name, pair in jax.device_get(result).items():
                sums[name] = sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)

        for batch in self.batches.iterate(0, self.steps):
            result, _, carry = self.step(params, carry, batch)
            if pending is not None:
                add(pending)
            pending = result
        add(pending)
        means = {name: total / weight for name, (total, weight) in sums.items() if weight > 0}
        values = {f"eval/{name}": value for name, value in means.items()}
        values["eval/loss"] = sum(factor * means[name] for name, factor in self.coefficients.items())
        for name in self.coefficients:
            values[f"eval/{name}_perplexity"] = math.exp(min(means[name], 700.0))
            values[f"eval/{name}_targets"] = float(sums[name][1])
        return values


@dataclasses.dataclass(frozen=True)
class _Source:
    """What `init.from` names: a run (step: None for its newest checkpoint) or a folder of foreign weights.

    tokenizer: None where no parameter belongs to an entry of a vocabulary, so that any will do (ELMo's weights).
    """

    name: str
    step: int | None
    tokenizer: Tokenizer | None
    foreign: weights.Foreign | None


def _open_source(spec: str) -> _Source:
    name, _, number = spec.rpartition("@")
    name, step = (name, int(number)) if name and number.isdigit() else (spec, None)
    if step is None and not (epath.Path(name) / checkpoint.FOLDER).exists():
        foreign = weights.read(name)
        return _Source(name, None, None if foreign.fits_any_vocabulary else foreign.tokenizer, foreign)
    return _Source(name, step, Tokenizer.load(epath.Path(name) / TOKENIZER), None)


def _start(config, corpus: Corpus, graph: ModelGraph, source: _Source | None, fresh, like, saved, say) -> TrainState:
    """The state to go on from: this run's newest whole checkpoint, `source`, or a new one."""
    restored = saved.restore_latest(like)
    if restored is not None:
        state, step = restored
        if step < config.total_steps:
            say(f"resuming after step {step} of {config.total_steps}")
        return state
    if not config.init["from"]:
        return fresh()
    source = source or _open_source(config.init["from"])  # this run was interrupted before its first checkpoint
    ours, theirs = corpus.tokenizer, source.tokenizer
    grown = ours.added[len(theirs.added) :] if theirs else ()
    if theirs and ours.fingerprint != (theirs.with_added(grown) if grown else theirs).fingerprint:
        raise UserError(
            f"init.from={source.name!r} has another vocabulary ({theirs.kind} of {theirs.size}) than"
            f" data.tokenizer.path={config.data.tokenizer.path!r} ({ours.kind} of {ours.size}): leave the path empty"
            " and its own is used"
        )
    state = fresh()
    if config.init.keep == "all":
        if source.foreign or grown:
            what = "holds weights only" if source.foreign else f"has not the {len(grown)} added words"
            raise UserError(f"init.from={source.name!r} {what}, so init.keep='all' cannot go on with its optimizer")
        state, step = checkpoint.restore_state(source.name, like, source.step)
        if step >= config.total_steps:
            raise UserError(
                f"init.from={source.name!r} has done {step} steps, which init.keep='all' counts: total_steps="
                f"{config.total_steps} must be more"
            )
        # Another run's rows are other text: its LSTM states say nothing here.
        state = dataclasses.replace(state, carry=fresh().carry)
        say(f"continuing {source.name} after step {step} with its optimizer and step")
        return state
    if source.foreign:
        loaded, where = source.foreign.params, source.name
    else:
        loaded, step = checkpoint.restore_params(source.name, source.step)
        where = f"{source.name} at step {step}"
    if theirs:
        old_pieces = theirs.encode(grown)
        loaded = checkpoint.grow_vocabulary(loaded, graph, theirs.size, old_pieces)
        for word, ids in zip(grown, old_pieces, strict=True):
            say(f"data.tokenizer.add: {word!r} starts as the mean of {' '.join(theirs.pieces(ids))}")
    params, report = checkpoint.start_from(state.params, loaded)
    report.refuse_missing(source.name, config.init.allow_missing)
    for line in report.lines():
        say(f"init.from {where}: {line}")
    return dataclasses.replace(state, params=params)


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
    source = _open_source(config.init["from"]) if config.init["from"] and kept is None else None
    inherited = source.tokenizer if source else None
    corpus = open_corpus(config.data, tokenizer_directory=kept, inherited=inherited, progress=chief)
    config = configs.resolve_seeds(config)
    batches = make_batches(config, corpus, "train", mesh)
    config = configs.resolve(
        config, examples_per_epoch=batches.layout.examples_per_epoch, platform=mesh.devices.flat[0].platform
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
            limit = config.eval.batches
            evaluator = Evaluator(graph, held_out, scored, scored_coefficients, limit, program.carried)
        else:
            record.say(
                "no document is held out, so nothing will be evaluated: give data.valid_source, more documents or"
                f" a larger data.valid_fraction than {config.data.valid_fraction:g}"
            )
        with checkpoint.Checkpoints(
            workdir / checkpoint.FOLDER,
            keep=config.checkpoint.keep,
            keep_at=config.checkpoint.keep_at,
            every_steps=config.checkpoint.every_steps,
        ) as saved:
            state = _start(config, corpus, graph, source, program.fresh, program.like, saved, record.say)
            start = int(state.step)
            if start >= config.total_steps and record.run.facts.get("status") == "complete":
                record.say(f"already complete after {start:,} steps: {workdir}")
                return {}
            record.begin(start, corpus=corpus, graph=graph, batches=batches, mesh=mesh)
            try:
                return _run(config, state, start, program.step, evaluator, batches, saved, record)
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
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from error


def _due(step: int, every: int, last: int) -> bool:
    return step == last or bool(every and step % every == 0)


def _run(config, state, start, train_step, evaluator, batches, saved, record) -> dict[str, float]:
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

    for step in range(start, total + 1):
        if step == total or saved.due(step):
            # First the lines, which no resumed run will make again, and up to here: one of its means starts here.
            report(line=True)
            saved.save(state, step, force=step == total)
        due = evaluator is not None and _due(step, config.eval.every_steps, total)
        if due and (step > start or (step > 0 and not record.has_evaluated)):
            report()
            began = time.perf_counter()
            values = evaluator(state.params)
            record.evaluation(step, values, time.perf_counter() - began)
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
