"""The loop: killed at any moment and resumed is never interrupted, on any mesh, and bad input is one line.

Runs are toys of ELMo's (lanes, carried state, sampled softmax) and BERT's kind (pairs, two objectives) on a generated
corpus. Children are forked from a server that has imported everything, so a start costs little.
"""

import json
import math
import random
import re
import shutil
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from fixtures import children, corpus
from fixtures.children import RUNS

from plm.data import tokenizers
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError
from plm.models.graph import build
from plm.reporting import runs as report_runs
from plm.training import checkpoint, loop, program
from plm.training import config as configs
from plm.training.metrics import read_metrics, read_results

DEVICES = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus.write(tmp_path_factory.getbasetemp() / "corpus.txt")


@pytest.fixture(autouse=True)
def compiled_once(cache):
    """All processes share their compiled programs: what is resumed runs the very same ones, as a user's do."""
    before = children.quick_compiles()
    yield
    children.restore(before)


def config_of(kind: str, text, **settings) -> configs.ConfigDict:
    flat = {key.replace("__", "."): value for key, value in settings.items()}
    return configs.load(f"{RUNS}:{kind}", {"data.source": f"text:{text}", **flat})


def start(kind: str, text, workdir, *flags: str, **options) -> children.Child:
    arguments = [f"--config={RUNS}:{kind}", f"--config.data.source=text:{text}", f"--workdir={workdir}", *flags]
    return children.start("plm.train", *arguments, output=workdir.with_suffix(".out"), **options)


def final(workdir, step: int = 24) -> dict[str, np.ndarray]:
    """Every leaf of a checkpoint (parameters, optimizer, carry, counters) as NumPy arrays, read without plm."""
    leaves = {}
    for item in ("params", "carry", "rest"):
        directory = workdir / "checkpoints" / str(step) / item
        if directory.exists():
            tree = ocp.PyTreeCheckpointHandler().restore(
                directory, args=ocp.args.PyTreeRestore(restore_args=_as_numpy(directory))
            )
            paths = jax.tree_util.tree_flatten_with_path(tree)[0]
            leaves |= {f"{item}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf for path, leaf in paths}
    return leaves


def _as_numpy(directory):
    handler = ocp.PyTreeCheckpointHandler()
    return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(directory).tree)


def assert_same_checkpoint(a, b, step: int = 24) -> None:
    left, right = final(a, step), final(b, step)
    assert left.keys() == right.keys()
    assert any(name.startswith("params/") for name in left)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


TIMES = ("seconds", "train/tokens_per_second", "train/step_seconds", "eval/seconds")


