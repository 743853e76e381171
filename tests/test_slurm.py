"""A sweep on a real Slurm, one point requeued in the middle and one told that its time is over, is the local sweep.

`make test-slurm` installs Slurm and starts it for this file; elsewhere it is skipped.
"""

import json
import os
import subprocess
import sys
import time

import pytest
from fixtures import corpus, slurm_node
from fixtures.children import ROOT, RUNS
from test_loop import assert_same_checkpoint, losses_of

STEPS = 60
POINTS = ("lanes", "blocks", "pairs")

pytestmark = pytest.mark.skipif(
    "PLM_TEST_SLURM" not in os.environ, reason="needs a Slurm of its own, as root: run `make test-slurm`"
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a cluster's commands."""
    if missing := slurm_node.missing():
        pytest.fail(f"not installed: {', '.join(missing)} (packages slurm-wlm and munge)")
    with slurm_node.running(tmp_path_factory.mktemp("slurm") / "node") as environment:
        yield environment


def sweep(root, text, environment, *flags: str) -> subprocess.CompletedProcess:
    settings = {
        "data.source": f"text:{text}",
        "total_steps": STEPS,
        "log.every_steps": 1,
        "checkpoint.every_steps": 30,
    }
    settings |= {"eval.every_steps": STEPS}
    command = [sys.executable, "-m", "launch.sweep", f"--config={RUNS}", f"--root={root}", "--processes=2"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    environment = environment | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def wait_for_step(root, point: str, step: int, environment) -> None:
    deadline = time.monotonic() + 300
    while not ((root / point / "metrics.jsonl").exists() and max(losses_of(root / point), default=0) >= step):
        if time.monotonic() > deadline:
            logs = [*(root / "slurm").glob("*"), *(root / point).glob("log*")]
            raise AssertionError("\n".join(f"== {path}\n{path.read_text()}" for path in logs))
        time.sleep(0.02)


def job_of(root, point: str) -> str:
    return json.loads((root / point / "point.json").read_text())["job"]


def test_a_requeued_sweep_is_the_local_one(slurm, tmp_path):
    text = corpus.write(tmp_path / "corpus.txt")
    local = sweep(tmp_path / "local", text, os.environ, "--backend=local")
    assert local.returncode == 0, local.stdout + local.stderr
    root = tmp_path / "slurm"
    submitted = sweep(root, text, slurm, "--backend=slurm", "--workers=1", "--grace_seconds=60", "--sbatch=--time=30")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "submitted" in submitted.stdout

    again = sweep(root, text, slurm, "--backend=slurm")
    assert again.returncode == 0, again.stderr
    assert "submitted" not in again.stdout, "what is queued or running is not submitted twice"

    wait_for_step(root, "lanes", 5, slurm)
    subprocess.run(["scontrol", "requeue", job_of(root, "lanes")], env=slurm, check=True)
    wait_for_step(root, "blocks", 5, slurm)
    subprocess.run(["scancel", "--signal=USR1", job_of(root, "blocks")], env=slurm, check=True)

    ended = sweep(root, text, slurm, "--backend=slurm", "--wait")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    status = sweep(root, text, slurm, "--backend=slurm", "--status")
    assert status.returncode == 0
    assert [line.split()[:3] for line in status.stdout.splitlines()[1:]] == [
        [point, "finished", f"{STEPS}/{STEPS}"] for point in POINTS
    ]
    sessions = {}
    for point in POINTS:
        assert_same_checkpoint(root / point, tmp_path / "local" / point, STEPS)
        assert losses_of(root / point) == losses_of(tmp_path / "local" / point)
        run = json.loads((root / point / "run.json").read_text())
        assert all(session["devices"]["processes"] == 2 for session in run["sessions"])
        sessions[point] = [session["from_step"] for session in run["sessions"]]
        assert {path.name for path in (root / point).glob("log*")} == {"log.0.txt", "log.1.txt"}
    assert len(sessions["lanes"]) == len(sessions["blocks"]) == 2, sessions
    assert all(0 < sessions[point][1] < STEPS for point in ("lanes", "blocks"))
    assert sessions["pairs"] == [0]


def test_a_point_that_fails_is_told_and_not_requeued(slurm, tmp_path):
    root, text = tmp_path / "slurm", tmp_path / "nothing.txt"
    done = sweep(root, text, slurm, "--backend=slurm", "--only=lanes", "--wait")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split()[:2] == ["lanes", "failed"]
    assert (root / "lanes" / "return_code").read_text() == "2\n"
