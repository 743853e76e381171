"""Every head learns a task that no bag of words and no label prior solves, and its twin with shuffled labels does not.

Words are made up and equally frequent in every class: only their order, or which stands beside which, tells.
"""

import itertools
import json

import jax
import numpy as np
import pytest

from plm.data import tokenizers
from plm.models.graph import build
from plm.training import config as configs
from plm.training import optimizer, sharding
from plm.training.loop import Evaluator, open_data
from plm.training.objectives import make_objectives
from plm.training.program import make_batches
from plm.training.step import make_train_step, new_state

WORDS = ("kofi", "lamu", "nesa", "toro", "bika", "sumi")
FILL = ("ya", "ro", "mi")
STEPS = 150
LONGER = 500  # to find out that two words are one takes a Transformer longer


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def single(rng, n):
    """Which of two words comes first."""
    for _ in range(n):
        label = int(rng.integers(2))
        words = [*rng.choice(FILL, 3), *(("kofi", "lamu") if label else ("lamu", "kofi"))]
        words.insert(4, str(rng.choice(FILL)))
        yield {"text": " ".join(words), "label": "kofi first" if label else "lamu first"}


def pair(rng, n):
    """Whether two texts hold the same word."""
    for _ in range(n):
        first, other = rng.choice(WORDS[:4], 2, replace=False)
        label, (one, two, three, four) = int(rng.integers(2)), rng.choice(FILL, 4)
        yield {"a": f"{one} {first} {two}", "b": f"{three} {first if label else other} {four}", "label": str(label)}


def similarity(rng, n):
    for row in pair(rng, n):
        yield row | {"label": 4.0 * int(row["label"]) + 0.5}


def choice(rng, n):
    """The choice that holds the context's word."""
    for _ in range(n):
        words = [str(word) for word in rng.choice(WORDS[:3], 2, replace=False)]
        right = int(rng.integers(2))
        yield {"context": f"ya {words[right]} ro", "choices": words, "label": right}


def tagging(rng, n):
    """A word's tag is decided by the word before it."""
    for _ in range(n):
        words = [str(word) for word in rng.choice(WORDS[:2], int(rng.integers(4, 8)))]
        tags = ["O", *("AFTER" if before == "kofi" else "O" for before in words[:-1])]
        yield words, tags


def span(rng, n):
    """The word behind the one that is asked for."""
    for number in range(n):
        names = [str(word) for word in rng.permutation(WORDS[:2])]
        answers = [str(word) for word in rng.choice(WORDS[2:], 2, replace=False)]
        context = f"{names[0]} {answers[0]} ya {names[1]} {answers[1]}"
        asked = int(rng.integers(2))
        found = {"text": answers[asked], "answer_start": context.index(answers[asked])}
        yield {"id": str(number), "question": names[asked], "answers": [found]}, context


def files(kind: str, folder) -> dict[str, str]:
    """Settings of data.task."""
    rng = np.random.default_rng(1)
    sizes = {"train": 600, "dev": 400}
    if kind == "tagging":
        for split, n in sizes.items():
            sentences = ("".join(f"{w} {t}\n" for w, t in zip(*one, strict=True)) for one in tagging(rng, n))
            (folder / f"{split}.conll").write_text("\n".join(sentences))
        return {"files": str(folder / "{split}.conll"), "label": "-1"}
    if kind == "span":
        for split, n in sizes.items():
            paragraphs = [{"context": context, "qas": [question]} for question, context in span(rng, n)]
            for number, paragraph in enumerate(paragraphs):
                paragraph["qas"][0]["id"] = f"{split}-{number}"
            (folder / f"{split}.json").write_text(json.dumps({"version": "1", "data": [{"paragraphs": paragraphs}]}))
        return {"files": str(folder / "{split}.json")}
    make = {"single": single, "pair": pair, "similarity": similarity, "choice": choice, "word": pair}[kind]
    for split, n in sizes.items():
        write(folder / f"{split}.jsonl", make(rng, n))
    text = {"single": "text", "choice": "context"}.get(kind, "a+b")
    return {"files": str(folder / "{split}.jsonl"), "text": text, "label": "label"}


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """{kind: folder of a trained vocabulary}"""
    found = {}
    sentences = [" ".join(words) for words in itertools.permutations((*WORDS[:3], *FILL), 4)] + [*WORDS, *FILL]
    for kind in ("wordpiece", "bpe", "words"):
        found[kind] = tmp_path_factory.mktemp(kind)
        tokenizers.train(kind, sentences, 60).save(found[kind])
    return found


