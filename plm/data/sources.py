"""Corpora: one spec string -> documents of sentences, in shards that are read independently and in bounded memory.

    pydocs                            the English documentation inside this CPython, cleaned to prose
    pydocs#without_tasks              the same without the packages that the embedded tasks are made of
    text:GLOB                         blank lines separate documents, one sentence a line; plain, .gz, .xz
    text:GLOB#split                   the lines of a document are joined and split into sentences
    jsonl:GLOB#field                  one JSON object a line; the field is a string or a list of strings (paragraphs)
    tfds:NAME[/config][:split]#field  a TensorFlow Datasets dataset, prepared once if it is not there (split: train)
    tfds:DIRECTORY[:split]#field      a prepared one; both need file_format=array_record and never import TensorFlow
    task:NAME[,key=value...][#split]  the texts of a task, by default of its train split (`plm.data.tasks`)
    module:function                   a user's own: the function returns a `Source`
    2*text:a/*.xz+0.5*pydocs          a mixture; a weight counts passes per epoch; a fraction is a fixed subset

Nested fields are written with dots (`article.body`). A glob may itself be several, joined by `+`.
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from plm.data.corpora import Document, Shard, Source, fingerprint_of, split_of, uniform
from plm.data.pydocs import PythonDocumentation
from plm.data.tensorflow_datasets import TensorFlowDataset
from plm.data.text_files import JsonLines, Text
from plm.errors import UserError

__all__ = ["SPECS", "Document", "Mixture", "Shard", "Source", "parse", "split_of"]

SPECS = "pydocs, text:GLOB, jsonl:GLOB#field, tfds:NAME#field, tfds:DIRECTORY#field or module:function"

_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+)\*")
_PLUGIN = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_NEXT_TERM = re.compile(r"\+(?=(?:(?:\d+\.?\d*|\.\d+)\*)?(?:pydocs(?:#without_tasks)?(?=\+|$)|[A-Za-z_][\w.]*:\S))")


def parse(spec: str, *, invalid_utf8: str = "error") -> Source:
    """The source of a spec string (the module's docstring lists them).

    invalid_utf8: "error" stops at the first invalid byte and names it; "replace" puts U+FFFD there and counts.
    Raises UserError for a spec that cannot be read, files that do not exist and fields that a dataset does not have;
    what only the content tells (empty, invalid, a field missing in line 7) is raised where it is read.
    """
    if invalid_utf8 not in ("error", "replace"):
        raise UserError(f"invalid_utf8={invalid_utf8!r}: 'error' or 'replace' would be right")
    if not isinstance(spec, str) or not spec.strip():
        raise UserError(f"data source {spec!r} is empty; right would be {SPECS}")
    terms = []
    for term in _NEXT_TERM.split(spec.strip()):
        weight = _WEIGHT.match(term)
        source = _single(term[weight.end() :] if weight else term, invalid_utf8)
        terms.append((float(weight[1]) if weight else 1.0, source))
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    return Mixture(spec.strip(), terms)


def _single(term: str, invalid_utf8: str) -> Source:
    scheme, colon, body = term.partition(":")
    if term in ("pydocs", "pydocs#without_tasks"):
        return PythonDocumentation(without_tasks=term != "pydocs")
    if scheme == "task" and colon:
        from plm.data.tasks import TaskText  # tasks are read by way of this module

        return TaskText(term, body)
    if colon and scheme in ("text", "jsonl", "tfds"):
        kind = {"text": Text, "jsonl": JsonLines, "tfds": TensorFlowDataset}[scheme]
        return kind(term, body, invalid_utf8)
    if _PLUGIN.fullmatch(term):
        return _plugin(term)
    raise UserError(f"data source {term!r} is not understood; right would be {SPECS}")


def _plugin(term: str) -> Source:
    module, _, name = term.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise UserError(f"data source {term!r}: no module {error.name!r}; right would be {SPECS}") from None
    except AttributeError:
        raise UserError(f"data source {term!r}: module {module!r} has no {name!r}") from None
    source = make()
    if not all(hasattr(source, attribute) for attribute in ("spec", "fingerprint", "shards")):
        raise UserError(f"data source {term!r} returned {type(source).__name__}; a plm.data.sources.Source is right")
    return source


class Mixture(Source):
    """Several sources as one corpus; a term of weight 2.3 gives two whole passes and a fixed 30% of its documents.

    The subset is chosen by the hash of a document's text, so a smaller fraction is a subset of a larger one. Repeated
    documents go to the same split (`split_of` sees the text only).
    """

    def __init__(self, spec: str, terms: Sequence[tuple[float, Source]]):
        for weight, source in terms:
            if not weight > 0:
                raise UserError(f"data source {spec!r}: weight {weight:g} of {source.spec!r} must be above 0")
        self.spec, self.terms = spec, tuple(terms)
        licences = dict.fromkeys(source.licence for _, source in terms if source.licence)
        self.licence = " + ".join(licences) or None

    @property
    def fingerprint(self) -> str:
        terms = (part for weight, source in self.terms for part in (weight, source.fingerprint))
        return fingerprint_of("mixture", *terms)

    @property
    def replaced(self) -> int:
        return sum(source.replaced for _, source in self.terms)

    def shards(self) -> list[Shard]:
        shards: list[Shard] = []
        for weight, source in self.terms:
            own = list(source.shards())
            shards += own * int(weight)
            if weight % 1:
                shards += [SubsetShard(shard, weight % 1) for shard in own]
        return shards


@dataclass(frozen=True)
class SubsetShard(Shard):
    """A fixed fraction of another shard's documents."""

    shard: Shard
    fraction: float

    @property
    def bytes(self) -> int:
        return int(self.shard.bytes * self.fraction)

    def documents(self) -> Iterator[Document]:
        return (document for document in self.shard.documents() if uniform("mixture", document) < self.fraction)
