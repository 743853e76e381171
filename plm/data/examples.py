"""What a task is and what its examples hold; from records of files to examples, with everything checked on the way."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from plm.data.task_files import Record, column
from plm.errors import UserError
from plm.randomness import stable_hash

KINDS = ("single", "pair", "similarity", "choice", "tagging", "span", "word")
COPIED_WORDS = 8  # a run of so many that two texts share counts as copied (protocol 1)
_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Runs of letters and digits, without case: what copies are counted in, whatever their spacing and marks."""
    return _WORD.findall(text.lower())


@dataclasses.dataclass(frozen=True)
class Answer:
    """A piece of the context: context[start : start + len(text)] == text."""

    text: str
    start: int


@dataclasses.dataclass(frozen=True)
class Example:
    """One example; which fields are filled is the kind's (see the module's table).

    id: unique within its split; of files without one the number of the row, from 0, as GLUE counts. label: an index of
    `Task.labels`, a number of `choices`, a score, a tuple of tag indices; None where the split has no labels. spans:
    the target word's characters [start, stop) in each of the two texts. where: file and line, for messages.
    """

    id: str
    texts: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    answers: tuple[Answer, ...] = ()
    label: int | float | tuple[int, ...] | None = None
    where: str = dataclasses.field(default="", compare=False)

    def all_texts(self) -> Iterator[str]:
        """Everything that a model gets to read, piece by piece."""
        yield from self.texts
        if self.words:
            yield " ".join(self.words)
        yield from self.choices


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one published copy of a task is laid out.

    files: split -> file name, or `a|b`, in the user's folder; of a dataset the names of its splits. text, label, id,
    choices: columns, `a|b` where copies differ, numbers for files without a header. opening: the column that begins
    each choice. spans: (start, stop) columns. relabel: label as written here -> as the task calls it. dataset: in
    TFDS's catalogue. dev: (n, seed) cuts dev out of train as scikit-learn's train_test_split does. skip_damaged: rows
    that lack columns or have an empty text are left out, and counted (`TaskData.damaged`), where published copies have
    some; elsewhere they are an error. repeated: a column of which longer rows have several.
    """

    files: Mapping[str, str]
    text: tuple[str, ...] = ()
    label: str = "label"
    reader: str = "table"
    id: str = ""
    choices: tuple[str, ...] = ()
    opening: str = ""
    spans: tuple[tuple[str, str], ...] = ()
    relabel: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dataset: str = ""
    dev: tuple[int, int] | None = None
    skip_damaged: bool = False
    repeated: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task. labels: its classes in the order of their numbers; None: those that the files hold, sorted (no classes
    for similarity, choice and span). metrics: names of `plm.analysis.task_metrics`, the first one selects. scores: the
    ends of a similarity's scale. skip: rows with one of these labels are left out (no majority among annotators).
    unanswerable: questions without answer are meant. submission: format of a predictions file."""

    name: str
    kind: str
    metrics: tuple[str, ...]
    layouts: tuple[Layout, ...]
    labels: tuple[str, ...] | None = None
    scores: tuple[float, float] | None = None
    skip: tuple[str, ...] = ()
    unanswerable: bool = False
    submission: str = "jsonl"


# ---------------------------------------------------------------------------------------------- a record -> an example


def make_example(
    task: Task, layout: Layout, record: Record, row: int, split: str, numbers: Mapping[str, int]
) -> Example | None:
    """The example of a record; None for one that the task leaves out.

    row: counts the records of the split from 0. numbers: class -> its number.
    Errors: UserError with the record's place for whatever is wrong in it.
    """
    where = record.where
    name = _id(record, layout.id)
    values = {"id": str(row) if name is None else name, "where": where}
    label = label_of(record, layout, task, split)
    if isinstance(label, str) and label in task.skip:
        return None
    if task.kind == "tagging":
        return Example(**values, **_tagged(record, layout, label, numbers))
    values["texts"] = tuple(_text(record, names) for names in layout.text)
    if task.kind == "span":
        return Example(**values, answers=_answers(record, values["texts"][1], label, task))
    if task.kind == "choice":
        values["choices"] = _choices(record, layout)
        numbers = {str(number): number for number in range(len(values["choices"]))}
    if task.kind == "word":
        values["spans"] = tuple(
            _span(record, places, text) for places, text in zip(layout.spans, values["texts"], strict=True)
        )
    if label is None:
        return Example(**values)
    if task.kind == "similarity":
        return Example(**values, label=_score(label, task, where))
    if label not in numbers:
        raise UserError(f"{where}: label {label!r} is none of {shown(numbers)}")
    return Example(**values, label=numbers[label])


