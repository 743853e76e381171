"""A sweep validates first, runs each point in its own workdir, skips, resumes and retries, and its exit code tells."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from etils import epath

from launch import local, points, sweep
from plm.errors import UserError
from plm.training import config as configs

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT = epath.Path("runs/here")


@pytest.fixture
def experiment(tmp_path):
    """An experiment file whose sweep has three points."""
    file = tmp_path / "mine.py"
    file.write_text(
        textwrap.dedent(
            """
            from experiments import gpt

            def get_config(arguments=""):
                return gpt.get_config("tiny")

            def sweep(add, arguments=""):
                for name, rate in (("a", 1e-3), ("b", 2e-3), ("c", 3e-3)):
                    add(name, "", {"optimizer.peak_lr": rate, "optimizer.decay": (("bias$", 0.0),)})
            """
        )
    )
    return str(file)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Stands for `python -m plm.train`: notes its flags; a file `fail` or `hang` in the workdir tells it what to do."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, sys, time
            of_model = sys.argv[1].partition("=")[2].split("@")[0]
            workdir = pathlib.Path(next((a[10:] for a in sys.argv if a.startswith("--workdir=")), of_model))
            with (workdir / "calls").open("a") as file:
                file.write(" ".join(a for a in sys.argv[1:] if not a.startswith("--workdir")) + chr(10))
            (workdir / "config.json").write_text('{"total_steps": 10}')
            (workdir / "metrics.jsonl").write_text('{"step": 7, "train/loss": 1.5}' + chr(10) + '{"step": 8, "tr')
            if hasattr(os, "sched_getaffinity"):
                (workdir / "cores").write_text(str(len(os.sched_getaffinity(0))))
            index = next((a[13:] for a in sys.argv if a.startswith("--process_id=")), "0")
            (workdir / f"devices.{index}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
            if (workdir / "hang").exists():
                time.sleep(60)
            if (workdir / "fail").exists():
                print("error: the reason")
                sys.exit(2)
            """
        )
    )
    monkeypatch.setattr(points, "TRAIN", (sys.executable, str(script)))


def calls(workdir: Path) -> list[str]:
    return (workdir / "calls").read_text().splitlines() if (workdir / "calls").exists() else []


def launch(experiment, root, **options):
    found, study = sweep.read_points(experiment, epath.Path(root), options.pop("overrides", {}))
    chosen = sweep.choose(found, options.pop("only", []))
    backend = sweep.Local(
        workers=2, **{name: options.pop(name) for name in ("processes", "devices") if name in options}
    )
    return sweep.launch(
        found, epath.Path(root), **{"retry": "none"} | options, chosen=chosen, backend=backend, study=study
    )


