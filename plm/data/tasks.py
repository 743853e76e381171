"""Tasks: one table from name to kind, labels, metrics and the layouts in which its copies are published.

    data = load("sst2,files=/data/glue/SST-2")            a folder with the published files (plain, .gz, .xz)
    data = load("sst2,files=tfds:glue/sst2")              TensorFlow Datasets by name, or tfds:DIRECTORY
    data = load("docstring_package")                      made from this Python's docstrings; needs no files
    data = load("custom,kind=pair,files=/data/{split}.tsv,text=s1+s2,label=gold")
    data.examples("train")                                -> a tuple of `Example`

| kind       | texts                         | label                         | task in the papers                |
| ---------- | ----------------------------- | ----------------------------- | --------------------------------- |
| single     | (text,)                       | class                         | SST-2, CoLA                       |
| pair       | (first, second)               | class                         | MNLI, SNLI, RTE, QQP, MRPC        |
| similarity | (first, second)               | score                         | STS-B                             |
| choice     | (context,) or (context,       | number of the right choice    | RACE, Story Cloze, SWAG, DREAM    |
|            | question), and `choices`      |                               |                                   |
| tagging    | `words`                       | a class for each word         | part of speech, NER               |
| span       | (question, context)           | `answers`, none: unanswerable | SQuAD 1.1 and 2.0                 |
| word       | (first, second), and `spans`  | class                         | word in context                   |

A task of one's own is an entry of `TASKS` or the settings of `custom` (`SETTINGS`); where a value is a list its parts
are joined by `+`. All splits are called train, dev and test, whatever the files say. Without dev a tenth of train is
dev, by the hash of the ids. Whatever is wrong is a UserError of one line with file and line number, or id.
"""

import dataclasses
import functools
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from plm.data import corpora, docstrings, task_files
from plm.data.examples import (
    KINDS,
    Example,
    Layout,
    Task,
    fraction,
    halves,
    has_gold,
    is_damaged,
    label_of,
    make_example,
    shown,
)
from plm.data.pydocs import TASK_PACKAGES
from plm.data.task_files import Record
from plm.errors import UserError
from plm.randomness import stable_hash

DEV_FRACTION = 0.1  # of train, where a task has no dev
DEV_NAMES = ("dev", "validation", "valid", "val")  # what a user's files may call it; the first that is there
ENOUGH = 20  # examples, from which on one class alone is taken for a wrong column

# ----------------------------------------------------------------------------------------------------------- the table

_GLUE_FILES = {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}
_MNLI_FILES = {"train": "train.tsv", "dev": "dev_matched.tsv", "test": "test_matched.tsv"}
_TFDS = {"train": "train", "dev": "validation", "test": "test"}
_MATCHED = {"train": "train", "dev": "validation_matched", "test": "test_matched"}
_MISMATCHED = {"train": "train", "dev": "validation_mismatched", "test": "test_mismatched"}
_NLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")
_BINARY = ("0", "1")
_UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
)  # fmt: skip
_QUESTION = ("context", "question")
_PLACES = (("start1", "end1"), ("start2", "end2"))


def _bio(*types: str) -> tuple[str, ...]:
    return ("O", *(f"{begin}-{name}" for name in types for begin in "BI"))


def _glue(name: str, kind: str, text: tuple[str, ...], **options) -> Task:
    """An entry of GLUE: its TSV files, and TFDS's `glue/NAME`, where some columns have other names."""
    options = {"labels": _BINARY, "metrics": ("accuracy",), "label": "label", "files": _GLUE_FILES} | options
    files, label = options.pop("files"), options.pop("label")
    tfds_text, tfds_splits = options.pop("tfds_text", text), options.pop("tfds_splits", _TFDS)
    dataset, skip_damaged = options.pop("dataset", f"glue/{name}"), options.pop("skip_damaged", False)
    return Task(
        name,
        kind,
        layouts=(
            Layout(files, text, label, id="index|id|pairID|", skip_damaged=skip_damaged),
            Layout(tfds_splits, tfds_text, reader="tfds", id="idx", dataset=dataset, skip_damaged=skip_damaged),
        ),
        submission="glue",
        **options,
    )


