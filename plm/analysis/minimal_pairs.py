"""Minimal pairs: of two sentences that differ in one point of grammar, does the model find the right one likelier?

Pairs come from files in BLiMP's JSONL format (Warstadt et al. 2020), or from `generated`: ten phenomena made by rule
from templates of frequent words, so that the suite runs without files. In the generated set each template is used both
ways round (`The book is old` / `are`, `The books are old` / `is`): right and wrong sentences of a phenomenon are made
of the same words, so a model of single words is right in exactly half of them, whatever it has learned.

What is compared is the sum of log-probabilities of all pieces, in float32: of a model that reads forward its own
(`forward`), of two towers each one's and their mean (which decides as their sum does), of a masked model the
pseudo-log-likelihood with the later pieces of a word masked too (Kauf & Ivanova 2023). These are not one quantity
(docs/protocol.md, 11). A tie counts half. Pairs that the model reads as the same pieces (unknown words, lost case) are
ties whatever their numbers, and are reported.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plm.analysis.results import Table, row
from plm.data import task_files
from plm.errors import UserError
from plm.randomness import stable_hash

GENERATED = 50  # templates of each generated phenomenon, two pairs each
GENERATED_SET = "generated"  # what rows call the set
CHUNK = 2048  # distinct sentences scored together
CHANCE = 0.5


@dataclass(frozen=True)
class Pair:
    """good, bad: sentences. uid: the phenomenon; term, field: BLiMP's wider classes, "" where a file has none."""

    good: str
    bad: str
    uid: str
    term: str = ""
    field: str = ""


@dataclass(frozen=True)
class Outcome:
    """credit: {direction: float64 [pairs], 1 right, 0.5 tie, 0 wrong}. identical: bool [pairs]."""

    credit: dict[str, np.ndarray]
    identical: np.ndarray


# ------------------------------------------------------------------------------------------------------------- reading


def read(paths: Sequence[str]) -> list[Pair]:
    """The pairs of JSONL files (plain, .gz, .xz) and of all such files in folders.

    Each line is an object with sentence_good and sentence_bad; UID (without one the file's name), linguistics_term and
    field may be there, other keys are not read.
    Errors: UserError with file and line for a line that is not that.
    """
    pairs = [pair for path in paths for file in _files(path) for pair in _read(file)]
    if not pairs:
        raise UserError(f"--pairs={','.join(paths)}: no pairs in it; lines of JSON with sentence_good and sentence_bad")
    return pairs


def _files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    names = sorted(name for name in os.listdir(path) if _is_jsonl(name))
    if not names:
        raise UserError(f"--pairs={path}: no .jsonl file in this folder")
    return [os.path.join(path, name) for name in names]


def _is_jsonl(path: str) -> bool:
    return task_files.suffix(path) == ".jsonl"


def _read(path: str) -> Iterator[Pair]:
    if not _is_jsonl(path):
        raise UserError(f"--pairs={path}: a .jsonl file (plain, .gz, .xz) or a folder of them is right")
    name = os.path.basename(path).split(".jsonl")[0]
    for where, values in task_files.read_table(path):
        for key in ("sentence_good", "sentence_bad"):
            if not isinstance(values.get(key), str) or not values[key].strip():
                raise UserError(f"{where}: {key} is {values.get(key, 'missing')!r}; a sentence is right")
        if values["sentence_good"] == values["sentence_bad"]:
            raise UserError(f"{where}: both sentences are {values['sentence_good']!r}")
        classes = [values.get(key) or other for key, other in (("UID", name), ("linguistics_term", ""), ("field", ""))]
        if not all(isinstance(one, str) for one in classes):
            raise UserError(f"{where}: UID, linguistics_term and field must be text")
        yield Pair(values["sentence_good"], values["sentence_bad"], *classes)


# ---------------------------------------------------------------------------------------------------------- generating

_PEOPLE = (("man", "men"), ("woman", "women"), ("child", "children"), ("king", "kings"), ("brother", "brothers"))
_THINGS = (("house", "houses"), ("city", "cities"), ("book", "books"), ("school", "schools"), ("river", "rivers"),
           ("church", "churches"), ("company", "companies"), ("state", "states"))  # fmt: skip
_NOUNS = _PEOPLE + _THINGS
_BE = (("is", "are"), ("was", "were"), ("has been", "have been"))
_STATES = ("old", "new", "small", "large", "important", "different", "here", "there")
_NEAR = ("near", "of", "with")
_SEEN = ("saw", "found", "built", "wanted", "made", "left")
_SELF_VERBS = ("saw", "called", "made", "knew", "found", "helped")
_WHEN = ("in the end", "at first", "at the time", "in the city", "after the war", "during the war", "that day")
_MALE = ("man", "king", "brother", "father", "son")
_FEMALE = ("woman", "queen", "sister", "mother", "daughter")
_PRONOUNS = (("he", "him"), ("they", "them"), ("she", "her"))
# Base, past, participle: three different forms each.
_VERBS = (("go", "went", "gone"), ("see", "saw", "seen"), ("take", "took", "taken"), ("write", "wrote", "written"),
          ("know", "knew", "known"), ("give", "gave", "given"), ("begin", "began", "begun"))  # fmt: skip