def test_runs_all_then_skips_the_finished(experiment, trainer, tmp_path, capsys):
    root = tmp_path / "root"
    assert launch(experiment, root, overrides={"seed": "3"}) == 0
    assert launch(experiment, root, overrides={"seed": "3"}) == 0
    (call,) = calls(root / "b")
    assert call == (
        f"--config={experiment} --config.optimizer.peak_lr=0.002"
        " --config.optimizer.decay=(('bias$', 0.0),) --config.seed=3"
    )
    if hasattr(os, "sched_getaffinity"):
        available = len(os.sched_getaffinity(0))
        assert 1 <= int((root / "a" / "cores").read_text()) <= -(-available // 2)
        assert len(os.sched_getaffinity(0)) == available, "the launcher keeps its own cores"
    assert capsys.readouterr().out.splitlines()[-1].split() == ["c", "finished", "7/10", "1.5000"]


def test_failed_points_wait_for_retry(experiment, trainer, tmp_path, capsys):
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (root / "b" / "fail").touch()
    assert launch(experiment, root) == 1
    assert "error: the reason" in capsys.readouterr().out
    assert [sweep.state(root / name) for name in "abc"] == ["finished", "failed", "finished"]
    (root / "b" / "fail").unlink()
    assert launch(experiment, root) == 1, "not without --retry=failed"
    assert launch(experiment, root, retry="failed") == 0
    assert [len(calls(root / name)) for name in "abc"] == [1, 2, 1]


def test_interrupted_points_are_resumed(experiment, trainer, tmp_path):
    root = tmp_path / "root"
    assert launch(experiment, root, only=["a"]) == 0
    record = json.loads((root / "a" / "point.json").read_text())
    for change in (
        {"return_code": None, "pid": 2**22 + 5},
        {"return_code": None, "pid": os.getpid()},
        {"return_code": -9},
    ):
        (root / "a" / "point.json").write_text(json.dumps(record | change))
        assert sweep.state(root / "a") == "interrupted", change
    assert launch(experiment, root, only=["a"]) == 0
    assert len(calls(root / "a")) == 2


def test_closing_the_pool_ends_its_processes(experiment, trainer, tmp_path):
    ended = []
    job = local.Job("x", (sys.executable, "-c", "import time; time.sleep(60)"), tmp_path / "log.txt", tmp_path)
    pool = local.run([job], workers=1, on_start=lambda *_: None, on_end=lambda job, code: ended.append(code))
    next(pool)
    start = time.monotonic()
    pool.close()
    assert ended == [-15]
    assert time.monotonic() - start < 5


def test_a_job_of_which_a_process_was_killed_was_interrupted(tmp_path):
    """The others fail since that one has gone."""
    script = "import os, sys; os.kill(os.getpid(), 9) if sys.argv[-1] == '--process_id=1' else sys.exit(2)"
    job, ended = local.Job("x", (sys.executable, "-c", script), tmp_path / "log.txt", tmp_path, processes=2), []
    pool = local.run([job], workers=1, on_start=lambda *_: None, on_end=lambda job, code: ended.append(code))
    assert list(pool)
    assert ended == [-9]


def test_a_job_runs_as_soon_as_the_one_it_waits_for_has_ended_well(tmp_path):
    """`later` does not wait for `slow`, which waits for `later`; what waits for `broken`, or for that, is left."""

    def job(name, code, after=""):
        return local.Job(name, (sys.executable, "-c", code), tmp_path / f"{name}.txt", tmp_path, after=after)

    until_later = "import pathlib, time\nwhile not pathlib.Path('later').exists(): time.sleep(0.01)"
    jobs = [
        job("slow", until_later),
        job("quick", ""),
        job("later", "open('later', 'w')", after="quick"),
        job("broken", "raise SystemExit(1)"),
        job("lost", "", after="broken"),
        job("lost too", "", after="lost"),
    ]
    ended, skipped = [], []
    pool = local.run(
        jobs,
        workers=2,
        on_start=lambda *_: None,
        on_end=lambda job, code: ended.append((job.name, code)),
        on_skip=lambda job: skipped.append(job.name),
        poll_seconds=0.05,
    )
    assert len(list(zip(pool, range(1000), strict=False))) < 1000, "it hangs"
    assert sorted(ended) == [("broken", 1), ("later", 0), ("quick", 0), ("slow", 0)]
    assert skipped == ["lost", "lost too"]


def test_the_processes_of_a_point_share_what_it_got(experiment, trainer, tmp_path):
    root = tmp_path / "root"
    assert launch(experiment, root, only=["a"], processes=2, devices=["4", "5", "6", "7"]) == 0
    first, second = sorted(calls(root / "a"), key=lambda call: call[-1])
    assert first.endswith("--num_processes=2 --process_id=0")
    assert second == first[:-1] + "1", "the same port for both"
    assert {(root / "a" / f"devices.{index}").read_text() for index in range(2)} == {"4", "5"}
    assert json.loads((root / "a" / "point.json").read_text())["on"].endswith("devices 4,5")
    assert (root / "a" / "log.1.txt").exists()


def test_a_stop_that_saved_is_an_interruption(tmp_path):
    for code, expected in (
        (0, "finished"),
        (75, "interrupted"),
        (130, "interrupted"),
        (137, "interrupted"),
        (1, "failed"),
    ):
        (tmp_path / "point.json").write_text(json.dumps({"return_code": code}))
        assert points.state(tmp_path) == expected, code


def test_all_points_are_validated_before_one_starts(experiment, trainer, tmp_path):
    root = tmp_path / "root"
    with pytest.raises(
        UserError, match=r"point 'a': config\.optimiser\.b1 does not exist; did you mean 'optimizer\.b1'"
    ):
        launch(experiment, root, overrides={"optimiser.b1": "0.5"})
    text = Path(experiment).read_text()
    Path(experiment).write_text(text.replace("3e-3", "-3e-3"))
    with pytest.raises(UserError, match=r"point 'c': optimizer\.peak_lr=-0\.003 must be"):
        launch(experiment, root)
    assert not root.exists()


def test_a_workdir_of_another_config_is_refused(experiment, trainer, tmp_path):
    root = tmp_path / "root"
    assert launch(experiment, root) == 0
    assert launch(experiment, root, overrides={"log.every_steps": "7"}) == 0, "reporting may change"
    with pytest.raises(UserError, match=r"batch_size: \d+ -> 7"):
        launch(experiment, root, overrides={"batch_size": "7"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 2, "overrides": {"seed": "1"}}, "exclude each other"),
        ({"overrides": {"optimizer.peak_lr": "1"}}, "sets this key itself"),
    ],
)
def test_contradictions_are_refused(experiment, arguments, message):
    with pytest.raises(UserError, match=message):
        sweep.read_points(experiment, ROOT, **arguments)