def _squad(name: str, version: str, unanswerable: bool) -> Task:
    files = {"train": f"train-{version}.json|train-{version}.recon.json", "dev": f"dev-{version}.json"}
    files["dev"] += f"|dev-{version}.recon.json|xquad.en.json" if version == "v1.1" else ""
    splits = {"train": "train", "dev": "validation"}
    return Task(
        name,
        "span",
        ("f1", "exact_match"),
        (
            Layout(files, ("question", "context"), "answers", "squad", id="id"),
            Layout(splits, ("question", "context"), "answers", "tfds", id="id", dataset=f"squad/{version}"),
        ),
        unanswerable=unanswerable,
        submission="squad",
    )


def _race(name: str) -> Task:
    files = {split: f"{split}/{name.partition('_')[2]}" for split in ("train", "dev", "test")}
    dataset = f"race/{name.partition('_')[2]}"
    return Task(
        name,
        "choice",
        ("accuracy",),
        (
            Layout(files, _QUESTION, reader="race", id="id", choices=("choices",)),
            Layout({"train": "train", "dev": "dev", "test": "test"}, _QUESTION, reader="tfds_race", id="id",
                   choices=("choices",), dataset=dataset),
        ),
    )  # fmt: skip


def _embedded(
    name: str,
    kind: str,
    metrics: tuple[str, ...],
    text: tuple[str, ...],
    *,
    label: str = "label",
    labels: tuple[str, ...] | None = None,
    choices: tuple[str, ...] = (),
) -> Task:
    """One made from this Python's docstrings."""
    splits = {split: split for split in ("train", "dev", "test")}
    layout = Layout(splits, text, label, reader=name, id="id", choices=choices)
    submission = {"span": "squad", "tagging": "conll"}.get(kind, "jsonl")
    return Task(name, kind, metrics, (layout,), labels, submission=submission)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("sst2", "single", ("sentence",)),
        _glue("cola", "single", ("sentence|3",), label="label|1", metrics=("matthews", "accuracy"),
              tfds_text=("sentence",)),
        _glue("mrpc", "pair", ("#1 String|sentence1", "#2 String|sentence2"), label="Quality|label",
              metrics=("f1_positive", "accuracy"), tfds_text=("sentence1", "sentence2")),
        # Published with a few rows of train cut short, and with questions that are empty.
        _glue("qqp", "pair", ("question1", "question2"), label="is_duplicate", metrics=("f1_positive", "accuracy"),
              skip_damaged=True),
        _glue("mnli", "pair", ("sentence1", "sentence2"), label="gold_label|label", labels=_NLI, files=_MNLI_FILES,
              tfds_text=("premise", "hypothesis"), tfds_splits=_MATCHED),
        _glue("mnli_mismatched", "pair", ("sentence1", "sentence2"), label="gold_label|label", labels=_NLI,
              files=_MNLI_FILES | {"dev": "dev_mismatched.tsv", "test": "test_mismatched.tsv"}, dataset="glue/mnli",
              tfds_text=("premise", "hypothesis"), tfds_splits=_MISMATCHED),
        _glue("qnli", "pair", ("question", "sentence"), labels=_RTE),
        _glue("rte", "pair", ("sentence1", "sentence2"), labels=_RTE),
        _glue("wnli", "pair", ("sentence1", "sentence2")),
        _glue("stsb", "similarity", ("sentence1|0", "sentence2|1"), label="score|2", labels=None, scores=(0.0, 5.0),
              metrics=("spearman", "pearson"), tfds_text=("sentence1", "sentence2"),
              files={split: f"{split}.tsv|{split}.csv" for split in ("train", "dev", "test")}),
        Task("snli", "pair", ("accuracy",), (
            # In GLUE's train.tsv a row has a label of each of its annotators, the header that of one.
            Layout({split: f"snli_1.0_{split}.jsonl|{split}.jsonl|{split}.tsv" for split in ("train", "dev", "test")},
                   ("sentence1", "sentence2"), "gold_label", id="pairID|", repeated="label1"),
            Layout(_TFDS, ("premise", "hypothesis"), reader="tfds", dataset="snli"),
        ), _NLI, skip=("-", "-1")),
        Task("scitail", "pair", ("accuracy",), (
            Layout({split: f"scitail_1.0_{split}.tsv" for split in ("train", "dev", "test")}, ("0", "1"), "2"),
            Layout(_TFDS, ("premise", "hypothesis"), reader="tfds", dataset="sci_tail"),
        ), ("entails", "neutral")),
        Task("dream", "choice", ("accuracy",), (
            Layout({split: f"{split}.json" for split in ("train", "dev", "test")}, _QUESTION, reader="dream", id="id",
                   choices=("choices",)),
        )),
        Task("swag", "choice", ("accuracy",), (
            Layout({"train": "train.csv", "dev": "val.csv", "test": "test.csv"}, ("sent1",), opening="sent2",
                   choices=("ending0", "ending1", "ending2", "ending3")),
        )),
        # The 1,497 + 374 examples of the GPT paper: dev is cut out of the validation file with its code's seed.
        Task("storycloze", "choice", ("accuracy",), (
            Layout({"train": "cloze_test_val__spring2016 - cloze_test_ALL_val.csv",
                    "test": "cloze_test_test__spring2016 - cloze_test_ALL_test.csv"},
                   ("InputSentence1+InputSentence2+InputSentence3+InputSentence4",), "AnswerRightEnding",
                   id="InputStoryid", choices=("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"),
                   relabel={"1": "0", "2": "1"}, dev=(374, 3535999445)),
        )),
        _race("race_middle"),
        _race("race_high"),
        Task("ud_ewt", "tagging", ("accuracy",), (
            Layout({split: f"en_ewt-ud-{split}.conllu" for split in ("train", "dev", "test")}, label="upos",
                   reader="conll"),
            Layout({"train": "train", "dev": "dev", "test": "test"}, ("tokens",), "upos", "tfds", id="idx",
                   dataset="universal_dependencies/en_ewt"),
        ), _UPOS, submission="conll"),
        Task("wnut17", "tagging", ("entity_f1",), (
            Layout({"train": "train.conll|wnut17train.conll", "dev": "dev.conll|emerging.dev.conll",
                    "test": "test.conll|emerging.test.annotated"}, label="-1", reader="conll"),
        ), _bio("corporation", "creative-work", "group", "location", "person", "product"), submission="conll"),
        Task("conll2003", "tagging", ("entity_f1",), (
            Layout({"train": "eng.train|train.txt", "dev": "eng.testa|valid.txt", "test": "eng.testb|test.txt"},
                   label="-1", reader="conll"),
            Layout(_TFDS, ("tokens",), "ner", "tfds", dataset="conll2003"),
        ), _bio("PER", "ORG", "LOC", "MISC"), submission="conll"),
        _squad("squad", "v1.1", unanswerable=False),
        _squad("squad_v2", "v2.0", unanswerable=True),
        Task("wic", "word", ("accuracy",), (
            Layout({split: f"{split}.data.txt|{split}/{split}.data.txt" for split in ("train", "dev", "test")},
                   ("sentence1", "sentence2"), reader="wic", id="id", spans=_PLACES),
            Layout({"train": "train.jsonl", "dev": "val.jsonl", "test": "test.jsonl"}, ("sentence1", "sentence2"),
                   id="idx", spans=_PLACES, relabel={"False": "F", "True": "T"}),
            Layout(_TFDS, ("sentence1", "sentence2"), reader="tfds", id="idx", spans=_PLACES,
                   relabel={"0": "F", "1": "T"}, dataset="super_glue/wic"),
        ), ("F", "T"), submission="wic"),
        Task("mclwic", "word", ("accuracy",), (
            Layout({"train": "train.en-en.data.json|training/training.en-en.data.json",
                    "dev": "dev.en-en.data.json|dev/multilingual/dev.en-en.data.json",
                    "test": "test.en-en.data.json|test/multilingual/test.en-en.data.json"},
                   ("sentence1", "sentence2"), reader="mclwic", id="id", spans=_PLACES),
        ), ("F", "T"), submission="mclwic"),
        _embedded("docstring_package", "single", ("accuracy", "f1_macro"), ("text",), labels=TASK_PACKAGES),
        _embedded("docstring_signature", "choice", ("accuracy",), ("context",), choices=("choices",)),
        _embedded("docstring_pair", "pair", ("accuracy",), ("package", "text"), labels=("no", "yes")),
        _embedded("docstring_span", "span", ("f1", "exact_match"), ("question", "context"), label="answers"),
        _embedded("docstring_names", "tagging", ("entity_f1", "accuracy"), ("words",), label="tags",
                  labels=docstrings.NAMES),
    )
}  # fmt: skip