_SUBJECTS = ("The man", "The woman", "The king", "The company", "The city", "The state", "The child", "The father")

# A template's two pairs: ((good, bad), (good, bad)), made of the same words.
Twin = tuple[tuple[str, str], tuple[str, str]]


def _swapped(first: str, second: str, a: str, b: str) -> Twin:
    """`first` wants a, `second` wants b in the place of {}."""
    return (first.format(a), first.format(b)), (second.format(b), second.format(a))


def _subject_verb() -> Iterator[Twin]:
    for (one, many), (singular, plural), state in itertools.product(_NOUNS, _BE, _STATES):
        yield _swapped(f"The {one} {{}} {state}.", f"The {many} {{}} {state}.", singular, plural)


def _subject_verb_across() -> Iterator[Twin]:
    """The noun next to the verb has the other number."""
    nouns = itertools.product(_PEOPLE, _NEAR, _THINGS)
    for ((one, many), near, (thing, things)), (singular, plural), state in itertools.product(nouns, _BE, _STATES):
        first, second = f"The {one} {near} the {things}", f"The {many} {near} the {thing}"
        yield _swapped(f"{first} {{}} {state}.", f"{second} {{}} {state}.", singular, plural)


def _subject_verb_relative() -> Iterator[Twin]:
    for (one, many), verb, (thing, things), (singular, plural), state in itertools.product(
        _PEOPLE, _SEEN, _THINGS, _BE, _STATES
    ):
        first, second = f"The {one} who {verb} the {things}", f"The {many} who {verb} the {thing}"
        yield _swapped(f"{first} {{}} {state}.", f"{second} {{}} {state}.", singular, plural)


def _determiner_noun() -> Iterator[Twin]:
    for subject, verb, (here, there), (one, many) in itertools.product(
        _SUBJECTS, _SEEN, (("this", "these"), ("that", "those")), _NOUNS
    ):
        yield _swapped(f"{subject} {verb} {here} {{}}.", f"{subject} {verb} {there} {{}}.", one, many)


def _determiner_adjective_noun() -> Iterator[Twin]:
    for subject, (here, there), adjective, (one, many) in itertools.product(
        _SUBJECTS, (("this", "these"), ("that", "those")), ("old", "new", "small", "large"), _NOUNS
    ):
        yield _swapped(f"{subject} saw {here} {adjective} {{}}.", f"{subject} saw {there} {adjective} {{}}.", one, many)


def _reflexive_number() -> Iterator[Twin]:
    males = (("man", "men"), ("king", "kings"), ("brother", "brothers"), ("father", "fathers"), ("son", "sons"))
    for (one, many), verb, when in itertools.product(males, _SELF_VERBS, _WHEN):
        yield _swapped(f"The {one} {verb} {{}} {when}.", f"The {many} {verb} {{}} {when}.", "himself", "themselves")


def _reflexive_gender() -> Iterator[Twin]:
    pairs = zip(_MALE, _FEMALE, strict=True)
    for (he, she), verb, when in itertools.product(pairs, _SELF_VERBS, _WHEN):
        yield _swapped(f"The {he} {verb} {{}} {when}.", f"The {she} {verb} {{}} {when}.", "himself", "herself")


def _pronoun_case() -> Iterator[Twin]:
    for (subject, object_), (one, _), verb, when in itertools.product(_PRONOUNS, _NOUNS, _SEEN, _WHEN):
        start = when[0].upper() + when[1:]
        yield _swapped(f"{start} {{}} {verb} the {one}.", f"{start} the {one} {verb} {{}}.", subject, object_)


def _participle() -> Iterator[Twin]:
    for subject, (_, past, participle), when in itertools.product(_SUBJECTS, _VERBS, _WHEN):
        yield _swapped(f"{subject} {{}} it {when}.", f"{subject} has {{}} it {when}.", past, participle)


def _base_form() -> Iterator[Twin]:
    for subject, (base, past, _), when in itertools.product(_SUBJECTS, _VERBS, _WHEN):
        yield _swapped(f"{subject} did not {{}} it {when}.", f"{subject} {{}} it {when}.", base, past)


_PHENOMENA: dict[str, tuple[str, Callable[[], Iterator[Twin]]]] = {
    "subject_verb": ("subject_verb_agreement", _subject_verb),
    "subject_verb_across_noun": ("subject_verb_agreement", _subject_verb_across),
    "subject_verb_across_relative": ("subject_verb_agreement", _subject_verb_relative),
    "determiner_noun": ("determiner_noun_agreement", _determiner_noun),
    "determiner_adjective_noun": ("determiner_noun_agreement", _determiner_adjective_noun),
    "reflexive_number": ("anaphor_agreement", _reflexive_number),
    "reflexive_gender": ("anaphor_agreement", _reflexive_gender),
    "pronoun_case": ("pronoun_case", _pronoun_case),
    "participle": ("verb_forms", _participle),
    "base_form": ("verb_forms", _base_form),
}


