"""Word sense by nearest neighbour, layer by layer (ELMo, Peters et al. 2018, section 5.3, table 5).

Every sense that the training corpus (SemCor) tags gets the mean of its occurrences' contextual vectors. An occurrence
in a test set gets the sense of its lemma and part of speech whose mean is nearest (cosine; the paper does not say), and
where training tags no sense of them, WordNet's first one. Nothing is trained. A word with one tagged sense is the same
for all models, so what a model adds is read against the controls: `first_sense` for every occurrence, and the same
model before training (`random_init`).

Files are those of the unified evaluation framework (Raganato et al. 2017): `NAME.data.xml` beside `NAME.gold.key.txt`.
The first senses are read from WordNet's `index.sense` or `cntlist.rev` (the latter lists only senses that were ever
counted; a lemma without one stays unanswered there).

F1 = 2 P R / (P + R), P of the occurrences that got an answer, R of all. An occurrence with several gold senses is right
with any of them.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

import numpy as np

from plm.analysis import features
from plm.analysis.results import Table, layer_name, row
from plm.data import task_files
from plm.errors import UserError

TRAINING = "semcor"
DATA, GOLD = ".data.xml", ".gold.key.txt"
FIRST_SENSES = ("index.sense", "cntlist.rev")
PARTS = {"1": "NOUN", "2": "VERB", "3": "ADJ", "4": "ADV", "5": "ADJ"}  # WordNet's ss_type; 5: a satellite adjective
_KEY = re.compile(r"([^%\s]+)%([1-5]):\d\d:\d\d:\S*:\S*")

Lemma = tuple[str, str]  # and its part of speech


@dataclass(frozen=True)
class Instance:
    """A tagged expression: words [start, stop) of its sentence; keys: its gold senses."""

    id: str
    lemma: Lemma
    start: int
    stop: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Sentence:
    words: tuple[str, ...]
    instances: tuple[Instance, ...]


@dataclass(frozen=True)
class Data:
    """training: sentences of SemCor; tests: {name: sentences}; first: {lemma: its first sense}; files: all that was
    read."""

    training: Sequence[Sentence]
    tests: Mapping[str, Sequence[Sentence]]
    first: Mapping[Lemma, str]
    files: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------------- reading


def find(folder: str) -> Data:
    """Reads all of a folder, at any depth: semcor.data.xml, the other *.data.xml as test sets (`ALL`, their
    concatenation, is left out), and index.sense or cntlist.rev; plain, .gz or .xz.

    Errors: UserError where one of them is missing and for whatever is wrong in them.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--wsd={folder}: no such folder")
    data, other = {}, {}
    for path in sorted(Path(folder).rglob("*")):
        name = re.sub(r"\.(gz|xz)$", "", path.name)
        if name.endswith(DATA):
            data[name.removesuffix(DATA).lower()] = str(path)
        elif name in FIRST_SENSES:
            other[name] = str(path)
    data.pop("all", None)
    training = data.pop(TRAINING, None)
    if training is None:
        raise UserError(f"--wsd={folder}: no {TRAINING}{DATA} in it (the training corpus)")
    if not data:
        raise UserError(f"--wsd={folder}: no test set in it (NAME{DATA} beside NAME{GOLD})")
    senses = next((other[name] for name in FIRST_SENSES if name in other), None)
    if senses is None:
        raise UserError(f"--wsd={folder}: neither {' nor '.join(FIRST_SENSES)} of WordNet in it (the first senses)")
    gold = {path: _gold_of(path) for path in (training, *data.values())}
    tests = {name: read(path, gold[path], f"{name}.") for name, path in data.items()}
    return Data(read(training, gold[training]), tests, first_senses(senses), (*gold, *gold.values(), senses))


def _gold_of(path: str) -> str:
    folder, name = os.path.split(path)
    stem = name[: name.index(DATA)]
    found = task_files.find(folder, stem + GOLD)
    if found is None:
        raise UserError(f"{path}: {stem}{GOLD} is not beside it")
    return found