# ------------------------------------------------------------------------------------------------- names and settings

SETTINGS = {
    "name": "what the task is called in results; by default custom",
    "kind": f"one of {', '.join(KINDS)}",
    "files": "a folder, PATH with {split} in it, train=PATH+dev=PATH+test=PATH, or tfds:NAME; {task} is the name",
    "reader": "table, conll, squad, dream, race, wic or mclwic; by default what the kind or the file's end says",
    "text": "its columns; numbers, from 0, for files without a header",
    "label": "the column of the label; of conll the tag's",
    "labels": "the classes; by default those that the files hold",
    "choices": "the columns of the choices, or one that holds a list",
    "id": "the column of the id",
    "metrics": "names of plm.analysis.task_metrics",
    "unanswerable": "yes where questions without an answer are meant (span)",
}
_DEFAULT_METRICS = {"similarity": ("spearman", "pearson"), "span": ("f1", "exact_match")}
_NAMES = {"train": ("train",), "dev": DEV_NAMES, "test": ("test",)}
_FOLDERS = {"tagging": "conll", "span": "squad"}  # the readers of a folder of such files
_NATIVE_TEXT = {"span": ("question", "context"), "choice": _QUESTION, "word": ("sentence1", "sentence2")}


def load(spec: str, **settings: str) -> "TaskData":
    """The data of `NAME[,key=value...]`; settings: the same keys by name, stronger than the spec's.

    Of a task in `TASKS` only `files` may be given; without it the task's own dataset in TFDS is read.
    Errors: UserError for an unknown name or key, and for files that are not there.
    """
    name, *given = spec.split(",")
    for part in given:
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"task {spec!r}: {part!r} is no key=value")
        settings = {key.strip(): value.strip()} | settings
    settings = {key: value for key, value in settings.items() if value}
    name = name.strip()
    task = custom(settings) if name == "custom" else TASKS.get(name)
    if task is None:
        raise UserError(f"task {name!r} is not known: custom, or one of {', '.join(TASKS)}")
    unknown = [key for key in settings if name != "custom" and key != "files"]
    if unknown:
        raise UserError(f"task {name!r} takes files=..., not {unknown[0]}=...; task=custom takes {', '.join(SETTINGS)}")
    return TaskData(task, settings.get("files", "").replace("{task}", task.name))


