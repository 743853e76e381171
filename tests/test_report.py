"""The report: what it compares, what it refuses, what it lists, and that it stands alone and is quick."""

import csv
import html.parser
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from plm.analysis.pseudo_words import Occurrence, Pair, evaluate
from plm.errors import UserError
from plm.reporting import page, plots, runs, tables
from plm.reporting.statistics import bootstrap_interval, smallest_p, summarise

VOCABULARIES = {
    "gpt": {"fingerprint": "bpe-1", "kind": "bpe", "size": 8192, "lossless": False},
    "elmo": {"fingerprint": "words-1", "kind": "words", "size": 9000, "lossless": False},
    "bert": {"fingerprint": "wordpiece-1", "kind": "wordpiece", "size": 8192, "lossless": False},
}
SHARED = {"fingerprint": "bytes-1", "kind": "byte_bpe", "size": 8192, "lossless": True}
OBJECTIVES = {"gpt": ["causal"], "elmo": ["bidirectional"], "bert": ["masked", "next_sentence"]}
CORPUS, COMMIT = "b8c3ce655e742d829615118912a91b31", "9daca77d2a1acb52833a2fde938a1deb62305f3f"
BASELINES = {1: 6.6, 2: 4.9, 3: 4.5, 5: 4.4}


def make_run(
    folder: Path, kind: str, *, seed: int = 0, steps: int = 600, total: int = 600, corpus: str = CORPUS,
    tokenizer: dict | None = None, lr: float = 1e-3, extras: bool = True, **record,
) -> Path:  # fmt: skip
    """A workdir as the commands write it: metrics every 10 steps, held-out ones every 50."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(kind)])
    tokenizer = tokenizer or VOCABULARIES[kind]
    speed = {"gpt": 21000, "elmo": 5200, "bert": 17000}[kind]
    config = {
        "seed": seed, "seq_len": 64, "batch_size": 32, "total_steps": total,
        "objectives": {o: {} for o in OBJECTIVES[kind]},
        "model": {"architecture": "lstm" if kind == "elmo" else "transformer"}, "optimizer": {"peak_lr": lr},
        "data": {"tokenizer": {"kind": tokenizer["kind"]}}, "mesh": {"data": -1},
    }  # fmt: skip
    store = {
        split: {"n_tokens": n, "n_bytes": 4 * n, "n_words": int(0.7 * n), "n_sentences": n // 20,
                "n_documents": n // 900, "n_unknown": 0 if tokenizer["lossless"] else n // 300}
        for split, n in (("train", 611_000), ("valid", 32_000))
    }  # fmt: skip
    run = {
        "name": f"{kind}/seed={seed}" if seed else kind, "architecture": config["model"]["architecture"],
        "direction": {"gpt": "forward", "elmo": "both", "bert": "full"}[kind], "objectives": OBJECTIVES[kind],
        "parameters": {"embedding": 1_048_576 if kind != "elmo" else 400_000, "body": 395_000 + 900 * len(kind),
                       **({"heads": 41_000} if kind != "gpt" else {}),
                       **({"softmax": 1_161_000} if kind == "elmo" else {})},
        "tokens_per_step": 2048, "total_steps": total, "seeds": {"init": seed, "data": seed},
        "corpus": {"fingerprint": corpus, "source": "pydocs#without_tasks", "licence": "PSF-2.0"},
        "tokenizer": tokenizer, "store": store,
        "flops_per_step": 9.1e9, "peak_memory": {"process": 3 << 29},
        "status": "complete" if steps >= total else "running",
        "command": f"python -m plm.train --config=experiments/compare.py:tiny --workdir={folder.name}",
        "commit": COMMIT, "uncommitted": None, "versions": {"jax": "0.10.2", "flax": "0.12.8"},
        "devices": {"kind": "cpu", "platform": "cpu", "count": 2, "processes": 1},
        "started": f"2025-01-0{1 + seed % 9}T10:00:00Z",
    } | record  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(run))
    keys = {"gpt": ["causal"], "bert": ["masked"], "elmo": ["bidirectional_forward", "bidirectional_backward"]}[kind]
    lines = []
    for step in range(10, steps + 1, 10):
        fall = 4.35 + 0.05 * len(kind) + (9.0 - 4.4) * math.exp(-step / 90) + 0.3 * math.exp(-step / 400)
        line = {"step": step, "seconds": round(4 + step * 2048 / speed, 3), "train/tokens": step * 2048,
                "train/tokens_per_second": speed * (1 + 0.03 * rng.standard_normal()),
                "train/step_seconds": 2048 / speed, "train/loss": fall}  # fmt: skip
        line |= {f"train/{key}": fall - 0.05 + 0.08 * rng.standard_normal() for key in keys}
        if step % 50 == 0:
            value = fall + 0.03 * rng.standard_normal()
            lines.append(json.dumps(line))
            line = {"step": step, "seconds": line["seconds"] + 1, "eval/loss": value}
            line |= {f"eval/{key}": value + 0.04 * i for i, key in enumerate(keys)}
            if tokenizer["lossless"] and kind != "bert":
                line |= {f"eval/{key}_bits_per_byte": value / math.log(2) / 4 for key in keys}
            if kind == "bert":
                line |= {"eval/masked_accuracy": 0.31, "eval/next_sentence": 0.66, "eval/next_sentence_accuracy": 0.61}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if extras and steps >= total:
        write_results(folder, kind, tokenizer, seed, steps)
    return folder


def write_results(folder: Path, kind: str, tokenizer: dict, seed: int, step: int) -> None:
    rows = []
    if kind == "bert":
        rows.append({"suite": "ngrams", "metric": "unigram/masked", "value": BASELINES[1] + 0.2, "n": 32000})
    else:
        for order, value in BASELINES.items():
            for i, way in enumerate(["forward", "backward"][: 1 + (kind == "elmo")]):
                metric = f"kneser_ney_{order}/{way}"
                rows.append({"suite": "ngrams", "metric": metric, "value": value + 0.05 * i, "n": 32000})
                if tokenizer["lossless"]:
                    bits = (value + 0.05 * i) / math.log(2) / 4
                    rows.append({"suite": "ngrams", "metric": f"{metric}_bits_per_byte", "value": bits, "n": 32000})
    senses, record = evaluate(embedder(0.5, kind), PAIRS, control=embedder(0.12, kind))
    rows += senses
    rows.append({"suite": "tasks", "metric": "sst2/accuracy", "value": 0.8 + 0.01 * seed, "n": 872, "head_seed": 0})
    common = {"run": folder.name, "step": step, "seed": seed, "head_seed": None, "split": "valid", "predictions": None}
    (folder / "results.jsonl").write_text("".join(json.dumps(common | row) + "\n" for row in rows))
    (folder / "senses.json").write_text(json.dumps(record))
    if kind == "bert":
        guesses = [["module", 0.41], ["class", 0.2], ["file", 0.08]]
        masked = [{"truth": "module", "predictions": guesses}]
        sample = {"kind": "fill_mask", "step": step, "text": "This [MASK] provides an interface.", "masked": masked}
    else:
        text = " example <b>shows & tells</b>"
        sample = {"kind": "continuation", "step": step, "prompt": "The following", "text": text, "settings": "t 0.8"}
    (folder / "samples.json").write_text(json.dumps([sample]))


def _side(word: str, other: int) -> tuple[Occurrence, ...]:
    return tuple(Occurrence(("we", "saw", "the", word, f"{other}-{i}", "again", "today"), 3) for i in range(16))


PAIRS = [Pair((a, b), (_side(a, 0), _side(b, 1))) for a, b in (("file", "line"), ("value", "name"), ("list", "type"))]


def embedder(strength: float, kind: str):
    def embed(sentences, targets):
        rng = np.random.default_rng(len(kind))
        truth = np.array([words[4].startswith("0") for words in sentences], float)[:, None]
        noise = rng.standard_normal((3, len(sentences), 16))
        return {f"layer {k}": 0.4 * noise[k] + strength * k * (truth - 0.5) for k in range(3)}

    return embed


class Reader(html.parser.HTMLParser):
    """Checks that tags are balanced and collects text and addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.addresses = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "br", "wbr"):
            self.open.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v]

    def handle_startendtag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def write_runs(root: Path) -> Path:
    """Three models, one with seeds; a failed run, a young one and one that never started."""
    for seed in (0, 1, 2):
        make_run(root / f"gpt-{seed}", "gpt", seed=seed)
    make_run(root / "elmo", "elmo")
    make_run(root / "bert", "bert")
    make_run(root / "gpt-dead", "gpt", seed=3, steps=120, status="failed", error="gradients were not finite")
    make_run(root / "late", "elmo", steps=100, lr=3e-3, name="elmo, higher rate")
    (root / "stillborn").mkdir()
    (root / "stillborn" / "config.json").write_text("{}")
    (root / "gpt-0" / "checkpoints" / "100").mkdir(parents=True)
    (root / "gpt-0" / "checkpoints" / "100" / "config.json").write_text("{}")  # no workdir of its own
    return root


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("native"))


