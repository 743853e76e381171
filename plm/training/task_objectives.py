"""What a model is trained for on a task: classify, regress, choose, tag, span; see `plm.training.objectives`.

The rows come from `plm.data.task_rows`, whose table says what they hold. Every objective has, beside sums and weights,
`predictions(head, outputs, batch)`: float32 or int32 [examples or rows, ...] of a batch, which
`plm.analysis.task_results` turns into answers and metrics. Rows that only pad a batch have length 0 and weight 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from plm.errors import UserError
from plm.models.heads import HIDDEN_LOGIT
from plm.models.layers import Noise
from plm.models.task_heads import valid_positions


class _TaskObjective:
    """What the five share. settings: `_TASK_HEAD` of plm.training.config and the objective's own."""

    name: str
    directions = ("forward", "both", "full")
    rows_per_example = 1
    needs: tuple[str, ...] = ("labels",)  # fields of a task's rows

    def __init__(self, settings, tokenizer):
        self.settings = settings
        self.penalty = settings.mix_penalty if settings.reads == "mix" else 0.0

    def fields(self, rows: dict, draw) -> dict:
        missing = [name for name in self.needs if name not in rows]
        if missing:
            raise UserError(f"objectives.{self.name} needs a task's rows, data.layout='task': text has no {missing[0]}")
        return {f"{self.name}_weights": (rows["length"] > 0).astype(np.float32)}

    def _noise(self, batch: dict, key) -> Noise | None:
        return None if key is None else Noise(key, batch["row"]).named(self.name)

    def _first_rows(self, array: jax.Array) -> jax.Array:
        """[B, ...] -> [examples, ...]: of each example its first row's."""
        return array[:: self.rows_per_example]

    def _total(self, batch: dict) -> jax.Array:
        """The weight of a batch: its examples."""
        return jnp.sum(self._first_rows(batch[f"{self.name}_weights"]))

    def weights(self, batch: dict) -> dict:
        total = self._total(batch)
        weights = dict.fromkeys(self._names(), total)
        return weights | ({f"{self.name}_mix_penalty": total} if self.penalty else {})

    def sums(self, head, outputs: dict, batch: dict, key) -> dict:
        sums = self._sums(head, outputs, batch, key)
        if self.penalty:
            # Times the weight of these rows, so that the mean over all microbatches is the penalty itself.
            sums[f"{self.name}_mix_penalty"] = head.reader.penalty() * self._total(batch)
        return sums

    def coefficients(self, coefficient: float) -> dict[str, float]:
        penalty = {f"{self.name}_mix_penalty": coefficient * self.penalty} if self.penalty else {}
        return {self.name: coefficient} | penalty

    def _names(self) -> tuple[str, ...]:
        return self.name, f"{self.name}_accuracy"


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(-log p(label), 1.0 where it is the most probable), of logits [..., classes]."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return -picked, (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


class _OfExamples(_TaskObjective):
    """One prediction for an example of one row, or of two: a pair in both orders, or each text by itself."""

    def __init__(self, settings, tokenizer):
        super().__init__(settings, tokenizer)
        self.rows_per_example = 1 if settings.pairs == "joined" else 2

    def _scores(self, head, outputs: dict, batch: dict, key) -> jax.Array:
        return head.of_examples(outputs, batch, self._noise(batch, key), self.rows_per_example)


class Classify(_OfExamples):
    """-log p(class): one text, a pair, or a word in two contexts (GPT section 3.2, BERT section 4.1)."""

    name = "classify"

    def _sums(self, head, outputs, batch, key) -> dict:
        loss, hits = _cross_entropy(self._scores(head, outputs, batch, key), self._first_rows(batch["labels"]))
        weights = self._first_rows(batch["classify_weights"])
        return {"classify": jnp.sum(weights * loss), "classify_accuracy": jnp.sum(weights * hits)}

    def predictions(self, head, outputs, batch) -> jax.Array:
        """Logits [examples, classes]."""
        return self._scores(head, outputs, batch, None)


class Regress(_OfExamples):
    """Squared error of a score (STS-B)."""

    name = "regress"
    needs = ("scores",)

    def _names(self):
        return ("regress",)

    def _sums(self, head, outputs, batch, key) -> dict:
        error = self._scores(head, outputs, batch, key)[:, 0] - self._first_rows(batch["scores"])
        return {"regress": jnp.sum(self._first_rows(batch["regress_weights"]) * jnp.square(error))}

    def predictions(self, head, outputs, batch) -> jax.Array:
        """Scores [examples, 1]."""
        return self._scores(head, outputs, batch, None)


