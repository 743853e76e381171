"""Layouts: batches of running text for pretraining as a function of (seed, step).

| layout | rows | after |
| --- | --- | --- |
| `blocks` | contiguous blocks of the document stream | GPT (section 4.1) |
| `lanes` | row i of a batch continues row i of the batch before, forward and backward | ELMo's official training |
| `pairs` | `[CLS] A [SEP] B [SEP]`, B what follows or from another document | BERT (appendix A.2, official code) |
| `module:function` | called with the arguments of `make_layout` | |

A layout has `rows(step, rows)` (a dict of arrays, int32 unless said, first axis len(rows); every slice of a batch is
the same whatever process asks for it), `examples_per_epoch`, `report` (counts, with whatever never fits), for mode
"eval" `steps`, where rows are not always T long `batches_by_width` ({length: batches of an epoch}), and where an epoch
is not one pass over the text `examples_per_pass`, the rows that have as many tokens as it. T = seq_len:

| key | shape | meaning |
| --- | --- | --- |
| tokens | [n, T] | inputs, ids of an open vocabulary; padding is the pad role, 0 where the tokenizer has none |
| next_tokens | [n, T] | what follows each input in its stream; -1 where nothing does |
| tokens_backward, next_tokens_backward | [n, T] | lanes only: the backward stream in its reading order |
| length | [n] | valid positions |
| example | int64 [n] | the same text window or pair has the same id in every epoch |
| special | bool [n, T] | positions that masking may not choose |
| segments | [n, T] | pairs only: 0 in `[CLS] A [SEP]`, 1 in `B [SEP]` |
| next_sentence_labels | [n] | pairs only: 0 = B follows A, 1 = B is random |

Training goes round and round: example number step x batch_size + row is looked up in a random-access permutation, a new
one each epoch, so epochs run on inside a batch and no partial batch is dropped. Evaluation is one fixed pass in which
every (input, target) pair occurs exactly once; positions and rows that only pad have next_tokens -1, special True and,
as rows, length 0.
"""

import functools
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from plm.cache import once
from plm.data.store import NpyWriter, Split
from plm.errors import UserError
from plm.progress import Progress
from plm.randomness import generator, stable_hash

SETTINGS = {
    "blocks": {},
    "lanes": {"backward": "independent", "block_windows": 64},
    "pairs": {"short_sequence_probability": 0.1, "duplicates": 10},
}
PAIRS_VERSION = 1  # raise it whenever the same settings and seed would plan other pairs


def make_layout(
    name: str,
    split: Split,
    tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    settings=None,
    mode: str = "train",
):
    """The layout called `name` over a split of a store; settings: the mapping data.<name> of the config.

    Errors: UserError for an unknown name or setting, a value out of range, a split too small for one example, a
    tokenizer without the layout's special tokens.
    """
    if mode not in ("train", "eval"):
        raise ValueError(f"mode must be 'train' or 'eval', not {mode!r}")
    given = dict(settings or {})
    arguments = {"seq_len": seq_len, "batch_size": batch_size, "seed": seed, "mode": mode}
    if ":" in name:
        module, _, function = name.partition(":")
        try:
            made = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UserError(f"data.layout={name!r} cannot be loaded ({error})") from error
        return made(split, tokenizer, settings=given, **arguments)
    if name not in LAYOUTS:
        raise UserError(f"data.layout={name!r} must be one of {', '.join(LAYOUTS)} or module:function")
    for key in given.keys() - SETTINGS[name].keys():
        raise UserError(f"data.{name}.{key} is no setting of this layout: {', '.join(SETTINGS[name]) or 'it has none'}")
    if batch_size < 1 or seq_len < 1:
        raise UserError(f"batch_size={batch_size} and seq_len={seq_len} must be at least 1")
    if not split.n_tokens:
        raise UserError(
            f"the {split.name} split is empty: use more documents, another data.valid_fraction or data.valid_source"
        )
    return LAYOUTS[name](split, tokenizer, settings=SETTINGS[name] | given, **arguments)


# Epochs


class _Epochs:
    """Example number, counted through all epochs, -> its place in an epoch's own permutation of range(n)."""

    def __init__(self, n: int, *name):
        import grain  # not at the top: it loads jax, which processes that only tokenise do not need

        self.n = n
        self._shuffled = grain.MapDataset.range(n).shuffle(seed=stable_hash(*name))

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        return np.fromiter(map(self._shuffled.__getitem__, numbers.tolist()), np.int64, len(numbers))


