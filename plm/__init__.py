"""`plm`: pretrain, fine-tune, probe and compare ELMo, GPT and BERT in JAX/Flax from one train step.

Importing this package imports no JAX: commands that only print help, and worker processes that only tokenise,
start at once.
"""

__version__ = "0.1.0"


def load(source, *, random: bool = False):
    """The model that a run left in its workdir: `plm.load("runs/bert@500").embed(["A text."])`.

    source: SRC (its newest checkpoint) or SRC@STEP. random: with the parameters that training began with. Returns a
    `plm.inference.model.Model`; see there for `embed`, `generate` and `fill_mask`.

    Errors: `plm.errors.UserError` when a part is missing or damaged.
    """
    from plm.inference.model import load as load_model  # imports JAX

    return load_model(source, random=random)
