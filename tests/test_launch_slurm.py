"""The array job's script, with stand-ins for Slurm's commands; a real Slurm has tests/test_slurm.py."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from etils import epath

from launch import points, slurm, sweep
from plm.errors import UserError

CONFIG = "experiments/compare.py:tiny"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --output=* ]] && output=${1#--output=}; shift; done
exec "$@" > "${output//%t/0}" 2>&1
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A folder at the front of PATH with sbatch, squeue, scontrol, srun, which note their calls in the file `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    note = f'echo "$(basename "$0") $*" >> {tmp_path}/calls\n'
    for name, text in {
        "sbatch": f"#!/bin/bash\n{note}echo 77",
        "squeue": f"#!/bin/bash\ncat {tmp_path}/queue",
        "scontrol": f"#!/bin/bash\n{note}",
        "srun": SRUN,
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "queue").write_text("77_0 PENDING\n77_1 RUNNING\n9 CANCELLED\n")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return tmp_path


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Stands for `python -m plm.train`: prints its flags and leaves with the code in its workdir's file `fate`."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import pathlib, sys
            workdir = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
            print(sys.argv[1:])
            sys.exit(int((workdir / "fate").read_text()))
            """
        )
    )
    monkeypatch.setattr(points, "TRAIN", (sys.executable, str(script)))


def points_of(root) -> list[points.Point]:
    rates = (("a", 1e-3), ("b", 2e-3))
    return [points.Point(name, epath.Path(root) / name, CONFIG, {"optimizer.peak_lr": rate}) for name, rate in rates]


def sweep_of(root, found=None, **options):
    root, found = epath.Path(root), found or points_of(root)
    options = slurm.Options(processes=2, workers=2, sbatch=("--partition=gpu",), **options)
    backend = sweep.Slurm(root, options, wait=False)
    return sweep.launch(found, root, retry="none", chosen=found, backend=backend)


def run_task(root, index: int, fate: int) -> int:
    script = root / "slurm" / "1.sh"
    (root / "ab"[index] / "fate").write_text(str(fate))
    environment = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": "78"}
    return subprocess.run(["bash", str(script)], env=os.environ | environment, check=False).returncode


def test_submitting(commands, trainer, tmp_path):
    root = tmp_path / "a root"
    assert sweep_of(root) == 0
    script = root / "slurm" / "1.sh"
    assert (tmp_path / "calls").read_text() == f"sbatch --parsable {script}\n"
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --array=0-1%2", "#SBATCH --ntasks=2", "#SBATCH --requeue", "#SBATCH --signal=USR1@120"} < {
        *directives
    }
    assert directives[-1] == "#SBATCH --partition=gpu", "the user's word is the last"
    assert [points.state(root / name, slurm.states()) for name in "ab"] == ["queued", "running"]
    table = points.table(points_of(root), slurm.states())
    assert [line.split()[-2:] for line in table.splitlines()[1:]] == [["job", "77_0"], ["job", "77_1"]]
    sweep_of(root)
    assert len((tmp_path / "calls").read_text().splitlines()) == 1, "nothing is submitted twice"


@pytest.mark.parametrize(
    ("fate", "requeued", "state"),
    [(0, False, "finished"), (2, False, "failed"), (75, True, "queued"), (143, False, "")],
)
def test_how_a_task_ends(fate, requeued, state, commands, trainer, tmp_path):
    root = epath.Path(tmp_path / "root")
    sweep_of(root)
    assert run_task(tmp_path / "root", 0, fate) == fate
    log = (root / "a" / "log.0.txt").read_text()
    assert f"--config={CONFIG}" in log
    assert "--config.optimizer.peak_lr=0.001" in log
    assert ("scontrol requeue 78" in (tmp_path / "calls").read_text()) == requeued
    assert points.state(root / "a", slurm.states()) == (state or "interrupted")


def test_a_job_that_slurm_forgot_was_interrupted_and_is_submitted_again(commands, trainer, tmp_path):
    root = tmp_path / "root"
    sweep_of(root)
    (tmp_path / "queue").write_text("")
    assert points.state(root / "a", slurm.states()) == "interrupted"
    (root / "b" / "return_code").write_text("0\n")
    sweep_of(root)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert "--array=0-0%2" in (root / "slurm" / "2.sh").read_text()
    assert json.loads((root / "a" / "point.json").read_text())["attempts"] == 2