def found(root):
    (group,) = runs.by_corpus(runs.find([str(root)]))
    return group


def test_the_page_stands_alone(native):
    text = page.html(page.prepare([found(native)]))
    read = Reader(text)
    assert all(address.startswith("#") for address in read.addresses), "nothing is fetched from elsewhere"
    assert "url(http" not in text
    words = " ".join(read.text)
    assert "example <b>shows & tells</b>" in words, "samples are escaped, not interpreted"
    assert text.count("<svg") >= 7
    assert "<title>Language models compared</title>" in text
    assert page.html(page.prepare([found(native)])) == text, "the same runs give the same page, byte for byte"


def test_quantities_that_do_not_compare_never_share_an_axis(native, tmp_path):
    make_run(tmp_path / "gpt", "gpt", tokenizer=SHARED)
    make_run(tmp_path / "elmo", "elmo", tokenizer=SHARED)
    make_run(tmp_path / "bert", "bert", tokenizer=SHARED)
    make_run(tmp_path / "words", "elmo")
    shared = {p.heading: [a.label for a in p.arms] for p in tables.panels(runs.arms(found(tmp_path)))}
    assert shared == {
        "Left to right, nats per token (byte_bpe, 8,192 ids)": ["elmo [kind=byte_bpe]", "gpt"],
        "Left to right, nats per token (words, 9,000 ids)": ["elmo [kind=words]"],
        "Left to right, bits per byte": ["elmo [kind=byte_bpe]", "gpt"],
        "Right to left, nats per token (byte_bpe, 8,192 ids)": ["elmo [kind=byte_bpe]"],
        "Right to left, nats per token (words, 9,000 ids)": ["elmo [kind=words]"],
        "Right to left, bits per byte": ["elmo [kind=byte_bpe]"],
        "Masked pieces, nats per masked piece (byte_bpe, 8,192 ids)": ["bert"],
    }
    for panel in tables.panels(runs.arms(found(native))):
        assert not panel.measure.in_bits, "every native tokenizer has UNK"
        assert len({run.vocabulary for arm in panel.arms for run in arm.runs}) == 1