def task_config(kind: str, model: str, folder, vocabularies, **settings):
    """A tiny model of GPT's, BERT's or ELMo's kind, untrained, on the task in `folder`."""
    kinds = {"gpt": "bpe", "bert": "wordpiece", "elmo": "words"}
    objective = configs.OBJECTIVE_OF_KIND[kind]
    config = configs.base()
    configs.apply(
        config,
        {
            "data.layout": "task",
            "data.tokenizer.kind": kinds[model],
            "data.tokenizer.path": str(vocabularies[kinds[model]]),
            "total_steps": LONGER if kind == "similarity" or (kind == "pair" and model != "elmo") else STEPS,
            "batch_size": 32,
            "seq_len": 16,
            "optimizer.peak_lr": 1e-2 if model == "elmo" else 5e-3,
            "optimizer.warmup_steps": 10,
            "optimizer.clip_norm": 1.0,
            "vocabulary_multiple": 8,
        },
    )
    configs.set_task(config, {"name": "custom", "kind": kind, **files(kind, folder)})
    shape = {"width": 32, "init": "fan_in"}
    if model == "elmo":
        shape |= {"architecture": "lstm", "direction": "both", "layers": 1}
        shape |= {"lstm.cells": 32, "lstm.projection": 0}
    else:
        shape |= {"direction": "full" if model == "bert" else "forward", "layers": 2, "heads": 2, "mlp_width": 64}
        shape |= {"segments": 2} if model == "bert" else {}
    configs.set_model(config, shape)
    head = {"pooling": "first" if model == "bert" else "last"} if objective not in ("tag", "span") else {}
    configs.add_objective(config, objective, **head | settings)
    return configs.validate(config)


def learn(config) -> list[dict[str, float]]:
    """The metrics on dev after training on the labels, and after training on shuffled ones, by the same programs."""
    mesh = sharding.make_mesh(config.mesh)
    config, corpus = open_data(config, progress=False)
    objectives, coefficients = make_objectives(config, corpus.tokenizer)
    graph = build(config, corpus.tokenizer.size, tuple(config.objectives), np.float32)
    tx = optimizer.make_optimizer(config.optimizer, graph.shapes(), config.total_steps)
    found = []
    with jax.set_mesh(mesh):
        step = make_train_step(graph.bind, objectives, coefficients, tx)
        held_out = make_batches(config, corpus, "eval", mesh)
        evaluator = Evaluator(graph, held_out, objectives, coefficients, 0, False, corpus.valid)
        for shuffled in (False, True):
            config = config.copy_and_resolve_references().unlock()
            config.data.task.shuffled_labels = shuffled and "answers" not in corpus.train.arrays
            batches = make_batches(config, corpus, "train", mesh)
            if shuffled and "answers" in corpus.train.arrays:
                break
            state = new_state(graph.init(jax.random.key(0)), tx, {})
            for batch in batches.iterate(0, config.total_steps):
                state, _ = step(state, batch)
            found.append(evaluator(state.params))
    return found


CASES = [
    ("single", "gpt", {}, "accuracy"),
    ("single", "bert", {}, "accuracy"),
    ("pair", "bert", {}, "accuracy"),
    ("pair", "gpt", {"pairs": "both_orders"}, "accuracy"),
    ("pair", "elmo", {"pairs": "apart", "reads": "mix", "pooling": "max"}, "accuracy"),
    ("similarity", "bert", {}, "pearson"),
    ("similarity", "elmo", {"pairs": "apart", "pooling": "max"}, "pearson"),
    ("choice", "gpt", {}, "accuracy"),
    ("tagging", "elmo", {"lstm": 16, "reads": "mix"}, "accuracy"),
    ("tagging", "gpt", {"crf": True}, "accuracy"),
    ("span", "bert", {}, "exact_match"),
]
QUICK = (("single", "gpt"), ("similarity", "elmo"), ("choice", "gpt"), ("tagging", "gpt"), ("span", "bert"))


@pytest.mark.parametrize(
    ("kind", "model", "settings", "metric"),
    [pytest.param(*case, marks=() if case[:2] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_it_learns_and_its_shuffled_twin_does_not(kind, model, settings, metric, tmp_path, vocabularies, monkeypatch):
    monkeypatch.setenv("PLM_CACHE", str(tmp_path / "cache"))
    real, *twin = learn(task_config(kind, model, tmp_path, vocabularies, **settings))
    assert real[f"eval/{metric}"] > 0.95, real
    if kind == "tagging":
        # Of the words behind the first half are AFTER: the larger class is the label prior.
        assert twin[0]["eval/accuracy"] < 0.75, twin
    elif kind != "span":
        low, high = (-0.35, 0.35) if metric == "pearson" else (0.35, 0.65)
        assert low < twin[0][f"eval/{metric}"] < high, twin
