"""A model, an objective, a layout, a source and an optimizer from outside the package, named in the config.

They all stand in this file. No file of the package knows of them.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import children, corpus
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from plm.data.sources import Document, Shard, Source
from plm.data.store import Split
from plm.errors import UserError
from plm.models.heads import VocabularyHead
from plm.models.layers import Table
from plm.randomness import stable_hash
from plm.training import config as configs
from plm.training import loop
from plm.training.metrics import read_metrics

HERE = "test_extension"


@pytest.fixture(autouse=True)
def compiled_quickly(cache):
    before = children.quick_compiles()
    yield
    children.restore(before)


# What a user writes


class Generated(Source):
    """The test corpus, never written to a file."""

    spec, licence = f"{HERE}:source", "CC0-1.0"
    fingerprint = f"{stable_hash('generated', corpus.documents(3)):08x}"

    def shards(self):
        return [GeneratedShard()]


class GeneratedShard(Shard):
    bytes = 20_000

    def documents(self):
        for number, sentences in enumerate(corpus.documents(60)):
            yield Document(f"generated:{number}", tuple(sentences))


def source() -> Source:
    return Generated()


class Windows:
    """Rows are windows at places that are drawn from (seed, step, row); `stride` is its one setting."""

    def __init__(self, split: Split, tokenizer, *, seq_len, batch_size, seed, settings, mode):
        self.split, self.T, self.batch_size, self.seed = split, seq_len, batch_size, seed
        self.stride, self.training = settings["stride"], mode == "train"
        self.places = (split.n_tokens - seq_len - 1) // self.stride
        self.examples_per_epoch, self.steps = self.places, 2
        self.report = {"layout": "windows", "stride": self.stride}

    def rows(self, step: int, rows: range) -> dict:
        numbers = np.array([stable_hash(self.seed, step, row) % self.places for row in rows], np.int64)
        at = numbers[:, None] * self.stride + np.arange(self.T)
        tokens = self.split.tokens[at].astype(np.int32)
        return {
            "tokens": tokens,
            "next_tokens": self.split.tokens[at + 1].astype(np.int32),
            "length": np.full(len(rows), self.T, np.int32),
            "example": numbers,
            "special": np.zeros(tokens.shape, bool),
        }


class Bigram(nnx.Module):
    """Logits of what follows from the last token alone; what it adds of its own is `mixer`."""

    sharding_rules = (("^mixer$", PartitionSpec("fsdp", "tensor")),)

    def __init__(self, config, size, objectives, *, dtype, rngs: nnx.Rngs):
        width = config.model.width
        self.embedding = nnx.Dict({"tokens": Table(size, width, "fan_in", 0.0, multiple=16, rngs=rngs)})
        self.mixer = nnx.Param(jnp.eye(width) * config.model.strength)
        settings = ConfigDict({"head_bias": True, "head_transform": False, "activation": "relu"})
        head = VocabularyHead(settings, None, size, width, 16, 0, dtype=dtype, rngs=rngs)
        self.heads = nnx.Dict(dict.fromkeys(objectives, head))

    def initial_carry(self, batch_size):
        return {}

    def __call__(self, batch, carry, key=None):
        return {"hidden": self.embedding["tokens"](batch["tokens"], jnp.float32) @ self.mixer[...]}, {}


class Ruleless(Bigram):
    """The same without a row for its parameter."""

    sharding_rules = ()


class Second:
    """-log p(the token after the next one)."""

    name = "second"

    def __init__(self, settings, tokenizer):
        self.every = settings.every

    def fields(self, rows, draw):
        later = np.full_like(rows["next_tokens"], -1)
        later[:, :-1] = rows["next_tokens"][:, 1:]
        weights = (later >= 0) & (np.arange(later.shape[1]) % self.every == 0)
        return {"second_targets": np.maximum(later, 0), "second_weights": weights.astype(np.float32)}

    def weights(self, batch):
        return {"second": jnp.sum(batch["second_weights"])}

    def sums(self, head, outputs, batch, key):
        return {"second": head.nll(outputs["hidden"], batch["second_targets"], batch["second_weights"])[0]}

    def coefficients(self, coefficient):
        return {"second": coefficient}


def sign_descent(config, params) -> optax.GradientTransformation:
    """The sign of the gradient, times a setting of its own."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda g: jnp.sign(g) * config.size, updates))


def get_config(arguments: str = ""):
    """The experiment file of such a user is this file, too."""
    config = configs.base().unlock()
    config.model = ConfigDict({"name": f"{HERE}:Bigram", "width": 16, "strength": 1.0})
    config.objectives.second = ConfigDict({"name": f"{HERE}:Second", "coefficient": 2.0, "every": 2})
    config.data.source, config.data.layout = f"{HERE}:source", f"{HERE}:Windows"
    config.data.own.stride = 3
    config.optimizer.name, config.optimizer.size = f"{HERE}:sign_descent", 0.5
    configs.apply(
        config.lock(),
        {
            "data.tokenizer.vocab": 300,
            "data.valid_fraction": 0.2,
            "data.workers": 1,
            "batch_size": 8,
            "seq_len": 8,
            "total_steps": 60,
            "optimizer.peak_lr": 0.03,
            "checkpoint.every_steps": 40,
            "eval.every_steps": 30,
            "log.every_steps": 10,
        },
    )
    return config


# That it works


def test_everything_from_outside_trains_evaluates_and_resumes(tmp_path):
    overrides = {"model.strength": "2.0", "optimizer.size": "0.25", "data.own.stride": "5"}
    config = configs.load(__file__, overrides)
    values = loop.train(config, tmp_path)
    lines = read_metrics(tmp_path)
    assert lines[-1]["train/second"] < lines[0]["train/second"] - 0.3
    assert lines[-1]["train/loss"] == pytest.approx(2 * lines[-1]["train/second"])
    assert values["eval/second_targets"] == 2 * 8 * 4  # batches x rows x every second position, the last has none
    assert values["eval/second"] < lines[0]["train/second"]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["corpus"]["licence"] == "CC0-1.0"
    assert run["layout"] == {"layout": "windows", "stride": 5}
    assert run["parameters"]["body"] == 16 * 16
    saved = (tmp_path / "checkpoints" / "60").rename(tmp_path / "aside")
    (tmp_path / "run.json").write_text(json.dumps(run | {"status": "running"}))
    assert loop.train(config, tmp_path) == values
    assert saved.exists()
    with pytest.raises(UserError, match=r"model\.strength: 2\.0 -> 3\.0"):
        loop.train(configs.load(__file__, overrides | {"model.strength": "3.0"}), tmp_path)


def test_a_parameter_without_a_sharding_row_is_named(tmp_path):
    config = configs.load(__file__, {"model.name": f"{HERE}:Ruleless"})
    with pytest.raises(UserError, match=r"parameter mixer \(16, 16\) matches no row of the sharding table"):
        loop.train(config, tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.name", "model.name='test_extension:nothing' cannot be imported"),
        ("objectives.second.name", "objectives.second.name='test_extension:nothing' cannot be imported"),
        ("data.layout", "data.layout='test_extension:nothing' cannot be loaded"),
        ("data.source", "module 'test_extension' has no 'nothing'"),
        ("optimizer.name", "optimizer.name='test_extension:nothing' cannot be imported"),
    ],
)
def test_a_name_that_is_not_there_is_told(key, message, tmp_path):
    with pytest.raises(UserError, match=message):
        loop.train(configs.load(__file__, {key: f"{HERE}:nothing"}), tmp_path)
