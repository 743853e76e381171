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

A point may start from another one (`Add.__call__`): it runs when that one is finished. A point that several sweeps need
lies in a folder that they share, --shared, beside ROOT by default; whichever sweep comes first runs it. Where a
sweep returns a `plm.reporting.studies.Study`, ROOT/study.json tells `plm.report` what its points are cells of.

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
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath

from launch import local, slurm, tpu
from launch.points import (
    RECORD,
    AtWorkError,
    OnlyOne,
    Point,
    Records,
    by_seed,
    read_json,
    stages,
    state,
    table,
    write_json,
)
from plm.command import run as run_command
from plm.errors import UserError
from plm.reporting import studies
from plm.reporting.studies import Study
from plm.training import config as configs

WAIT_SECONDS = 2.0  # between two looks at what another launcher does


class Add:
    """What an experiment file's `sweep(add, arguments)` makes its points with.

    seeds: of --seeds, 0 if it is not given.
    """

    def __init__(self, path: str, overrides: dict[str, Any], seeds: int, root: epath.Path, shared: epath.Path):
        self.seeds = seeds
        self._path, self._overrides, self._root, self._shared = path, overrides, root, shared
        self.points: dict[str, Point] = {}
        self._configs: dict[str, Any] = {}
        self._taken: set[str] = set()

    def given(self, key: str) -> str:
        """What the user overrides a key with, for a sweep that reads it itself; "" without."""
        self._taken.add(key)
        return str(self._overrides.get(key, ""))

    def __call__(
        self,
        name: str,
        arguments: str = "",
        overrides: dict[str, Any] | None = None,
        *,
        file: str = "",
        defaults: dict[str, Any] | None = None,
        start: str = "",
        step: int | None = None,
        shared: bool = False,
        measure: Sequence[str] = (),
    ) -> str:
        """Adds a run: FILE:arguments with overrides; returns its full name.

        file: another experiment file than the sweep's own; defaults: overrides that the user may override; start: the
        full name of an earlier point whose model it starts from; step: of another checkpoint of that than the newest;
        shared: it is one that other sweeps need too; measure: flags of plm.evaluate, run when it is trained.

        A point whose overrides have a seed is one point, whatever --seeds says. What the user overrides in `data` goes
        where it is read: `data.task.*` to runs on tasks, the rest of it to those that read text; none of it to runs
        that start from another point and have a text of their own.
        """
        own = dict(overrides or {})
        seeds = [None] if "seed" in own else list(range(self.seeds)) or [None]
        spec = f"{file or self._path}:{arguments}" if arguments else file or self._path
        for number in seeds:
            full = name if number is None else f"{name}-seed{number}"
            settings = {**(defaults or {}), **own, **self._of_user(full, spec, own, start)}
            settings |= {} if number is None else {"seed": number}
            at = "" if step is None else f"@{step}"
            self._add(full, spec=spec, overrides=settings, start=start, at=at, shared=shared, measure=measure)
        return full

    def measure(self, name: str, model: str, flags: Sequence[str], at: str = "") -> str:
        """Adds a measurement of an earlier point's model: flags of plm.evaluate; its rows lie in that one's workdir.

        at: @STEP or @all, for other checkpoints than the newest.
        """
        self._add(name, spec="", overrides={}, start=model, at=at, shared=False, measure=flags)
        return name

    def _add(
        self, name: str, *, spec: str, overrides: dict, start: str, at: str, shared: bool, measure: Sequence[str]
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.=+-]*", name):
            raise UserError(f"point {name!r} of {self._path}: a name is letters, digits and _ . = + -")
        if name in self.points:
            raise UserError(f"point {name!r} of {self._path} is added twice")
        if start and start not in self.points:
            raise UserError(f"point {name!r} of {self._path} starts from {start!r}, which is no point before it")
        model = f"{self.points[start].workdir}{at}" if start else ""
        workdir = (self._shared if shared else self._root) / name
        self.points[name] = Point(name, workdir, spec, overrides, start, model, tuple(measure))

    def _of_user(self, name: str, spec: str, own: dict[str, Any], start: str) -> dict[str, Any]:
        """The user's overrides that are for this point."""
        of_data = any(key.startswith("data.") for key in self._overrides)
        on_task = of_data and self._is_task(name, spec, own, start)
        on_own_text = bool(start) and "data.source" in own
        found = {}
        for key, value in self._overrides.items():
            elsewhere = key.startswith("data.task.") != on_task or on_own_text
            if key.startswith("data.") and key != "data.workers" and elsewhere:
                continue
            self._taken.add(key)
            if key in own:
                raise UserError(f"--config.{key}: point {name!r} of the sweep sets this key itself")
            found[key] = value
        return found

    def _is_task(self, name: str, spec: str, own: dict[str, Any], start: str) -> bool:
        source = None
        if not start:
            own = own | {key: self._overrides[key] for key in ("init.from",) if key in self._overrides}
        elif start in self._configs:
            source = self._configs[start]
        self._configs[name] = configs.load(spec, own, complete=False, source=source)
        return self._configs[name].data.layout == "task"

    def check(self, spec: str) -> None:
        """Errors: UserError for no points, and an override that is for none."""
        if not self.points:
            raise UserError(f"the sweep of {spec!r} has no points")
        for key in set(self._overrides) - self._taken:
            if key.startswith("data."):
                what = "runs on a task" if key.startswith("data.task.") else "reads text"
                raise UserError(f"--config.{key}: no point of {spec!r} {what}")


