"""Pretrains, pretrains further, or fine-tunes; run again to resume.

    python -m plm.train --config=experiments/gpt.py:tiny --workdir=runs/gpt [--config.KEY=VALUE ...]

On a TPU pod slice or under Slurm the processes find each other; elsewhere start the same command once a process with
--coordinator_address=HOST:PORT --num_processes=N --process_id=I.
"""

import os

from absl import flags

from plm import command, host
from plm.errors import UserError
from plm.training import config as configs


def join_processes(address: str, count: int, index: int) -> None:
    """Makes this process one of the run's: by the flags if they are given, else as Slurm or the TPU runtime say."""
    import jax

    given = (bool(address), count > 0, index >= 0)
    if any(given) and not all(given):
        raise UserError("--coordinator_address, --num_processes and --process_id belong together: give all three")
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    pod = len([host for host in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]) > 1
    if all(given) and index >= count:
        raise UserError(f"--process_id={index} must be below --num_processes={count}")
    if all(given) and count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, index)
    elif slurm or pod:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize()


def main(config_flags: configs.ConfigFlags) -> None:
    host.keep_memory()
    config = config_flags.load()
    values = flags.FLAGS
    join_processes(values.coordinator_address, values.num_processes, values.process_id)
    host.keep_programs()
    from plm.training.loop import train

    train(config, values.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of the run: config, metrics, checkpoints, tokenizer; local or gs://")
    flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0")
    flags.DEFINE_integer("num_processes", 0, "processes of the run")
    flags.DEFINE_integer("process_id", -1, "which of them this is, from 0")
    given = configs.define_flags()
    command.run(lambda: main(given), required=("config", "workdir"))
