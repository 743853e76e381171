"""Contextual vectors of a text file, for every word or subword, in HDF5 or safetensors; killed, it goes on.

    python -m plm.embed --model=SRC --input=FILE --output=FILE.h5 [--layers=-4: --mix=concat --units=subwords]

FILE has a sentence a line and blank lines between documents; plain, .gz or .xz. SRC: a run's workdir, with @STEP for
another checkpoint than the newest, a converted or a foreign folder.
"""

import json
import sys

from absl import flags

from plm import command, host
from plm.errors import UserError

MIXES = ("none", "top", "sum", "mean", "concat", "scalar")


def parse_layers(text: str) -> int | str | slice | list[int]:
    """`-1`, `all`, `-4:`, `1:3` or `0,6,12`."""
    try:
        if text == "all":
            return text
        if ":" in text:
            start, stop = (int(part) if part else None for part in text.split(":"))
            return slice(start, stop)
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError:
        raise UserError(
            f"--layers={text!r}: 0 the embedding, -1 the top; several (0,6,12), a range (-4:) or all"
        ) from None


def parse_mix(values):
    """What `Model.embed` takes as `mix`; flags of ELMo's mix without it are refused."""
    extra = [name for name in ("scalar_weights", "gamma", "layer_norm") if values[name].present]
    if values.mix != "scalar":
        if extra:
            raise UserError(f"--{extra[0]} belongs to --mix=scalar, and --mix is {values.mix}")
        return "none" if values.mix == "top" else values.mix
    from plm.inference.embedding import ScalarMix

    try:
        weights = tuple(float(one) for one in values.scalar_weights.split(",")) if values.scalar_weights else None
    except ValueError:
        raise UserError(f"--scalar_weights={values.scalar_weights!r}: numbers with commas between them") from None
    return ScalarMix(weights, values.gamma, values.layer_norm)


def main() -> None:
    values = flags.FLAGS
    layers = parse_layers(values.layers)
    if values.mix == "top":
        if values["layers"].present:
            raise UserError("--mix=top is the top layer alone: leave out --layers")
        layers = -1
    elif values.mix != "none" and not values["layers"].present:
        layers = "all"
    host.keep_memory()
    host.keep_programs()
    from plm.inference import embedding, vector_file  # imports JAX: --help and bad flags answer at once
    from plm.inference.model import load

    target = vector_file.check_output(values.output)
    model = load(values.model)
    options = embedding.options(
        model,
        layers,
        values.units,
        values.pooling,
        values.specials,
        parse_mix(values),
        values.window,
        values.stride,
    )
    job = vector_file.Job(options, values.dtype, values.stateful, values.chunk)
    vector_file.write(model, job, values.input, target, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps({"output": str(target), "bytes": target.stat().st_size}))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "a workdir[@STEP], a converted or a foreign folder")
    flags.DEFINE_string("input", None, "the text: a sentence a line, blank lines between documents; plain, .gz, .xz")
    flags.DEFINE_string("output", None, "the file that is made, .h5 or .safetensors")
    flags.DEFINE_string("layers", "-1", "0 the embedding, -1 the top; several (0,6,12), a range (-4:) or all")
    flags.DEFINE_enum("mix", "none", MIXES, "of several layers (by default all) one vector; none: a dataset for each")
    flags.DEFINE_string("scalar_weights", "", "of --mix=scalar: a number for each layer, before the softmax")
    flags.DEFINE_float("gamma", 1.0, "of --mix=scalar: what the mix is multiplied by")
    flags.DEFINE_enum("layer_norm", "none", ["none", "bilm", "allennlp"], "of --mix=scalar: layers on one scale")
    flags.DEFINE_enum("units", "words", ["words", "subwords"], "what has a vector: words between spaces, or pieces")
    flags.DEFINE_enum("pooling", "mean", ["mean", "first", "last"], "of a word's pieces")
    flags.DEFINE_bool("specials", False, "also the vectors of what frames a sentence ([CLS], [SEP], <S>, </S>)")
    flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "of the vectors in the file")
    flags.DEFINE_integer("window", None, "pieces read at once; default: all positions (LSTMs: the whole line)")
    flags.DEFINE_integer("stride", None, "pieces between two windows of a longer line; default: half a window")
    flags.DEFINE_bool("stateful", False, "LSTMs: a line begins with the states in which the line before it ended")
    flags.DEFINE_integer("chunk", 0, "characters between two marks of progress; 0: by memory")
    command.run(main, required=("model", "input", "output"))
