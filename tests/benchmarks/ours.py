"""Our side of the benchmark: the project's train step at a given size, and what JAX says of it."""

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common
from plm.data.tokenizers import Tokenizer
from plm.inference.model import Model
from plm.models.flops import train_flops
from plm.models.graph import build
from plm.training import config as configs
from plm.training.objectives import make_objectives
from plm.training.step import make_train_step, new_state
from tests.benchmarks.sizes import Size
from tests.benchmarks.texts import SPECIALS, vocabulary

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}


class Vocabulary:
    """What objectives ask of a tokenizer when the batch holds random ids."""

    byte_lengths = None

    def __init__(self, size: int):
        self.size = size

    def role(self, name: str) -> int:
        return 4


def config(name: str, size: Size):
    """BERT, GPT or the biLM at this size, with what the torch side computes and nothing else."""
    objective = {"bert": "masked", "gpt": "causal", "bilm": "bidirectional"}[name]
    settings = common.configure(
        {
            "batch_size": size.batch,
            "seq_len": size.length,
            "total_steps": 1000,
            "softmax_chunk": size.softmax_chunk,
            "precision.compute": size.dtype,
            "data.layout": "lanes" if name == "bilm" else "blocks",
        }
    )
    model = {"dropout": size.dropout, "embedding_dropout": size.dropout, "tied": True}
    if name == "bilm":
        # torch.nn.LSTM has neither ELMo's residuals nor its clips.
        model |= {"architecture": "lstm", "direction": "both", "width": size.projection, "layers": size.lstm_layers}
        model |= {"lstm.cells": size.cells, "lstm.projection": size.projection, "embedding_dropout": 0.0}
        model |= {"lstm.cell_clip": 0.0, "lstm.projection_clip": 0.0, "lstm.residual": False}
    else:
        model |= {"architecture": "transformer", "width": size.width, "layers": size.layers, "heads": size.heads}
        model |= {"mlp_width": 4 * size.width, "max_positions": size.length, "attention_dropout": size.dropout}
    if name == "bert":
        model |= {"direction": "full", "segments": 2, "embedding_norm": True, "activation": "gelu"}
        model |= {"head_transform": True, "head_bias": True, "norm_epsilon": 1e-12}
    if name == "gpt":
        model |= {"direction": "forward", "activation": "gelu_tanh"}
    configs.set_model(settings, model)
    configs.add_objective(settings, objective)
    if name == "bert":
        settings.objectives.masked.max_predictions = size.predictions
    return settings


def random_batch(name: str, size: Size, seed: int) -> dict:
    """Random ids with the names and shapes that the pipeline gives them."""
    random = np.random.default_rng(seed)
    shape = (size.batch, size.length)

    def ids(*shape):
        return random.integers(5, size.vocabulary, shape, dtype=np.int32)

    arrays = {"tokens": ids(*shape), "row": np.arange(size.batch, dtype=np.int32)}
    if name == "bert":
        P = size.predictions
        places = np.stack([np.sort(random.permutation(size.length)[:P]) for _ in range(size.batch)])
        arrays |= {"masked_positions": places.astype(np.int32), "masked_targets": ids(size.batch, P)}
        arrays |= {"masked_weights": np.ones((size.batch, P), np.float32), "segments": np.zeros(shape, np.int32)}
        arrays["length"] = np.full((size.batch,), size.length, np.int32)
    elif name == "gpt":
        arrays |= {"causal_targets": ids(*shape), "causal_weights": np.ones(shape, np.float32)}
    else:
        arrays["tokens_backward"] = ids(*shape)
        for infix in ("", "_backward"):
            arrays[f"bidirectional{infix}_targets"] = ids(*shape)
            arrays[f"bidirectional{infix}_weights"] = np.ones(shape, np.float32)
    return jax.device_put(arrays)