def test_seeds_make_a_point_each(experiment):
    points, study = sweep.read_points(experiment, ROOT, seeds=2)
    assert study is None
    assert [(p.name, p.overrides["seed"]) for p in points][:3] == [("a-seed0", 0), ("a-seed1", 1), ("b-seed0", 0)]
    with pytest.raises(UserError, match="matches no point"):
        sweep.choose(points, ["d*"])
    assert [p.name for p in sweep.choose(points, ["b*"])] == ["b-seed0", "b-seed1"]


def test_a_study_is_made_by_its_whole_command():
    given = ["--config=a.py:tiny", "--only", "b*", "--retry=failed", "--root=DIR", "--only=c", "--seeds=5"]
    assert sweep._of_all_points(given) == ["--config=a.py:tiny", "--root=DIR", "--seeds=5"]


@pytest.fixture
def staged(tmp_path):
    """A sweep of two pretraining runs that it shares, a run on a task from each, and a measurement."""
    file = tmp_path / "staged.py"
    file.write_text(
        textwrap.dedent(
            """
            from plm.reporting.studies import Column, Row, Study

            def sweep(add, arguments=""):
                study = Study("staged", "A table", "section 1", "tiny", rows=[Row("gpt", "GPT")])
                study.columns = [Column("score", "score", "task", "docstring_package/accuracy")]
                for seed in range(add.seeds or 2):
                    model = add(f"gpt-seed{seed}", "tiny", {"seed": seed}, file="experiments/gpt.py", shared=True,
                                defaults={"data.source": "pydocs#without_tasks"})
                    tuned = add(f"tuned-seed{seed}", "docstring_package", {"seed": seed},
                                file="experiments/finetune.py", start=model, measure=["--suite=task"])
                    study.cell("gpt", "score", tuned, seed)
                add.measure("pairs", model, ["--suite=minimal_pairs"], at="@all")
                return study
            """
        )
    )
    return str(file)


