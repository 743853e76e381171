"""BERT: a masked language model and next-sentence prediction (Devlin et al. 2019, section 3.1, appendix A.2).

    python -m plm.train --config=experiments/bert.py:tiny --workdir=runs/bert
    python -m plm.train --config=experiments/bert.py:base --config.data.source='text:wiki/*.xz' --workdir=DIR
    python -m plm.train --config=experiments/bert.py:base,phase=2 --config.init.from=DIR --workdir=DIR2 ...

| preset | layers x width | encoder + pooler, uncased | hardware, time (phases 1 + 2) | expected |
| --- | --- | --- | --- | --- |
| tiny | 2 x 128 | 1.0M at its own 4,096 pieces | 2 CPU cores, minutes | 0.5 nat under the unigram, embedded corpus |
| laptop | 2 x 128 | 1.0M at its own 4,096 pieces | 1 CPU core, 45 minutes to two hours | docs/transfer.md |
| mini | 4 x 256 | 11,170,560 | not published | not published |
| small | 4 x 512 | 28,763,648 | not published | not published |
| medium | 8 x 512 | 41,373,184 | not published | not published |
| base | 12 x 768 | 109,482,240 | paper: 16 TPU chips, 4 days | masked perplexity 3.99, NSP accuracy 97-98% |
| large | 24 x 1024 | 335,141,888 | paper: 64 TPU chips, 4 days | masked perplexity 3.23 |

The recipe: 256 rows, 1,000,000 updates, the first 900,000 at length 128 (`phase=1`, the default), the rest at length
512 (`phase=2`, which continues the first run: `init.keep=all` takes over optimizer and step, so the schedule of a
million steps, the noise and the step of the data function go on; the pairs of length 512 are a plan of their own).
BERT's Adam without bias correction, peak 1e-4, 10,000 updates of warm-up, linear decay counted from step 0, decay
0.01 but on biases and LayerNorm, norm clipped at 1, dropout 0.1, 15% of the pieces, 80/10/10, at most 20 predictions
at length 128 and 77 at 512. How the authors divided schedule and warm-up between the phases is not published; one
schedule over both is our reading. The paper's corpora (BooksCorpus 800M words, English Wikipedia 2,500M) are yours to
bring, one document between blank lines. Masks are drawn anew each time; `--config.objectives.masked.static=true` with
the 10 duplicates is the released data code. `pretraining=masked` (no next-sentence prediction) and
`pretraining=left_to_right` (a causal model of the same rows) are the arms of its table 5.
"""

from experiments import common
from plm.training import config as configs

SIZES = {  # layers, width, heads; the MLP has four times the width
    "tiny": (2, 128, 2),
    "laptop": (2, 128, 2),  # four layers are no further after as many updates (docs/transfer.md)
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
ON_CPU = ("tiny", "laptop")
STEPS, PHASE_1 = 1_000_000, 900_000


def get_config(arguments: str = ""):
    """arguments: size=base|large|medium|small|mini|laptop|tiny, phase=1|2 (1: length 128, 2: length 512; not for the
    last two sizes), pretraining=both|masked|left_to_right."""
    sizes = ("base", "large", "medium", "small", "mini", "laptop", "tiny")
    given = configs.arguments(arguments, size=sizes, phase=(1, 2), pretraining=("both", "masked", "left_to_right"))
    second = given.phase == 2
    if second and given.size in ON_CPU:
        raise configs.UserError(f"config argument phase=2 is not for size={given.size}, whose one phase has length 128")
    layers, width, heads = SIZES[given.size]
    config = common.configure(
        {
            "data.source": "",
            "data.layout": "pairs",
            "data.tokenizer.kind": "wordpiece",
            "data.tokenizer.vocab": 30522,
            "data.tokenizer.lowercase": True,
            "data.pairs.short_sequence_probability": 0.1,
            "data.pairs.duplicates": 10,
            "batch_size": 256,
            "seq_len": 512 if second else 128,
            "total_steps": STEPS if second else PHASE_1,
            "optimizer.name": "bert_adam",
            "optimizer.peak_lr": 1e-4,
            "optimizer.schedule": "bert_linear",
            "optimizer.schedule_steps": STEPS,
            "optimizer.warmup_steps": 10_000,
            "optimizer.weight_decay": 0.01,
            "optimizer.decay": common.NO_DECAY_ON_BIAS_AND_NORM,
            "optimizer.clip_norm": 1.0,
            "optimizer.eps": 1e-6,
            "init.keep": "all" if second else "params",
            "checkpoint.every_steps": 10_000,
            "eval.every_steps": 10_000,
            "eval.batches": 200,  # 51,200 rows
            "log.every_steps": 100,
        }
    )
    model = {
        "architecture": "transformer",
        "direction": "full",
        "width": width,
        "layers": layers,
        "heads": heads,
        "mlp_width": 4 * width,
        "max_positions": 512,
        "segments": 2,
        "embedding_norm": True,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "embedding_dropout": 0.1,
        "head_transform": True,
        "head_bias": True,
        "activation": "gelu",
        "norm_epsilon": 1e-12,
        "init": "truncated_normal",
        "init_stddev": 0.02,
    }
    if given.size in ON_CPU:
        # So little text read so seldom is not overfitted: no dropout. See common.TINY for the init. One phase, one
        # schedule.
        recipe = common.TINY if given.size == "tiny" else common.LAPTOP
        settings = common.on_cpu(recipe["bert"], "pydocs" if given.size == "tiny" else "")
        configs.apply(config, {**settings, "optimizer.schedule_steps": 0, "data.pairs.duplicates": 4})
        model |= {"max_positions": common.POSITIONS[given.size], "init": "fan_in"}
        model |= {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    elif given.size == "large" and second:
        # Otherwise a row of 512 keeps 1.7 GiB of activations for the backward pass (`plm.plan`, v5e).
        configs.apply(config, {"remat": "blocks"})
    if given.pretraining == "left_to_right":
        model["direction"] = "forward"
    configs.set_model(config, model)
    if given.pretraining == "left_to_right":
        configs.add_objective(config, "causal")
        return config
    configs.add_objective(config, "masked", max_predictions=77 if second else 20)
    if given.pretraining == "both":
        configs.add_objective(config, "next_sentence")
    return config
