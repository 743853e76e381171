"""Queued TPU resources against a stand-in for gcloud: what is called, preemptions, failing ssh, cleaning up."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from etils import epath
from fixtures import corpus
from fixtures.children import ROOT
from test_loop import losses_of
from test_processes import free_port

from launch import points, sweep, tpu
from plm.errors import UserError
from plm.training import config as configs
from plm.training import loop, metrics

GOLDEN = ROOT / "tests" / "fixtures" / "gcloud_lines.json"
OPTIONS = tpu.Options("v5litepod-16", "us-west4-a", "v2-alpha-tpuv5-lite")
BUCKET = epath.Path("gs://bucket/a sweep")
POINT = points.Point("elmo", BUCKET / "elmo", "experiments/compare.py:tiny", {"optimizer.peak_lr": 1e-3})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("on demand", {}),
        ("spot", {"spot": True, "project": "mine"}),
        ("any reservation", {"reservation": "any"}),
        ("a reservation", {"reservation": "ours", "port": 9000}),
    ],
)
def test_every_gcloud_line_is_known(name, options):
    """As --dry_run prints it."""
    lines = tpu.dry_run(POINT, BUCKET, tpu.dataclasses.replace(OPTIONS, **options))
    assert lines == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root=gs://b/r", "--tpu_zone=z", "--tpu_runtime=r"], "needs --tpu_type, for example"),
        (["--root=runs/r", "--tpu_zone=z", "--tpu_runtime=r", "--tpu_type=t"], "must be in a bucket"),
        (
            ["--root=gs://b/r", "--tpu_zone=z", "--tpu_runtime=r", "--tpu_type=t", "--tpu_spot", "--tpu_reservation=a"],
            "exclude each other",
        ),
    ],
)
def test_what_is_missing_is_said(arguments, message):
    command = [sys.executable, "-m", "launch.sweep", "--config=experiments/compare.py:tiny", "--backend=tpu"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


def test_a_config_outside_of_what_is_sent_is_refused():
    with pytest.raises(UserError, match="is not sent to the workers"):
        tpu.dry_run(points.Point("a", BUCKET / "a", "/somewhere/mine.py"), BUCKET, OPTIONS)


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """The stand-in's folder; it is the only gcloud on the PATH."""
    folder = tmp_path / "cloud"
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "gcloud"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fixtures/gcloud.py "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("GCLOUD_FOLDER", str(folder))
    yield folder
    subprocess.run([str(script), "compute", "tpus", "queued-resources", "delete", "x"], capture_output=True)


def plan(folder, **plan) -> None:
    empty = {"waits": 1, "ssh_failures": 0, "preempt_after": [], "metrics": str(folder / "nothing")}
    (folder / "plan.json").write_text(json.dumps(empty | plan))


def verbs(folder) -> list[str]:
    """What was called, without asking for the state."""
    called = []
    for line in (folder / "calls").read_text().splitlines():
        words = [word for word in json.loads(line) if not word.startswith("--")]
        command = next((word[10:] for word in json.loads(line) if word.startswith("--command=")), "")
        what = {"true": "warm"}.get(command) or next(
            (name for name, mark in {"start": "setsid", "install": "tar", "stop": "kill"}.items() if mark in command),
            "",
        )
        called.append(what or words[3])
    return [verb for verb in called if verb != "describe"]


# In place of an installation: the environment that the tests run in.
LINK = f"mkdir -p .venv/bin && printf '#!/bin/sh\\nexec {sys.executable} \"$@\"\\n' > .venv/bin/python"
SETUP = f"{LINK} && chmod +x .venv/bin/python"


def options_of(**more) -> tpu.Options:
    given = {"setup": SETUP, "port": free_port(), "poll_seconds": 0.2, "grace_seconds": 30.0}
    return tpu.dataclasses.replace(OPTIONS, **given | more)


def launch(found, root, options) -> int:
    backend = sweep.Tpu(epath.Path(root), options, workers=1)
    return sweep.launch(found, epath.Path(root), retry="none", chosen=found, backend=backend)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A checkout whose `plm.train` is a stub: it does a step every 30 ms, saves on SIGTERM, and obeys file `fate`."""
    checkout = tmp_path / "checkout"
    for name in tpu.CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    (checkout / "plm" / "train.py").write_text(
        """
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir="))[10:])
assert "--cluster=tpu" in sys.argv
fate = (workdir / "fate").read_text() if (workdir / "fate").exists() else ""
if fate == "fail":
    print("error: the reason")
    sys.exit(2)
saved, stop = workdir / "saved", []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
for step in range(int(saved.read_text()) if saved.exists() else 0, 60):
    if os.environ["TPU_WORKER_ID"] == "0":
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step + 1, "train/loss": 1.0}) + chr(10))
        if stop:
            saved.write_text(str(step + 1))
    if stop:
        sys.exit(75)
    time.sleep(0.03)
"""
    )
    monkeypatch.chdir(checkout)
    return checkout


def point_of(root) -> list[points.Point]:
    return [points.Point("elmo", epath.Path(root) / "elmo", "experiments/compare.py:tiny")]


def test_a_worker_knows_which_code_it_runs(tmp_path, monkeypatch):
    """It has no git: the protocol's hash and the commit travel with the code."""
    monkeypatch.chdir(ROOT)
    tpu.pack(tmp_path / "plm.tar.gz")
    with tarfile.open(tmp_path / "plm.tar.gz") as archive:
        archive.extractall(tmp_path / "plm", filter="data")
    script = "from plm.training import metrics; print(metrics.code_version(), metrics.protocol_hash())"
    there = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "plm", capture_output=True, text=True)
    assert there.stdout.strip() == f"{metrics.code_version()} {metrics.protocol_hash()}", there.stderr