def test_points_start_from_others_and_share_them(staged, trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(points, "EVALUATE", points.TRAIN)
    monkeypatch.chdir(REPOSITORY)
    root, shared = tmp_path / "root", tmp_path / "shared"
    assert launch(staged, root) == 0
    assert not (root / "gpt-seed0").exists()
    (call,) = calls(root / "tuned-seed1")
    assert call == (
        "--config=experiments/finetune.py:docstring_package --config.seed=1"
        f" --config.init.from={shared}/gpt-seed1 --suite=task"
    )
    assert f"--model={shared}/gpt-seed1@all --suite=minimal_pairs" in calls(shared / "gpt-seed1")
    assert points.state(root / "pairs") == "finished"
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    started = [name for what, name in lines if what == "started"]
    assert started.index("tuned-seed0") > started.index("gpt-seed1")
    for parent, child in (("gpt-seed0", "tuned-seed0"), ("gpt-seed1", "tuned-seed1"), ("gpt-seed1", "pairs")):
        assert lines.index(["started", child]) > lines.index(["finished", parent])
    # Another sweep beside it finds them trained.
    assert launch(staged, tmp_path / "other") == 0
    assert len(calls(shared / "gpt-seed0")) == 1
    record = json.loads((root / "study.json").read_text())
    assert [cell["place"] for cell in record["cells"]] == ["tuned-seed0", "tuned-seed1"]
    assert launch(staged, tmp_path / "third", only=["tuned-seed0"], overrides={"log.every_steps": "7"}) == 0
    assert not (tmp_path / "third" / "tuned-seed1").exists()
    with pytest.raises(UserError, match=r"made by another 'gpt-seed0': batch_size: 16 -> 8. Choose another --root"):
        launch(staged, tmp_path / "fourth", overrides={"batch_size": "8"})


def test_what_starts_from_a_failed_point_waits(staged, trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    root, shared = tmp_path / "root", tmp_path / "shared"
    (shared / "gpt-seed0").mkdir(parents=True)
    (shared / "gpt-seed0" / "fail").touch()
    assert launch(staged, root, only=["tuned*"]) == 1
    assert "waiting  tuned-seed0: gpt-seed0 is not finished" in capsys.readouterr().out
    assert [points.state(root / f"tuned-seed{seed}") for seed in range(2)] == ["waiting", "finished"]


def test_a_shared_point_that_another_launcher_trains_is_waited_for(staged, trainer, tmp_path, monkeypatch, capsys):
    """It finishes gpt-seed0; it is gone before gpt-seed1, which is ours then."""
    monkeypatch.setattr(points, "EVALUATE", points.TRAIN)
    monkeypatch.setattr(sweep, "WAIT_SECONDS", 0.05)
    monkeypatch.chdir(REPOSITORY)
    root, shared = tmp_path / "root", tmp_path / "shared"
    assert launch(staged, tmp_path / "first", only=["gpt*"]) == 0
    (shared / "gpt-seed1" / "point.json").unlink()
    path = shared / "gpt-seed0" / "point.json"
    finished, other = json.loads(path.read_text()), subprocess.Popen(["sleep", "60"])
    path.write_text(json.dumps(finished | {"return_code": None, "pid": other.pid, "command": ["sleep", "60"]}))
    capsys.readouterr()
    lock = points.OnlyOne(epath.Path(shared))

    def watch(steps, *_):
        for number, _ in enumerate(steps):
            if number == 2:
                assert "started" not in capsys.readouterr().out
                path.write_text(json.dumps(finished))
            if points.state(root / "tuned-seed0") == "finished":
                lock.__exit__()

    monkeypatch.setattr(sweep, "_watch", watch)
    try:
        with pytest.raises(UserError, match=f"gpt-seed0 is in use by process {other.pid}"):
            launch(staged, root)  # its launcher has left it alone
        lock.__enter__()
        assert launch(staged, root) == 0
    finally:
        other.kill()
        other.wait()
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    started = [name for what, name in lines if what == "started"]
    assert started[:2] == ["tuned-seed0", "gpt-seed1"]
    assert sorted(started[2:]) == ["pairs", "tuned-seed1"]


def test_settings_of_data_go_where_they_are_read(staged, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    overrides = {"data.source": "text:mine.txt", "data.task.fraction": "0.5", "eval.batches": "3"}
    found, _ = sweep.read_points(staged, ROOT, overrides)
    by_name = {point.name: point for point in found}
    assert by_name["gpt-seed0"].overrides == {"data.source": "text:mine.txt", "eval.batches": "3", "seed": 0}
    assert by_name["tuned-seed0"].overrides == {"data.task.fraction": "0.5", "eval.batches": "3", "seed": 0}
    assert str(by_name["gpt-seed0"].workdir) == "runs/shared/gpt-seed0"
    with pytest.raises(UserError, match=r"--config\.data\.task\.fraction: no point of .* runs on a task"):
        sweep.read_points("experiments/compare.py:tiny", ROOT, {"data.task.fraction": "0.5"})
    with pytest.raises(UserError, match="defines no get_config"):
        configs.load(staged)


def test_a_study_of_cells_that_are_not_there_is_our_own_mistake(staged, trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    Path(staged).write_text(Path(staged).read_text().replace('study.cell("gpt"', 'study.cell("gtp"'))
    with pytest.raises(ValueError, match="no such cell: 'gtp', 'score'"):
        launch(staged, tmp_path / "root")


def test_every_worker_gets_its_share_of_the_cores():
    assert [share.cores for share in local.shares([0, 1, 2, 5], None, 2)] == [(0, 1), (2, 5)]
    assert [share.cores for share in local.shares([0, 1, 2], None, 2)] == [(0, 1), (2,)]
    assert [share.cores for share in local.shares([0, 1], None, 3)] == [(0,), (1,), (0,)]
    both = local.shares([0, 1], ["0", "1", "2", "3"], 2)
    assert [share.devices for share in both] == [("0", "1"), ("2", "3")]
    assert [part.devices for part in both[1].split(2)] == [("2",), ("3",)]
    assert both[1].text() == "core 1; devices 2,3"


def test_points_go_by_seeds(staged, tmp_path):
    found = sweep.read_points(staged, tmp_path / "root")[0]
    names = [point.name for point in points.by_seed(found)]
    assert sorted(names) == sorted(point.name for point in found)
    assert [name for name in names if "seed" in name] == ["gpt-seed0", "tuned-seed0", "gpt-seed1", "tuned-seed1"]
    for point in found:
        assert not point.start or names.index(point.start) < names.index(point.name)
    given, _ = sweep.read_points("experiments/compare.py:tiny", tmp_path / "root", {"seed": "abc"})
    assert points.by_seed(given) == given  # what is wrong with it, validation says


def test_commands(experiment, tmp_path):
    """The command itself: dry runs start nothing, bad input is one line and exit code 2."""

    def run(*arguments):
        command = [sys.executable, "-m", "launch.sweep", *arguments]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    root = tmp_path / "root"
    dry = run("--config=experiments/compare.py:tiny", f"--root={root}", "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert [line.rpartition("/")[2] for line in dry.stdout.splitlines()] == ["elmo", "gpt", "bert"]
    only = ("--only=elmo", "--only=b*,b*t")
    dry = run("--config=experiments/compare.py:tiny", f"--root={root}", "--dry_run", *only)
    assert [line.rpartition("/")[2] for line in dry.stdout.splitlines()] == ["elmo", "bert"]
    assert not root.exists()
    bad = run("--config=experiments/compare.py:tiny", f"--root={root}", "--backend=slrum")
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1
