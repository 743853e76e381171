"""Pretrains, pretrains further, or fine-tunes; run again to resume.

    python -m plm.train --config=experiments/gpt.py:tiny --workdir=runs/gpt [--config.KEY=VALUE ...]

On a TPU slice or under Slurm the processes find each other; elsewhere start the same command once a process with
--coordinator_address=HOST:PORT --num_processes=N --process_id=I.

SIGTERM or SIGUSR1 ends the step, saves it and leaves with exit code 75; a second one leaves at once.
"""

from absl import flags

from plm import command, host, processes
from plm.training import config as configs


def main(config_flags: configs.ConfigFlags) -> None:
    host.keep_memory()
    config = config_flags.load()
    values = flags.FLAGS
    with processes.joined(values):
        host.keep_programs()
        from plm.training.loop import train

        train(config, values.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of the run: config, metrics, checkpoints, tokenizer; local or gs://")
    processes.define_flags()
    given = configs.define_flags()
    command.run(lambda: main(given), required=("config", "workdir"))
