"""Every experiment builds, is locked, matches its golden text, and has the parameters that papers and budgets say.

Golden texts are the unresolved configs and sweeps, in tests/golden. After a change that is meant, write them anew and
read the difference:

    PLM_WRITE_GOLDEN=1 python -m pytest tests/test_experiments.py -k golden && git diff tests/golden
"""

import inspect
import itertools
import os
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from etils import epath

from experiments import bert, compare, elmo, finetune, gpt, transfer
from launch import sweep
from plm.data.tasks import TASKS
from plm.errors import UserError
from plm.models.graph import build
from plm.training import config as configs

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"

CELLS = [f"architecture={a},objective={o}" for a, o in itertools.product(("transformer", "lstm"), compare.DIRECTIONS)]
PRESETS = {
    "elmo": ["tiny", "laptop", "small", "medium", "original"],
    "gpt": [
        "tiny",
        "laptop",
        "small",
        "base",
        *(f"{size},body={body}" for size in ("tiny", "base") for body in ("lstm", "matched")),
    ],
    "bert": [
        *bert.SIZES,
        *(f"{size},phase=2" for size in bert.SIZES if size not in bert.ON_CPU),
        *(f"base,pretraining={pretraining}" for pretraining in ("masked", "left_to_right")),
    ],
    "compare": [
        *(f"{size},{cell}" for size in compare.BUDGETS for cell in CELLS),
        *(f"tiny,{cell},input=characters" for cell in CELLS),
        *(f"{size},architecture=lstm,objective=bidirectional,input=characters" for size in ("laptop", "small")),
        *(f"{size},{cell},budget=tower" for size in compare.BUDGETS for cell in CELLS if "bidirectional" in cell),
        "tiny,architecture=lstm,objective=causal,state=fresh",
        *(f"tiny,arm=native,model={model}" for model in ("elmo", "gpt", "bert")),
    ],
}
SPECS = [f"{name}.py:{arguments}" for name, presets in PRESETS.items() for arguments in presets]
SWEEPS = [
    *(f"compare.py:{size}{cells}" for size in compare.BUDGETS for cells in ("", ",cells=all")),
    "compare.py:tiny,arm=native",
    "finetune.py:rte",
    "finetune.py:rte,way=probe",
]
# What fine-tuning makes of a model depends on how that reads: (arguments, the model that init.from would name).
FINETUNE = [
    *((task, "gpt.py:base") for task in ("sst2", "mrpc", "swag", "squad_v2", "sst2,layer_decay=80", "rte,reset_top=3")),
    *((task, "bert.py:base") for task in ("sst2", "stsb", "swag", "conll2003", "squad_v2", "wic", "custom,kind=pair")),
    ("sst2,way=bert", "gpt.py:base"),
    *((task, "elmo.py:original") for task in ("sst2", "mnli", "conll2003", "squad_v2", "wic", "rte,way=full")),
    *((f"conll2003,way={way}", "bert.py:base") for way in ("full", "features", "probe", "static")),
    *((f"mnli,way={way}", "bert.py:base") for way in ("full", "features", "probe", "static")),
]


def load(spec: str, **overrides):
    return configs.load(f"{REPOSITORY / 'experiments'}/{spec}", overrides, complete=False)


def file_of(spec: str) -> str:
    return re.sub(r"\.py:|,", "-", spec) + ".txt"


