"""Every point of a sweep, resumable.

    python -m launch.sweep --config=experiments/compare.py:tiny --root=runs/demo
    python -m launch.sweep --config=... --root=DIR --dry_run      # what would run
    python -m launch.sweep --config=... --root=DIR --status       # how far it is
    python -m launch.sweep --config=... --root=DIR                # again: goes on where it was
    python -m launch.sweep --config=... --root=DIR --retry=failed # those that failed, too

An experiment file's `sweep(add, arguments)` calls `add(name, arguments, overrides)` for each point: what stands behind
the colon of its own file, and {dotted key: value}. `--config.KEY=VALUE` overrides a key of every point. With
`--seeds=N` each point runs with seeds 0 .. N-1, as NAME-seed0, ...

Every point is validated before the first one starts. Each has its workdir ROOT/NAME with, beside the run's own files,
`point.json` (what was started, how it ended) and `log.txt` (what it printed). A finished point is skipped; one that was
interrupted is resumed by running `python -m plm.train` again. Exit code 0: every chosen point is finished; 1: one is
not; 2: bad input.
"""

import contextlib
import dataclasses
import fcntl
import fnmatch
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import local
from plm.command import run as run_command
from plm.errors import UserError
from plm.training import config as configs

TRAIN = (sys.executable, "-m", "plm.train")
STATES = ("finished", "running", "interrupted", "failed", "waiting")


@dataclasses.dataclass(frozen=True)
class Point:
    """name: of its workdir; spec: FILE.py:arguments; overrides: {dotted key: value or its text}."""

    name: str
    spec: str
    overrides: dict[str, Any]

    def flags(self) -> list[str]:
        return [f"--config={self.spec}", *(configs.as_flag(key, value) for key, value in self.overrides.items())]

    def text(self) -> str:
        """One line: the name and the flags."""
        return f"{self.name}: {shlex.join(self.flags())}"


def read_points(spec: str, overrides: dict[str, Any] | None = None, seeds: int = 0) -> list[Point]:
    """The points of the sweep that `FILE.py:arguments` names, each with the overrides that hold for all.

    seeds: 0 leaves the config's seed, N > 0 gives N points for each.

    Raises:
      UserError: a file without a sweep, a name twice or unfit for a folder, no points.
    """
    path, arguments = configs.split_spec(spec)
    module = configs.read_file(path)
    if not callable(getattr(module, "sweep", None)):
        raise UserError(f"--config={path!r} defines no sweep(add, arguments); python -m plm.train runs a single config")
    points: dict[str, Point] = {}

    def add(name: str, arguments: str = "", point_overrides: dict[str, Any] | None = None) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.=+-]*", name):
            raise UserError(f"point {name!r} of {path}: a name is letters, digits and _ . = + -")
        both = {**(point_overrides or {}), **(overrides or {})}
        clash = [key for key in overrides or {} if key in (point_overrides or {})]
        if clash:
            raise UserError(f"--config.{clash[0]}: point {name!r} of the sweep sets this key itself")
        point_spec = f"{path}:{arguments}" if arguments else path
        named = [(f"{name}-seed{seed}", {**both, "seed": seed}) for seed in range(seeds)] or [(name, both)]
        for full_name, settings in named:
            if full_name in points:
                raise UserError(f"point {full_name!r} of {path} is added twice")
            points[full_name] = Point(full_name, point_spec, settings)

    if seeds and "seed" in (overrides or {}):
        raise UserError("--seeds and --config.seed exclude each other")
    module.sweep(add, arguments)
    if not points:
        raise UserError(f"the sweep of {spec!r} has no points")
    return list(points.values())


def choose(points: Sequence[Point], only: Sequence[str]) -> list[Point]:
    """The points whose names match one of the patterns `only` (`*` and `?` as in a shell); all without patterns."""
    for pattern in only:
        if not any(fnmatch.fnmatchcase(point.name, pattern) for point in points):
            raise UserError(f"--only={pattern!r} matches no point; they are {', '.join(p.name for p in points)}")
    return [p for p in points if not only or any(fnmatch.fnmatchcase(p.name, pattern) for pattern in only)]


# -- what is known of a point: its point.json --------------------------------------------------------------------------


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _alive(pid: int | None, workdir: Path) -> bool:
    """Whether the process still trains there; another one may have got its number since."""
    if not pid:
        return False
    command = Path(f"/proc/{pid}/cmdline")
    if Path("/proc/self/cmdline").exists():
        try:
            return str(workdir).encode() in command.read_bytes()
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def state(workdir: Path) -> str:
    """One of STATES."""
    record = _read_json(workdir / "point.json")
    code = record.get("return_code")
    if not record:
        return "waiting"
    if code is None:
        return "running" if _alive(record.get("pid"), workdir) else "interrupted"
    # A signal, or a Ctrl-C, is an interruption and not a failure.
    return "finished" if code == 0 else "interrupted" if code < 0 or code == 130 else "failed"


def progress(workdir: Path) -> dict[str, Any]:
    """{step, total, loss, tokens_per_second}, as far as the run's files tell."""
    result: dict[str, Any] = {"total": _read_json(workdir / "config.json").get("total_steps")}
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


