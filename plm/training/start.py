"""What a run starts from: its own newest checkpoint, another run, foreign weights, or nothing."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from plm import weights
from plm.data.pipeline import Corpus
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.graph import ModelGraph
from plm.models.layers import STACKED, logical_names
from plm.training import checkpoint
from plm.training import config as configs
from plm.training.metrics import COUNTS, RunRecord, counted_before
from plm.training.record import CONFIG, TOKENIZER
from plm.training.sharding import PyTree, paths_and_leaves, place
from plm.training.step import TrainState

# The pooler of BERT is trained by next-sentence prediction and used by the heads of tasks (BERT section 4.1).
_POOLER = "heads/next_sentence/pooler/"
_TASK_POOLER = re.compile(rf"^heads/({'|'.join(sorted(configs.TASK_OBJECTIVES))})/pooler/")


@dataclasses.dataclass(frozen=True)
class Source:
    """What `init.from` names: a run (step: None for its newest checkpoint) or a folder of foreign weights.

    config: of its model; facts: what run.json tells of it, {} for foreign weights. tokenizer: needed for the model's
    rows; None where no parameter belongs to an entry of a vocabulary, so that any will do (ELMo's weights).
    """

    name: str
    step: int | None
    config: object
    tokenizer: Tokenizer | None
    foreign: weights.Foreign | None
    facts: dict

    def inherited(self, config) -> Tokenizer | None:
        """The tokenizer that a run of `config` takes over. ELMo's weights fit any: pretraining wants a vocabulary of
        the corpus for its softmax, a task only the splitting into words."""
        return self.foreign.tokenizer if self.foreign and config.data.layout == "task" else self.tokenizer

    def lineage(self) -> dict:
        """For run.json: where the parameters come from and which seed pretrained them."""
        inherited = self.facts.get("starts_from") or {}
        seed = inherited.get("pretrain_seed", self.config.get("seed"))
        return {
            "source": self.name,
            "step": self.step if self.step is not None else self.facts.get("step"),
            "pretrain_seed": None if self.foreign else seed,
            "corpus": self.facts.get("corpus", {}).get("fingerprint"),
            "format": self.foreign.format if self.foreign else "run",
            "counts": self._counts(),
        }

    def _counts(self) -> dict[str, float]:
        """What the run had read and computed at this step, of `metrics.COUNTS`: each update takes as much."""
        begins, earlier = counted_before(self.facts, self.config.get("init", {}).get("keep"))
        ended = self.facts.get("step")
        step = ended if self.step is None else self.step
        if not ended or ended <= begins:
            return {}
        part = (step - begins) / (ended - begins)
        known = {name: self.facts[name] for name in COUNTS if self.facts.get(name) is not None}
        return {name: (value - earlier.get(name, 0)) * part + earlier.get(name, 0) for name, value in known.items()}


@functools.lru_cache(maxsize=1)
def _foreign(name: str) -> weights.Foreign:
    """Read once for the config that a run is described by and for the parameters that it starts from."""
    return weights.read(name)


def open_source(spec: str) -> Source:
    """`SRC[@STEP|@best]`. Errors: UserError where there is no model."""
    name, step = checkpoint.split_step(spec)
    folder = epath.Path(name)
    if step is None and not (folder / checkpoint.FOLDER).exists():
        foreign = _foreign(name)
        return Source(
            name, None, foreign.config, None if foreign.fits_any_vocabulary else foreign.tokenizer, foreign, {}
        )
    if not (folder / CONFIG).exists():
        raise UserError(f"init.from={spec!r} is no run: it has no {CONFIG}")
    config = configs.from_json((folder / CONFIG).read_text())
    facts = RunRecord(folder, enabled=False).facts
    return Source(name, step, config, Tokenizer.load(folder / TOKENIZER), None, facts)


def _check_vocabulary(source: Source, ours: Tokenizer, path: str) -> None:
    """Refuses a vocabulary that is not the source's, but for words and marks added to it."""
    theirs = source.tokenizer
    grown = theirs.with_added(added) if (added := ours.added[len(theirs.added) :]) else theirs
    if ours.marks and not theirs.marks:
        grown = grown.with_marks(ours.marks)
    if ours.fingerprint != grown.fingerprint:
        raise UserError(
            f"init.from={source.name!r} has another vocabulary ({theirs.kind} of {theirs.size}) than"
            f" data.tokenizer.path={path!r} ({ours.kind} of {ours.size}): leave the path empty and its own is used"
        )


def first_state(
    config, corpus: Corpus, graph: ModelGraph, source: Source | None, fresh: Callable, like, saved, say: Callable
) -> TrainState:
    """The state to go on from: this run's newest whole checkpoint, `source`, or a new one.

    fresh: () -> the first state on its devices; like: its abstract value; saved: the run's `Checkpoints`; say: takes a
    line for the user.
    """
    restored = saved.restore_latest(like)
    if restored is not None:
        return restored[0]
    if not config.init["from"]:
        return fresh()
    source = source or open_source(config.init["from"])  # this run was interrupted before its first checkpoint
    ours, theirs = corpus.tokenizer, source.tokenizer
    if theirs:
        _check_vocabulary(source, ours, config.data.tokenizer.path)
    if config.init.keep == "nothing":
        say(f"init.from {source.name}: its vocabulary only; every parameter starts at a random value (init.keep)")
        return fresh()
    new_ids = ours.size - theirs.size if theirs else 0
    state = fresh()
    if config.init.keep == "all":
        if source.foreign or new_ids:
            what = "holds weights only" if source.foreign else f"has not the {new_ids} added tokens"
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
        loaded = _with_new_rows(loaded, graph, theirs, ours, state.params, say)
    params, report = start_from(state.params, _for_task(loaded, graph), reset=config.init.reset)
    report.refuse_missing(source.name, config.init.allow_missing)
    for line in report.lines():
        say(f"init.from {where}: {line}")
    return dataclasses.replace(state, params=params)


def _with_new_rows(loaded: dict, graph: ModelGraph, theirs: Tokenizer, ours: Tokenizer, fresh: dict, say: Callable):
    """Rows of added words start as the mean of their old pieces, rows of marks at random values (GPT's code)."""
    words = ours.added[len(theirs.added) :]
    old_pieces: list = [*theirs.encode(words)]
    for word, ids in zip(words, old_pieces, strict=True):
        say(f"data.tokenizer.add: {word!r} starts as the mean of {' '.join(theirs.pieces(ids))}")
    marks = ours.marks if not theirs.marks else ()
    if marks:
        say(f"{', '.join(f'_{name}_' for name in marks)}: new tokens of the task's rows, at random values")
    return grow_vocabulary(loaded, graph, theirs.size, [*old_pieces, *[None] * len(marks)], fresh)


def _for_task(loaded: dict, graph: ModelGraph) -> dict:
    """The parameters of a source, with its pooler also where a task's head has one."""
    flat = dict(paths_and_leaves(loaded))
    for path in graph.paths:
        if _TASK_POOLER.match(path) and path not in flat:
            before = _TASK_POOLER.sub(_POOLER, path)
            if before in flat:
                flat[path] = flat[before]
    return checkpoint.nest(flat)


@dataclasses.dataclass(frozen=True)
class StartReport:
    """How the parameters of another run fit a model, by logical names.

    matched: taken over; missing: not in the source, fresh here; left_over: in the source only; mismatched: in both with
    different shapes (name, its shape there, its shape here), fresh here; reset: in both, fresh here as asked for.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    reset: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line for each kind that occurs."""
        lines = [f"matched: {len(self.matched)} parameters"]
        for kind in ("missing", "left_over", "reset"):
            if names := getattr(self, kind):
                lines.append(f"{kind.replace('_', ' ')}: {len(names)} parameters: {', '.join(names)}")
        if self.mismatched:
            pairs = ", ".join(f"{name} {list(there)} there, {list(here)} here" for name, there, here in self.mismatched)
            lines.append(f"mismatched: {len(self.mismatched)} parameters: {pairs}")
        return lines

    def refuse_missing(self, source: str, allowed: str) -> None:
        """Raises UserError for parameters that would silently stay random, unless the regex `allowed` finds them."""
        without = [*self.missing, *(name for name, *_ in self.mismatched)]
        refused = [name for name in without if not (allowed and re.search(allowed, name))]
        if refused:
            shown = ", ".join(refused[:5]) + (f" and {len(refused) - 5} more" if len(refused) > 5 else "")
            shapes = [f"; {line}" for line in self.lines() if line.startswith("mismatched")]
            raise UserError(
                f"init.from={source!r} lacks {len(refused)} parameters of this model: {shown}{''.join(shapes)};"
                " init.allow_missing=REGEX lets those that it finds start at random values"
            )


def grow_vocabulary(params: PyTree, graph, size: int, old_pieces: Sequence, fresh: PyTree | None = None) -> PyTree:
    """`params` of a model of `size` ids (stored names) with a row more for each of `old_pieces`, padded as in `graph`.

    Tables and biases of the vocabulary get the mean of the rows of the ids that the new entry was written with before;
    for None the row of `fresh`, parameters of the grown model. Without `old_pieces` only the padding changes.
    """
    grown = size + len(old_pieces)
    others = ("embedding/positions/", "embedding/segments/")
    tables = {p.path: p.shape[0] for p in graph.parameters if p.rows == grown and not p.path.startswith(others)}
    random = {} if fresh is None else dict(paths_and_leaves(fresh))

    def row(path: str, leaf, number: int, ids):
        if ids is None:
            return np.asarray(random[path][size + number])[None].astype(leaf.dtype)
        return leaf[np.asarray(ids)].mean(axis=0, keepdims=True).astype(leaf.dtype)

    def grow(path: str, leaf):
        if path not in tables:
            return leaf
        leaf = np.asarray(leaf)[:size]
        whole = np.concatenate([leaf, *(row(path, leaf, number, ids) for number, ids in enumerate(old_pieces))])
        return np.pad(whole, [(0, tables[path] - grown)] + [(0, 0)] * (leaf.ndim - 1))

    return checkpoint.nest({path: grow(path, leaf) for path, leaf in paths_and_leaves(params)})


def _by_logical_name(params: PyTree) -> dict[str, np.ndarray]:
    result = {}
    for path, leaf in paths_and_leaves(params):
        stacked = STACKED in path.split("/")
        for layer, name in enumerate(logical_names(path, leaf.shape[0] if stacked else 1)):
            result[name] = leaf[layer] if stacked else leaf
    return result


def start_from(params: PyTree, loaded: PyTree, *, reset: str = "") -> tuple[PyTree, StartReport]:
    """`params` with the values of `loaded` wherever a logical name and its shape agree, and a report of the rest.

    Args:
      params: fresh parameters, arrays on their devices (stored names).
      loaded: nested dict of host arrays by stored or by logical names. Layers are matched one by one, so a stack may
        start from a deeper or a shallower one.
      reset: regex of logical names that stay as they are in `params` although `loaded` has them.

    Raises:
      UserError: not one parameter agrees, or nothing is there to be reset.
    """
    source = _by_logical_name(loaded)
    anew = {name for name in source if reset and re.search(reset, name)}
    if reset and not anew:
        names = checkpoint.spell_out(list(source))
        raise UserError(f"init.reset={reset!r} finds no parameter; their names are like {names}")
    matched, missing, mismatched = [], [], []
    used = set()
    new = []
    for path, leaf in paths_and_leaves(params):
        stacked = STACKED in path.split("/")
        names = logical_names(path, leaf.shape[0] if stacked else 1)
        shape = tuple(leaf.shape[1:] if stacked else leaf.shape)
        take = np.zeros(len(names), bool)
        values = np.zeros((len(names), *shape), leaf.dtype)
        for layer, name in enumerate(names):
            if name not in source:
                missing.append(name)
                continue
            used.add(name)
            if name in anew:
                continue
            if tuple(source[name].shape) != shape:
                mismatched.append((name, tuple(source[name].shape), shape))
                continue
            matched.append(name)
            take[layer] = True
            values[layer] = source[name]
        if not take.any():
            new.append(leaf)
            continue
        values = place(values.reshape(leaf.shape), leaf.sharding)
        if not take.all():
            mask = take.reshape(-1, *[1] * (leaf.ndim - 1))
            values = jax.jit(lambda mask, a, b: jnp.where(mask, a, b), out_shardings=leaf.sharding)(mask, values, leaf)
        new.append(values)
    report = StartReport(
        tuple(matched),
        tuple(missing),
        tuple(name for name in source if name not in used),
        tuple(mismatched),
        tuple(name for name in source if name in anew and name in used),
    )
    if not matched and not anew:
        raise UserError(f"no parameter of the source fits this model: {checkpoint.spell_out(report.lines()[1:])}")
    return jax.tree.unflatten(jax.tree.structure(params), new), report
