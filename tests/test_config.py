"""Configs are strict: what is wrong is one line before anything starts; durations, JSON and resumption are exact."""

import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from absl import flags

from plm.errors import UserError
from plm.training import config as configs

REPOSITORY = Path(__file__).resolve().parent.parent
GPT, ELMO, BERT = (f"{REPOSITORY}/experiments/{name}.py:tiny" for name in ("gpt", "elmo", "bert"))


def test_tables_agree_with_the_code_that_reads_them():
    """The choices stand in config.py, which imports no JAX; here they meet the modules that act on them."""
    from plm.models import language_model, layers
    from plm.training import objectives, optimizer

    assert configs.OPTIMIZERS == optimizer.OPTIMIZERS
    assert configs.SCHEDULES == optimizer.SCHEDULES
    assert set(configs.ACTIVATIONS) == set(layers.ACTIVATIONS)
    assert configs.DIRECTIONS == language_model.DIRECTIONS
    assert {name: o.directions for name, o in objectives.OBJECTIVES.items()} == configs.OBJECTIVE_DIRECTIONS
    assert set(configs.OBJECTIVES) == set(objectives.OBJECTIVES)
    for rows in (configs.KEYS, configs.MODEL, configs.MODEL_TRANSFORMER, configs.MODEL_LSTM, configs.MODEL_CHARACTERS):
        for key, default, rule, comment in rows:
            assert comment
            assert rule(key, default) == default, "a default keeps its own rule"


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        # unknown keys, with the nearest
        (GPT, {"batch_sise": "3"}, r"config\.batch_sise does not exist; did you mean 'batch_size'\?"),
        (GPT, {"optimizer.lr": "3"}, r"config\.optimizer\.lr does not exist; did you mean 'optimizer\.peak_lr'\?"),
        (GPT, {"peak_lr": "3"}, r"did you mean 'optimizer\.peak_lr'\?"),
        (GPT, {"model.lstm.cells": "3"}, r"config\.model\.lstm\.cells does not exist"),
        (ELMO, {"model.heads": "3"}, r"config\.model\.heads does not exist"),
        (GPT, {"objectives.masked.rate": "0.2"}, r"config\.objectives\.masked\.rate does not exist"),
        (GPT, {"model": "{}"}, r"config\.model is a group; set one of its keys"),
        # types
        (GPT, {"batch_size": "many"}, r"batch_size='many' must be a whole number of at least 1"),
        (GPT, {"batch_size": "2.5"}, r"batch_size=2\.5 must be a whole number"),
        (GPT, {"batch_size": "true"}, r"batch_size=True must be a whole number"),
        (GPT, {"optimizer.peak_lr": "nan"}, r"optimizer\.peak_lr='nan' must be a number above 0"),
        (GPT, {"optimizer.peak_lr": "1e999"}, r"optimizer\.peak_lr=inf must be a number above 0"),
        (GPT, {"log.tensorboard": "1"}, r"log\.tensorboard=1 must be true or false"),
        (GPT, {"checkpoint.keep_at": "10"}, r"checkpoint\.keep_at=10 must be a tuple"),
        (GPT, {"checkpoint.keep_at": "(1,-2)"}, r"checkpoint\.keep_at=\(1, -2\) must be a tuple"),
        (GPT, {"optimizer.decay": "(('(', 1.0),)"}, r"regular expression"),
        # ranges and choices
        (GPT, {"batch_size": "0"}, r"batch_size=0 must be a whole number of at least 1"),
        (GPT, {"data.valid_fraction": "1.5"}, r"data\.valid_fraction=1\.5 must be a number from 0\.0 to 0\.9"),
        (GPT, {"optimizer.schedule": "cosin"}, r"must be one of .*; did you mean 'cosine'\?"),
        (GPT, {"optimizer.name": "adam w"}, r"or module:function; did you mean 'adamw'\?"),
        (GPT, {"init.keep": "everything"}, r"init\.keep='everything' must be one of params, all"),
        # what keys say together
        (GPT, {"data.source": ""}, r"data\.source must be given"),
        (GPT, {"seq_len": "256", "model.max_positions": "128"}, r"seq_len=256 is longer than model\.max_positions=128"),
        (GPT, {"batch_size": "16", "microbatches": "3"}, r"batch_size=16 must be divisible by microbatches=3"),
        (GPT, {"model.heads": "3"}, r"model\.width=128 must be divisible by model\.heads=3"),
        (GPT, {"model.direction": "full"}, r"objectives\.causal needs model\.direction='forward', not 'full'"),
        (GPT, {"data.layout": "pairs"}, r"data\.layout='pairs' needs \[CLS\] and \[SEP\]"),
        (GPT, {"init.keep": "all"}, r"give init\.from as well"),
        (
            GPT,
            {"init.keep": "all", "init.from": "x", "init.reset": "head"},
            r"init\.reset='head' is not for init\.keep",
        ),
        (GPT, {"seed": 2**32}, r"seed=4294967296 must be less than 2\*\*32"),
        (GPT, {"seeds.data": 10**19}, r"seeds\.data=10000000000000000000 must be less"),
        (GPT, {"optimizer.eps": 0.0}, r"optimizer\.eps=0\.0 must be"),
        (GPT, {"data.valid_fraction": "0"}, r"leaves nothing to evaluate on"),
        (ELMO, {"model.lstm.projection": "64"}, r"model\.width=128 must equal the LSTM layers' output width 64"),
        (ELMO, {"model.direction": "full", "model.width": "256"}, r"objectives\.bidirectional needs"),
        (
            ELMO,
            {"objectives.bidirectional.samples": "8000", "data.tokenizer.vocab": "8000"},
            r"must be below data\.tokenizer\.vocab=8000",
        ),
        (BERT, {"objectives.masked.random": "0.2"}, r"mask \+ random \+ keep = 1\.1 must be 1"),
        (BERT, {"data.layout": "blocks"}, r"objectives\.next_sentence needs data\.layout='pairs'"),
        (BERT, {"data.tokenizer.kind": "bpe"}, r"objectives\.masked needs a mask token"),
        (BERT, {"model.direction": "forward"}, r"needs model\.direction='full', not 'forward'"),
        # durations
        (GPT, {"total_steps": "3", "total_tokens": "4"}, r"exactly one duration holds"),
        (GPT, {"total_steps": "0"}, r"total_steps=0 must be a whole number of at least 1"),
        (GPT, {"total_steps": "none"}, r"total_steps must be given a number"),
        # files and arguments
        (f"{REPOSITORY}/experiments/gtp.py:tiny", {}, r"there is no such file; did you mean '.*gpt\.py'"),
        (
            f"{REPOSITORY}/experiments/gpt.py:huge",
            {},
            r"config argument size='huge' must be base\|gpt\|small\|laptop\|tiny",
        ),
        (f"{REPOSITORY}/experiments/gpt.py:tiny,", {}, r"config argument '' is unknown"),
        (f"{REPOSITORY}/experiments/bert.py:base,phase", {}, r"config argument 'phase' has no value; it is phase=1\|2"),
        (f"{REPOSITORY}/experiments/common.py", {}, r"defines no get_config"),
    ],
)
def test_bad_input_is_one_line(spec, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        configs.load(spec, overrides)
    assert "\n" not in str(error.value)


def test_values_are_read_as_their_keys_say():
    config = configs.load(
        GPT,
        {
            "checkpoint.keep_at": "(10,100)",
            "optimizer.decay": "(('bias$', 0),)",
            "optimizer.freeze": "['^embedding/']",
            "total_steps": "1e3",
            "optimizer.warmup_steps": "1_0",
            "optimizer.clip_norm": "2",
            "log.tensorboard": "True",
            "scan.unroll": "false",
            "seeds.data": "none",
            "data.source": "text:a b/*.xz+0.5*pydocs",
            "init.from": "12",
            "data.tokenizer.path": "none",
        },
    )
    assert config.checkpoint.keep_at == (10, 100)
    assert config.optimizer.decay == (("bias$", 0.0),)
    assert config.optimizer.freeze == ("^embedding/",)
    assert (config.total_steps, config.optimizer.warmup_steps) == (1000, 10)
    assert isinstance(config.optimizer.clip_norm, float)
    assert (config.log.tensorboard, config.scan.unroll, config.seeds.data) == (True, False, None)
    assert (config.init["from"], config.data.tokenizer.path) == ("12", "none"), "text stays text"
    with pytest.raises(AttributeError):
        config.optimizer.lr = 1.0  # locked


def test_as_flag_is_read_back():
    """What a sweep writes on a command line is what `load` reads."""
    values = {
        "optimizer.decay": (("bias$", 0.25),),
        "optimizer.peak_lr": 1e-05,
        "checkpoint.keep_at": (),
        "log.tensorboard": True,
        "data.source": "text:it's.txt",
        "seeds.data": None,
    }
    texts = {}
    for key, value in values.items():
        name, _, texts[key] = configs.as_flag(key, value).partition("=")
        assert name == f"--config.{key}"
    assert configs.to_text(configs.load(GPT, texts)) == configs.to_text(configs.load(GPT, values))


@pytest.mark.parametrize("key", configs.DURATIONS)
def test_overriding_a_duration_clears_the_others(key):
    config = configs.load(GPT, {key: "7"})
    assert [name for name in configs.DURATIONS if config[name] is not None] == [key]


def test_every_duration_becomes_steps_in_one_place():
    def steps(examples_per_pass=None, **duration):
        overrides = {"batch_size": 8, "seq_len": 32, "optimizer.warmup_steps": 0, **duration}
        resolved = configs.resolve(configs.load(GPT, overrides), examples_per_pass=examples_per_pass)
        assert [key for key in configs.DURATIONS if resolved[key] is not None] == ["total_steps"]
        assert resolved.optimizer.schedule_steps == resolved.total_steps
        return resolved.total_steps

    assert steps(total_steps=5) == 5
    assert [steps(total_tokens=n) for n in (1, 256, 257)] == [1, 1, 2]
    assert [steps(total_examples=n) for n in (8, 9)] == [1, 2]
    assert [steps(100, total_epochs=e) for e in (1.0, 2.0, 0.08, 0.01)] == [13, 25, 1, 1]
    assert steps(80, total_epochs=0.3) == 3, "0.3 x 80 / 8 is 3.0000000000000004 in floats"


def test_resolve_fills_seeds_and_checks_the_schedule():
    config = configs.load(GPT, {"seed": "3", "seeds.data": "5"})
    resolved = configs.resolve(config, platform="cpu")
    assert (resolved.seeds.init, resolved.seeds.data, resolved.precision.compute) == (3, 5, "float32")
    assert configs.resolve(config, platform="tpu").precision.compute == "bfloat16"
    assert config.seeds.init is None, "the config itself stays as it was"
    with pytest.raises(UserError, match=r"optimizer\.schedule_steps=60 is less than the run's 90 steps"):
        configs.resolve(configs.load(GPT, {"total_steps": "90", "optimizer.schedule_steps": "60"}))


@pytest.mark.parametrize(
    ("schedule", "steps", "warmup"),
    [
        ("openai_linear", 138, 1),  # 0.28 of a step: the first one has rate 0, as in OpenAI's code
        ("openai_linear", 700, 2),  # 1.4
        ("openai_cosine", 138, 1),
        ("bert_linear", 138, 0),  # Google's code cuts
        ("bert_linear", 900, 1),
    ],
)
def test_a_warm_up_of_parts_of_a_step(schedule, steps, warmup):
    settings = {"optimizer.warmup_steps": 0, "optimizer.warmup_fraction": 0.002, "optimizer.schedule": schedule}
    config = configs.resolve(configs.load(GPT, settings | {"total_steps": steps}))
    assert config.optimizer.warmup_steps == warmup


@pytest.mark.parametrize(("kind", "pairs"), [("single", "apart"), ("single", "both_orders"), ("word", "both_orders")])
def test_rows_of_two_texts_are_not_for_one(kind, pairs):
    config = configs.load(f"{REPOSITORY}/experiments/finetune.py:custom,kind={kind}", complete=False)
    config.objectives.classify.pairs = pairs
    with pytest.raises(UserError, match=f"objectives.classify.pairs='{pairs}' is "):
        configs.settle(config, task="mine", kind=kind, classes=2, vectors=0)


def test_a_saved_config_comes_back():
    config = configs.resolve(configs.load(ELMO, {"checkpoint.keep_at": "(1,2)"}))
    again = configs.from_json(configs.to_json(config))
    assert configs.differences(config, again) == []
    assert again.model.characters.filters == config.model.characters.filters
    assert configs.validate(again).is_locked
    with pytest.raises(UserError, match="damaged"):
        configs.from_json('{"seed": 1')


def test_a_run_of_before_a_key_was_there_goes_on_if_it_has_its_default():
    config = configs.resolve(configs.load(GPT))
    written = json.loads(configs.to_json(config))
    del written["model"]["positions_in_softmax"], written["objectives"]["causal"]["per_row"]
    del written["init"]["allow_missing"], written["optimizer"]["warmup_fraction"]
    saved = configs.from_json(json.dumps(written)).unlock()
    assert configs.differences(saved, config) == []
    later = configs.resolve(configs.load(GPT, {"model.positions_in_softmax": 8}))
    assert configs.differences(saved, later) == ["model.positions_in_softmax: 0 -> 8"]
    del saved.objectives["causal"]
    assert "objectives.causal.coefficient: '(no such key)' -> 1.0" in configs.differences(saved, config)


def test_what_a_resumed_run_may_change():
    fixed = {"total_steps": 500, "batch_size": 16}
    saved = configs.resolve(configs.load(GPT, fixed))

    def changes(same_data=False, **overrides):
        overrides = fixed | {key.replace("__", "."): value for key, value in overrides.items()}
        return configs.differences(saved, configs.resolve(configs.load(GPT, overrides)), same_data=same_data)

    assert changes(mesh__fsdp="2", microbatches="2", checkpoint__every_steps="7", checkpoint__keep_at="(3,)") == []
    assert changes(eval__every_steps="3", log__wandb="x", data__workers="2") == []
    assert changes(total_steps="600") == ["optimizer.schedule_steps: 500 -> 600", "total_steps: 500 -> 600"]
    assert changes(data__source="text:x") == ["data.source: 'pydocs' -> 'text:x'"]
    assert changes(data__source="text:x", same_data=True) == []
    assert changes(remat="blocks", seed="4", batch_size="32") == [
        "batch_size: 16 -> 32",
        "remat: 'none' -> 'blocks'",
        "seed: 0 -> 4",
        "seeds.data: 0 -> 4",
        "seeds.init: 0 -> 4",
    ]
    other = configs.resolve(configs.load(BERT, {"batch_size": 32}))
    assert any(
        line.startswith("objectives.masked.rate: '(no such key)' -> 0.15") for line in configs.differences(saved, other)
    )
    with pytest.raises(
        UserError, match=r"DIR was trained with another config: batch_size: 16 -> 32; .*another --workdir"
    ):
        configs.refuse_differences(saved, other, "DIR")


def test_something_of_the_users_own(tmp_path):
    """Model, objective, layout and optimizer from outside bring settings of their own, which stay typed."""
    file = tmp_path / "mine.py"
    file.write_text(
        textwrap.dedent(
            """
            from ml_collections import ConfigDict
            from experiments import gpt

            def get_config(arguments=""):
                config = gpt.get_config("tiny")
                with config.unlocked():
                    config.model = ConfigDict({"name": "mine:Model", "size": 3})
                    config.objectives = ConfigDict({"toy": {"name": "mine:Toy", "coefficient": 2.0, "power": 2}})
                    config.data.layout = "mine:layout"
                    config.data.own.stride = 4
                    config.optimizer.name = "mine:sign"
                    config.optimizer.beta = 0.5
                return config
            """
        )
    )
    config = configs.load(str(file), {"objectives.toy.power": "3", "model.size": "5", "data.own.stride": "8"})
    assert (config.objectives.toy.power, config.model.size, config.data.own.stride) == (3, 5, 8)
    with pytest.raises(UserError, match=r"optimizer\.beta='fast' must be a number"):
        configs.load(str(file), {"optimizer.beta": "fast"})
    with pytest.raises(UserError, match=r"objectives\.toy\.coefficient=-1 must be"):
        configs.load(str(file), {"objectives.toy.coefficient": "-1"})
    with pytest.raises(UserError, match=r"config\.model\.sise does not exist; did you mean 'model\.size'"):
        configs.load(str(file), {"model.sise": "5"})
    file.write_text("def get_config(arguments='')\n  pass")
    with pytest.raises(UserError, match="not valid Python"):
        configs.load(str(file))


def test_a_file_cannot_bring_unknown_keys(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from experiments import gpt\n"
        "def get_config(arguments=''):\n"
        "    config = gpt.get_config('tiny').unlock()\n"
        "    config.optimizer.momentum = 0.9\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match=r"config\.optimizer\.momentum does not exist"):
        configs.load(str(file))


def test_arguments():
    def read(text):
        given = configs.arguments(text, size=("a", "b"), n=configs.Number(3, 1, 9), on=(1, 2))
        return given.size, given.n, given.on

    assert read("") == ("a", 3, 1)
    assert read("b,n=5,on=2") == read("on=2,n=5,size=b") == ("b", 5, 2)
    for text, message in {"n=5,b": "'b' is unknown", "a,n=10": "from 1 to 9", "a,n=x": "n='x' must be a whole"}.items():
        with pytest.raises(UserError, match=message):
            read(text)


def test_flags():
    def parse(*arguments):
        values = flags.FlagValues()
        defined = configs.define_flags(list(arguments), values)
        values(["program", *arguments])
        return defined

    defined = parse(f"--config={GPT}", "--config.seed=3", "--config.optimizer.decay=(('a=b', 1.0),)", "--config.seed=4")
    assert defined.overrides == {"seed": "4", "optimizer.decay": "(('a=b', 1.0),)"}
    config = defined.load()
    assert (config.seed, config.optimizer.decay) == (4, (("a=b", 1.0),))
    assert parse(f"--config={GPT}", "--config.seed", "5").load().seed == 5


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config.sead=1"], "error: config.sead does not exist; did you mean 'seed'?"),
        (["--config.seed=one"], "error: seed='one' must be a whole number of at least 0"),
        (
            ["config.seed=1"],
            "error: unexpected argument 'config.seed=1': values are given as flags, for example --config.seed=1",
        ),
        (["--confg.seed=1"], "error: Unknown command line flag 'confg.seed'"),
    ],
)
def test_commands_print_one_line_and_leave_with_2(arguments, line, tmp_path):
    program = (
        "from plm import command\nfrom plm.training import config\nFLAGS = config.define_flags()\n"
        "command.run(lambda: print(FLAGS.load().seed), required=('config',))"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    command = [sys.executable, str(script), f"--config={GPT}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().split(". Did you mean")[0] == line


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        (
            "epath.Path('gs://bucket/run').exists()",
            2,
            "error: Please install gcsfs to access Google Storage (gs:// needs `pip install -c constraints.txt gcsfs`)",
        ),
        ("importlib.import_module('missing_module')", 1, "ModuleNotFoundError: No module named 'missing_module'"),
    ],
)
def test_a_bucket_without_what_reads_it_is_one_line(body, code, last, tmp_path):
    """... and a module that is missing otherwise is a bug of ours, with its traceback."""
    script = tmp_path / "program.py"
    imports = "import importlib\nimport sys\nfrom etils import epath\nfrom plm import command\n"
    script.write_text(f"{imports}sys.modules['gcsfs'] = None\ncommand.run(lambda: {body})\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    *before, line = done.stderr.strip().splitlines()
    assert (done.returncode, line, bool(before)) == (code, last, code == 1)


def test_every_pairing_of_architecture_and_objective_is_allowed_or_explained():
    """A model trains with an objective in the directions that fit; the other pairings say why not."""
    for architecture, (objective, fitting) in itertools.product(
        ("transformer", "lstm"), configs.OBJECTIVE_DIRECTIONS.items()
    ):
        for direction in configs.DIRECTIONS:
            config = configs.load(BERT).copy_and_resolve_references().unlock()
            width = {"lstm.projection": 64 if direction == "full" else 128} if architecture == "lstm" else {}
            configs.set_model(config, {"architecture": architecture, "direction": direction, **width})
            config.objectives = configs.ConfigDict()
            configs.add_objective(config, objective)
            if objective in configs.TASK_OBJECTIVES:
                configs.set_task(config, {"name": "sst2"})
                config.data.layout = "task"
            if direction in fitting:
                configs.validate(config)
            else:
                with pytest.raises(UserError, match=f"objectives.{objective} needs model.direction"):
                    configs.validate(config)