def test_without_slurm_one_line_says_so(trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="squeue is not on this machine's PATH"):
        sweep_of(tmp_path / "root")


def test_waiting_ends_when_nothing_is_queued_or_running(commands, trainer, tmp_path):
    root = tmp_path / "root"
    sweep_of(root)
    backend = sweep.Slurm(epath.Path(root), slurm.Options(poll_seconds=0.05), wait=True)
    waiting = backend.run_all([], points_of(root), points.Records({}))
    for _ in range(3):
        next(waiting)
    (root / "a" / "return_code").write_text("0\n")
    next(waiting)
    (root / "b" / "return_code").write_text("1\n")
    assert list(waiting) == []


def test_what_starts_from_a_point_is_an_array_that_waits_for_it(commands, trainer, tmp_path):
    root = epath.Path(tmp_path / "root")
    parents = points_of(root)
    more = [
        points.Point("c", root / "c", CONFIG, {}, start="a", model=str(root / "a")),
        points.Point("d", root / "d", "", start="b", model=str(root / "b"), measure=("--suite=perplexity",)),
    ]
    assert sweep_of(root, [*parents, *more]) == 0
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first == f"sbatch --parsable {root}/slurm/1.sh"
    assert second == f"sbatch --parsable --dependency=afterany:77 {root}/slurm/2.sh"
    cases = [line for line in (root / "slurm" / "2.sh").read_text().splitlines() if ") tasks=" in line]
    assert cases[0].startswith(f"0) tasks=2; workdir={root}/c; parent={root}/a; set -- ")
    assert f"--config.init.from={root}/a" in cases[0]
    assert cases[1].startswith(f"1) tasks=1; workdir={root}/d; parent={root}/b; set -- ")
    assert f"-m plm.evaluate --model={root}/b --suite=perplexity ;;" in cases[1]


def child_of_a(root) -> points.Point:
    return points.Point("c", root / "c", CONFIG, {}, start="a", model=f"{root}/a@3")


def test_what_starts_from_a_queued_point_waits_for_its_job(commands, trainer, tmp_path):
    """Which another sweep has submitted; what needs nothing of that one does not wait for it."""
    root = epath.Path(tmp_path / "root")
    parents = points_of(root)
    sweep_of(root, parents[:1])
    assert sweep_of(root, [*parents, child_of_a(root)]) == 0
    calls = (tmp_path / "calls").read_text().splitlines()[1:]
    assert calls == [
        f"sbatch --parsable {root}/slurm/2.sh",
        f"sbatch --parsable --dependency=afterany:77:77_0 {root}/slurm/3.sh",
    ]


@pytest.mark.parametrize(("code", "state"), [("137", "interrupted"), ("", "interrupted"), ("0", "finished")])
def test_nothing_starts_from_a_half_trained_model(code, state, commands, trainer, tmp_path):
    root = epath.Path(tmp_path / "root")
    found = [*points_of(root), child_of_a(root)]
    sweep_of(root, found)
    (root / "c" / "fate").write_text("0")
    if code:
        (root / "a" / "return_code").write_text(code + "\n")
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "78"}
    subprocess.run(["bash", str(root / "slurm" / "2.sh")], env=environment, check=False)
    assert points.state(root / "c", slurm.states()) == state
    if state == "interrupted":
        (line,) = (root / "c" / "log.0.txt").read_text().splitlines()
        assert line.endswith(f"not started: {root}/a is not finished")
        (tmp_path / "queue").write_text("")
        sweep_of(root, found)
        assert f"parent={root}/a" in (root / "slurm" / "4.sh").read_text(), "submitted again"
        (tmp_path / "queue").write_text("")
        (root / "a" / "return_code").write_text("1\n")
        sweep_of(root, found)
        assert "--array=0-0%" in (root / "slurm" / "5.sh").read_text()
        assert not (root / "slurm" / "6.sh").exists(), "not what starts from a point that failed"


def test_a_stage_that_is_too_large_for_an_array_is_several(commands, trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "LARGEST_ARRAY", 1)
    root = epath.Path(tmp_path / "root")
    assert sweep_of(root, [*points_of(root), child_of_a(root)]) == 0
    calls = [line.split()[2] for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls == [f"{root}/slurm/1.sh", "--dependency=afterany:77", "--dependency=afterany:77"]
    assert "--array=0-0%2" in (root / "slurm" / "2.sh").read_text()
