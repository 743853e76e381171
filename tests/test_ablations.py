"""Every ablation file: its points validate at every budget, match their golden text, and share what they may share.

Golden texts are the points of one pretraining seed and what the study says of the paper, in tests/golden/ablations.
They are written anew as those of test_experiments.py are.
"""

import inspect
import re
from pathlib import Path

import pytest
from etils import epath
from test_experiments import GOLDEN, REPOSITORY, check

from experiments import transfer
from experiments.ablations import common, tuning
from launch import sweep
from plm.data.tasks import TASKS
from plm.errors import UserError
from plm.reporting.studies import Study
from plm.training import config as configs

FOLDER = REPOSITORY / "experiments" / "ablations"
FILES = sorted(path.stem for path in FOLDER.glob("*_*.py") if path.stem != "__init__")
ARGUMENTS = [(name, budget) for name in FILES for budget in common.BUDGETS]
ARGUMENTS += [("between_models", f"{budget},arm=native") for budget in common.BUDGETS]
# What another budget may change: sizes, lengths, text, and what a few minutes on a CPU need beside them.
FREE = re.compile(
    r"model\.(width|layers|heads|mlp_width|max_positions|lstm\.\w+|characters\.\w+|\w*dropout|init|init_stddev)"
    r"|data\..*|batch_size|seq_len|total_\w+|optimizer\.(peak_lr|warmup_\w+|schedule_steps)|(checkpoint|eval|log)\..*"
    r"|softmax_chunk|remat|init\.(from|keep)|objectives\.bidirectional\.samples|objectives\.masked\.max_predictions"
)


def read(name: str, arguments: str, monkeypatch, seeds: int = 1, folder: str = "ablations/") -> tuple[list, Study]:
    monkeypatch.chdir(REPOSITORY)
    overrides = {} if arguments.startswith("tiny") else {"data.source": "text:books"}
    if not overrides or name in ("elmo_state",):
        given = overrides
    else:
        given = overrides | {"data.task.files": "DATA/{task}"}
    return sweep.read_points(f"experiments/{folder}{name}.py:{arguments}", epath.Path("runs/here"), given, seeds)


def described(study: Study) -> str:
    """What the study takes from the paper and says of it, a line each."""
    lines = [f"{study.title} ({study.source})\n"]
    lines += [f"row {row.name}: {row.label}{' (control)' if row.control else ''}\n" for row in study.rows]
    lines += [f"column {c.name}: {c.label} <- {c.suite} {c.metric} {c.part} {c.step or ''}\n" for c in study.columns]
    lines += [f"paper {row}: {own}\n" for row, own in study.paper.items()]
    lines += [f"claim {c.name}: {c.text}, {c.effect}: {[(r, k, round(w, 3)) for r, k, w in c.terms]}\n"
              for c in study.claims]  # fmt: skip
    return "".join(lines)


@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS)
def test_golden_ablation(name, arguments, monkeypatch):
    points, study = read(name, arguments, monkeypatch)
    sweep.validate(points)
    record = study.record({point.name: point.workdir for point in points}, epath.Path("runs/here"))
    assert record["cells"]
    text = "".join(point.text() + "\n" for point in points) + "\n" + described(study)
    check(GOLDEN / "ablations" / f"{name}-{arguments.replace(',', '-')}.txt", text)


@pytest.mark.parametrize("budget", transfer.BUDGETS)
def test_golden_transfer(budget, monkeypatch):
    """experiments/transfer.py is a study of the same kind; its rates come from as many trials for every way."""
    points, study = read("transfer", budget, monkeypatch, folder="")
    sweep.validate(points)
    text = "".join(point.text() + "\n" for point in points) + "\n" + described(study)
    check(GOLDEN / "ablations" / f"transfer-{budget}.txt", text)
    tuning, none = read("transfer", f"{budget},stage=tuning", monkeypatch, folder="")
    assert none is None
    sweep.validate(tuning)
    trials = {way: sum(point.name.startswith(f"{way}-") for point in tuning) for way in transfer.ways(budget)}
    trials = {
        way: n - sum(trials[other] for other in trials if other.startswith(f"{way}-")) for way, n in trials.items()
    }
    assert set(trials.values()) == {{"tiny": 3 * 2 * 2, "laptop": 3, "small": 3 * 2 * 2}[budget]}  # protocol 9
    assert {point.overrides["seed"] for point in tuning} == {0, transfer.SEED}
    assert not any("seed1000" in point.name for point in points)


def test_golden_has_no_other_ablation():
    expected = {f"{name}-{arguments.replace(',', '-')}.txt" for name, arguments in ARGUMENTS}
    expected |= {f"transfer-{budget}.txt" for budget in transfer.BUDGETS}
    assert {path.name for path in (GOLDEN / "ablations").iterdir()} == expected


@pytest.mark.parametrize("budget", common.BUDGETS)
def test_what_is_shared_is_the_same_wherever_it_is_asked_for(budget, monkeypatch):
    """Otherwise the second table would be refused the first one's runs."""
    known: dict[str, tuple[str, str]] = {}
    for name, arguments in ARGUMENTS:
        if not arguments.startswith(budget):
            continue
        points, _ = read(name, arguments, monkeypatch)
        texts = sweep.validate([point for point in points if "shared" in str(point.workdir)])
        for point, text in texts.items():
            first, before = known.setdefault(point, (name, text))
            assert text == before, (point, first, name)
    assert len(known) > 20


