"""ELMo: a forward and a backward LSTM language model over characters (Peters et al. 2018, section 3).

    python -m plm.train --config=experiments/elmo.py:tiny --workdir=runs/elmo
    python -m plm.train --config=experiments/elmo.py:original --workdir=DIR

| preset | cells / output | highways | parameters without softmax | hardware, time | expected |
| --- | --- | --- | --- | --- | --- |
| tiny | 256 / 128 | 1 | 1.3M | 2 CPU cores, minutes | past the bigram, each direction, on the embedded corpus |
| laptop | 256 / 128 | 1 | 1.3M | 1 CPU core, 40 to 60 minutes | docs/transfer.md |
| small | 1024 / 128 | 1 | 13,593,296 | not published | not published |
| medium | 2048 / 256 | 1 | 28,027,728 | not published | not published |
| original | 4096 / 512 | 2 | 93,600,848 | 3 GTX 1080, two weeks | 39.7, mean of both directions' perplexities |

The recipe is bilm-tf's: 1B Word Benchmark, 793,471 words by falling frequency, rows that continue from batch to batch
with their LSTM states, 20 words a step, 128 rows on each of 3 devices (here one batch of 384), Adagrad 0.2 with
accumulator 1.0 and no decay, the gradient of the loss times 20, then clipped at norm 10, dropout 0.1 on the input of
each layer and on the output, sampled softmax with 8,192 negatives, 10 epochs (1,000,840 updates on the 768,648,884
words that the code assumes). Evaluation always uses the full softmax. 39.7 is the average over the benchmark's
held-out part (`plm.evaluate --suite=text --text='tfds:lm1b:test#text'`).
"""

from experiments import common
from plm.training import config as configs

FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
SIZES = {"small": (1024, 128, 1), "medium": (2048, 256, 1), "original": (4096, 512, 2)}  # cells, output, highways


def get_config(arguments: str = ""):
    """arguments: size=original|medium|small|laptop|tiny."""
    size = configs.arguments(arguments, size=("original", "medium", "small", "laptop", "tiny")).size
    cells, output, highways = SIZES.get(size, (256, 128, 1))
    config = common.configure(
        {
            "data.source": "tfds:lm1b#text",
            "data.layout": "lanes",
            "data.lanes.backward": "independent",
            "data.tokenizer.kind": "words",
            "data.tokenizer.vocab": 793_471,  # <S>, </S> and <UNK> among them
            "batch_size": 384,
            "seq_len": 20,
            "total_epochs": 10.0,
            "optimizer.name": "adagrad",
            "optimizer.peak_lr": 0.2,
            "optimizer.schedule": "constant",
            "optimizer.accumulator": 1.0,
            "optimizer.gradient_scale": 20.0,
            "optimizer.clip_norm": 10.0,
            "softmax_chunk": 512,  # the full softmax of an evaluation: 512 x 793,471 logits at once
            "checkpoint.every_steps": 5000,
            "eval.every_steps": 20000,
            "eval.batches": 200,  # of 7,680 words; the whole held-out text would cost as much as half of the updates
            "log.every_steps": 100,
        }
    )
    model = {
        "architecture": "lstm",
        "direction": "both",
        "input": "characters",
        "width": output,
        "layers": 2,
        "dropout": 0.1,
        "tied": False,
        "head_bias": True,
        "lstm.cells": cells,
        "lstm.projection": output,
        "lstm.cell_clip": 3.0,
        "lstm.projection_clip": 3.0,
        "lstm.residual": True,
        "characters.dim": 16,
        "characters.filters": FILTERS,
        "characters.highways": highways,
        "characters.activation": "relu",
    }
    samples = 8192
    if size in ("tiny", "laptop"):
        # A tiny vocabulary needs no sampling. See common.TINY for the init.
        recipe, source = (common.TINY, "pydocs") if size == "tiny" else (common.LAPTOP, "")
        configs.apply(config, {**common.on_cpu(recipe["elmo"], source), "softmax_chunk": 0})
        model |= {"characters.filters": ((1, 32), (2, 32), (3, 64), (4, 64)), "init": "fan_in", "dropout": 0.0}
        samples = 0 if size == "tiny" else 2048
        if size == "laptop":  # the softmax over all words of the held-out text takes more than a minute
            config.eval.every_steps = recipe["elmo"].total_steps // 4
    configs.set_model(config, model)
    configs.add_objective(config, "bidirectional", samples=samples)
    return config