class Step:
    """`step()` trains once and returns the seconds that it took, the device's work included."""

    def __init__(self, name: str, size: Size):
        self.name, self.size, self.config = name, size, config(name, size)
        objectives, coefficients = make_objectives(self.config, Vocabulary(size.vocabulary))
        names = tuple(objective.name for objective in objectives)
        self.graph = build(self.config, size.vocabulary, names, jnp.dtype(size.dtype))
        parameters = self.graph.init(jax.random.key(0))
        optimizer = optax.adam(1e-4)
        self.state = new_state(parameters, optimizer, self.graph.bind(parameters).initial_carry(size.batch))
        self.train = make_train_step(self.graph.bind, objectives, coefficients, optimizer)
        self.batches = [random_batch(name, size, seed) for seed in range(2)]
        self.calls = 0
        self.first_seconds = self()

    def _call(self) -> dict:
        self.state, metrics = self.train(self.state, self.batches[self.calls % 2])
        self.calls += 1
        return metrics

    def __call__(self) -> float:
        began = time.perf_counter()
        self._call()
        jax.block_until_ready(self.state)
        return time.perf_counter() - began

    def host_seconds(self, repeats: int = 25) -> tuple[float, float]:
        """Medians until the call returns, with nothing in the queue before it: on the clock, and of this thread's
        own work, which a busy machine does not lengthen."""
        seconds = []
        for _ in range(repeats):
            jax.block_until_ready(self.state)
            began, worked = time.perf_counter(), time.thread_time()
            self._call()
            seconds.append((time.perf_counter() - began, time.thread_time() - worked))
        jax.block_until_ready(self.state)
        clock, work = np.median(seconds, axis=0)
        return float(clock), float(work)

    def facts(self) -> dict:
        """What is known of the compiled step: compiles, operations, bytes of temporaries and of its largest array."""
        loss = float(self._call()["loss"])
        if not np.isfinite(loss):
            raise RuntimeError(f"{self.name}: the loss is {loss}")
        compiles = self.train.jitted._cache_size()
        compiled = self.train.lower(self.state, self.batches[0]).compile()
        largest, shape = largest_array(compiled.as_text())
        clock, _ = self.host_seconds()
        # The CPU backend runs the beginning of a program on the caller's thread: with next to no tokens, the same
        # parameters and the same leaves, what is left is the host's own.
        _, work = Step(self.name, dataclasses.replace(self.size, batch=2, length=16)).host_seconds()
        return {
            "compiles": compiles,
            "calls": self.calls,
            "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
            "largest_array": shape,
            "largest_array_bytes": largest,
            "all_logits_bytes": 4 * self.size.batch * self.size.length * self.size.vocabulary,
            "operations": train_flops(self.graph, self.config, self.size.vocabulary),
            "parameters": self.graph.counts()["total"],
            "first_seconds": self.first_seconds,
            "host_seconds": clock,
            "host_work_seconds": work,
        }


class Embed:
    """`embed(texts)` gives the top layer's vectors of every piece and returns the seconds that it took."""

    def __init__(self, name: str, size: Size):
        pieces = vocabulary(size)
        roles = {
            role: pieces.index(token)
            for role, token in zip(("pad", "unk", "cls", "sep", "mask"), SPECIALS, strict=True)
        }
        tokenizer = Tokenizer("wordpiece", pieces, roles, lowercase=True)
        settings = config(name, size)
        graph = build(settings, tokenizer.size, tuple(settings.objectives), jnp.float32)
        self.model = Model(settings, tokenizer, graph, graph.init(jax.random.key(0)), 0, name)

    def __call__(self, texts: list[str]) -> float:
        began = time.perf_counter()
        vectors = self.model.embed(texts, -1, "subwords")
        seconds = time.perf_counter() - began
        assert all(len(found) == len(text.split()) for text, found in zip(texts, vectors, strict=True))
        return seconds


def largest_array(program: str) -> tuple[int, str]:
    """(bytes, type and shape) of the largest array that an instruction of a compiled program writes to memory."""
    largest, inside_fusion = (0, ""), False
    for line in program.splitlines():
        if not line.startswith(" "):
            # What a fusion computes on the way never reaches memory.
            inside_fusion = "fused_computation" in line.split("(")[0]
        found = re.match(r"\s+(?:ROOT )?%\S+ = (\w+)\[([\d,]*)\]\S* (?!parameter|bitcast)", line)
        if not found or inside_fusion or found[1] not in BYTES:
            continue
        lengths = [int(length) for length in found[2].split(",") if length]
        largest = max(largest, (BYTES[found[1]] * int(np.prod(lengths)), f"{found[1]}[{found[2]}]"))
    return largest


class Product:
    """`product()` multiplies two large float32 matrices and returns operations a second: what the machine can do."""

    def __init__(self, n: int = 2048):
        self.n = n
        self.a, self.b = (jax.random.normal(jax.random.key(i), (n, n)) for i in range(2))
        self.multiply = jax.jit(lambda a, b: a @ b)
        self()

    def __call__(self) -> float:
        began = time.perf_counter()
        jax.block_until_ready(self.multiply(self.a, self.b))
        return 2 * self.n**3 / (time.perf_counter() - began)
