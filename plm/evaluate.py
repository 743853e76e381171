"""Evaluates checkpoints: n-grams, samples, senses, minimal pairs, probes, zero-shot; rows in a results.jsonl.

    python -m plm.evaluate --model=SRC[@STEP] [--suite=ngrams,samples,pseudo_words,perplexity] [--again]
    python -m plm.evaluate --model=SRC[@STEP] --suite=overlap --task=sst2,files=DIR [--task=...]
    python -m plm.evaluate --model=SRC[@STEP|@all] --suite=minimal_pairs [--pairs=FILE.jsonl or DIR]
    python -m plm.evaluate --model=RUN --suite=pair_ngrams [--pairs=...]       # these pairs by counts of the run's text
    python -m plm.evaluate --model=SRC[@STEP|@all] --suite=zero_shot,probes --task=sst2,files=DIR [--task=...]
    python -m plm.evaluate --model=SRC[@STEP|@all] --suite=word_sense --wsd=DIR
    python -m plm.evaluate --model=RUN[@STEP] --suite=text --text=SOURCE              # perplexity on any text
    python -m plm.evaluate --model=RUN --suite=task                  # a fine-tuned run on its own task

A suite that is there already for that step and settings is passed over. SRC is the workdir of a run; of minimal_pairs,
zero_shot, probes and word_sense also a converted or a foreign folder. @all: every kept checkpoint of the run, @best:
that of its best evaluation (checkpoint.keep_best). A task is NAME[,files=DIR or tfds:NAME], or
custom,kind=...,files=...,text=...,label=... (`plm.data.tasks`). docs/analysis.md says what each suite measures.
"""

import sys

from absl import flags

from plm import command, host
from plm.errors import UserError

DEFAULT = "ngrams,samples,pseudo_words"


def define_flags(suite: str) -> None:
    """What to measure, and on what. suite: the default of --suite."""
    flags.DEFINE_string(
        "suite",
        suite,
        "measured in this order: ngrams, samples, pseudo_words, perplexity, text, overlap, minimal_pairs, pair_ngrams,"
        " zero_shot, probes, word_sense, task",
    )
    flags.DEFINE_multi_string("task", [], "NAME[,key=value...], for suites of tasks; may be given several times")
    flags.DEFINE_multi_string(
        "pairs", [], "minimal pairs in BLiMP's JSONL format: files or folders; by default made ones"
    )
    flags.DEFINE_string("text", "", "a corpus for the suite text, as data.source is given")
    flags.DEFINE_string("wsd", "", "a folder with semcor.data.xml, test sets beside it and WordNet's index.sense")


def names(values: flags.FlagValues) -> list[str]:
    """The suites of --suite."""
    return [name.strip() for name in values.suite.split(",") if name.strip()]


def measure(model: str, values: flags.FlagValues, *, output: str = "", again: bool = False) -> None:
    """Runs the suites that the flags name. model: SRC[@STEP|@all]; output: where results go, by default the run."""
    from plm.analysis import suites  # imports JAX: --help and bad flags answer at once
    from plm.data import tasks

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    options = {"pairs": values.pairs, "wsd": values.wsd, "text": values.text, "output": output}
    options["tasks"] = [tasks.load(spec) for spec in values.task]
    if model.endswith("@all"):
        suites.every_step(model, names(values), again=again, say=say, **options)
    else:
        suites.evaluate(suites.Run(model, **options), names(values), again=again, say=say, show=print)


def main() -> None:
    values = flags.FLAGS
    if not names(values):
        raise UserError(f"--suite={values.suite!r} names no suite: for example {DEFAULT}")
    host.keep_memory()
    host.keep_programs()
    measure(values.model, values, output=values.output, again=values.again)


if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "the model, with @STEP or @best for another checkpoint than the newest, @all for all of them"
    )
    define_flags(DEFAULT)
    flags.DEFINE_string("output", "", "where results go; by default the run itself")
    flags.DEFINE_bool("again", False, "measures again what is there already")
    command.run(main, required=("model",))
