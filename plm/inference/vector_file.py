"""Contextual vectors of a whole text file in one HDF5 or safetensors file, made in constant memory and resumable.

| dataset | type, shape | |
| --- | --- | --- |
| `layer_<k>`, or `vectors` (a mix) | float16 or float32 [units, features] | all units of the file in order |
| `sentences` | int64 [sentences + 1] | sentence i has the units from sentences[i] to sentences[i + 1] |
| `documents` | int64 [documents + 1] | document d has the sentences from documents[d] to documents[d + 1] |
| `lines` | int64 [sentences] | the line of the text, from 0, in which sentence i stands (blank ones are counted too) |
| `words` | int32 [units, 2] | where in its line the unit's word stands: characters [start, stop); -1 for the frame |
| `pieces` | int32 [units] | units=subwords only: ids of the vocabulary |

The settings stand beside them as JSON (HDF5: attribute `settings`; safetensors: metadata).

The work is cut into chunks of lines that depend on the text and the settings alone. What a chunk gives is appended to
plain files in `OUTPUT.partial/`, and only then a mark says how far the work is, so a process that is killed at any
moment loses one chunk, and what the next one writes is what it would have been without the interruption, bit for bit
on the same machine. In the end these files become the output in one pass: for a moment it takes twice its disk space.
"""

import dataclasses
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from plm.cache import locked
from plm.data import reading
from plm.errors import UserError
from plm.inference import embedding, lines
from plm.progress import Progress
from plm.training.metrics import write_atomically

VERSION = 1  # raise it whenever the same settings would give other numbers
DTYPES = ("float32", "float16")
SUFFIXES = (".h5", ".hdf5", ".safetensors")
CHUNK_FLOATS = 1 << 25  # of vectors held at once, about
BLOCK_BYTES = 1 << 24  # copied at once into the output
H5_CHUNK_BYTES = 1 << 18
_WORD = re.compile(r"\S+")


