"""A queued resource of Cloud TPU for each point: asked for, set up, watched, asked for again when it is taken away.

    create -> wait until it is ACTIVE -> ssh to all workers works -> code and pinned packages on all workers
    -> run on all workers, detached -> watch -> finished: delete
                                             -> preempted: delete, create again, resume from the last checkpoint

The workers write logs and exit codes to the workdir (`launch.worker`), so nothing is lost with a machine, and watching
needs no ssh. Everything is done by `gcloud` on this machine's PATH; `commands` has every line of it. Each point has a
thread of its own. Whatever ends the launcher in an ordinary way (also Ctrl-C) stops the workers, which save, and
deletes what it created.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import re
import shlex
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from etils import epath

from launch.points import RECORD, Point, Records, progress, read_json, state
from plm.command import INTERRUPTED
from plm.errors import UserError
from plm.training.metrics import SENT_VERSION, code_version

FLAGS = (
    "tpu_type",
    "tpu_zone",
    "tpu_project",
    "tpu_runtime",
    "tpu_spot",
    "tpu_reservation",
    "tpu_setup",
    "tpu_port",
    "tpu_poll_seconds",
)
CODE = (
    "plm",
    "experiments",
    "launch",
    "docs/protocol.md",  # its hash belongs into run.json
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
)
PYTHON = ".venv/bin/python"
# The images' own Python is too old. uv brings one, and installs the versions of constraints.txt.
SETUP = (
    "python3 -m pip install --quiet --user uv"
    " && ~/.local/bin/uv venv --quiet --python 3.12 .venv"
    " && ~/.local/bin/uv pip install --quiet --python .venv --constraint constraints.txt"
    " --build-constraint constraints.txt . 'jax[tpu]' gcsfs"
)
_TRIES = 5  # of ssh and scp, which fail now and then while a machine is young
_FRUITLESS = 3  # attempts in a row without a step done, after which a point has failed
_GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING", "NONE")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a queued resource is asked for.

    reservation: "" for none, "any" for whichever fits, else its name; setup: a shell line that is run in the code's
    folder on every worker and makes PYTHON; port: of process 0.
    """

    type: str
    zone: str
    runtime: str
    project: str = ""
    spot: bool = False
    reservation: str = ""
    setup: str = SETUP
    port: int = 8476
    poll_seconds: float = 30.0
    grace_seconds: float = 120.0

    @staticmethod
    def of(values: flags.FlagValues) -> "Options":
        for name, example in (("type", "v5litepod-16"), ("zone", "us-west4-a"), ("runtime", "v2-alpha-tpuv5-lite")):
            if not values[f"tpu_{name}"].value:
                raise UserError(f"--backend=tpu needs --tpu_{name}, for example --tpu_{name}={example}")
        if values.tpu_spot and values.tpu_reservation:
            raise UserError("--tpu_spot and --tpu_reservation exclude each other")
        if "://" not in values.root:
            raise UserError(f"--root={values.root!r} must be in a bucket that the workers reach: gs://BUCKET/FOLDER")
        return Options(
            type=values.tpu_type,
            zone=values.tpu_zone,
            runtime=values.tpu_runtime,
            project=values.tpu_project,
            spot=values.tpu_spot,
            reservation=values.tpu_reservation,
            setup=values.tpu_setup,
            port=values.tpu_port,
            poll_seconds=values.tpu_poll_seconds,
            grace_seconds=values.grace_seconds,
        )


def define_flags() -> None:
    """Those of FLAGS."""
    flags.DEFINE_string("tpu_type", "", "accelerator type: v5litepod-16, v4-32, ...")
    flags.DEFINE_string("tpu_zone", "", "zone")
    flags.DEFINE_string("tpu_runtime", "", "runtime version: v2-alpha-tpuv5-lite, tpu-ubuntu2204-base, ...")
    flags.DEFINE_string("tpu_project", "", "project; gcloud's own by default")
    flags.DEFINE_bool("tpu_spot", False, "spot capacity: cheaper, and taken away at any time")
    flags.DEFINE_string("tpu_reservation", "", "name of a reservation, or `any`")
    flags.DEFINE_string("tpu_setup", SETUP, "shell line that installs the code on a worker, in its folder")
    flags.DEFINE_integer("tpu_port", 8476, "port of process 0 that the other workers reach")
    flags.DEFINE_float("tpu_poll_seconds", 30.0, "between two looks at a resource", lower_bound=0.1)


