"""The likeliest pieces for each [MASK] of a text, with their probabilities.

    python -m plm.fill_mask --model=SRC --text='The [MASK] of France is [MASK].' [--top_k=5]

SRC: a run's workdir, with @STEP for another checkpoint than the newest, a converted or a foreign folder. Several masks
are filled independently of each other.
"""

import json

from absl import flags

from plm import command, host


def main() -> None:
    values = flags.FLAGS
    host.keep_memory()
    host.keep_programs()
    from plm.inference.model import load  # imports JAX: --help and bad flags answer at once

    for number, guesses in enumerate(load(values.model).fill_mask(values.text, values.top_k), 1):
        if values.json:
            print(json.dumps({"mask": number, "guesses": guesses}, ensure_ascii=False))
        else:
            print(f"mask {number}:  " + "  ".join(f"{piece.strip() or piece!r} {p:.1%}" for piece, p in guesses))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "a workdir[@STEP], a converted or a foreign folder")
    flags.DEFINE_string("text", None, "a text with [MASK] where a piece is to be filled in")
    flags.DEFINE_integer("top_k", 5, "how many pieces for each mask")
    flags.DEFINE_bool("json", False, "a JSON object a line: mask, guesses")
    command.run(main, required=("model", "text"))