def test_seeds_are_averaged_and_every_value_is_listed(native):
    every = runs.arms(found(native))
    gpt = next(arm for arm in every if arm.label == "gpt")
    assert [run.name for run in gpt.counted] == ["gpt", "gpt/seed=1", "gpt/seed=2"]
    assert len(gpt.runs) == 4, "the failed seed belongs to the arm and is not averaged"
    panel = next(p for p in tables.panels(every) if p.arms == [gpt])
    table = tables.panel_table(panel)
    values = [run.metrics[-1]["eval/causal"] for run in gpt.counted]
    last = table.rows[-1][1]
    assert last.values == tuple(values)
    assert last.mean == pytest.approx(np.mean(values))
    assert last.sd == pytest.approx(np.std(values, ddof=1))
    rows = table.csv_rows()
    assert rows[0][1:5] == [f"last (nats per token){x}" for x in ("", ": sd", ": n", ": values")]
    assert [float(x) for x in rows[-1][4].split()] == values
    way = dict(zip([c.name for c in table.columns], table.rows[-1], strict=True))["way from unigram to bigram"]
    assert way.mean == pytest.approx(np.mean([100 * (6.6 - v) / (6.6 - 4.9) for v in values]))


def test_ngrams_stand_beside_the_models_and_the_title_says_what_is_seen(native):
    by_name = {p.measure.name: p for p in tables.panels(runs.arms(found(native))) if p.arms[0].label != "late"}
    assert by_name["left_to_right"].baselines == BASELINES
    assert by_name["masked"].baselines == {1: BASELINES[1] + 0.2}
    finding = by_name["masked"].finding
    assert re.fullmatch(r"bert reaches \d\.\d\d nats per masked piece, below the unigram \(6\.80\)", finding)
    gain = tables.panel_table(by_name["masked"])
    row = dict(zip([c.name for c in gain.columns], gain.rows[-1], strict=True))
    assert row["gain over unigram"].mean == pytest.approx(6.8 - row["last"].mean)


def test_every_run_is_listed_with_what_is_missing(native):
    table = tables.run_table(found(native))
    columns = [c.name for c in table.columns]
    rows = {row[0]: dict(zip(columns, row, strict=True)) for row in table.rows}
    assert len(rows) == 8
    assert rows["gpt/seed=3"]["status"] == "failed, step 120 of 600: gradients were not finite"
    assert rows["elmo, higher rate"]["status"] == "unfinished, step 100 of 600"
    assert "no samples" in rows["elmo, higher rate"]["missing"]
    assert rows["stillborn"]["status"] == "not started"
    assert rows["stillborn"]["missing"] == "no run.json; no metrics.jsonl"
    assert rows["gpt"]["missing"] is None
    assert table.title == "8 runs started, 5 complete"


