"""Every point of a sweep, resumable, on this machine, a Slurm cluster or TPU virtual machines.

    python -m launch.sweep --config=experiments/compare.py:tiny --root=runs/demo
    python -m launch.sweep --config=... --root=DIR --dry_run      # what would run
    python -m launch.sweep --config=... --root=DIR --status       # how far it is
    python -m launch.sweep --config=... --root=DIR                # again: goes on where it was
    python -m launch.sweep --config=... --root=DIR --retry=failed # those that failed, too
    python -m launch.sweep --config=... --root=DIR --backend=slurm --processes=8   # docs/launch_slurm.md
    python -m launch.sweep --config=... --root=gs://BUCKET/DIR --backend=tpu ...   # docs/launch_tpu.md

An experiment file's `sweep(add, arguments)` calls `add(name, arguments, overrides)` for each point: what stands behind
the colon of its own file, and {dotted key: value}. `--config.KEY=VALUE` overrides a key of every point. With
`--seeds=N` each point runs with seeds 0 .. N-1, as NAME-seed0, ...

Every point is validated before the first one starts. Each has its workdir ROOT/NAME with, beside the run's own files,
`point.json` (what was started, how it ended) and `log.txt` (what it printed). A finished point is skipped; one that was
interrupted is resumed by running `python -m plm.train` again. Exit code 0: every chosen point is finished (Slurm:
submitted, unless --wait); 1: one is not; 2: bad input; 130: interrupted.
"""

import contextlib
import fnmatch
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath

from launch import local, slurm, tpu
from launch.points import RECORD, OnlyOne, Point, Records, read_json, state, table
from plm.command import run as run_command
from plm.errors import UserError
from plm.training import config as configs


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


# -- running -----------------------------------------------------------------------------------------------------------


def _check_same_point(point: Point, workdir: epath.Path, text: str) -> None:
    """Refuses to skip or resume a workdir that was made from another config than the point now has."""
    before = read_json(workdir / RECORD).get("config")
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


def launch(
    points: Sequence[Point], root: epath.PathLike, *, retry: str, chosen: Sequence[Point], backend: "Backend"
) -> int:
    """Validates all points, runs the chosen ones that are not finished, returns the exit code."""
    root, texts = epath.Path(root), {}
    for point in points:
        try:
            texts[point.name] = configs.to_text(configs.load(point.spec, point.overrides))
        except UserError as error:
            raise UserError(f"point {point.name!r}: {error}") from error
    for point in chosen:
        _check_same_point(point, root / point.name, texts[point.name])
    again = ("waiting", "interrupted", *(["failed"] if retry == "failed" else []))
    jobs = backend.jobs()
    # Before the lock is ours: a point that another launcher watches is known by its lock.
    states = {point.name: state(root / point.name, jobs) for point in chosen}
    with OnlyOne(root):
        for point in chosen:
            record = read_json(root / point.name / RECORD)
            if states[point.name] == "running" and record.get("backend") == "local":
                raise UserError(f"{root / point.name} is in use by process {record.get('pid')}")
        todo = [point for point in chosen if states[point.name] in again]
        _watch(backend.run(todo, chosen, Records(root, points, texts)), chosen, root, backend)
        print(table(chosen, root, backend.jobs()), flush=True)
    return backend.exit_code([state(root / point.name, backend.jobs()) for point in chosen])


class Backend:
    """Where points run. A subclass has `run`, and says so if jobs go on after it."""

    def jobs(self):
        """What `points.state` asks about jobs that a scheduler has; None without one."""
        return None

    def commands(self, points: Sequence[Point], root: epath.Path) -> list[str]:
        """For --dry_run: the lines that would be run."""
        raise NotImplementedError

    def run(self, points: Sequence[Point], chosen: Sequence[Point], records: Records) -> Iterator[None]:
        """Runs `points`, those of `chosen` that have to be; writes their records, yields often."""
        raise NotImplementedError

    def exit_code(self, states: Sequence[str]) -> int:
        """0 if all chosen points are as they should be when the command ends."""
        return 0 if all(now == "finished" for now in states) else 1


class Local(Backend):
    """`launch.local`: `workers` points at once, `processes` each."""

    def __init__(self, *, workers: int, processes: int = 1, devices: Sequence[str] | None = None, grace: float = 60.0):
        self.workers, self.processes, self.devices, self.grace = workers, processes, devices, grace

    def _jobs(self, points: Sequence[Point], root: epath.Path) -> list[local.Job]:
        return [
            local.Job(
                point.name,
                point.command(root),
                Path(root / point.name / "log.txt"),
                Path.cwd(),  # relative paths of configs and corpora mean what they mean here
                self.processes,
            )
            for point in points
        ]

    def commands(self, points: Sequence[Point], root: epath.Path) -> list[str]:
        return [shlex.join(command) for job in self._jobs(points, root) for command in job.commands()]

    def run(self, points: Sequence[Point], chosen: Sequence[Point], records: Records) -> Iterator[None]:
        root = records.root

        def started(job: local.Job, pid: int, share: local.Share) -> None:
            records.started(job.name, "local", pid=pid, on=share.text(), command=list(job.command), started=time.time())
            print(f"started  {job.name}  (log: {job.log})", flush=True)

        def ended(job: local.Job, code: int) -> None:
            records.note(job.name, ended=time.time(), return_code=code)
            print(f"{state(root / job.name):8} {job.name}" + (f"  (exit code {code})" if code else ""), flush=True)
            if code > 0:
                for line in job.log.read_text(errors="replace").splitlines()[-5:]:
                    print(f"    {line}", flush=True)

        return local.run(
            self._jobs(points, root),
            workers=self.workers,
            on_start=started,
            on_end=ended,
            devices=self.devices,
            grace_seconds=self.grace,
        )


