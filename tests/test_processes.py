"""Two processes train as one does: same losses, each makes its own rows only, the first alone writes the records.

And they find each other, say who is missing, and end together when one dies.
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
    """In a child, before it trains: notes the rows that it makes and the files that Python opens for writing."""
    from plm.data import pretrain

    seen = {"rows": [], "written": []}
    real = pretrain._Layout._numbers

    def numbers(self, step, rows):
        if self.training and [rows.start, rows.stop] not in seen["rows"]:
            seen["rows"].append([rows.start, rows.stop])
            note()
        return real(self, step, rows)

    def note():
        with contextlib.suppress(OSError):
            Path(os.environ["WATCH"]).write_text(json.dumps(seen))

    def audit(event, arguments):
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+x"):
            path = str(arguments[0])
            if path != os.environ["WATCH"] and path not in seen["written"]:
                seen["written"].append(path)
                note()

    pretrain._Layout._numbers = numbers
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


def train_in_two(kind: str, text, workdir, *flags: str) -> list[dict]:
    """Runs the command as two processes of one device each; returns what each of them saw."""
    address = f"localhost:{free_port()}"
    started = []
    for index in range(2):
        arguments = [f"--config={RUNS}:{kind}", f"--config.data.source=text:{text}", f"--workdir={workdir}", *flags]
        arguments += [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}"]
        out = workdir.with_name(f"{workdir.name}.{index}")
        before = [("test_processes", "watch")]
        environment = {"devices": 1, "WATCH": f"{out}.json"}
        started.append(children.start("plm.train", *arguments, output=out, before=before, **environment))
    codes = [child.wait() for child in started]
    assert codes == [0, 0], "\n".join(child.text for child in started)
    assert "complete after 24 steps" in started[0].text
    assert all(line.startswith("[Gloo]") for line in started[1].text.splitlines()), started[1].text
    return [json.loads(Path(f"{child.output}.json").read_text()) for child in started]


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
    before = children.quick_compiles()
    try:
        one, two = tmp_path / "one", tmp_path / "two"
        loop.train(configs.load(f"{RUNS}:{kind}", {"data.source": f"text:{text}"}), one)
    finally:
        children.restore(before)
    if begun_by_one:
        shutil.copytree(one, two)
        for step in ("20", "24"):
            shutil.rmtree(two / "checkpoints" / step)
    seen = train_in_two(kind, text, two)
    assert [process["rows"] for process in seen] == [[[0, B // 2]], [[B // 2, B]]]
    records = {"config.json", "run.json", "metrics.jsonl", "results.jsonl", "tokenizer.json"}
    written = [{name for name in records for path in process["written"] if name in path} for process in seen]
    assert written == [records, set()]
    others = [path for path in seen[1]["written"] if path.startswith(str(two)) and "/checkpoints/" not in path]
    assert all(".writable" in path for path in others), others
    expected, got = losses_of(one), losses_of(two)
    assert got.keys() == expected.keys()
    for step in expected:
        np.testing.assert_allclose(got[step], expected[step], rtol=1e-5, err_msg=str(step))
    np.testing.assert_allclose(*(read_metrics(path)[-1]["eval/loss"] for path in (one, two)), rtol=1e-5)
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
    assert started[1].wait(60) == 1
    assert "process 0 of 2 (at localhost" in errors_of(started[1])[-1]
