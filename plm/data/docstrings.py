"""The embedded tasks, made from the docstrings of this CPython's own packages; nothing is downloaded.

    docstring_package     which of nine packages a docstring belongs to. Split by module: in each package whole modules
                          go to train, dev or test, so that no text of a module is on two sides.
    docstring_pair        whether a docstring belongs to a package, whose name is the first text. Split as
                          docstring_package.
    docstring_signature   which of four first sentences belongs to a function's signature; the others are of functions
                          of the same package. Split by package, and so are the next two.
    docstring_span        where in four such sentences, written one after the other, the signature's own stands.
    docstring_names       which words of a docstring name a parameter of its function, which is not shown.

The packages are `pydocs.TASK_PACKAGES`. `pydocs#without_tasks` is the corpus without them and without the sentences
elsewhere that share a run of eight words with them (`is_copied`), so a model pretrained on it has seen neither side of
the tasks. A text that occurs more than once (the same docstring in several classes) is in neither task. The examples
depend on the Python version, as `pydocs` does.
"""

import ast
import functools
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from plm.data.examples import COPIED_WORDS, words
from plm.data.pydocs import TASK_PACKAGES, PythonDocumentation, prose
from plm.data.task_files import Record
from plm.errors import UserError
from plm.randomness import generator, stable_hash

SIGNATURE_SPLITS = {"http": "dev", "logging": "dev", "unittest": "test", "xml": "test"}  # all others: train
NAMES = ("O", "B-NAME")  # tags of docstring_names: a name is one word
WORDS = 60  # of a docstring in docstring_names: about what a row of 128 pieces holds
MOST = 300  # docstrings of one package in docstring_package, so that the largest is no more than a quarter
CHOICES = 4


class Docstring(NamedTuple):
    """place: module:line; signature: `def name(arguments)`, "" of modules and classes; sentences: its prose."""

    module: str
    place: str
    signature: str
    sentences: tuple[str, ...]

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


@functools.cache
def docstrings() -> tuple[Docstring, ...]:
    """All docstrings with prose of the tasks' packages, by module and line; repeated texts are left out."""
    found = [
        docstring
        for module, path in PythonDocumentation().files
        if module.partition(".")[0] in TASK_PACKAGES
        for docstring in _read(module, path)
    ]
    if not found:
        raise UserError("this Python comes without the source of its library, which the embedded tasks are made of")
    often = Counter(docstring.text for docstring in found)
    return tuple(docstring for docstring in found if often[docstring.text] == 1)


def _read(module: str, path: str) -> Iterator[Docstring]:
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            tree = ast.parse(file.read())
        except (SyntaxError, ValueError):
            return
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, *functions))]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        sentences = tuple(prose(ast.get_docstring(node) or ""))
        if sentences:
            signature = f"def {node.name}({ast.unparse(node.args)})" if isinstance(node, functions) else ""
            yield Docstring(module, f"{module}:{getattr(node, 'lineno', 1)}", signature, sentences)


def is_copied(sentence: str) -> bool:
    """Whether a run of eight words of the sentence stands in a docstring of the tasks' packages."""
    return not _copied_runs().isdisjoint(_runs(sentence))


@functools.cache
def _copied_runs() -> frozenset[tuple[str, ...]]:
    return frozenset(run for docstring in docstrings() for run in _runs(docstring.text))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    found = words(text)
    return (tuple(found[i : i + COPIED_WORDS]) for i in range(len(found) - COPIED_WORDS + 1))


def _module_splits() -> dict[str, str]:
    """{module: split}: about 15% of each package's docstrings are dev and as many test, in whole modules.

    Modules are taken by the hash of their name; a package of few modules has the smallest ones in dev and test.
    """
    sizes = Counter(docstring.module for docstring in docstrings())
    splits = {}
    for package in TASK_PACKAGES:
        own = [module for module in sizes if module.partition(".")[0] == package]
        share = 0.15 * sum(sizes[module] for module in own)
        # A module larger than both shares together would take most of the package away from training.
        movable = [module for module in own if sizes[module] <= 2 * share]
        if len(movable) < 2:
            movable = sorted(own, key=lambda module: sizes[module])[:-1][:2]
        movable.sort(key=lambda module: stable_hash("docstring_package", module, bits=64))
        held = {"dev": 0, "test": 0}
        for module in movable:
            split = min(held, key=held.__getitem__)
            if held[split] < share:
                splits[module] = split
                held[split] += sizes[module]
    return {module: splits.get(module, "train") for module in sizes}


