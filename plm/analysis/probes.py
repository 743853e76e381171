"""Linear probes: what a linear classifier reads off each layer of a frozen model, and off a learned mix of all of them.

For tagging the features are the vectors of the words, in both alignments (`plm.analysis.features`), for classes of
single texts the mean over a text's pieces. Each layer gets a softmax regression of its own; one more reads ELMo's
scalar mix (Peters et al. 2018, equation 1), whose weights are learned with it. Features are first brought to mean 0 and
deviation 1 on the training part, each layer and each feature by itself, so layers of any scale are learned alike and
the mix weighs layers of one scale.

All probes of a model are trained at once, from zeros, by Adam with a linear decay, on the same batches in the same
order; for each the learning rate and the epoch with the best metric on the part that selects are kept, and the metric
on the other part is reported once (docs/protocol.md, 10). Controls: the same probes on the model before training,
`majority` (always the commonest class) and, of tags, `word_majority` (the commonest of the word in training).

Memory: vectors lie in files of the cache's disk that go with the process; a few thousand words are held at once.
"""

import dataclasses
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from plm.analysis import features, task_metrics
from plm.analysis.results import MAJORITY, Table, layer_name, row
from plm.cache import cache_directory, writable
from plm.data.examples import Example, fraction
from plm.data.tasks import TaskData
from plm.errors import UserError
from plm.models import scalar_mix

MIX = "mix"


@dataclasses.dataclass(frozen=True)
class Settings:
    """words: about so many of the training part (texts for classes), of whole examples chosen by hash. batch: words
    in a step; chunk: in a call of the compiled program."""

    words: int = 100_000
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    epochs: int = 5
    batch: int = 256
    chunk: int = 4096
    seed: int = 0


@dataclasses.dataclass
class Part:
    """A part of a task as one long list of units (words, or whole texts).

    examples: as they are; vectors: float32 [alignments, layers, units, features] on disk; labels: int32 [units].
    """

    examples: Sequence[Example]
    labels: np.ndarray
    vectors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Probe:
    """A trained one. selected: its metric on the selecting part; trial: the learning rate and the epoch chosen; shares:
    of the mix, one for each layer; predictions: int [units] of the reported part."""

    selected: float
    trial: tuple[float, int]
    shares: tuple[float, ...] | None
    predictions: np.ndarray


def check(data: TaskData) -> None:
    """Errors: UserError for a kind of task that no linear probe reads."""
    if data.task.kind not in ("tagging", "single"):
        raise UserError(f"suite probes reads tagging and single, and task {data.name!r} is {data.task.kind}")


def alignments(data: TaskData) -> tuple[str, ...]:
    return features.ALIGNMENTS if data.task.kind == "tagging" else ("mean",)


def parts(data: TaskData, settings: Settings) -> tuple[list[Example], Sequence[Example], tuple[str, Sequence[Example]]]:
    """(training examples, those that select, (name, those that report))."""
    (_, selecting), reported = data.selection_and_report()
    return _first_units(data.examples("train"), settings.words), selecting, reported


def _first_units(examples: Sequence[Example], most: int) -> list[Example]:
    """Whole examples by the hash of their ids until `most` units are there; all if they are fewer."""
    units = np.array([_size(example) for example in examples])
    if units.sum() <= most:
        return list(examples)
    return list(fraction(examples, most / units.sum(), name="probe"))


def _size(example: Example) -> int:
    return len(example.words) or 1


# ------------------------------------------------------------------------------------------------------------- features