@pytest.mark.parametrize("name", FILES)
def test_a_budget_changes_sizes_and_lengths_and_nothing_else(name, monkeypatch):
    """Of pretraining: the runs on tasks differ by the task."""
    of_arm: dict[str, dict] = {}
    for budget in common.BUDGETS:
        made = {}
        points, _ = read(name, budget, monkeypatch)
        for point in points:
            if "shared" not in str(point.workdir):
                continue
            overrides = point.overrides | ({"init.from": point.model} if point.start else {})
            made[point.name] = configs.load(point.spec, overrides, source=made.get(point.start))
            arm = re.sub(rf"^{budget}-|-seed0$|\d+x\d+x\d+", "", point.name)
            if arm.endswith("-512"):
                continue
            mine = {key: value for key, value in configs.flatten(made[point.name]).items() if not FREE.fullmatch(key)}
            before = of_arm.setdefault(arm, mine)
            assert mine == before, (arm, budget)
    assert of_arm


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_its_commands_and_hours(name, monkeypatch):
    module = configs.read_file(str(FOLDER / f"{name}.py"), needs="sweep")
    text = inspect.getdoc(module)
    for word in (f"launch.sweep --config=experiments/ablations/{name}.py:tiny", "plm.report", "| tiny |", "| small |"):
        assert word in text, word
    assert "hardware" in text
    assert "expected" in text
    # The numbers of points in its table are those that it makes.
    points, _ = read(name, "tiny", monkeypatch, seeds=0)
    said = next(line for line in text.splitlines() if line.startswith("| tiny |")).split("|")[2].strip()
    shared = sum("shared" in str(point.workdir) for point in points)
    counts = {"pretraining": shared, "on tasks": sum("finetune" in point.spec for point in points)}
    counts["measured"] = sum(not point.trains for point in points)
    counts = {"pretraining": shared, "further": len(points) - sum(counts.values())} | counts
    assert said == ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def test_at_budget_tiny_nothing_is_needed_and_every_embedded_task_is_used(monkeypatch):
    used = set()
    for name in FILES:
        points, study = read(name, "tiny", monkeypatch, seeds=0)
        used |= {point.spec.partition(":")[2].partition(",")[0] for point in points if "finetune" in point.spec}
        seeds = {cell.seed for own in study.cells.values() for cell in own}
        assert seeds == set(range(5)), "enough for a verdict"
    assert used <= set(common.EMBEDDED.values())
    assert all(not TASKS[task].layouts[0].dataset for task in used)


@pytest.mark.parametrize("budget", common.BUDGETS)
def test_tuning_tries_as_much_for_each(budget, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    given = {} if budget == "tiny" else {"data.source": "text:books"}
    points, study = sweep.read_points(f"experiments/ablations/tuning.py:{budget}", epath.Path("runs/here"), given)
    assert study is None
    sweep.validate(points)
    tried = {
        entry: sum(point.name.startswith(f"{entry}-") and "lr" in point.name for point in points)
        for entry in tuning.ENTRIES
    }
    tried = {
        entry: n - sum(tried[other] for other in tried if other.startswith(f"{entry}-")) for entry, n in tried.items()
    }
    frozen = tried.pop("frozen")
    assert (frozen, set(tried.values())) == (3 * 3 * 2 * 2, {3 * 2 * 2})
    assert all((budget, entry) in common.TUNED for entry in tuning.ENTRIES)
    assert all(point.overrides["seed"] == 1000 for point in points), "no table's seed"
    on_tasks = sum("finetune" in point.spec for point in points)
    said = {
        "tiny": f"| tiny | {len(points) - on_tasks} pretraining runs, {on_tasks} on tasks |",
        "small": f"| small | {len(points) - on_tasks}, {on_tasks} |",
        "paper": "",  # not in the table
    }
    assert said[budget] in inspect.getdoc(tuning)


def test_a_budget_that_needs_files_says_so(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match=r"reads wsd: --config\.data\.task\.files='DIR/\{task\}'"):
        sweep.read_points("experiments/ablations/elmo_word_sense.py:small", epath.Path("r"), {"data.source": "text:x"})
    with pytest.raises(UserError, match="'huge' must be tiny"):
        sweep.read_points("experiments/ablations/elmo_tasks.py:huge", epath.Path("r"))
    with pytest.raises(UserError, match=r"defines no get_config\(arguments\); python -m launch\.sweep runs it"):
        configs.load(str(Path("experiments/ablations/elmo_tasks.py")) + ":tiny")


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["small", "paper"])
def test_what_is_not_run_here_is_planned(budget, monkeypatch):
    """Every pretraining run of budget small fits one H200 and ends within its eight minutes at 40% of the peak; those
    of the papers are whole programs, whose memory and time is for a slice to say (test_golden_plans.py)."""
    from plm.planning import plans, text, topologies

    topology, planned = topologies.describe("gpu:1", "NVIDIA H200"), {}
    tokens = {"small": 15_000_000, "paper": 3_000_000_000}[budget]
    for name, arguments in ARGUMENTS:
        if arguments.partition(",")[0] != budget:
            continue
        made = {}
        points, _ = read(name, arguments, monkeypatch)
        for point in points:
            if "shared" not in str(point.workdir) or point.name in planned:
                continue
            overrides = point.overrides | ({"init.from": point.model} if point.start else {})
            made[point.name] = configs.load(point.spec, overrides, source=made.get(point.start))
            config = made[point.name].copy_and_resolve_references().unlock()
            config.init["from"] = ""
            if config.init.keep == "all":
                config.init.keep = "params"
            planned[point.name] = plan = plans.make_plan(config.lock(), topology, corpus_tokens=tokens)
            if budget == "small":
                assert plan.memory.fits, point.name
                assert text.cost(plan, 0.4, 0.0).hours < 8 / 60, point.name
            assert plan.flops > 0
    assert len(planned) > 20
