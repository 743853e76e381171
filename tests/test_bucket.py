"""A workdir in a bucket: runs, sweeps, evaluations and reports on gs:// are those of a local folder.

Through gcsfs, TensorStore and google-cloud-storage, as users have them, against a server that stands for Google's
(`fixtures.bucket`). `make test-bucket` installs gcsfs; without it this file is skipped.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gcsfs", reason="needs gcsfs: run `make test-bucket`")

import test_launch_tpu
from etils import epath
from fixtures import children, corpus
from fixtures.bucket import VARIABLES, serving
from fixtures.children import ROOT, RUNS
from test_launch_tpu import gcloud, options_of, plan, stub, verbs  # noqa: F401 - fixtures
from test_loop import assert_same_checkpoint, config_of, lines_of

import plm
from launch import points
from plm.analysis import suites
from plm.errors import UserError
from plm.reporting import bundle
from plm.training import checkpoint, loop
from plm.training.metrics import read_results

pytestmark = pytest.mark.slow
KIND = "lanes"  # has all items of a checkpoint: parameters, the carried state, the rest
EVERY_LINE = "--config.log.every_steps=1"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The bucket; this process and those that it starts reach it, and share their compiled programs."""
    with serving() as (objects, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("PLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        before = children.quick_compiles()
        yield objects
        children.restore(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(scope="module")
def local(served, tmp_path_factory, text):
    """The same run in a folder."""
    workdir = tmp_path_factory.mktemp("local") / "toy"
    loop.train(config_of(KIND, text, log__every_steps=1), workdir)
    return workdir


def start(workdir: str, text, output: Path) -> children.Child:
    environment = {name: os.environ[name] for name in VARIABLES}
    arguments = [f"--config={RUNS}:{KIND}", f"--config.data.source=text:{text}", f"--workdir={workdir}", EVERY_LINE]
    return children.start("plm.train", *arguments, output=output, **environment)


def command(module: str, *arguments: str, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    quick = {name.upper(): str(value) for name, value in children.QUICK_COMPILES.items()}
    quick |= {"JAX_COMPILATION_CACHE_DIR": f"{os.environ['PLM_CACHE']}/compiled", "PYTHONPATH": str(ROOT)}
    environment = os.environ | quick | environment
    words = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def when(served, prefix: str, do) -> None:
    """Calls `do` once, when an object with this prefix is written."""

    def look(name: str) -> None:
        if name.startswith(prefix):
            served.on_put = lambda _: None
            do()

    served.on_put = look


@pytest.fixture(scope="module")
def run(served, text, tmp_path_factory):
    """A run in the bucket that was killed in the middle of a save, told to stop, and met a bucket that was busy."""
    workdir, folder = "gs://bucket/runs/toy", tmp_path_factory.mktemp("outputs")
    child = start(workdir, text, folder / "1")
    when(served, "runs/toy/checkpoints/10/params/ocdbt", child.process.kill)
    assert child.wait() == -signal.SIGKILL, child.text
    assert "runs/toy/checkpoints/5/commit_success.txt" in served.names()
    assert "runs/toy/checkpoints/10/commit_success.txt" not in served.names()
    child = start(workdir, text, folder / "2")
    when(served, "runs/toy/checkpoints/10/params/ocdbt", child.process.terminate)
    assert child.wait() == 75, child.text
    assert "resuming after step 5" in child.text
    child = start(workdir, text, folder / "3")
    when(served, "runs/toy/checkpoints/2", lambda: served.faults.extend([503, 429] * 3))
    assert child.wait() == 0, child.text
    assert not served.faults, "all were met"
    return workdir


def test_a_killed_and_stopped_run_is_the_local_one(served, run, local, tmp_path):
    copy = served.download("runs/toy", tmp_path / "copy")
    steps = sorted(int(path.name) for path in (copy / "checkpoints").iterdir())
    assert len(steps) == 3
    assert steps[-1] == 24
    assert_same_checkpoint(copy, local)
    assert lines_of(copy) == lines_of(local)
    assert read_results(copy) == read_results(local)
    record = json.loads((copy / "run.json").read_text())
    assert (record["status"], record["step"]) == ("complete", 24)
    first, killed, stopped = [session["from_step"] for session in record["sessions"]]
    assert (first, killed) == (0, 5)
    assert 10 <= stopped < 24


def test_the_command_again_changes_nothing(served, run, text, tmp_path):
    before = dict(served.objects)
    child = start(run, text, tmp_path / "out")
    assert child.wait() == 0
    assert f"already complete after 24 steps: {run}" in child.text
    assert before == served.objects


def test_a_model_of_it_is_the_local_one(run, local):
    there, here = plm.load(run), plm.load(str(local))
    texts = ["Bake kelimo nura.", "Tivo zaba."]
    for a, b in zip(there.embed(texts), here.embed(texts), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match=r"has no checkpoint of step 7; it has .*24"):
        plm.load(f"{run}@7")


def test_what_other_processes_write_is_seen(served, run):
    """Checkpoint 24 becomes 25 behind the back of this process, which has listed the folder before."""
    for name in served.names("runs/toy/"):
        served.put(name.replace("runs/toy/", "moved/").replace("/24/", "/25/"), served.objects[name].content, {})
    (before,) = [name for name in served.names("moved/checkpoints/25/") if name.endswith("25/commit_success.txt")]
    listed = checkpoint.kept_steps("gs://bucket/moved")
    for name in served.names("moved/checkpoints/25/"):
        served.put(name.replace("/25/", "/26/"), served.objects[name].content, {})
        served.delete(name, {})
    assert before not in served.names()
    assert checkpoint.kept_steps("gs://bucket/moved") == [*listed[:-1], 26]
    assert plm.load("gs://bucket/moved").step == 26


def test_half_of_what_a_kept_checkpoint_loses_goes_the_next_time(served, run, tmp_path):
    """`rest` is renamed file by file: after a kill in the middle both halves are there."""
    for name in served.names("runs/toy/"):
        served.put(name.replace("runs/toy/", "half/"), served.objects[name].content, {})
    oldest = checkpoint.kept_steps("gs://bucket/half")[0]
    rest = served.names(f"half/checkpoints/{oldest}/rest/")
    for name in rest[: len(rest) // 2]:
        served.move(name, name.replace("/rest/", "/rest.removed/"))
    with checkpoint.Checkpoints("gs://bucket/half/checkpoints", keep=1, keep_at=[oldest]):
        pass
    left = {name.split("/")[3] for name in served.names(f"half/checkpoints/{oldest}/")}
    assert {"params", "manifest", "commit_success.txt"} <= left
    assert not {"rest", "rest.removed", "carry", "carry.removed"} & left
    assert plm.load(f"gs://bucket/half@{oldest}").step == oldest


def test_evaluations_and_the_page_are_the_local_ones(served, run, local, tmp_path):
    for model in (run, str(local)):
        suites.evaluate(suites.Run(model), ["ngrams", "perplexity"], say=lambda _: None)
    copy = served.download("runs/toy", tmp_path / "copy")
    rows = [[row for row in read_results(place) if row.suite != "pretraining"] for place in (copy, local)]
    assert len(rows[0]) > 3
    assert rows[0] == rows[1]
    done = command("plm.report", "gs://bucket/runs", "--export=csv", "--bundle=gs://bucket/out/runs.tar", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}, "no folder named gs:"
    assert "1 runs (1 complete): gs://bucket/runs/report.html" in done.stdout
    assert "</html>" in served.text("runs/report.html")
    assert [name for name in served.names("runs/report_files/") if name.endswith(".csv")]
    (tmp_path / "runs.tar").write_bytes(served.objects["out/runs.tar"].content)
    bundle.unpack(tmp_path / "runs.tar", tmp_path / "unpacked")
    there = (tmp_path / "unpacked" / "bucket" / "runs" / "toy" / "results.jsonl").read_text()
    assert there == served.text("runs/toy/results.jsonl")


def test_a_sweep_of_this_machine(served, text, local, tmp_path):
    """Two runs, one that fails between them, and a measurement, whose rows lie in the first one's workdir."""
    file = tmp_path / "sweep.py"
    file.write_text(
        "def sweep(add, arguments=''):\n"
        f"    for name, text in (('a', '{text}'), ('b', '{tmp_path}/none'), ('c', '{text}')):\n"
        "        settings = {'data.source': f'text:{text}', 'log.every_steps': 1, 'checkpoint.every_steps': 12}\n"
        f"        add(name, '{KIND}', settings, file='{RUNS}')\n"
        "    add.measure('measured', 'a', ['--suite=perplexity'])\n"
    )
    served.put("sweeps/three/b/log.txt", b"an earlier attempt\n", {})
    done = command("launch.sweep", f"--config={file}", "--root=gs://bucket/sweeps/three", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines()[-4:]] == [
        ["a", "finished", "24/24"],
        ["b", "failed"],
        ["c", "finished", "24/24"],
        ["measured", "finished"],
    ]
    assert re.fullmatch("an earlier attempt\nerror: .*none.*\n", served.text("sweeps/three/b/log.txt"))
    for name in ("a", "c"):
        copy = served.download(f"sweeps/three/{name}", tmp_path / "copies" / name)
        assert_same_checkpoint(copy, local)
        assert (copy / "log.txt").read_text().endswith(f"complete after 24 steps: gs://bucket/sweeps/three/{name}\n")
    rows = read_results(tmp_path / "copies" / "a")
    assert {row.suite for row in rows} == {"pretraining", "perplexity"}
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.py", "copies"}, "nothing on this machine"
    assert not Path("/gs/bucket").exists(), "what pathlib makes of gs://bucket"


WORKER = """
import json, os, signal, sys, time
from etils import epath
workdir = epath.Path(next(a for a in sys.argv if a.startswith("--workdir="))[10:])
first, stop = os.environ["TPU_WORKER_ID"] == "0", []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
lines = (workdir / "metrics.jsonl").read_text() if (workdir / "metrics.jsonl").exists() else ""
for step in range(lines.count(chr(10)), 12):
    lines += json.dumps({"step": step + 1, "train/loss": 1.0}) + chr(10)
    if first:
        (workdir / "metrics.jsonl").write_text(lines)
    if stop:
        sys.exit(75)
    time.sleep(0.5)
print("did", lines.count(chr(10)))
"""


def test_a_sweep_of_tpus(served, gcloud, stub, tmp_path):  # noqa: F811
    """The launcher and two workers of a slice that is taken away once know of each other by the bucket."""
    (stub / "plm" / "train.py").write_text(WORKER)
    metrics = tmp_path / "metrics.jsonl"  # what the stand-in for gcloud looks at
    served.on_put = lambda name: metrics.write_text(served.text(name)) if name.endswith("metrics.jsonl") else None
    plan(gcloud, preempt_after=[2], metrics=str(metrics))
    root = "gs://bucket/sweeps/tpu"
    assert test_launch_tpu.launch(test_launch_tpu.point_of(root), root, options_of()) == 0
    served.on_put = lambda name: None
    assert verbs(gcloud).count("create") == 2
    assert [json.loads(line)["step"] for line in served.text("sweeps/tpu/elmo/metrics.jsonl").splitlines()] == [
        *range(1, 13)
    ]
    record = json.loads(served.text("sweeps/tpu/elmo/point.json"))
    assert (record["return_code"], record["attempts"]) == (0, 2)
    assert served.text("sweeps/tpu/elmo/launch/2/log.0.txt") == "did 12\n"
    assert points.state(epath.Path(root) / "elmo") == "finished"


@pytest.mark.parametrize(
    ("workdir", "without", "message"),
    [
        ("gs://elsewhere/run", "", "FileNotFoundError"),
        ("gs://bucket/run", "gcsfs", "ImportError: Please install gcsfs"),
    ],
)
def test_a_bucket_that_cannot_be_reached_is_one_line(served, workdir, without, message, tmp_path):
    if without:
        (tmp_path / f"{without}.py").write_text("raise ImportError")
    flags = [f"--config={RUNS}:{KIND}", "--config.data.source=text:none", f"--workdir={workdir}"]
    done = command("plm.train", *flags, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"--workdir={workdir} cannot be written: {message}" in line
