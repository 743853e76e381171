"""Readers of the formats that tasks are published in: a file -> records, each with the place it stands at.

    table     .tsv (GLUE: a tab between columns, quotation marks mean nothing), .csv, .jsonl (an object a line)
    conll     a word a line, its tag in a column, blank lines between sentences; .conllu with its ten columns
    squad     SQuAD's JSON, versions 1.1 and 2.0
    dream     dialogues with questions, as published
    race      a JSON object a file, with several questions
    wic       WiC's `word, part of speech, places, two sentences` beside a .gold.txt
    mclwic    a JSON list with character offsets beside its gold list
    tfds      a dataset of TensorFlow Datasets, read without TensorFlow

A record is a dict of columns. A table's are those of its header, without one their numbers as text ("0", "1", ...); the
other formats' are named below. Files may be packed (.gz, .xz). Whatever is wrong is a UserError of one line that names
the file and the line, or the id.
"""

import csv
import glob
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from plm.data import tensorflow_datasets
from plm.data.text_files import opened
from plm.errors import UserError


class Record(NamedTuple):
    """where: "FILE, line N" or "FILE, id"; values: column -> text, number, list or None."""

    where: str
    values: dict


CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_SHOWN = 8  # columns that a message lists


def find(folder: str, names: str) -> str | None:
    """The first of `a|b|c` that exists in the folder, as it is or packed; RACE's folders count too."""
    for name in names.split("|"):
        for path in (os.path.join(folder, name), *(os.path.join(folder, name + end) for end in (".gz", ".xz"))):
            if os.path.exists(path):
                return path
    return None


def read_text(path: str) -> str:
    """The whole file, unpacked; a byte order mark is dropped."""
    try:
        with opened(path) as stream:
            raw = stream.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: invalid UTF-8; UTF-8 would be right") from None


def suffix(path: str) -> str:
    """The file's end, `.tsv` of `a.tsv.gz`."""
    root, end = os.path.splitext(path)
    return os.path.splitext(root)[1] if end in (".gz", ".xz") else end


def _json(path: str, text: str, first_line: int = 1):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}, line {line}: not valid JSON ({error})") from None


# ------------------------------------------------------------------------------------------------------------- tables


def read_table(path: str, named: Sequence[str] = (), *, filled: bool = False, repeated: str = "") -> Iterator[Record]:
    """Rows of a .tsv, .csv or .jsonl file.

    named: columns of which each is `name`, `name|number` or `number`. The first line is a header unless all of them
    have a number and a name of theirs is missing there: then columns are numbers. filled: columns that a shorter row
    does not have are None. repeated: a column of which longer rows have several; the first one counts.
    Errors: a row with another number of columns than the first line; a line that is no JSON object.
    """
    end, text = suffix(path), read_text(path)
    if end == ".json":
        raise UserError(f"{path}: not a table; .tsv, .csv or .jsonl (an object a line) would be right")
    if end == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                values = _json(path, line, number)
                if not isinstance(values, dict):
                    raise UserError(f"{path}, line {number}: a JSON {type(values).__name__}; an object is right")
                yield Record(f"{path}, line {number}", values)
        return
    rows = _csv_rows(path, text) if end == ".csv" else _tsv_rows(text)
    header: list[str] = []
    first = 0
    for number, row in rows:
        where = f"{path}, line {number}"
        if not header:
            first = number
            header = [column.strip() for column in row]
            if not _is_header(header, named):
                header = [str(i) for i in range(len(row))]
                yield Record(where, dict(zip(header, row, strict=True)))
            elif len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise UserError(f"{where}: column {twice!r} is there more than once")
            continue
        if len(row) > len(header) and repeated in header:
            behind = len(header) - header.index(repeated) - 1
            row = [*row[: len(header) - behind], *row[len(row) - behind :]]
        missing = len(header) - len(row)
        if missing and not (filled and missing > 0):
            raise UserError(f"{where}: {_columns(len(row))}, and line {first} has {len(header)}")
        yield Record(where, dict(zip(header, [*row, *[None] * missing], strict=True)))


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r").split("\t")


