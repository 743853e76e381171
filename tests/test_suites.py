"""Suites that need only a model: on runs, on every checkpoint, on foreign weights; what is there is passed over."""

import concurrent.futures
import dataclasses
import json
import re
import time

import jax
import pytest
from fixtures import corpus, exports

from plm.analysis import minimal_pairs, suites, word_sense
from plm.analysis.minimal_pairs import Pair
from plm.analysis.results import Table
from plm.data import tasks
from plm.errors import UserError
from plm.inference.model import save
from plm.training import metrics
from plm.weights import huggingface

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def model():
    experiment, arguments, kind, settings, objectives, _ = exports.OURS["gpt_bytes"]
    return exports.made(experiment, arguments, exports.vocabularies()[kind], settings, "toy", objectives)


@pytest.fixture(scope="module")
def workdir(model, tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "toy"
    save(model, folder)
    save(dataclasses.replace(model, step=20, params=jax.tree.map(lambda p: -p, model.params)), folder)
    return folder


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    texts = [corpus.sentence("suite", i) for i in range(8)]
    pairs = [Pair(good, bad, "made") for good, bad in zip(texts[::2], texts[1::2], strict=True)]
    monkeypatch.setattr(minimal_pairs, "generated", lambda: pairs)
    return pairs


def test_every_checkpoint_is_measured_once_and_the_control_once_for_all(workdir, few_pairs, monkeypatch):
    judged, said, shown = [], [], []
    whole = minimal_pairs.judge

    def counted(one, *rest):
        judged.append(one.step)
        return whole(one, *rest)

    monkeypatch.setattr(minimal_pairs, "judge", counted)
    suites.every_step(f"{workdir}@all", ["minimal_pairs"], progress=False, say=said.append, show=shown.append)
    assert judged == [7, 0, 20], "two checkpoints and one model before training"
    rows = {(row.step, row.metric): row for row in metrics.read_results(workdir)}
    assert {step for step, _ in rows} == {7, 20}
    by_step = [rows[step, "trained/forward/all"].value for step in (7, 20)]
    assert by_step == [
        float(whole(suites.Run(f"{workdir}@{step}").model, few_pairs).credit["forward"].mean()) for step in (7, 20)
    ]
    assert rows[7, "random_init/forward/all"].value == rows[20, "random_init/forward/all"].value
    assert "minimal_pairs of toy over steps" in shown[0]
    line = next(line for line in shown[0].splitlines() if "trained/forward/all" in line)
    assert [float(cell) for cell in line.split("|")[3:5]] == [pytest.approx(value, abs=1e-4) for value in by_step]

    record = json.loads((workdir / rows[7, "trained/forward/all"].predictions).read_text())
    assert (record["step"], record["tables"][0]["rows"][-1][0]) == (7, "all")
    # Again: nothing runs, the table is shown from its file.
    tables = []
    suites.evaluate(suites.Run(f"{workdir}@7"), ["minimal_pairs"], say=said.append, show=tables.append)
    assert judged == [7, 0, 20]
    assert said[-1] == "minimal_pairs: there already for step 7"
    assert tables[0].startswith("Minimal pairs")
    # Other pairs are another measurement.
    few_pairs[0] = dataclasses.replace(few_pairs[0], uid="other")
    suites.evaluate(suites.Run(f"{workdir}@7", progress=False), ["minimal_pairs"], say=said.append)
    assert judged[3:] == [7, 0]


def test_measurements_at_once_lose_no_notes(workdir, tmp_path, monkeypatch):
    """Each reads what is there while no other one writes it."""
    run, read = suites.Run(f"{workdir}@7", output=tmp_path, progress=False), suites._noted

    def slow(folder):
        found = read(folder)
        time.sleep(0.2)
        return found

    monkeypatch.setattr(suites, "_noted", slow)
    monkeypatch.setattr(suites, "_stamp", lambda *_: {"version": 1})
    monkeypatch.setitem(
        suites.SUITES, "samples", suites.Suite(lambda run, _: suites.Outcome([], {suites.SAMPLES: [{"step": 7}]}), {})
    )
    monkeypatch.setitem(suites.SUITES, "text", suites.Suite(lambda run, _: suites.Outcome([]), {}))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: suites.evaluate(run, [name], again=True), ("samples", "text")))
    assert len(json.loads((tmp_path / suites.EVALUATIONS).read_text())) == 2
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert names == {suites.EVALUATIONS, suites.SAMPLES, "results.jsonl"}


def test_foreign_weights_give_the_numbers_of_the_run(model, workdir, tmp_path):
    huggingface.write(model, tmp_path / "foreign")
    with pytest.raises(UserError, match=r"foreign is no run of ours: --output=DIR"):
        suites.Run(str(tmp_path / "foreign"))
    run = suites.Run(str(tmp_path / "foreign"), output=tmp_path / "out", progress=False)
    found = {row.metric: row for row in suites.evaluate(run, ["minimal_pairs"], say=lambda line: None)}
    (ours,) = suites.Run(f"{workdir}@7").model.score([run.pairs[0].good])
    (theirs,) = run.model.score([run.pairs[0].good])
    assert theirs.total == pytest.approx(ours.total, abs=1e-3)
    assert found["trained/forward/all"].run == "foreign"
    assert {row.metric for row in metrics.read_results(tmp_path / "out")} == set(found)
    assert sorted(path.name for path in (tmp_path / "foreign").iterdir()) == sorted(
        path.name for path in (tmp_path / "foreign").iterdir() if path.name not in ("results.jsonl", "evaluations.json")
    )
    with pytest.raises(UserError, match=r"suite 'ngrams' reads the text that a run was trained on"):
        suites.evaluate(run, ["ngrams"])
    with pytest.raises(UserError, match="@all means all checkpoints of a run"):
        suites.every_step(f"{tmp_path / 'foreign'}@all", ["minimal_pairs"])