def shared_folder(root: epath.Path, shared: str = "") -> epath.Path:
    """Where the points lie that sweeps share; beside `root` by default."""
    return epath.Path(shared) if shared else root.parent / "shared"


def read_points(
    spec: str, root: epath.Path, overrides: dict[str, Any] | None = None, seeds: int = 0, shared: str = ""
) -> tuple[list[Point], Study | None]:
    """The points of the sweep that `FILE.py:arguments` names, parents first, and what they are cells of.

    overrides: those that hold for all; seeds: 0 leaves the config's seed, N > 0 gives N points for each.

    Raises:
      UserError: a file without a sweep, a name twice or unfit for a folder, no points.
    """
    path, arguments = configs.split_spec(spec)
    module = configs.read_file(path, needs="sweep")
    if seeds and "seed" in (overrides or {}):
        raise UserError("--seeds and --config.seed exclude each other")
    add = Add(path, overrides or {}, seeds, root, shared_folder(root, shared))
    study = module.sweep(add, arguments)
    add.check(spec)
    return list(add.points.values()), study


def choose(points: Sequence[Point], only: Sequence[str]) -> list[Point]:
    """The points whose names match one of the patterns `only` (`*` and `?` as in a shell), and those that they start
    from; all without patterns."""
    for pattern in only:
        if not any(fnmatch.fnmatchcase(point.name, pattern) for point in points):
            raise UserError(f"--only={pattern!r} matches no point; they are {', '.join(p.name for p in points)}")
    wanted = {p.name for p in points if not only or any(fnmatch.fnmatchcase(p.name, pattern) for pattern in only)}
    for point in reversed(points):
        if point.name in wanted and point.start:
            wanted.add(point.start)
    return [point for point in points if point.name in wanted]


# -- running -----------------------------------------------------------------------------------------------------------


def _check_same_point(point: Point, text: str) -> None:
    """Refuses to skip or resume a workdir that was made from another config than the point now has."""
    before = read_json(point.workdir / RECORD).get("config")
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
        raise UserError(
            f"{point.workdir} was made by another {point.name!r}: {'; '.join(changed)}. Choose another --root"
            " (--shared, for points that sweeps share)"
        )


def validate(points: Sequence[Point], *, complete: bool = True) -> dict[str, str]:
    """{name: what the point is made of, as text}: the config of a run, the flags of a measurement.

    complete: see `plm.training.config.validate`.

    Raises:
      UserError: the first thing that is wrong, and with which point.
    """
    kinds: dict[tuple, str] = {}  # what points have in common but their seeds -> the first of them
    kind_of, made, texts = {}, {}, {}
    for point in points:
        if not point.trains:
            texts[point.name] = "".join(f"{key} = {value!r}\n" for key, value in _measured(point))
            continue
        own = {key: value for key, value in point.overrides.items() if key == "seed"}
        own |= {"init.from": point.model} if point.start else {}
        shared = repr(sorted((key, value) for key, value in point.overrides.items() if key != "seed"))
        kind = kind_of[point.name] = (point.spec, shared, *own, kind_of.get(point.start))
        if kind in kinds:
            made[point.name] = _with(made[kinds[kind]], own)
        else:
            source = made[point.start] if point.start else None
            try:
                made[point.name] = configs.load(
                    point.spec, {**point.overrides, **own}, complete=complete, source=source
                )
            except UserError as error:
                raise UserError(f"point {point.name!r}: {error}") from error
            kinds.setdefault(kind, point.name)
        texts[point.name] = configs.to_text(made[point.name])
    return texts


