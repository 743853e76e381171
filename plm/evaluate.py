"""Evaluates a checkpoint: n-grams, samples, senses, perplexity, overlap with tasks; rows in its results.jsonl.

    python -m plm.evaluate --model=SRC[@STEP] [--suite=ngrams,samples,pseudo_words,perplexity] [--again]
    python -m plm.evaluate --model=SRC[@STEP] --suite=overlap --task=sst2,files=DIR [--task=...]

A suite that is there already for that step and settings is passed over. SRC is the workdir of a run. A task is
NAME[,files=DIR or tfds:NAME], or custom,kind=...,files=...,text=...,label=... (`plm.data.tasks`).
"""

import sys

from absl import flags

from plm import command, host
from plm.errors import UserError

DEFAULT = "ngrams,samples,pseudo_words"


def main() -> None:
    values = flags.FLAGS
    names = [name.strip() for name in values.suite.split(",") if name.strip()]
    if not names:
        raise UserError(f"--suite={values.suite!r} names no suite: for example {DEFAULT}")
    host.keep_memory()
    host.keep_programs()
    from plm.analysis import suites  # imports JAX: --help and bad flags answer at once
    from plm.data import tasks

    run = suites.Run(values.model, tasks=[tasks.load(spec) for spec in values.task])
    suites.evaluate(run, names, again=values.again, say=lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "the run: its workdir, with @STEP for another checkpoint than the newest")
    flags.DEFINE_string("suite", DEFAULT, "measured in this order: ngrams, samples, pseudo_words, perplexity, overlap")
    flags.DEFINE_multi_string("task", [], "NAME[,key=value...], for suites of tasks; may be given several times")
    flags.DEFINE_bool("again", False, "measures again what is there already")
    command.run(main, required=("model",))