def read(data: str, gold: str, prefix: str = "") -> list[Sentence]:
    """The sentences of a corpus. prefix: of instances' ids, which every published set counts from d000.s000.t000.

    Errors: UserError with file and line for XML of another form, ids and senses that do not fit together."""
    keys, where = _read_gold(gold)
    reader = _Reader(data, keys, gold, prefix)
    parser = expat.ParserCreate()
    reader.line = lambda: parser.CurrentLineNumber
    parser.StartElementHandler, parser.EndElementHandler = reader.begin, reader.end
    parser.CharacterDataHandler = reader.text
    try:
        parser.Parse(task_files.read_text(data).encode(), True)
    except expat.ExpatError as error:
        raise UserError(f"{data}, line {error.lineno}: not valid XML ({expat.ErrorString(error.code)})") from None
    left = keys.keys() - reader.seen.keys()
    if left:
        one = min(left, key=lambda name: where[name])
        raise UserError(f"{gold}, line {where[one]}: {one!r} is no instance of {data}")
    if not reader.seen:
        raise UserError(f"{data}: no <instance> in it")
    return reader.sentences


def _read_gold(path: str) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    keys, where = {}, {}
    for number, line in enumerate(task_files.read_text(path).split("\n"), start=1):
        name, *senses = line.split() or [""]
        if not name:
            continue
        if not senses:
            raise UserError(f"{path}, line {number}: {name!r} has no sense; `ID SENSE [SENSE...]` is right")
        for sense in senses:
            if not _KEY.fullmatch(sense):
                raise UserError(f"{path}, line {number}: {sense!r} is no sense key, like art%1:09:00::")
        if name in keys:
            raise UserError(f"{path}, line {number}: {name!r} is there already (line {where[name]})")
        keys[name], where[name] = tuple(senses), number
    return keys, where


class _Reader:
    """Takes the events of an XML parser; line: the number of the line it is at."""

    line: Callable[[], int]

    def __init__(self, path: str, keys: Mapping[str, tuple[str, ...]], gold: str, prefix: str):
        self.path, self.keys, self.gold, self.prefix = path, keys, gold, prefix
        self.sentences: list[Sentence] = []
        self.seen: dict[str, int] = {}
        self.words: list[str] | None = None  # of the sentence that is open
        self.instances: list[Instance] = []
        self.element, self.attributes, self.characters = "", {}, ""

    def refuse(self, why: str) -> None:
        raise UserError(f"{self.path}, line {self.line()}: {why}")

    def begin(self, element: str, attributes: dict[str, str]) -> None:
        if element in ("wf", "instance"):
            if self.words is None or self.element:
                self.refuse(f"<{element}> must stand in a <sentence>, by itself")
            self.element, self.attributes, self.characters = element, attributes, ""
        elif element == "sentence":
            if self.words is not None:
                self.refuse("<sentence> in a <sentence>")
            self.words, self.instances = [], []
        elif element not in ("corpus", "text"):
            self.refuse(f"<{element}>; corpus, text, sentence, wf and instance are right")

    def text(self, characters: str) -> None:
        if self.element:
            self.characters += characters
        elif characters.strip():
            self.refuse(f"text outside of <wf> and <instance>: {characters.strip()[:40]!r}")

    def end(self, element: str) -> None:
        if element == "sentence":
            self.sentences.append(Sentence(tuple(self.words), tuple(self.instances)))
            self.words = None
        elif element == self.element:
            words = self.characters.split()
            if element == "instance":
                self.instances.append(self._instance(len(self.words), words))
            self.words += words
            self.element = ""

    def _instance(self, start: int, words: list[str]) -> Instance:
        missing = [name for name in ("id", "lemma", "pos") if not self.attributes.get(name)]
        if missing:
            self.refuse(f"<instance> without {missing[0]}")
        name, pos = self.attributes["id"], self.attributes["pos"]
        if not words:
            self.refuse(f"instance {name!r} has no text")
        if pos not in PARTS.values():
            self.refuse(f"instance {name!r} has pos={pos!r}; one of NOUN, VERB, ADJ, ADV is right")
        if name in self.seen:
            self.refuse(f"instance {name!r} is there already (line {self.seen[name]})")
        if name not in self.keys:
            self.refuse(f"instance {name!r} has no line in {self.gold}")
        self.seen[name] = self.line()
        return Instance(
            self.prefix + name, (self.attributes["lemma"].lower(), pos), start, start + len(words), self.keys[name]
        )


