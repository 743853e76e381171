"""Corpora and tasks of TensorFlow Datasets, prepared as ArrayRecord and read without TensorFlow."""

import functools
import importlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

from plm.data import corpora
from plm.data.corpora import Document, Shard, Source, documents_of, fingerprint_of, paragraph_sentences, splitter
from plm.data.text_files import digest, paragraphs_of
from plm.errors import UserError


class TensorFlowDataset(Source):
    """`tfds:NAME[/config][:split]#field` and `tfds:DIRECTORY[:split]#field`; one document an example.

    The files have to be array_record, the format with random access. The fingerprint covers their bytes.
    """

    def __init__(self, spec: str, body: str, invalid_utf8: str):
        self.spec, self.invalid_utf8 = spec, invalid_utf8
        name, mark, self.field = body.rpartition("#")
        if not mark or not self.field or not name:
            raise UserError(f"data source {spec!r} names no field; tfds:NAME#field would be right")
        name, _, split = name.partition(":")
        if split[:1].isdigit():  # NAME:1.0.0 is the catalogue's way to ask for a version
            version, _, split = split.partition(":")
            name = f"{name}:{version}"
        self.split = split or "train"
        builder = tfds_builder(spec, name)
        self.directory = str(builder.data_dir)
        try:
            self.info = builder.info.splits[self.split]
            self.examples = len(builder.as_data_source(self.split))
        except NotImplementedError:
            raise UserError(
                f"data source {spec!r}: {self.directory} is stored as {builder.info.file_format.value}; "
                "prepare it with file_format=array_record"
            ) from None
        except (KeyError, ValueError) as error:
            splits = ", ".join(builder.info.splits) or "none"
            raise UserError(f"data source {spec!r}: split {self.split!r} ({error}); there are: {splits}") from None
        features = builder.info.features
        for key in self.field.split("."):
            features = getattr(features, "feature", features)
            if not hasattr(features, "keys") or key not in features:
                have = ", ".join(map(repr, sorted(builder.info.features)))
                raise UserError(f"data source {spec!r}: no field {self.field!r} (there: {have})")
            features = features[key]
        if not self.examples:
            raise UserError(f"data source {spec!r} is empty: split {self.split!r} has no examples")
        self.licence = builder.info.redistribution_info.license or None

    @functools.cached_property
    def fingerprint(self) -> str:
        files = sorted(map(str, self.info.filepaths))
        return fingerprint_of("tfds", self.split, self.field, splitter(), *map(digest, files))

    def shards(self) -> list[Shard]:
        size = max(1, self.info.num_bytes)
        count = min(self.examples, -(-size // corpora.SHARD_BYTES))
        borders = [self.examples * i // count for i in range(count + 1)]
        return [
            TensorFlowDatasetShard(
                self.spec, self.directory, self.split, self.field, start, stop, size // count, self.invalid_utf8
            )
            for start, stop in itertools.pairwise(borders)
        ]


def tfds_builder(spec: str, name: str, *, prepare: bool = True):
    """The prepared dataset of a directory, or of a name of the catalogue, which is prepared if it is not there.

    prepare: False takes a dataset of the catalogue as it is; its features are known without its files.
    """
    import tensorflow_datasets as tfds

    path = os.path.expanduser(name)
    if os.path.isdir(path) or name.startswith(("/", ".", "~")):
        try:
            return tfds.builder_from_directory(path)
        except Exception as error:
            reason = _first_line(error)
            raise UserError(f"data source {spec!r}: {path} is no prepared dataset of TFDS ({reason})") from None
    try:
        try:
            builder = tfds.builder(name, file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError:
            # Builders outside of the package's own index register themselves when their module is imported.
            importlib.import_module(f"tensorflow_datasets.text.{name.partition('/')[0]}")
            builder = tfds.builder(name, file_format="array_record")
    except ImportError:
        raise UserError(
            f"data source {spec!r}: TFDS knows no dataset {name!r}; a name of its catalogue or the directory of a "
            "prepared dataset would be right"
        ) from None
    except (ValueError, tfds.core.registered.DatasetNotFoundError) as error:
        raise UserError(f"data source {spec!r}: {_first_line(error)}") from None
    if prepare and not builder.info.splits:
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:
            raise UserError(
                f"data source {spec!r}: {name} is not in {builder.data_dir} and could not be prepared there "
                f"({type(error).__name__}: {_first_line(error)})"
            ) from None
    return builder


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


@dataclass(frozen=True)
class TensorFlowDatasetShard(Shard):
    spec: str
    directory: str
    split: str
    field: str
    start: int
    stop: int
    bytes: int
    invalid_utf8: str

    def documents(self) -> Iterator[Document]:
        import tensorflow_datasets as tfds

        examples = tfds.builder_from_directory(self.directory).as_data_source(self.split)
        # About a megabyte a read: one example at a time is slow for short ones, many at a time are large for books.
        step = max(1, min(256, (self.stop - self.start) * (1 << 20) // max(1, self.bytes)))
        for first in range(self.start, self.stop, step):
            indices = range(first, min(first + step, self.stop))
            for index, example in zip(indices, examples.__getitems__(list(indices)), strict=True):
                where = f"{self.spec}, example {index}"
                paragraphs = paragraphs_of(example, self.field, lambda where=where: where, self.invalid_utf8)
                yield from documents_of(f"{self.split}:{index}", paragraph_sentences(paragraphs))
