"""What a run writes about itself: metrics.jsonl, run.json, results.jsonl, TensorBoard files, a progress bar.

All numbers that come in here are Python floats: the loop fetches them from the device, so that the numbers of one step
are fetched and written while the next one runs. Nothing here imports JAX.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from tqdm import tqdm

from plm.errors import UserError

METRICS, RUN, RESULTS = "metrics.jsonl", "run.json", "results.jsonl"
REPOSITORY = Path(__file__).resolve().parent.parent.parent
PROTOCOL = REPOSITORY / "docs" / "protocol.md"
SENT_VERSION = ".code_version.json"  # `code_version` of the checkout that this is a copy of, where it is no checkout

# ---------------------------------------------------------------------------------------------------------------------
# Lines of JSON
# ---------------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Numbers as JSON has them: numpy scalars as Python's, what is not finite as null."""
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in values.items()}, allow_nan=False) + "\n"


def read_lines(path: epath.PathLike) -> list[dict]:
    """All whole lines of a JSONL file; [] without a file. A torn last line is left out.

    Raises:
      UserError: a line before the last that is no JSON object: the file was damaged, and not by a crash.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    result = []
    *lines, last = path.read_text().split("\n")  # without a crash, `last` is what follows the final line break: nothing
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines) and not last:
                break
            raise UserError(f"{path}, line {number} is damaged ({error}): repair or delete it") from None
        result.append(values)
    return result


def read_metrics(workdir: epath.PathLike) -> list[dict]:
    """A run's metrics.jsonl, one dict for each step, by rising step; later lines of a step are merged into it."""
    by_step: dict[int, dict] = {}
    for values in read_lines(epath.Path(workdir) / METRICS):
        by_step.setdefault(values["step"], {}).update(values)
    return [by_step[step] for step in sorted(by_step)]


def write_atomically(path: epath.PathLike, text: str) -> None:
    """Writes a file that is never seen half-written: under another name, then renamed.

    Of processes that write one at once, the last one's is there.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


class LineWriter:
    """Appends lines to a JSONL file, each by one write. Where files cannot grow (object stores) the whole file is
    written anew, at most every `seconds` and on `close`.
    """

    def __init__(self, path: epath.PathLike, *, seconds: float = 30.0, can_append: bool | None = None):
        self.path, self.seconds = epath.Path(path), seconds
        self.can_append = "://" not in str(path) if can_append is None else can_append
        self._kept, self._written, self._dirty = "", time.monotonic(), False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.can_append:
                self._file = Path(self.path).open("ab+", buffering=0)  # noqa: SIM115 - closed by close()
                self._cut_torn_line()
            elif self.path.exists():
                self._kept = self.path.read_text()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def _cut_torn_line(self) -> None:
        size = self._file.seek(0, 2)
        self._file.seek(max(size - 65536, 0))
        tail = self._file.read()
        if tail and not tail.endswith(b"\n"):
            self._file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)

    def add(self, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        line = _line(values)
        if self.can_append:
            self._file.write(line.encode())
            return
        self._kept += line
        self._dirty = True
        if time.monotonic() - self._written >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet."""
        if self._dirty:
            write_atomically(self.path, self._kept)
            self._written, self._dirty = time.monotonic(), False

    def close(self) -> None:
        self.flush()
        if self.can_append:
            self._file.close()


def cut(path: epath.PathLike, step: int) -> int:
    """Removes the lines of steps after `step` and a torn last line, atomically; returns how many lines went.

    A run that resumes at `step` makes those steps again.
    """
    path = epath.Path(path)
    if not path.exists():
        return 0
    text = path.read_text()
    kept = [values for values in read_lines(path) if values["step"] <= step]
    new = "".join(_line(values) for values in kept)
    if new != text:
        write_atomically(path, new)
    return len(text.splitlines()) - len(kept)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of a run
# ---------------------------------------------------------------------------------------------------------------------