def table(points: Sequence[Point], root: Path) -> str:
    """Name, state, step, loss and speed of every point."""
    rows = [("point", "state", "step", "loss", "tokens/s")]
    for point in points:
        workdir = root / point.name
        known = progress(workdir)
        step = "" if known.get("step") is None else f"{known['step']}/{known['total'] or '?'}"
        loss = known.get("loss")
        speed = known.get("tokens_per_second")
        rows.append(
            (
                point.name,
                state(workdir),
                step,
                "" if loss is None else f"{loss:.4f}",
                "" if speed is None else f"{speed:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# -- running -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _only_one(root: Path):
    """Refuses a second launcher on the same root."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".sweep.lock").open("w")
    except OSError as error:
        raise UserError(f"--root={str(root)!r} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--root={str(root)!r}: another launch.sweep is at work there") from None
        yield


def _check_same_point(point: Point, workdir: Path, text: str) -> None:
    """Refuses to skip or resume a workdir that was made from another config than the point now has."""
    before = _read_json(workdir / "point.json").get("config")
    if before is None or before == text:
        return
    old, new = (dict(line.split(" = ", 1) for line in t.splitlines()) for t in (before, text))
    free = tuple(name for name in configs.MAY_CHANGE)
    changed = [
        f"{key}: {old.get(key, '(no such key)')} -> {new.get(key, '(no such key)')}"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and not key.startswith(free)
    ]
    if changed:
        raise UserError(f"{workdir} was made by another {point.name!r}: {'; '.join(changed)}. Choose another --root")


def launch(points: Sequence[Point], root: Path, *, retry: str, workers: int, chosen: Sequence[Point]) -> int:
    """Validates all points, runs the chosen ones that are not finished, returns the exit code."""
    texts = {}
    for point in points:
        try:
            texts[point.name] = configs.to_text(configs.load(point.spec, point.overrides))
        except UserError as error:
            raise UserError(f"point {point.name!r}: {error}") from error
    with _only_one(root):
        todo = []
        for point in chosen:
            workdir = root / point.name
            _check_same_point(point, workdir, texts[point.name])
            now = state(workdir)
            if now == "running":
                raise UserError(f"{workdir} is in use by process {_read_json(workdir / 'point.json').get('pid')}")
            if now in ("waiting", "interrupted") or (now == "failed" and retry == "failed"):
                todo.append(point)
        by_name = {point.name: point for point in points}

        def record(job: local.Job, **facts) -> None:
            path = root / job.name / "point.json"
            point = by_name[job.name]
            fresh = {"spec": point.spec, "overrides": point.overrides, "config": texts[job.name]}
            _write_json(path, {**_read_json(path), **fresh, "command": list(job.command), **facts})

        def started(job: local.Job, pid: int) -> None:
            attempts = _read_json(root / job.name / "point.json").get("attempts", 0) + 1
            record(job, pid=pid, attempts=attempts, started=time.time(), return_code=None)
            print(f"started  {job.name}  (log: {job.log})", flush=True)

        def ended(job: local.Job, code: int) -> None:
            record(job, ended=time.time(), return_code=code)
            print(f"{state(root / job.name):8} {job.name}" + (f"  (exit code {code})" if code else ""), flush=True)
            if code > 0:
                for line in job.log.read_text(errors="replace").splitlines()[-5:]:
                    print(f"    {line}", flush=True)

        jobs = [
            local.Job(
                point.name,
                (*TRAIN, *point.flags(), f"--workdir={root / point.name}"),
                root / point.name / "log.txt",
                Path.cwd(),  # relative paths of configs and corpora mean what they mean here
            )
            for point in todo
        ]
        _watch(local.run(jobs, workers=workers, on_start=started, on_end=ended), chosen, root)
    print(table(chosen, root), flush=True)
    return 0 if all(state(root / point.name) == "finished" for point in chosen) else 1


def _watch(steps, points: Sequence[Point], root: Path, every_seconds: float = 30.0) -> None:
    """Draws the table again and again while the jobs run: in place on a terminal, now and then elsewhere."""
    live, last, shown = sys.stdout.isatty(), time.monotonic(), 0.0
    with contextlib.closing(steps):
        for _ in steps:
            now = time.monotonic()
            if live and now - shown >= 2.0:
                text = table(points, root)
                # Down from here, then the cursor goes back, so that messages in between are written over the table.
                print("\x1b[J" + text + f"\x1b[{text.count(chr(10))}A\r", end="", flush=True)
                shown = now
            elif not live and now - last >= every_seconds:
                print(table(points, root), flush=True)
                last = now
    if live:
        print("\x1b[J", end="", flush=True)


_CONFIG = None
_FLAGS = flags.FLAGS


def define_flags() -> configs.ConfigFlags:
    """The command's flags."""
    flags.DEFINE_string("root", None, "folder of the sweep: a workdir for each point")
    flags.DEFINE_enum("backend", "local", ["local"], "where points run")
    flags.DEFINE_integer("seeds", 0, "seeds for each point; 0 = the one of its config", lower_bound=0)
    flags.DEFINE_list("only", [], "names or patterns of the points to run or show")
    flags.DEFINE_enum("retry", "none", ["none", "failed"], "failed: points that failed run again")
    flags.DEFINE_integer("workers", 1, "points that run at once, each with its share of the cores", lower_bound=1)
    flags.DEFINE_bool("dry_run", False, "prints the commands and runs nothing")
    flags.DEFINE_bool("status", False, "prints the table and runs nothing")
    return configs.define_flags()


def main() -> int:
    """The command; returns its exit code."""
    points = read_points(_CONFIG.spec, _CONFIG.overrides, _FLAGS.seeds)
    chosen, root = choose(points, _FLAGS.only), Path(_FLAGS.root).expanduser().resolve()
    if _FLAGS.status:
        print(table(chosen, root))
        return 0 if all(state(root / point.name) == "finished" for point in chosen) else 1
    if _FLAGS.dry_run:
        for point in chosen:
            configs.load(point.spec, point.overrides)
            print(shlex.join([*TRAIN, *point.flags(), f"--workdir={root / point.name}"]))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the points' processes, too
    try:
        return launch(points, root, retry=_FLAGS.retry, workers=_FLAGS.workers, chosen=chosen)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    _CONFIG = define_flags()
    run_command(main, required=("config", "root"))
