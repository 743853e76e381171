"""Metrics survive a crash and a resume, run.json says what was run, and numbers of unknown chips are not made up."""

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from plm.errors import UserError
from plm.training import chips, metrics

REPOSITORY = Path(__file__).resolve().parent.parent


def steps(workdir) -> list[int]:
    return [values["step"] for values in metrics.read_metrics(workdir)]


def test_a_resumed_run_cuts_later_steps_and_a_torn_line(tmp_path):
    run = metrics.Metrics(tmp_path)
    for step in (10, 20, 30):
        run.add(step, {"train/loss": np.float32(step), "train/nan": float("nan")})
    run.close()
    file = tmp_path / metrics.METRICS
    with file.open("a") as lines:
        lines.write('{"step": 40, "train/lo')
    assert steps(tmp_path) == [10, 20, 30], "readers leave a torn line out"
    run = metrics.Metrics(tmp_path, step=20)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [10, 20]
    run.add(30, {"train/loss": 3.5})
    run.add(30, {"eval/causal": 4.0})
    run.close()
    assert metrics.read_metrics(tmp_path)[-1] == {"step": 30, "train/loss": 3.5, "eval/causal": 4.0}
    assert metrics.read_metrics(tmp_path)[0] == {"step": 10, "train/loss": 10.0, "train/nan": None}


def test_damage_before_the_last_line_is_named(tmp_path):
    (tmp_path / metrics.METRICS).write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged"):
        metrics.read_metrics(tmp_path)


def test_lines_where_files_cannot_grow(tmp_path):
    """As on an object store: rewritten whole, lines of before kept."""
    (tmp_path / "x.jsonl").write_text('{"step": 1}\n')
    writer = metrics.LineWriter(tmp_path / "x.jsonl", can_append=False, seconds=1000)
    writer.add({"step": 2})
    assert len(metrics.read_lines(tmp_path / "x.jsonl")) == 1, "not written for every line"
    writer.close()
    assert metrics.read_lines(tmp_path / "x.jsonl") == [{"step": 1}, {"step": 2}]


