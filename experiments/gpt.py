"""GPT: a causal Transformer language model (Radford et al. 2018, sections 3.1, 4.1).

    python -m plm.train --config=experiments/gpt.py:tiny --workdir=runs/gpt
    python -m plm.train --config=experiments/gpt.py:base --config.data.source='text:books/*.txt' --workdir=DIR

| preset | layers x width | parameters | hardware, time | expected |
| --- | --- | --- | --- | --- |
| tiny | 2 x 128 | 0.9M | 2 CPU cores, minutes | past the bigram on the embedded corpus |
| laptop | 4 x 128 | 1.4M | 1 CPU core, 50 to 80 minutes | docs/transfer.md |
| small | 8 x 384 | 17.5M | one accelerator, minutes | not measured yet |
| base (also `gpt`) | 12 x 768 | 116,534,784 | not in the paper | 18.4 per-token perplexity on BooksCorpus |

`base` is the paper's recipe: 512-token blocks of long contiguous text, 64 rows, 100 epochs, Adam with peak 2.5e-4,
2,000 updates of warm-up, cosine to 0, decoupled decay 0.01 on all weights but biases and gains, dropout 0.1
everywhere (on the embedding matrix itself, as in the released code). The paper names neither Adam's constants nor a
clip for pretraining: 0.9 / 0.999 / 1e-8 and norm 1 are those of its fine-tuning code. BooksCorpus is not distributed:
bring your own text. The 18.4 is per piece of the paper's vocabulary on an unstated split, so it compares with nothing
but itself.

`body=lstm` is the LSTM of its table 5, of which the paper says no more than "a single layer 2048 unit LSTM using the
same framework": as many cells for each unit of width, projected to the width so that all else stays the same.
`body=matched`: two LSTM layers with the Transformer's number of parameters.
"""

from experiments import common
from plm.training import config as configs


def get_config(arguments: str = ""):
    """arguments: size=base|gpt|small|laptop|tiny (`gpt` is another name of `base`), body=transformer|lstm|matched."""
    given = configs.arguments(
        arguments, size=("base", "gpt", "small", "laptop", "tiny"), body=("transformer", "lstm", "matched")
    )
    size = given.size
    config = common.configure(
        {
            "data.source": "",
            "data.layout": "blocks",
            "data.tokenizer.kind": "bpe",
            "data.tokenizer.vocab": 40478,  # <unk>, 2 x 238 characters, 40,000 merges, newline
            "data.tokenizer.lowercase": True,
            "batch_size": 64,
            "seq_len": 512,
            "total_epochs": 100.0,
            "optimizer.name": "gpt_adam",
            "optimizer.peak_lr": 2.5e-4,
            "optimizer.schedule": "cosine",
            "optimizer.warmup_steps": 2000,
            "optimizer.weight_decay": 0.01,
            "optimizer.decay": common.NO_DECAY_ON_BIAS_AND_NORM,
            "optimizer.clip_norm": 1.0,
            "softmax_chunk": 8192,
            "checkpoint.every_steps": 5000,
            "eval.every_steps": 5000,
            "eval.batches": 200,  # 6.5 million pieces
            "log.every_steps": 100,
        }
    )
    model = {
        "architecture": "transformer",
        "direction": "forward",
        "width": 768,
        "layers": 12,
        "heads": 12,
        "mlp_width": 3072,
        "max_positions": 512,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "embedding_dropout": 0.1,
        "embedding_dropout_on": "matrix",
        "activation": "gelu_tanh",
        "norm_epsilon": 1e-5,
        "init": "normal",
        "init_stddev": 0.02,
    }
    if size == "small":
        model |= {"width": 384, "layers": 8, "heads": 6, "mlp_width": 1536}
        settings = {"data.tokenizer.vocab": 8192, "batch_size": 256, "seq_len": 128, "total_steps": 9000}
        settings |= {"optimizer.peak_lr": 6e-4, "optimizer.warmup_steps": 500, "softmax_chunk": 0}
        configs.apply(config, {**settings, "checkpoint.every_steps": 2000, "eval.every_steps": 2000})
    elif size in ("tiny", "laptop"):
        # So little text read so seldom is not overfitted: no dropout. See common.TINY for the init.
        recipe, source = (common.TINY, "pydocs") if size == "tiny" else (common.LAPTOP, "")
        configs.apply(config, {**common.on_cpu(recipe["gpt"], source), "softmax_chunk": 0})
        layers = 2 if size == "tiny" else 4
        model |= {"width": 128, "layers": layers, "heads": layers, "mlp_width": 512}
        model |= {"max_positions": common.POSITIONS[size], "init": "fan_in"}
        model |= {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    if given.body != "transformer":
        model = lstm_body(model, matched=given.body == "matched")
    configs.set_model(config, model)
    configs.add_objective(config, "causal")
    return config


def lstm_body(model: dict, *, matched: bool) -> dict:
    """The settings of a Transformer's model, with an LSTM in its place."""
    width, layers = model["width"], 2 if matched else 1
    parameters = model["layers"] * common.transformer_layer(width, model["mlp_width"])
    cells = round(parameters / (layers * common.lstm_layer(width, 1, width))) if matched else round(2048 * width / 768)
    only = ("heads", "mlp_width", "max_positions", "attention_dropout")
    kept = {key: value for key, value in model.items() if key not in only}
    lstm = {"lstm.cells": cells, "lstm.projection": width, "lstm.residual": True}
    return kept | {"architecture": "lstm", "layers": layers, **lstm}