def is_damaged(record: Record, layout: Layout) -> bool:
    """Whether a row lacks columns (they are None) or one of its texts is empty.

    Errors: UserError where no row has a column of the texts.
    """
    texts = [column(record, name) for names in layout.text for name in names.split("+")]
    return None in record.values.values() or any(isinstance(text, str) and not text.strip() for text in texts)


def _id(record: Record, names: str) -> str | None:
    """The id; None where nothing is named or `a|b|`, with nothing at the end, allows that there is none."""
    first = [name for name in names.split("|") if name]
    if len(first) < len(names.split("|")) and not any(name in record.values for name in first):
        return None
    return _whole(str(column(record, "|".join(first))), f"column {names!r}", record)


def _whole(text: str, what: str, record: Record) -> str:
    """The text. Errors: UserError where half a surrogate pair is in it, which JSON can escape and nothing can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{record.where}: {what} holds half a surrogate pair, which is no text") from None
    return text


def _text(record: Record, names: str) -> str:
    """A column's text; of several joined by `+`, theirs with spaces between."""
    parts = [column(record, name) for name in names.split("+")]
    for part in parts:
        if not isinstance(part, str):
            raise UserError(f"{record.where}: column {names!r} holds {type(part).__name__}; text is right")
    text = " ".join(part.strip() for part in parts) if len(parts) > 1 else parts[0]
    if not text.strip():
        raise UserError(f"{record.where}: column {names!r} is empty")
    return _whole(text, f"column {names!r}", record)


def label_of(record: Record, layout: Layout, task: Task, split: str):
    """The label as the task calls it: text, a list for tags, an object for answers; None without one (test only)."""
    if layout.reader == "conll":
        return record.values["tags"]
    try:
        value = column(record, layout.label)
    except UserError:
        if split == "test":
            return None
        raise
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, list):
        return [layout.relabel.get(str(one), str(one)) for one in value]
    value = str(value).strip()
    value = layout.relabel.get(value, value)
    if split == "test" and value in ("-1", "-1.0") and value not in (*(task.labels or ()), *task.skip):
        return None  # TFDS's test sets without labels; where labels are scores, -1 is a float
    return value


def _tagged(record: Record, layout: Layout, tags: list[str] | None, numbers: Mapping[str, int]) -> dict:
    words = record.values["words"] if layout.reader == "conll" else column(record, layout.text[0])
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise UserError(f"{record.where}: column {layout.text[0]!r} must be a list of words, none of them empty")
    for word in words:
        _whole(word, f"word {word!r}", record)
    if tags is None:
        return {"words": tuple(words)}
    if not isinstance(tags, list) or len(tags) != len(words):
        count = f"{len(tags)} tags" if isinstance(tags, list) else "no list of tags"
        raise UserError(f"{record.where}: {count} for {len(words)} words")
    # TFDS gives Universal Dependencies with the lines of multi-word tokens, which are tagged "_".
    kept = [i for i, tag in enumerate(tags) if tag != "_" or "_" in numbers]
    for i in kept:
        if tags[i] not in numbers:
            raise UserError(f"{record.where}: tag {tags[i]!r} of word {words[i]!r} is none of {shown(numbers)}")
    return {"words": tuple(words[i] for i in kept), "label": tuple(numbers[tags[i]] for i in kept)}


