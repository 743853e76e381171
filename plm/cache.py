"""The cache folder: what is made once from a corpus or a task and used by every later run of this machine."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plm.errors import UserError
from plm.randomness import stable_hash

REFUSALS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST,
}  # fmt: skip
LOCKLESS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of file systems without locks


class LocklessError(UserError):
    """A file system has no locks."""


def cache_directory() -> Path:
    """$PLM_CACHE, else ~/.cache/plm."""
    return Path(os.environ.get("PLM_CACHE") or Path.home() / ".cache" / "plm")


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, a file or a folder, which `make(temporary)` writes if it is not there yet.

    Processes that begin together wait for the first one. What a killed one has left is never taken for whole.
    Errors: UserError for a cache that cannot be read or written.
    """
    with writable(path.parent):
        if not path.exists():
            with locked(path):
                if not path.exists():
                    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # NumPy would add a suffix
                    shutil.rmtree(temporary, ignore_errors=True)
                    make(temporary)
                    _put(temporary, path)
    return path


def _put(temporary: Path, path: Path) -> None:
    """Gives what is made its name; where another host, whose locks are not seen here, was first, its folder stays."""
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not path.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def remembered(key: list, make: Callable[[], Any]) -> Any:
    """What `make()` finds, as JSON holds it; found before under the same key, it is not made again.

    For small facts that take seconds: without a lock, and a cache that cannot be written only costs time.
    """
    path = cache_directory() / "scans" / f"{stable_hash(*key, bits=128):032x}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(path.read_text("utf-8"))
        if record["key"] == key:
            return record["found"]
    found = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"key": key, "found": found}, file)
        os.replace(file.name, path)
    return found


@contextlib.contextmanager
def writable(directory: Path) -> Iterator[None]:
    """Makes the folder; being refused, there or below, and a full disk become one line about the cache."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise UserError(f"the cache cannot be written ({error}): set PLM_CACHE to a folder of yours") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path.lock` while inside; the kernel lets go of it when a process dies, however it dies.

    Errors: LocklessError on a file system that has none.
    """
    with open(path.with_name(path.name + ".lock"), "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _refuse_in_worker()
                print(f"waiting for another process that is making {path}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
            raise LocklessError(
                f"{path.parent} cannot be locked ({error.strerror}): a folder on a file system with locks is needed;"
                " PLM_CACHE names the cache's"
            ) from error
        yield


def _refuse_in_worker() -> None:
    """Ends a worker that imports its parent's script and so comes to make what the parent is making: both would wait.

    `_inheriting` is how the standard library itself knows this moment.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        print(
            "error: this script opens a corpus when it is imported, and the processes that tokenise import it: put its"
            ' work below if __name__ == "__main__":',
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