class Metrics:
    """The metrics of one run: a line of metrics.jsonl for each `add`, TensorBoard and Weights & Biases on request.

    Args:
      workdir: of the run.
      step: the step that the run starts or resumes at; lines of later steps are cut.
      tensorboard: also write TensorBoard files, into workdir/tensorboard.
      wandb: project of Weights & Biases, "" for none; a resumed run goes on under its own id.
      config: flat settings, shown by Weights & Biases.
      enabled: False on all processes but the first: nothing is written.

    Raises:
      UserError: an unwritable workdir; a package that is not installed.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        step: int = 0,
        tensorboard: bool = False,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ):
        self._lines = self._board = self._wandb = None
        if not enabled:
            return
        workdir = epath.Path(workdir)
        cut(workdir / METRICS, step)
        self._lines = LineWriter(workdir / METRICS)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        if wandb:
            try:
                import wandb as package
            except ImportError:
                raise UserError(f"log.wandb={wandb!r} needs the package: pip install 'plm[wandb]'") from None
            identity = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
            self._wandb = package.init(
                project=wandb, name=workdir.name, id=identity, resume="allow", config=dict(config or {})
            )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes {name: float} of a step, for example {"train/loss": 5.3}; what is not finite becomes null."""
        if self._lines is None:
            return
        values = {name: _plain(value) for name, value in values.items()}
        self._lines.add({"step": int(step), **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def flush(self) -> None:
        """Writes the lines that are not written yet."""
        if self._lines is not None:
            self._lines.flush()

    def close(self) -> None:
        """Writes what is not written yet and closes the files."""
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


# ---------------------------------------------------------------------------------------------------------------------
# run.json: what was run, on what, with what
# ---------------------------------------------------------------------------------------------------------------------

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tokenizers",
    "tensorflow-datasets",
    "ml-collections",
    "numpy",
)


def _git(*arguments: str, folder: Path) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            check=False,
            timeout=20,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def code_version(folder: Path = REPOSITORY) -> dict[str, str | None]:
    """{"commit": id or None, "uncommitted": hash or None} of the checkout in `folder`.

    `uncommitted` is a SHA-256 over the difference to the commit and over the untracked files that git does not ignore:
    None for a clean checkout. Outside git what SENT_VERSION says, else None for both.
    """
    top = _git("rev-parse", "--show-toplevel", folder=folder)
    # A package inside site-packages may lie below somebody else's repository.
    if top is None or Path(top.decode().strip()).resolve() != folder.resolve():
        try:
            sent = json.loads((folder / SENT_VERSION).read_text())
            return {"commit": sent["commit"], "uncommitted": sent["uncommitted"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {"commit": None, "uncommitted": None}
    commit = _git("rev-parse", "HEAD", folder=folder)
    changes = _git("diff", "HEAD", "--binary", folder=folder) or b""
    untracked = _git("ls-files", "--others", "--exclude-standard", "-z", folder=folder) or b""
    digest, dirty = hashlib.sha256(changes), bool(changes)
    for name in sorted(filter(None, untracked.split(b"\0"))):
        dirty = True
        digest.update(b"\0" + name + b"\0")
        try:
            digest.update((folder / name.decode()).read_bytes())
        except (OSError, UnicodeDecodeError):
            digest.update(b"unreadable")
    return {
        "commit": commit.decode().strip() if commit else None,
        "uncommitted": digest.hexdigest() if dirty else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that a run computes with."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("plm", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def protocol_hash() -> str | None:
    """SHA-256 of docs/protocol.md, None where plm runs without its checkout. Tables never mix two protocols."""
    try:
        return hashlib.sha256(PROTOCOL.read_bytes()).hexdigest()
    except OSError:
        return None


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class RunRecord:
    """run.json of a workdir.

    Top level: what holds for the whole run (`corpus`, `tokenizer`, `parameters`, ... as given to `start`) and how far
    it is (`update`: step, tokens, bytes, words, epochs, flops, seconds). `sessions`: one entry for each time
    that it was started, with command, commit, uncommitted, versions, devices, protocol, started, from_step; a resumed
    run has several. `protocol`, `commit`, ... at the top level are those of the last session.
    """

    def __init__(self, workdir: epath.PathLike, *, enabled: bool = True):
        self.path, self.enabled = epath.Path(workdir) / RUN, enabled
        self.facts: dict[str, Any] = {}
        if self.path.exists():
            try:
                self.facts = dict(json.loads(self.path.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{self.path} is damaged ({error}): delete it, the rest of the run is whole") from None

    def start(
        self,
        *,
        from_step: int,
        devices: Mapping[str, Any],
        corpus: Mapping[str, Any],
        tokenizer: Mapping[str, Any],
        **facts: Any,
    ) -> None:
        """Notes a session.

        devices: {"kind", "count", "processes", "platform", "mesh"}; corpus: {"source", "fingerprint", "licence",
        "train": {"tokens", "bytes", "words", "documents"}, "valid": {...}}; tokenizer: {"kind", "size", "fingerprint"};
        facts: anything else that holds for the whole run, for example parameters by part.
        """
        session = {
            "command": shlex.join([Path(sys.executable).name, *_argv()]),
            **code_version(),
            "versions": versions(),
            "devices": dict(devices),
            "protocol": protocol_hash(),
            "started": now(),
            "from_step": from_step,
        }
        sessions = [*self.facts.get("sessions", []), session]
        given = {"corpus": dict(corpus), "tokenizer": dict(tokenizer), **facts}
        self.facts |= {"status": "running", **session, **given, "sessions": sessions}
        del self.facts["from_step"]
        self.facts.pop("error", None)  # of a session that failed
        self.facts["started"] = sessions[0]["started"]
        self._write()

    def update(self, *, step: int, **progress: Any) -> None:
        """Notes how far the run is: tokens, bytes, words, epochs, flops, seconds, ..., all since step 0."""
        self.note(step=step, updated=now(), **progress)

    def note(self, **facts: Any) -> None:
        """Notes anything else."""
        self.facts |= facts
        self._write()

    def finish(self, **facts: Any) -> None:
        """Notes that the run is complete."""
        self.note(status="complete", updated=now(), **facts)

    def _write(self) -> None:
        if self.enabled:
            write_atomically(self.path, json.dumps(self.facts, indent=1, default=_plain) + "\n")


def _argv() -> list[str]:
    """The arguments of this process; `python -m plm.train` shows as a path in sys.argv[0]."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return ["-m", spec.name, *sys.argv[1:]] if spec is not None else list(sys.argv)


# ---------------------------------------------------------------------------------------------------------------------
# results.jsonl: tidy rows of every evaluation
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """A row of results.jsonl: one number.

    run: name of the run; suite, metric: for example "pretraining", "causal" (nats); split: "valid", ...; n: how many
    things were averaged; head_seed: of a task head, None without one; predictions: file beside results.jsonl, or None;
    low, high: the ends of an interval around the value where the suite gives one.
    """

    run: str
    step: int
    suite: str
    metric: str
    pretrain_seed: int
    head_seed: int | None
    split: str
    n: float
    value: float
    predictions: str | None = None
    low: float | None = None
    high: float | None = None


# What run.json counts since step 0. Of the text by what it is called in the description of the corpus.
TEXT_COUNTS = {"text_tokens": "tokens", "bytes": "bytes", "words": "words"}
COUNTS = ("tokens", *TEXT_COUNTS, "epochs", "flops")


def counted_before(facts: Mapping[str, Any], keep: str) -> tuple[int, dict[str, float]]:
    """(steps, their `COUNTS`) of the run that one goes on from with init.keep=all; (0, {}) for any other.

    facts: of run.json; keep: init.keep.
    """
    source = (facts.get("starts_from") or {}) if keep == "all" else {}
    return (source["step"], source["counts"]) if source.get("counts") else (0, {})


TARGETS, PERPLEXITY = "_targets", "_perplexity"  # behind the name of a held-out number


def held_out(values: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(name, how many things were averaged, value) of an `Evaluator`'s numbers; the loss, a sum of means, has 0."""
    names = [name for name in values if not name.endswith(TARGETS)]
    counts = [values.get(f"{name.removesuffix(PERPLEXITY)}{TARGETS}", 0.0) for name in names]
    return [(name.removeprefix("eval/"), n, values[name]) for name, n in zip(names, counts, strict=True)]


def append_results(workdir: epath.PathLike, rows: Iterable[Result]) -> None:
    """Appends rows to workdir/results.jsonl."""
    writer = LineWriter(epath.Path(workdir) / RESULTS)
    try:
        for row in rows:
            writer.add(dataclasses.asdict(row))
    finally:
        writer.close()


def read_results(workdir: epath.PathLike) -> list[Result]:
    """The rows of workdir/results.jsonl; of rows that measure the same again (a resumed run) the last one holds."""
    rows: dict[tuple, Result] = {}
    for values in read_lines(epath.Path(workdir) / RESULTS):
        row = Result(**values)
        key = (row.run, row.step, row.suite, row.metric, row.pretrain_seed, row.head_seed, row.split)
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())


# ---------------------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """1:02:03, 2:03, 0:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """A bar with ETA, loss and tokens/s on a terminal; elsewhere a plain line every `seconds` and one at the end.

    total, start: steps; the ETA and the speed count the steps of this session only. enabled: as in `Metrics`.
    """

    def __init__(self, total: int, start: int = 0, *, seconds: float = 10.0, stream=None, enabled: bool = True):
        self.stream = sys.stderr if stream is None else stream
        self.total, self.start, self.step, self.seconds, self.enabled = total, start, start, seconds, enabled
        self._began = time.monotonic()
        self._last, self._printed = -math.inf, start
        self._shown: dict[str, str] = {}
        self._bar = None
        if enabled and self.stream.isatty():
            self._bar = tqdm(total=total, initial=start, file=self.stream, unit="step", dynamic_ncols=True)

    def update(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Shows that `step` steps are done; numbers that are not given stay as they were."""
        if loss is not None:
            self._shown["loss"] = f"{loss:.4f}"
        if tokens_per_second is not None:
            self._shown["tokens/s"] = f"{tokens_per_second:,.0f}"
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(step - self.step)
        self.step = step
        # The last step's line waits for its loss.
        if time.monotonic() - self._last >= self.seconds or (step >= self.total and loss is not None):
            self._print()

    def _print(self) -> None:
        if self.enabled and self._bar is None:
            self._last, self._printed = time.monotonic(), self.step
            print(self.line(), file=self.stream, flush=True)

    def line(self) -> str:
        """`step 120/400  loss 5.3210  tokens/s 3,400  0:35 gone  1:22 left`."""
        gone = time.monotonic() - self._began
        done = self.step - self.start
        left = f"  {duration(gone / done * (self.total - self.step))} left" if done else ""
        shown = "".join(f"  {name} {value}" for name, value in self._shown.items())
        return f"step {self.step}/{self.total}{shown}  {duration(gone)} gone{left}"

    def message(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            tqdm.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Ends the bar; off terminals prints the last step if no line told of it."""
        if self._bar is not None:
            self._bar.close()
        elif self._printed != self.step:
            self._print()