def check(path: Path, text: str) -> None:
    if os.environ.get("PLM_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} differs: see this file's docstring"


@pytest.mark.parametrize("spec", SPECS)
def test_golden_config(spec):
    config = load(spec)
    assert config.is_locked
    check(GOLDEN / file_of(spec), configs.to_text(config))
    assert configs.to_text(configs.from_json(configs.to_json(config))) == configs.to_text(config)


@pytest.mark.parametrize("spec", SWEEPS)
def test_golden_sweep(spec, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    points, _ = sweep.read_points(f"experiments/{spec}", epath.Path("runs/here"))
    sweep.validate(points, complete=False)
    check(GOLDEN / f"sweep-{file_of(spec)}", "".join(point.text() + "\n" for point in points))


def finetune_file(arguments: str, source: str) -> str:
    return f"finetune-{arguments.replace(',', '-')}-of-{source.partition('.')[0]}.txt"


@pytest.mark.parametrize(("arguments", "source"), FINETUNE)
def test_golden_finetuning(arguments, source):
    config = configs.validate(finetune.get_config(arguments, load(source)), complete=False).lock()
    check(GOLDEN / finetune_file(arguments, source), configs.to_text(config))
    graph = build(settled(config), config.data.tokenizer.vocab, tuple(config.objectives), jnp.float32)
    assert any(path.startswith("heads/") for path in graph.paths)
    for pattern in (*config.optimizer.freeze, *filter(None, (config.init.reset,))):
        assert any(re.search(pattern, name) for p in graph.parameters for name in p.logical_names), pattern


def settled(config):
    kind = TASKS[config.data.task.name].kind if config.data.task.name != "custom" else config.data.task.kind
    return configs.settle(config, task=config.data.task.name, kind=kind, classes=3, vectors=0)


def test_golden_has_nothing_else():
    expected = {file_of(spec) for spec in SPECS} | {f"sweep-{file_of(spec)}" for spec in SWEEPS}
    expected |= {finetune_file(*one) for one in FINETUNE}
    assert {path.name for path in GOLDEN.glob("*.txt")} == expected


def test_every_experiment_file_is_covered_and_says_its_command():
    files = {path.stem for path in (REPOSITORY / "experiments").glob("*.py")} - {"__init__", "common"}
    assert files == {*PRESETS, "finetune", "transfer"}
    for module in (elmo, gpt, bert, compare, finetune, transfer):
        documentation = inspect.getdoc(module)
        command = "python -m launch.sweep" if module is transfer else "python -m plm.train"
        for word in (command, "hardware", "expected"):
            assert word in documentation, (module.__name__, word)
    assert configs.to_text(load("gpt.py:gpt")) == configs.to_text(load("gpt.py:base"))


# -- parameters --------------------------------------------------------------------------------------------------------


def counts(config) -> dict[str, int]:
    graph = build(config, config.data.tokenizer.vocab, tuple(config.objectives), jnp.float32)
    return {**graph.counts(), **{parameter.path: parameter.count for parameter in graph.parameters}}


def part(counted: dict[str, int], *prefixes: str) -> int:
    return sum(count for path, count in counted.items() if "/" in path and path.startswith(prefixes))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("bert.py:base", 110_106_428),
        ("bert.py:large", 336_226_108),
        ("gpt.py:base", 116_534_784),
        ("elmo.py:original", 500_651_471),
    ],
)
def test_parameters_in_training_as_the_papers_have_them(spec, expected):
    assert counts(load(spec))["total"] == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("mini", 11_170_560),
        ("small", 28_763_648),
        ("medium", 41_373_184),
        ("base", 109_482_240),
        ("large", 335_141_888),
    ],
)
def test_bert_encoder_and_pooler(size, expected):
    counted = counts(load(f"bert.py:{size}"))
    assert counted["body"] + counted["embedding"] + part(counted, "heads/next_sentence/pooler") == expected


@pytest.mark.parametrize(
    ("size", "expected"), [("small", 13_593_296), ("medium", 28_027_728), ("original", 93_600_848)]
)
def test_elmo_without_softmax(size, expected):
    counted = counts(load(f"elmo.py:{size}"))
    assert counted["body"] + counted["embedding"] == expected