def custom(settings: Mapping[str, str]) -> Task:
    """A task from settings alone (`SETTINGS` says what each means)."""
    for key in settings:
        if key not in SETTINGS:
            raise UserError(f"task=custom has no setting {key!r}; there are {', '.join(SETTINGS)}")
    kind = settings.get("kind", "single")
    if kind not in KINDS:
        raise UserError(f"task=custom,kind={kind!r} is not known: {', '.join(KINDS)}")
    files = settings.get("files", "")
    if not files:
        raise UserError(f"task=custom needs files=...: {SETTINGS['files']}")
    dataset = files.removeprefix("tfds:") if files.startswith("tfds:") else ""
    by_end = {".conll": "conll", ".conllu": "conll", ".txt": "wic" if kind == "word" else "table"}
    by_end[".json"] = {"choice": "dream", "span": "squad", "word": "mclwic"}.get(kind, "table")
    is_file = "." in os.path.basename(files) and not os.path.isdir(files)
    guess = by_end.get(task_files.suffix(files), "table") if is_file else _FOLDERS.get(kind)
    reader = "tfds" if dataset else settings.get("reader", guess or "table")
    if reader not in READERS and not dataset:
        raise UserError(f"task=custom,reader={reader!r} is not known: {', '.join(READERS)}")
    text = _list(settings, "text") or (_NATIVE_TEXT.get(kind, ()) if reader != "table" or kind == "span" else ())
    if not text and not (kind == "tagging" and reader == "conll"):
        raise UserError(f"task=custom,kind={kind} needs text=...: {SETTINGS['text']}")
    wanted = {"single": (1,), "pair": (2,), "similarity": (2,), "word": (2,), "span": (2,), "choice": (1, 2)}
    if kind in wanted and len(text) not in wanted[kind]:
        raise UserError(f"task=custom,kind={kind} has {len(text)} text columns; {wanted[kind][0]} are right")
    native = {"conll": "", "squad": "answers"}.get(reader, "answers" if kind == "span" else "label")
    ends = ("",) if dataset else (".tsv", ".csv", ".jsonl", ".json", ".conll")
    layout = Layout(
        {split: "|".join(name + end for name in own for end in ends) for split, own in _NAMES.items()},
        text,
        settings.get("label", native),
        reader,
        id=settings.get("id", "id" if reader in ("squad", "dream", "race", "mclwic", "wic") else "id|"),
        choices=_list(settings, "choices") or (("choices",) if kind == "choice" else ()),
        spans=_PLACES if kind == "word" else (),
        dataset=dataset,
    )
    metrics = _list(settings, "metrics") or _DEFAULT_METRICS.get(kind, ("accuracy",))
    labels = _list(settings, "labels") or None
    return Task(
        settings.get("name", "custom"),
        kind,
        metrics,
        (layout,),
        None if kind in _CLASSLESS else labels,
        unanswerable=settings.get("unanswerable", "no").lower() in ("yes", "true", "1"),
        submission={"span": "squad", "tagging": "conll"}.get(kind, "jsonl"),
    )


