"""A study finds its cells' numbers, says what is missing, gives verdicts with intervals, and travels in a bundle."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from test_report import make_run

from plm.errors import UserError
from plm.reporting import bundle, page, plots, statements, studies, study_tables, tables
from plm.reporting import runs as report_runs
from plm.reporting.studies import Claim, Column, Drawing, Results, Row, Study, difference, trend

REPOSITORY = Path(__file__).resolve().parent.parent
SEEDS = range(5)


def study_of() -> Study:
    """Two arms and a control on a task, a curve, and a number of the pretraining runs themselves."""
    study = Study("mine", "A table of <ours>", "section 1, table 2", "tiny", "two minutes")
    study.rows = [Row("new", "the new one"), Row("old", "the old one"), Row("random", "by chance", control=True)]
    score = Column("score", "SST-2", "task", "sst2/accuracy", measured="sst2, accuracy")
    study.columns = [
        score,
        Column("ppl", "perplexity", "pretraining", "masked_perplexity", "", unit="", factor=1.0, lower_is_better=True),
        *(Column(f"at_{n}", str(n), "task", "sst2/accuracy", group="curve", x=float(n)) for n in (1, 10)),
    ]
    study.paper = {"new": {"score": 92.7}, "old": {"score": 90.0}}
    study.claims = [
        Claim("C1", "new is better", difference("new", "old", score), 2.7),
        Claim("C2", "new has less perplexity", difference("new", "old", study.column("ppl"))),
        Claim("C3", "more is better", trend([("new", "at_1"), ("new", "at_10")], [0, 1])),
        Claim("C4", "in deviations", difference("new", "old", score), standardised=True, family="primary"),
    ]
    study.drawings = [Drawing("curve", "A curve", "updates", paper={"the new one": [(1, 50), (10, 60)]})]
    study.facts = [["", "new", "old"], ["reads", "both sides", "one"]]
    study.command = "python -m launch.sweep --config=mine.py"
    for seed in SEEDS:
        for row in ("new", "old", "random"):
            study.cell(row, "score", f"{row}-seed{seed}", seed)
            study.cell(row, "ppl", f"model-{row}-seed{seed}", seed)
        study.cell("new", "at_1", f"few-seed{seed}", seed)
        study.cell("new", "at_10", f"new-seed{seed}", seed)
        study.models.append(f"model-new-seed{seed}")
    return study


def write_task(folder: Path, right: np.ndarray, seed: int) -> None:
    """A run on a task as the commands write it: rows of both parts, and what each example counts."""
    make_run(folder, "bert", steps=20, total=20, corpus=f"task-{seed}", extras=False)
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"layout": "task"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "predictions").mkdir()
    rows = [{"suite": "task", "metric": "sst2/accuracy", "split": "dev", "step": 20, "value": 0.1, "predictions": ""}]
    for split, values in (("dev", right[:5]), ("test", right)):
        name = f"predictions/sst2-{split}-20.tsv"
        (folder / name).write_text("index\tprediction\n")
        counts = {"ids": [f"{split}{i}" for i in range(len(values))], "metrics": {"accuracy": [[v, 1] for v in values]}}
        (folder / name.replace(".tsv", ".counts.json")).write_text(json.dumps(counts))
        value = float(np.mean(values))
        rows.append({"suite": "task", "metric": "sst2/accuracy", "split": split, "step": 20, "n": len(values),
                     "value": value, "predictions": name})  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')


def write_sweep(folder: Path, study: Study) -> dict[str, Path]:
    """A finished sweep in folder/root, its pretraining runs in a folder beside it: {point: workdir}."""
    root, shared = folder / "root", folder / "shared"
    rng = np.random.default_rng(0)
    workdirs = {}
    for seed in SEEDS:
        hard = rng.random(200)
        for row, share in (("new", 0.85), ("old", 0.7), ("random", 0.5), ("few", 0.6)):
            workdirs[f"{row}-seed{seed}"] = root / f"{row}-seed{seed}"
            write_task(root / f"{row}-seed{seed}", (hard < share + 0.01 * rng.standard_normal()).astype(float), seed)
        for row, perplexity in (("new", 20.0), ("old", 24.0), ("random", 90.0)):
            run = make_run(shared / f"model-{row}-seed{seed}", "bert", seed=seed, extras=False)
            value = perplexity + 0.2 * rng.standard_normal()
            line = {"suite": "pretraining", "metric": "masked_perplexity", "split": "valid", "step": 600, "n": 9}
            with (run / "results.jsonl").open("a") as file:
                file.write(json.dumps(line | {"value": value}) + "\n")
            workdirs[f"model-{row}-seed{seed}"] = run
    write_study(root, study, workdirs)
    return workdirs


def write_study(root: Path, study: Study, workdirs: dict[str, Path]) -> None:
    record = study.record({name: epath.Path(path) for name, path in workdirs.items()}, epath.Path(root))
    root.mkdir(exist_ok=True)
    (root / "study.json").write_text(json.dumps(record))


@pytest.fixture
def root(tmp_path):
    write_sweep(tmp_path, study_of())
    return tmp_path / "root"


def test_cells_are_found_wherever_their_runs_lie(root):
    results = Results(studies.read(root))
    assert results.missing == []
    assert len(results.means("new", "score")) == 5
    assert 100 * 0.8 < np.mean(results.means("new", "score")) < 90, "the report part, not what chose or the loop saw"
    assert results.means("old", "ppl")[0] == pytest.approx(24, abs=1)
    (value,) = results.by_seed("new", "score")[3]
    assert value.counts.shape == (200, 2)
    assert list(studies.find([str(root.parent)])) == [str(root)]


def test_minimal_pairs_of_a_study_are_the_generated_ones():
    column = Column("pairs", "minimal pairs", "minimal_pairs", "trained/forward/all", part="")
    rows = [{"suite": "minimal_pairs", "metric": column.metric, "split": split} for split in ("generated", "blimp-1")]
    assert [studies._fits(row, column) for row in rows] == [True, False]
    assert [studies._fits(row, dataclasses.replace(column, part="blimp-1")) for row in rows] == [False, True]
    assert studies._fits(rows[0] | {"split": "test"}, column), "rows that do not say which pairs they are of"


def test_verdicts_with_intervals(root):
    table = study_tables.claims_table(Results(studies.read(root)))
    by_claim = {row[0]: dict(zip([c.name for c in table.columns], row, strict=True)) for row in table.rows}
    first = by_claim["C1"]
    assert first["verdict"] == by_claim["C2"]["verdict"] == by_claim["C3"]["verdict"] == "reproduced"
    assert first["paper"] == 2.7
    assert first["ours"].mean == pytest.approx(15, abs=5)
    assert first["pretraining runs"] == 5
    assert first["sign-flip p"] == 0.0625
    ours = next(column for column in table.columns if column.name == "ours")
    assert re.fullmatch(r"\+\d+\.\d ± \d+\.\d", ours.text(first["ours"])), "a deviation has no sign"
    low, high = map(float, first["95% interval"].split(" to "))
    assert low < first["ours"].mean < high
    assert by_claim["C2"]["ours"].mean == pytest.approx(4, abs=0.5), "less perplexity is more"
    assert by_claim["C4"]["in"] == "standard deviations"
    assert by_claim["C4"]["p, Holm"] == 0.0625
    assert first["p, Holm"] is None
    assert (first["kind"], by_claim["C4"]["kind"]) == ("exploratory", "primary")
    assert "only over runs" in table.note
    assert "cannot go below p = 0.0625" in table.note


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0431, "+0.04"), (0.053, "+0.05"), (-0.004, "0.0"), (0, "0.0"), (-0.22, "−0.2"), (1.26, "+1.3")],
)
def test_a_difference_is_written_with_the_digits_that_it_needs(value, text):
    assert tables.Column("ours", "", study_tables._signed).number(value) == text


def test_ours_beside_the_papers(root):
    results = Results(studies.read(root))
    table = study_tables.cells_table(results)
    assert [column.name for column in table.columns] == ["arm", "SST-2", "SST-2, paper", "perplexity"]
    assert table.rows[0][2] == 92.7
    assert table.columns[2].text(table.rows[1][2]) == "90.0", "as many digits as ours"
    assert table.rows[2][2] is None
    assert table.muted == {2}
    assert "SST-2: here sst2, accuracy." in table.note
    tex = table.latex()
    assert r"SST-2 (\%)" in tex
    assert re.search(r"the new one & \$8\d\.\d \\pm \d\.\d\$ & 92\.7", tex)
    (curve,) = study_tables.curve_tables(results)
    assert [column.name for column in curve.columns] == ["arm", "1", "10"]
    figure = plots.study_figure(results, results.study.drawings[0], "x")
    assert "the paper" in figure.svg


def test_what_was_pretrained_on_is_flagged(root):
    row = {"suite": "task", "metric": "sst2/pretrained_8_grams", "split": "all", "step": 20, "n": 1}
    for seed, share in ((1, 0.004), (3, 0.02)):
        path = root / f"new-seed{seed}" / "results.jsonl"
        path.write_text(json.dumps(row | {"value": share}) + "\n" + path.read_text())
        table = study_tables.cells_table(Results(studies.read(root)))
        flagged = [column.name for column in table.columns if "FLAGGED" in column.name]
        assert flagged == (["SST-2 FLAGGED"] if share > 0.01 else []), "one run is enough"
        results = Results(studies.read(root))
        for claims in (study_tables.claims_table(results), study_tables.overview([results])):
            said = next(i for i, column in enumerate(claims.columns) if column.name == "what is said")
            texts = [row[said] for row in claims.rows if "FLAGGED" in row[said]]
            expected = ["new is better FLAGGED", "more is better FLAGGED", "in deviations FLAGGED"]
            assert texts == (expected if share > 0.01 else [])
    assert "FLAGGED: of the task's 8-grams these were in the pretraining text: sst2 2.0%." in table.note


def test_a_measured_model_is_flagged_by_the_suite_of_overlaps(root):
    study = studies.read(root)
    study.columns.append(Column("probe", "linear probe", "probes", "sst2/trained/accuracy", part=""))
    study.cell("new", "probe", str(root.parent / "shared" / "model-new-seed2"), 2)
    path = root.parent / "shared" / "model-new-seed2" / "results.jsonl"
    row = {"suite": "overlap", "metric": "sst2/8_grams", "split": "test", "step": 600, "n": 9, "value": 0.42}
    assert Results(study).pretrained(study.column("probe")) == 0
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    assert Results(study).pretrained(study.column("probe")) == 0.42
    further = tables.further_table(report_runs.arms(report_runs.find([str(path.parent)])))
    assert [metric for _, metric, *_ in further.rows if "8_grams" in metric] == ["sst2/8_grams FLAGGED"]


def test_a_column_without_spread_is_not_divided_by_it(root):
    study = studies.read(root)
    for row in ("new", "old"):
        for seed in SEEDS:
            path = root / f"{row}-seed{seed}" / "results.jsonl"
            rows = [json.loads(line) | {"value": 0.0} for line in path.read_text().splitlines()[:-1]]
            path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    results = Results(study)
    claim = next(claim for claim in study.claims if claim.standardised)
    assert study_tables.measure(results, claim) is None
    table = study_tables.claims_table(results)
    (row,) = [row for row in table.rows if row[0] == claim.name]
    assert row[-1] == "cannot be standardised: all arms are equal on SST-2"


def test_a_quantity_of_every_arm_is_drawn_beside_the_papers(root):
    results = Results(studies.read(root))
    column = dataclasses.replace(results.study.column("score"), group="arms")
    results.study.columns[0] = column
    figure = plots.study_figure(results, Drawing("arms", "Arms", y_label="accuracy", kind="dots"), "arms")
    text = html.unescape(re.sub(r"<[^>]+>", " ", figure.svg))
    assert all(row.label in text for row in results.study.rows)
    assert "the paper's" in text
    assert "accuracy (%)" in text
    assert "5 pretraining runs" in figure.note
    results.study.paper.clear()
    assert "the paper's" not in plots.study_figure(results, Drawing("arms", "Arms", kind="dots"), "arms").svg


def test_every_number_names_its_run(root):
    (root / "new-seed3" / "results.jsonl").unlink()
    results = Results(studies.read(root))
    table = study_tables.runs_table(results)
    at = {column.name: i for i, column in enumerate(table.columns)}
    own = [row for row in table.rows if (row[at["arm"]], row[at["quantity"]]) == ("the new one", "SST-2")]
    assert [row[at["run"]] for row in own] == [f"new-seed{seed}" for seed in SEEDS]
    values = [row[at["value"]] for row in own]
    assert values[3] is None
    assert np.mean([v for v in values if v is not None]) == study_tables.summary(results, "new", "score").mean
    assert {row[at["status"]] for row in own} == {"complete"}
    assert {row[at["quantity"]] for row in table.rows} == {"SST-2", "perplexity", "A curve: 1", "A curve: 10"}
    assert "launch.sweep --config=mine.py" in table.note


def test_an_unfinished_sweep_says_what_is_missing(root):
    for seed in (1, 2, 3, 4):
        (root / f"old-seed{seed}" / "results.jsonl").unlink()
    results = Results(studies.read(root))
    assert [Path(place).name for place in results.missing] == [f"old-seed{seed}" for seed in (1, 2, 3, 4)]
    assert "Not there yet: old-seed1, old-seed2, old-seed3, old-seed4." in study_tables.cells_table(results).note
    claims = study_tables.claims_table(results)
    verdicts = [row[-1] for row in claims.rows]
    assert verdicts[0] == "no verdict", "one run is no verdict"
    for file in root.glob("*/results.jsonl"):
        file.unlink()
    claims = study_tables.claims_table(Results(studies.read(root)))
    assert claims.rows[0][-1] == "not measured yet"


def test_a_run_that_is_not_complete_has_no_result(root):
    """What a run measured on its way is no cell's number, unless the cell is about that step."""
    record = root.parent / "shared" / "model-new-seed2" / "run.json"
    for status in ("running", "interrupted", "failed"):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"status": status}))
        results = Results(studies.read(root))
        assert [Path(place).name for place in results.missing] == ["model-new-seed2"]
        assert study_tables.summary(results, "new", "ppl").n == 4
    study = study_of()
    study.columns = [
        dataclasses.replace(column, step=600) if column.name == "ppl" else column for column in study.columns
    ]
    paths = {path.name: path for folder in (root, root.parent / "shared") for path in folder.iterdir()}
    write_study(root, study, paths)
    assert Results(studies.read(root)).missing == []


