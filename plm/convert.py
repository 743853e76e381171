"""Converts weights: official and Hugging Face ones in, any model here out.

    python -m plm.convert --from=SRC --to=DIR [--format=plm|huggingface|elmo|openai] [--allow_missing=REGEX]

SRC: a run's workdir, with @STEP for another checkpoint than the newest, a converted or a foreign folder. The default
format is this project's own, which every command reads; foreign folders can be given to every command directly too.
"""

import json
import sys

from absl import flags
from etils import epath

from plm import command, host
from plm.errors import UserError

WRITERS = {"huggingface": "huggingface", "elmo": "elmo_hdf5", "openai": "openai_npy"}


def empty_folder(path: str) -> epath.Path:
    """The folder that is written to; it may not hold anything yet."""
    folder = epath.Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to={path} is there already: give a folder that is new or empty")
    return folder


def main() -> None:
    values = flags.FLAGS
    folder = empty_folder(values.to)
    host.keep_memory()
    from plm.inference import model as inference  # imports JAX: bad flags answer at once

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    model = inference.load(values["from"].value, allow_missing=values.allow_missing, vocabulary=values.vocabulary)
    for line in model.report.lines() if model.report else ():
        say(line)
    if values.format == "plm":
        inference.save(model, folder)
    else:
        import importlib

        importlib.import_module(f"plm.weights.{WRITERS[values.format]}").write(model, folder)
    counts = model.graph.counts()
    print(json.dumps({"to": str(folder), "format": values.format, "parameters": counts["total"]}))


if __name__ == "__main__":
    flags.DEFINE_string("from", None, "a workdir[@STEP], a converted or a foreign folder")
    flags.DEFINE_string("to", None, "a folder that is new or empty")
    flags.DEFINE_enum("format", "plm", ["plm", *WRITERS], "what to write")
    flags.DEFINE_string("allow_missing", "", "regex of parameters that may stay at random values (an untrained head)")
    flags.DEFINE_string("vocabulary", "", "official vocabulary files, where SRC has none beside its weights")
    command.run(main, required=("from", "to"))