def _of_packages(split: str) -> Iterator[Docstring]:
    """At most MOST docstrings of each package that are in the split, by package."""
    splits = _module_splits()
    by_package = defaultdict(list)
    for docstring in docstrings():
        by_package[docstring.package].append(docstring)
    for own in by_package.values():
        kept = set(sorted((one.place for one in own), key=lambda p: stable_hash("kept", p, bits=64))[:MOST])
        yield from (one for one in own if one.place in kept and splits[one.module] == split)


def read_packages(split: str) -> Iterator[Record]:
    """docstring_package: id, text, label."""
    for one in _of_packages(split):
        yield Record(one.place, {"id": one.place, "text": one.text, "label": one.package})


def read_pairs(split: str) -> Iterator[Record]:
    """docstring_pair: id, package, text, label (yes or no); each docstring once with its own package and once with
    another."""
    for one in _of_packages(split):
        others = [package for package in TASK_PACKAGES if package != one.package]
        other = others[stable_hash("pair", one.place) % len(others)]
        for label, package in (("yes", one.package), ("no", other)):
            values = {"id": f"{one.place}/{package}", "package": package, "text": one.text, "label": label}
            yield Record(one.place, values)


def _functions(split: str) -> Iterator[list[Docstring]]:
    """The functions of each package of a split, those whose first sentences differ."""
    by_package = defaultdict(dict)
    for one in docstrings():
        if one.signature and SIGNATURE_SPLITS.get(one.package, "train") == split:
            by_package[one.package].setdefault(one.sentences[0], one)
    return (list(own.values()) for own in by_package.values() if len(own) >= CHOICES)


def _choices(one: Docstring, functions: list[Docstring]) -> tuple[list[str], int]:
    """Four first sentences, and the place of the function's own."""
    drawn = generator("choices", one.place).choice(len(functions), size=min(CHOICES, len(functions)), replace=False)
    choices = [functions[i].sentences[0] for i in drawn if functions[i] is not one][: CHOICES - 1]
    right = stable_hash("right", one.place) % CHOICES
    choices.insert(right, one.sentences[0])
    return choices, right


def read_signatures(split: str) -> Iterator[Record]:
    """docstring_signature: id, context (the signature), choices, label (number as text)."""
    for functions in _functions(split):
        for one in functions:
            choices, right = _choices(one, functions)
            values = {"id": one.place, "context": one.signature, "choices": choices, "label": str(right)}
            yield Record(one.place, values)


def read_spans(split: str) -> Iterator[Record]:
    """docstring_span: id, question (the signature), context (four sentences), answers."""
    for functions in _functions(split):
        for one in functions:
            choices, right = _choices(one, functions)
            start = sum(len(choice) + 1 for choice in choices[:right])
            answers = {"text": [choices[right]], "answer_start": [start]}
            values = {"id": one.place, "question": one.signature, "context": " ".join(choices), "answers": answers}
            yield Record(one.place, values)


def read_names(split: str) -> Iterator[Record]:
    """docstring_names: id, words, tags; docstrings that name no parameter are left out."""
    for one in docstrings():
        if not one.signature or SIGNATURE_SPLITS.get(one.package, "train") != split:
            continue
        names = _parameters(one.signature)
        words = re.findall(r"\w+|[^\w\s]", one.text)[:WORDS]
        tags = ["B-NAME" if word in names else "O" for word in words]
        if "B-NAME" in tags:
            yield Record(one.place, {"id": one.place, "words": words, "tags": tags})


def _parameters(signature: str) -> set[str]:
    (function,) = ast.parse(f"{signature}: pass").body
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {argument.arg for argument in named if argument is not None} - {"self", "cls"}
