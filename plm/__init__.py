"""`plm`: pretrain, fine-tune, probe and compare ELMo, GPT and BERT in JAX/Flax from one train step.

Importing this package imports no JAX: commands that only print help, and worker processes that only tokenise,
start at once.
"""

__version__ = "0.1.0"