def first_senses(path: str) -> dict[Lemma, str]:
    """{lemma: its sense with the lowest number} of WordNet's index.sense (`key offset number count`) or cntlist.rev
    (`key number count`)."""
    columns = 4 if os.path.basename(path).startswith("index") else 3
    best: dict[Lemma, tuple[int, str]] = {}
    for number, line in enumerate(task_files.read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        parts = line.split()
        match = _KEY.fullmatch(parts[0])
        if match is None or len(parts) != columns or not parts[-2].isdigit():
            raise UserError(f"{path}, line {number}: {line.strip()[:60]!r}; `key ... number count` is right")
        lemma = match[1].lower(), PARTS[match[2]]
        best[lemma] = min(best.get(lemma, (1 << 30, "")), (int(parts[-2]), parts[0]))
    return {lemma: key for lemma, (_, key) in best.items()}


# ----------------------------------------------------------------------------------------------------------- measuring


def predict(model, data: Data, done: Callable[[int], None] = lambda n: None) -> dict[str, np.ndarray]:
    """{instance: int [alignments, layers], indices into `Senses.keys`}; only instances whose lemma training has.

    Memory: the means of the senses that the tests' lemmas have, and one batch. done: is told of every sentence read.
    """
    senses = Senses.of(data)
    means = _means(model, data, senses, done)
    means /= np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12)
    predicted = {}
    for sentences in data.tests.values():
        for sentence, instances, vectors in _vectors(model, sentences, senses.of_lemma, done):
            for place, number in enumerate(instances):
                instance = sentence.instances[number]
                own = senses.of_lemma[instance.lemma]
                # The length of the occurrence's own vector changes no order.
                near = np.einsum("alsf,alf->als", means[:, :, own], vectors[:, :, place])
                predicted[instance.id] = np.array(own)[near.argmax(axis=-1)]
    return predicted


@dataclass(frozen=True)
class Senses:
    """Those that training tags, of the tests' lemmas. keys: sense keys; of_lemma: {lemma: indices of its senses}."""

    keys: tuple[str, ...]
    of_lemma: Mapping[Lemma, list[int]]

    @staticmethod
    def of(data: Data) -> "Senses":
        wanted = {instance.lemma for _, instance in _instances(data.tests.values())}
        numbers: dict[tuple[Lemma, str], int] = {}
        of_lemma: dict[Lemma, list[int]] = defaultdict(list)
        for _, instance in _instances([data.training]):
            for key in instance.keys if instance.lemma in wanted else ():
                if (instance.lemma, key) not in numbers:
                    numbers[instance.lemma, key] = len(numbers)
                    of_lemma[instance.lemma].append(numbers[instance.lemma, key])
        return Senses(tuple(key for _, key in numbers), dict(of_lemma))


def _instances(corpora: Iterable[Sequence[Sentence]]):
    return ((sentence, instance) for corpus in corpora for sentence in corpus for instance in sentence.instances)


def _means(model, data: Data, senses: Senses, done: Callable[[int], None]) -> np.ndarray:
    """float32 [alignments, layers, senses, features]."""
    shape = (len(features.ALIGNMENTS), model.n_layers, len(senses.keys), model.n_features)
    sums, counts = np.zeros(shape, np.float32), np.zeros(len(senses.keys))
    for sentence, instances, vectors in _vectors(model, data.training, senses.of_lemma, done):
        for place, number in enumerate(instances):
            instance = sentence.instances[number]
            for sense in senses.of_lemma[instance.lemma]:
                if senses.keys[sense] in instance.keys:
                    sums[:, :, sense] += vectors[:, :, place]
                    counts[sense] += 1
    return sums / counts[:, None].astype(np.float32)


