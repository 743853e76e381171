"""Fine-tuning from a run: experiments/finetune.py by the same loop, resume, controls, results, bad input."""

import json
import random
import shutil

import numpy as np
import pytest
import test_weights_elmo
from fixtures import children, corpus
from fixtures.children import ROOT, RUNS

from experiments import compare, finetune
from plm.analysis import suites, task_suite
from plm.cache import cache_directory
from plm.data import static_vectors, tasks
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.inference import model as models
from plm.training import checkpoint, loop, metrics, program, sharding
from plm.training import config as configs
from plm.training.metrics import RunRecord, read_metrics, read_results

FINETUNE = str(ROOT / "experiments/finetune.py")
QUICK = {"total_steps": 6, "batch_size": 8, "seq_len": 16, "data.task.buckets": (8,), "checkpoint.every_steps": 3}


@pytest.fixture(autouse=True)
def compiled_once(cache):
    before = children.quick_compiles()
    yield
    children.restore(before)


class Sources:
    """One-step runs, made when they are asked for: `sources / "pairs"` (BERT), "blocks" (GPT, byte-level), "lanes"."""

    def __init__(self, folder):
        self.folder = folder

    def __truediv__(self, kind: str):
        workdir = self.folder / kind
        if not workdir.exists():
            self.folder.mkdir(exist_ok=True)
            text = corpus.write(self.folder / "corpus.txt")
            settings = {"data.source": f"text:{text}", "total_steps": 1, "seed": 7, "eval.batches": 1}
            loop.train(configs.load(f"{RUNS}:{kind}", settings), workdir)
        return workdir


