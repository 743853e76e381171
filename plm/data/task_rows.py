"""Labelled examples as rows of ids: the layout `task`, a function of (seed, step) like those of pretraining.

| tokenizer | one text | two texts |
| --- | --- | --- |
| wordpiece, byte_bpe | `[CLS] a [SEP]` | `[CLS] a [SEP] b [SEP]`, segment 1 from b on (BERT, figure 4) |
| bpe | `_start_ a _classify_` | `_start_ a _delimiter_ b _classify_` (GPT, figure 1) |
| words | `<S> a </S>` | `<S> a </S> <S> b </S>` |

An example is an item, or several where a context is read in windows (span) or a sentence is longer than a row (tagging:
rows of whole words, each tagged once); an item is one row, or as many as it has choices, two orders or two texts apart.
T is the least of `data.task.buckets` and seq_len that holds all rows of a batch; arrays are int32 unless said:

| key | shape | kinds | meaning |
| --- | --- | --- | --- |
| tokens, next_tokens, segments, length, special, example | as in `plm.data.pretrain` | all | example: the item |
| labels | [n] | single, pair, choice, word | class, or number of the right choice |
| scores | float32 [n] | similarity | |
| marked | [n, 2 or 1] | word | positions of the target words |
| tags, tag_positions | [n, T] | tagging | the tag of each word, -1 behind the last; the position of its piece |
| answers | [n, 2] | span | positions of the first and last piece; 0 where the row does not hold the answer |
| vectors | float32 [n, T, D] | all, with a file of them | at the piece that stands for a word, 0 elsewhere |

Examples without labels (a test set's) have labels 0 and tags 0. An epoch takes each item once: items are shuffled
within their bucket, cut into batches, and the batches are shuffled; the last batch of a bucket is filled up with rows
of length 0, which count nothing. Evaluation takes the items in order of their buckets. What is longer than a row is cut
as the papers' code does, the longer of two texts first (of a choice its context), and counted; where that would lose a
target word it is refused.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from plm.cache import cache_directory, once
from plm.data import spans, store
from plm.data.examples import Example
from plm.data.reading import read
from plm.data.tasks import TaskData
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.randomness import generator, stable_hash

VERSION = 1  # raise it whenever the same examples and settings would become other rows
MARKS = ("start", "delimiter", "classify")  # of GPT's rows: no other kind of vocabulary lacks tokens to frame a row


def with_task_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself if it has tokens to frame a row, else with GPT's three."""
    framed = "cls" in tokenizer.roles or "bos" in tokenizer.roles or tokenizer.marks
    return tokenizer if framed else tokenizer.with_marks(MARKS)


@dataclasses.dataclass(frozen=True)
class Frame:
    """Ids around the texts of a row."""

    begin: int
    between: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Frame":
        roles = tokenizer.roles
        if "cls" in roles:
            return cls(roles["cls"], (roles["sep"],), roles["sep"])
        if "start" in roles:
            return cls(roles["start"], (roles["delimiter"],), roles["classify"])
        return cls(roles["bos"], (roles["eos"], roles["bos"]), roles["eos"])

    def room(self, texts: int) -> int:
        """Ids that `texts` texts may have together less than a row."""
        return 2 + len(self.between) * (texts - 1)

    def row(self, first: np.ndarray, second: np.ndarray | None = None) -> tuple[np.ndarray, int]:
        """(ids, position where the second text and segment 1 begin, the row's length without one)."""
        if second is None:
            ids = np.concatenate([[self.begin], first, [self.end]])
            return ids, len(ids)
        start = 1 + len(first) + len(self.between)
        return np.concatenate([[self.begin], first, self.between, second, [self.end]]), start