class Commands:
    """Every gcloud line for one point."""

    def __init__(self, point: Point, root: epath.Path, options: Options):
        self.point, self.root, self.options = point, root, options
        self.workdir = point.workdir
        text = re.sub(r"[^a-z0-9]+", "-", f"plm-{root.name}-{point.name}".lower()).strip("-")[:40]
        self.name = f"{text}-{hashlib.sha256(str(self.workdir).encode()).hexdigest()[:6]}"

    def _where(self) -> list[str]:
        project = [f"--project={self.options.project}"] if self.options.project else []
        return [f"--zone={self.options.zone}", *project, "--quiet"]

    def _resource(self, verb: str, *more: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *self._where(), *more]

    def create(self) -> list[str]:
        options = self.options
        more = [f"--node-id={self.name}", f"--accelerator-type={options.type}", f"--runtime-version={options.runtime}"]
        more += ["--spot"] * options.spot
        if options.reservation == "any":
            more += ["--reserved"]
        command = self._resource("create", *more)
        if options.reservation not in ("", "any"):
            command.insert(1, "alpha")  # a reservation's name is known there only
            command.append(f"--reservation={options.reservation}")
        return command

    def describe(self) -> list[str]:
        return self._resource("describe", "--format=value(state.state)")

    def delete(self) -> list[str]:
        return self._resource("delete", "--force")

    def ssh(self, line: str) -> list[str]:
        return [
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", self.name),
            *self._where(),
            *("--worker=all", f"--command={line}"),
        ]

    def copy(self, file: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", "scp", file, f"{self.name}:", *self._where(), "--worker=all"]

    def warm(self) -> list[str]:
        """Makes the key if there is none, and spreads it: the first ssh to a worker often fails."""
        return self.ssh("true")

    def install(self) -> list[str]:
        unpack = "rm -rf plm && mkdir plm && tar -xzf plm.tar.gz -C plm && cd plm"
        return self.ssh(f"{unpack} && {self.options.setup}")

    def start(self, attempt: int) -> list[str]:
        """Detached from the ssh session that starts it."""
        train = self.point.command((PYTHON,))
        more = ("--cluster=tpu", f"--coordinator_port={self.options.port}")
        worker = (PYTHON, "-m", "launch.worker", f"--attempt={self.attempt(attempt)}", "--", *train, *more)
        return self.ssh(f"cd plm && (setsid nohup {shlex.join(worker)} > worker.log 2>&1 < /dev/null & echo $! > pid)")

    def stop(self) -> list[str]:
        """SIGTERM: the run saves itself."""
        return self.ssh("kill $(cat plm/pid)")

    def attempt(self, number: int) -> epath.Path:
        return self.workdir / "launch" / str(number)


def dry_run(point: Point, root: epath.Path, options: Options) -> list[str]:
    """Every line that a point's life without a preemption has, in order, and those that end it early."""
    _check(point)
    on = Commands(point, root, options)
    life = [on.create(), on.describe(), on.warm(), on.copy("plm.tar.gz"), on.install(), on.start(1), on.describe()]
    return [f"# {point.name}", *map(shlex.join, life), "# at its end, when it is preempted, or on Ctrl-C"] + [
        shlex.join(line) for line in (on.stop(), on.delete())
    ]


def _check(point: Point) -> None:
    file = Path(point.spec.partition(":")[0])
    if file.is_absolute() or file.parts[0] not in CODE:
        raise UserError(
            f"--config={str(file)!r} is not sent to the workers: it must lie below {', '.join(CODE[:3])} of the"
            " checkout, and the command be run there"
        )


def pack(path: Path) -> None:
    """The code of this checkout as it is now, changes included, and of which commit it is."""

    def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in entry.name else entry

    with tarfile.open(path, "w:gz") as archive:
        for name in CODE:
            if not Path(name).exists():
                raise UserError(f"{name} is not in {Path.cwd()}: start --backend=tpu in the checkout")
            archive.add(name, filter=keep)
        version = json.dumps(code_version(Path.cwd())).encode()
        entry = tarfile.TarInfo(SENT_VERSION)
        entry.size = len(version)
        archive.addfile(entry, io.BytesIO(version))


class _Stopped(Exception):  # noqa: N818
    """The launcher ends."""


class _Lost(Exception):  # noqa: N818
    """The machines are gone or cannot be worked with; the message says why."""


def run(
    points: Sequence[Point], root: epath.Path, records: Records, options: Options, *, workers: int
) -> Iterator[None]:
    """Runs them, `workers` at a time; yields often. Closing the generator stops and deletes what there is."""
    for point in points:
        _check(point)
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "plm.tar.gz"
        pack(archive)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            lives = [pool.submit(_Life(point, root, records, options, archive, stop).run) for point in points]
            try:
                while not all(life.done() for life in lives):
                    yield
                    concurrent.futures.wait(lives, timeout=min(1.0, options.poll_seconds))
            finally:
                stop.set()
                if not all(life.done() for life in lives):
                    print("stopping: runs save themselves, then what was created is deleted; please wait", flush=True)
                for life in lives:
                    life.cancel()
        for life in lives:
            if not life.cancelled():
                life.result()


class _Life:
    """Of one point, from its first queued resource to the end."""

    def __init__(
        self,
        point: Point,
        root: epath.Path,
        records: Records,
        options: Options,
        archive: Path,
        stop: threading.Event,
    ):
        self.point, self.records, self.options, self.archive, self.stop = point, records, options, archive, stop
        self.commands = Commands(point, root, options)
        self.number = 0

    def say(self, text: str) -> None:
        print(f"{self.point.name}: {text}", flush=True)

    def note(self, on: str) -> None:
        self.records.note(self.point, on=f"{self.commands.name} ({on})")

    def run(self) -> None:
        fruitless, before = 0, self._step()
        try:
            while True:
                try:
                    code, why = self._attempt(), "the workers were told to stop, and saved"
                except _Lost as lost:
                    code, why = INTERRUPTED, str(lost)
                finally:
                    self._delete()
                if code != INTERRUPTED:
                    break
                self.say(f"{why}; queueing again after step {self._step()}")
                now = self._step()
                fruitless, before = (0, now) if now > before else (fruitless + 1, now)
                if fruitless >= _FRUITLESS:
                    self.say(f"{fruitless} attempts in a row did no step: given up")
                    code = 1
                    break
        except _Stopped:
            code = INTERRUPTED
        self.records.note(self.point, ended=time.time(), return_code=code)
        self.say(f"{state(self.commands.workdir)}" + (f" (exit code {code})" if code else ""))
        if code not in (0, INTERRUPTED):
            log = self.commands.attempt(self.number) / "log.0.txt"
            for line in log.read_text().splitlines()[-5:] if log.exists() else []:
                print(f"    {line}", flush=True)

    def _step(self) -> int:
        return progress(self.commands.workdir).get("step") or 0

    def _attempt(self) -> int:
        """From a queued resource to the run's exit code."""
        on = self.commands
        self.number = self._next_number()
        self.records.started(
            self.point,
            "tpu",
            on=f"{on.name} (queued)",
            command=on.start(self.number),
            started=time.time(),
        )
        on.attempt(self.number).mkdir(parents=True, exist_ok=True)
        self._delete(quietly=True)  # what an earlier launcher may have left
        self._call(on.create())
        self._wait_until_active()
        self.note("setting up")
        self._patiently(on.warm(), "ssh")
        self._patiently(on.copy(str(self.archive)), "scp")
        self._patiently(on.install(), "the installation")
        self._patiently(on.start(self.number), "starting")
        self.say(f"runs on {on.name}, attempt {self.number} (logs: {on.attempt(self.number)})")
        self.note("ACTIVE")
        return self._watch()

    def _next_number(self) -> int:
        folder = self.commands.workdir / "launch"
        done = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
        # In a bucket an attempt has no folder before its first log, which it may not live to write.
        return max([*done, read_json(self.commands.workdir / RECORD).get("attempts", 0)]) + 1

    def _wait_until_active(self) -> None:
        while (now := self._state()) != "ACTIVE":
            self.note(now)
            if now in _GONE:
                raise _Lost(f"{self.commands.name} is {now} before it was ACTIVE")
            self._sleep(self.options.poll_seconds)

    def _watch(self) -> int:
        """The exit code that the workers left, once all is over."""
        while True:
            now = self._state()
            try:
                code = self._code()
            except OSError as error:  # of the network, mostly; the run does not mind
                self.say(f"cannot read {self.commands.attempt(self.number)}, trying again: {error}")
                code = None
            if code is not None:
                return code
            if now != "ACTIVE":
                raise _Lost(f"preempted ({self.commands.name} is {now})")
            try:
                self._sleep(self.options.poll_seconds)
            except _Stopped:
                self._save()
                raise

    def _code(self) -> int | None:
        """Process 0's, which ends after the others; or that of whoever failed."""
        folder = self.commands.attempt(self.number)
        codes = {path.name: int(path.read_text() or 1) for path in folder.glob("code.*")}
        bad = [code for code in codes.values() if code not in (0, INTERRUPTED)]
        # A machine that goes down may kill what runs there before it has saved.
        if any(code < 0 for code in bad):
            return INTERRUPTED
        return bad[0] if bad else codes.get("code.0")

    def _save(self) -> None:
        """The launcher ends: the workers shall save, within the grace period."""
        self.say("saving")
        _gcloud(self.commands.stop(), None)
        deadline = time.monotonic() + self.options.grace_seconds
        while self._code() is None and time.monotonic() < deadline:
            time.sleep(min(1.0, self.options.poll_seconds))

    def _state(self) -> str:
        """NONE if there is no such resource (any more)."""
        code, output, error = _gcloud(self.commands.describe(), self.stop)
        if code == 0:
            return output.strip() or "CREATING"
        if "NOT_FOUND" in error or "not found" in error.lower():
            return "NONE"
        self.say(f"cannot ask for its state, asking again: {_last_line(error)}")
        self._sleep(self.options.poll_seconds)
        return self._state()

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise _Stopped

    def _call(self, command: Sequence[str]) -> None:
        code, _, error = _gcloud(command, self.stop)
        if code:
            raise UserError(f"{shlex.join(command)} failed: {_last_line(error)}")

    def _patiently(self, command: Sequence[str], what: str) -> None:
        """Until it works; not for ever, and not on machines that are gone."""
        for attempt in range(1, _TRIES + 1):
            code, _, error = _gcloud(command, self.stop)
            if not code:
                return
            self.say(f"{what} failed ({attempt} of {_TRIES}): {_last_line(error)}")
            if (now := self._state()) != "ACTIVE":
                raise _Lost(f"preempted ({self.commands.name} is {now})")
            self._sleep(self.options.poll_seconds)
        raise _Lost(f"{what} does not work on {self.commands.name}")

    def _delete(self, quietly: bool = False) -> None:
        code, _, error = _gcloud(self.commands.delete(), None)
        if code and not quietly and "not found" not in error.lower() and "NOT_FOUND" not in error:
            self.say(f"NOT DELETED, it may cost money: {shlex.join(self.commands.delete())}: {_last_line(error)}")


def _gcloud(command: Sequence[str], stop: threading.Event | None) -> tuple[int, str, str]:
    """Exit code, output and error. In a session of its own: Ctrl-C is the launcher's; `stop` ends it."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise UserError("--backend=tpu: gcloud is not on this machine's PATH (docs/launch_tpu.md)") from None
    while True:
        try:
            output, error = process.communicate(timeout=0.2)
            return process.returncode, output, error
        except subprocess.TimeoutExpired:
            if stop is not None and stop.is_set():
                process.terminate()
                process.communicate()
                raise _Stopped from None


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason given"
