"""`plm`: pretrain, fine-tune, probe and compare ELMo, GPT and BERT in JAX/Flax from one train step.

Importing this package imports no JAX: commands that only print help, and worker processes that only tokenise,
start at once.
"""

import json
import os
import sys

__version__ = "0.1.0"

# gcsfs keeps every listing of a bucket until it writes there itself, and never sees what other processes write.
_FRESH = {"use_listings_cache": False}
os.environ.setdefault("FSSPEC_GCS", json.dumps(_FRESH))  # read when fsspec is imported
if "fsspec" in sys.modules:
    sys.modules["fsspec"].config.conf.setdefault("gcs", _FRESH)


def load(source, *, random: bool = False, allow_missing: str = "", vocabulary: str = ""):
    """A model to use: `plm.load("runs/bert@500").embed(["A text."])`.

    source: a run's workdir (its newest checkpoint; @STEP names another one), a converted or a foreign folder. random:
    with the parameters that training began with. allow_missing, vocabulary: of a foreign folder, see
    `plm.weights.read`. Returns a `plm.inference.model.Model`: `embed`, `tokenize`, `score`, `generate`, `fill_mask`.

    Errors: `plm.errors.UserError` when a part is missing or damaged.
    """
    from plm.inference.model import load as load_model  # imports JAX

    return load_model(source, random=random, allow_missing=allow_missing, vocabulary=vocabulary)
