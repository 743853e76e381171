"""GPT: a causal Transformer language model (Radford et al. 2018, sections 3.1, 4.1).

    python -m plm.train --config=experiments/gpt.py:tiny --workdir=runs/gpt
    python -m plm.train --config=experiments/gpt.py:base --config.data.source='text:books/*.txt' --workdir=DIR

| preset | layers x width | parameters | hardware, time | expected |
| --- | --- | --- | --- | --- |
| tiny | 2 x 128 | 0.9M | 2 CPU cores, minutes | past the bigram on the embedded corpus |
| base (also `gpt`) | 12 x 768 | 116,534,784 | not in the paper | 18.4 per-token perplexity on BooksCorpus |

`base` is the paper's recipe: 512-token blocks of long contiguous text, 64 rows, 100 epochs, Adam with peak 2.5e-4,
2,000 updates of warm-up, cosine to 0, decoupled decay 0.01 on all weights but biases and gains, dropout 0.1
everywhere (on the embedding matrix itself, as in the released code). The paper names neither Adam's constants nor a
clip for pretraining: 0.9 / 0.999 / 1e-8 and norm 1 are those of its fine-tuning code. BooksCorpus is not distributed:
bring your own text. The 18.4 is per piece of the paper's vocabulary on an unstated split, so it compares with nothing
but itself.
"""

from experiments import common
from plm.training import config as configs


def get_config(arguments: str = ""):
    """arguments: size=base|gpt|tiny; `gpt` is another name of `base`."""
    size = configs.arguments(arguments, size=("base", "gpt", "tiny")).size
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
    if size == "tiny":
        # Two minutes never overfit: no dropout. See common.TINY for the init.
        configs.apply(config, {**common.tiny(common.TINY["gpt"]), "softmax_chunk": 0})
        model |= {"width": 128, "layers": 2, "heads": 2, "mlp_width": 512, "max_positions": 128, "init": "fan_in"}
        model |= {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    configs.set_model(config, model)
    configs.add_objective(config, "causal")
    return config