def _vectors(model, sentences: Sequence[Sentence], lemmas: Mapping[Lemma, list[int]], done: Callable[[int], None]):
    """(sentence, numbers of its instances with one of these lemmas, their vectors by `features.of_spans`)."""
    chosen = []
    for sentence in sentences:
        numbers = [i for i, instance in enumerate(sentence.instances) if instance.lemma in lemmas]
        if numbers:
            chosen.append((sentence, numbers))
        else:
            done(1)
    texts = [sentence.words for sentence, _ in chosen]
    spans = [[(s.instances[i].start, s.instances[i].stop) for i in numbers] for s, numbers in chosen]
    for index, vectors in features.of_spans(model, texts, spans, done):
        yield *chosen[index], vectors


def n_sentences(data: Data) -> int:
    """Sentences that one model reads."""
    return len(data.training) + sum(map(len, data.tests.values()))


def summary(data: Data, found: Mapping[str, Mapping[str, np.ndarray]], name_of_set: str) -> tuple[list[dict], Table]:
    """(rows, table) of {"trained": as `predict` gives it, "random_init": ...}.

    name_of_set: the split of the rows, so that those of several folders stand beside each other.
    Metrics, F1: `first_sense/SET`, `most_frequent/SET` (in training, with the same back-off), and
    `MODEL/ALIGNMENT/LAYER/SET`, of each test set and of `all` together; `seen/SET`: the share of occurrences whose
    lemma training has.
    """
    senses = Senses.of(data)
    answers = {"first_sense": lambda one: data.first.get(one.lemma), "most_frequent": _most_frequent(data)}
    for name, predicted in found.items():
        n_layers = next(iter(predicted.values())).shape[1] if predicted else 0
        for a, alignment in enumerate(features.ALIGNMENTS):
            for layer in range(n_layers):
                answers[f"{name}/{alignment}/{layer_name(layer)}"] = _nearest(predicted, a, layer, senses, data.first)
    tests = {set_: [one for _, one in _instances([sentences])] for set_, sentences in data.tests.items()}
    tests["all"] = [one for own in tests.values() for one in own]
    rows, body = [], []
    for name, answer in answers.items():
        values = [f1(own, [answer(one) for one in own]) for own in tests.values()]
        rows += [
            row(f"{name}/{set_}", name_of_set, len(own), v)
            for (set_, own), v in zip(tests.items(), values, strict=True)
        ]
        body.append([name, *values])
    for set_, own in tests.items():
        seen = np.mean([one.lemma in senses.of_lemma for one in own])
        rows.append(row(f"seen/{set_}", name_of_set, len(own), seen))
    heading = ["F1", *(f"{set_} ({len(own):,})" for set_, own in tests.items())]
    return rows, Table("Word senses by nearest neighbour", heading, body)


def f1(instances: Sequence[Instance], answers: Sequence[str | None]) -> float:
    """None is no answer."""
    right = sum(answer in one.keys for one, answer in zip(instances, answers, strict=True) if answer is not None)
    answered = sum(answer is not None for answer in answers)
    # 2 P R / (P + R) with P = right / answered, R = right / all.
    return 2 * right / (answered + len(instances))


def _most_frequent(data: Data) -> Callable[[Instance], str | None]:
    counts: dict[Lemma, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for _, one in _instances([data.training]):
        for key in one.keys:
            counts[one.lemma][key] += 1
    best = {lemma: max(own, key=own.get) for lemma, own in counts.items()}
    return lambda one: best.get(one.lemma, data.first.get(one.lemma))


def _nearest(predicted, alignment: int, layer: int, senses: Senses, first: Mapping[Lemma, str]):
    def answer(one: Instance) -> str | None:
        found = predicted.get(one.id)
        return first.get(one.lemma) if found is None else senses.keys[found[alignment, layer]]

    return answer
