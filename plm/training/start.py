"""What a run starts from: its own newest checkpoint, another run, foreign weights, or nothing."""

import dataclasses
import functools
import re
from collections.abc import Callable

from etils import epath

from plm import weights
from plm.data.pipeline import Corpus
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.graph import ModelGraph
from plm.training import checkpoint
from plm.training import config as configs
from plm.training.metrics import RunRecord
from plm.training.record import CONFIG, TOKENIZER
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
        }


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
    params, report = checkpoint.start_from(state.params, _for_task(loaded, graph), reset=config.init.reset)
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
    return checkpoint.grow_vocabulary(loaded, graph, theirs.size, [*old_pieces, *[None] * len(marks)], fresh)


def _for_task(loaded: dict, graph: ModelGraph) -> dict:
    """The parameters of a source, with its pooler also where a task's head has one."""
    flat = dict(checkpoint.paths_and_leaves(loaded))
    for path in graph.paths:
        if _TASK_POOLER.match(path) and path not in flat:
            before = _TASK_POOLER.sub(_POOLER, path)
            if before in flat:
                flat[path] = flat[before]
    return checkpoint.nest(flat)
