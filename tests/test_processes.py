"""Several processes train as one does: same losses, each makes its own rows only, the first alone writes the records.

They find each other, say who is missing, and end together when one dies. A run that is stopped on eight goes on on two,
on another mesh, with the same batches and losses.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from fixtures import children, corpus
from fixtures.children import RUNS

from plm import processes
from plm.errors import UserError
from plm.training import config as configs
from plm.training import loop
from plm.training.metrics import read_metrics

B = 8


def watch() -> None:
    """In a child, before it trains: notes the rows that it makes, a checksum of each row of each of its training
    batches, and the files that Python opens for writing."""
    from plm.data import pipeline, pretrain

    seen = {"rows": [], "batches": {}, "written": []}
    real, real_local = pretrain._Layout._numbers, pipeline.Batches.local

    def numbers(self, step, rows):
        if self.training and [rows.start, rows.stop] not in seen["rows"]:
            seen["rows"].append([rows.start, rows.stop])
            note()
        return real(self, step, rows)

    def local(self, step):
        batch = real_local(self, step)
        if self.layout.training:
            of_step = seen["batches"].setdefault(str(step), {})
            for i, row in enumerate(range(self.first, self.last)):
                arrays = (batch[name][i] for name in sorted(batch) if name != "shared")
                of_step[str(row)] = zlib.crc32(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
            note()
        return batch

    def note():
        with contextlib.suppress(OSError):
            Path(os.environ["WATCH"]).write_text(json.dumps(seen))

    def audit(event, arguments):
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+x"):
            path = str(arguments[0])
            if path != os.environ["WATCH"] and path not in seen["written"]:
                seen["written"].append(path)
                note()

    pretrain._Layout._numbers, pipeline.Batches.local = numbers, local
    sys.addaudithook(audit)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus.write(tmp_path_factory.getbasetemp() / "corpus.txt")


def losses_of(workdir) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def begin(count: int, kind: str, text, workdir, *flags: str) -> list[children.Child]:
    """Starts the command as processes of one device each, which talk over gloo."""
    address = f"localhost:{free_port()}"
    started = []
    for index in range(count):
        arguments = [f"--config={RUNS}:{kind}", f"--config.data.source=text:{text}", f"--workdir={workdir}", *flags]
        arguments += [f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}"]
        out = workdir.with_name(f"{workdir.name}.{count}.{index}")
        before = [("test_processes", "watch")]
        environment = {"devices": 1, "WATCH": f"{out}.json"}
        started.append(children.start("plm.train", *arguments, output=out, before=before, **environment))
    return started


def seen_by(started: list[children.Child]) -> list[dict]:
    return [json.loads(Path(f"{child.output}.json").read_text()) for child in started]


def train_in(count: int, kind: str, text, workdir, *flags: str) -> list[dict]:
    """Runs the command to its end as `count` processes; returns what each of them saw."""
    started = begin(count, kind, text, workdir, *flags)
    codes = [child.wait(150 * count) for child in started]
    assert codes == [0] * count, "\n".join(child.text for child in started)
    assert "complete after 24 steps" in started[0].text
    for other in started[1:]:
        assert all(line.startswith("[Gloo]") for line in other.text.splitlines()), other.text
    return seen_by(started)


def train_in_one(kind: str, text, workdir) -> None:
    before = children.quick_compiles()
    try:
        loop.train(configs.load(f"{RUNS}:{kind}", {"data.source": f"text:{text}"}), workdir)
    finally:
        children.restore(before)


def assert_same_losses(one, other, rtol: float = 1e-5) -> None:
    expected, got = losses_of(one), losses_of(other)
    assert got.keys() == expected.keys()
    for step in expected:
        np.testing.assert_allclose(got[step], expected[step], rtol=rtol, err_msg=str(step))
    np.testing.assert_allclose(*(read_metrics(path)[-1]["eval/loss"] for path in (one, other)), rtol=rtol)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "begun_by_one"),
    [
        ("lanes", False),
        ("pairs", True),
        pytest.param("lanes", True, marks=slow),
        pytest.param("pairs", False, marks=slow),
    ],
)
def test_two_processes_are_one(kind, begun_by_one, text, tmp_path):
    """Measured: losses 2e-7 apart at most, over a fresh run and over one that a single process began."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_in_one(kind, text, one)
    if begun_by_one:
        shutil.copytree(one, two)
        for step in ("20", "24"):
            shutil.rmtree(two / "checkpoints" / step)
    seen = train_in(2, kind, text, two)
    assert [process["rows"] for process in seen] == [[[0, B // 2]], [[B // 2, B]]]
    records = {"config.json", "run.json", "metrics.jsonl", "results.jsonl", "tokenizer.json"}
    written = [{name for name in records for path in process["written"] if name in path} for process in seen]
    assert written == [records, set()]
    others = [path for path in seen[1]["written"] if path.startswith(str(two)) and "/checkpoints/" not in path]
    assert all(".writable" in path for path in others), others
    assert_same_losses(one, two)
    run = json.loads((two / "run.json").read_text())
    assert [session["devices"]["processes"] for session in run["sessions"]] == [1] * begun_by_one + [2]


# Finding each other, and dying together


def values_of(*arguments: str) -> flags.FlagValues:
    """The flags of `processes.define_flags`, in a set of their own."""
    values = flags.FlagValues()
    processes.define_flags(values)
    values(["command", *arguments])
    return values


SLURM = {"SLURM_JOB_ID": "70001", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
SLURM |= {"SLURM_STEP_NODELIST": "n[007-009],m1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, None),
        (["--coordinator_address=h", "--num_processes=1", "--process_id=0"], {}, None),
        (["--coordinator_address=h", "--num_processes=2", "--process_id=1"], {}, ("h:8476", 2, 1, None)),
        (["--coordinator_address=h:99", "--num_processes=2", "--process_id=1"], {}, ("h:99", 2, 1, None)),
        ([], SLURM, (f"n007:{61440 + 70001 % 4096}", 4, 3, None)),
        (["--coordinator_port=5"], SLURM | {"SLURM_STEP_NODELIST": "one,two"}, ("one:5", 4, 3, None)),
        ([], SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (f"n007:{61440 + 70001 % 4096}", 4, 3, (2, 3))),
        ([], SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (["--cluster=none"], SLURM, None),
        ([], {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, ("a:8476", 2, 1, None)),
    ],
)
def test_who_the_processes_are(arguments, environment, expected):
    found = processes.find(values_of(*arguments), environment)
    assert (found and (found.address, found.count, found.index, found.devices)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes=2"], "belong together"),
        (["--coordinator_address=h", "--num_processes=2", "--process_id=2"], "process_id=2 must be below"),
        (["--coordinator_address=h:1", "--coordinator_port=2"], "must be HOST or HOST:PORT, the latter without"),
        (["--coordinator_address=h"], "needs --num_processes and --process_id"),
        (["--cluster=slurm"], "not started by srun"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        processes.find(values_of(*arguments), {})


def meet(count: int, given: dict[int, str], output, *more: str) -> dict[int, children.Child]:
    """Processes of a command that adds numbers for ever; given: {index: what becomes of it in its tenth sum}."""
    port = free_port()
    return {
        index: children.start(
            "fixtures.adding",
            "--coordinator_address=localhost",
            f"--coordinator_port={port}",
            f"--num_processes={count}",
            f"--process_id={index}",
            *more,
            output=output / str(index),
            devices=1,
            FATE=fate,
        )
        for index, fate in given.items()
    }


def errors_of(child: children.Child) -> list[str]:
    return [line for line in child.text.splitlines() if not line.startswith("[Gloo]")]


def test_too_few_processes_say_who_is_missing(tmp_path):
    started = meet(4, {0: "", 2: ""}, tmp_path, "--join_seconds=5")
    assert [child.wait(30) for child in started.values()] == [2, 2]
    (line,) = errors_of(started[0])
    assert re.search(r"2 of 4 processes came to localhost:\d+ in 5 s; not there: 1, 3\.", line)
    (line,) = errors_of(started[2])
    assert "not all processes came in 5 s; process 0 says which" in line
    alone = meet(2, {1: ""}, tmp_path, "--join_seconds=1")[1]
    assert alone.wait(30) == 2
    assert "process 0 did not answer at localhost" in errors_of(alone)[-1]


@pytest.mark.parametrize(
    ("fate", "code", "message"),
    [
        (
            "kill",
            1,
            r"error: process 1 of 2 \(host .*, process id \d+\) died: its log tells why; so process 0 ends, too",
        ),
        ("raise", 1, r"error: process 1 of 2 failed \(ValueError: its reason\); so process 0 ends, too"),
        ("refuse", 2, r"error: process 1 of 2 failed \(UserError: its reason\); so process 0 ends, too"),
        ("stop", 1, r"error: process 1 of 2 \(.*\) was silent for 2 s \(--peer_seconds\); so process 0 ends, too"),
    ],
)
def test_the_death_of_one_is_the_end_of_all(fate, code, message, tmp_path):
    started = meet(2, {0: "", 1: fate}, tmp_path, "--peer_seconds=2")
    assert started[0].wait(60) == code, started[0].text
    died = time.monotonic()
    if fate == "stop":
        os.kill(started[1].process.pid, signal.SIGKILL)
    started[1].wait(20)
    assert time.monotonic() - died < 5
    assert re.search(message, errors_of(started[0])[-1]), started[0].text
    if fate == "refuse":
        assert errors_of(started[1]) == ["error: its reason"]


def test_the_death_of_the_first_is_the_end_of_all(tmp_path):
    started = meet(2, {0: "kill", 1: ""}, tmp_path)
    assert started[1].wait(60) == 1, started[1].text
    message = r"error: process 0 of 2 \(at localhost:\d+\) died: its log tells why; so process 1 ends, too"
    assert re.fullmatch(message, errors_of(started[1])[-1]), started[1].text


@slow
@pytest.mark.parametrize(
    ("count", "kind", "mesh"),
    [(4, "lanes", {"fsdp": 2, "tensor": 2}), (8, "pairs", {"fsdp": 2, "tensor": 2}), (8, "lanes", {})],
)
def test_four_and_eight_processes_are_one(count, kind, mesh, text, tmp_path):
    """Measured: losses 1.3e-7 apart at most."""
    one, many = tmp_path / "one", tmp_path / "many"
    train_in_one(kind, text, one)
    seen = train_in(count, kind, text, many, *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()))
    pieces = count // mesh.get("tensor", 1)
    own = [[[row, row + B // pieces]] for row in range(0, B, B // pieces) for _ in range(count // pieces)]
    assert [process["rows"] for process in seen] == own
    assert not any(name in path for process in seen[1:] for path in process["written"] for name in ("json", "metrics"))
    assert_same_losses(one, many)


@slow
@pytest.mark.parametrize("kind", ["lanes", "pairs"])
def test_stopped_on_eight_processes_it_goes_on_on_two(kind, text, tmp_path):
    """Data 4 x fsdp 2 is killed after step 10 and goes on as tensor 2. Measured: losses 1.4e-7 apart at most."""
    one, run = tmp_path / "one", tmp_path / "run"
    train_in_one(kind, text, one)
    eight = begin(8, kind, text, run, "--config.mesh.fsdp=2")
    deadline = time.monotonic() + 1200
    while not (run / "checkpoints" / "10").exists():
        assert time.monotonic() < deadline, eight[0].text
        time.sleep(0.02)
    for child in eight:
        child.process.kill()
        child.process.join()
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    two = train_in(2, kind, text, run, "--config.mesh.tensor=2")
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert [session["devices"]["processes"] for session in sessions] == [8, 2]
    assert sessions[1]["from_step"] >= 10
    assert_same_losses(one, run)
    # Every row of every batch that both made is the same, whoever made it.
    rows: dict[str, dict] = {}
    for process in seen_by(eight):
        for step, sums in process["batches"].items():
            rows.setdefault(step, {}).update(sums)
    again = [step for step in two[0]["batches"] if step in rows]
    assert again
    for step in again:
        assert rows[step] == {row: two[0]["batches"][step][row] for row in rows[step]}