def _csv_rows(path: str, text: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a field may be as long as a file
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 1
    try:
        for row in reader:
            if row:
                yield number, row
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {number}: not valid CSV ({error})") from None


def _is_header(first_row: Sequence[str], named: Sequence[str]) -> bool:
    alternatives = [column.split("|") for column in named]
    if all(any(one.isdigit() for one in names) for names in alternatives):
        return all(any(not one.isdigit() and one in first_row for one in names) for names in alternatives)
    return True


def _columns(n: int) -> str:
    return f"{n} column" + "s" * (n != 1)


def column(record: Record, names: str):
    """The value of `a|b|c` (the first that is there; dots lead into objects). Errors: none of them is there."""
    for name in names.split("|"):
        value = record.values
        for key in [name] if name in record.values else name.split("."):
            if not isinstance(value, dict) or key not in value:
                break
            value = value[key]
        else:
            return value
    have = ", ".join(map(repr, list(record.values)[:_SHOWN])) + ", ..." * (len(record.values) > _SHOWN)
    raise UserError(f"{record.where}: no column {names!r} (there: {have})")


# ------------------------------------------------------------------------------------------------------ words and tags


def read_conll(path: str, tag: str = "") -> Iterator[Record]:
    """Sentences: words, tags (lists of str), and id where the file names it (`# sent_id = ...`).

    tag: the tag's column by number (negative from the end), in CoNLL-U by its name; default the last, there `upos`.
    Columns are separated by tabs, in a line without one by blanks. Lines of `-DOCSTART-`, and of CoNLL-U those of
    multi-word tokens (3-4) and of empty nodes (3.1), hold no word.
    Errors: `tag` is no number, nor a name in CoNLL-U; a line without the tag's column or with an empty word or tag;
    lines of unequal length within CoNLL-U.
    """
    universal = suffix(path) == ".conllu"
    word_at = 1 if universal else 0
    tag = tag or ("upos" if universal else "-1")
    if universal and tag in CONLLU:
        tag = str(CONLLU.index(tag))
    if not re.fullmatch(r"-?[0-9]+", tag):
        names = f", or a name of CoNLL-U's in a .conllu file ({', '.join(CONLLU)})"
        raise UserError(f"{path}: the tag's column is {tag!r}; its number is right (0 the first, -1 the last){names}")
    tag_at = int(tag)
    words: list[str] = []
    tags: list[str] = []
    name, begins = None, 0
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        line = line.rstrip("\r")
        if not line.strip():
            if words:
                values = {"words": words, "tags": tags}
                yield Record(f"{path}, line {begins}", values if name is None else values | {"id": name})
                words, tags, name = [], [], None
            continue
        if universal and line.startswith("#"):
            key, _, value = line[1:].partition("=")
            name = value.strip() if key.strip() == "sent_id" else name
            continue
        cells = line.split("\t") if "\t" in line else line.split()
        if cells[0] == "-DOCSTART-":
            continue
        where = f"{path}, line {number}"
        if universal and len(cells) != len(CONLLU):
            raise UserError(f"{where}: {_columns(len(cells))}; CoNLL-U has {len(CONLLU)}")
        if universal and not cells[0].isdigit():
            continue
        if not -len(cells) <= tag_at < len(cells) or len(cells) < 2:
            raise UserError(f"{where}: {_columns(len(cells))}, so this word has no tag")
        if not cells[word_at].strip() or not cells[tag_at].strip():
            raise UserError(f"{where}: an empty {'tag' if cells[word_at].strip() else 'word'}")
        begins = begins if words else number
        words.append(cells[word_at])
        tags.append(cells[tag_at].strip())


# ------------------------------------------------------------------------------------------------- questions and texts


def read_squad(path: str) -> Iterator[Record]:
    """Questions: id, title, context, question, answers {text: [...], answer_start: [...]} (none if impossible)."""
    for article in _list_of(_json(path, read_text(path)), "data", path):
        for paragraph in _list_of(article, "paragraphs", path):
            context = _of(paragraph, "context", path)
            for question in _list_of(paragraph, "qas", path):
                where = f"{path}, question {_of(question, 'id', path)!r}"
                answers = [] if question.get("is_impossible") else _list_of(question, "answers", where)
                both = {key: [_of(answer, key, where) for answer in answers] for key in ("text", "answer_start")}
                text = _of(question, "question", where)
                values = {"id": question["id"], "title": article.get("title", ""), "context": context, "question": text}
                yield Record(where, values | {"answers": both})


def _of(values, key: str, where: str):
    if not isinstance(values, dict) or key not in values:
        raise UserError(f"{where}: no {key!r} where the format has one")
    return values[key]


_JSON = {dict: "an object", str: "a text", type(None): "null", bool: "true or false"}


def _list_of(values, key: str, where: str) -> list:
    return _list(_of(values, key, where), f"{where}: {key!r}")


def _list(value, what: str) -> list:
    if not isinstance(value, list):
        raise UserError(f"{what} is {_JSON.get(type(value), 'a number')} where the format has a list")
    return value


def read_dream(path: str) -> Iterator[Record]:
    """Questions: id (dialogue/number), context (the turns, a line each), question, choices, label (number as text)."""
    for number, dialogue in enumerate(_list(_json(path, read_text(path)), f"{path}: the file")):
        try:
            turns, questions, name = dialogue
        except (TypeError, ValueError):
            raise UserError(f"{path}, dialogue {number}: not [turns, questions, id], as DREAM has it") from None
        where = f"{path}, dialogue {name!r}"
        for turn in _list(turns, f"{where}: 'turns'"):
            if not isinstance(turn, str):
                raise UserError(f"{where}: a turn is {turn!r}; text is right")
        for place, one in enumerate(_list(questions, f"{where}: 'questions'")):
            where = f"{path}, dialogue {name!r}, question {place}"
            choices, answer = _list_of(one, "choice", where), _of(one, "answer", where)
            if answer not in choices:
                raise UserError(f"{where}: the answer {answer!r} is none of the choices")
            values = {"id": f"{name}/{place}", "context": "\n".join(turns), "question": _of(one, "question", where)}
            yield Record(where, values | {"choices": choices, "label": str(choices.index(answer))})


def read_race(path: str) -> Iterator[Record]:
    """Questions of a folder of .txt files (or of one): the columns of `read_dream`."""
    files = sorted(glob.glob(os.path.join(path, "**", "*.txt"), recursive=True)) if os.path.isdir(path) else [path]
    for file in files:
        passage = _json(file, read_text(file))
        if not isinstance(passage, dict):
            raise UserError(f"{file}: a JSON {type(passage).__name__}; an object is right")
        yield from race_questions(Record(file, passage))


_LETTERS = ("A", "B", "C", "D")


def race_questions(passage: Record) -> Iterator[Record]:
    """The questions of one passage of RACE; an answer is a letter."""
    values, where = passage.values, passage.where
    name = values.get("id", values.get("example_id", where))
    questions, options, answers = (_list_of(values, key, where) for key in ("questions", "options", "answers"))
    if not len(questions) == len(options) == len(answers):
        raise UserError(f"{where}: {len(questions)} questions, {len(options)} lists of options, {len(answers)} answers")
    for place, (question, choices, answer) in enumerate(zip(questions, options, answers, strict=True)):
        shared = {"id": f"{name}/{place}", "context": _of(values, "article", where), "question": question}
        if answer not in _LETTERS:
            raise UserError(f"{where}, question {place}: the answer is {answer!r}; one letter from A to D is right")
        yield Record(f"{where}, question {place}", shared | {"choices": choices, "label": str(_LETTERS.index(answer))})


# ------------------------------------------------------------------------------------------------------ word in context


def _gold(path: str, lines: bool):
    """What stands in the gold file beside a data file, or None without one."""
    folder, name = os.path.split(path)
    beside = find(folder, name.removesuffix(".gz").removesuffix(".xz").replace(".data.", ".gold."))
    if beside is None or ".data." not in name:
        return None, path
    text = read_text(beside)
    return (text.split() if lines else _json(beside, text)), beside


def read_wic(path: str) -> Iterator[Record]:
    """Pairs: id, word, sentence1, sentence2, start1, end1, start2, end2 (characters), label (T, F; or none)."""
    gold, beside = _gold(path, lines=True)
    rows = list(_tsv_rows(read_text(path)))
    if gold is not None and len(gold) != len(rows):
        raise UserError(f"{beside}: {len(gold)} labels for the {len(rows)} lines of {path}")
    for place, (number, row) in enumerate(rows):
        where = f"{path}, line {number}"
        if len(row) != 5:
            raise UserError(f"{where}: {_columns(len(row))}; WiC has 5: word, part of speech, places, two sentences")
        word, _, places, *sentences = row
        values = {"id": str(place), "word": word}
        try:
            for side, (index, sentence) in enumerate(zip(map(int, places.split("-")), sentences, strict=True), start=1):
                words = sentence.split(" ")
                start = sum(len(one) + 1 for one in words[:index])
                values |= {f"sentence{side}": sentence, f"start{side}": start, f"end{side}": start + len(words[index])}
        except (ValueError, IndexError):
            raise UserError(f"{where}: {places!r} are no places of words in the two sentences") from None
        yield Record(where, values if gold is None else values | {"label": gold[place]})


def read_mclwic(path: str) -> Iterator[Record]:
    """Pairs: the file's own columns and label, from the `tag` of the gold file."""
    gold, beside = _gold(path, lines=False)
    tags = (
        None
        if gold is None
        else {_of(one, "id", beside): _of(one, "tag", beside) for one in _list(gold, f"{beside}: the file")}
    )
    for values in _list(_json(path, read_text(path)), f"{path}: the file"):
        name = _of(values, "id", path)
        where = f"{path}, id {name!r}"
        if tags is not None and name not in tags:
            raise UserError(f"{beside}: no tag for id {name!r}")
        yield Record(where, values if tags is None else values | {"label": tags[name]})


# ------------------------------------------------------------------------------------------------- TensorFlow Datasets


def tfds_splits(dataset: str) -> list[str]:
    """The splits of a dataset, by name or directory."""
    return list(tensorflow_datasets.tfds_builder(f"tfds:{dataset}", dataset).info.splits)


def read_tfds(dataset: str, split: str, labels: Sequence[str] | None) -> Iterator[Record]:
    """Examples of a split, bytes as text and arrays as lists.

    Class labels come as their names; as their numbers where only these are in `labels`; -1 (none) as "-1".
    """
    spec = f"tfds:{dataset}"
    builder = tensorflow_datasets.tfds_builder(spec, dataset)
    if split not in builder.info.splits:
        raise UserError(f"{spec}: no split {split!r}; there are: {', '.join(builder.info.splits) or 'none'}")
    try:
        examples = builder.as_data_source(split)
    except NotImplementedError:
        raise UserError(
            f"{spec}: stored as {builder.info.file_format.value}; prepare it with file_format=array_record"
        ) from None
    features = builder.info.features
    for index in range(len(examples)):
        values = {key: _plain(value, features[key], labels) for key, value in examples[index].items()}
        yield Record(f"{spec}, {split}[{index}]", values)


def _plain(value, feature, labels):
    inner = getattr(feature, "feature", feature)
    if isinstance(value, dict):
        return {key: _plain(one, inner[key], labels) for key, one in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    return _named(value, getattr(inner, "names", None), labels)


def _named(value, names, labels):
    if isinstance(value, list | tuple):
        return [_named(one.tolist() if hasattr(one, "tolist") else one, names, labels) for one in value]
    if names and isinstance(value, int):
        return names[value] if value >= 0 and (labels is None or set(names) & set(labels)) else str(value)
    return value.decode("utf-8") if isinstance(value, bytes) else value