def test_only_the_first_process_writes(tmp_path):
    run = metrics.Metrics(tmp_path, enabled=False, tensorboard=True, wandb="p")
    run.add(1, {"train/loss": 1.0})
    run.close()
    record = metrics.RunRecord(tmp_path, enabled=False)
    record.update(step=3)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_and_wandb(tmp_path, monkeypatch):
    seen = []
    fake = types.SimpleNamespace(
        init=lambda **settings: (
            seen.append(settings)
            or types.SimpleNamespace(
                log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("end")
            )
        )
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = metrics.Metrics(tmp_path, tensorboard=True, wandb="project", config={"seed": 1})
    run.add(5, {"train/loss": 2.0, "train/nan": float("nan")})
    run.close()
    assert seen[0]["project"] == "project"
    assert seen[0]["resume"] == "allow"
    assert seen[1:] == [(5, {"train/loss": 2.0}), "end"]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb='project' needs the package"):
        metrics.Metrics(tmp_path, wandb="project")


def test_an_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        metrics.Metrics(tmp_path / "file")


def test_results_keep_the_last_of_each_measurement(tmp_path):
    row = metrics.Result("gpt", 100, "pretraining", "causal", 0, None, "valid", 1000, 5.0)
    again = metrics.Result("gpt", 100, "pretraining", "causal", 0, None, "valid", 1000, 4.5)
    other = metrics.Result("gpt", 100, "probe", "pos", 0, 1, "valid", 10, 0.9, "predictions/pos.jsonl")
    metrics.append_results(tmp_path, [row])
    with (tmp_path / metrics.RESULTS).open("a") as file:
        file.write('{"run": "g')
    metrics.append_results(tmp_path, [other, again])
    assert metrics.read_results(tmp_path) == [other, again]


def test_run_record_keeps_every_session(tmp_path):
    facts = {
        "devices": {"kind": "cpu", "count": 1, "processes": 1, "platform": "cpu", "mesh": [1, 1, 1]},
        "corpus": {"source": "pydocs", "fingerprint": "f", "licence": "PSF-2.0", "train": {"tokens": 5}},
        "tokenizer": {"kind": "bpe", "size": 7, "fingerprint": "t"},
    }
    record = metrics.RunRecord(tmp_path)
    record.start(from_step=0, **facts, parameters={"body": 3})
    record.update(step=10, tokens=100, flops=np.float64(1e9))
    record = metrics.RunRecord(tmp_path)
    record.start(from_step=10, **facts)
    record.finish(step=20, tokens=200)
    written = json.loads((tmp_path / metrics.RUN).read_text())
    assert [session["from_step"] for session in written["sessions"]] == [0, 10]
    assert written["status"] == "complete"
    assert (written["step"], written["tokens"], written["flops"]) == (20, 200, 1e9)
    assert written["parameters"] == {"body": 3}
    assert written["started"] == written["sessions"][0]["started"]
    assert written["corpus"]["licence"] == "PSF-2.0"
    for key in ("command", "commit", "uncommitted", "versions", "protocol", "tokenizer"):
        assert key in written
    assert {"python", "jax", "flax", "numpy", "plm"} <= set(written["versions"])
    assert len(written["protocol"]) == 64
    assert written["protocol"] == metrics.protocol_hash()
    (tmp_path / metrics.RUN).write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        metrics.RunRecord(tmp_path)


def test_code_version_sees_commits_changes_and_new_files(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert metrics.code_version(tmp_path) == {"commit": None, "uncommitted": None}, "outside git"
    sent = {"commit": "abc", "uncommitted": None}
    (tmp_path / metrics.SENT_VERSION).write_text(json.dumps(sent))
    assert metrics.code_version(tmp_path) == sent, "a copy that was sent somewhere"
    (tmp_path / metrics.SENT_VERSION).unlink()
    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "first")
    clean = metrics.code_version(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["uncommitted"] is None
    (tmp_path / "a.py").write_text("2")
    changed = metrics.code_version(tmp_path)
    (tmp_path / "b.py").write_text("new")
    hashes = {changed["uncommitted"], metrics.code_version(tmp_path)["uncommitted"]}
    assert changed["commit"] == clean["commit"]
    assert None not in hashes
    assert len(hashes) == 2
    (tmp_path / "inside").mkdir()
    assert metrics.code_version(tmp_path / "inside")["commit"] is None, "somebody else's repository"
    monkeypatch.setenv("PATH", "")
    assert metrics.code_version(tmp_path) == {"commit": None, "uncommitted": None}, "no git"


def test_progress_prints_plain_lines_off_terminals(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress = metrics.Progress(400, start=100, seconds=10, stream=stream)
    for step in range(101, 401):
        clock[0] += 0.25
        progress.update(step)
        progress.update(step, loss=2.0, tokens_per_second=1234.5)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 9, "the first, one every ten of 75 seconds, the last"
    assert lines[1] == "step 141/400  loss 2.0000  tokens/s 1,234  0:10 gone  1:04 left"
    assert lines[-1] == "step 400/400  loss 2.0000  tokens/s 1,234  1:15 gone  0:00 left"
    short = metrics.Progress(400, seconds=10, stream=(stream := io.StringIO()))
    for step in (1, 2):
        short.update(step)
    short.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/400", "2/400"], "an end before its time"


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = metrics.Progress(10, stream=stream)
    progress.update(10, loss=1.0)
    progress.close()
    assert "10/10" in stream.getvalue()
    assert "loss=1.0000" in stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4 lite", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 NVL", None),
        ("cpu", None),
    ],
)
def test_peak_speed_is_given_only_where_it_is_known(kind, peak):
    assert chips.peak_flops(kind) == peak
    assert chips.peak_flops(kind, "float32") is None
    expected = None if peak is None else pytest.approx(0.5)
    assert chips.model_flops_utilisation((peak or 1) * 4, 2.0, kind, 4) == expected


def test_no_jax():
    """Sweeps and reports read these files without starting JAX."""
    code = "import sys, plm.training.metrics, plm.training.config, launch.sweep; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_processes_that_write_a_file_at_once_do_not_collide(tmp_path):
    """Each has a temporary name of its own."""
    script = (
        "import sys; from plm.training import metrics\n"
        "for number in range(300): metrics.write_atomically(sys.argv[1], f'{number}\\n' * 100)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "facts.json")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == ["", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