class Choose(_TaskObjective):
    """-log p(right choice | example), a softmax over its choices' scores (GPT section 3.2, BERT section 4.4).

    An example is `choices` consecutive rows, one for each choice; one with fewer has rows of length 0 behind them.
    Dropout on the scored vector has one mask for all choices of an example, as in GPT's published code: choices differ
    by what they say and not by their noise.
    """

    name = "choose"

    def __init__(self, settings, tokenizer):
        super().__init__(settings, tokenizer)
        self.rows_per_example = settings.choices

    def _scores(self, head, outputs, batch, key) -> jax.Array:
        """[examples, choices]"""
        noise = self._noise(batch, key)
        shared = None if noise is None else Noise(noise.key, noise.rows // self.rows_per_example)
        scores = head.of_rows(outputs, batch, noise, shared)[:, 0].reshape(-1, self.rows_per_example)
        there = batch["choose_weights"].reshape(scores.shape) > 0
        # A row of zeros only pads the batch: its softmax must stay finite.
        return jnp.where(there | ~there[:, :1], scores, HIDDEN_LOGIT)

    def _sums(self, head, outputs, batch, key) -> dict:
        loss, hits = _cross_entropy(self._scores(head, outputs, batch, key), self._first_rows(batch["labels"]))
        weights = self._first_rows(batch["choose_weights"])
        return {"choose": jnp.sum(weights * loss), "choose_accuracy": jnp.sum(weights * hits)}

    def predictions(self, head, outputs, batch) -> jax.Array:
        """Scores [examples, choices]."""
        return self._scores(head, outputs, batch, None)


class Tag(_TaskObjective):
    """-log p(tag) of every word, from the vector of its first piece or its last (BERT section 5.3); with `crf`, of all
    tags of a row together, divided by its words."""

    name = "tag"
    needs = ("tags", "tag_positions")

    def fields(self, rows, draw) -> dict:
        super().fields(rows, draw)
        return {"tag_weights": (rows["tags"] >= 0).astype(np.float32)}

    def _total(self, batch):
        return jnp.sum(batch["tag_weights"])

    def _scores(self, head, outputs, batch, key) -> jax.Array:
        """[B, words, tags]"""
        return head.of_positions(outputs, batch, self._noise(batch, key), batch["tag_positions"])

    def _sums(self, head, outputs, batch, key) -> dict:
        scores, tags = self._scores(head, outputs, batch, key), jnp.maximum(batch["tags"], 0)
        weights = batch["tag_weights"]
        loss, hits = _cross_entropy(scores, tags)
        total = jnp.sum(weights * loss)
        if head.crf is not None:
            total = jnp.sum(head.crf.nll(scores, tags, weights > 0))
            hits = (head.crf.best(scores, weights > 0) == tags).astype(jnp.float32)
        return {"tag": total, "tag_accuracy": jnp.sum(weights * hits)}

    def predictions(self, head, outputs, batch) -> jax.Array:
        """int32 [B, words]: the best tags, of a CRF the best sequence."""
        scores = self._scores(head, outputs, batch, None)
        if head.crf is not None:
            return head.crf.best(scores, batch["tag_weights"] > 0)
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)


class Span(_TaskObjective):
    """The mean of -log p(first piece) and -log p(last piece) of an answer, each a softmax over the row (BERT section
    4.2). A window without the answer points to its first position, which means "no answer here" (section 4.3). As in
    the published code question and special positions take part; padding does not."""

    name = "span"
    needs = ("answers",)

    def _scores(self, head, outputs, batch, key) -> jax.Array:
        """[B, T, 2]"""
        scores = head.of_positions(outputs, batch, self._noise(batch, key))
        valid = valid_positions(jnp.maximum(batch["length"], 1), scores.shape[1])
        return jnp.where(valid[..., None], scores, HIDDEN_LOGIT)

    def _sums(self, head, outputs, batch, key) -> dict:
        scores = jnp.swapaxes(self._scores(head, outputs, batch, key), 1, 2)
        loss, hits = _cross_entropy(scores, batch["answers"])
        weights = batch["span_weights"]
        both = jnp.prod(hits, axis=-1)
        return {"span": jnp.sum(weights * jnp.mean(loss, axis=-1)), "span_accuracy": jnp.sum(weights * both)}

    def predictions(self, head, outputs, batch) -> jax.Array:
        """Logits of first and last piece [B, T, 2]."""
        return self._scores(head, outputs, batch, None)


TASK_OBJECTIVES = {objective.name: objective for objective in (Classify, Regress, Choose, Tag, Span)}