def _list(settings: Mapping[str, str], key: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in settings.get(key, "").split("+") if part.strip())


# ------------------------------------------------------------------------------------------------------------ the data

_CLASSLESS = ("similarity", "choice", "span")
READERS: dict[str, Callable[[str, Layout], Iterator[Record]]] = {
    "table": lambda path, layout: task_files.read_table(
        path, _named(layout), filled=layout.skip_damaged, repeated=layout.repeated
    ),
    "conll": lambda path, layout: task_files.read_conll(path, layout.label),
    "squad": lambda path, layout: task_files.read_squad(path),
    "dream": lambda path, layout: task_files.read_dream(path),
    "race": lambda path, layout: task_files.read_race(path),
    "wic": lambda path, layout: task_files.read_wic(path),
    "mclwic": lambda path, layout: task_files.read_mclwic(path),
}
EMBEDDED = {
    "docstring_package": docstrings.read_packages,
    "docstring_signature": docstrings.read_signatures,
    "docstring_pair": docstrings.read_pairs,
    "docstring_span": docstrings.read_spans,
    "docstring_names": docstrings.read_names,
}


def _named(layout: Layout) -> tuple[str, ...]:
    """The columns that tell whether a table has a header: those of the text."""
    return tuple(part for names in layout.text for part in names.split("+"))


