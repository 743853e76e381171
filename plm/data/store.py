"""The token store: a corpus tokenised once into memory-mapped arrays, with sentence and document borders.

`build` tokenises the shards of a source in parallel (spawned processes), each into a part of its own that gets its
name by a rename only when it is complete, then joins the parts in the source's order and renames the finished folder. A
build that is killed therefore goes on where it stopped, a second process waits for the first, and nobody ever reads
half a store. Stores lie under `cache_directory()/stores`, named by a fingerprint of the source's content, the
tokenizer, the split and VERSION, and are found again by the next run.

Memory does not grow with the corpus: a process holds one document, a batch of `BATCH_CHARACTERS` and at most
`MAX_OPEN_WORDS` distinct words outside the vocabulary; joining copies chunk by chunk. Measured (Linux, Python 3.11, two
worker processes on two cores that were busy otherwise):

| text | tokenizer | time | speed | peak resident, a worker | parent, above what it had | store |
| --- | --- | --- | --- | --- | --- | --- |
| 1.03 GB | wordpiece, 8,192 | 562 s | 1.84 MB/s | 71 MB (46 MB its own) | 32 MB | 596 MB |
| 0.26 GB | words, 20,000 | 112 s | 2.31 MB/s | 79 MB (55 MB its own) | 31 MB | 339 MB |

While it is built a store needs the disk twice; the parts hold 4 bytes a token.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import functools
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from plm.cache import cache_directory, locked, writable
from plm.data import sources
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.progress import Progress
from plm.randomness import stable_hash

VERSION = 1  # raise it whenever the same text and tokenizer would give other arrays
SPLITS = ("train", "valid")
BATCH_CHARACTERS = 1 << 18
MAX_OPEN_WORDS = 1 << 17
COPY_ELEMENTS = 1 << 21
COUNTS = (
    "documents",
    "sentences",
    "tokens",
    "bytes",
    "words",
    "unknown",
    "extra_words",
    "empty_sentences",
    "empty_documents",
)
_PART_FILES = {
    "tokens": np.uint32,
    "sentence_lengths": np.uint32,
    "document_lengths": np.uint32,
    "extra_characters": np.uint16,
}


class Spelled:
    """ids -> ELMo's characters, of a vocabulary and of words outside it, which have ids from its size on.

    extra_characters: uint16 [words, 50], of those words.
    """

    tokenizer: Tokenizer
    extra_characters: np.ndarray

    @functools.cached_property
    def _vocabulary_rows(self) -> np.ndarray:
        return np.ascontiguousarray(self.tokenizer.character_rows(), dtype=np.uint16)

    def character_rows(self, ids: np.ndarray) -> np.ndarray:
        """uint16 [..., 50]: raw byte ids (0..260) of vocabulary entries and extra words alike."""
        size = self.tokenizer.size
        rows = np.take(self._vocabulary_rows, np.minimum(ids, size - 1), axis=0)
        extra = ids >= size
        if extra.any():
            rows[extra] = self.extra_characters[ids[extra] - size]
        return rows


class Split(Spelled):
    """One part of a store, `train` or `valid`; the arrays are memory-mapped and read-only.

    tokens: uint16 or uint32 [n_tokens], bare ids without any special token. Ids from `tokenizer.size` on are words
        outside the vocabulary (kind "words" only): id size + k is row k of the split's own extra words.
    sentence_offsets: int64 [n_sentences + 1], in tokens; document_offsets: int64 [n_documents + 1], in sentences.
        No sentence and no document is empty.
    n_bytes: bytes of text = UTF-8 bytes of every sentence and one for the space or line break before it, and one for
        the end of every document; a lossless tokenizer's `byte_lengths` add up to it.
    n_words: words between white space. n_unknown: tokens outside the vocabulary.
    """

    def __init__(self, directory: Path, counts: dict, tokenizer):
        self.directory, self.name, self.counts, self.tokenizer = directory, directory.name, counts, tokenizer
        self.tokens = self._load("tokens", counts["tokens"])
        self.sentence_offsets = self._load("sentence_offsets", counts["sentences"] + 1)
        self.document_offsets = self._load("document_offsets", counts["documents"] + 1)
        self.extra_characters = self._load("extra_characters", counts["extra_words"])
        for name in ("tokens", "sentences", "documents", "bytes", "words", "unknown"):
            setattr(self, f"n_{name}", counts[name])

    def _load(self, name: str, rows: int) -> np.ndarray:
        array = np.load(self.directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if len(array) != rows:
            raise ValueError(f"{self.directory / name}.npy has {len(array)} rows, not {rows}")
        return array


class Store:
    """A finished store. train, valid: Split; directory: Path; fingerprint: of source, tokenizer and split;
    corpus_fingerprint: the same without the tokenizer; meta: a dict for run.json."""

    def __init__(self, directory: Path, tokenizer):
        self.directory = Path(directory)
        self.meta = json.loads((self.directory / "meta.json").read_text("utf-8"))
        self.fingerprint, self.corpus_fingerprint = self.meta["fingerprint"], self.meta["corpus_fingerprint"]
        self.train, self.valid = (Split(self.directory / name, self.meta["splits"][name], tokenizer) for name in SPLITS)


def build(
    source,
    tokenizer,
    *,
    valid_fraction: float,
    split: str | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Store:
    """The store of a source, built if it is not there yet.

    source: a Source or its spec. valid_fraction: share of documents held out, chosen by a hash of each document's text.
    split: "train" or "valid" puts every document there instead (a corpus with held-out text of its own is two stores).
    workers: processes, 0 = all cores. progress: a bar on stderr, plain lines where it is no terminal.

    Errors: UserError for a corpus without text, a fraction outside [0, 1) and a cache that cannot be written.
    """
    if isinstance(source, str):
        source = sources.parse(source)
    if split not in (None, *SPLITS):
        raise ValueError(f"split must be None or one of {SPLITS}, not {split!r}")
    if split is None and not 0 <= valid_fraction < 1:
        raise UserError(f"data.valid_fraction={valid_fraction} must be at least 0 and below 1")
    if workers < 0:
        raise UserError(f"data.workers={workers} must be a number of processes, or 0 for all cores")
    how = f"all in {split}" if split else float(valid_fraction)
    corpus_fingerprint = _hex(source.fingerprint, how)
    fingerprint = _hex(source.fingerprint, tokenizer.fingerprint, how, VERSION)
    directory = cache_directory() / "stores" / fingerprint
    temporary = directory.with_name(fingerprint + ".building")
    with writable(directory.parent):
        store = _open(directory, tokenizer)
        if store is not None:
            _sweep(temporary, directory)
            return store
    with writable(directory.parent), locked(directory):
        store = _open(directory, tokenizer)
        if store is not None:
            return store
        shutil.rmtree(directory, ignore_errors=True)
        counts = _make_parts(source, tokenizer, valid_fraction, split, temporary / "parts", workers, progress)
        if not sum(counts[name]["tokens"] for name in SPLITS):
            raise UserError(f"data.source={source.spec!r} holds no text: name files that do")
        finished = temporary / "finished"
        shutil.rmtree(finished, ignore_errors=True)
        for name in SPLITS:
            _join(temporary / "parts", finished / name, name, counts[name], tokenizer.size)
        meta = {
            "source": source.spec,
            "licence": getattr(source, "licence", None),
            "source_fingerprint": source.fingerprint,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "tokenizer_kind": tokenizer.kind,
            "corpus_fingerprint": corpus_fingerprint,
            "fingerprint": fingerprint,
            "split": how,
            "version": VERSION,
            "replaced_utf8": getattr(source, "replaced", 0),
            "splits": counts,
        }
        (finished / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
        finished.rename(directory)
        shutil.rmtree(temporary, ignore_errors=True)
    return Store(directory, tokenizer)


def _hex(*parts) -> str:
    return f"{stable_hash(*parts, bits=128):032x}"


def _sweep(temporary: Path, directory: Path) -> None:
    """Removes what a build left that was killed behind its last rename; a cache that can only be read keeps it."""
    if temporary.is_dir():
        with contextlib.suppress(OSError, UserError), locked(directory):
            if (directory / "meta.json").is_file():  # else it is of a build that goes on
                shutil.rmtree(temporary, ignore_errors=True)


def _open(directory: Path, tokenizer) -> Store | None:
    if not (directory / "meta.json").is_file():
        return None
    try:
        return Store(directory, tokenizer)
    except (OSError, ValueError, KeyError) as error:
        print(f"store {directory} is damaged ({error}): building it again", file=sys.stderr, flush=True)
        return None


# Files


class NpyWriter:
    """A .npy file of unknown length, written by appending: the header is filled in at the end."""

    HEADER = 128

    def __init__(self, path: Path, dtype, row_shape: tuple[int, ...] = ()):
        self.dtype, self.row_shape, self.rows = np.dtype(dtype), row_shape, 0
        self.file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self.file.write(b" " * self.HEADER)

    def append(self, rows: np.ndarray) -> None:
        self.rows += len(rows)
        self.file.write(np.ascontiguousarray(rows, self.dtype).data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shape = (self.rows, *self.row_shape)
        text = repr({"descr": self.dtype.str, "fortran_order": False, "shape": shape}).encode("latin1")
        start = b"\x93NUMPY\x01\x00" + (self.HEADER - 10).to_bytes(2, "little")
        self.file.seek(0)
        self.file.write(start + text.ljust(self.HEADER - 11) + b"\n")
        self.file.close()


# Tokenising: a part for each shard


def _make_parts(source, tokenizer, valid_fraction, split, folder: Path, workers: int, progress: bool) -> dict:
    """Tokenises the shards that have no part yet; {split: {count: int}} of all parts."""
    shards = source.shards()
    plan = folder / "shards.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not plan.is_file() or json.loads(plan.read_text()) != len(shards):
        shutil.rmtree(folder)
        folder.mkdir()
        plan.write_text(json.dumps(len(shards)))
    for left in folder.glob("*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    sizes = [_size(shard) for shard in shards]
    todo = [i for i in range(len(shards)) if not (folder / str(i)).is_dir()]
    todo.sort(key=lambda i: -sizes[i])
    bar = Progress("tokenising", sum(sizes), unit="B", enabled=progress)
    bar.add(sum(sizes) - sum(sizes[i] for i in todo))
    cores = workers or _cores()
    common = (tokenizer, valid_fraction, split, folder)
    try:
        if min(cores, len(todo)) <= 1:
            for i in todo:
                _make_part(i, shards[i], *common, bar.add)
        else:
            _make_parts_in_processes([(i, shards[i]) for i in todo], common, cores, bar)
    finally:
        bar.close()
    done = [json.loads((folder / str(i) / "done.json").read_text()) for i in range(len(shards))]
    return {name: {count: sum(part[name][count] for part in done) for count in COUNTS} for name in SPLITS}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(shard) -> int:
    return int(getattr(shard, "bytes", 0))


def _make_parts_in_processes(jobs: list, common: tuple, cores: int, bar: Progress) -> None:
    context = multiprocessing.get_context("spawn")
    done_bytes, stop = context.Queue(), context.Event()
    processes = min(cores, len(jobs))
    pool = concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=context,
        initializer=_start_worker,
        initargs=(common, done_bytes, stop, cores // processes),
    )
    try:
        waiting = {pool.submit(_work, i, shard) for i, shard in jobs}
        while waiting:
            finished, waiting = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
            with contextlib.suppress(queue.Empty):
                while True:
                    bar.add(done_bytes.get_nowait())
            for future in finished:
                future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            f"one of the {processes} processes that tokenise was ended from outside (what it printed stands above; out"
            " of memory is likely otherwise: data.workers=1 needs the least); what is done is kept, start again"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_worker: dict = {}


def _start_worker(common: tuple, done_bytes, stop, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, by `stop`
    # One process is one core's worth of work, unless there are fewer shards than cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)

    def report(n: int) -> None:
        done_bytes.put(n)
        if stop.is_set():
            raise RuntimeError("another shard failed")

    _worker["common"], _worker["report"] = common, report

    def leave_with_parent():
        # A killed parent must not leave workers that wait for its next job for ever.
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(index: int, shard) -> None:
    _make_part(index, shard, *_worker["common"], _worker["report"])


def _make_part(index: int, shard, tokenizer, valid_fraction, split, folder: Path, report) -> None:
    """Tokenises one shard into `folder/index`, which appears only when it is complete."""
    temporary = folder / f"{index}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    reported, size = 0, _size(shard)
    with contextlib.ExitStack() as stack:
        parts = {name: stack.enter_context(_Part(temporary / name, tokenizer)) for name in SPLITS}
        for document in shard.documents():
            parts[split or sources.split_of(document, valid_fraction)].add(document.sentences)
            read = min(sum(part.counts["bytes"] for part in parts.values()), size)
            if read > reported:
                report(read - reported)
                reported = read
        for part in parts.values():
            part.flush()
    report(size - reported)
    done = {name: part.counts for name, part in parts.items()}
    (temporary / "done.json").write_text(json.dumps(done))
    temporary.rename(folder / str(index))


class _Part:
    """The raw arrays of one shard and split; ids of words outside the vocabulary count from `size` within the part."""

    def __init__(self, folder: Path, tokenizer):
        folder.mkdir(parents=True)
        self.tokenizer, self.unknown_id = tokenizer, tokenizer.roles.get("unk", -1)
        self.files = {name: open(folder / name, "wb") for name in _PART_FILES}  # noqa: SIM115 (closed by __exit__)
        self.counts = dict.fromkeys(COUNTS, 0)
        self.documents: list[tuple[str, ...]] = []
        self.characters = 0
        self.open_words: dict[str, int] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self.files.values():
            file.close()

    def add(self, sentences: tuple[str, ...]) -> None:
        self.documents.append(sentences)
        self.characters += sum(map(len, sentences))
        if self.characters >= BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Encodes and writes what has been added."""
        if not self.documents:
            return
        sentences = itertools.chain.from_iterable(self.documents)
        lengths = np.concatenate([np.empty(0, np.int64), *map(self._encode, _batches(sentences))])
        kept = lengths > 0
        border = np.cumsum([0] + [len(document) for document in self.documents])
        document_lengths = np.diff(np.concatenate([[0], np.cumsum(kept)])[border])
        self._write("sentence_lengths", lengths[kept])
        self._write("document_lengths", document_lengths[document_lengths > 0])
        documents = int((document_lengths > 0).sum())
        self.counts["documents"] += documents
        self.counts["bytes"] += documents
        self.counts["sentences"] += int(kept.sum())
        self.counts["empty_sentences"] += int((~kept).sum())
        self.counts["empty_documents"] += len(self.documents) - documents
        self.documents, self.characters = [], 0

    def _encode(self, sentences: list[str]) -> np.ndarray:
        """Writes the sentences' ids; their lengths int64 [n]."""
        encoded, new_words = self.tokenizer.encode_open(sentences)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int64, int(lengths.sum()))
        size, counts = self.tokenizer.size, self.counts
        if new_words:
            outside = ids >= size
            ids[outside] = size + self._number(new_words)[ids[outside] - size]
            counts["unknown"] += int(outside.sum())
        counts["unknown"] += int((ids == self.unknown_id).sum())
        counts["tokens"] += len(ids)
        for sentence, length in zip(sentences, lengths.tolist(), strict=True):
            if length:
                counts["bytes"] += len(sentence.encode("utf-8")) + 1
                counts["words"] += len(sentence.split())
        self._write("tokens", ids)
        return lengths

    def _number(self, words: list[str]) -> np.ndarray:
        """Numbers of words outside the vocabulary within this part; a full table is forgotten, its words come again."""
        if len(self.open_words) >= MAX_OPEN_WORDS:
            self.open_words = {}
        first = self.counts["extra_words"]
        fresh = [word for word in words if word not in self.open_words]
        self.open_words.update(zip(fresh, range(first, first + len(fresh)), strict=True))
        self.counts["extra_words"] += len(fresh)
        if fresh:
            self._write("extra_characters", self.tokenizer.character_rows(fresh))
        return np.fromiter(map(self.open_words.__getitem__, words), np.int64, len(words))

    def _write(self, name: str, array: np.ndarray) -> None:
        self.files[name].write(np.ascontiguousarray(array, _PART_FILES[name]).data)


