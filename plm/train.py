"""Pretrains, pretrains further, or fine-tunes; run again to resume.

    python -m plm.train --config=experiments/gpt.py:tiny --workdir=runs/gpt [--config.KEY=VALUE ...]
    python -m plm.train --config=experiments/finetune.py:sst2 ... --suite=task      # and measures it (plm.evaluate)

On a TPU slice or under Slurm the processes find each other; elsewhere start the same command once a process with
--coordinator_address=HOST:PORT --num_processes=N --process_id=I.

SIGTERM or SIGUSR1 ends the step, saves it and leaves with exit code 75; a second one leaves at once.
"""

import os
import subprocess
import sys

from absl import flags

from plm import command, evaluate, host, processes
from plm.training import config as configs


def main(config_flags: configs.ConfigFlags) -> int:
    host.keep_memory()
    config = config_flags.load()
    values = flags.FLAGS
    with processes.joined(values) as index:
        host.keep_programs()
        from plm.training.loop import train

        train(config, values.workdir)
    if not evaluate.names(values) or index:
        return 0
    model = f"{values.workdir}@best" if config.checkpoint.keep_best else values.workdir
    if index is None:
        evaluate.measure(model, values)
        return 0
    # The accelerators are the processes' together; what is measured afterwards is one process's work, on the host.
    given = [f"--{name}={value}" for name in ("task", "pairs") for value in values[name].value]
    measured = [f"--model={model}", f"--suite={values.suite}", f"--wsd={values.wsd}"]
    measured += [f"--text={values.text}", *given]
    command_line = [sys.executable, "-m", "plm.evaluate", *measured]
    return subprocess.run(command_line, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False).returncode


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of the run: config, metrics, checkpoints, tokenizer; local or gs://")
    processes.define_flags()
    evaluate.define_flags("")
    given = configs.define_flags()
    command.run(lambda: main(given), required=("config", "workdir"))
