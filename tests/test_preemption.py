"""A run that is told to stop ends its step, saves it, and its exit code says so; resumed, it was never interrupted."""

import os
import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from fixtures import children, corpus
from fixtures.children import RUNS
from test_loop import assert_same_checkpoint, losses_of

from plm.command import INTERRUPTED
from plm.training import config as configs
from plm.training import loop, preemption, program
from plm.training.metrics import RunRecord, read_metrics
from plm.training.sharding import make_mesh

EVERY_LINE = {"log.every_steps": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus.write(tmp_path_factory.getbasetemp() / "corpus.txt")


@pytest.fixture(autouse=True)
def compiled_once(cache):
    before = children.quick_compiles()
    yield
    children.restore(before)


def config_of(text):
    return configs.load(f"{RUNS}:lanes", {"data.source": f"text:{text}", **EVERY_LINE})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def uninterrupted(whole, text, compiled_once):
    """The workdir of a run that nothing disturbed, made once."""
    if not whole.exists():
        loop.train(config_of(text), whole)
    return whole


def signalled(monkeypatch, at_step: int, number: int) -> None:
    """This process gets a signal in the middle of a step."""
    real_make = program.make_train_step

    def make(*arguments, **options):
        step = real_make(*arguments, **options)

        def run(state, batch):
            if int(state.step) == at_step - 1:
                os.kill(os.getpid(), number)
                time.sleep(0.2)  # for the thread that hears it
            return step(state, batch)

        return run

    monkeypatch.setattr(program, "make_train_step", make)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 7), (signal.SIGUSR1, 12)])
def test_a_signal_stops_after_the_step_and_nothing_is_lost(number, step, uninterrupted, text, tmp_path, monkeypatch):
    workdir, handlers = tmp_path / "run", [signal.getsignal(n) for n in preemption.SIGNALS]
    with monkeypatch.context() as patch:
        signalled(patch, step, number)
        with pytest.raises(preemption.Preempted) as stop:
            loop.train(config_of(text), workdir)
    assert (stop.value.code, stop.value.step) == (INTERRUPTED, step)
    assert [signal.getsignal(n) for n in preemption.SIGNALS] == handlers
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == step
    assert max(losses_of(workdir)) == step
    assert RunRecord(workdir).facts["status"] == "interrupted"
    loop.train(config_of(text), workdir)
    assert_same_checkpoint(workdir, uninterrupted)
    assert losses_of(workdir) == losses_of(uninterrupted)
    assert [session["from_step"] for session in RunRecord(workdir).facts["sessions"]] == [0, step]


def test_a_notice_ends_an_evaluation_which_the_resumed_run_makes_up_for(uninterrupted, text, tmp_path, monkeypatch):
    """An evaluation may take longer than a scheduler's grace: it is left between two batches."""
    workdir, real, asked = tmp_path / "run", loop.Evaluator.run, []

    def told_in_the_second(self, params, stops=None):
        asked.append(stops)
        return real(self, params, (lambda: True) if len(asked) == 2 else stops)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Evaluator, "run", told_in_the_second)
        with pytest.raises(preemption.Preempted) as stop:
            loop.train(config_of(text), workdir)
    assert all(callable(stops) for stops in asked), "the loop hands on its notice"
    step = stop.value.step
    expected = evaluated(uninterrupted)
    assert step == list(expected)[1]
    assert list(evaluated(workdir)) == list(expected)[:1]
    assert RunRecord(workdir).facts["status"] == "interrupted"
    loop.train(config_of(text), workdir)
    assert evaluated(workdir) == expected
    assert_same_checkpoint(workdir, uninterrupted)


def evaluated(workdir) -> dict[int, float]:
    return {line["step"]: line["eval/loss"] for line in read_metrics(workdir) if "eval/loss" in line}


def slow_steps() -> None:
    """In a child: a step takes long, so that a signal finds one."""
    real_make = program.make_train_step

    def make(*arguments, **options):
        step = real_make(*arguments, **options)

        def run(state, batch):
            time.sleep(float(os.environ["STEP_SECONDS"]))
            return step(state, batch)

        return run

    program.make_train_step = make


def start(text, workdir, *flags: str, output=None, **environment):
    arguments = [f"--config={RUNS}:lanes", f"--config.data.source=text:{text}", f"--workdir={workdir}", *flags]
    arguments += ["--config.log.every_steps=1"]
    return children.start(
        "plm.train",
        *arguments,
        output=output or workdir.with_suffix(".out"),
        before=[("test_preemption", "slow_steps")],
        **environment,
    )


def wait_for_line(workdir, step: int, children_) -> None:
    deadline = time.monotonic() + 120
    while not ((workdir / "metrics.jsonl").exists() and max(losses_of(workdir), default=0) >= step):
        assert time.monotonic() < deadline, "\n".join(child.text for child in children_)
        assert all(child.process.is_alive() for child in children_), "\n".join(child.text for child in children_)
        time.sleep(0.05)


def test_a_second_signal_leaves_at_once(uninterrupted, text, tmp_path):
    """Even while the step does not end; the run goes on from the checkpoint before."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    for name in ("20", "24"):
        shutil.rmtree(workdir / "checkpoints" / name)
    child = start(text, workdir, STEP_SECONDS=60)
    deadline = time.monotonic() + 60
    while "x cpu" not in child.text:
        assert time.monotonic() < deadline, child.text
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(child.process.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(child.process.pid, signal.SIGTERM)  # the same notice, passed on
    time.sleep(preemption.SAME_NOTICE_SECONDS)
    assert child.process.is_alive()
    began = time.monotonic()
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.wait(10) == INTERRUPTED, child.text
    assert time.monotonic() - began < 5
    assert "SIGTERM again" in child.text
    loop.train(config_of(text), workdir)
    assert_same_checkpoint(workdir, uninterrupted)


def test_all_processes_stop_at_the_same_step(uninterrupted, text, tmp_path):
    """Only the second process is told; both leave, and run again they end as any run does."""
    workdir = tmp_path / "run"
    for attempt in ("stopped", "resumed"):
        address = f"localhost:{free_port()}"
        pair = [
            start(
                text,
                workdir,
                f"--coordinator_address={address}",
                "--num_processes=2",
                f"--process_id={index}",
                output=tmp_path / f"{attempt}.{index}",
                devices=1,
                STEP_SECONDS=0.1 if attempt == "stopped" else 0,
            )
            for index in range(2)
        ]
        if attempt == "stopped":
            wait_for_line(workdir, 3, pair)
            os.kill(pair[1].process.pid, signal.SIGTERM)
        code = INTERRUPTED if attempt == "stopped" else 0
        assert [child.wait(120) for child in pair] == [code] * 2, "\n".join(child.text for child in pair)
        if attempt == "stopped":
            step = int(re.search(r"interrupted after step (\d+) of 24", pair[0].text)[1])
            assert max(losses_of(workdir)) == step < 24
    expected, got = losses_of(uninterrupted), losses_of(workdir)
    assert got.keys() == expected.keys()
    for number in expected:
        np.testing.assert_allclose(got[number], expected[number], rtol=1e-5, err_msg=str(number))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_without_a_signal_there_is_no_notice():
    with preemption.Notice(make_mesh(configs.base().mesh, jax.devices()[:1])) as notice:
        assert not notice.stops_here()