def test_what_a_suite_needs_is_said_before_anything_runs(workdir, tmp_path):
    run = suites.Run(str(workdir), progress=False)
    with pytest.raises(UserError, match="--wsd=DIR names their folder"):
        suites.evaluate(run, ["word_sense"])
    with pytest.raises(UserError, match="suite 'probes' is measured on tasks"):
        suites.evaluate(run, ["probes"])
    with pytest.raises(UserError, match=r"no semcor.data.xml"):
        suites.evaluate(suites.Run(str(workdir), wsd=str(tmp_path)), ["word_sense"])
    with pytest.raises(UserError, match=r"nothing.jsonl: cannot be read"):
        suites.evaluate(suites.Run(str(workdir), pairs=[str(tmp_path / "nothing.jsonl")]), ["minimal_pairs"])


def test_sets_of_pairs_stand_beside_each_other(workdir, few_pairs, tmp_path):
    (tmp_path / "blimp").mkdir()
    lines = [json.dumps({"sentence_good": pair.bad, "sentence_bad": pair.good}) for pair in few_pairs]
    (tmp_path / "blimp" / "turned.jsonl").write_text("\n".join(lines))

    def measured(**options) -> list:
        run = suites.Run(f"{workdir}@7", output=tmp_path / "out", progress=False, **options)
        return suites.evaluate(run, ["minimal_pairs"], say=lambda line: None)

    made, (first, *_) = measured(), measured(pairs=[f"{tmp_path}/blimp/"])
    assert {row.split for row in made} == {"generated"}
    assert re.fullmatch(r"blimp-[0-9a-f]{8}", first.split)
    rows = [row for row in metrics.read_results(tmp_path / "out") if row.metric == "trained/forward/all"]
    assert [row.split for row in rows] == ["generated", first.split]
    assert rows[0].value == pytest.approx(1 - rows[1].value)
    files = [row.predictions for row in rows]
    assert files == ["evaluations/toy-minimal_pairs-7.json", f"evaluations/toy-minimal_pairs-{first.split}-7.json"]
    assert all((tmp_path / "out" / file).exists() for file in files)
    assert measured() == measured(pairs=[f"{tmp_path}/blimp"]) == [], "both are there"
    # Equal names with other content are other sets.
    (tmp_path / "blimp" / "turned.jsonl").write_text(lines[0])
    assert measured(pairs=[f"{tmp_path}/blimp"])[0].split not in (first.split, "generated")


def test_two_tasks_of_one_name_are_refused_and_controls_are_of_the_data(workdir, tmp_path, monkeypatch):
    for name, word in (("a", "good"), ("b", "bad")):
        (tmp_path / name).mkdir()
        rows = "".join(f"{corpus.sentence(name, i)} {word}\t{i % 2}\n" for i in range(8))
        for split in ("train", "dev"):
            (tmp_path / name / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    both = [tasks.load(f"sst2,files={tmp_path / name}") for name in "ab"]
    run = suites.Run(str(workdir), tasks=both, output=tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=r"two tasks are called 'sst2', .*: give name=..., which custom takes"):
        suites.evaluate(run, ["zero_shot"], say=lambda line: None)
    measured = []
    monkeypatch.setattr(suites.zero_shot, "measure", lambda model, data, done: measured.append((model.step, data)))
    monkeypatch.setattr(suites.zero_shot, "summary", lambda data, found: ([], None))
    for data in (*both, both[0]):
        suites.evaluate_zero_shot(run, {}, data)
    first, second = both
    assert measured == [(20, first), (0, first), (20, second), (0, second), (20, first)]


def test_senses_of_a_run(workdir, tmp_path, monkeypatch):
    xml = (
        '<corpus><text><sentence><wf>ba</wf><instance id="d0" lemma="bake" pos="NOUN">bake</instance></sentence>'
        '<sentence><instance id="d1" lemma="bake" pos="NOUN">bakes</instance><wf>ra</wf></sentence></text></corpus>'
    )
    for name in ("semcor", "test"):
        (tmp_path / f"{name}.data.xml").write_text(xml)
        (tmp_path / f"{name}.gold.key.txt").write_text("d0 bake%1:00:00::\nd1 bake%1:00:01::\n")
    (tmp_path / "cntlist.rev").write_text("bake%1:00:00:: 1 1\n")
    run = suites.Run(str(workdir), wsd=str(tmp_path), progress=False)
    found = {row.metric: row.value for row in suites.evaluate(run, ["word_sense"], say=lambda line: None)}
    assert found["first_sense/all"] == 0.5
    assert {row.split for row in metrics.read_results(workdir) if row.suite == "word_sense"} == {run.wsd_set}
    assert re.fullmatch(rf"{tmp_path.name}-[0-9a-f]{{8}}", run.wsd_set)
    assert found["trained/last/layer 1/all"] == found["random_init/last/embedding/test"] == 1.0, "the same sentences"
    monkeypatch.setattr(word_sense, "predict", lambda *_: pytest.fail("measured again"))
    assert not suites.evaluate(suites.Run(str(workdir), wsd=str(tmp_path)), ["word_sense"], say=lambda line: None)


def test_a_table_is_aligned_text():
    table = Table("Title", ["name", "n", "value"], [["a", 1200, 0.51239], ["long name", None, None]])
    assert table.text().split("\n")[2:] == [
        "| name      |     n |  value |",
        "| --------- | ----: | -----: |",
        "| a         | 1,200 | 0.5124 |",
        "| long name |       |        |",
    ]