def generated(templates: int = GENERATED) -> list[Pair]:
    """The generated set: of each phenomenon's templates the first ones by the hash of their sentences."""
    pairs = []
    for uid, (term, make) in _PHENOMENA.items():
        ranked = sorted(set(make()), key=lambda twin: (stable_hash("minimal pairs", *twin[0], bits=64), twin))
        for twin in ranked[:templates]:
            pairs += [Pair(good, bad, uid, term, "generated") for good, bad in twin]
    return pairs


# ------------------------------------------------------------------------------------------------------------- scoring


def distinct(pairs: Sequence[Pair]) -> list[str]:
    """The sentences, each once, the shortest first."""
    return sorted({text for pair in pairs for text in (pair.good, pair.bad)}, key=lambda text: (len(text), text))


def judge(model, pairs: Sequence[Pair], done: Callable[[int], None] = lambda n: None) -> Outcome:
    """What a model makes of each pair. done: is told of the sentences that are scored, each distinct one once."""
    sentences = distinct(pairs)
    totals: dict[str, dict[str, float]] = {}
    read_as: dict[str, tuple] = {}
    for start in range(0, len(sentences), CHUNK):
        chunk = sentences[start : start + CHUNK]
        for text, score in zip(chunk, model.score(chunk, within_words=True), strict=True):
            # What a model reads by its spelling is the same only where the spelling is.
            read_as[text] = tuple(score.tokens.words if model.reads_characters else score.tokens.ids.tolist())
            for direction, values in score.directions.items():
                totals.setdefault(direction, {})[text] = float(values.sum())
        done(len(chunk))
    if len(totals) > 1:
        totals["mean"] = {text: float(np.mean([totals[d][text] for d in list(totals)])) for text in sentences}
    return credited(pairs, totals, read_as)


def credited(pairs: Sequence[Pair], totals: Mapping[str, Mapping[str, float]], read_as: Mapping[str, tuple]) -> Outcome:
    """totals: {direction: {sentence: log-probability}}; read_as: {sentence: its pieces}."""
    identical = np.array([read_as[pair.good] == read_as[pair.bad] for pair in pairs])
    credit = {}
    for direction, total in totals.items():
        above = np.sign([total[pair.good] - total[pair.bad] for pair in pairs])
        credit[direction] = np.where(identical, 0.5, (above + 1) / 2)
    return Outcome(credit, identical)


def n_sentences(pairs: Sequence[Pair]) -> int:
    return len(distinct(pairs))


def summary(pairs: Sequence[Pair], judged: dict[str, Outcome], name_of_set: str) -> tuple[list[dict], Table]:
    """(rows, table): for each model (`trained`, `random_init`), direction and phenomenon the share of right pairs.

    name_of_set: the split of the rows, so that those of several sets stand beside each other.
    Metrics: `MODEL/DIRECTION/UID`; over all pairs `MODEL/DIRECTION/all`, the mean over phenomena
    `MODEL/DIRECTION/mean over phenomena`; `MODEL/identical` the share of pairs read as the same pieces.
    """
    uids = list(dict.fromkeys(pair.uid for pair in pairs))
    of_uid = np.array([uids.index(pair.uid) for pair in pairs])
    columns = [(name, direction) for name, outcome in judged.items() for direction in outcome.credit]
    shares = {
        (name, direction): [float(judged[name].credit[direction][of_uid == u].mean()) for u in range(len(uids))]
        for name, direction in columns
    }
    counts = np.bincount(of_uid, minlength=len(uids))
    rows = []
    for name, direction in columns:
        credit, by_uid = judged[name].credit[direction], shares[name, direction]
        named = [*zip(uids, counts, by_uid, strict=True), ("all", len(pairs), float(credit.mean()))]
        named.append(("mean over phenomena", len(uids), float(np.mean(by_uid))))
        rows += [row(f"{name}/{direction}/{uid}", name_of_set, n, value) for uid, n, value in named]
    rows += [row(f"{name}/identical", name_of_set, len(pairs), one.identical.mean()) for name, one in judged.items()]
    identical = next(iter(judged.values())).identical
    body = [
        [uid, int(counts[u]), int(identical[of_uid == u].sum()), *(shares[column][u] for column in columns)]
        for u, uid in enumerate(uids)
    ]
    everything = [float(judged[name].credit[direction].mean()) for name, direction in columns]
    body.append(["all", len(pairs), int(identical.sum()), *everything])
    heading = ["phenomenon", "pairs", "identical", *(f"{name} {direction}" for name, direction in columns)]
    return rows, Table(f"Minimal pairs, {name_of_set}: share of right ones; chance is {CHANCE}", heading, body)