def test_different_corpora_are_refused_or_kept_apart(tmp_path):
    make_run(tmp_path / "a", "gpt", corpus="corpus-one")
    make_run(tmp_path / "b", "bert", corpus="corpus-two")
    everything = runs.find([str(tmp_path)])
    with pytest.raises(UserError, match=r"/a and .*/b .*different corpora .*corpus-one and corpus-two"):
        runs.by_corpus(everything)
    groups = runs.by_corpus(everything, separate=True)
    assert [[run.name for run in group] for group in groups] == [["gpt"], ["bert"]]
    Reader(page.html(page.prepare(groups)))
    make_run(tmp_path / "c", "gpt", corpus="corpus-one", protocol="p2")
    with pytest.raises(UserError, match="different protocols"):
        runs.by_corpus(runs.find([str(tmp_path / "a"), str(tmp_path / "c")]))


def test_axes_count_text_not_padding_and_go_on_between_logged_steps(tmp_path):
    make_run(tmp_path / "run", "bert", steps=50, total=100)
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 10, "seconds": 4, "train/tokens": 5000, "train/epochs": 0.5}\n'
        '{"step": 20, "seconds": 6, "train/tokens": 10000, "train/epochs": 1.0}\n{"step": 20, "eval/masked": 6.5}\n'
    )
    (run,) = found(tmp_path)
    assert [line["step"] for line in run.metrics] == [10, 20]
    assert run.metrics[1]["eval/masked"] == 6.5
    steps = np.array([0, 5, 10, 15, 20])
    np.testing.assert_allclose(run.at("tokens", steps), np.array([0, 0.25, 0.5, 0.75, 1.0]) * 611_000)
    np.testing.assert_allclose(run.at("seconds", steps), [0, 2, 4, 5, 6])
    np.testing.assert_allclose(run.at("flops", steps), 9.1e9 * steps)
    figure = plots.curves(tables.panels(runs.arms([run]))[0], plots.looks(runs.arms([run])))
    assert [label for _, label in plots.AGAINST if label not in figure.svg] == []
    assert "not logged" not in figure.svg
    del run.record["flops_per_step"]
    assert run.flops is None
    assert "not logged" in plots.curves(tables.panels(runs.arms([run]))[0], plots.looks(runs.arms([run]))).svg


