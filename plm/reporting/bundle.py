"""Everything that a page is made of in one tar file: configs, records, results, predictions, studies, and checksums.

Nothing else of a workdir goes along: no parameters and no corpus. (Predictions have the words of a tagged split,
samples.json and senses.json sentences of the held-out text.) `python -m plm.report BUNDLE.tar` makes the page again.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from plm.errors import UserError
from plm.reporting.studies import FILE as STUDY

FILES = (
    STUDY,
    "point.json",
    "config.json",
    "run.json",
    "metrics.jsonl",
    "results.jsonl",
    "evaluations.json",
    "samples.json",
    "senses.json",
)
FOLDERS = ("evaluations", "predictions")
SUMS = "SHA256SUMS"


def write(path: epath.Path, folders: Sequence[str]) -> int:
    """Writes the files of workdirs and studies; returns how many. Their places relative to each other stay.

    Errors: UserError where the file cannot be written.
    """
    folders = sorted(dict.fromkeys(folders))
    remote = [folder for folder in folders if "://" in folder]
    local = [os.path.abspath(folder) for folder in folders if "://" not in folder]
    top = os.path.commonpath(local) if len(local) > 1 else os.path.dirname(local[0]) if local else ""
    sums, partial = [], path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file, tarfile.open(fileobj=file, mode="w") as archive:

            def add(name: str, content: bytes) -> None:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

            for folder in [*local, *remote]:
                below = os.path.relpath(folder, top) if "://" not in folder else folder.partition("://")[2]
                for name, content in _contents(epath.Path(folder)):
                    full = os.path.normpath(f"{below}/{name}")
                    add(full, content)
                    sums.append(f"{hashlib.sha256(content).hexdigest()}  {full}\n")
            add(SUMS, "".join(sums).encode())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--bundle={path}: cannot be written: {error.strerror or error}") from error
    return len(sums)


def _contents(folder: epath.Path) -> Iterator[tuple[str, bytes]]:
    for name in FILES:
        if (folder / name).exists():
            yield name, (folder / name).read_bytes()
    for below in FOLDERS:
        if (folder / below).is_dir():
            for file in sorted((folder / below).iterdir(), key=lambda file: file.name):
                yield f"{below}/{file.name}", file.read_bytes()


def unpack(path: Path, folder: Path) -> None:
    """The files of a bundle in a folder. Errors: UserError for a file that is none, or whose checksums are wrong."""
    try:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, tarfile.TarError, UnicodeError) as error:
        raise UserError(f"{path} is no bundle of plm.report: {error}") from None
    for line in lines:
        expected, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise UserError(f"{path}: {name} is not what {SUMS} says: the bundle is damaged")