@pytest.mark.parametrize("size", compare.BUDGETS)
@pytest.mark.parametrize("input", ["tokens", "characters"])
def test_bodies_of_the_comparison_agree_within_two_percent(size, input):
    budget = compare.BUDGETS[size]
    # papers' formula of a Transformer layer with a four times wider MLP
    dense = lambda i, o: i * o + o  # noqa: E731
    W = budget.width
    formula = 4 * dense(W, W) + dense(W, 4 * W) + dense(4 * W, W) + 2 * 2 * W
    assert budget.body == budget.transformer_layers * formula
    embeddings = set()
    for cell in CELLS:
        counted = counts(load(f"compare.py:{size},{cell},input={input}"))
        assert counted["body"] == pytest.approx(budget.body, rel=0.02), cell
        embeddings.add((part(counted, "embedding/tokens"), part(counted, "embedding/characters"), counted["heads"]))
        if "bidirectional" in cell:
            assert part(counted, "backward_blocks/") == part(counted, "blocks/")
            towers = counts(load(f"compare.py:{size},{cell},input={input},budget=tower"))
            assert towers["body"] == pytest.approx(2 * budget.body, rel=0.02), cell
    ((table, characters, head),) = embeddings
    assert table == budget.vocab * W, "one table, tied"
    assert head == budget.vocab, "the head adds a bias and nothing else"
    assert bool(characters) == (input == "characters")


def test_cells_differ_in_nothing_but_architecture_and_objective():
    """What two cells do not share is the model's shape, its objective, its learning rate and where state is carried."""
    first, *others = [configs.flatten(load(f"compare.py:tiny,{cell}")) for cell in CELLS]
    may = re.compile(
        r"model\.(architecture|direction|layers|mlp_width|heads|max_positions|positions_in_softmax|attention_dropout"
        r"|lstm\..*)"
    )
    for other in others:
        differing = {key for key in {**first, **other} if first.get(key) != other.get(key)}
        rest = {key for key in differing if not may.fullmatch(key) and not key.startswith("objectives.")}
        assert rest <= {"data.layout", "optimizer.peak_lr"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tiny,architecture=lstn", r"'lstn' must be transformer\|lstm; did you mean 'lstm'"),
        ("tiny,archtecture=lstm", r"'archtecture=lstm' is unknown; did you mean 'architecture'"),
        ("tiny,lstm", r"'lstm' is unknown"),
        ("tiny,cells=all", r"names a sweep"),
        ("tiny,arm=native", r"needs model=elmo\|gpt\|bert"),
        ("tiny,arm=native,model=gpt,objective=masked", r"'objective' belongs to arm=controlled"),
        ("tiny,model=gpt", r"belongs to arm=native"),
        ("tiny,budget=tower", r"for objective=bidirectional"),
        ("tiny,state=fresh", r"the others carry nothing"),
        ("tiny,size=small", r"'size' is given twice"),
    ],
)
def test_arguments_of_the_comparison_are_strict(arguments, message):
    with pytest.raises(UserError, match=message):
        load(f"compare.py:{arguments}")


def test_a_sweep_refuses_the_arguments_of_one_point():
    with pytest.raises(UserError, match="'objective' names one point"):
        sweep.read_points(f"{REPOSITORY}/experiments/compare.py:tiny,objective=causal", epath.Path("runs/here"))


def test_a_sweep_gives_budget_and_state_to_the_points_that_have_them(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    arguments = "tiny,cells=all,budget=tower,state=fresh"
    points, _ = sweep.read_points(f"experiments/compare.py:{arguments}", epath.Path("runs/here"))
    sweep.validate(points)
    given = {point.name: point.spec.partition("objective=")[2].split(",")[1:] for point in points}
    assert {name: more for name, more in given.items() if more} == {
        "transformer-bidirectional": ["budget=tower"],
        "lstm-causal": ["state=fresh"],
        "lstm-bidirectional": ["budget=tower", "state=fresh"],
    }
    points, _ = sweep.read_points("experiments/compare.py:tiny,state=fresh", epath.Path("runs/here"))
    assert [point.name for point in points if "state=fresh" in point.spec] == ["elmo"]


def test_bert_phases_are_one_schedule():
    first, second = (configs.resolve(load(f"bert.py:base,phase={phase}")) for phase in (1, 2))
    assert (first.total_steps, second.total_steps) == (900_000, 1_000_000)
    assert first.optimizer.schedule_steps == second.optimizer.schedule_steps == 1_000_000
    with pytest.raises(UserError, match=r"give init\.from as well"):
        configs.load(f"{REPOSITORY}/experiments/bert.py:base,phase=2", {"data.source": "pydocs"})