def _with(config, settings: Mapping[str, Any]):
    """A copy with other values; nothing else depends on them."""
    config = config.copy_and_resolve_references().unlock()
    configs.apply(config, settings)
    return config.lock()


def _measured(point: Point) -> list[tuple[str, str]]:
    return [("model", point.model), *(tuple(flag.removeprefix("--").partition("=")[::2]) for flag in point.measure)]


def launch(
    points: Sequence[Point],
    root: epath.Path,
    *,
    retry: str,
    chosen: Sequence[Point],
    backend: "Backend",
    study: Study | None = None,
) -> int:
    """Validates all points, runs the chosen ones that are not finished, returns the exit code."""
    texts = validate(points)
    for point in chosen:
        _check_same_point(point, texts[point.name])
    again = ("waiting", "interrupted", *(["failed"] if retry == "failed" else []))
    with _Folders() as folders:
        folders.take(root)
        for point in chosen:
            # The second look: the other launcher may have ended between the first one and our lock.
            if _in_use(point) and folders.is_ours(point.workdir.parent) and _in_use(point):
                raise UserError(f"{point.workdir} is in use by process {read_json(point.workdir / RECORD).get('pid')}")
        if study is not None:
            study.models = list(dict.fromkeys(point.start for point in points if point.start))
            write_json(root / studies.FILE, study.record({point.name: point.workdir for point in points}, root))
        _watch(_in_turns(chosen, again, folders, backend, Records(texts)), chosen, backend)
        print(table(chosen, backend.jobs()), flush=True)
    return backend.exit_code([state(point.workdir, backend.jobs()) for point in chosen])


class _Folders:
    """The folders that this launcher has for itself until it ends."""

    def __init__(self):
        self._ours, self._locks = set(), contextlib.ExitStack()

    def __enter__(self) -> "_Folders":
        return self

    def __exit__(self, *_) -> None:
        self._locks.close()

    def take(self, folder: epath.Path) -> None:
        """Errors: AtWorkError while another launcher has it."""
        if folder not in self._ours:
            self._locks.enter_context(OnlyOne(folder))
            self._ours.add(folder)

    def is_ours(self, folder: epath.Path) -> bool:
        """Takes it unless another launcher has it."""
        with contextlib.suppress(AtWorkError):
            self.take(folder)
        return folder in self._ours


def _in_use(point: Point) -> bool:
    """By a process of a launcher on this machine."""
    return read_json(point.workdir / RECORD).get("backend") == "local" and state(point.workdir) == "running"


def _in_turns(
    chosen: Sequence[Point], again: Sequence[str], folders: _Folders, backend: "Backend", records: Records
) -> Iterator[None]:
    """Runs the points whose state is in `again`. Those in a folder where another launcher is at work, and what starts
    from them, have their turn when it has finished them, or has gone and left them to us."""

    def needed(point: Point, jobs) -> str:
        """ "run", "wait" (for another launcher, or for the process that one left), or "" for neither."""

        def look() -> str:
            now, on = state(point.workdir, jobs), read_json(point.workdir / RECORD).get("backend")
            return on if now == "running" and on in ("local", "tpu") else "run" if now in again else ""

        if point.name in handed or not look():
            return ""
        if not folders.is_ours(point.workdir.parent):
            return "wait"
        now = look()  # again: the other launcher may have finished it before it let go of the folder
        # A TPU whose launcher is gone, since its folder is ours, is watched by nobody.
        return {"local": "wait", "tpu": "run"}.get(now, now)

    handed: set[str] = set()
    told: set[str] = set()
    while True:
        jobs, theirs, blocked, todo = backend.jobs(), [], set(), []
        for point in chosen:  # a parent stands before its children
            need = needed(point, jobs)
            if need == "wait":
                theirs.append(point)
            if need == "wait" or point.start in blocked:
                blocked.add(point.name)
            elif need == "run":
                todo.append(point)
        handed |= {point.name for point in todo}
        for point in theirs:
            if point.name not in told:
                told.add(point.name)
                print(f"waiting  {point.name}: another launch.sweep is at work in {point.workdir.parent}", flush=True)
        yield from backend.run_all(todo, chosen, records)
        if not theirs:
            return
        while all(needed(point, jobs) == "wait" for point in theirs):
            yield
            time.sleep(WAIT_SECONDS)
            jobs = backend.jobs()