def _answers(record: Record, context: str, value, task: Task) -> tuple[Answer, ...]:
    if value is None:
        return ()
    lists = ("text", "answer_start")
    if not isinstance(value, dict) or not all(isinstance(value.get(key), list | tuple) for key in lists):
        raise UserError(f"{record.where}: answers must be {{'text': [...], 'answer_start': [...]}}")
    if not value["text"] and not task.unanswerable:
        raise UserError(f"{record.where}: no answer, and task {task.name!r} has one for every question")
    if len(value["text"]) != len(value["answer_start"]):
        raise UserError(
            f"{record.where}: {len(value['text'])} texts of answers, and {len(value['answer_start'])} places where they"
            " start; as many are right"
        )
    answers = []
    for text, start in zip(value["text"], value["answer_start"], strict=True):
        if not isinstance(text, str):
            raise UserError(f"{record.where}: the text of an answer is {text!r}; a piece of the context is right")
        if not isinstance(start, int) or start < 0 or start + len(text) > len(context) or not text:
            raise UserError(
                f"{record.where}: answer {text!r} at character {start} is outside the context, which has {len(context)}"
            )
        if context[start : start + len(text)] != text:
            there = context[start : start + len(text)]
            raise UserError(f"{record.where}: answer {text!r} is not at character {start} (there: {there!r})")
        answers.append(Answer(text, start))
    return tuple(answers)


def _choices(record: Record, layout: Layout) -> tuple[str, ...]:
    if len(layout.choices) == 1:
        choices = column(record, layout.choices[0])
        if not isinstance(choices, list) or not all(isinstance(one, str) and one.strip() for one in choices):
            raise UserError(f"{record.where}: column {layout.choices[0]!r} must be a list of texts, none of them empty")
        for choice in choices:
            _whole(choice, f"choice {choice!r}", record)
    else:
        choices = [_text(record, name) for name in layout.choices]
    if len(choices) < 2:
        raise UserError(f"{record.where}: {len(choices)} choices; at least 2 are needed")
    if layout.opening:
        opening = _text(record, layout.opening)
        choices = [f"{opening} {choice}" for choice in choices]
    return tuple(choices)


def _span(record: Record, places: tuple[str, str], text: str) -> tuple[int, int]:
    written = [column(record, name) for name in places]
    try:
        start, stop = map(int, written)
    except (TypeError, ValueError):
        raise UserError(f"{record.where}: {'-'.join(places)} is {written}; characters of the text are right") from None
    if not 0 <= start < stop <= len(text) or not text[start:stop].strip():
        name = "-".join(places)
        raise UserError(
            f"{record.where}: {name} = {start}-{stop} is no word of the text, which has {len(text)} characters"
        )
    return start, stop


def _score(label: str, task: Task, where: str) -> float:
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    low, high = task.scores or (-math.inf, math.inf)
    if not math.isfinite(score) or not low <= score <= high:
        scale = f" from {low:g} to {high:g}" if task.scores else ""
        raise UserError(f"{where}: score {label!r} is no number{scale}")
    return score


def has_gold(task: Task, example: Example) -> bool:
    return bool(example.answers) or task.unanswerable if task.kind == "span" else example.label is not None


def shown(labels) -> str:
    names = list(labels)
    return ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# ------------------------------------------------------------------------------------------------------- parts of data


def _rank(example: Example, name: str) -> int:
    return stable_hash(name, example.id, bits=64)


def fraction(examples: Sequence[Example], share: float, *, name: str = "labels") -> tuple[Example, ...]:
    """A fixed part of the examples, at least one, in their order; a smaller share is a subset of a larger one.

    By the hash of the ids, so the same on every machine and whatever the order of the file.
    Errors: UserError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"a fraction of {share} of the labels: above 0 and at most 1 is right")
    if share == 1:
        return tuple(examples)
    kept = sorted(examples, key=lambda example: (_rank(example, name), example.id))
    chosen = {example.id for example in kept[: max(1, round(share * len(kept)))]}
    return tuple(example for example in examples if example.id in chosen)


def halves(examples: Sequence[Example]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Two halves by the hash of the ids; equal in size, or the second one larger by one."""
    if len(examples) < 2:
        raise UserError(f"{len(examples)} examples cannot be halved")
    ranked = sorted(examples, key=lambda example: (_rank(example, "half"), example.id))
    first = {example.id for example in ranked[: len(ranked) // 2]}
    return (
        tuple(example for example in examples if example.id in first),
        tuple(example for example in examples if example.id not in first),
    )