def _offsets(epochs: np.ndarray, slack: int, *name) -> np.ndarray:
    """A random number in 0..slack for each epoch, int64, one for every element of `epochs`."""
    distinct, inverse = np.unique(epochs, return_inverse=True)
    drawn = [generator(*name, "offset", epoch).integers(slack + 1) for epoch in distinct.tolist()]
    return np.array(drawn, np.int64)[inverse]


# The stream


class _Stream:
    """The corpus as one sequence of (input, target) pairs, read at any place.

    Tokenizers with `bos` and `eos` (ELMo): each sentence gives `<S> w1 .. wn` -> `w1 .. wn </S>`, so `</S>` is only
    ever a target and `<S>` only ever an input; the backward LM reads the same pairs from the end, with input and target
    exchanged. Other tokenizers: all tokens with `eod`, if there is one, after each document; each symbol's target is
    the next one, and the very first symbol is nobody's target.
    """

    def __init__(self, split: Split, tokenizer, *, sentences: bool):
        self.split, roles = split, tokenizer.roles
        self.pad = roles.get("pad", 0)
        if sentences and "bos" in roles and "eos" in roles:
            self.marker, self.end = roles["bos"], roles["eos"]
            self.n_markers = split.n_sentences
            # Marker k stands before sentence k; one more stands at the end of the stream.
            self._place = lambda k: split.sentence_offsets[k] + k
            self.size = split.n_tokens + self.n_markers
        else:
            self.marker, self.end = roles.get("eod", -1), None
            self.n_markers = split.n_documents if "eod" in roles else 0
            self._place = lambda k: split.sentence_offsets[split.document_offsets[k + 1]] + k
            self.size = split.n_tokens + self.n_markers - 1
        self.known = tokenizer.size
        self.is_special = np.zeros(tokenizer.size, bool)
        self.is_special[np.asarray(tokenizer.special_ids, np.int64)] = True

    def _markers_before(self, places: np.ndarray) -> np.ndarray:
        """Number of markers at stream places < each of `places`: a binary search in the arrays on disk."""
        low, high = np.zeros_like(places), np.full_like(places, self.n_markers)
        for _ in range(self.n_markers.bit_length()):
            middle = (low + high) // 2
            open_ = low < high
            before = open_ & (self._place(np.minimum(middle, self.n_markers - 1)) < places)
            low, high = np.where(before, middle + 1, low), np.where(open_ & ~before, middle, high)
        return low

    def at(self, starts: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), int64 [n, width], of the pairs from each start on; past the end there is rubbish.

        The two may share memory.
        """
        n = len(starts)
        first, last = np.split(self._markers_before(np.concatenate([starts, starts + width + 1])), 2)
        is_marker = np.zeros((n, width + 1), bool)
        counts = last - first
        row = np.repeat(np.arange(n), counts)
        marker = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        if len(row):
            is_marker[row, self._place(marker) - starts[row]] = True
        passed = np.cumsum(is_marker, axis=1) - is_marker + first[:, None]
        index = starts[:, None] + np.arange(width + 1) - passed
        symbols = self.split.tokens[np.clip(index, 0, self.split.n_tokens - 1)].astype(np.int64)
        symbols[is_marker] = self.marker
        targets = symbols[:, 1:]
        if self.end is not None:
            at_end = starts[:, None] + np.arange(1, width + 1) == self.size
            targets = np.where(is_marker[:, 1:] | at_end, self.end, targets)
        return symbols[:, :-1], targets

    def special(self, tokens: np.ndarray) -> np.ndarray:
        """bool, of the shape of `tokens`: special tokens (words outside the vocabulary are none)."""
        return self.is_special[np.minimum(tokens, self.known - 1)] & (tokens < self.known)


class _Layout:
    """What the layouts share: the sizes, and the check of the range that is asked for."""

    steps: int | None = None

    def __init__(self, split, tokenizer, *, seq_len, batch_size, seed, settings, mode):
        self.split, self.tokenizer, self.settings = split, tokenizer, settings
        self.seq_len, self.batch_size, self.seed, self.training = seq_len, batch_size, seed, mode == "train"

    def _numbers(self, step: int, rows: range) -> np.ndarray:
        """Batch rows asked for, int64 [n]."""
        if rows.step != 1 or rows.start < 0 or rows.stop > self.batch_size:
            raise ValueError(f"rows must be consecutive within 0..{self.batch_size}, not {rows}")
        if step < 0 or (self.steps is not None and step >= self.steps):
            raise ValueError(f"step {step} is outside the pass of {self.steps} steps")
        return np.arange(rows.start, rows.stop, dtype=np.int64)

    def _windows(self, stream: _Stream, starts: np.ndarray, lengths: np.ndarray) -> dict:
        """Rows of a stream: `lengths` valid pairs from `starts` on."""
        tokens, targets = (array.astype(np.int32) for array in stream.at(starts, self.seq_len))
        padding = np.arange(self.seq_len) >= lengths[:, None]
        tokens[padding], targets[padding] = stream.pad, -1
        return {
            "tokens": tokens,
            "next_tokens": targets,
            "length": lengths.astype(np.int32),
            "example": starts,
            "special": stream.special(tokens) | padding,
        }

    def _too_short(self, stream: _Stream) -> UserError:
        return UserError(
            f"the {self.split.name} split has {self.split.n_tokens} tokens, too few for one sequence of"
            f" seq_len={self.seq_len} and its targets: use a longer text or a shorter seq_len"
        )


class Blocks(_Layout):
    """Contiguous blocks of seq_len symbols of the document stream, in a new random order each epoch.

    Each epoch also cuts the stream at a new random offset (0..seq_len - 1 unless the corpus is shorter than two
    blocks), so fewer than 2 x seq_len symbols, other ones each time, are left out (`report["tail_tokens"]`).
    Evaluation cuts at 0 and pads the last block.
    """

    def __init__(self, split, tokenizer, **arguments):
        super().__init__(split, tokenizer, **arguments)
        self.stream = stream = _Stream(split, tokenizer, sentences=False)
        T, size = self.seq_len, stream.size
        if size < (T if self.training else 1):
            raise self._too_short(stream)
        if self.training:
            self.examples_per_epoch = max(1, (size - T + 1) // T)
            tail = size - self.examples_per_epoch * T
            self.slack = min(T - 1, tail)
            self.order = _Epochs(self.examples_per_epoch, self.seed, "blocks")
        else:
            self.examples_per_epoch, tail = math.ceil(size / T), 0
            self.steps = math.ceil(self.examples_per_epoch / self.batch_size)
        self.report = {
            "layout": "blocks",
            "examples_per_epoch": self.examples_per_epoch,
            "stream_symbols": size + 1,
            "tail_tokens": tail,
            "never_targets": 1,
        }

    def rows(self, step: int, rows: range) -> dict:
        numbers = self._numbers(step, rows) + step * self.batch_size
        if self.training:
            epochs, blocks = numbers // self.examples_per_epoch, self.order(numbers)
            starts = blocks * self.seq_len + _offsets(epochs, self.slack, self.seed, "blocks")
        else:
            starts = numbers * self.seq_len
        return self._windows(self.stream, starts, np.clip(self.stream.size - starts, 0, self.seq_len))


class Lanes(_Layout):
    """Row i of a batch reads on where row i of the batch before stopped.

    A lane walks whole runs of `block_windows` windows of seq_len pairs, taken from a random permutation of all runs, a
    new one each epoch; from run to run it jumps, as the official code's lanes do from sentence to shuffled sentence.
    Runs are cut shorter where the corpus would not give every row a run of its own (`report["block_windows"]`). A
    random offset, new each epoch, moves the cuts; what an epoch leaves out is `report["tail_tokens"]`.

    backward = "independent": the backward stream is the mirror image of the whole forward stream, so its carried state
        has read the text that follows, and it walks a permutation of its own: the two directions see different
        sentences at one step, as in the official code. (The official stream turns each sentence round and keeps their
        order, which is the same thing on its shuffled sentences.)
    backward = "shared": the backward LM reads the very window that the forward LM reads, from its end; the window after
        it comes at the next step, so the carried backward state has read earlier text, not what follows.

    Evaluation cuts the stream into batch_size equal lanes, in order, the backward ones in its mirror image
    unless shared.
    """

    def __init__(self, split, tokenizer, **arguments):
        super().__init__(split, tokenizer, **arguments)
        self.shared, windows = self.settings["backward"] == "shared", self.settings["block_windows"]
        if self.settings["backward"] not in ("independent", "shared"):
            raise UserError(f"data.lanes.backward={self.settings['backward']!r} must be 'independent' or 'shared'")
        if windows < 1:
            raise UserError(f"data.lanes.block_windows={windows} must be at least 1")
        self.stream = stream = _Stream(split, tokenizer, sentences=True)
        T, size = self.seq_len, stream.size
        if size < (T if self.training else 1):
            raise self._too_short(stream)
        if self.training:
            self.windows = min(windows, max(1, size // (T * self.batch_size)))
            self.runs = size // (T * self.windows)
            self.examples_per_epoch = self.runs * self.windows
            self.slack = tail = size - self.examples_per_epoch * T
            self.forward, self.backward = (
                _Epochs(self.runs, self.seed, f"lanes {direction}") for direction in ("forward", "backward")
            )
            self._walk = functools.lru_cache(maxsize=16)(self._walk)
        else:
            self.steps = self.windows = math.ceil(size / (T * self.batch_size))
            self.examples_per_epoch, tail = math.ceil(size / T), 0
        self.report = {
            "layout": "lanes",
            "examples_per_epoch": self.examples_per_epoch,
            "stream_symbols": size + (stream.end is None),
            "block_windows": self.windows,
            "tail_tokens": tail,
            "never_targets": int(stream.end is None),
        }

    def _walk(self, direction: str, turn: int, first: int, last: int) -> np.ndarray:
        """Starts, int64 [last - first], of the runs that these rows walk at their `turn`-th run."""
        numbers = np.arange(first, last, dtype=np.int64) + turn * self.batch_size
        runs = getattr(self, direction)(numbers)
        offsets = _offsets(numbers // self.runs, self.slack, self.seed, f"lanes {direction}")
        return runs * self.windows * self.seq_len + offsets

    def rows(self, step: int, rows: range) -> dict:
        lanes, T, size = self._numbers(step, rows), self.seq_len, self.stream.size
        if self.training:
            turn, window = divmod(step, self.windows)
            starts = self._walk("forward", turn, rows.start, rows.stop) + window * T
            lengths = np.full_like(starts, T)
        else:
            starts = lanes * (self.windows * T) + step * T
            lengths = np.clip(size - starts, 0, T)
        batch = self._windows(self.stream, starts, lengths)
        if self.shared:
            tokens, targets = batch["tokens"], batch["next_tokens"]
        else:
            mirrored = self._walk("backward", turn, rows.start, rows.stop) + window * T if self.training else starts
            # Pair q of the mirror image is pair size - 1 - q with input and target exchanged.
            tokens, targets = self.stream.at(np.maximum(size - mirrored - lengths, 0), T)
        # From the end of the valid part to its start; what pads stays behind it.
        at = np.arange(T)
        order = np.where(at < lengths[:, None], lengths[:, None] - 1 - at, at)
        padding = at >= lengths[:, None]
        read, following = (np.take_along_axis(array, order, axis=1).astype(np.int32) for array in (targets, tokens))
        read[padding], following[padding] = self.stream.pad, -1
        return batch | {"tokens_backward": read, "next_tokens_backward": following}


class Pairs(_Layout):
    """`[CLS] A [SEP] B [SEP]` after google-research/bert's create_pretraining_data.py.

    For each document and duplicate: sentences are collected until they reach the target length (seq_len - 3, or with
    short_sequence_probability a uniform 2..seq_len - 3, drawn once for the document); a random number of them is A;
    with probability 0.5, and always when there is just one, B is text from a random place of another document and the
    unused sentences are put back, else B is the rest. The longer side is then cut token by token, at its front or back
    with probability 0.5. B's document is drawn among the others: the official ten tries without their rare failure.

    The spans are a plan in the store's folder, keyed by settings and seed; epochs permute it, an epoch is all
    duplicates, so that it passes over the text more than once (`examples_per_pass`). Evaluation has one duplicate and
    one plan for all seeds. `report` counts the tokens that were cut.
    """

    def __init__(self, split, tokenizer, **arguments):
        super().__init__(split, tokenizer, **arguments)
        T, settings = self.seq_len, self.settings
        self.cls, self.sep = tokenizer.role("cls"), tokenizer.role("sep")
        self.pad = tokenizer.roles.get("pad", 0)
        short, duplicates = settings["short_sequence_probability"], settings["duplicates"]
        if not 0 <= short <= 1:
            raise UserError(f"data.pairs.short_sequence_probability={short} must be between 0 and 1")
        if duplicates < 1:
            raise UserError(f"data.pairs.duplicates={duplicates} must be at least 1")
        if T < 5:
            raise UserError(f"seq_len={T} must be at least 5 for sentence pairs: [CLS] A [SEP] B [SEP]")
        if T > 65535:
            raise UserError(f"seq_len={T} must be below 65536 for sentence pairs")
        if split.n_documents < 2:
            raise UserError(
                f"the {split.name} split has {split.n_documents} document, next-sentence pairs need 2: separate"
                " documents by blank lines, or use another layout"
            )
        if not self.training:
            duplicates = 1
        key = {
            "seq_len": T,
            "short_sequence_probability": float(short),
            "duplicates": duplicates,
            "seed": self.seed if self.training else 0,
            "version": PAIRS_VERSION,
        }
        plan = _planned_pairs(split, key)
        self.starts, self.lengths, self.labels = (
            np.load(plan / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("starts", "lengths", "labels")
        )
        counts = json.loads((plan / "plan.json").read_text("utf-8"))["counts"]
        self.examples_per_epoch = counts["examples"]
        self.examples_per_pass = counts["examples"] * split.n_tokens / counts["tokens"]
        if self.training:
            self.order = _Epochs(self.examples_per_epoch, self.seed, "pairs")
        else:
            self.steps = math.ceil(self.examples_per_epoch / self.batch_size)
        self.report = {"layout": "pairs", "examples_per_epoch": self.examples_per_epoch, **counts}
        self.is_special = np.zeros(tokenizer.size, bool)
        self.is_special[np.asarray(tokenizer.special_ids, np.int64)] = True

    def rows(self, step: int, rows: range) -> dict:
        numbers = self._numbers(step, rows) + step * self.batch_size
        examples = self.order(numbers) if self.training else numbers
        there = (examples < self.examples_per_epoch)[:, None]
        index = np.minimum(examples, self.examples_per_epoch - 1)
        (a, b), (n_a, n_b) = self.starts[index].T, self.lengths[index].astype(np.int64).T
        at = np.arange(self.seq_len)
        sep = (n_a + 1)[:, None]
        end = sep + (n_b + 1)[:, None]
        in_b = at > sep
        place = at + np.where(in_b, b[:, None] - sep - 1, a[:, None] - 1)
        tokens = self.split.tokens[np.clip(place, 0, self.split.n_tokens - 1)].astype(np.int32)
        tokens[:, 0] = self.cls
        tokens[(at == sep) | (at == end)] = self.sep
        valid = (at <= end) & there
        tokens[~valid] = self.pad
        next_tokens = np.full_like(tokens, -1)
        next_tokens[:, :-1] = np.where(valid[:, 1:], tokens[:, 1:], -1)
        return {
            "tokens": tokens,
            "next_tokens": next_tokens,
            "length": valid.sum(axis=1, dtype=np.int32),
            "example": examples,
            "special": ~valid | self.is_special[np.minimum(tokens, len(self.is_special) - 1)],
            "segments": (in_b & valid).astype(np.int32),
            "next_sentence_labels": np.where(there[:, 0], self.labels[index], 0).astype(np.int32),
        }


LAYOUTS: dict[str, Callable] = {"blocks": Blocks, "lanes": Lanes, "pairs": Pairs}


# The plan of pairs

DOCUMENTS_AT_ONCE = 1 << 12


def _planned_pairs(split: Split, key: dict) -> Path:
    """The folder of the plan of these settings, made if it is not there yet."""
    folder = split.directory / "plans" / f"pairs-{stable_hash(json.dumps(key, sort_keys=True), bits=64):016x}"

    def make(temporary: Path) -> None:
        temporary.mkdir()
        counts = _plan_pairs(split, key, temporary)
        (temporary / "plan.json").write_text(json.dumps({"key": key, "counts": counts}, indent=1), "utf-8")

    return once(folder, make)


def _plan_pairs(split: Split, key: dict, folder: Path) -> dict:
    """Writes starts int64 [N, 2] (A, B; in tokens), lengths uint16 [N, 2] and labels uint8 [N]; returns the counts."""
    names = ("examples", "random", "single_sentence", "short_documents", "tokens", "cut_tokens", "padding_tokens")
    counts = dict.fromkeys(names, 0)
    bar = Progress("planning pairs", split.n_documents * key["duplicates"], unit="docs", enabled=True)
    with (
        NpyWriter(folder / "starts.npy", np.int64, (2,)) as starts,
        NpyWriter(folder / "lengths.npy", np.uint16, (2,)) as lengths,
        NpyWriter(folder / "labels.npy", np.uint8) as labels,
    ):
        for first in range(0, split.n_documents, DOCUMENTS_AT_ONCE):
            last = min(first + DOCUMENTS_AT_ONCE, split.n_documents)
            rng = generator(key["seed"], "pairs plan", first)
            for start, length, label, finished in _pairs_of_documents(split, first, last, key, rng, counts):
                starts.append(start)
                lengths.append(length)
                labels.append(label)
                bar.add(finished)
    bar.close()
    counts["padding_tokens"] = counts["examples"] * (key["seq_len"] - 3) - counts["tokens"]
    return counts


def _pairs_of_documents(split: Split, first: int, last: int, key: dict, rng, counts: dict):
    """The pairs of documents first .. last - 1, every document in every duplicate one pair further each time round.

    Yields (starts [n, 2], lengths [n, 2], labels [n], how many documents this finished) and adds to `counts`.
    """
    room = key["seq_len"] - 3
    borders, documents = split.sentence_offsets, split.document_offsets
    document = np.tile(np.arange(first, last), key["duplicates"])
    sentence, end = documents[document], documents[document + 1]
    target = np.full(len(document), room)
    short = rng.random(len(document)) < key["short_sequence_probability"]
    target[short] = rng.integers(2, room + 1, size=int(short.sum()))
    counts["short_documents"] += int(short.sum())
    while len(document):
        n = len(document)
        begin = borders[sentence]
        stop = _first_reaching(borders, sentence + 1, end, begin + target)
        single = stop - sentence == 1
        a_stop = sentence + np.where(single, 1, rng.integers(1, np.maximum(stop - sentence, 2)))
        is_random = (rng.random(n) < 0.5) | single
        a_length = borders[a_stop] - begin
        # The random B: another document, any of its sentences, as many as the target asks for, one at least.
        other = rng.integers(0, split.n_documents - 1, size=n)
        other += other >= document
        other_end = documents[other + 1]
        b_sentence = rng.integers(documents[other], other_end)
        b_begin = borders[b_sentence]
        b_stop = _first_reaching(borders, b_sentence + 1, other_end, b_begin + target - a_length)
        b_begin = np.where(is_random, b_begin, borders[a_stop])
        b_length = np.where(is_random, borders[b_stop], borders[stop]) - b_begin
        # Cutting the longer side one token at a time (B when equal) ends at these lengths.
        a_kept = np.minimum(a_length, np.maximum((room + 1) // 2, room - b_length))
        b_kept = np.minimum(b_length, room - a_kept)
        a_front, b_front = rng.binomial(a_length - a_kept, 0.5), rng.binomial(b_length - b_kept, 0.5)
        counts["examples"] += n
        counts["random"] += int(is_random.sum())
        counts["single_sentence"] += int(single.sum())
        counts["tokens"] += int((a_kept + b_kept).sum())
        counts["cut_tokens"] += int((a_length - a_kept + b_length - b_kept).sum())
        sentence = np.where(is_random, a_stop, stop)
        on = sentence < end
        yield (
            np.stack([begin + a_front, b_begin + b_front], axis=1),
            np.stack([a_kept, b_kept], axis=1),
            is_random.astype(np.uint8),
            n - int(on.sum()),
        )
        document, sentence, end, target = document[on], sentence[on], end[on], target[on]


def _first_reaching(borders: np.ndarray, low: np.ndarray, high: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The first index i in low..high with borders[i] >= places, else high: a binary search, one for each element."""
    low, high = low.copy(), high.copy()
    # Gallop first: the answer is usually a few sentences away, and the arrays may lie on disk.
    reach = np.ones_like(low)
    while True:
        probe = np.minimum(low + reach, high)
        short = (borders[probe] < places) & (probe < high)
        if not short.any():
            break
        low, reach = np.where(short, probe + 1, low), reach * 2
    high = probe
    while (open_ := low < high).any():
        middle = (low + high) // 2
        reached = borders[middle] >= places
        low, high = np.where(open_ & ~reached, middle + 1, low), np.where(open_ & reached, middle, high)
    return low
