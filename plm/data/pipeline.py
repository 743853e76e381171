"""batch = f(seed, step): rows of a layout, fields of the objectives, placed on the devices that hold them."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from plm.cache import cache_directory, once
from plm.data import sources, static_vectors, store, tasks, tokenizers
from plm.data.examples import Example, fraction
from plm.data.task_rows import TaskRows, TaskSplit, with_task_tokens
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.char_cnn import MAX_CHARACTERS
from plm.progress import Progress
from plm.randomness import stable_hash

ROWS = PartitionSpec(("data", "fsdp"))
# Inputs of a layout, and what they become for a model that reads characters: spelled out, or as places in shared/words.
_INPUTS = {"tokens": ("characters", "words"), "tokens_backward": ("characters_backward", "words_backward")}


def _declared_size(words: int, tokens: int) -> int:
    """Rows of `shared/words`: an eighth, a quarter, half or all of the batch's tokens, so that few shapes compile."""
    return next(size for size in (-(-tokens // part) for part in (8, 4, 2, 1)) if size >= words)


class Batches:
    """Global batches of `batch_size` rows as a function of the step, each process making only the rows it holds.

    layout: gives rows (`plm.data.pretrain`); objectives: add fields to them; draw: (step, rows) -> the named random
    numbers of these rows; characters: ids -> uint16 [..., 50] for a model that reads characters, else None;
    distinct_words: spell each distinct word of the global batch once (`shared/words`), not every token; target_id:
    closes the vocabulary of inputs that are looked up in a table; host_only: names not sent to devices.
    """

    def __init__(
        self,
        layout,
        objectives: Sequence,
        *,
        batch_size: int,
        draw: Callable,
        mesh: jax.sharding.Mesh,
        characters: Callable | None,
        distinct_words: bool,
        target_id: Callable,
        host_only: Sequence[str],
    ):
        self.layout, self.objectives, self.batch_size, self.draw = layout, objectives, batch_size, draw
        self.characters, self.distinct_words = characters, distinct_words
        self.target_id, self.host_only = target_id, host_only
        self.row_sharding = NamedSharding(mesh, ROWS)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        held = self.row_sharding.addressable_devices_indices_map((batch_size,)).values()
        spans = [index[0].indices(batch_size)[:2] for index in held]
        self.first, self.last = min(s for s, _ in spans), max(e for _, e in spans)

    @property
    def examples_per_pass(self) -> float:
        """Rows in one pass over the split, whatever the layout calls an epoch."""
        return getattr(self.layout, "examples_per_pass", self.layout.examples_per_epoch)

    def _rows(self, step: int, rows: range) -> dict:
        """Rows of the layout with the fields of all objectives."""
        batch = dict(self.layout.rows(step, rows))
        draw = self.draw(step, rows)
        for objective in self.objectives:
            batch |= objective.fields(batch, draw)
        batch["row"] = np.arange(rows.start, rows.stop, dtype=np.int32)
        return {name: array for name, array in batch.items() if name not in self.host_only}

    def local(self, step: int) -> dict:
        """This process's rows of the batch of `step`, NumPy arrays rows first; `shared` holds what has no rows."""
        if self.characters is None:
            batch = self._rows(step, range(self.first, self.last))
            for name in _INPUTS.keys() & batch.keys():
                batch[name] = self.target_id(batch[name]).astype(np.int32)
            return batch
        if not self.distinct_words:
            batch = self._rows(step, range(self.first, self.last))
            for name in _INPUTS.keys() & batch.keys():
                batch[_INPUTS[name][0]] = self._spell(batch.pop(name))
            return batch
        # Every process needs the words of all rows: ids are cheap, their characters are not.
        batch = self._rows(step, range(self.batch_size))
        inputs = [name for name in _INPUTS if name in batch]
        tokens = np.stack([batch.pop(name) for name in inputs])
        words, index = np.unique(tokens, return_inverse=True)
        index = index.reshape(tokens.shape).astype(np.int32)
        spelled = np.zeros((_declared_size(len(words), tokens.size), MAX_CHARACTERS), np.int32)
        spelled[: len(words)] = self._spell(words)
        shared = batch.pop("shared", {}) | {"words": spelled}
        batch |= {_INPUTS[name][1]: index[i] for i, name in enumerate(inputs)}
        return {name: array[self.first : self.last] for name, array in batch.items()} | {"shared": shared}

    def _spell(self, ids: np.ndarray) -> np.ndarray:
        """ELMo's character ids, shifted by one so that 0 means "no token here"."""
        return self.characters(ids).astype(np.int32) + 1

    def place(self, batch: dict) -> dict:
        """Host arrays -> global arrays: rows over (data, fsdp), `shared` on every device."""
        shared = batch.get("shared")
        rows = {name: array for name, array in batch.items() if name != "shared"}
        if jax.process_count() == 1:
            placed = jax.device_put(rows, self.row_sharding)
            return placed if shared is None else placed | {"shared": jax.device_put(shared, self.replicated)}

        def spread(array):
            def rows_of(index):
                start, stop, _ = index[0].indices(self.batch_size)
                return array[start - self.first : stop - self.first]

            return jax.make_array_from_callback((self.batch_size, *array.shape[1:]), self.row_sharding, rows_of)

        placed = {name: spread(array) for name, array in rows.items()}
        if shared is not None:
            everywhere = {
                name: jax.make_array_from_callback(
                    np.shape(a), self.replicated, lambda index, a=a: np.asarray(a)[index]
                )
                for name, a in shared.items()
            }
            placed["shared"] = everywhere
        return placed

    def abstract(self, mesh: jax.sharding.Mesh, batch_size: int) -> dict:
        """What `place` would give of batches of `batch_size` rows, as `jax.ShapeDtypeStruct`s.

        mesh: its devices need not be there. This object's own batch may be smaller; it is made once, for its shapes.
        `shared/words` has the largest of its declared sizes.
        """

        def like(shape, dtype, spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        batch = self.local(0)
        shared = {name: np.asarray(array) for name, array in batch.pop("shared", {}).items()}
        shapes = {name: like((batch_size, *a.shape[1:]), a.dtype, ROWS) for name, a in batch.items()}
        if not shared:
            return shapes
        everywhere = {name: like(a.shape, a.dtype, PartitionSpec()) for name, a in shared.items()}
        if "words" in shared:
            tokens = sum(math.prod(shapes[name].shape) for _, name in _INPUTS.values() if name in shapes)
            everywhere["words"] = like((tokens, MAX_CHARACTERS), shared["words"].dtype, PartitionSpec())
        return shapes | {"shared": everywhere}

    def __call__(self, step: int) -> dict:
        """The placed batch of `step`."""
        return self.place(self.local(step))

    def iterate(self, start: int, stop: int, *, threads: int = 1, buffer: int = 4) -> Iterator[dict]:
        """Placed batches of steps start .. stop - 1, made ahead by threads; starting anywhere costs nothing."""
        steps = grain.MapDataset.range(start, stop).map(self.local)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        for batch in steps.to_iter_dataset(options):
            yield self.place(batch)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenizer and the held-in and held-out text in its ids.

    meta: what run.json says of the data: corpus fingerprint (source and split, no tokenizer), licence, counts.
    task: of a labelled task; its held-out part is then what settings are selected by (protocol 10).
    """

    tokenizer: Tokenizer
    train: store.Split | TaskSplit
    valid: store.Split | TaskSplit
    meta: dict
    task: tasks.TaskData | None = None


def _trained_on(source: sources.Source, wanted, valid_fraction: float, progress: bool) -> Tokenizer:
    """A vocabulary of the held-in documents of a source, remembered by corpus and settings."""
    settings = (wanted.kind, wanted.vocab, wanted.lowercase, wanted.pretokenized, valid_fraction)
    name = f"{stable_hash('vocabulary', tokenizers.VERSION, source.fingerprint, *settings, bits=128):032x}"
    path = cache_directory() / "vocabularies" / name
    return Tokenizer.load(once(path, lambda path: _train(source, wanted, valid_fraction, progress).save(path)))


def _train(source: sources.Source, wanted, valid_fraction: float, progress: bool) -> Tokenizer:
    shards = source.shards()
    bar = Progress("vocabulary", sum(shard.bytes for shard in shards), unit="B", enabled=progress)

    def sentences():
        for shard in shards:
            for document in shard.documents():
                if sources.split_of(document, valid_fraction) == "train":
                    yield from document.sentences
            bar.add(shard.bytes)

    trained = tokenizers.train(
        wanted.kind, sentences(), wanted.vocab, lowercase=wanted.lowercase, pretokenized=wanted.pretokenized
    )
    bar.close()
    return trained


def _added_words(path: str) -> list[str]:
    """The lines of `data.tokenizer.add`."""
    try:
        lines = epath.Path(path).read_text(encoding="utf-8").removeprefix("\ufeff").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.tokenizer.add={path!r} is no readable file of words, one a line ({error})") from None
    words = [line.strip() for line in lines if line.strip()]
    if not words:
        raise UserError(f"data.tokenizer.add={path!r} holds no word: one a line is right")
    return words


def _vocabulary(
    wanted, directory: epath.Path | None, inherited: Tokenizer | None, trained: Callable[[], Tokenizer]
) -> Tokenizer:
    """The vocabulary of `config.data.tokenizer`; the order is that of `open_corpus`, whose last resort is `trained`."""
    if directory is not None and (directory / "tokenizer.json").exists():
        return Tokenizer.load(directory)
    tokenizer = Tokenizer.read(wanted.path) if wanted.path else inherited or trained()
    if tokenizer.kind != wanted.kind:
        where = f"data.tokenizer.path={wanted.path!r}" if wanted.path else "the model of init.from"
        raise UserError(
            f"{where} holds a {tokenizer.kind!r} tokenizer; data.tokenizer.kind={wanted.kind!r} was asked for"
        )
    return tokenizer.with_added(_added_words(wanted.add)) if wanted.add else tokenizer


def open_corpus(
    data,
    *,
    tokenizer_directory: epath.Path | None = None,
    inherited: Tokenizer | None = None,
    progress: bool = True,
) -> Corpus:
    """Opens, and where need be makes, the vocabulary and the stores of `config.data`.

    tokenizer_directory: where a run keeps its tokenizer. One that lies there is used, so that a run is complete in
    itself; otherwise `data.tokenizer.path` is read; or `inherited` is used, the tokenizer of the model that a run
    starts from; or a vocabulary is trained on the held-in documents and remembered by corpus and settings. Words of
    `data.tokenizer.add` are added to all but the first.
    """
    source = sources.parse(data.source, invalid_utf8=data.invalid_utf8)
    share = 0.0 if data.valid_source else data.valid_fraction
    tokenizer = _vocabulary(
        data.tokenizer,
        tokenizer_directory,
        inherited,
        lambda: _trained_on(source, data.tokenizer, share, progress),
    )
    options = {"workers": data.workers, "progress": progress}
    if data.valid_source:
        train = store.build(source, tokenizer, valid_fraction=0.0, split="train", **options)
        held_out = sources.parse(data.valid_source, invalid_utf8=data.invalid_utf8)
        valid = store.build(held_out, tokenizer, valid_fraction=0.0, split="valid", **options)
        fingerprint = f"{train.corpus_fingerprint}+{valid.corpus_fingerprint}"
    else:
        train = valid = store.build(source, tokenizer, valid_fraction=share, **options)
        fingerprint = train.corpus_fingerprint
    meta = {
        "source": data.source,
        "valid_source": data.valid_source,
        "fingerprint": fingerprint,
        "licence": source.licence,
        "train": train.meta["splits"]["train"],
        "valid": valid.meta["splits"]["valid"],
        "replaced_utf8": train.meta.get("replaced_utf8", 0),
    }
    return Corpus(tokenizer, train.train, valid.valid, meta)


# -------------------------------------------------------------------------------------------------------------- tasks


def open_text(spec: str, tokenizer: Tokenizer, *, workers: int = 0, progress: bool = True) -> Corpus:
    """A corpus that is nothing but held-out text, for a model that is there. spec: see `sources.parse`."""
    source = sources.parse(spec)
    options = {"workers": workers, "progress": progress}
    text = store.build(source, tokenizer, valid_fraction=0.0, split="valid", **options).valid
    meta = {"source": spec, "valid_source": spec, "fingerprint": source.fingerprint, "licence": source.licence}
    return Corpus(tokenizer, text, text, meta)


def load_task(data) -> tasks.TaskData:
    """The task that `config.data.task` names."""
    given = {key: data.task[key] for key in ("files", *tasks.SETTINGS) if key != "name" and key in data.task}
    return tasks.load(data.task.name, **given)


def task_splits(
    config,
    task: tasks.TaskData,
    parts: Mapping[str, Sequence[Example]],
    tokenizer: Tokenizer,
    *,
    progress: bool = True,
) -> list[TaskSplit]:
    """The rows of parts of a task's examples, as the objectives of `config` want them, with the vectors of
    `data.task.vectors`, whose file is read once for all parts."""
    choose = config.objectives.get("choose", {})
    pairs = [config.objectives[o].pairs for o in ("classify", "regress") if o in config.objectives]
    settings = {
        "seq_len": config.seq_len,
        "pairs": pairs[0] if pairs else "joined",
        "choices": choose.get("choices", 0),
        **{key: config.data.task[key] for key in ("word_piece", "question", "stride")},
    }
    options = {"with_words": bool(config.data.task.vectors), "progress": progress}
    splits = [TaskSplit(task, name, examples, tokenizer, settings, **options) for name, examples in parts.items()]
    if path := config.data.task.vectors:
        tables = static_vectors.tables(path, [split.words for split in splits], f"data.task.vectors={path}")
        for split, table in zip(splits, tables, strict=True):
            split.vectors = table
    return splits


def open_task(
    config,
    *,
    tokenizer_directory: epath.Path | None = None,
    inherited: Tokenizer | None = None,
    progress: bool = True,
) -> Corpus:
    """The rows of the task of `config.data.task`; the arguments are those of `open_corpus`, but that no vocabulary is
    trained."""

    def none_to_train():
        raise UserError("a task needs a vocabulary: that of init.from, or data.tokenizer.path")

    tokenizer = with_task_tokens(_vocabulary(config.data.tokenizer, tokenizer_directory, inherited, none_to_train))
    task, settings = load_task(config.data), config.data.task
    (name, selection), _ = task.selection_and_report(settings.held_out_fraction)
    # Only the rows that are trained on are made: a thousandth of a large task is there in a second.
    parts = {"train": fraction(task.examples("train"), settings.fraction), name: selection}
    train, valid = task_splits(config, task, parts, tokenizer, progress=progress)
    meta = {
        "source": f"task:{task.name}",
        "valid_source": name,
        "fingerprint": task.fingerprint,
        "licence": None,
        "train": train.counts(),
        "valid": valid.counts(),
        "replaced_utf8": 0,
        "damaged_rows": sum(task.damaged.values()),
    }
    return Corpus(tokenizer, train, valid, meta, task)


def task_layout(config, split: TaskSplit, tokenizer: Tokenizer, *, batch_size: int, seed: int, mode: str) -> TaskRows:
    """The layout of a split, see `TaskRows`."""
    return TaskRows(
        split,
        tokenizer,
        seq_len=config.seq_len,
        batch_size=batch_size,
        seed=seed,
        settings=config.data.task,
        mode=mode,
    )