def test_broken_and_young_runs_do_not_stop_the_page(tmp_path):
    make_run(tmp_path / "young", "gpt", steps=10)  # no evaluation yet
    torn = make_run(tmp_path / "torn", "bert", steps=300)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 310, "eval/loss": NaN}\n{"step": 320, "tra')
    (torn / "results.jsonl").write_text(
        '{"suite": "tasks", "metric": "x"}\n[1]\n{"suite": "t", "metric": "m", "value": null}\n'
    )
    broken = make_run(tmp_path / "broken", "gpt", lr=1.0)
    for name in ("run.json", "samples.json", "senses.json"):
        (broken / name).write_text('{"half')
    group = found(tmp_path)
    parts = page.prepare([group])
    text = " ".join(Reader(page.html(parts)).text)
    assert "run.json cannot be read" in text
    assert next(run for run in group if run.path.endswith("torn")).last_step == 310
    page.markdown(parts)
    Reader(page.html(page.prepare([found_empty(tmp_path)])))


def test_a_run_that_diverged_before_its_first_evaluation_is_listed(tmp_path):
    make_run(tmp_path / "good", "gpt")
    diverged = make_run(tmp_path / "diverged", "gpt", lr=1e20, status="failed", error="the loss is nan")
    lines = [json.loads(line) for line in (diverged / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: None if key.startswith("eval/") else value for key, value in line.items()} for line in lines]
    (diverged / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = " ".join(Reader(page.html(page.prepare([found(tmp_path)]))).text)
    assert "the loss is nan" in text


def test_a_point_that_failed_before_it_began_is_listed(tmp_path):
    make_run(tmp_path / "good", "gpt")
    for name, code in (("refused", 2), ("measured", 0), ("stopped", 75), ("killed", 137), ("waiting", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "point.json").write_text(json.dumps({"return_code": code}))
        (tmp_path / name / "log.txt").write_text("reading\nerror: seq_len=4 is too short\n\n")
    (tmp_path / "job").mkdir()
    for name, text in (("point.json", '{"backend": "slurm"}'), ("return_code", "2\n"), ("log.0.txt", "error: no\n")):
        (tmp_path / "job" / name).write_text(text)
    by_name = {run.name: run.status for run in found(tmp_path)}
    assert by_name.pop("job") == "failed, no step logged: no"
    assert by_name == {"gpt": "complete", "refused": "failed, no step logged: seq_len=4 is too short"}
    text = " ".join(Reader(page.html(page.prepare([found(tmp_path)]))).text)
    assert "seq_len=4 is too short" in text


def test_seeds_of_what_goes_on_from_seeds_are_one_arm(tmp_path):
    for seed in range(3):
        for at in ("", "@100"):
            folder = make_run(tmp_path / f"on{at}-seed{seed}", "gpt", seed=seed)
            config = json.loads((folder / "config.json").read_text())
            config["init"] = {"from": f"runs/gpt-seed{seed}{at}", "keep": "all"}
            (folder / "config.json").write_text(json.dumps(config))
    groups = runs.arms(found(tmp_path))
    assert sorted(len(arm.runs) for arm in groups) == [3, 3]
    assert {arm.first.settings["init.from"] for arm in groups} == {"runs/gpt", "runs/gpt@100"}


def test_an_older_checkpoint_evaluated_last_does_not_replace_the_newest(tmp_path):
    folder = make_run(tmp_path / "run", "gpt", steps=300)
    row = {"suite": "ngrams", "metric": "kneser_ney_1/forward", "split": "valid"}
    rows = [row | {"step": step, "value": value} for step, value in ((300, 1.0), (300, 2.0), (100, 3.0))]
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (run,) = found(tmp_path)
    assert [one["value"] for one in run.results] == [2.0]


def found_empty(root):
    (root / "only" / "w").mkdir(parents=True)
    (root / "only" / "w" / "config.json").write_text("{}")
    return found(root / "only")


def test_statistics_are_the_textbook_ones():
    summary = summarise([1.0, 2.0, 4.0, float("nan"), None])
    assert (summary.n, summary.mean) == (3, pytest.approx(7 / 3))
    assert summary.sd == pytest.approx(math.sqrt(7 / 3))
    half = 4.302652729911275 * math.sqrt(7 / 3) / math.sqrt(3)  # t(0.975, 2)
    assert summary.interval == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert summarise([1.0, 2.0]).interval is None
    assert summarise([float("inf")]) is None
    assert [smallest_p(n) for n in (3, 5)] == [0.25, 0.0625]
    draws = np.random.default_rng(0).standard_normal(400)
    low, high = bootstrap_interval(draws)
    assert (high - low) / 2 == pytest.approx(1.96 * draws.std() / 20, rel=0.1)


def test_hundreds_of_runs_take_seconds(tmp_path):
    template = make_run(tmp_path / "0", "gpt")
    texts = {file.name: file.read_text() for file in template.iterdir()}
    for number in range(1, 240):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in texts.items():
            if name == "config.json":
                config = json.loads(text) | {"seed": number % 5}
                config["optimizer"]["peak_lr"] = number // 5
                text = json.dumps(config)
            (folder / name).write_text(text)
    start = time.process_time()  # of this process: other work on the machine does not count
    text = page.html(page.prepare([found(tmp_path)]))
    assert time.process_time() - start < 20
    assert len(text) < 12e6


def report(*arguments, cwd):
    command = [sys.executable, "-X", "importtime", "-m", "plm.report", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    noise = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done, noise, errors


def test_the_command(native, tmp_path):
    output = tmp_path / "new folder" / "page.html"
    done, imports, errors = report(native, f"--output={output}", "--export=csv,md,svg", cwd=tmp_path)
    assert (done.returncode, errors) == (0, [])
    assert not any(re.search(r"\| +(jax|flax|torch|tensorflow)$", line) for line in imports)
    assert f"8 runs (5 complete): {output}" in done.stdout
    Reader(output.read_text())
    markdown = output.with_suffix(".md").read_text()
    assert "| model | " in markdown
    exported = {path.name for path in (output.parent / "page_files").iterdir()}
    assert {"runs.csv", "cost.csv", "parameters.csv", "senses.csv", "senses_picture.svg"} <= exported
    rows = list(csv.reader((output.parent / "page_files" / "runs.csv").open()))
    assert len(rows) == 9
    svg = (output.parent / "page_files" / "senses_picture.svg").read_text()
    assert "var(" not in svg


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which runs?"),
        (["nowhere"], "nowhere: no such directory"),
        (["."], "no workdir in ."),
        ([".", "--export=xlsx"], "--export=xlsx: choose from csv, md, svg"),
        ([".", "--bogus=1"], "bogus"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    done, _, errors = report(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = errors
    assert message in line
