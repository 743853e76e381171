"""Two Transformers that read in opposite directions, side by side, against one that sees both sides in every layer:
what BERT's section 5.1 argues for without measuring it.

    python -m launch.sweep --config=experiments/ablations/between_towers.py:tiny --root=runs/towers
    python -m plm.report runs/towers

| budget | points | hardware, time | expected |
| --- | --- | --- | --- |
| tiny | 15 pretraining, 90 on tasks | 2 CPU cores, 45 minutes | docs/ablations.md |
| small | 15 pretraining, 270 on tasks | one accelerator, two hours | not measured yet |

The towers share the masked model's number of parameters, or each of them has it. Frozen with a linear output, and
tuned; the best epoch on dev each time.
"""

from experiments.ablations.common import BEST_EPOCH, FULL, Maker, Quantity
from plm.reporting.studies import difference

QUANTITIES = (
    Quantity("single", "SST-2", "single", paper="sst2", small="sst2"),
    Quantity("tagging", "tags", "tagging", paper="ud_ewt", small="ud_ewt"),
    Quantity("span", "spans", "span", paper="squad", small="squad"),
)
ROUTES = (("probe", "frozen, linear"), ("full", "tuned"))
ROWS = {
    "masked": ("masked", "transformer-masked", "architecture=transformer,objective=masked"),
    "towers": ("two towers, as many parameters", "transformer-bidirectional",
               "architecture=transformer,objective=bidirectional"),
    "double": ("two towers, each as many", "transformer-bidirectional-double",
               "architecture=transformer,objective=bidirectional,budget=tower"),
}  # fmt: skip


def sweep(add, arguments: str = ""):
    make = Maker(
        add,
        arguments,
        name="between_towers",
        title="Two towers against both sides in every layer",
        source="Devlin et al. 2019, section 5.1, argued there",
        rows=[(row, label) for row, (label, _, _) in ROWS.items()],
        quantities=QUANTITIES,
    )
    make.study.columns, by_way = [], {way: [] for way, _ in ROUTES}
    size = "tiny" if make.budget == "tiny" else "small"
    models = {
        row: make.pretrain(name, "", arguments, file="experiments/compare.py", size=size)
        for row, (_, name, arguments) in ROWS.items()
    }
    for on in make.on_tasks:
        for way, label in ROUTES:
            column = make.copy_column(on.column, f"{on.column.name}_{way}", f"{on.column.label}: {label}", {})
            by_way[way].append(column)
            for row, model in models.items():
                rates = FULL["masked" if row == "masked" else "bidirectional"] if way == "full" else ""
                options = {"arguments": BEST_EPOCH, "column": column.name, "tuned": rates}
                make.finetune(row, on, model, way, on.aligned, name=f"{row}-{column.name}", **options)
    for way, label in ROUTES:
        for towers in ("towers", "double"):
            terms = difference("masked", towers, *by_way[way])
            make.claim("X2", f"masked is better than {ROWS[towers][0]}: {label}", terms)
    return make.study