def lines_of(workdir) -> list[dict]:
    """metrics.jsonl without what a clock says; the raw file: a line that is there twice shows."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def losses_of(workdir) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text):
    """kind -> workdir of a run that nothing disturbed, made once, in this process."""
    made = {}

    def workdir(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp(kind) / "run"
            loop.train(config_of(kind, text), path)
            made[kind] = path
        return made[kind]

    return workdir


both_kinds = pytest.mark.parametrize("kind", ["lanes", "pairs"])

# Interrupted and resumed


@both_kinds
def test_the_record_of_a_run(kind, uninterrupted):
    workdir = uninterrupted(kind)
    lines = lines_of(workdir)
    # Every third step, every fifth, which is saved, the evaluations.
    trained = [line["step"] for line in lines if "train/loss" in line]
    assert trained == [3, 5, 6, 9, 10, 12, 15, 18, 20, 21, 24]
    assert [line["step"] for line in lines if "eval/loss" in line] == [12, 24]
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [15, 20, 24]
    run = json.loads((workdir / "run.json").read_text())
    assert run["peak_memory"]["process"] > 100e6
    assert (run["status"], run["step"], run["total_steps"]) == ("complete", 24, 24)
    # Of the positions of its rows most hold text.
    assert 0.5 * run["tokens"] < run["text_tokens"] <= run["tokens"]
    assert run["text_tokens"] == pytest.approx(run["epochs"] * run["store"]["train"]["n_tokens"], abs=1)
    values = {row.metric: row.value for row in read_results(workdir) if row.step == 24}
    assert values["loss"] == lines[-1]["eval/loss"]


@both_kinds
@pytest.mark.parametrize("stop", ["in step 8", "after saving 10", "in evaluating 12"])
def test_a_stopped_run_resumes_as_if_never_stopped(kind, stop, uninterrupted, text, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    config = config_of(kind, text, **{"checkpoint.keep_at": (12,)})
    with monkeypatch.context() as patch:
        if stop == "in step 8":
            real_make = program.make_train_step

            def make(*arguments, **options):
                step = real_make(*arguments, **options)
                return lambda state, batch: interrupt() if int(state.step) == 7 else step(state, batch)

            patch.setattr(program, "make_train_step", make)
        elif stop == "after saving 10":
            real_save = checkpoint.Checkpoints.save

            def save(self, state, step, **options):
                saved = real_save(self, state, step, **options)
                return interrupt() if step == 10 else saved

            patch.setattr(checkpoint.Checkpoints, "save", save)
        else:
            patch.setattr(loop.Evaluator, "__call__", lambda self, params, stops: interrupt())
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, workdir)
    loop.train(config, workdir)
    assert_same_checkpoint(workdir, uninterrupted(kind))
    assert lines_of(workdir) == lines_of(uninterrupted(kind))
    run = json.loads((workdir / "run.json").read_text())
    resumed = {"in step 8": 5, "after saving 10": 10, "in evaluating 12": 12}[stop]
    assert [session["from_step"] for session in run["sessions"]] == [0, resumed]


def interrupt():
    raise KeyboardInterrupt


@both_kinds
def test_killed_at_random_moments(kind, uninterrupted, text, tmp_path):
    """kill -9, three times at least, each time somewhere else between the first step and the end."""
    workdir, moments, kills = tmp_path / "run", random.Random(kind), 0
    for attempt in range(12):
        child = start(kind, text, workdir)
        seen = len(losses_of(workdir)) if (workdir / "metrics.jsonl").exists() else 0
        deadline = time.monotonic() + 120
        while child.process.is_alive() and time.monotonic() < deadline:
            now = (workdir / "metrics.jsonl").read_bytes().count(b"\n") if (workdir / "metrics.jsonl").exists() else 0
            if now > seen or (attempt == 0 and now):
                break
            time.sleep(0.005)
        time.sleep(moments.random() * 0.2)
        child.process.kill()
        code = child.wait()
        assert code in (0, -9), child.text
        kills += code == -9
        if code == 0 or kills == 4:
            break
    assert kills >= 2, "it ended before it was killed: a slower machine or a longer run is needed"
    if code != 0:
        child = start(kind, text, workdir)
        assert child.wait() == 0, child.text
    assert_same_checkpoint(workdir, uninterrupted(kind))
    assert lines_of(workdir) == lines_of(uninterrupted(kind))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, text, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted("pairs"), workdir)
    data = max((workdir / "checkpoints" / "24" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    data.write_bytes(raw)
    run = json.loads((workdir / "run.json").read_text())
    (workdir / "run.json").write_text(json.dumps(run | {"status": "running"}))
    loop.train(config_of("pairs", text), workdir)
    told = capfd.readouterr().err
    assert re.search(r"checkpoint 24 .* is not used: .*params", told)
    assert "resuming after step 20" in told
    assert_same_checkpoint(workdir, uninterrupted("pairs"))
    assert lines_of(workdir) == lines_of(uninterrupted("pairs"))


def test_the_command_again_says_that_the_run_is_complete(uninterrupted, text):
    workdir = uninterrupted("pairs")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    child = start("pairs", text, workdir)
    assert child.wait() == 0
    assert child.text == f"already complete after 24 steps: {workdir}\n"
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def test_another_config_is_refused_with_the_keys(uninterrupted, text):
    workdir = uninterrupted("lanes")
    child = start("lanes", text, workdir, "--config.batch_size=16", "--config.optimizer.peak_lr=0.5")
    assert child.wait() == 2
    line = child.text.splitlines()[-1]
    assert "batch_size: 8 -> 16" in line
    assert "optimizer.peak_lr: 0.01 -> 0.5" in line
    child = start("lanes", corpus.write(text.with_name("other.txt"), 40, seed=3), workdir)
    assert child.wait() == 2
    assert "data.source" in child.text.splitlines()[-1]


def test_the_same_text_elsewhere_is_the_same_run(uninterrupted, text, tmp_path):
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text.read_bytes())
    child = start("pairs", moved, uninterrupted("pairs"))
    assert child.wait() == 0, child.text


def test_a_start_that_was_refused_leaves_no_config_behind(text, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="matches no parameter"):
        loop.train(config_of("blocks", text, optimizer__freeze=("nonsense",), data__tokenizer__vocab=310), workdir)
    assert not (workdir / "config.json").exists()
    assert not (workdir / "tokenizer").exists()


# Meshes and microbatches


slow = pytest.mark.slow


def assert_same_losses(workdir, reference) -> None:
    """Measured: 24 steps with dropout, on every mesh below: losses at most 2e-7 apart, held-out ones 6e-8."""
    expected, got = losses_of(reference), losses_of(workdir)
    assert got.keys() == expected.keys()
    for step in expected:
        np.testing.assert_allclose(got[step], expected[step], rtol=1e-5, err_msg=f"step {step}")
    np.testing.assert_allclose(*(lines_of(path)[-1]["eval/loss"] for path in (workdir, reference)), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("lanes", "2x2x2"),
        ("pairs", "8x1x1"),
        pytest.param("lanes", "8x1x1", marks=slow),
        pytest.param("pairs", "2x2x2", marks=slow),
    ],
)
def test_a_mesh_does_not_change_the_run(kind, mesh, uninterrupted, text, tmp_path):
    workdir = tmp_path / "run"
    flags = [f"--config.mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh.split("x"), strict=True)]
    child = start(kind, text, workdir, *flags, devices=DEVICES)
    assert child.wait() == 0, child.text
    assert_same_losses(workdir, uninterrupted(kind))
    assert json.loads((workdir / "run.json").read_text())["devices"]["count"] == DEVICES


@pytest.mark.parametrize("kind", ["lanes", pytest.param("pairs", marks=slow)])
def test_a_run_goes_on_on_another_mesh_with_other_microbatches(kind, uninterrupted, text, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted(kind), workdir)
    for step in ("20", "24"):
        shutil.rmtree(workdir / "checkpoints" / step)
    flags = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.microbatches=2"]
    child = start(kind, text, workdir, *flags, devices=4)
    assert child.wait() == 0, child.text
    assert "resuming after step 15" in child.text
    assert_same_losses(workdir, uninterrupted(kind))


# Evaluation


@pytest.mark.parametrize("kind", ["blocks", "pairs"])
def test_held_out_sums_do_not_depend_on_the_batch(kind, text):
    """Every held-out target counts once, whatever the batches; for models that carry no state."""
    results = {}
    for size in (8, 5):
        config = configs.resolve_seeds(config_of(kind, text, eval__batch_size=size, eval__batches=0))
        data = loop.open_corpus(config.data, progress=False)
        mesh = loop.sharding.make_mesh(config.mesh, jax.devices()[:1])
        batches = loop.make_batches(config, data, "eval", mesh)
        objectives, coefficients = loop.make_objectives(config, data.tokenizer, evaluation=True)
        graph = build(config, data.tokenizer.size, tuple(o.name for o in objectives), np.float32)
        evaluator = loop.Evaluator(graph, batches, objectives, coefficients, 0, False)
        params = graph.init(jax.random.key(1))
        results[size] = evaluator(params)
        assert evaluator(params) == results[size]
        assert evaluator.step._cache_size() == 1
        if kind == "blocks":
            symbols = data.valid.n_tokens + data.valid.n_documents  # with the end of each document
            assert results[size]["eval/causal_targets"] == symbols - 1
            assert results[size]["eval/causal_perplexity"] == math.exp(results[size]["eval/causal"])
        else:
            pairs = batches.layout.examples_per_epoch
            assert pairs % size, "the last batch must be a partial one"
            assert results[size]["eval/next_sentence_targets"] == pairs
    assert results[8].keys() == results[5].keys()
    for name in results[8]:
        np.testing.assert_allclose(results[8][name], results[5][name], rtol=2e-6, err_msg=name)


# Starting from another run


def test_init_from_another_runs_parameters(uninterrupted, text, tmp_path):
    source = uninterrupted("pairs")
    settings = {"init.from": f"{source}@20", "seed": 5, "checkpoint.keep_at": (0,), "total_steps": 1}
    loop.train(config_of("pairs", text, **settings), tmp_path)
    begun, taken = final(tmp_path, 0), final(source, 20)
    names = [name for name in taken if name.startswith("params/")]
    assert names
    for name in names:
        np.testing.assert_array_equal(begun[name], taken[name], err_msg=name)
    with pytest.raises(UserError, match="has no checkpoint of step 19; it has 15, 20, 24"):
        loop.train(config_of("pairs", text, **{"init.from": f"{source}@19"}), tmp_path / "none")


def test_init_from_all_of_another_run_goes_on_with_optimizer_and_step(uninterrupted, text, tmp_path):
    source = uninterrupted("pairs")
    loop.train(config_of("pairs", text, **{"init.from": f"{source}@15", "init.keep": "all"}), tmp_path / "all")
    assert_same_checkpoint(tmp_path / "all", source)
    assert [line for line in lines_of(source) if line["step"] > 15] == lines_of(tmp_path / "all")
    shorter = {"init.from": f"{source}@15", "init.keep": "all", "seq_len": config_of("pairs", text).seq_len // 2}
    loop.train(config_of("pairs", text, **shorter), tmp_path / "shorter")
    first, second = (json.loads((path / "run.json").read_text()) for path in (source, tmp_path / "shorter"))
    per_step = first["tokens_per_step"]
    assert second["tokens_per_step"] == per_step / 2
    assert second["tokens"] == 15 * per_step + 9 * per_step / 2, "the steps before were twice as long"
    assert 15 * first["flops_per_step"] < second["flops"] < first["flops"]
    (run,) = report_runs.find([str(tmp_path / "shorter")])
    assert (run.flops, run.at("tokens", np.array([24]))[0] > 0) == (pytest.approx(second["flops"]), True)
    with pytest.raises(UserError, match=r"has done 24 steps, which init\.keep='all' counts: total_steps=24"):
        loop.train(config_of("pairs", text, **{"init.from": str(source), "init.keep": "all"}), tmp_path / "late")


def test_an_at_sign_in_a_path_is_no_step(uninterrupted, text, tmp_path):
    copy = tmp_path / "me@home" / "run"
    shutil.copytree(uninterrupted("pairs"), copy)
    config = config_of("pairs", text, **{"init.from": str(copy), "total_steps": 1})
    loop.train(config, tmp_path / "run")


# Bad input, through the command


@pytest.fixture(scope="module")
def files(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("")
    (folder / "one.txt").write_text("\n".join(corpus.sentence("one", n) for n in range(300)))
    broken = text.read_bytes()
    (folder / "broken.txt").write_bytes(broken[:1234] + b"\xff" + broken[1234:])
    (folder / "file").write_text("")
    return folder


BAD = {
    "missing corpus": (["data.source=text:{files}/none.txt"], r"none\.txt"),
    "empty corpus": (["data.source=text:{files}/empty.txt"], r"empty"),
    "too few documents": (["data.source=text:{files}/one.txt"], r"1 document|empty"),
    "invalid UTF-8": (["data.source=text:{files}/broken.txt"], r"broken\.txt.*1234"),
    "sequence longer than positions": (["seq_len=32"], r"seq_len=32 is longer than model\.max_positions=16"),
    "batch not divisible by the mesh": (["batch_size=9", "mesh.data=2"], r"batch_size=9 must be a positive multiple"),
    "batch not divisible by microbatches": (["microbatches=3"], r"batch_size=8 must be divisible by microbatches=3"),
    "microbatches on a mesh": (["microbatches=8", "mesh.data=2"], r"batch_size=8 must be a positive multiple of 16"),
    "mesh larger than the devices": (["mesh.fsdp=4"], r"mesh\.fsdp=4 .* 2 devices"),
    "unwritable workdir": (["workdir={files}/file/run"], r"--workdir=.*/file/run cannot be written"),
    "unknown preset": (["config={runs}:elmoo"], r"kind='elmoo' must be lanes\|blocks\|pairs"),
    "unknown experiment": (["config={files}/gone.py"], r"gone\.py.*no such file"),
    "unknown key": (["optimizer.peak=1"], r"optimizer\.peak does not exist; did you mean 'optimizer\.peak_lr'"),
    "stray positional": (["+config.seed=5"], r"unexpected argument 'config\.seed=5'"),
    "ill-typed value": (["total_steps=many"], r"total_steps='many' must be a whole number"),
    "vocabulary too small": (["data.tokenizer.vocab=5"], r"vocabulary size 5 is too small"),
    "regex without a parameter": (["optimizer.freeze=('nonsense',)"], r"'nonsense' matches no parameter"),
    "no checkpoint to start from": (["init.from={files}/nothing"], r"nothing: there is no such folder"),
    "missing workdir": (["workdir="], r"--workdir must be given"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line_and_exit_code_2(name, files, text, tmp_path):
    settings, expected = BAD[name]
    values = {"config": f"{RUNS}:pairs", "workdir": str(tmp_path / "run"), "config.data.source": f"text:{text}"}
    stray = []
    for setting in settings:
        key, _, value = setting.format(files=files, runs=RUNS).partition("=")
        if key.startswith("+"):
            stray.append(f"{key[1:]}={value}")
        else:
            values[key if key in ("config", "workdir") else f"config.{key}"] = value
    flags = [f"--{key}={value}" for key, value in values.items()] + stray
    child = children.start("plm.train", *flags, output=tmp_path / "out", devices=2)
    assert child.wait() == 2, child.text
    *before, line = child.text.splitlines()
    assert line.startswith("error: "), child.text
    assert re.search(expected, line), line
    assert "Traceback" not in child.text
    assert not any(text.startswith("error") for text in before)


def test_a_vocabulary_that_does_not_match_the_checkpoint(uninterrupted, text, tmp_path):
    source = uninterrupted("pairs")
    other = corpus.write(tmp_path / "other.txt", 40, seed=9)
    tokenizers.train("wordpiece", other.read_text().splitlines(), 119).save(tmp_path / "vocabulary")
    flags = [f"--config.init.from={source}", "--config.total_steps=1"]
    child = start("pairs", other, tmp_path / "run", *flags, f"--config.data.tokenizer.path={tmp_path / 'vocabulary'}")
    assert child.wait() == 2, child.text
    line = child.text.splitlines()[-1]
    assert f"init.from='{source}' has another vocabulary (wordpiece of 120) than data.tokenizer.path=" in line
    # Without one, the source's own is used, though another would be trained on this text.
    child = start("pairs", other, tmp_path / "run", *flags)
    assert child.wait() == 0, child.text
    assert (
        Tokenizer.load(tmp_path / "run" / "tokenizer").fingerprint == Tokenizer.load(source / "tokenizer").fingerprint
    )


def test_added_words_start_as_the_mean_of_their_pieces(uninterrupted, text, tmp_path, capsys):
    source = uninterrupted("pairs")
    (tmp_path / "words").write_text("zebrafish\n\nquux\n")
    added = {"init.from": str(source), "data.tokenizer.add": str(tmp_path / "words")}
    config = config_of("pairs", text, **added, **{"checkpoint.keep_at": (0,), "total_steps": 1})
    loop.train(config, tmp_path / "run")
    old, new = Tokenizer.load(source / "tokenizer"), Tokenizer.load(tmp_path / "run" / "tokenizer")
    assert new.vocabulary == (*old.vocabulary, "zebrafish", "quux")
    assert new.encode(["quux zebrafish"]) == [[old.size + 1, old.size]]
    taken, begun = final(source), final(tmp_path / "run", 0)
    for name in ("params/embedding/tokens/table", "params/heads/masked/bias"):
        np.testing.assert_array_equal(begun[name][: old.size], taken[name][: old.size])
        for row, ids in enumerate(old.encode(["zebrafish", "quux"])):
            expected = taken[name][ids].mean(axis=0)
            np.testing.assert_allclose(begun[name][old.size + row], expected, rtol=1e-6)
    assert f"'quux' starts as the mean of {' '.join(old.pieces(old.encode(['quux'])[0]))}" in capsys.readouterr().err
    loop.train(config, tmp_path / "run")  # complete: nothing is added twice
    with pytest.raises(UserError, match="has not the 2 added tokens"):
        loop.train(config_of("pairs", text, **added, **{"init.keep": "all"}), tmp_path / "all")


def test_parameters_that_the_source_lacks_are_refused_unless_allowed(uninterrupted, text, tmp_path):
    settings = {"init.from": str(uninterrupted("pairs")), "model.layers": 3, "total_steps": 1}
    with pytest.raises(UserError, match=r"lacks 16 parameters of this model: blocks/2/.*init\.allow_missing"):
        loop.train(config_of("pairs", text, **settings), tmp_path / "refused")
    loop.train(config_of("pairs", text, **settings, **{"init.allow_missing": "^blocks/2/"}), tmp_path / "allowed")


def test_a_run_that_diverges_halts_with_a_line(text, tmp_path):
    workdir = tmp_path / "run"
    flags = ["--config.optimizer.peak_lr=1e30", "--config.optimizer.clip_norm=0", "--config.nonfinite.max_in_a_row=3"]
    child = start("blocks", text, workdir, *flags)
    assert child.wait() == 2, child.text
    line = child.text.splitlines()[-1]
    assert re.search(
        r"not finite in 3 steps in a row, the last of them step \d+: lower optimizer\.peak_lr=1e\+30", line
    )
    assert json.loads((workdir / "run.json").read_text())["status"] == "failed"
    assert read_metrics(workdir)[-1]["train/loss"] is None
