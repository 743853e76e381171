"""The best evaluation: its checkpoint is kept, patience ends a run, and a run that was stopped chooses the same."""

import math
import shutil

import numpy as np
import pytest
from test_finetune import compiled_once, config_of, leaves, sources, task  # noqa: F401  fixtures

from plm.analysis import suites
from plm.errors import UserError
from plm.training import checkpoint, loop
from plm.training import config as configs
from plm.training.best import Best, make_best
from plm.training.metrics import RunRecord, read_metrics, read_results

EVERY = {"total_steps": 12, "eval__every_steps": 2, "checkpoint__every_steps": 0, "checkpoint__keep_best": "selects"}


def test_what_is_best_and_when_no_better_one_is_waited_for():
    best = Best("accuracy", lower=False, patience=2)
    assert [best.add(step, {"eval/accuracy": v}) for step, v in ((2, 0.5), (4, 0.7), (6, 0.7))] == [True, True, False]
    assert (best.step, best.value, best.exhausted) == (4, 0.7, False)
    assert not best.add(8, {"eval/accuracy": math.nan})
    assert best.exhausted
    lines = [{"step": 2, "eval/accuracy": 0.5}, {"step": 3, "train/loss": 1.0}, {"step": 4, "eval/accuracy": 0.4},
             {"step": 6, "eval/accuracy": 0.9}]  # fmt: skip
    unsaved = Best("accuracy", lower=False).replay(lines, 6, {4})
    assert (unsaved.step, unsaved.since) == (4, 1), "of what has no checkpoint nothing can be the best"
    again = Best("accuracy", lower=False).replay(lines, 4, {2, 4})
    assert (again.step, again.since, again.exhausted) == (2, 1, False), "what came after step 4 has not happened"
    losses = Best("loss", lower=True)
    assert [losses.add(step, {"eval/loss": v}) for step, v in ((1, 2.0), (2, 3.0), (3, 1.0))] == [True, False, True]


def test_bad_settings_are_one_line(sources, task, tmp_path):  # noqa: F811
    config = config_of(sources / "pairs", task, checkpoint__keep_best="f1")
    with pytest.raises(
        UserError, match=r"checkpoint.keep_best='f1' is no held-out number of this run: loss, classify,"
    ):
        make_best(config, ("loss", "classify"), ("accuracy",), evaluated=True)
    with pytest.raises(UserError, match="needs held-out text"):
        make_best(config, (), (), evaluated=False)
    with pytest.raises(UserError, match=r"eval.patience=3 needs checkpoint.keep_best"):
        make_best(config_of(sources / "pairs", task, eval__patience=3), ("loss",), ("f1",), evaluated=True)
    # Names of no evaluation: of both directions at once, of no next-token loss, of a part of the held-out examples.
    for name, settings in (
        ("classify_perplexity", {}),
        ("selects", {"eval__batches": 1}),
        ("accuracy", {"eval__batches": 1}),
    ):
        config = config_of(sources / "pairs", task, checkpoint__keep_best=name, **settings)
        with pytest.raises(UserError, match=rf"keep_best='{name}' is no held-out number of this run: loss, classify"):
            loop.train(config, tmp_path / name)
        assert not (tmp_path / name / "config.json").exists()
    with pytest.raises(UserError, match="kept no best checkpoint"):
        checkpoint.split_step(f"{sources / 'pairs'}@best")
    with pytest.raises(UserError, match="a whole number, or best"):
        checkpoint.split_step(f"{sources / 'pairs'}@last")


def test_the_best_epoch_is_kept_and_reported(sources, task, tmp_path):  # noqa: F811
    """In a run whose labels are chance, so that its best evaluation is not its last."""
    workdir = tmp_path / "run"
    config = config_of(sources / "pairs", task, **EVERY, checkpoint__keep=1, optimizer__peak_lr=0.02)
    loop.train(config, workdir)
    measured = {line["step"]: line["eval/accuracy"] for line in read_metrics(workdir) if "eval/accuracy" in line}
    assert list(measured) == [2, 4, 6, 8, 10, 12]
    first = max(measured, key=lambda step: (measured[step], -step))
    assert first < 12, "choose another rate: the test shows nothing if the last evaluation is the best"
    assert RunRecord(workdir, enabled=False).facts["best"] == {
        "name": "accuracy", "step": first, "value": measured[first],
    }  # fmt: skip
    assert checkpoint.kept_steps(workdir) == [first, 12]
    every = config_of(sources / "pairs", task, **EVERY, checkpoint__keep=9, optimizer__peak_lr=0.02)
    loop.train(every, tmp_path / "every")
    here, there = leaves(workdir, first), leaves(tmp_path / "every", first)
    for name in here:
        np.testing.assert_array_equal(here[name], there[name], err_msg=name)
    run = suites.Run(f"{workdir}@best", progress=False)
    suites.evaluate(run, ["task"], say=lambda line: None)
    rows = [row for row in read_results(workdir) if row.suite == "task" and row.predictions]
    assert {row.step for row in rows} == {first}
    selected = next(row for row in rows if (row.metric, row.split) == ("custom/accuracy", "dev, first half"))
    assert selected.value == pytest.approx(measured[first])
    of_the_loop = [row for row in read_results(workdir) if row.metric == "custom/accuracy" and not row.predictions]
    assert [(row.step, row.n) for row in of_the_loop] == [(step, selected.n) for step in measured if step != first]


def test_patience_ends_a_run_and_a_stopped_one_at_the_same_step(sources, task, tmp_path, capsys):  # noqa: F811
    # Nothing is learned: the first evaluation stays the best.
    settings = EVERY | {"optimizer__peak_lr": 1e-9, "eval__patience": 3, "checkpoint__keep": 9}
    config = config_of(sources / "pairs", task, **settings)
    loop.train(config, tmp_path / "whole")
    facts = RunRecord(tmp_path / "whole", enabled=False).facts
    assert (facts["status"], facts["stopped_early"], facts["best"]["step"]) == ("complete", 8, 2)
    assert "3 evaluations after the best accuracy, of step 2" in capsys.readouterr().err
    before = (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert loop.train(config, tmp_path / "whole") == {}
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == before
    # What a kill leaves behind that came between the evaluation of step 6 and its line in run.json.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    killed = tmp_path / "killed"
    shutil.rmtree(killed / "checkpoints/8")
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 8' not in line))
    record = RunRecord(killed)
    del record.facts["stopped_early"], record.facts["best"]
    record.update(step=6, status="running")
    loop.train(config, killed)
    again = RunRecord(killed, enabled=False).facts
    assert (again["status"], again["stopped_early"], again["best"]) == ("complete", 8, facts["best"])
    # With more patience the run goes on.
    patient = config_of(sources / "pairs", task, **settings | {"eval__patience": 4})
    loop.train(patient, tmp_path / "whole")
    assert RunRecord(tmp_path / "whole", enabled=False).facts["stopped_early"] == 10
    assert leaves(killed, 2).keys() == leaves(tmp_path / "whole", 2).keys()


def test_an_evaluation_each_epoch(sources, task):  # noqa: F811
    config = config_of(sources / "pairs", task, "custom,kind=single,select=best")
    assert (config.eval.every_epochs, config.checkpoint.keep_best) == (1.0, "selects")
    assert configs.resolve(config, examples_per_pass=60).eval.every_steps == 8  # 60 rows, 8 at once
