"""A pool of processes on this machine; every point gets cores, and if told so devices, of its own."""

import dataclasses
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Job:
    """command: its arguments; processes: how many run it together; cwd: where; after: the job it waits for, by name.

    log: the file that the output of its first process is appended to; those of the others are log.1.txt, ...
    """

    name: str
    command: tuple[str, ...]
    log: Path
    cwd: Path
    processes: int = 1
    after: str = ""

    def commands(self) -> list[tuple[str, ...]]:
        """One for each process; several find each other at a port that is free now."""
        if self.processes == 1:
            return [self.command]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        together = (
            "--coordinator_address=localhost",
            f"--coordinator_port={port}",
            f"--num_processes={self.processes}",
        )
        return [(*self.command, *together, f"--process_id={index}") for index in range(self.processes)]

    def log_of(self, index: int) -> Path:
        return self.log.with_suffix(f".{index}{self.log.suffix}") if index else self.log


@dataclasses.dataclass(frozen=True)
class Share:
    """Of the machine, for one point; devices: CUDA device numbers, None for whatever there is."""

    cores: tuple[int, ...]
    devices: tuple[str, ...] | None = None

    def split(self, parts: int) -> "list[Share]":
        """Among the processes of a point."""
        return shares(self.cores, self.devices, parts)

    def text(self) -> str:
        """For people."""
        cores = f"core{'s' * (len(self.cores) > 1)} {','.join(map(str, self.cores))}"
        return cores if self.devices is None else f"{cores}; devices {','.join(self.devices)}"


def shares(cores: Sequence[int], devices: Sequence[str] | None, parts: int) -> list[Share]:
    """Splits cores and devices as evenly as it goes; with more parts than cores some cores serve two."""
    given = [None] * parts if devices is None else _split(devices, parts)
    return [
        Share(tuple(own), None if d is None else tuple(d)) for own, d in zip(_split(cores, parts), given, strict=True)
    ]


def _split(things: Sequence, parts: int) -> list[list]:
    if parts >= len(things):
        return [[things[i % len(things)]] for i in range(parts)]
    size, left = divmod(len(things), parts)
    starts = [i * size + min(i, left) for i in range(parts + 1)]
    return [list(things[a:b]) for a, b in itertools.pairwise(starts)]


def available_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _start(command: Sequence[str], log: Path, cwd: Path, share: Share) -> subprocess.Popen:
    """Starts a process in a group of its own. The affinity is inherited: XLA sizes its thread pools by it."""
    pinned = hasattr(os, "sched_setaffinity")
    before = os.sched_getaffinity(0) if pinned else None
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(len(share.cores)), "PYTHONUNBUFFERED": "1"}
    if share.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.devices)
    try:
        if pinned:
            os.sched_setaffinity(0, share.cores)
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)


class _Running:
    """The processes of a job."""

    def __init__(self, job: Job, share: Share):
        self.job, self.share = job, share
        own = share.split(job.processes)
        self.processes = [
            _start(command, job.log_of(index), job.cwd, own[index]) for index, command in enumerate(job.commands())
        ]
        self._failed_at: float | None = None

    def code(self) -> int | None:
        """0, or that of a process that ended in another way; None while one runs.

        A signal's before others: the other processes fail since that one has gone, and the job was interrupted.
        """
        codes = [process.poll() for process in self.processes]
        if None not in codes:
            return next((code for code in sorted(codes) if code), 0)
        return None

    def end_with_the_first(self, seconds: float) -> None:
        """Processes of a job end together by themselves; one that does not is killed `seconds` later."""
        if any(process.poll() for process in self.processes):
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at > seconds:
                self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)


def run(
    jobs: Sequence[Job],
    *,
    workers: int,
    on_start: Callable[[Job, int, Share], None],
    on_end: Callable[[Job, int], None],
    on_skip: Callable[[Job], None] = lambda job: None,
    devices: Sequence[str] | None = None,
    grace_seconds: float = 60.0,
    poll_seconds: float = 0.5,
) -> Iterator[None]:
    """Runs all jobs, `workers` at a time, in their order but for those that wait for another one, which run when it has
    ended well. A generator: it yields after every poll, for a live table.

    on_start(job, process id, its share), on_end(job, return code; negative for a signal) and on_skip(job), for one that
    waits for a job that failed or was skipped, are called as it happens.
    devices: CUDA devices to be shared out; None leaves them alone. Closing the generator (also by Ctrl-C) ends what
    still runs: SIGTERM, on which a run saves itself, and SIGKILL `grace_seconds` later.
    """
    waiting, free = list(jobs), shares(available_cores(), devices, workers)
    running: list[_Running] = []
    unfinished, failed = {job.name for job in jobs}, set()
    try:
        while waiting or running:
            while free and (job := next((one for one in waiting if one.after not in unfinished), None)):
                waiting.remove(job)
                started = _Running(job, free.pop(0))
                running.append(started)
                on_start(job, started.processes[0].pid, started.share)
            yield
            time.sleep(poll_seconds)
            for one in list(running):
                one.end_with_the_first(grace_seconds)
                code = one.code()
                if code is not None:
                    running.remove(one)
                    free.append(one.share)
                    on_end(one.job, code)
                    if code:
                        failed.add(one.job.name)
                    else:
                        unfinished.remove(one.job.name)
            for job in [one for one in waiting if one.after in failed]:
                waiting.remove(job)
                failed.add(job.name)
                on_skip(job)
    finally:
        for one in running:
            one.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        try:
            while any(one.code() is None for one in running) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:  # also by a second Ctrl-C
            for one in running:
                one.signal(signal.SIGKILL)
                for process in one.processes:
                    process.wait()
                on_end(one.job, one.code())
