"""A sweep's points, and what is known of each by the files in its workdir, whoever runs it."""

import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from plm.command import is_failure
from plm.errors import UserError
from plm.training import config as configs

TRAIN = (sys.executable, "-m", "plm.train")
EVALUATE = (sys.executable, "-m", "plm.evaluate")
STATES = ("finished", "running", "queued", "interrupted", "failed", "waiting")
RECORD = "point.json"


@dataclasses.dataclass(frozen=True)
class Point:
    """A run, or a measurement of another point's model, whose rows go to that one's workdir.

    workdir: where its own files go; spec: FILE.py:arguments, "" for a measurement; overrides: {dotted key: value or its
    text}; start: the point whose model it starts from or measures, as its parent's name; model: that one's workdir;
    measure: flags of plm.evaluate, of a run for what is measured when it is trained.
    """

    name: str
    workdir: epath.Path
    spec: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str = ""
    model: str = ""
    measure: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        return bool(self.spec)

    @property
    def source(self) -> str:
        """The workdir of the point whose model it starts from or measures; "" without one."""
        folder, slash, name = self.model.rpartition("/")
        return folder + slash + name.partition("@")[0]

    def flags(self) -> list[str]:
        if not self.trains:
            return [f"--model={self.model}", *self.measure]
        start = {"init.from": self.model} if self.model else {}
        settings = {**self.overrides, **start}
        given = (configs.as_flag(key, value) for key, value in settings.items())
        return [f"--config={self.spec}", *given, *self.measure]

    def text(self) -> str:
        """One line: the name and the flags."""
        return f"{self.name}: {shlex.join(self.flags())}"

    def command(self, python: Sequence[str] | None = None) -> tuple[str, ...]:
        """What does it; python: what stands for this interpreter."""
        module = TRAIN if self.trains else EVALUATE
        program = (*python, *module[1:]) if python else module
        return (*program, *self.flags(), *([f"--workdir={self.workdir}"] if self.trains else []))


def by_seed(points: Sequence[Point]) -> list[Point]:
    """All points of the first seed, then those of the second one, and so on; a parent stands before its children.

    Points that differ only by their seeds so do not begin together, and what is compiled for the first one is there for
    the others; a sweep that is cut short has few seeds of everything, not everything of few.
    """
    keys: dict[str, tuple[int, ...]] = {}
    for point in points:  # a parent stands before its children
        seed = point.overrides.get("seed")
        # As text it is the user's, the same for all and not checked yet.
        keys[point.name] = (*keys.get(point.start, ()), seed if isinstance(seed, int) else 0)
    return sorted(points, key=lambda point: keys[point.name])


def stages(points: Sequence[Point]) -> list[list[Point]]:
    """The points that wait for nothing, those that start from one of them, and so on."""
    depth: dict[str, int] = {}
    found: list[list[Point]] = []
    for point in points:  # a parent stands before its children
        depth[point.name] = 1 + depth.get(point.start, -1)
        while len(found) <= depth[point.name]:
            found.append([])
        found[depth[point.name]].append(point)
    return [stage for stage in found if stage]


# point.json: what was started and how it ended


def read_json(path: epath.Path) -> dict:
    """The object in a file; {} if there is none."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: epath.Path, value: Any) -> None:
    """Atomically: on object storage every write is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1) + "\n"
    if "://" in str(path):
        path.write_text(text)
        return
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


class Records:
    """Writes point.json of the points of a launch.

    texts: {name: what the point is made of, as text}, by which a later launch knows the same point.
    """

    def __init__(self, texts: dict[str, str]):
        self._texts = texts

    def started(self, point: Point, backend: str, **facts) -> None:
        """facts: pid or job, and where it runs (`on`)."""
        attempts = read_json(point.workdir / RECORD).get("attempts", 0) + 1
        fresh = {"spec": point.spec, "overrides": point.overrides, "config": self._texts[point.name]}
        self.note(point, **fresh, backend=backend, attempts=attempts, return_code=None, **facts)

    def note(self, point: Point, **facts) -> None:
        path = point.workdir / RECORD
        write_json(path, {**read_json(path), **facts})


def _alive(pid: int | None, arguments: Sequence[str]) -> bool:
    """Whether the process is still at work; another one may have got its number since."""
    if not pid:
        return False
    command = Path(f"/proc/{pid}/cmdline")
    if Path("/proc/self/cmdline").exists():
        try:
            return command.read_bytes().startswith("\0".join(arguments).encode())
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def state(workdir: epath.PathLike, jobs: Callable[[str], str] | None = None) -> str:
    """One of STATES. jobs: a scheduler's word on a job, as one of them ("interrupted": it knows no such job)."""
    workdir = epath.Path(workdir)
    record = read_json(workdir / RECORD)
    if not record:
        return "waiting"
    code = record.get("return_code")
    if code is None and record.get("backend") == "slurm":
        try:
            code = int((workdir / "return_code").read_text())  # the job wrote it
        except (FileNotFoundError, ValueError):
            return jobs(record["job"]) if jobs else "running"
    elif code is None and record.get("backend") == "tpu":
        return "running" if is_locked(workdir.parent) else "interrupted"
    elif code is None:
        return "running" if _alive(record.get("pid"), record.get("command", [])) else "interrupted"
    if code == 0:
        return "finished"
    return "failed" if is_failure(code) else "interrupted"


def progress(workdir: epath.Path) -> dict[str, Any]:
    """{step, total, loss, tokens_per_second}, as far as the run's files tell."""
    result: dict[str, Any] = {"total": read_json(workdir / "config.json").get("total_steps")}
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 4096, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return result
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # torn, or cut by the seek
        if isinstance(values, dict):
            result["step"] = values.get("step", result.get("step"))
            for ours, theirs in (("loss", "train/loss"), ("tokens_per_second", "train/tokens_per_second")):
                result[ours] = values.get(theirs, result.get(ours))
    return result


def table(points: Sequence[Point], jobs: Callable[[str], str] | None = None) -> str:
    """Name, state, step, loss and speed of every point, and where it runs while it does."""
    rows = [("point", "state", "step", "loss", "tokens/s", "on")]
    for point in points:
        workdir = point.workdir
        known, now = progress(workdir), state(workdir, jobs)
        step = "" if known.get("step") is None else f"{known['step']}/{known['total'] or '?'}"
        loss = known.get("loss")
        speed = known.get("tokens_per_second")
        rows.append(
            (
                point.name,
                now,
                step,
                "" if loss is None else f"{loss:.4f}",
                "" if speed is None else f"{speed:,.0f}",
                read_json(workdir / RECORD).get("on", "") if now in ("running", "queued") else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# One launcher at a time


def _lock_path(root: epath.Path) -> Path:
    if "://" not in str(root):
        return Path(root) / ".sweep.lock"
    name = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"plm-sweep-{os.getuid()}-{name}.lock"


class AtWorkError(UserError):
    """Another launcher holds the folder."""


class OnlyOne:
    """Refuses a second launcher on the same root (in a bucket: on this machine)."""

    def __init__(self, root: epath.Path):
        self._root = root

    def __enter__(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_path(self._root).open("w")
        except OSError as error:
            raise UserError(f"--root={str(self._root)!r} cannot be written: {error.strerror or error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise AtWorkError(f"--root={str(self._root)!r}: another launch.sweep is at work there") from None

    def __exit__(self, *_) -> None:
        self._lock.close()


def is_locked(root: epath.Path) -> bool:
    """Whether a launcher is at work there."""
    try:
        with _lock_path(root).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