class Backend:
    """Where points run. A subclass has `run`, and says so if jobs go on after it."""

    def jobs(self):
        """What `points.state` asks about jobs that a scheduler has; None without one."""
        return None

    def commands(self, points: Sequence[Point]) -> list[str]:
        """For --dry_run: the lines that would be run."""
        raise NotImplementedError

    def run(self, points: Sequence[Point], records: Records) -> Iterator[None]:
        """Runs `points`, none of which waits for another; writes their records, yields often."""
        raise NotImplementedError

    def run_all(self, points: Sequence[Point], chosen: Sequence[Point], records: Records) -> Iterator[None]:
        """Runs `points`, those of `chosen` that have to be, each when the one that it starts from is finished."""
        by_name = {point.name: point for point in chosen}
        for stage in stages(points):
            ready = []
            for point in stage:
                if point.start and state(by_name[point.start].workdir, self.jobs()) != "finished":
                    self._say_waiting(point)
                else:
                    ready.append(point)
            yield from self.run(ready, records)

    @staticmethod
    def _say_waiting(point: Point) -> None:
        print(f"waiting  {point.name}: {point.start} is not finished", flush=True)

    def exit_code(self, states: Sequence[str]) -> int:
        """0 if all chosen points are as they should be when the command ends."""
        return 0 if all(now == "finished" for now in states) else 1


class Local(Backend):
    """`launch.local`: `workers` points at once, `processes` each.

    Objects in a bucket cannot grow: what a point there prints is in files of this machine until it ends.
    """

    def __init__(self, *, workers: int, processes: int = 1, devices: Sequence[str] | None = None, grace: float = 60.0):
        self.workers, self.processes, self.devices, self.grace = workers, processes, devices, grace

    def _jobs(self, points: Sequence[Point], folder: str = "") -> list[local.Job]:
        own = {point.name for point in points}
        return [
            local.Job(
                point.name,
                point.command(),
                Path(folder, point.name, "log.txt") if "://" in str(point.workdir) else Path(point.workdir / "log.txt"),
                Path.cwd(),  # relative paths of configs and corpora mean what they mean here
                self.processes if point.trains else 1,
                point.start if point.start in own else "",
            )
            for point in points
        ]

    def commands(self, points: Sequence[Point]) -> list[str]:
        return [shlex.join(command) for job in self._jobs(points) for command in job.commands()]

    def run_all(self, points: Sequence[Point], chosen: Sequence[Point], records: Records) -> Iterator[None]:
        """Here a point need not wait until all points of a stage have ended: a worker takes the first that can run."""
        own, by_name = {point.name for point in points}, {point.name: point for point in chosen}
        ready = []
        for point in points:
            if point.start and point.start not in own and state(by_name[point.start].workdir) != "finished":
                self._say_waiting(point)
                own.remove(point.name)
            else:
                ready.append(point)
        return self.run(ready, records)

    def run(self, points: Sequence[Point], records: Records) -> Iterator[None]:
        """Runs `points`, each after the one of them that it starts from."""
        with tempfile.TemporaryDirectory(prefix="plm-logs-") as folder:
            yield from self._run(points, records, folder)

    def _run(self, points: Sequence[Point], records: Records, folder: str) -> Iterator[None]:
        by_name = {point.name: point for point in points}

        def started(job: local.Job, pid: int, share: local.Share) -> None:
            facts = {"pid": pid, "on": share.text(), "command": list(job.command), "started": time.time()}
            records.started(by_name[job.name], "local", **facts)
            print(f"started  {job.name}  (log: {job.log})", flush=True)

        def ended(job: local.Job, code: int) -> None:
            point = by_name[job.name]
            if "://" in str(point.workdir):
                for log in job.log.parent.glob("log*"):
                    _append(point.workdir / log.name, log.read_bytes())
            records.note(point, ended=time.time(), return_code=code)
            print(f"{state(point.workdir):8} {job.name}" + (f"  (exit code {code})" if code else ""), flush=True)
            if code > 0:
                for line in job.log.read_text(errors="replace").splitlines()[-5:]:
                    print(f"    {line}", flush=True)

        return local.run(
            self._jobs(points, folder),
            workers=self.workers,
            on_start=started,
            on_end=ended,
            on_skip=lambda job: self._say_waiting(by_name[job.name]),
            devices=self.devices,
            grace_seconds=self.grace,
        )


