"""The table of runs on tasks: chosen by the selection part, reported by the other, every run counted."""

import json
from pathlib import Path

import pytest
from test_report import make_run

from plm.reporting import page, runs, transfer

# (rate, steps): of each seed the selection's and the report's accuracy.
GRID = {
    (1e-3, 100): [(0.70, 0.90), (0.74, 0.92)],
    (3e-3, 100): [(0.80, 0.60), (0.82, 0.64), (0.78, 0.62)],
    (3e-3, 200): [(0.95, 0.99)],  # the mean over its seeds counts: one diverged
}


def run_on_task(root: Path, rate: float, steps: int, seed: int, values, **settings) -> None:
    folder = make_run(root / f"lr{rate}-{steps}-seed{seed}{len(settings)}", "gpt", seed=seed, lr=rate, extras=False)
    config = json.loads((folder / "config.json").read_text())
    config |= {"total_steps": steps, "init": {"from": f"runs/gpt-seed{seed}", "keep": "params"}}
    config["data"] |= {"layout": "task", "task": {"name": "rte", "fraction": 1.0}}
    config["objectives"] = {"classify": {"reads": "last", "lstm": 0}}
    for key, value in settings.items():
        group, _, leaf = key.partition("__")
        config[group][leaf] = value
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    if values:
        for split, value in zip(("dev, first half", "dev, second half"), values, strict=True):
            row = {"run": folder.name, "step": steps, "suite": "task", "metric": "rte/accuracy", "split": split}
            rows.append(row | {"n": 138, "value": value, "predictions": "p.tsv", "pretrain_seed": 0, "head_seed": seed})
        # The loop's own, of a step behind the best one.
        rows.append(rows[0] | {"predictions": None, "step": steps + 10, "value": 0.99})
        rows.append(rows[0] | {"predictions": None, "metric": "rte/loss", "value": 9.0})
        rows.append(rows[0] | {"predictions": None, "metric": "rte/pretrained_8_grams", "value": 0.02})
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def grid(tmp_path):
    for (rate, steps), seeds in GRID.items():
        for seed, values in enumerate(seeds):
            run_on_task(tmp_path, rate, steps, seed, values)
    run_on_task(tmp_path, 3e-3, 200, 1, (0.40, 0.41))
    run_on_task(tmp_path, 3e-3, 200, 2, None)
    run_on_task(tmp_path, 1e-3, 100, 0, (0.55, 0.56), init__keep="nothing")
    return tmp_path


def test_what_is_reported_was_not_chosen_by_the_report(grid):
    table = transfer.table(runs.find([str(grid)]))
    heads = [column.name for column in table.columns]
    tuned, scratch = (dict(zip(heads, row, strict=True)) for row in table.rows)
    assert tuned["cell"] == "gpt"
    assert tuned["chosen rate and duration"] == "0.003, 100 steps"
    assert (tuned["trials"], tuned["runs"]) == (3, 8)
    assert tuned["selection"].mean == pytest.approx(80)
    assert tuned["report"].values == pytest.approx((60, 64, 62))
    assert tuned["8-grams pretrained on"] == "2.00 FLAGGED"
    assert scratch["cell"] == "from scratch, vocabulary of gpt"
    assert (scratch["trials"], scratch["report"].mean) == (1, pytest.approx(56))


def test_the_page_shows_it(grid):
    found = runs.find([str(grid)])
    text = page.markdown(page.prepare(runs.by_corpus(found)))
    assert "On the task" in text
    assert "62.0 ± 2.0" in text
    missing = [run for run in found if "no results on the task: --suite=task" in run.missing]
    assert len(missing) == 1
    assert not any("pseudo-words" in one for run in found for one in run.missing)