class TaskData:
    """A task and where it is read from; splits are read when they are asked for, whole, and kept.

    splits: names in the order train, dev, test, of those there are. labels: the classes, () without. damaged: of the
    files read so far, how many rows were left out (`Layout.skip_damaged`).
    """

    def __init__(self, task: Task, files: str = ""):
        self.task = task
        self.layout, self._places = _open(task, files)
        self.splits = tuple(split for split in ("train", "dev", "test") if split in self._places)
        if "train" in self._places and "dev" not in self._places:
            self.splits = ("train", "dev", *self.splits[1:])
        self._read: dict[str, tuple[Example, ...]] = {}
        self.damaged: dict[str, int] = {}

    @property
    def name(self) -> str:
        return self.task.name

    def examples(self, split: str) -> tuple[Example, ...]:
        """All examples of train, dev or test, in the order of the file.

        Errors: UserError where there is no such split, and for whatever is wrong in it.
        """
        if split not in self.splits:
            raise UserError(f"task {self.name!r} has no split {split!r} here; there are: {', '.join(self.splits)}")
        if split not in self._read:
            if split in self._places:
                self._read[split] = self._examples(split)
            if "dev" not in self._places and split in ("train", "dev"):
                whole = self._read["train"] if "train" in self._read else self._examples("train")
                self._read["train"], self._read["dev"] = self._without_dev(whole)
        return self._read[split]

    def _without_dev(self, train: Sequence[Example]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """(train, dev), in the file's order."""
        if len(train) < 2:
            raise UserError(f"{self._places['train']}: {len(train)} example, of which none can be held out as dev")
        if self.layout.dev is None:
            chosen = {example.id for example in fraction(train, DEV_FRACTION, name="dev")}
        else:
            from sklearn.model_selection import train_test_split

            n, seed = self.layout.dev
            if n >= len(train):
                raise UserError(f"task {self.name!r}: {len(train)} examples, from which {n} cannot be held out")
            _, held_out = train_test_split(range(len(train)), test_size=n, random_state=seed)
            chosen = {train[i].id for i in held_out}
        dev = tuple(example for example in train if example.id in chosen)
        return tuple(example for example in train if example.id not in chosen), dev

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Errors: UserError where no file holds a label."""
        if self.task.kind in _CLASSLESS:
            return ()
        if self.task.labels is not None:
            return self.task.labels
        found: set[str] = set()
        for split in self._places:
            for record in self._records(split):
                written = label_of(record, self.layout, self.task, split)
                found.update(written if isinstance(written, list) else [] if written is None else [written])
        found -= set(self.task.skip)
        if len(found) < 2:
            raise UserError(
                f"{self._places['train' if 'train' in self._places else self.splits[0]]}: the label column"
                f" {self.layout.label!r} holds {shown(found) or 'nothing'}; two classes are needed"
            )
        return tuple(sorted(found, key=lambda label: (int(label) if label.isdecimal() else math.inf, label)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all examples of all splits: equal data has equal ones, wherever it lies."""
        parts = [repr(dataclasses.replace(e, where="")) for split in self.splits for e in self.examples(split)]
        return f"{stable_hash('task', self.name, self.splits, self.labels, *parts, bits=128):032x}"

    def selection_and_report(
        self, share: float = 1.0
    ) -> tuple[tuple[str, tuple[Example, ...]], tuple[str, tuple[Example, ...]]]:
        """What to choose settings by, and what to report once: (name, examples) each (protocol 10).

        Dev and a labelled test; without one the two halves of dev by the hash of the ids. share: a fixed part of each.
        """
        if "test" in self.splits and all(has_gold(self.task, example) for example in self.examples("test")):
            selection, report = ("dev", self.examples("dev")), ("test", self.examples("test"))
        else:
            first, second = halves(self.examples("dev"))
            selection, report = ("dev, first half", first), ("dev, second half", second)
        selection, report = ((name, fraction(part, share, name="held out")) for name, part in (selection, report))
        return selection, report

    # Reading

    def _records(self, split: str) -> Iterator[Record]:
        place, layout, task = self._places[split], self.layout, self.task
        if layout.reader in EMBEDDED:
            return EMBEDDED[layout.reader](place)
        if layout.reader.startswith("tfds"):
            records = task_files.read_tfds(layout.dataset, place, task.labels)
            if layout.reader == "tfds_race":
                return (question for record in records for question in task_files.race_questions(record))
            return records
        return READERS[layout.reader](place, layout)

    def _examples(self, split: str) -> tuple[Example, ...]:
        numbers = {label: number for number, label in enumerate(self.labels)}
        examples, ids, damaged = [], {}, []
        for row, record in enumerate(self._records(split)):
            if self.layout.skip_damaged and is_damaged(record, self.layout):
                damaged.append(record.where)
                continue
            example = make_example(self.task, self.layout, record, row, split, numbers)
            if example is None:
                continue
            if example.id in ids:
                raise UserError(f"{record.where}: id {example.id!r} is there already ({ids[example.id]})")
            ids[example.id] = record.where
            examples.append(example)
        self._check(split, examples)
        self.damaged[split] = len(damaged)
        if damaged:
            print(
                f"task {self.name!r}: {len(damaged):,} of the rows of {split} left out, which lack columns or have an"
                f" empty text (the first: {damaged[0]})",
                file=sys.stderr,
                flush=True,
            )
        return tuple(examples)

    def _check(self, split: str, examples: Sequence[Example]) -> None:
        """What only the whole split tells."""
        place = self._places[split]
        if not examples:
            raise UserError(f"{place}: no examples for the {split} split of {self.name!r}")
        if self.task.kind == "span":
            if all(not example.answers for example in examples):
                raise UserError(f"{place}: no question has an answer")
            return
        bare = [example for example in examples if example.label is None]
        if bare and (split != "test" or len(bare) < len(examples)):
            raise UserError(f"{bare[0].where}: no label")
        if bare or (self.task.kind == "choice" and len(examples) < ENOUGH):
            return
        tagged = self.task.kind == "tagging"
        seen = Counter(label for one in examples for label in (one.label if tagged else [one.label]))
        if len(seen) == 1 and len(examples) > 1 and (split == "train" or len(examples) >= ENOUGH):
            (only,) = seen
            name = self.labels[only] if self.labels else only
            raise UserError(f"{place}: the label is {name!r} in all {len(examples)} examples; check the label column")


# Where the files are


def _open(task: Task, files: str) -> tuple[Layout, dict[str, str]]:
    """(layout, {split: path, or split of the dataset})."""
    if task.layouts[0].reader in EMBEDDED:
        if files:
            raise UserError(f"task {task.name!r} is made from this Python's docstrings and takes no files")
        return task.layouts[0], dict(task.layouts[0].files)
    catalogued = [layout for layout in task.layouts if layout.dataset]
    if files.startswith("tfds:") or not files:
        if not catalogued:
            raise UserError(f"task {task.name!r} needs files=...: {SETTINGS['files']}")
        given = files.removeprefix("tfds:") or catalogued[0].dataset
        layout = dataclasses.replace(catalogued[0], dataset=given)
        have = task_files.tfds_splits(given)
        wanted = {split: [name for name in names.split("|") if name in have] for split, names in layout.files.items()}
        found = {split: names[0] for split, names in wanted.items() if names}
        if not found:
            right = ", ".join(layout.files.values()).replace("|", " or ")
            raise UserError(f"tfds:{given}: splits {', '.join(have) or 'none'}; {right} would be right")
        return layout, found
    local = [layout for layout in task.layouts if not layout.dataset]
    named = _explicit(files)
    if named is not None:
        # Explicit paths belong to the layout whose file names end like theirs.
        ends = {task_files.suffix(path) for path in named.values()}
        fits = (one for one in local if ends & {task_files.suffix(n) for f in one.files.values() for n in f.split("|")})
        return next(fits, local[0]), named
    if not os.path.isdir(files):
        raise UserError(f"task {task.name!r}: files={files!r} is no folder; right would be {SETTINGS['files']}")
    for layout in local:
        paths = {split: task_files.find(files, names) for split, names in layout.files.items()}
        if found := {split: path for split, path in paths.items() if path}:
            return layout, found
    wanted = " or ".join(next(iter(layout.files.values())).replace("|", " or ") for layout in local)
    raise UserError(f"task {task.name!r}: no file of it in {files!r}; for example {wanted} would be right")


def _explicit(files: str) -> dict[str, str] | None:
    """{split: path} of `train=PATH+...`, of a path with {split}, or of one file; None for a folder."""
    if "{split}" in files:
        paths = {split: [files.replace("{split}", name) for name in own] for split, own in _NAMES.items()}
        there = {split: list(filter(os.path.exists, own)) for split, own in paths.items()}
        found = {split: own[0] for split, own in there.items() if own}
        if not found:
            raise UserError(f"files={files!r}: no file for train, dev or test is there")
        return found
    if files.partition("=")[0] in ("train", "dev", "test"):
        parts = [part.partition("=") for part in files.split("+")]
        found = {split: path for split, _, path in parts}
        if not set(found) <= {"train", "dev", "test"}:
            raise UserError(f"files={files!r}: right would be train=PATH+dev=PATH+test=PATH")
    elif os.path.isfile(files):
        found = {"train": files}
    else:
        return None
    for path in found.values():
        if not os.path.exists(path):
            raise UserError(f"files={files!r}: {path} is not there")
    return found


# -------------------------------------------------------------------------------------------------- text without labels


class TaskText(corpora.Source):
    """`task:NAME[,key=value...][#split]`: the texts of a task's split, by default train, a document an example.

    A text that an earlier example holds is left out; one that an example itself holds twice is kept twice.
    """

    licence = None

    def __init__(self, spec: str, body: str):
        body, self.split = _split_of(body)
        self.spec, self.data = spec, load(body)
        if self.split not in self.data.splits:
            raise UserError(f"data source {spec!r}: there is no {self.split}, only {', '.join(self.data.splits)}")

    @functools.cached_property
    def fingerprint(self) -> str:
        split = () if self.split == "train" else (self.split,)
        key = ("task text", corpora.VERSION, corpora.splitter(), self.data.fingerprint, *split)
        return f"{stable_hash(*key, bits=128):032x}"

    def shards(self) -> list[corpora.Shard]:
        return [TaskTextShard(self.spec, self.spec.partition(":")[2])]


def _split_of(body: str) -> tuple[str, str]:
    """(NAME[,key=value...], split)"""
    name, mark, split = body.rpartition("#")
    return (name, split) if mark and split in ("train", "dev", "test") else (body, "train")


@dataclasses.dataclass(frozen=True)
class TaskTextShard(corpora.Shard):
    spec: str
    body: str

    def _examples(self) -> tuple[Example, ...]:
        body, split = _split_of(self.body)
        return load(body).examples(split)

    @property
    def bytes(self) -> int:
        return sum(len(text) for example in self._examples() for text in example.all_texts())

    def documents(self) -> Iterator[corpora.Document]:
        seen: set[str] = set()
        for example in self._examples():
            fresh = [text for text in example.all_texts() if text not in seen]
            seen.update(fresh)
            sentences = corpora.paragraph_sentences(fresh)
            if sentences:
                yield corpora.Document(f"{self.spec}:{example.id}", tuple(sentences))
