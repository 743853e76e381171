"""`pydocs`: the English documentation inside every CPython, the corpus of the demo and the tests."""

import ast
import functools
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from plm.cache import remembered
from plm.data.corpora import VERSION, Document, Shard, Source, fingerprint_of, split_sentences, splitter
from plm.errors import UserError

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "turtledemo"}
_MODULES_PER_SHARD = 80
# What the embedded tasks are made of (`plm.data.docstrings`): packages of many docstrings that every CPython has.
TASK_PACKAGES = (
    "asyncio", "email", "http", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml",
)  # fmt: skip


class PythonDocumentation(Source):
    """`pydocs`: `pydoc_data.topics` and the docstrings of the standard library of the Python that runs.

    One document per topic or module, about 1.7 MB of prose. Sources are parsed, never imported. The text differs
    between Python versions. without_tasks: leaves out the packages of `TASK_PACKAGES` and what was copied from them,
    for pretraining before the embedded tasks: about 1.3 MB.
    """

    licence = "PSF-2.0"

    def __init__(self, *, without_tasks: bool = False):
        self.without_tasks = without_tasks
        self.spec = "pydocs#without_tasks" if without_tasks else "pydocs"

    @functools.cached_property
    def files(self) -> list[tuple[str, str]]:
        """(module, path), sorted; the topics first."""
        root = sysconfig.get_path("stdlib")
        found = []
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("config-"))
            for file in sorted(files):
                if file.endswith(".py"):
                    path = os.path.join(folder, file)
                    module = os.path.relpath(path, root)[: -len(".py")].replace(os.sep, ".")
                    module = module.removesuffix(".__init__")
                    if not (self.without_tasks and module.split(".")[0] in TASK_PACKAGES):
                        found.append((module, path))
        topics = os.path.join(root, "pydoc_data", "topics.py")
        return [("topics", topics)] * os.path.isfile(topics) + sorted(found)

    @functools.cached_property
    def fingerprint(self) -> str:
        stats = [(module, os.stat(path).st_size, os.stat(path).st_mtime_ns) for module, path in self.files]
        key = [self.spec, VERSION, splitter(), sys.version, sysconfig.get_path("stdlib"), fingerprint_of(stats)]
        return fingerprint_of(self.spec, remembered(key, self._digest))

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for document in self.documents():
            digest.update("\n".join((*document.sentences, "", "")).encode())
        return digest.hexdigest()

    def shards(self) -> list[Shard]:
        if not self.files:
            raise UserError("data source 'pydocs' is empty: this Python comes without the source of its library")
        groups = [self.files[i : i + _MODULES_PER_SHARD] for i in range(0, len(self.files), _MODULES_PER_SHARD)]
        return [PythonDocumentationShard(tuple(group), self.without_tasks) for group in groups]


