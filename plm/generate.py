"""Continues texts with a model that reads forward.

    python -m plm.generate --model=SRC --prompt='The capital of' [--tokens=40 --temperature=0.8 --top_p=0.9 --seed=0]

SRC: a run's workdir, with @STEP for another checkpoint than the newest, a converted or a foreign folder. Prints each
prompt with its continuation, or with --json a JSON object a line.
"""

import json

from absl import flags

from plm import command, host
from plm.errors import UserError


def read_prompts(values) -> list[str]:
    """The prompts of --prompt, or of --prompts: a file with one a line."""
    if (values.prompt is None) == (values.prompts is None):
        raise UserError("give either --prompt, a text, or --prompts, a file with a prompt a line")
    if values.prompt is not None:
        return [values.prompt]
    from plm.inference import lines

    lines.check(values.prompts)
    return [line.text for line in lines.read(values.prompts) if line.text]


def main() -> None:
    values = flags.FLAGS
    prompts = read_prompts(values)
    host.keep_memory()
    host.keep_programs()
    from plm.inference.model import load  # imports JAX: --help and bad flags answer at once

    texts = load(values.model).generate(
        prompts,
        values.tokens,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
        stop=values.stop,
    )
    for prompt, text in zip(prompts, texts, strict=True):
        print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) if values.json else prompt + text)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "a workdir[@STEP], a converted or a foreign folder")
    flags.DEFINE_string("prompt", None, "the text to continue")
    flags.DEFINE_string("prompts", None, "a file of prompts, one a line; plain, .gz, .xz")
    flags.DEFINE_integer("tokens", 40, "pieces to write at most")
    flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest piece; 1 draws from the model's probabilities")
    flags.DEFINE_integer("top_k", 0, "draw among the likeliest k pieces only; 0: all")
    flags.DEFINE_float("top_p", 1.0, "draw among the likeliest pieces that have this probability together")
    flags.DEFINE_integer("seed", 0, "the same seed writes the same text")
    flags.DEFINE_multi_string("stop", [], "a text ends before this string; may be given several times")
    flags.DEFINE_bool("json", False, "a JSON object a line: prompt, text")
    command.run(main, required=("model",))