ONCE = ["delete", "create", "warm", "scp", "install", "start", "delete"]


def test_two_preemptions_and_a_failing_ssh(gcloud, stub, tmp_path, capsys):
    root = tmp_path / "root"
    metrics = root / "elmo" / "metrics.jsonl"
    plan(gcloud, ssh_failures=2, preempt_after=[10, 10], metrics=str(metrics))
    assert launch(point_of(root), root, options_of()) == 0
    assert verbs(gcloud) == ["delete", "create", "warm", "warm", *ONCE[2:], *ONCE, *ONCE]
    assert not (gcloud / "state").exists()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 61)), "no step was lost, none done twice"
    told = capsys.readouterr().out
    assert told.count("queueing again after step") == 2
    assert "ssh failed (1 of 5): ERROR: (gcloud) [/usr/bin/ssh] exited with return code [255]." in told
    assert sorted(path.name for path in (root / "elmo" / "launch").iterdir()) == ["1", "2", "3"]
    assert {path.name for path in (root / "elmo" / "launch" / "3").iterdir()} == {
        f"{kind}.{index}{ending}" for kind, ending in (("log", ".txt"), ("code", "")) for index in range(2)
    }
    record = json.loads((root / "elmo" / "point.json").read_text())
    assert (record["return_code"], record["attempts"]) == (0, 3)


def test_a_failed_run_is_not_queued_again(gcloud, stub, tmp_path, capsys):
    root = tmp_path / "root"
    (root / "elmo").mkdir(parents=True)
    (root / "elmo" / "fate").write_text("fail")
    plan(gcloud)
    assert launch(point_of(root), root, options_of()) == 1
    assert verbs(gcloud) == ONCE
    assert "    error: the reason" in capsys.readouterr().out
    assert points.state(root / "elmo") == "failed"


def test_machines_that_never_work_are_given_up(gcloud, stub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tpu, "_TRIES", 2)
    root = tmp_path / "root"
    plan(gcloud, ssh_failures=1000)
    assert launch(point_of(root), root, options_of(poll_seconds=0.1)) == 1
    assert verbs(gcloud).count("create") == 3
    assert "3 attempts in a row did no step: given up" in capsys.readouterr().out
    assert not (gcloud / "state").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_launcher_that_ends_goes_on_when_it_is_typed_again(number, gcloud, stub, tmp_path):
    """Ctrl-C saves and deletes; after kill -9 the next one deletes what it finds."""
    root = tmp_path / "root"
    plan(gcloud)
    code = (
        "import sys; from test_launch_tpu import *; import pathlib, signal\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n"  # what a shell starts behind & is deaf to the second
        "    signal.signal(number, signal.default_int_handler)\n"
        f"root = pathlib.Path({str(root)!r}); sys.exit(launch(point_of(root), root, options_of()))"
    )
    environment = os.environ | {"PYTHONPATH": f"{stub}:{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=stub, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (root / "elmo" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) != 0
    if number == signal.SIGINT:
        assert verbs(gcloud) == [*ONCE[:-1], "stop", "delete"]
        assert not (gcloud / "state").exists()
        assert 0 < int((root / "elmo" / "saved").read_text()) < 60
    else:
        assert (gcloud / "state").exists()
    assert points.state(root / "elmo") == "interrupted"
    assert launch(point_of(root), root, options_of()) == 0
    steps = [json.loads(line)["step"] for line in (root / "elmo" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


@pytest.mark.slow
def test_a_real_run_on_two_workers_survives_two_preemptions(gcloud, stub, tmp_path, cache):
    """The second one without time to save. It ends as a run that nothing disturbed."""
    text, root = corpus.write(tmp_path / "corpus.txt"), tmp_path / "root"
    shutil.copy(ROOT / "plm" / "train.py", stub / "plm" / "train.py")
    shutil.copy(ROOT / "tests" / "fixtures" / "runs.py", stub / "experiments" / "runs.py")
    settings = {"data.source": f"text:{text}", "log.every_steps": 1, "total_steps": 60}
    found = [points.Point("lanes", epath.Path(root) / "lanes", "experiments/runs.py:lanes", settings)]
    plan(gcloud, ssh_failures=1, preempt_after=[5, 10], metrics=str(root / "lanes" / "metrics.jsonl"))
    assert launch(found, root, options_of()) == 0
    assert verbs(gcloud).count("create") == 3
    assert not (gcloud / "state").exists()
    alone = tmp_path / "alone"
    loop.train(configs.load(f"{ROOT}/tests/fixtures/runs.py:lanes", settings), alone)
    expected, got = losses_of(alone), losses_of(root / "lanes")
    assert got.keys() == expected.keys()
    for step in expected:
        assert got[step] == pytest.approx(expected[step], rel=1e-5), step
    sessions = json.loads((root / "lanes" / "run.json").read_text())["sessions"]
    assert len(sessions) == 3
    assert all(session["devices"]["processes"] == 2 for session in sessions)