class Slurm(Backend):
    """`launch.slurm`: one array job, with the command's end or (`wait`) without it."""

    def __init__(self, options: slurm.Options, *, wait: bool):
        self.options, self.wait = options, wait

    def jobs(self):
        return slurm.states()

    def commands(self, points: Sequence[Point], root: epath.Path) -> list[str]:
        script = slurm.script_path(root)
        return [f"# {script}", slurm.script(points, root, self.options), shlex.join(slurm.submit_command(script))]

    def run(self, points: Sequence[Point], chosen: Sequence[Point], records: Records) -> Iterator[None]:
        if points:
            number = slurm.submit(points, records, self.options)
            print(f"submitted  job {number}, {len(points)} points; --status shows them, scancel {number} ends them")
        while self.wait and any(
            state(records.root / point.name, jobs) in ("queued", "running")
            for jobs in [slurm.states()]
            for point in chosen
        ):
            yield
            time.sleep(self.options.poll_seconds)

    def exit_code(self, states: Sequence[str]) -> int:
        good = ("finished",) if self.wait else ("finished", "queued", "running")
        return 0 if all(now in good for now in states) else 1


class Tpu(Backend):
    """`launch.tpu`: a queued resource for each of `workers` points at once."""

    def __init__(self, options: tpu.Options, *, workers: int):
        self.options, self.workers = options, workers

    def commands(self, points: Sequence[Point], root: epath.Path) -> list[str]:
        return [line for point in points for line in tpu.dry_run(point, root, self.options)]

    def run(self, points: Sequence[Point], chosen: Sequence[Point], records: Records) -> Iterator[None]:
        return tpu.run(points, records, self.options, workers=self.workers)


def _watch(
    steps: Iterator[None], points: Sequence[Point], root: epath.Path, backend: "Backend", every_seconds: float = 30.0
) -> None:
    """Draws the table again and again while the jobs run: in place on a terminal, now and then elsewhere."""
    live, last, shown = sys.stdout.isatty(), time.monotonic(), 0.0
    with contextlib.closing(steps):
        for _ in steps:
            now = time.monotonic()
            if live and now - shown >= 2.0:
                text = table(points, root, backend.jobs())
                # Down from here, then the cursor goes back, so that messages in between are written over the table.
                print("\x1b[J" + text + f"\x1b[{text.count(chr(10))}A\r", end="", flush=True)
                shown = now
            elif not live and now - last >= every_seconds:
                print(table(points, root, backend.jobs()), flush=True)
                last = now
    if live:
        print("\x1b[J", end="", flush=True)


_CONFIG = None
_FLAGS = flags.FLAGS


def define_flags() -> configs.ConfigFlags:
    """The command's flags."""
    flags.DEFINE_string("root", None, "folder of the sweep, a workdir for each point; gs:// for --backend=tpu")
    flags.DEFINE_enum("backend", "local", ["local", "slurm", "tpu"], "where points run")
    flags.DEFINE_integer("seeds", 0, "seeds for each point; 0 = the one of its config", lower_bound=0)
    flags.DEFINE_list("only", [], "names or patterns of the points to run or show")
    flags.DEFINE_enum("retry", "none", ["none", "failed"], "failed: points that failed run again")
    flags.DEFINE_integer("workers", 1, "points that run at once", lower_bound=1)
    flags.DEFINE_integer("processes", 1, "local and slurm: processes for each point", lower_bound=1)
    flags.DEFINE_list(
        "devices", None, "local: numbers of the CUDA devices that the workers share out; all see all without"
    )
    flags.DEFINE_integer(
        "grace_seconds", 120, "what a point that is told to stop has for its checkpoint", lower_bound=1
    )
    flags.DEFINE_bool("dry_run", False, "prints what would be run and runs nothing")
    flags.DEFINE_bool("status", False, "prints the table and runs nothing")
    slurm.define_flags()
    tpu.define_flags()
    return configs.define_flags()


def backend_of(values: flags.FlagValues) -> Backend:
    """Where the flags say; a flag of another backend is refused."""
    own = {"local": {"devices", "processes"}, "slurm": {*slurm.FLAGS, "processes"}, "tpu": set(tpu.FLAGS)}
    allowed = own[values.backend]
    for name in sorted(set().union(*own.values()) - allowed):
        if values[name].present:
            raise UserError(f"--{name} is not for --backend={values.backend}")
    if values.backend != "tpu" and "://" in values.root:
        raise UserError(f"--root={values.root!r} is not on a file system; --backend={values.backend} needs a folder")
    if values.backend == "slurm":
        options = slurm.Options.of(values)
        return Slurm(options, wait=values.wait)
    if values.backend == "tpu":
        return Tpu(tpu.Options.of(values), workers=values.workers)
    return Local(workers=values.workers, processes=values.processes, devices=values.devices, grace=values.grace_seconds)


def main() -> int:
    """The command; returns its exit code."""
    points = read_points(_CONFIG.spec, _CONFIG.overrides, _FLAGS.seeds)
    chosen, backend = choose(points, _FLAGS.only), backend_of(_FLAGS)
    root = epath.Path(_FLAGS.root if "://" in _FLAGS.root else Path(_FLAGS.root).expanduser().resolve())
    if _FLAGS.status:
        jobs = backend.jobs()
        print(table(chosen, root, jobs))
        return 0 if all(state(root / point.name, jobs) == "finished" for point in chosen) else 1
    if _FLAGS.dry_run:
        for point in chosen:
            configs.load(point.spec, point.overrides)
        print("\n".join(backend.commands(chosen, root)))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the points' processes, too
    try:
        return launch(points, root, retry=_FLAGS.retry, chosen=chosen, backend=backend)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    _CONFIG = define_flags()
    run_command(main, required=("config", "root"))
