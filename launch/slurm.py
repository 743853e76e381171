"""One array job of Slurm for all points: requeued when its time is over or its nodes are wanted, resumed where it was.

A point is a task of the array; `srun` starts its processes, which find each other by Slurm's variables. `grace_seconds`
before the time limit Slurm signals them: they save, leave with INTERRUPTED, and the script puts the task back into the
queue. What Slurm requeues itself (preemption, `scontrol requeue`, a lost node) starts the same way. A task that ends
otherwise leaves its exit code in the workdir's file `return_code`. Needs a file system that all nodes share.

A task whose parent is not finished when its turn comes (it died halfway) runs nothing and counts as interrupted.
"""

import dataclasses
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from etils import epath

from launch.points import Point, Records
from plm.command import INTERRUPTED
from plm.errors import UserError

FLAGS = ("sbatch", "wait")
FOLDER = "slurm"
LARGEST_ARRAY = 1000  # Slurm's MaxArraySize is 1001 unless a site says otherwise
# What squeue calls a job that may yet run, is running, or is on its way out.
_QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING", "SUSPENDED")
_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED")


@dataclasses.dataclass(frozen=True)
class Options:
    """processes: of each point; workers: points at once; sbatch: more options of sbatch, as they are."""

    processes: int = 1
    workers: int = 1
    grace_seconds: int = 120
    sbatch: tuple[str, ...] = ()
    poll_seconds: float = 5.0

    @staticmethod
    def of(values: flags.FlagValues) -> "Options":
        for option in values.sbatch:
            if not option.startswith("-") or "\n" in option:
                raise UserError(f"--sbatch={option!r} must be an option of sbatch, such as --sbatch=--partition=gpu")
        return Options(values.processes, values.workers, values.grace_seconds, tuple(values.sbatch))


def define_flags() -> None:
    """Those of FLAGS."""
    flags.DEFINE_multi_string(
        "sbatch", [], "slurm: an option of sbatch, such as --sbatch=--partition=gpu; may be given again and again"
    )
    flags.DEFINE_bool("wait", False, "slurm: stays until no point is queued or running")


def script_path(root: epath.Path, further: int = 0) -> Path:
    """A new name for each submission; further: of those that will be before this one."""
    folder = Path(root) / FOLDER
    number = 1 + further + max((int(path.stem) for path in folder.glob("*.sh")), default=0)
    return folder / f"{number}.sh"


def script(points: Sequence[Point], root: epath.Path, options: Options) -> str:
    """The array's batch script, which names every point's command."""
    folder = Path(root) / FOLDER
    directives = [
        f"--job-name=plm-{root.name}",
        f"--array=0-{len(points) - 1}%{options.workers}",
        f"--ntasks={options.processes}",
        f"--chdir={Path.cwd()}",
        f"--output={folder}/%A_%a.txt",
        "--open-mode=append",
        "--requeue",
        f"--signal=USR1@{options.grace_seconds}",
        *options.sbatch,
    ]
    cases = []
    for index, point in enumerate(points):
        command = shlex.join(point.command())
        tasks = options.processes if point.trains else 1
        names = f"workdir={shlex.quote(str(point.workdir))}"
        names += f"; parent={shlex.quote(point.source)}" if point.source else ""
        cases.append(f"{index}) tasks={tasks}; {names}; set -- {command} ;;")
    is_finished = "import sys; from launch.points import state; sys.exit(state(sys.argv[1]) != 'finished')"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {shlex.quote(directive) if ' ' in directive else directive}" for directive in directives),
        "",
        "export PYTHONUNBUFFERED=1",
        "# Since 22.05 srun does not take this over from sbatch.",
        '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
        "parent=",
        'case "$SLURM_ARRAY_TASK_ID" in',
        *cases,
        "esac",
        'echo "$(date -Is) attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: $workdir"',
        "# A half-trained model would be taken for a whole one. This code counts as an interruption.",
        f'if [ -n "$parent" ] && ! {shlex.join([sys.executable, "-c", is_finished])} "$parent"; then',
        '  echo "$(date -Is) not started: $parent is not finished" | tee -a "$workdir/log.0.txt"',
        f'  echo {INTERRUPTED} > "$workdir/return_code.tmp" && mv "$workdir/return_code.tmp" "$workdir/return_code"',
        f"  exit {INTERRUPTED}",
        "fi",
        "# Processes end together by themselves; srun's --wait is for those that do not.",
        f'srun --ntasks="$tasks" --kill-on-bad-exit=0 --wait={options.grace_seconds} --open-mode=append'
        ' --output="$workdir/log.%t.txt" "$@"',
        "code=$?",
        'echo "$(date -Is) exit code $code"',
        f'if [ $code = {INTERRUPTED} ] && scontrol requeue "$SLURM_JOB_ID"; then exit {INTERRUPTED}; fi',
        'echo $code > "$workdir/return_code.tmp" && mv "$workdir/return_code.tmp" "$workdir/return_code"',
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def submit_command(path: Path, after: str = "") -> list[str]:
    """--parsable prints the job's number and nothing else. after: jobs that have to be over, with : between them, in
    whichever way: a point whose parent failed says so itself, and the others run."""
    return ["sbatch", "--parsable", *([f"--dependency=afterany:{after}"] if after else []), str(path)]


def _call(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"--backend=slurm: {command[0]} is not on this machine's PATH; is it a login node?") from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def submit(points: Sequence[Point], root: epath.Path, records: Records, options: Options, after: str = "") -> str:
    """Submits them as one array; returns its number. after: see `submit_command`."""
    path = script_path(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script(points, root, options))
    for point in points:
        point.workdir.mkdir(parents=True, exist_ok=True)
        (point.workdir / "return_code").unlink(missing_ok=True)
    number = _call(submit_command(path, after)).strip().split(";")[0]
    for index, point in enumerate(points):
        job = f"{number}_{index}"
        records.started(point, "slurm", job=job, on=f"job {job}", command=list(point.command()), started=time.time())
    return number


def states() -> Callable[[str], str]:
    """Tells of a job, as "123_4", whether it is queued, running, or unknown to Slurm: "interrupted". Asks once."""
    known = {}
    for line in _call(["squeue", "--me", "--array", "--noheader", "--format=%i %T"]).splitlines():
        job, name = line.split()
        known[job] = "queued" if name in _QUEUED else "running" if name in _RUNNING else "interrupted"
    return lambda job: known.get(job, "interrupted")
