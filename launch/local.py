"""A pool of subprocesses on this machine, each with cores of its own."""

import dataclasses
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Job:
    """command: its arguments; log: the file that its output is appended to; cwd: where it runs."""

    name: str
    command: tuple[str, ...]
    log: Path
    cwd: Path


def shares(cores: Sequence[int], workers: int) -> list[list[int]]:
    """Splits core numbers among workers, as evenly as it goes; with more workers than cores some cores serve two."""
    if workers >= len(cores):
        return [[cores[i % len(cores)]] for i in range(workers)]
    size, left = divmod(len(cores), workers)
    starts = [i * size + min(i, left) for i in range(workers + 1)]
    return [list(cores[a:b]) for a, b in itertools.pairwise(starts)]


def available_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _start(job: Job, cores: list[int]) -> subprocess.Popen:
    """Starts a job in a process group of its own. The affinity is inherited: XLA sizes its thread pools by it."""
    pinned = hasattr(os, "sched_setaffinity")
    before = os.sched_getaffinity(0) if pinned else None
    job.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        if pinned:
            os.sched_setaffinity(0, cores)
        with job.log.open("ab") as log:
            return subprocess.Popen(
                job.command,
                cwd=job.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": str(len(cores)), "PYTHONUNBUFFERED": "1"},
            )
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)


def run(
    jobs: Sequence[Job],
    *,
    workers: int,
    on_start: Callable[[Job, int], None],
    on_end: Callable[[Job, int], None],
    poll_seconds: float = 0.5,
) -> Iterator[None]:
    """Runs all jobs, `workers` at a time, in their order. A generator: it yields after every poll, for a live table.

    on_start(job, process id) and on_end(job, return code; negative for a signal) are called as it happens. Closing the
    generator (also by Ctrl-C) ends the processes that still run: SIGTERM, and SIGKILL ten seconds later.
    """
    waiting, free = list(jobs), shares(available_cores(), workers)
    running: list[tuple[Job, subprocess.Popen, list[int]]] = []
    try:
        while waiting or running:
            while waiting and free:
                job, cores = waiting.pop(0), free.pop(0)
                process = _start(job, cores)
                running.append((job, process, cores))
                on_start(job, process.pid)
            yield
            time.sleep(poll_seconds)
            for entry in list(running):
                job, process, cores = entry
                if process.poll() is not None:
                    running.remove(entry)
                    free.append(cores)
                    on_end(job, process.returncode)
    finally:
        for _, process, _ in running:
            _signal(process, signal.SIGTERM)
        for job, process, _ in running:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()
            # One that saves on SIGTERM and leaves with 0 is not finished for that.
            on_end(job, process.returncode or -signal.SIGTERM)


def _signal(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)