def _append(path: epath.Path, content: bytes) -> None:
    path.write_bytes((path.read_bytes() if path.exists() else b"") + content)


class Slurm(Backend):
    """`launch.slurm`: an array job for each stage, with the command's end or (`wait`) without it.

    A stage that is too large for an array becomes several; each submission waits for the one before it, so that never
    more than `workers` points run at once.
    """

    def __init__(self, root: epath.Path, options: slurm.Options, *, wait: bool):
        self.root, self.options, self.wait = root, options, wait

    def jobs(self):
        return slurm.states()

    def commands(self, points: Sequence[Point]) -> list[str]:
        lines = []
        for number, array in enumerate(self._arrays(points)):
            script = slurm.script_path(self.root, further=number)
            after = "" if number == 0 else f"JOB{number - 1}"
            lines += [f"# {script}", slurm.script(array, self.root, self.options)]
            lines += [shlex.join(slurm.submit_command(script, after))]
        return lines

    def run_all(self, points: Sequence[Point], chosen: Sequence[Point], records: Records) -> Iterator[None]:
        number, under_way = "", self._under_way(points, chosen)
        by_name, ready = {point.name: point for point in chosen}, {}
        for point in points:
            expected = not point.start or point.start in ready or point.start in under_way
            if expected or state(by_name[point.start].workdir) == "finished":
                ready[point.name] = point
            else:
                self._say_waiting(point)
        for array in self._arrays(list(ready.values()), under_way):
            after = dict.fromkeys([number, *(under_way.get(point.start) for point in array)])
            number = slurm.submit(array, self.root, records, self.options, after=":".join(filter(None, after)))
            print(f"submitted  job {number}, {len(array)} points; --status shows them, scancel {number} ends them")
        while self.wait and any(
            state(point.workdir, jobs) in ("queued", "running") for jobs in [slurm.states()] for point in chosen
        ):
            yield
            time.sleep(self.options.poll_seconds)

    @staticmethod
    def _under_way(points: Sequence[Point], chosen: Sequence[Point]) -> dict[str, str]:
        """{name: job} of parents that are not of `points` since they are queued or running already."""
        found, own = {}, {point.name for point in points}
        parents = {point.start for point in points} - own
        jobs = slurm.states() if points else None
        for point in chosen:
            if point.name in parents and state(point.workdir, jobs) in ("queued", "running"):
                found[point.name] = read_json(point.workdir / RECORD).get("job", "")
        return found

    @staticmethod
    def _arrays(points: Sequence[Point], under_way: Collection[str] = ()) -> list[list[Point]]:
        """What is submitted together; of a stage, points that wait for nobody else's job come before those that do."""
        arrays = []
        for stage in stages(points):
            for waits in (False, True):
                part = [point for point in stage if (point.start in under_way) == waits]
                arrays += [part[i : i + slurm.LARGEST_ARRAY] for i in range(0, len(part), slurm.LARGEST_ARRAY)]
        return arrays

    def exit_code(self, states: Sequence[str]) -> int:
        good = ("finished",) if self.wait else ("finished", "queued", "running")
        return 0 if all(now in good for now in states) else 1


class Tpu(Backend):
    """`launch.tpu`: a queued resource for each of `workers` points at once; measurements are made on this machine."""

    def __init__(self, root: epath.Path, options: tpu.Options, *, workers: int):
        self.root, self.options, self.workers = root, options, workers
        self._here = Local(workers=1)

    def commands(self, points: Sequence[Point]) -> list[str]:
        lines = []
        for point in points:
            lines += tpu.dry_run(point, self.root, self.options) if point.trains else self._here.commands([point])
        return lines

    def run(self, points: Sequence[Point], records: Records) -> Iterator[None]:
        yield from tpu.run([p for p in points if p.trains], self.root, records, self.options, workers=self.workers)
        yield from self._here.run([p for p in points if not p.trains], records)