def embed(model, data: TaskData, examples: Sequence[Example], folder: Path, done: Callable[[int], None]) -> Part:
    """The vectors of all units of some examples, in a file of the folder."""
    starts = np.cumsum([0, *map(_size, examples)])
    shape = (len(alignments(data)), model.n_layers, int(starts[-1]), model.n_features)
    with tempfile.TemporaryFile(dir=folder) as file:  # it has no name, so a process that is killed leaves nothing
        vectors = np.memmap(file, np.float32, "w+", shape=shape)
    if data.task.kind == "tagging":
        texts = [example.words for example in examples]
        spans = [[(i, i + 1) for i in range(len(words))] for words in texts]
        for index, found in features.of_spans(model, texts, spans, done):
            vectors[:, :, starts[index] : starts[index + 1]] = found
        labels = [tag for example in examples for tag in example.label]
    else:
        texts = [example.texts[0].split() for example in examples]
        for index, found in features.of_texts(model, texts, done):
            vectors[0, :, index] = found
        labels = [example.label for example in examples]
    return Part(examples, np.array(labels, np.int32), vectors)


def _moments(vectors: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [layers, 1, features] each: mean and deviation over the units of [layers, units, features]."""
    total, squares, n = 0.0, 0.0, vectors.shape[1]
    for start in range(0, n, chunk):
        x = np.asarray(vectors[:, start : start + chunk], np.float64)
        total, squares = total + x.sum(axis=1, keepdims=True), squares + np.square(x).sum(axis=1, keepdims=True)
    mean = total / n
    deviation = np.sqrt(np.maximum(squares / n - np.square(mean), 0.0))
    # A feature that never changes says nothing; dividing by its 0 would.
    return mean.astype(np.float32), np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- training


def _logits(params: dict, x_LxBxF: jax.Array) -> jax.Array:
    """float32 [learning rates, layers + 1, B, classes]; the last probe reads the mix."""

    def one(weight_PxFxC, bias_PxC, mix_L):
        mixed = scalar_mix.mix(x_LxBxF[:, None], mix_L, 1.0, None)
        read = jnp.concatenate([x_LxBxF, mixed])
        return jnp.einsum("pbf,pfc->pbc", read, weight_PxFxC) + bias_PxC[:, None]

    return jax.vmap(one)(params["weight"], params["bias"], params["mix"])


def _train_program(learning_rates: Sequence[float], steps: int) -> Callable:
    optimizer = optax.scale_by_adam()
    rates = jnp.array(learning_rates, jnp.float32)

    def loss(params, x, labels, weights):
        logits = _logits(params, x)
        picked = jnp.take_along_axis(logits, labels[None, None, :, None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights) / jnp.maximum(jnp.sum(weights), 1.0)

    @jax.jit
    def train(state, moments, x_LxNxBxF, labels_NxB, weights_NxB):
        """N batches, one step each; of those that only fill up a chunk none."""
        mean, deviation = moments

        def step(state, batch):
            params, adam, at = state
            x, labels, weights = batch
            gradients = jax.grad(loss)(params, (x - mean) / deviation, labels, weights)
            updates, moved = optimizer.update(gradients, adam)
            decayed = rates * (1.0 - at / steps)
            scale = lambda u: -decayed.reshape(-1, *[1] * (u.ndim - 1)) * u  # noqa: E731
            after = optax.apply_updates(params, jax.tree.map(scale, updates)), moved, at + 1
            # An empty batch would count as a step of the decay, and without a gradient Adam's moments shrink.
            there = jnp.sum(weights) > 0
            return jax.tree.map(lambda new, old: jnp.where(there, new, old), after, state), None

        return jax.lax.scan(step, state, (jnp.moveaxis(x_LxNxBxF, 1, 0), labels_NxB, weights_NxB))[0]

    return train, optimizer.init


@jax.jit
def _predict(params, moments, x_LxBxF):
    return jnp.argmax(_logits(params, (x_LxBxF - moments[0]) / moments[1]), axis=-1).astype(jnp.int32)


def fit(
    train: tuple[np.ndarray, np.ndarray],
    selecting: np.ndarray,
    reported: np.ndarray,
    n_classes: int,
    score: Callable[[np.ndarray], float],
    settings: Settings,
    done: Callable[[int], None] = lambda n: None,
) -> list[Probe]:
    """A probe for each layer and, last, one for their mix.

    train: (float32 [layers, units, features], int [units]); selecting, reported: the vectors of the other parts. score:
    of predictions [units] for the selecting part; of equal ones the earlier epoch, then the lower learning rate. done:
    is told of every epoch.
    """
    vectors, labels = train
    L, n, F = vectors.shape
    R, batches = len(settings.learning_rates), settings.chunk // settings.batch
    steps = settings.epochs * -(-n // settings.batch)
    program, init = _train_program(settings.learning_rates, steps)
    moments = _moments(vectors, settings.chunk)
    params = {
        "weight": jnp.zeros((R, L + 1, F, n_classes)),
        "bias": jnp.zeros((R, L + 1, n_classes)),
        "mix": jnp.zeros((R, L)),
    }
    state = params, init(params), jnp.zeros(())
    rng = np.random.default_rng(settings.seed)
    best: list[tuple] = [(-np.inf, None, None)] * (L + 1)
    with jax.default_matmul_precision("float32"):
        for epoch in range(1, settings.epochs + 1):
            order = rng.permutation(n)
            for start in range(0, n, settings.chunk):
                x, y, weights = _chunk(vectors, labels, order[start : start + settings.chunk], settings.chunk)
                shape = batches, settings.batch
                state = program(state, moments, x.reshape(L, *shape, F), y.reshape(shape), weights.reshape(shape))
            params = jax.tree.map(np.asarray, state[0])
            found = _predictions(params, moments, selecting, settings.chunk)
            for probe in range(L + 1):
                for rate in range(R):
                    value = score(found[rate, probe])
                    if value > best[probe][0]:
                        best[probe] = (
                            value,
                            (rate, epoch),
                            jax.tree.map(lambda p, rate=rate: p[rate : rate + 1], params),
                        )
            done(1)
        return [
            Probe(
                value,
                (settings.learning_rates[rate], epoch),
                tuple(_softmax(kept["mix"][0]).tolist()) if probe == L else None,
                _predictions(kept, moments, reported, settings.chunk)[0, probe],
            )
            for probe, (value, (rate, epoch), kept) in enumerate(best)
        ]


def _chunk(vectors: np.ndarray, labels: np.ndarray, rows: np.ndarray, size: int):
    """(vectors [layers, size, features], labels, weights) of some rows; what is missing has weight 0."""
    x = np.zeros((vectors.shape[0], size, vectors.shape[2]), np.float32)
    y, weights = np.zeros(size, np.int32), np.zeros(size, np.float32)
    for layer in range(len(x)):
        x[layer, : len(rows)] = vectors[layer][rows]
    y[: len(rows)], weights[: len(rows)] = labels[rows], 1.0
    return x, y, weights


def _predictions(params: dict, moments, vectors: np.ndarray, chunk: int) -> np.ndarray:
    """int32 [learning rates, layers + 1, units]."""
    n = vectors.shape[1]
    found = []
    for start in range(0, n, chunk):
        x = np.zeros((vectors.shape[0], chunk, vectors.shape[2]), np.float32)
        x[:, : min(chunk, n - start)] = vectors[:, start : start + chunk]
        found.append(np.asarray(_predict(params, moments, x))[..., : n - start])
    return np.concatenate(found, axis=-1)


def _softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max())
    return x / x.sum()


# ------------------------------------------------------------------------------------------------------------- results


def grouped(data: TaskData, examples: Sequence[Example], flat: np.ndarray) -> list:
    """Predictions of units as predictions of examples: a class, or a tuple of tags."""
    if data.task.kind == "single":
        return flat.tolist()
    stops = np.cumsum([len(example.words) for example in examples])
    return [tuple(tags.tolist()) for tags in np.split(flat, stops[:-1])]


def measure(
    model, data: TaskData, settings: Settings, done: Callable[[int], None] = lambda n: None
) -> dict[str, list[Probe]]:
    """{alignment: a probe for each layer and one for their mix}. done: is told of every example embedded, and of every
    epoch as of one."""
    train, selecting, (_, reported) = parts(data, settings)
    metric = task_metrics.METRICS[data.task.metrics[0]]

    def score(flat: np.ndarray) -> float:
        return metric(selecting, grouped(data, selecting, flat), data.labels)

    folder = cache_directory() / "probes"
    with writable(folder):
        learn, select, report = (embed(model, data, part, folder, done) for part in (train, selecting, reported))
        return {
            alignment: fit(
                (learn.vectors[place], learn.labels),
                select.vectors[place],
                report.vectors[place],
                len(data.labels),
                score,
                settings,
                done,
            )
            for place, alignment in enumerate(alignments(data))
        }


def summary(
    data: TaskData, settings: Settings, found: Mapping[str, Mapping[str, list[Probe]]]
) -> tuple[list[dict], list[Table]]:
    """(rows, tables) of {"trained": as `measure` gives it, "random_init": ...}.

    Metrics, all of the task's own: `TASK/MODEL/ALIGNMENT/LAYER/METRIC` with LAYER `embedding`, `layer 1`, ..., `mix`;
    `TASK/MODEL/ALIGNMENT/share of LAYER`: the learned mix's; `TASK/majority/METRIC`, `TASK/word_majority/METRIC`.
    """
    train, _, (split, reported) = parts(data, settings)
    n = sum(map(_size, reported))
    metrics = data.task.metrics
    rows, body, mixes = [], [], []

    def add(name: str, predictions: list, *notes) -> None:
        values = task_metrics.score(data.task, reported, predictions, data.labels)
        rows.extend(row(f"{data.name}/{name}/{metric}", split, n, value) for metric, value in values.items())
        body.append([name, *(values[metric] for metric in metrics), *notes])

    for name, predictions in _baselines(data, train, reported):
        add(name, predictions, None, None)
    for model, of_model in found.items():
        for alignment, of_layers in of_model.items():
            name = f"{model}/{alignment}"
            layers = [layer_name(layer) for layer in range(len(of_layers) - 1)]
            for layer, probe in zip([*layers, MIX], of_layers, strict=True):
                flat = grouped(data, reported, probe.predictions)
                add(f"{name}/{layer}", flat, probe.selected, "{:g}, {}".format(*probe.trial))
            shares = of_layers[-1].shares
            rows += [
                row(f"{data.name}/{name}/share of {layer}", split, n, share)
                for layer, share in zip(layers, shares, strict=True)
            ]
            mixes.append([name, *shares])
    trials = f"{len(settings.learning_rates)} learning rates, best of {settings.epochs} epochs"
    title = f"Linear probes, {data.name}, {split}: {n:,} units; trained on {sum(map(_size, train)):,}; {trials}"
    return rows, [
        Table(title, ["probe", *metrics, f"selecting {metrics[0]}", "rate, epoch"], body),
        Table(f"{data.name}: share of each layer in the learned mix", ["probe", *layers], mixes),
    ]


def n_steps(data: TaskData, settings: Settings) -> int:
    """What `done` is told in all for one model."""
    train, selecting, (_, reported) = parts(data, settings)
    return len(train) + len(selecting) + len(reported) + settings.epochs * len(alignments(data))


def _baselines(data: TaskData, train: Sequence[Example], reported: Sequence[Example]) -> list[tuple[str, list]]:
    found = [(MAJORITY, task_metrics.majority(train, reported))]
    if data.task.kind == "single":
        return found
    counts: dict[str, Counter] = defaultdict(Counter)
    for example in train:
        for word, tag in zip(example.words, example.label, strict=True):
            counts[word][tag] += 1
    commonest = sum(counts.values(), Counter()).most_common(1)[0][0]
    of_word = {word: own.most_common(1)[0][0] for word, own in counts.items()}
    words = [tuple(of_word.get(word, commonest) for word in example.words) for example in reported]
    return [*found, ("word_majority", words)]
