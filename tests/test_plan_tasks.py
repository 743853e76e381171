"""Fine-tuning is planned without its task's files, for every kind of task."""

import pytest
from fixtures.children import ROOT, RUNS

from plm.planning import plans, topologies
from plm.training import config as configs


@pytest.mark.parametrize(
    ("task", "kind"),
    [("sst2", "pairs"), ("mrpc", "blocks"), ("swag", "blocks"), ("conll2003", "lanes"), ("squad_v2", "pairs"),
     ("stsb", "lanes"), ("wic", "pairs"), ("wic", "lanes")],
)  # fmt: skip
def test_every_kind_of_task_has_a_plan(task, kind):
    source = configs.load(f"{RUNS}:{kind}", complete=False)
    config = configs.read_file(str(ROOT / "experiments/finetune.py")).get_config(task, source)
    plan = plans.make_plan(configs.validate(config, complete=False).lock(), topologies.describe("gpu:1"))
    assert plan.memory.peak > plan.memory.parameters > 0
    assert plan.flops > 0