def _watch(steps: Iterator[None], points: Sequence[Point], backend: "Backend", every_seconds: float = 30.0) -> None:
    """Draws the table again and again while the jobs run: in place on a terminal, now and then elsewhere."""
    live, last, shown = sys.stdout.isatty(), time.monotonic(), 0.0
    with contextlib.closing(steps):
        for _ in steps:
            now = time.monotonic()
            if live and now - shown >= 2.0:
                text = table(points, backend.jobs())
                # Down from here, then the cursor goes back, so that messages in between are written over the table.
                print("\x1b[J" + text + f"\x1b[{text.count(chr(10))}A\r", end="", flush=True)
                shown = now
            elif not live and now - last >= every_seconds:
                print(table(points, backend.jobs()), flush=True)
                last = now
    if live:
        print("\x1b[J", end="", flush=True)


_CONFIG = None
_FLAGS = flags.FLAGS


def define_flags() -> configs.ConfigFlags:
    """The command's flags."""
    flags.DEFINE_string("root", None, "folder of the sweep, a workdir for each point; local or gs://, for tpu gs://")
    flags.DEFINE_string("shared", "", "folder of the points that several sweeps need; ROOT/../shared by default")
    flags.DEFINE_enum("backend", "local", ["local", "slurm", "tpu"], "where points run")
    flags.DEFINE_integer("seeds", 0, "seeds for each point; 0 = the one of its config", lower_bound=0)
    flags.DEFINE_multi_string(
        "only", [], "names or patterns of the points to run or show, separated by commas; may be given several times"
    )
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


def backend_of(values: flags.FlagValues, root: epath.Path) -> Backend:
    """Where the flags say; a flag of another backend is refused."""
    own = {"local": {"devices", "processes"}, "slurm": {*slurm.FLAGS, "processes"}, "tpu": set(tpu.FLAGS)}
    allowed = own[values.backend]
    for name in sorted(set().union(*own.values()) - allowed):
        if values[name].present:
            raise UserError(f"--{name} is not for --backend={values.backend}")
    if values.backend == "slurm":
        if "://" in values.root:
            raise UserError(f"--root={values.root!r} is not on a file system; --backend=slurm needs a folder")
        options = slurm.Options.of(values)
        return Slurm(root, options, wait=values.wait)
    if values.backend == "tpu":
        return Tpu(root, tpu.Options.of(values), workers=values.workers)
    return Local(workers=values.workers, processes=values.processes, devices=values.devices, grace=values.grace_seconds)


def _folder(text: str) -> epath.Path:
    return epath.Path(text if "://" in text else Path(text).expanduser().resolve())


def _of_all_points(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that choose among the points: what makes the whole sweep."""
    kept, words = [], iter(arguments)
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if not (word.startswith("-") and name in ("only", "retry")):
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def main() -> int:
    """The command; returns its exit code."""
    root = _folder(_FLAGS.root)
    shared = str(_folder(_FLAGS.shared)) if _FLAGS.shared else ""
    points, study = read_points(_CONFIG.spec, root, _CONFIG.overrides, _FLAGS.seeds, shared)
    if study is not None:
        study.command = shlex.join(["python", "-m", "launch.sweep", *_of_all_points(sys.argv[1:])])
    only = [pattern for text in _FLAGS.only for pattern in text.split(",") if pattern]
    chosen, backend = by_seed(choose(points, only)), backend_of(_FLAGS, root)
    if _FLAGS.status:
        jobs = backend.jobs()
        print(table(chosen, jobs))
        return 0 if all(state(point.workdir, jobs) == "finished" for point in chosen) else 1
    if _FLAGS.dry_run:
        validate(points)
        print("\n".join(backend.commands(chosen)))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the points' processes, too
    try:
        return launch(points, root, retry=_FLAGS.retry, chosen=chosen, backend=backend, study=study)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    _CONFIG = define_flags()
    run_command(main, required=("config", "root"))