def test_of_one_step_what_was_written_last_counts(root):
    path = root.parent / "shared" / "model-new-seed2" / "results.jsonl"
    row = {"suite": "pretraining", "metric": "masked_perplexity", "split": "valid", "step": 600, "n": 9, "value": 77.0}
    path.write_text(path.read_text() + json.dumps(row) + "\n" + json.dumps(row | {"step": 500, "value": 99.0}) + "\n")
    (value,) = Results(studies.read(root)).by_seed("new", "ppl")[2]
    assert value.value == 77.0


def test_a_family_counts_its_tests_that_are_still_to_come(root):
    study = study_of()
    later = Claim("C5", "later", difference("new", "random", study.column("at_1")), standardised=True, family="primary")
    study.claims.append(later)
    results = Results(studies.read(root))
    measured = [study_tables.measure(results, claim) for claim in study.claims[:4]]
    adjusted = study_tables._adjusted(study.claims, [*measured, None])
    assert adjusted[3] == 0.125
    assert adjusted[4] is None


def report(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "plm.report", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_page_and_its_bundle(root, tmp_path):
    """The bundle makes the same page elsewhere; one damaged byte is refused."""
    done = report(root, f"--bundle={tmp_path / 'b.tar'}", "--export=csv,tex,md,svg")
    assert done.returncode == 0, done.stderr
    text = (root / "report.html").read_text()
    assert "<title>A table of &lt;ours&gt;</title>" in text, "the page is about its study"
    assert "reproduced" in text
    assert 'title="n = 5: ' in text, "every seed where the pointer rests"
    assert "Reproducibility" in text
    assert "15 pretraining runs and 20 runs on tasks were started" in text
    assert (root / "report_files" / "mine_tiny_claims.csv").exists()
    assert (root / "report_files" / "mine_tiny_cells.tex").exists()
    notes = (root / "report_files" / "tables.txt").read_text()
    assert "mine_tiny_cells.csv: A table of <ours>" in notes
    assert "SST-2: here sst2, accuracy." in notes
    assert "| C1 | new is better |" in (root / "report.md").read_text()
    with tarfile.open(tmp_path / "b.tar") as archive:
        names = archive.getnames()
    assert {"root/study.json", "shared/model-new-seed0/run.json", "SHA256SUMS"} <= set(names)
    assert "root/new-seed0/predictions/sst2-test-20.counts.json" in names
    again = report(tmp_path / "b.tar")
    assert again.returncode == 0, again.stderr
    rebuilt = (tmp_path / "b.html").read_text()
    assert re.search(r"<table.*?</table>", rebuilt, re.S)[0] == re.search(r"<table.*?</table>", text, re.S)[0]
    content = bytearray((tmp_path / "b.tar").read_bytes())
    content[content.index(b"reads") + 1] ^= 1
    (tmp_path / "b.tar").write_bytes(content)
    damaged = report(tmp_path / "b.tar")
    assert damaged.returncode == 2
    (line,) = damaged.stderr.splitlines()
    assert "the bundle is damaged" in line


def test_a_study_whose_runs_all_lie_elsewhere_or_have_not_begun(root, tmp_path):
    study = json.loads((root / "study.json").read_text())
    study["cells"] = [cell for cell in study["cells"] if cell["column"] == "ppl"]
    study["claims"], study["drawings"] = study["claims"][1:2], []
    (tmp_path / "other").mkdir()
    (tmp_path / "other/study.json").write_text(json.dumps(study))
    assert report(tmp_path / "other").returncode == 0
    assert "A table of &lt;ours&gt;" in (tmp_path / "other/report.html").read_text()
    shutil.rmtree(tmp_path / "shared")
    done = report(tmp_path / "other")
    assert done.returncode == 0, done.stderr
    assert "not measured yet" in (tmp_path / "other/report.html").read_text()


def test_a_run_is_one_by_whatever_path_it_is_found(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "two").mkdir()
    for given, bundle_file in ((root, "b.tar"), (tmp_path / "link", "two/b.tar"), (root / ".." / "root", "c.tar")):
        done = report(given, f"--bundle={tmp_path / bundle_file}", f"--output={tmp_path / 'page.html'}")
        assert "35 runs (35 complete)" in done.stdout, done.stdout + done.stderr
    done = report(tmp_path / "b.tar", tmp_path / "two" / "b.tar", f"--output={tmp_path / 'page.html'}")
    assert "70 runs (70 complete)" in done.stdout, done.stdout + done.stderr


def test_a_file_that_is_no_study_or_no_bundle(tmp_path):
    for text in ("{}", "[]"):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(UserError, match=r"study\.json holds no study"):
            studies.read(tmp_path)
    (tmp_path / "x.tar").write_text("no tar")
    with pytest.raises(UserError, match="is no bundle"):
        bundle.unpack(tmp_path / "x.tar", tmp_path)


def test_a_statement_counts_what_ran(root):
    found = report_runs.find([str(root.parent)])
    text = statements.reproducibility(found, [study_of()])
    assert text.startswith("15 pretraining runs and 20 runs on tasks were started; 0 failed and 0 are unfinished")
    assert "python -m launch.sweep --config=mine.py" in text
    card = statements.data_card(found)
    assert {row[1] for row in card.rows} == {"pretraining", "a labelled task"}
    assert page.prepare([found])[-1].sections[-1].title == "Reproducibility"