@pytest.fixture
def sources(tmp_path_factory, compiled_once):
    return Sources(tmp_path_factory.getbasetemp() / "finetune sources")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with 60 + 20 labelled sentences of the corpus's own words."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("task")
    sentences = [s for text in corpus.documents(60) for s in text if 2 <= len(s.split()) <= 8]
    for split, n in (("train", 60), ("dev", 20)):
        rows = [{"text": rng.choice(sentences), "label": rng.choice(["no", "yes"])} for _ in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(source, task, arguments: str = "custom,kind=single", **settings):
    flat = {key.replace("__", "."): value for key, value in settings.items()}
    files = {"data.task.files": str(task / "{split}.jsonl"), "data.task.text": "text", "data.task.label": "label"}
    return configs.load(f"{FINETUNE}:{arguments}", {"init.from": str(source), **files, **QUICK, **flat})


def leaves(workdir, step=None) -> dict[str, np.ndarray]:
    return dict(checkpoint.paths_and_leaves(checkpoint.restore_params(workdir, step)[0]))


def test_bert_is_tuned_stopped_and_resumed_as_if_it_never_stopped(sources, task, tmp_path):
    config = config_of(sources / "pairs", task, checkpoint__keep_at=(0,), optimizer__warmup_fraction=0.2)
    whole = loop.train(config, tmp_path / "whole")
    assert {"eval/accuracy", "eval/classify", "eval/classify_accuracy"} <= whole.keys()
    assert whole["eval/accuracy"] == pytest.approx(whole["eval/classify_accuracy"])
    half = config.copy_and_resolve_references().unlock()
    half.total_steps, half.optimizer.schedule_steps = 3, 6
    half.optimizer.warmup_fraction, half.optimizer.warmup_steps = 0.0, 1
    loop.train(configs.validate(half), tmp_path / "stopped")
    (tmp_path / "stopped/config.json").write_text((tmp_path / "whole/config.json").read_text())
    loop.train(config, tmp_path / "stopped")
    a, b = leaves(tmp_path / "whole"), leaves(tmp_path / "stopped")
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    # The head's pooler is next-sentence prediction's.
    before, started = leaves(sources / "pairs"), leaves(tmp_path / "whole", 0)
    np.testing.assert_array_equal(started["heads/classify/pooler/kernel"], before["heads/next_sentence/pooler/kernel"])
    facts = RunRecord(tmp_path / "whole", enabled=False).facts
    assert facts["starts_from"]["source"] == str(sources / "pairs")
    rows = {row.metric: row for row in read_results(tmp_path / "whole")}
    row = rows["custom/accuracy"]
    assert (row.suite, row.pretrain_seed, row.head_seed, row.split) == ("task", 7, 0, "dev, first half")
    saved = configs.from_json((tmp_path / "whole/config.json").read_text())
    assert (saved.objectives.classify.classes, saved.optimizer.warmup_steps) == (2, 1)


@pytest.mark.slow
def test_gpt_gets_its_tokens_and_its_language_model_beside(sources, task, tmp_path, capsys):
    config = config_of(sources / "blocks", task, checkpoint__keep_at=(0,))
    assert set(config.objectives) == {"classify", "causal"}
    values = loop.train(config, tmp_path / "run")
    assert values["eval/loss"] == pytest.approx(values["eval/classify"] + 0.5 * values["eval/causal"])
    assert "heads/classify/output" in capsys.readouterr().err  # what starts at random values is said
    begun, before = leaves(tmp_path / "run", 0), leaves(sources / "blocks")
    np.testing.assert_array_equal(begun["embedding/tokens/table"], before["embedding/tokens/table"])


@pytest.mark.slow
def test_new_tokens_start_at_random_values(sources, task, tmp_path):
    """A BPE vocabulary as GPT's has nothing that frames a row."""
    text = corpus.write(tmp_path / "corpus.txt")
    settings = {"data.source": f"text:{text}", "total_steps": 1, "eval.every_steps": 0, "data.tokenizer.kind": "bpe"}
    loop.train(configs.load(f"{RUNS}:blocks", settings), tmp_path / "gpt")
    loop.train(config_of(tmp_path / "gpt", task, total_steps=1, checkpoint__keep_at=(0,)), tmp_path / "run")
    before, tokenizer = leaves(tmp_path / "gpt"), Tokenizer.load(tmp_path / "run/tokenizer")
    assert tokenizer.marks == ("start", "delimiter", "classify")
    table = leaves(tmp_path / "run", 0)["embedding/tokens/table"]
    size = tokenizer.size - 3
    np.testing.assert_array_equal(table[:size], before["embedding/tokens/table"][:size])
    assert (np.abs(table[size : size + 3]).max(axis=1) > 0).all()
    assert (table[size + 3 :] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["paper", "probe"])
def test_what_is_frozen_stays_bit_for_bit(way, sources, task, tmp_path):
    config = config_of(sources / "lanes", task, f"custom,kind=single,way={way}")
    loop.train(config, tmp_path / "run")
    before, after = leaves(sources / "lanes"), leaves(tmp_path / "run")
    body = [name for name in after if not name.startswith("heads/")]
    assert body
    for name in body:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert any(name.startswith("heads/classify/reader/lstm") for name in after) == (way == "paper")


@pytest.mark.slow
def test_controls(sources, task, tmp_path):
    scratch = config_of(sources / "pairs", task, init__keep="nothing", checkpoint__keep_at=(0,), total_steps=1)
    loop.train(scratch, tmp_path / "scratch")
    begun, before = leaves(tmp_path / "scratch", 0), leaves(sources / "pairs")
    assert Tokenizer.load(tmp_path / "scratch/tokenizer").size == Tokenizer.load(sources / "pairs/tokenizer").size
    name = "blocks/stacked/attention/query/kernel"
    assert not np.any(begun[name] == before[name])
    top = config_of(sources / "pairs", task, "custom,kind=single,reset_top=1", checkpoint__keep_at=(0,), total_steps=1)
    loop.train(top, tmp_path / "top")
    begun = leaves(tmp_path / "top", 0)
    np.testing.assert_array_equal(begun[name][0], before[name][0])
    assert not np.any(begun[name][1] == before[name][1])


@pytest.mark.parametrize(("source", "question"), [(compare.get_config("tiny,objective=masked"), 32), (None, 64)])
def test_a_question_leaves_room_for_its_context(source, question):
    assert finetune.get_config("docstring_span,way=full", source).data.task.question == question


def test_a_run_that_could_not_begin_still_knows_where_it_starts_from(sources, task, tmp_path, monkeypatch):
    config = config_of(sources / "pairs", task, total_steps=1)
    with monkeypatch.context() as patch:

        def missing(*_, **__):
            raise UserError("a package is missing")

        patch.setattr(metrics, "Metrics", missing)
        with pytest.raises(UserError, match="a package is missing"):
            loop.train(config, tmp_path / "run")
    loop.train(config, tmp_path / "run")
    facts = RunRecord(tmp_path / "run", enabled=False).facts
    assert facts["starts_from"]["source"] == str(sources / "pairs")
    assert {row.pretrain_seed for row in read_results(tmp_path / "run")} == {7}
    # Its batches are as long as their rows want, and so are its tokens.
    batches = {int(width): n for width, n in facts["layout"]["batches"].items()}
    assert min(batches) < config.seq_len
    mean = sum(width * n for width, n in batches.items()) / sum(batches.values())
    assert facts["tokens_per_step"] == round(config.batch_size * mean)


def test_a_finished_run_is_reported_once_with_its_predictions(sources, task, tmp_path):
    config = config_of(sources / "pairs", task, total_steps=1)
    values = loop.train(config, tmp_path / "run")
    model = models.load(str(tmp_path / "run"))
    predictor = task_suite.Predictor(model.config, model.tokenizer, model.params, progress=False)
    selection, report = task_suite.evaluate(predictor)
    assert (selection.name, report.name) == ("dev, first half", "dev, second half")
    assert (selection.n, report.n) == (10, 10)
    assert selection.values["accuracy"] == pytest.approx(values["eval/accuracy"])
    run = suites.Run(str(tmp_path / "run"), progress=False)
    shown: list[str] = []
    rows = suites.evaluate(run, ["task"], say=lambda line: None, show=shown.append)
    assert [(row.split, row.pretrain_seed) for row in rows[:2]] == [("dev, first half", 7), ("dev, second half", 7)]
    always = {row.split: row.value for row in rows[2:-1] if row.metric == "custom/majority/accuracy"}
    labels = [example.label for example in predictor.task.examples("train")]
    commonest = max(sorted(set(labels)), key=labels.count)
    parts = predictor.task.selection_and_report()
    assert always == {name: np.mean([e.label == commonest for e in own]) for name, own in dict(parts).items()}
    assert rows[-1].metric == "custom/pretrained_8_grams"
    assert 0.5 < rows[-1].value < 1, "its sentences are the corpus's, and some of those were held out"
    assert f"custom by run ({rows[-1].value:.2%} of its 8-grams were pretrained on FLAGGED)" in shown[0]
    assert rows[1].value == report.values["accuracy"]
    assert (tmp_path / "run" / rows[1].predictions).read_text() == report.text
    assert "dev, second half" in shown[0]
    assert suites.evaluate(run, ["task"], say=lambda line: None) == []
    lines = [json.loads(line) for line in report.text.splitlines()]
    assert {line["prediction"] for line in lines} <= {"no", "yes"}
    # Other batches and widths give the same predictions.
    other = model.config.copy_and_resolve_references().unlock()
    other.batch_size, other.data.task.buckets = 3, ()
    again = task_suite.evaluate(task_suite.Predictor(other.lock(), model.tokenizer, model.params, progress=False))
    assert [part.text for part in again] == [selection.text, report.text]
    assert model.embed(["one two"], layers=-1)[0].shape[-1] == 16  # it is still a model that embeds


def test_what_was_pretrained_on_is_looked_up_where_that_takes_seconds(sources, task, tmp_path, monkeypatch):
    loop.train(config_of(sources / "pairs", task, total_steps=1), tmp_path / "run")
    shutil.rmtree(cache_directory() / "overlaps", ignore_errors=True)

    def known(folder) -> list[float]:
        run = suites.Run(str(tmp_path / "run"), output=str(tmp_path / folder), progress=False)
        rows = suites.evaluate(run, ["task"], say=lambda line: None, show=shown.append)
        return [row.value for row in rows if row.metric == "custom/pretrained_8_grams"]

    shown: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(suites, "READ_BYTES", 0)
        assert known("long") == []
        assert f"--suite=overlap --task=custom,... on {sources / 'pairs'}" in shown[-1]
    (share,) = known("short")
    assert 0.5 < share < 1
    with monkeypatch.context() as patch:
        patch.setattr(suites, "READ_BYTES", 0)
        assert known("again") == [share], "it is in the cache"


def test_a_task_is_measured_anew_when_its_files_or_what_is_known_of_it_changed(sources, task, tmp_path, monkeypatch):
    files, source = shutil.copytree(task, tmp_path / "task"), shutil.copytree(sources / "pairs", tmp_path / "pairs")
    loop.train(config_of(source, files, total_steps=1), tmp_path / "run")
    shutil.rmtree(cache_directory() / "overlaps", ignore_errors=True)
    monkeypatch.setattr(suites, "READ_BYTES", 0)

    def measured() -> set[str]:
        run = suites.Run(str(tmp_path / "run"), progress=False)
        return {row.metric for row in suites.evaluate(run, ["task"], say=lambda line: None)}

    def look_for(folder) -> None:
        data = tasks.load("custom", files=f"{folder}/{{split}}.jsonl", text="text", label="label")
        run = suites.Run(str(source), tasks=[data], progress=False)
        suites.evaluate(run, ["overlap"], say=lambda line: None)

    first = measured()
    assert "custom/accuracy" in first
    assert measured() == set()
    other = shutil.copytree(task, tmp_path / "other")
    (other / "dev.jsonl").write_text((task / "train.jsonl").read_text())
    look_for(other)
    assert measured() == set(), "another task of the same name says nothing of this one"
    look_for(files)
    assert measured() == first | {"custom/pretrained_8_grams"}
    assert measured() == set()
    lines = (files / "dev.jsonl").read_text().splitlines()
    (files / "dev.jsonl").write_text("".join(line + "\n" for line in reversed(lines)))
    assert measured() == first, "other files: nobody has looked for them in the pretraining text"


def test_vectors_of_a_file_are_read_once_and_stand_beside_the_model(sources, task, tmp_path, monkeypatch):
    class Vectors(dict):
        vector_size = 3

    reads = []

    def read(path, setting):
        reads.append(path)
        return Vectors({word: np.full(3, 1.0 + i) for i, word in enumerate(corpus.sentence("any").split())})

    monkeypatch.setattr(static_vectors, "read", read)
    config = config_of(sources / "pairs", task, total_steps=1, data__task__vectors="glove.txt")
    config, data = loop.open_data(config, inherited=Tokenizer.load(sources / "pairs" / "tokenizer"), progress=False)
    assert reads == ["glove.txt"]
    assert config.objectives.classify.vectors == 3
    mesh = sharding.make_mesh(config.mesh)
    batch = program.make_batches(config, data, "train", mesh).local(0)
    assert batch["vectors"].shape == (*batch["tokens"].shape, 3)
    numbers = data.train.arrays["word_of"]
    assert 0 < (numbers > 0).sum() <= len(numbers)
    # Nothing stands where no word begins, in front of all at [CLS].
    assert not batch["vectors"][:, 0].any()


def test_published_elmo_is_moved_to_a_task_without_a_vocabulary(task, tmp_path):
    """Its weights read any word, so nothing asks for one."""
    options = test_weights_elmo.OPTIONS
    source = test_weights_elmo.write_files(tmp_path / "elmo", options, test_weights_elmo.drawn_arrays(options))
    config = config_of(source, task, "custom,kind=single,way=probe", total_steps=1)
    values = loop.train(config, tmp_path / "run")
    assert "eval/accuracy" in values
    # The learned mix stands in its results, layer by layer.
    shown: list[str] = []
    rows = suites.evaluate(suites.Run(str(tmp_path / "run"), progress=False), ["task"], show=shown.append)
    mix = {row.metric: row.value for row in rows if row.split == "learned"}
    weights = leaves(tmp_path / "run")["heads/classify/reader/mixes/0/weights"].astype(np.float64)
    shares = np.exp(weights) / np.exp(weights).sum()
    assert len(shares) == 3
    assert list(mix) == [f"custom/mix/mix 0/{name}" for name in ("embedding", "layer 1", "layer 2")]
    assert list(mix.values()) == pytest.approx(shares.tolist())
    assert "shares of the layers in the mix" in shown[1]


def test_shares_in_a_mix_are_named_by_the_layers_that_were_chosen(sources, task):
    config = config_of(sources / "pairs", task, objectives__classify__layers=(-1, 1))
    params = {"heads": {"classify": {"reader": {"mixes": {"0": {"weights": np.log([3.0, 1.0])}}}}}}
    layers = config.model.layers
    assert suites.mix_shares(config, params) == {
        "mix 0": {f"layer {layers}": pytest.approx(0.75), "layer 1": pytest.approx(0.25)}
    }


@pytest.mark.slow
def test_eight_devices_measure_what_one_does(sources, task, tmp_path):
    flags = [f"--config.{key}={value}" for key, value in QUICK.items()]
    flags += [f"--config.data.task.files={task}/{{split}}.jsonl", "--config.data.task.text=text"]
    flags += ["--config.data.task.label=label", f"--config.init.from={sources / 'pairs'}", "--config.batch_size=8"]
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        arguments = [f"--config={FINETUNE}:custom,kind=single", f"--workdir={workdir}", *flags]
        child = children.start("plm.train", *arguments, output=workdir.with_suffix(".out"), devices=devices)
        assert child.wait() == 0, child.text
    one, eight = (next(v for v in read_metrics(tmp_path / d) if "eval/accuracy" in v) for d in ("1", "8"))
    assert one["eval/accuracy"] == eight["eval/accuracy"]
    np.testing.assert_allclose(one["eval/classify"], eight["eval/classify"], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ("custom,kind=single", {"init__from": ""}, r"starts from a model: --config.init.from=SRC must be given"),
        ("sst3", {}, r"config argument task='sst3' must be .*did you mean 'sst2'"),
        ("sst2,kind=pair", {}, r"kind=pair is for task=custom; sst2 has its own"),
        ("custom,reset_top=9", {}, r"reset_top=9: the model has 2 layers"),
        ("custom", {"data__task__text": "body"}, r"jsonl, line 1: no column 'body'"),
        ("custom,kind=pair", {}, r"kind=pair has 1 text columns; 2 are right"),
        ("custom", {"objectives__classify__classes": 3}, r"objectives.classify.classes=3: task 'custom' has 2"),
        ("custom", {"init__reset": "^layers/"}, r"init.reset='\^layers/' finds no parameter"),
        ("custom", {"model__width": 32}, r"init.from=.* lacks"),
    ],
)
def test_bad_input_is_one_line(arguments, settings, message, sources, task, tmp_path):
    settings = {"init__from": str(sources / "pairs"), **settings}
    source = settings.pop("init__from")
    with pytest.raises(UserError, match=message) as caught:
        loop.train(config_of(source, task, arguments, **settings), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/config.json").exists()