def _batches(sentences: Iterator[str]) -> Iterator[list[str]]:
    """Lists of sentences of about BATCH_CHARACTERS together."""
    batch: list[str] = []
    characters = 0
    for sentence in sentences:
        batch.append(sentence)
        characters += len(sentence)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# Joining the parts


def _join(parts: Path, target: Path, split: str, counts: dict, size: int) -> None:
    """Parts -> the arrays of one split, in the order of the shards, chunk by chunk."""
    target.mkdir(parents=True)
    folders = [parts / str(i) / split for i in range(json.loads((parts / "shards.json").read_text()))]
    small = size + counts["extra_words"] <= 1 << 16
    with NpyWriter(target / "tokens.npy", np.uint16 if small else np.uint32) as tokens:
        renumber = 0
        for folder in folders:
            for chunk in _chunks(folder, "tokens"):
                if renumber:
                    chunk[chunk >= size] += np.uint32(renumber)
                tokens.append(chunk)
            renumber += (folder / "extra_characters").stat().st_size // (50 * 2)
    for lengths, offsets in (("sentence_lengths", "sentence_offsets"), ("document_lengths", "document_offsets")):
        with NpyWriter(target / f"{offsets}.npy", np.int64) as writer:
            total = 0
            writer.append(np.zeros(1, np.int64))
            for folder in folders:
                for chunk in _chunks(folder, lengths):
                    ends = total + np.cumsum(chunk, dtype=np.int64)
                    total = int(ends[-1])
                    writer.append(ends)
    with NpyWriter(target / "extra_characters.npy", np.uint16, (50,)) as writer:
        for folder in folders:
            for chunk in _chunks(folder, "extra_characters"):
                writer.append(chunk.reshape(-1, 50))


def _chunks(folder: Path, name: str) -> Iterator[np.ndarray]:
    dtype = np.dtype(_PART_FILES[name])
    count = COPY_ELEMENTS // 50 * 50  # whole rows of characters
    with open(folder / name, "rb") as file:
        while len(chunk := np.fromfile(file, dtype, count)):
            yield chunk