def _cut(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths after the longer of two texts has lost its last piece until both fit; of equal ones the second."""
    if first + second <= room:
        return first, second
    kept = min(first, max((room + 1) // 2, room - second))
    return kept, min(second, room - kept)


def _rows_of_words(word: np.ndarray, n_words: int, room: int) -> list[tuple[slice, slice]]:
    """(pieces, words) of the rows of a sentence, as few as hold it; `word` [n] is the word of each piece.

    Every word is of one row. A row begins where the one before ends; the last one's pieces reach back to earlier words
    as far as there is room, so that what is left over is not read alone. No word may be longer than `room`.
    """
    if len(word) <= room:
        return [(slice(0, len(word)), slice(0, n_words))]
    begins, ends = (np.searchsorted(word, np.arange(n_words), side=side) for side in ("left", "right"))
    rows, first = [], 0
    while first < n_words:
        stop = int(np.searchsorted(ends, begins[first] + room, side="right"))
        earliest = first if stop < n_words else int(np.searchsorted(begins, len(word) - room))
        rows.append((slice(int(begins[earliest]), int(ends[stop - 1])), slice(first, stop)))
        first = stop
    return rows


# --------------------------------------------------------------------------------------------------- examples -> arrays


class _Rows:
    """Collects the rows of a split."""

    def __init__(self, task: TaskData, tokenizer: Tokenizer, settings: Mapping, with_words: bool):
        self.kind, self.tokenizer, self.settings, self.with_words = task.task.kind, tokenizer, settings, with_words
        self.name, self.frame, self.seq_len = task.name, Frame.of(tokenizer), settings["seq_len"]
        self.ids: list[np.ndarray] = []
        self.word_of: list[np.ndarray] = []
        self.columns: dict[str, list] = {}
        self.words: dict[str, int] = {}
        self.cut = self.n_items = 0
        self.placed: tuple[str, np.ndarray] = ("", np.zeros((0, 2), np.int64))

    def _put(self, name: str, value) -> None:
        self.columns.setdefault(name, []).append(value)

    def _row(self, texts: Sequence[tuple[np.ndarray, np.ndarray]], pieces_of: Sequence[list[str]]) -> list[int]:
        """Adds a row of (ids, word of each piece) texts; returns where each of them begins."""
        ids, second = self.frame.row(*(text for text, _ in texts))
        self.ids.append(ids)
        self._put("segment_1", second)
        starts = [1, second][: len(texts)]
        if self.with_words:
            self.word_of.append(self._representatives(len(ids), starts, texts, pieces_of))
        return starts

    def _representatives(self, n: int, starts, texts, pieces_of) -> np.ndarray:
        """int32 [n]: at the piece that stands for a word the word's number from 1 on, 0 elsewhere."""
        numbers = np.zeros(n, np.int32)
        for start, (_, word), words in zip(starts, texts, pieces_of, strict=True):
            for piece in self._pieces(word, len(words)):
                if piece >= 0:
                    text = words[word[piece]]
                    numbers[start + piece] = self.words.setdefault(text, len(self.words) + 1)
        return numbers

    def _pieces(self, word: np.ndarray, n_words: int) -> np.ndarray:
        """int64 [n_words]: the piece that stands for each word; -1 for a word without, or one that is cut off."""
        side = "left" if self.settings["word_piece"] == "first" else "right"
        at = np.searchsorted(word, np.arange(n_words), side=side) - (side == "right")
        inside = (at >= 0) & (at < len(word))
        there = inside & (word[np.where(inside, at, 0)] == np.arange(n_words)) if len(word) else inside & False
        return np.where(there, at, -1)

    def empty_row(self) -> None:
        """A choice that an example lacks."""
        self.ids.append(np.zeros(0, np.int64))
        self._put("segment_1", 0)
        if self.with_words:
            self.word_of.append(np.zeros(0, np.int32))

    # One example

    def add(self, number: int, example: Example, texts: list[tuple[np.ndarray, np.ndarray, list[str]]]) -> None:
        """texts: (ids, word of each piece, words) of each text of the example, in the order of `_texts`."""
        getattr(self, f"_add_{self.kind}")(number, example, texts)

    def _item(self, number: int) -> None:
        self._put("item_example", number)
        self.n_items += 1

    def _fit(self, texts, room: int):
        """The texts cut to `room` pieces together."""
        lengths = [len(ids) for ids, _, _ in texts]
        kept = [min(lengths[0], room)] if len(texts) == 1 else _cut(*lengths, room)
        self.cut += sum(lengths) > room
        return [(ids[:n], word[:n], words) for (ids, word, words), n in zip(texts, kept, strict=True)]

    def _rows_of(self, texts) -> list[tuple[int, int]]:
        """Adds the rows of one or two texts, in both orders or apart where that is asked for; of each text in them
        (where it begins, pieces that are left of it)."""
        pairs = self.settings["pairs"] if len(texts) == 2 else "joined"
        rows = {"joined": [texts], "both_orders": [texts, texts[::-1]], "apart": [[text] for text in texts]}[pairs]
        placed = []
        for row in rows:
            fitted = self._fit(row, self.seq_len - self.frame.room(len(row)))
            starts = self._row([(ids, word) for ids, word, _ in fitted], [words for _, _, words in fitted])
            placed += zip(starts, (len(ids) for ids, _, _ in fitted), strict=True)
        return placed

    def _add_single(self, number, example, texts) -> None:
        self._rows_of(texts)
        self._item(number)
        self._put("labels", example.label or 0)

    _add_pair = _add_single

    def _add_similarity(self, number, example, texts) -> None:
        self._rows_of(texts)
        self._item(number)
        self._put("scores", example.label or 0.0)

    def _add_choice(self, number, example, texts) -> None:
        choices = self.settings["choices"]
        if len(example.choices) > choices:
            raise UserError(
                f"{example.where}: {len(example.choices)} choices; objectives.choose.choices={choices} must be as many"
                " as an example has at most"
            )
        n = len(example.texts)
        before, own = texts[:n], texts[n:]
        for choice in own:
            # Of what stands before the choice only the context, which comes first, loses its end.
            room = self.seq_len - self.frame.room(2)
            second = min(len(choice[0]), room)
            rest = [min(len(ids), room - second) for ids, _, _ in before[1:]]
            kept = max(room - second - sum(rest), 0)
            self.cut += len(before[0][0]) > kept or second < len(choice[0])
            parts = [(before[0], kept), *zip(before[1:], rest, strict=True)]
            ids = np.concatenate([one[0][:k] for one, k in parts])
            words = [word for one, _ in parts for word in one[2]]
            shifts = np.cumsum([0, *(len(one[2]) for one, _ in parts[:-1])])
            word = np.concatenate([one[1][:k] + shift for (one, k), shift in zip(parts, shifts, strict=True)])
            self._row([(ids, word), (choice[0][:second], choice[1][:second])], [words, choice[2]])
        for _ in range(choices - len(own)):
            self.empty_row()
        self._item(number)
        self._put("labels", example.label or 0)

    def _add_word(self, number, example, texts) -> None:
        marks = []
        for (ids, word, _), text, (start, stop) in zip(texts, example.texts, example.spans, strict=True):
            places = self._piece_spans(text, ids, word)
            found = spans.answer_pieces(places, start, stop)
            if found is None:
                raise UserError(f"{example.where}: the tokenizer leaves nothing of the word {text[start:stop]!r}")
            marks.append(found[0] if self.settings["word_piece"] == "first" else found[1])
        placed = self._rows_of(texts)
        if any(mark >= kept for mark, (_, kept) in zip(marks, placed, strict=True)):
            raise UserError(f"{example.where}: a target word lies behind the {self.seq_len} tokens of a row")
        at = [start + mark for mark, (start, _) in zip(marks, placed, strict=True)]
        for row in [at] if self.settings["pairs"] == "joined" else [at[:1], at[1:]]:
            self._put("marked", row)
        self._item(number)
        self._put("labels", example.label or 0)

    def _add_tagging(self, number, example, texts) -> None:
        ((ids, word, words),) = texts
        room = self.seq_len - self.frame.room(1)
        sizes = np.bincount(word, minlength=1)
        if sizes.max() > room:
            raise UserError(
                f"{example.where}: the word {words[sizes.argmax()]!r} is {sizes.max()} pieces, and a row of"
                f" seq_len={self.seq_len} holds {room}: a longer seq_len is right"
            )
        pieces = self._pieces(word, len(words))
        # A word of which the tokenizer leaves nothing is tagged at the piece before it.
        at = np.maximum.accumulate(np.where(pieces < 0, 0, pieces))
        tags = np.array(example.label or [0] * len(words), np.int32)
        for read_here, tagged_here in _rows_of_words(word, len(words), room):
            (start,) = self._row([(ids[read_here], word[read_here])], [words])
            self._put("tag_positions", at[tagged_here] - read_here.start + start)
            self._put("tags", tags[tagged_here])
            self._item(number)

    def _add_span(self, number, example, texts) -> None:
        (question, question_word, question_words), (context, word, words) = texts
        question, question_word = (x[: self.settings["question"]] for x in (question, question_word))
        room = self.seq_len - self.frame.room(2) - len(question)
        if room < 1:
            raise UserError(
                f"seq_len={self.seq_len} leaves no room for a context behind a question of {len(question)} pieces: a"
                f" longer seq_len, or a smaller data.task.question={self.settings['question']}"
            )
        places = self._piece_spans(example.texts[1], context, word)
        self._put("piece_spans", places)
        first = example.answers[0] if example.answers else None
        answer = None if first is None else spans.answer_pieces(places, first.start, first.start + len(first.text))
        for window in spans.windows(len(context), room, self.settings["stride"]):
            start, stop = map(int, window)
            parts = [(question, question_word), (context[start:stop], word[start:stop])]
            _, offset = self._row(parts, [question_words, words])
            self._item(number)
            self._put("windows", (start, stop))
            self._put("offset", offset)
            self._put("answers", spans.positions(window, answer, offset))

    def _piece_spans(self, text: str, ids: np.ndarray, word: np.ndarray) -> np.ndarray:
        """int64 [n, 2]: the characters of each piece. Several questions in a row ask for those of one context."""
        if text != self.placed[0]:
            spelled = spans.spelling(self.tokenizer, ids)
            self.placed = text, spans.piece_spans(text, spans.word_spans(text), word, spelled)
        return self.placed[1]

    def arrays(self, open_words: list[str], n_examples: int) -> dict[str, np.ndarray]:
        lengths = [len(ids) for ids in self.ids]
        columns = self.columns
        result = {
            "tokens": np.concatenate(self.ids).astype(np.uint32),
            "row_offsets": np.cumsum([0, *lengths]),
            "item_example": np.array(columns["item_example"], np.int32),
            "extra_characters": self.tokenizer.character_rows(open_words),
            "counts": np.array([n_examples, self.n_items, len(self.ids), self.cut], np.int64),
        }
        for name in ("segment_1", "labels", "windows", "offset", "answers", "marked"):
            if name in columns:
                result[name] = np.array(columns[name], np.int32)
        if "scores" in columns:
            result["scores"] = np.array(columns["scores"], np.float32)
        if "tags" in columns:
            result["tags"], result["tag_positions"] = (
                np.concatenate(columns[name]).astype(np.int32) for name in ("tags", "tag_positions")
            )
            result["tag_offsets"] = np.cumsum([0, *map(len, columns["tags"])])
        if "piece_spans" in columns:
            result["piece_spans"] = np.concatenate(columns["piece_spans"]).astype(np.int32)
            result["piece_offsets"] = np.cumsum([0, *map(len, columns["piece_spans"])])
        if self.with_words:
            result["word_of"] = np.concatenate(self.word_of)
            result["words"] = np.frombuffer("\n".join(self.words).encode(), np.uint8)
        return result


def _texts(example: Example, kind: str) -> list:
    """What is tokenised of an example, in order: its texts, its words, its choices."""
    return [list(example.words)] if kind == "tagging" else [*example.texts, *example.choices]


def _make(split: "TaskSplit", settings: Mapping, with_words: bool, progress: bool) -> dict[str, np.ndarray]:
    task, tokenizer, examples = split.task, split.tokenizer, split.examples
    kind = task.task.kind
    texts = [_texts(example, kind) for example in examples]
    reading = read(tokenizer, [text for group in texts for text in group])
    rows = _Rows(task, tokenizer, settings, with_words)
    bar = store.Progress(f"{task.name} {split.name}", len(examples), unit="examples", enabled=progress)
    at = 0
    for number, (example, group) in enumerate(zip(examples, texts, strict=True)):
        own = range(at, at + len(group))
        rows.add(number, example, [(reading.ids[i], reading.word[i], reading.words[i]) for i in own])
        at += len(group)
        if number % 1000 == 999:
            bar.add(1000)
    bar.add(len(examples) % 1000)
    bar.close()
    return rows.arrays(reading.open_words, len(examples))


class TaskSplit(store.Spelled):
    """The rows of one split, kept in the cache by the fingerprints of examples, tokenizer and settings.

    examples: those of the split called `name` of a task (or a part of one), in the order that arrays["item_example"]
    counts; arrays: of `_Rows.arrays`. settings: seq_len, pairs, choices, word_piece, question and stride. with_words:
    which word each piece stands for is kept too. n_tokens: ids of all rows. vectors: float32 [words + 1, D], row 0 for
    no word; None unless whoever opens the split gives it some.
    """

    vectors: np.ndarray | None = None

    def __init__(
        self,
        task: TaskData,
        name: str,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        settings: Mapping,
        *,
        with_words: bool = False,
        progress: bool = True,
    ):
        self.task, self.name, self.examples, self.tokenizer = task, name, tuple(examples), tokenizer
        part = stable_hash("part", *(example.id for example in self.examples), bits=128)
        key = (VERSION, task.fingerprint, name, part, tokenizer.fingerprint, sorted(settings.items()))
        stem = f"{stable_hash('task rows', *key, with_words, bits=128):032x}"
        path = cache_directory() / "tasks" / f"{stem}.npz"
        once(path, lambda path: np.savez(path, **_make(self, settings, with_words, progress)))
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {array: arrays[array] for array in arrays.files}
        self.n_examples, self.n_items, self.n_rows, self.n_cut = map(int, self.arrays["counts"])
        self.rows_per_item = self.n_rows // self.n_items
        self.n_tokens = len(self.arrays["tokens"])
        self.extra_characters = self.arrays["extra_characters"]
        self.lengths = np.diff(self.arrays["row_offsets"])

    @property
    def words(self) -> list[str]:
        """The words that `word_of` numbers from 1 on."""
        return bytes(self.arrays["words"]).decode().split("\n")

    def counts(self) -> dict[str, int]:
        """For run.json: a document is an example, a sentence a row."""
        texts = [text for example in self.examples for text in example.all_texts()]
        return {
            "documents": self.n_examples,
            "sentences": self.n_rows,
            "tokens": self.n_tokens,
            "bytes": sum(len(text.encode()) for text in texts),
            "words": sum(len(text.split()) for text in texts),
            "cut": self.n_cut,
        }


# ------------------------------------------------------------------------------------------------------ rows of a batch


class TaskRows:
    """The layout (`plm.data.pretrain.make_layout` says what one has). settings: buckets and shuffled_labels of
    `data.task`.

    items(step) -> int64 [items of a batch], -1 where the batch is only filled up.
    """

    def __init__(
        self,
        split: TaskSplit,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        settings: Mapping,
        mode: str,
    ):
        self.split, self.seed, self.mode, self.vectors = split, seed, mode, split.vectors
        self.arrays, self.pad = dict(split.arrays), tokenizer.roles.get("pad", 0)
        self.rows_per_item = split.rows_per_item
        self.items_per_batch = batch_size // self.rows_per_item
        self.roles = np.array(sorted(tokenizer.roles.values()), np.int64)
        too_long = [bucket for bucket in settings["buckets"] if bucket > seq_len]
        if too_long:
            raise UserError(f"data.task.buckets: {too_long[0]} is longer than seq_len={seq_len}")
        self.widths = sorted({*settings["buckets"], seq_len})
        items = np.arange(split.n_items)
        if mode == "train" and settings["shuffled_labels"]:
            self._shuffle_labels()
        longest = split.lengths.reshape(split.n_items, self.rows_per_item).max(axis=1)
        bucket = np.searchsorted(self.widths, longest[items])
        self.buckets = [items[bucket == number] for number in range(len(self.widths))]
        batches = [-(-len(bucket) // self.items_per_batch) for bucket in self.buckets]
        self.steps = self.steps_per_epoch = sum(batches)
        self.examples_per_epoch = self.steps_per_epoch * batch_size
        rows = (items[:, None] * self.rows_per_item + np.arange(self.rows_per_item)).ravel()
        self.batches_by_width = dict(zip(self.widths, batches, strict=True))
        self.report = {
            "examples": len(np.unique(self.arrays["item_example"][items])),
            "items": len(items),
            "rows": len(rows),
            "cut_rows": split.n_cut,
            "filled_up_rows": self.examples_per_epoch - len(rows),
            "batches": {str(width): n for width, n in self.batches_by_width.items()},
        }

    def _shuffle_labels(self) -> None:
        """Labels change places among the examples, always in the same way; what they are, and how often, stays."""
        name = next((name for name in ("labels", "scores", "tags") if name in self.arrays), None)
        if name is None:
            raise UserError("data.task.shuffled_labels: a span task has no labels that could change places")
        labels = self.arrays[name]
        self.arrays[name] = labels[generator("shuffled labels", len(labels)).permutation(len(labels))]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (an epoch's plan, and the one before it while threads read ahead)
    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(width, items) of each batch of an epoch."""
        batches = []
        for width, items in zip(self.widths, self.buckets, strict=True):
            if self.mode == "train":
                items = generator(self.seed, "task", epoch, width).permutation(items)
            filled = np.full(-(-len(items) // self.items_per_batch) * self.items_per_batch, -1, np.int64)
            filled[: len(items)] = items
            batches += [(width, batch) for batch in filled.reshape(-1, self.items_per_batch)]
        if self.mode == "train":
            order = generator(self.seed, "task batches", epoch).permutation(len(batches))
            batches = [batches[i] for i in order]
        return batches

    def _batch(self, step: int) -> tuple[int, np.ndarray]:
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._plan(epoch)[number]

    def items(self, step: int) -> np.ndarray:
        return self._batch(step)[1]

    def rows(self, step: int, rows: range) -> dict:
        width, items = self._batch(step)
        arrays, per = self.arrays, self.rows_per_item
        numbers = np.arange(rows.start, rows.stop)
        item = items[numbers // per]
        there = item >= 0
        row = np.where(there, item * per + numbers % per, 0)
        item = np.where(there, item, 0)
        offsets = arrays["row_offsets"]
        length = np.where(there, offsets[row + 1] - offsets[row], 0)
        tokens, valid = self._ragged(arrays["tokens"], offsets[row], length, width)
        tokens = np.where(valid, tokens, self.pad).astype(np.int32)
        following = np.full_like(tokens, -1)
        following[:, :-1] = np.where(valid[:, 1:], tokens[:, 1:], -1)
        segment = np.where(there, arrays["segment_1"][row], 0)
        batch = {
            "tokens": tokens,
            "next_tokens": following,
            "length": length.astype(np.int32),
            "segments": ((np.arange(width)[None] >= segment[:, None]) & valid).astype(np.int32),
            "special": np.isin(tokens, self.roles) | ~valid,
            "example": item.astype(np.int64),
        }
        for name in ("labels", "scores", "answers"):
            if name in arrays:
                mask = there.reshape(-1, *[1] * (arrays[name].ndim - 1))
                batch[name] = np.where(mask, arrays[name][item], 0).astype(arrays[name].dtype)
        if "marked" in arrays:
            batch["marked"] = np.where(there[:, None], arrays["marked"][row], 0)
        if "tags" in arrays:
            starts = arrays["tag_offsets"]
            counts = np.where(there, starts[item + 1] - starts[item], 0)
            tags, tagged = self._ragged(arrays["tags"], starts[item], counts, width)
            positions, _ = self._ragged(arrays["tag_positions"], starts[item], counts, width)
            batch |= {
                "tags": np.where(tagged, tags, -1).astype(np.int32),
                "tag_positions": np.where(tagged, positions, 0).astype(np.int32),
            }
        if self.vectors is not None:
            words, _ = self._ragged(arrays["word_of"], offsets[row], length, width)
            batch["vectors"] = self.vectors[np.where(valid, words, 0)]
        return batch

    @staticmethod
    def _ragged(flat: np.ndarray, starts: np.ndarray, counts: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """([n, width] of pieces of a flat array, whatever behind their ends; bool [n, width], what is theirs)."""
        at = np.arange(width)[None]
        valid = at < counts[:, None]
        return flat[np.where(valid, starts[:, None] + at, 0)], valid