@dataclasses.dataclass(frozen=True)
class Job:
    """options: of `embedding`; chunk: characters of text between two marks, 0 to choose by memory."""

    options: embedding.Options
    dtype: str = "float32"
    stateful: bool = False
    chunk: int = 0

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.chunk < 0:
            raise UserError(f"chunk={self.chunk} must be a number of characters, or 0")

    def names(self) -> list[str]:
        return [f"layer_{k}" for k in self.options.layers] if self.options.mix == "none" else ["vectors"]

    def features(self, model) -> int:
        return model.n_features * (len(self.options.layers) if self.options.mix == "concat" else 1)

    def characters(self, model) -> int:
        """Of a chunk: four a unit, about."""
        floats = model.n_features * len(self.options.layers)
        return self.chunk or min(max(4 * CHUNK_FLOATS // floats, 1 << 14), 1 << 18)


def check_output(path: str) -> Path:
    """Errors: UserError for a name that says no format, or a folder that is not there or cannot be written."""
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise UserError(f"--output={path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not target.parent.is_dir():
        raise UserError(f"--output={path}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--output={path}: the folder {target.parent} cannot be written; check its permissions")
    return target


def write(model, job: Job, source: str, target: Path, *, say: Callable[[str], None]) -> bool:
    """Makes the file, or goes on making it; False if it is there already.

    Errors: UserError for a text that `lines.check` refuses, or when what is there was made with other settings.
    """
    facts = lines.check(source)
    settings = _settings(model, job, facts)
    if _is_there(target, settings):
        say(f"{target} is there already, from the same text and settings")
        return False
    folder = target.with_name(target.name + ".partial")
    folder.mkdir(exist_ok=True)
    with locked(folder / "making"):
        if _is_there(target, settings):
            return False
        began = time.monotonic()
        parts = _Parts(folder, settings, job, model)
        units, start = parts.mark["units"], parts.mark["start"]
        if start:
            say(f"going on at line {parts.mark['line'] + 1:,} of {source}")
        bar = Progress("embedding", facts.bytes - start, unit="B", enabled=True)
        for chunk in _chunks(source, parts.mark, job.characters(model)):
            parts.add(model, job, chunk)
            bar.add(parts.mark["start"] - start)
            start = parts.mark["start"]
        bar.close()
        made, seconds = parts.mark["units"] - units, time.monotonic() - began
        say(f"{made:,} {job.options.units} in {seconds:.1f} s, {made / max(seconds, 1e-9):,.0f} a second")
        _assemble(parts, settings, job.features(model), target)
        shutil.rmtree(folder)
    return True


def _settings(model, job: Job, facts: lines.Facts) -> dict:
    options = dataclasses.asdict(job.options)
    return json.loads(
        json.dumps(
            {
                "version": VERSION,
                "model": model.fingerprint,
                "text": facts.digest,
                **{key: value for key, value in options.items() if key != "several"},
                "dtype": job.dtype,
                "stateful": job.stateful,
                "chunk": job.characters(model),
            }
        )
    )


def _is_there(target: Path, settings: dict) -> bool:
    if not target.exists():
        return False
    _compare(target, read_settings(target), settings)
    return True


def _compare(path: Path, before: dict | None, now: dict) -> None:
    if before is None:
        raise UserError(f"{path} is there and was not made by plm.embed: give another --output, or remove it")
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            there, here = (json.dumps(one.get(key)) for one in (before, now))
            raise UserError(
                f"{path} is there from other settings ({key}: {there} there, {here} now): give another --output, or"
                " remove it"
            )


def read_settings(path: Path) -> dict | None:
    """The settings of a finished file, None for any other file."""
    try:
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size < 1 << 20 else {}
            return json.loads(header["__metadata__"]["settings"])
        import h5py

        with h5py.File(path, "r") as file:
            return json.loads(file.attrs["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ------------------------------------------------------------------------------------------------------------- chunks


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """documents: lists of lines with text; goes_on: whether the first one is the last one of the chunk before it;
    last: the last line of the chunk, blank or not."""

    documents: list[list[lines.Line]]
    goes_on: bool
    last: lines.Line


def _chunks(source: str, mark: dict, characters: int) -> Iterator[_Chunk]:
    documents: list[list[lines.Line]] = []
    inside = goes_on = mark["inside"]
    if inside:
        documents.append([])
    size, line = 0, None
    for line in lines.read(source, number=mark["line"], start=mark["start"]):
        if line.text:
            if not inside:
                documents.append([])
            documents[-1].append(line)
        inside = bool(line.text)
        size += len(line.text)
        if size >= characters:
            yield _Chunk(documents, goes_on, line)
            documents, goes_on, size, line = [[]] if inside else [], inside, 0, None
    if line is not None:
        yield _Chunk(documents, goes_on, line)


_COLUMNS = {"sentences": np.int64, "documents": np.int64, "lines": np.int64, "words": np.int32, "pieces": np.int32}


class _Parts:
    """The files of `OUTPUT.partial/` and the mark that says how much of each counts."""

    def __init__(self, folder: Path, settings: dict, job: Job, model):
        self.folder, self.job = folder, job
        self.columns = [name for name in _COLUMNS if name != "pieces" or job.options.units == "subwords"]
        path = folder / "settings.json"
        if path.exists():
            _compare(folder, json.loads(path.read_text()), settings)
        else:
            write_atomically(path, json.dumps(settings))
        self.mark = {"line": 0, "start": 0, "inside": False, "units": 0, "sentences": 0, "documents": 0, "carry": None}
        self.mark["bytes"] = dict.fromkeys([*job.names(), *self.columns], 0)
        if (folder / "mark.json").exists():
            self.mark = json.loads((folder / "mark.json").read_text())
        for name, size in self.mark["bytes"].items():
            # What was written behind the mark is written again.
            with open(self.path(name), "ab") as file:
                file.truncate(size)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def add(self, model, job: Job, chunk: _Chunk) -> None:
        """Embeds a chunk, appends what it gives and moves the mark."""
        mark = dict(self.mark)
        texts = [line.text for document in chunk.documents for line in document]
        found: list = [None] * len(texts)
        if job.stateful:
            carry = _carry(mark["carry"]) if chunk.goes_on else None
            documents = [[line.text for line in document] for document in chunk.documents]
            vectors, after = embedding.in_order(model, documents, job.options, carry)
        else:
            vectors = embedding.each(model, texts, job.options)
        for index, array in vectors:
            found[index] = array
        rows: dict[str, list] = {name: [] for name in self.mark["bytes"]}
        names = job.names()
        for array in found:
            for name, layer in zip(names, array if job.options.several else [array], strict=True):
                rows[name].append(_narrow(layer, job.dtype))
        self._count(model, chunk, found, rows, mark)
        for name, arrays in rows.items():
            with open(self.path(name), "ab") as file:
                for array in arrays:
                    file.write(np.ascontiguousarray(array).data)
                file.flush()
                os.fsync(file.fileno())
                mark["bytes"] = mark["bytes"] | {name: file.tell()}
        mark |= {"line": chunk.last.number + 1, "start": chunk.last.stop, "inside": bool(chunk.last.text)}
        mark["carry"] = None
        if job.stateful and mark["inside"]:
            mark["carry"] = {tower: {k: v.tolist() for k, v in state.items()} for tower, state in after().items()}
        write_atomically(self.folder / "mark.json", json.dumps(mark))
        self.mark = mark

    def _count(self, model, chunk: _Chunk, found: list, rows: dict, mark: dict) -> None:
        """The columns beside the vectors."""
        before, after = map(len, model.frame) if self.job.options.specials else (0, 0)
        flat = [line for document in chunk.documents for line in document]
        tokens = None
        if self.job.options.units == "subwords":
            tokens = reading.tokenize(model.tokenizer, [line.text for line in flat])
        for index, line in enumerate(flat):
            spans = np.array([word.span() for word in _WORD.finditer(line.text)], np.int32).reshape(-1, 2)
            spans = spans if tokens is None else spans[tokens[index].word]
            rows["words"].append(np.pad(spans, ((before, after), (0, 0)), constant_values=-1))
            if tokens is not None:
                rows["pieces"].append(np.array([*model.frame[0][:before], *tokens[index].ids, *model.frame[1][:after]]))
                rows["pieces"][-1] = rows["pieces"][-1].astype(np.int32)
            n = found[index].shape[-2]
            if len(rows["words"][-1]) != n:
                raise RuntimeError(f"line {line.number + 1}: {n} vectors for {len(rows['words'][-1])} units")
            rows["sentences"].append(np.array([mark["units"]], np.int64))
            rows["lines"].append(np.array([line.number], np.int64))
            mark["units"] += n
        for number, document in enumerate(chunk.documents):
            if number or not chunk.goes_on:
                rows["documents"].append(np.array([mark["sentences"]], np.int64))
                mark["documents"] += 1
            mark["sentences"] += len(document)

    def arrays(self, features: int) -> dict[str, tuple[np.dtype, tuple[int, ...], np.ndarray]]:
        """{name: (type, shape of a file's rows, rows that come behind them)}."""
        mark = self.mark
        shapes = {"sentences": (mark["sentences"],), "documents": (mark["documents"],), "lines": (mark["sentences"],)}
        shapes |= {"words": (mark["units"], 2), "pieces": (mark["units"],)}
        result = {name: (np.dtype(self.job.dtype), (mark["units"], features), ()) for name in self.job.names()}
        ends = {"sentences": (mark["units"],), "documents": (mark["sentences"],)}
        return result | {name: (np.dtype(_COLUMNS[name]), shapes[name], ends.get(name, ())) for name in self.columns}


def _narrow(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if dtype == "float16" and not np.isfinite(narrow).all():
        raise UserError("a vector has numbers beyond 65,504, which float16 cannot hold: --dtype=float32 would be right")
    return narrow


def _carry(saved: dict) -> dict:
    return {tower: {k: np.array(v, np.float32) for k, v in state.items()} for tower, state in saved.items()}


# ---------------------------------------------------------------------------------------------------------- the output


def _blocks(parts: _Parts, name: str, dtype: np.dtype, shape: tuple[int, ...], end) -> Iterator[np.ndarray]:
    """The rows of one array, a few megabytes at a time."""
    row = int(np.prod(shape[1:], dtype=np.int64))
    step = max(BLOCK_BYTES // (row * dtype.itemsize), 1) * row
    with open(parts.path(name), "rb") as file:
        while (block := np.fromfile(file, dtype, step)).size:
            yield block.reshape(-1, *shape[1:])
    if len(end):
        yield np.array(end, dtype)


def _assemble(parts: _Parts, settings: dict, features: int, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    arrays = parts.arrays(features)
    try:
        if target.suffix == ".safetensors":
            _write_safetensors(parts, arrays, settings, temporary)
        else:
            _write_hdf5(parts, arrays, settings, temporary)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error


def _write_hdf5(parts: _Parts, arrays: dict, settings: dict, path: Path) -> None:
    import h5py

    with h5py.File(path, "w", libver="v110") as file:
        file.attrs["settings"] = json.dumps(settings)
        for name, (dtype, (n, *rest), end) in arrays.items():
            shape = (n + len(end), *rest)
            row = max(int(np.prod(rest, dtype=np.int64)) * dtype.itemsize, 1)
            chunks = (min(max(H5_CHUNK_BYTES // row, 1), max(shape[0], 1)), *rest)
            data = file.create_dataset(name, shape, dtype, chunks=chunks)
            at = 0
            for block in _blocks(parts, name, dtype, (n, *rest), end):
                data[at : at + len(block)] = block
                at += len(block)


def _write_safetensors(parts: _Parts, arrays: dict, settings: dict, path: Path) -> None:
    """The library writes from memory only; the format is a JSON header and the arrays behind each other."""
    header: dict = {"__metadata__": {"settings": json.dumps(settings)}}
    at = 0
    for name, (dtype, (n, *rest), end) in arrays.items():
        shape = [n + len(end), *rest]
        stop = at + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        kind = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32"}[dtype.name]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    little = sys.byteorder == "little"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape, end) in arrays.items():
            for block in _blocks(parts, name, dtype, shape, end):
                file.write((block if little else block.byteswap()).data)
