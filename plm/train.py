"""Pretrains, pretrains further, or fine-tunes; run again to resume.

python -m plm.train --config=experiments/gpt.py:tiny --workdir=runs/gpt [--config.KEY=VALUE ...]
"""

from absl import flags

from plm import command
from plm.training import config as configs


def main(config_flags: configs.ConfigFlags) -> None:
    config = config_flags.load()
    from plm.training.loop import train

    train(config, flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of the run: config, metrics, checkpoints, tokenizer")
    given = configs.define_flags()
    command.run(lambda: main(given), required=("config", "workdir"))
