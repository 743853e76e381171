"""plm.evaluate: the loop's own numbers, n-grams counted once a store, samples and senses of the run's held-out text."""

import json

import pytest
from fixtures import corpus

from experiments import bert, compare, elmo
from plm.analysis import minimal_pairs, ngrams, pseudo_words, samples, suites
from plm.data.sources import parse, split_of
from plm.errors import UserError
from plm.reporting import runs as reports
from plm.training import config as configs
from plm.training import metrics
from plm.training.loop import train

TOY = {
    "batch_size": 4,
    "seq_len": 16,
    "total_steps": 2,
    "model.width": 16,
    "model.layers": 1,
    "data.valid_fraction": 0.3,
}
CONFIGS = {  # one for each layout
    "causal": (compare, "tiny,architecture=transformer,objective=causal", {"data.tokenizer.vocab": 320}),
    "lanes": (
        elmo,
        "tiny",
        {
            "data.tokenizer.vocab": 60,
            "model.lstm.projection": 16,
            "model.lstm.cells": 8,
            "model.characters.filters": ((1, 8),),
            "model.characters.highways": 0,
        },
    ),
    "pairs": (bert, "tiny", {"data.tokenizer.vocab": 300}),
}


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """{name: workdir of a finished toy run}, all over one text."""
    folder = tmp_path_factory.mktemp("evaluate")
    text = corpus.write(folder / "text.txt", 60)
    patch = pytest.MonkeyPatch()
    patch.setenv("PLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    for name, (experiment, arguments, settings) in CONFIGS.items():
        config = experiment.get_config(arguments)
        short = {"log.every_steps": 1, "eval.every_steps": 0, "eval.batches": 3, "checkpoint.every_steps": 0}
        given = {
            "data.source": f"text:{text}",
            "data.workers": 1,
            "optimizer.warmup_steps": 0,
            **short,
            **TOY,
            **settings,
        }
        configs.apply(config, given)
        train(configs.validate(config), folder / name)
    patch.undo()
    return {name: folder / name for name in CONFIGS}


def rows_of(workdir, suite):
    return {row.metric: row for row in metrics.read_results(workdir) if row.suite == suite}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_perplexity_repeats_the_numbers_of_the_loop(workdirs, name):
    run = suites.Run(str(workdirs[name]), progress=False)
    suites.evaluate(run, ["perplexity"], say=lambda line: None)
    there = {key[5:]: value for key, value in metrics.read_metrics(workdirs[name])[-1].items() if key[:5] == "eval/"}
    found = rows_of(workdirs[name], "perplexity")
    wanted = {key: value for key, value in there.items() if key != "seconds" and not key.endswith("_targets")}
    assert {metric: row.value for metric, row in found.items()} == pytest.approx(wanted, rel=1e-6)
    assert [metric for metric, row in found.items() if row.n == 0] == ["loss"], "a sum of means"
    assert all(row.n == there.get(f"{m.removesuffix('_perplexity')}_targets", 0) for m, row in found.items())
    own = rows_of(workdirs[name], "pretraining")
    assert {metric: row.n for metric, row in found.items()} == {metric: row.n for metric, row in own.items()}
    assert {row.step for row in found.values()} == {2}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_other_text_is_measured_like_held_out_text(workdirs, name, tmp_path):
    """The run's held-out documents in a file of their own, all of them, are its held-out text."""
    run = suites.Run(str(workdirs[name]), progress=False)
    documents = parse(run.config.data.source).documents()
    held_out = [d.sentences for d in documents if split_of(d, run.config.data.valid_fraction) == "valid"]
    (tmp_path / "text.txt").write_text("\n\n".join("\n".join(sentences) for sentences in held_out), "utf-8")
    whole = suites._held_out(run, run.corpus, "valid", limit=0)
    spec = f"text:{tmp_path / 'text.txt'}"
    again = suites.Run(str(workdirs[name]), text=spec, progress=False)
    suites.evaluate(again, ["text"], say=lambda line: None, show=lambda table: None)
    found = rows_of(workdirs[name], "text")
    assert {metric: (row.value, row.n, row.split) for metric, row in found.items()} == {
        row["metric"]: (pytest.approx(row["value"], rel=1e-6), row["n"], spec) for row in whole.rows
    }


def test_ngrams_are_the_runs_own_targets_and_counted_once(workdirs, monkeypatch):
    metric_names = {}
    for name, workdir in workdirs.items():
        run = suites.Run(str(workdir), progress=False)
        suites.evaluate(run, ["ngrams"], say=lambda line: None)
        metric_names[name] = set(rows_of(workdir, "ngrams"))
        assert all(0 < row.value < 10 for row in rows_of(workdir, "ngrams").values())
    orders = [f"kneser_ney_{order}/" for order in ngrams.ORDERS]
    assert metric_names["pairs"] == {"unigram/masked"}
    assert metric_names["lanes"] == {order + way for order in orders for way in ("forward", "backward")}
    assert metric_names["causal"] == {order + end for order in orders for end in ("forward", "forward_bits_per_byte")}
    # With all batches, the run's held-out targets are those that the n-grams were asked about.
    valid = suites.Run(str(workdirs["lanes"]), progress=False).corpus.valid
    assert rows_of(workdirs["lanes"], "ngrams")["kneser_ney_1/forward"].n == valid.n_tokens + valid.n_sentences
    monkeypatch.setattr(ngrams, "baselines", lambda *_, **__: pytest.fail("counted again"))
    before = len((workdirs["lanes"] / "results.jsonl").read_text().splitlines())
    appended = suites.evaluate(suites.Run(str(workdirs["lanes"])), ["ngrams"], again=True, say=lambda line: None)
    assert len(appended) == 8
    assert len((workdirs["lanes"] / "results.jsonl").read_text().splitlines()) == before + 8
    assert len(rows_of(workdirs["lanes"], "ngrams")) == 8, "of rows that measure the same the last one holds"


@pytest.mark.parametrize("name", ["lanes", "causal"])
def test_counts_know_the_pairs_whose_right_sentences_were_in_the_text(workdirs, monkeypatch, name):
    run = suites.Run(str(workdirs[name]), progress=False)
    documents = parse(run.config.data.source).documents()
    read = [document for document in documents if split_of(document, run.config.data.valid_fraction) == "train"]
    seen = [sentence for document in read for sentence in document.sentences if len(set(sentence.split())) > 3][:40]
    pairs = [minimal_pairs.Pair(text, " ".join(reversed(text.split())), "order") for text in seen]
    monkeypatch.setattr(minimal_pairs, "generated", lambda: pairs)
    suites.evaluate(run, ["pair_ngrams"], say=lambda line: None)
    found = {metric: row.value for metric, row in rows_of(workdirs[name], "pair_ngrams").items()}
    assert set(found) >= {f"kneser_ney_{order}/forward/all" for order in ngrams.ORDERS}
    assert found["kneser_ney_3/forward/all"] > 0.9
    if name == "lanes":
        assert found["kneser_ney_1/forward/all"] == 0.5, "the same words are a tie for the unigram"


def test_samples_and_senses_come_from_the_same_held_out_text(workdirs, monkeypatch):
    small = pseudo_words.Settings(skip_ranks=0, pairs=3, most=4, fewest=2, margin=1)
    chosen = samples.Settings(number=2, shortest=5, longest=12, tokens=5)
    monkeypatch.setitem(suites.SUITES, "pseudo_words", suites.Suite(suites.evaluate_pseudo_words, small))
    monkeypatch.setitem(suites.SUITES, "samples", suites.Suite(suites.evaluate_samples, chosen))
    said, text = [], {}
    for name in ("causal", "pairs"):
        run = suites.Run(str(workdirs[name]), progress=False)
        suites.evaluate(run, ["samples", "pseudo_words"], say=said.append)
        text[name] = run.chosen
        # The second time nothing runs.
        assert not suites.evaluate(run, ["samples", "pseudo_words"], say=said.append)
        monkeypatch.setattr(suites.Run, "_train_documents", lambda *_: pytest.fail("read again"))
    assert [line.split(":")[0] for line in said] == ["samples", "pseudo_words"] * 4
    assert text["causal"] == text["pairs"]
    assert len(text["causal"]["pairs"]) == 3

    source = json.loads((workdirs["causal"] / "config.json").read_text())["data"]["source"]
    split = {sentence: split_of(d, 0.3) for d in parse(source).documents() for sentence in d.sentences}
    for one in text["causal"]["samples"]:
        whole = one["masked"].replace("[MASK]", one["truth"])
        assert split[whole] == "valid"
        assert whole.startswith(one["prompt"] + " ")
    for pair in text["causal"]["pairs"]:
        assert all(split[" ".join(o.words)] == "valid" for side in pair.occurrences for o in side)

    read = {name: reports.find([str(workdirs[name])])[0] for name in ("causal", "pairs")}
    first, second = read["causal"].samples[0], read["pairs"].samples[0]
    assert (first["kind"], first["step"], bool(first["text"])) == ("continuation", 2, True)
    assert (second["kind"], second["text"].count("[MASK]"), len(second["masked"])) == ("fill_mask", 1, 1)
    assert 0 < second["masked"][0]["predictions"][0][1] <= 1
    for run in read.values():
        assert run.senses["layers"] == ["embedding", "layer 1"]
        row = run.result("pseudo_words", "trained/auc/layer 1")
        assert row["low"] <= row["value"] <= row["high"]
        assert run.result("pseudo_words", "static/auc/form")["value"] == 0.5
        assert run.result("pseudo_words", "trained/auc/embedding")["n"] == 3
        trained = [pair["scores"]["trained"] for pair in run.senses["pairs"]]
        control = [pair["scores"]["random_init"] for pair in run.senses["pairs"]]
        assert trained != control


def test_the_rule_of_samples_depends_on_the_text_alone():
    documents = [[f"the cat {word} sat upon a mat while it rained {i}" for i in range(5)] for word in "abcdef"]
    found = samples.choose(documents, samples.Settings(number=3))
    assert len(found) == 3
    assert found == samples.choose(documents[::-1], samples.Settings(number=3))
    assert len({one["prompt"].split()[2] for one in found}) == 3, "one sentence a document"
    assert samples.choose([["too short"]]) == []


def test_bad_input_is_one_line(workdirs, tmp_path):
    run = suites.Run(str(workdirs["causal"]), progress=False)
    with pytest.raises(UserError, match="suite 'perplexities' is not known: choose from ngrams"):
        suites.evaluate(run, ["ngrams", "perplexities"])
    with pytest.raises(UserError, match=r"no weights that are known here: a run.s workdir"):
        suites.Run(str(tmp_path))
    facts = json.loads((workdirs["causal"] / "run.json").read_text())
    run.facts = facts | {"corpus": facts["corpus"] | {"fingerprint": "another"}}
    with pytest.raises(UserError, match="fingerprint another"):
        _ = run.corpus