@dataclass(frozen=True)
class PythonDocumentationShard(Shard):
    files: tuple[tuple[str, str], ...]
    without_tasks: bool = False

    @property
    def bytes(self) -> int:
        # Docstrings are about a tenth of a module.
        return sum(os.path.getsize(path) // (1 if module == "topics" else 10) for module, path in self.files)

    def documents(self) -> Iterator[Document]:
        for module, path in self.files:
            with open(path, "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                try:
                    tree = ast.parse(file.read())
                except (SyntaxError, ValueError):  # a template or a deliberately broken file
                    continue
            texts = _topics(tree) if module == "topics" else {module: _docstrings(tree)}
            for name, blocks in texts.items():
                # Generated modules repeat the same docstring dozens of times.
                sentences = dict.fromkeys(sentence for block in blocks for sentence in prose(block))
                if self.without_tasks:
                    from plm.data.docstrings import is_copied  # they are made of this module's parts

                    sentences = [sentence for sentence in sentences if not is_copied(sentence)]
                if sentences:
                    yield Document(f"pydocs:{name}", tuple(sentences))


def _topics(tree: ast.Module) -> dict[str, list[str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {f"topics.{name}": [text] for name, text in sorted(ast.literal_eval(node.value).items())}
    return {}


def _docstrings(tree: ast.Module) -> list[str]:
    """All docstrings in the order of the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


_BULLET = re.compile(r"^\s*(?:[*•·+-]|\(?\d{1,2}[.)]|\(?[a-z]\)|\[\d+\]|\.\. \[\w+\])\s+")
_DIRECTIVE = re.compile(r"^\s*\.\. [\w:-]+::\s*")
_CODE_DIRECTIVE = re.compile(r"\s*\.\. (?:code|code-block|sourcecode|productionlist|literalinclude|math|testcode)::")
_FIELD = re.compile(r"^\s*:(?:param|type|return|returns|rtype|raise|raises|keyword|arg|var)\b[^:]*:\s*")
_PROMPT = re.compile(r"\s*(?:>>>|\.\.\. |In \[\d+\]|[$%#] )")
_RULE = re.compile(r"\s*([=\-~^*#\"'`.+_|])\1{2,}[\s=\-~^+|]*$")
_TABLE = re.compile(r"\s*(?:\+[-=+]{3,}|\||={3,}\s+={3,}|-{3,}\s+-{3,})")
_ROLE = re.compile(r":[a-zA-Z][\w:+-]*:`(?:[~!])?([^`<]*?)(?:\s*<[^`>]*>)?`")
_INLINE = re.compile(
    r"``([^`]+)``|`([^`]+)`_{0,2}|(?<!\w)\*\*(\S(?:[^*]*\S)?)\*\*(?!\w)|(?<!\w)\*(\S(?:[^*]*\S)?)\*(?!\w)"
)
_WORD = re.compile(r"[(\"'“‘]*[A-Za-z]+(?:[-'’/][A-Za-z]+)*(?:'s|’s)?[)\"'”’]*[,.;:!?]*[)\"'”’]*")


def prose(text: str) -> list[str]:
    """The prose sentences of reStructuredText or pydoc text.

    Left out: doctests and prompts, literal and code blocks, grammar, tables, headings and their underlines, option
    lists and whatever else is not mostly words. Markup of roles, emphasis, bullets and field lists is removed.
    """
    found: list[str] = []
    literal = None  # inside a literal block: what is indented deeper than this
    for block in _blocks(text):
        indent = len(block[0]) - len(block[0].lstrip())
        if literal is not None and indent > literal:
            continue
        opens = _CODE_DIRECTIVE.match(block[0])
        literal = indent if opens or block[-1].rstrip().endswith("::") else None
        if opens or any(_PROMPT.match(line) or _TABLE.match(line) for line in block):
            continue
        if any(_RULE.match(line) for line in block):  # a heading, or a heading and the text right below it
            block = block[max(i for i, line in enumerate(block) if _RULE.match(line)) + 1 :]
        if not block:
            continue
        lead = _FIELD.sub("", _DIRECTIVE.sub("", _BULLET.sub("", block[0])))
        joined = " ".join(" ".join([lead, *block[1:]]).split())
        joined = _ROLE.sub(r"\1", joined)
        joined = _INLINE.sub(lambda match: next(group for group in match.groups() if group), joined)
        joined = re.sub(r"\s*::$", ":", joined)
        found += (sentence for sentence in split_sentences(joined) if _is_prose(sentence))
    return found


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of lines without a blank line; a list item begins a block of its own."""
    block: list[str] = []
    for line in [*text.expandtabs().split("\n"), ""]:
        if block and (not line.strip() or _BULLET.match(line) or _FIELD.match(line)):
            yield block
            block = []
        if line.strip():
            block.append(line)


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    if not 4 <= len(words) <= 120 or not (sentence[0].isalpha() or sentence[0] in "\"'“‘("):
        return False
    if sentence[-1] not in ".!?:;)\"'”’" and not sentence[0].isupper():
        return False
    return sum(_WORD.fullmatch(word) is not None for word in words) >= 0.75 * len(words)
