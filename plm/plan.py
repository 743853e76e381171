"""Before you pay: does a run fit, what does it move, what does it cost; compiled for chips that need not be there.

    python -m plm.plan --config=experiments/bert.py:large,phase=2 --topology=v5e:16x16 [--config.KEY=VALUE ...]

TPUs (v4, v5e, v5p, v6e) need their compiler, `pip install 'plm[plan]'`, and no TPU; `--topology=gpu:8` counts without
compiling. No corpus is opened: the vocabulary has the size that the config says. Exit code 1: it does not fit.
docs/plan.md reads a plan.
"""

import json
import os
import sys

from absl import flags

from plm import command
from plm.errors import UserError
from plm.training import config as configs

DOES_NOT_FIT = 1


def _numbers(name: str, values: list[str]) -> list[int]:
    try:
        numbers = [int(value) for value in values]
        if not numbers or min(numbers) < 1:
            raise ValueError
    except ValueError:
        raise UserError(f"--{name}={','.join(values)!r} must be whole numbers from 1, like 1,8") from None
    return numbers


def _say(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)


def main(config_flags: configs.ConfigFlags) -> int:
    values = flags.FLAGS
    if not 0 < values.mfu <= 1:
        raise UserError(f"--mfu={values.mfu:g} must be above 0 and at most 1: the part of the chips' peak")
    if values.price_per_chip_hour < 0:
        raise UserError(f"--price_per_chip_hour={values.price_per_chip_hour:g} must not be negative")
    if values.done_steps is not None and values.done_steps < 0:
        raise UserError(f"--done_steps={values.done_steps} must be 0 or more")
    meshes = [_numbers(name, values[name].value) for name in ("fsdp", "tensor", "microbatches")]
    config = config_flags.load(complete=False)
    # The chips are described and never opened; what is computed here is computed on the host.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from plm.planning import topologies

    topology = topologies.describe(values.topology, values.gpu)
    if topology.devices is None:
        import jax

        jax.config.update("jax_num_cpu_devices", topology.count)
    from plm.planning import plans, text

    if values.sweep:
        attempts = plans.sweep(config, topology, *meshes, say=_say)
        if values.json:
            print(json.dumps([text.attempt_to_json(a) for a in attempts], indent=1))
        else:
            print("\n".join(text.attempts_table(attempts)))
        return 0
    plan = plans.make_plan(config, topology, corpus_tokens=values.corpus_tokens, done_steps=values.done_steps, say=_say)
    costs = text.cost(plan, values.mfu, values.price_per_chip_hour)
    tried = []
    if not plan.memory.fits and values.search:
        _say("it does not fit; trying changes, the smallest first")
        tried = plans.smallest_change(config, topology, plan, say=_say)
    if values.json:
        print(json.dumps(text.to_json(plan, costs, tried), indent=1))
    else:
        print(text.to_text(plan, costs, tried), end="")
    return 0 if plan.memory.fits else DOES_NOT_FIT


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "v4|v5e|v5p|v6e:SHAPE in chips, like v5e:16x16 or v4:4x4x4; or gpu:COUNT")
    flags.DEFINE_string("gpu", "NVIDIA H100 80GB HBM3", "device kind of gpu:COUNT, as JAX calls it")
    flags.DEFINE_float("mfu", 0.4, "part of the chips' bfloat16 peak that the time and the cost assume")
    flags.DEFINE_float("price_per_chip_hour", 0.0, "what a chip costs for an hour; 0 = say nothing of money")
    flags.DEFINE_integer("corpus_tokens", 0, "tokens of the training split, for a run of epochs; 0 = unknown")
    flags.DEFINE_integer("done_steps", None, "steps of the run that init.keep=all continues, by default init.from's")
    flags.DEFINE_bool("search", True, "if it does not fit: try what would")
    flags.DEFINE_bool("json", False, "print JSON")
    flags.DEFINE_bool("sweep", False, "try all of --fsdp x --tensor x --microbatches and print a table")
    flags.DEFINE_list("fsdp", "1,8", "mesh.fsdp of the sweep")
    flags.DEFINE_list("tensor", "1,2", "mesh.tensor of the sweep")
    flags.DEFINE_list("microbatches", "1,4", "microbatches of the sweep")
    given = configs.define_flags()
    command.run(lambda: main(given), required=("config", "topology"))
