"""What a model is trained for: causal, bidirectional, masked, next_sentence (tasks: `plm.training.task_objectives`).

An objective has a host half, `fields(rows, draw)`, that adds inputs, targets, weights and negatives to any layout's
rows, and a device half, `weights(batch)` (free of parameters) and `sums(head, outputs, batch, key)`. Both return
{name: float32 scalar} with the same names. The step divides: loss = sum over names of coefficient x sum / weight, so
that gradients of microbatches add exactly; names without a coefficient are metrics.

All arrays of a batch (rows first; B rows, T positions, P predictions; int32 unless said):

| name | shape | from | meaning |
| --- | --- | --- | --- |
| tokens | [B, T] | layout | input ids, changed by `masked` |
| next_tokens | [B, T] | layout | token after each input in its stream, -1 where none (not sent to the device) |
| tokens_backward, next_tokens_backward | [B, T] | lanes | the backward stream, in its reading order |
| length | [B] | layout | valid positions |
| segments | [B, T] | pairs | 0 in `[CLS] A [SEP]`, 1 in `B [SEP]` |
| next_sentence_labels | [B] | pairs | 0 = B really follows A, 1 = random |
| special | [B, T] bool | layout | positions never masked (not sent) |
| example | [B] int64 | layout | id of the example, the same in every epoch (not sent) |
| row | [B] | pipeline | global row, for the noise |
| characters, characters_backward | [B, T, 50] | pipeline | ELMo's ids of the inputs, shifted by one, 0 = none |
| words, words_backward | [B, T] | pipeline | instead of characters: places of the inputs in shared/words |
| causal_targets, causal_weights | [B, T], float32 [B, T] | causal | |
| bidirectional_targets, ..._weights, and ..._backward_... | [B, T], float32 [B, T] | bidirectional | |
| masked_positions, masked_targets, masked_weights | [B, P], float32 weights | masked | unused slots: weight 0 |
| next_sentence_weights | float32 [B] | next_sentence | 0 on rows that only pad a batch |
| labels, or scores | [B], float32 [B] | task | what is right for the row's example, the same in all its rows |
| marked | [B, K] | task | positions of a row's target words (word in context) |
| tags, tag_positions | [B, T] | task | of each word the tag, -1 where there is none, and the position of its piece |
| answers | [B, 2] | task | positions of the first and last piece of an answer, 0 without one |
| vectors | float32 [B, T, D] | task | vectors of the words from a file, at the pieces that stand for them |
| classify_weights, regress_..., choose_..., span_... | float32 [B] | task objective | 0 on rows that only pad a batch |
| tag_weights | float32 [B, T] | tag | 1 for each word |
| causal_bytes, bidirectional_bytes, ..._backward_bytes | float32 [B] | objective | text of the targets, if lossless |
| shared/words | [U, 50] | pipeline | characters of the batch's distinct inputs; U is one of four declared sizes |
| shared/negatives, shared/tries | [K], [] | bidirectional | no rows: never split |

An example owns `rows_per_example` consecutive rows (an attribute of the objective, 1 without it), and the rows of a
batch begin with an example's first. The step never parts them.

Model outputs: see `plm.models.language_model.LanguageModel`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from plm.errors import UserError
from plm.models.graph import import_from_outside
from plm.models.heads import log_uniform_probabilities
from plm.randomness import generator, row_uniforms
from plm.training.task_objectives import TASK_OBJECTIVES

HOST_ONLY = ("next_tokens", "next_tokens_backward", "special", "example")


@dataclasses.dataclass(frozen=True)
class Draw:
    """Named uniforms of the rows at hand: the same for a global row whatever process makes it.

    seed, step; rows: the global rows of the arrays, consecutive; salt keeps training and evaluation apart.
    """

    seed: int
    step: int
    rows: range
    salt: str = "train"

    def uniforms(self, name: str, width: int) -> np.ndarray:
        """float64 [rows, width] in [0, 1), new at every step."""
        return row_uniforms(self.seed, self.salt, name, self.step, rows=self.rows, width=width)

    def fixed_uniforms(self, name: str, examples: np.ndarray, width: int) -> np.ndarray:
        """float64 [rows, width] in [0, 1) that depend on the example and not on the step."""
        return np.concatenate(
            [row_uniforms(self.seed, self.salt, name, rows=range(e, e + 1), width=width) for e in examples.tolist()]
        )

    def shared(self, name: str) -> np.random.Generator:
        """A generator for what the whole batch shares."""
        return generator(self.seed, self.salt, name, self.step)


def _targets(tokenizer, next_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = (next_tokens >= 0).astype(np.float32)
    return tokenizer.target_id(np.maximum(next_tokens, 0)).astype(np.int32), weights


def _bytes(tokenizer, name: str, targets: np.ndarray, weights: np.ndarray) -> dict:
    """{name: bytes of text that the row's targets stand for, float32 [B]}; {} where ids do not determine the text."""
    if tokenizer.byte_lengths is None:
        return {}
    return {name: (tokenizer.byte_lengths[targets] * weights).sum(axis=1, dtype=np.float32)}


class Causal:
    """-log p(next token | tokens up to here) (GPT section 3.1); direction forward.

    The mean over all targets of the batch; with `per_row` the mean over rows of each row's mean, so that a short row
    counts as much as a long one (GPT's auxiliary loss when it fine-tunes).
    """

    name, directions = "causal", ("forward",)

    def __init__(self, settings, tokenizer):
        self.tokenizer = tokenizer
        self.per_row = settings.get("per_row", False)

    def fields(self, rows: dict, draw: Draw) -> dict:
        targets, weights = _targets(self.tokenizer, rows["next_tokens"])
        if self.per_row:
            weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1)
            return {"causal_targets": targets, "causal_weights": weights}
        fields = {"causal_targets": targets, "causal_weights": weights}
        return fields | _bytes(self.tokenizer, "causal_bytes", targets, weights)

    def weights(self, batch: dict) -> dict:
        total = jnp.sum(batch["causal_weights"])
        weights = {"causal": total, "causal_accuracy": total}
        if "causal_bytes" in batch:
            weights["causal_bits_per_byte"] = jnp.sum(batch["causal_bytes"])
        return weights

    def sums(self, head, outputs: dict, batch: dict, key) -> dict:
        nll, hits = head.nll(
            outputs["hidden"], batch["causal_targets"], batch["causal_weights"], table=outputs.get("table")
        )
        sums = {"causal": nll, "causal_accuracy": hits}
        return sums | ({"causal_bits_per_byte": nll / math.log(2)} if "causal_bytes" in batch else {})

    coefficients = staticmethod(lambda coefficient: {"causal": coefficient})


class Bidirectional:
    """Mean of a forward and a backward LM with one softmax for both (ELMo section 3.1); direction both.

    loss = 0.5 x forward + 0.5 x backward. `samples` > 0 trains with the sampled softmax: unique log-uniform negatives,
    drawn on the host from (seed, step) with the number of tries that it took, shared by the batch and both directions.
    Evaluation always uses the full softmax: leave `samples` 0 there.
    """

    name, directions = "bidirectional", ("both",)
    directions_and_infixes = (("forward", ""), ("backward", "_backward"))

    def __init__(self, settings, tokenizer):
        self.tokenizer = tokenizer
        self.samples = settings.samples
        if self.samples and not self.samples < tokenizer.size:
            raise UserError(
                f"objectives.bidirectional.samples={self.samples} must be below the vocabulary's {tokenizer.size}"
            )
        self.cumulative = None
        if self.samples:
            self.cumulative = np.cumsum(log_uniform_probabilities(tokenizer.size))
            self.cumulative /= self.cumulative[-1]

    def negatives(self, draw: Draw) -> tuple[np.ndarray, np.int32]:
        """(unique ids int32 [samples] in the order of their first draw, number of draws until all were found)."""
        rng = draw.shared("negatives")
        found: np.ndarray = np.empty(0, np.int64)
        while True:
            found = np.concatenate([found, np.searchsorted(self.cumulative, rng.random(2 * self.samples), "right")])
            ids, first = np.unique(found, return_index=True)
            if len(ids) >= self.samples:
                order = np.sort(first)[: self.samples]
                return found[order].astype(np.int32), np.int32(order[-1] + 1)

    def fields(self, rows: dict, draw: Draw) -> dict:
        fields = {}
        if "tokens_backward" not in rows:
            # The row itself, read from its end: the target of its first token is not in the row.
            tokens, length = rows["tokens"], rows["length"][:, None]
            at = np.arange(tokens.shape[1])[None]
            source = np.where(at < length, length - 1 - at, at)
            backward = np.take_along_axis(tokens, source, axis=1)
            following = np.full_like(backward, -1)
            following[:, :-1] = np.where(at[:, :-1] < length - 1, backward[:, 1:], -1)
            fields["tokens_backward"], following_backward = backward, following
        else:
            following_backward = rows["next_tokens_backward"]
        targets, weights = _targets(self.tokenizer, rows["next_tokens"])
        fields |= {"bidirectional_targets": targets, "bidirectional_weights": weights}
        fields |= _bytes(self.tokenizer, "bidirectional_bytes", targets, weights)
        targets, weights = _targets(self.tokenizer, following_backward)
        fields |= {"bidirectional_backward_targets": targets, "bidirectional_backward_weights": weights}
        fields |= _bytes(self.tokenizer, "bidirectional_backward_bytes", targets, weights)
        if self.samples:
            negatives, tries = self.negatives(draw)
            fields["shared"] = {"negatives": negatives, "tries": tries}
        return fields

    def weights(self, batch: dict) -> dict:
        weights = {}
        for direction, infix in self.directions_and_infixes:
            weights[f"bidirectional_{direction}"] = jnp.sum(batch[f"bidirectional{infix}_weights"])
            if f"bidirectional{infix}_bytes" in batch:
                weights[f"bidirectional_{direction}_bits_per_byte"] = jnp.sum(batch[f"bidirectional{infix}_bytes"])
        return weights

    def sums(self, head, outputs: dict, batch: dict, key) -> dict:
        sums = {}
        for direction, infix in self.directions_and_infixes:
            nll, _ = head.nll(
                outputs[direction],
                batch[f"bidirectional{infix}_targets"],
                batch[f"bidirectional{infix}_weights"],
                table=outputs.get("table"),
                shared=batch.get("shared"),
            )
            sums[f"bidirectional_{direction}"] = nll
            if f"bidirectional{infix}_bytes" in batch:
                sums[f"bidirectional_{direction}_bits_per_byte"] = nll / math.log(2)
        return sums

    coefficients = staticmethod(
        lambda coefficient: {"bidirectional_forward": coefficient / 2, "bidirectional_backward": coefficient / 2}
    )


class Masked:
    """-log p(original token | corrupted text) at the chosen positions (BERT section 3.1); direction full.

    round(rate x length) positions, at least one and at most `max_predictions`, specials never; of these `mask` become
    the mask token, `random` a token drawn from the whole vocabulary, the rest stay. `static` draws once for each
    example (the papers' data files, with the layout's duplicates); `whole_word` chooses whole words, as long as they
    fit, and refuses a tokenizer whose pieces do not tell where words begin.
    """

    name, directions = "masked", ("full",)

    def __init__(self, settings, tokenizer):
        self.settings, self.tokenizer = settings, tokenizer
        self.mask_id = tokenizer.role("mask")
        shares = settings.mask + settings.random + settings.keep
        if abs(shares - 1) > 1e-6:
            raise UserError(f"objectives.masked.mask + random + keep = {shares:g} must be 1")
        if settings.whole_word and tokenizer.continuations is None:
            raise UserError(
                f"objectives.masked.whole_word: the {tokenizer.kind!r} tokenizer does not tell where words begin;"
                " use wordpiece"
            )

    def _order(self, rows: dict, scores: np.ndarray) -> np.ndarray:
        """Rank of every position, lowest chosen first; the pieces of a word share their first piece's score."""
        if not self.settings.whole_word:
            return scores
        continues = self.tokenizer.continuations[np.minimum(rows["tokens"], self.tokenizer.size - 1)]
        continues = continues & ~rows["special"]
        continues[:, 0] = False
        # A continuation right after a special token starts a word of its own.
        continues[:, 1:] &= ~rows["special"][:, :-1]
        starts = np.where(continues, 0, np.arange(scores.shape[1])[None])
        first = np.maximum.accumulate(starts, axis=1)
        return np.take_along_axis(scores, first, axis=1)

    def fields(self, rows: dict, draw: Draw) -> dict:
        settings, tokens = self.settings, rows["tokens"]
        n, T = tokens.shape
        P = min(settings.max_predictions, T)
        if settings.static or draw.salt != "train":
            u = draw.fixed_uniforms("masked", rows["example"], 3 * T)
        else:
            u = draw.uniforms("masked", 3 * T)
        u = u.reshape(n, 3, T)
        free = ~rows["special"] & (np.arange(T)[None] < rows["length"][:, None])
        scores = np.where(free, self._order(rows, u[:, 0]), 2.0)
        wanted = np.clip(np.round(settings.rate * rows["length"]).astype(np.int64), 1, P)
        wanted = np.minimum(wanted, free.sum(axis=1))
        # Stable: the pieces of a word, which share a score, stay together and in order.
        order = np.argsort(scores, axis=1, kind="stable")[:, :P]
        chosen = np.arange(P)[None] < wanted[:, None]
        if settings.whole_word:
            chosen &= self._whole(scores, order, chosen)
        positions = np.where(chosen, order, 0)
        originals = np.take_along_axis(tokens, positions, axis=1)
        action = np.take_along_axis(u[:, 1], positions, axis=1)
        anything = (np.take_along_axis(u[:, 2], positions, axis=1) * self.tokenizer.size).astype(tokens.dtype)
        new = np.where(action < settings.mask, self.mask_id, originals)
        new = np.where((action >= settings.mask) & (action < settings.mask + settings.random), anything, new)
        corrupted = tokens.copy()
        row = np.broadcast_to(np.arange(n)[:, None], positions.shape)
        corrupted[row[chosen], positions[chosen]] = new[chosen]
        # Slots in reading order, unused ones last.
        slot = np.argsort(np.where(chosen, positions, T), axis=1, kind="stable")
        positions, chosen, originals = (np.take_along_axis(a, slot, axis=1) for a in (positions, chosen, originals))
        return {
            "tokens": corrupted,
            "masked_positions": positions.astype(np.int32),
            "masked_targets": np.where(chosen, self.tokenizer.target_id(originals), 0).astype(np.int32),
            "masked_weights": chosen.astype(np.float32),
        }

    @staticmethod
    def _whole(scores: np.ndarray, order: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Drops the pieces of a word that is only partly chosen, unless it is the first: then its head stays."""
        ranked = np.take_along_axis(scores, order, axis=1)
        whole = chosen.copy()
        for i, count in enumerate(chosen.sum(axis=1).tolist()):
            if count == 0:
                continue
            last = ranked[i, count - 1]
            size = int((scores[i] == last).sum())
            taken = int((ranked[i, :count] == last).sum())
            if taken < size and taken < count:
                whole[i, count - taken : count] = False
        return whole

    def weights(self, batch: dict) -> dict:
        total = jnp.sum(batch["masked_weights"])
        return {"masked": total, "masked_accuracy": total}

    def sums(self, head, outputs: dict, batch: dict, key) -> dict:
        hidden = jnp.take_along_axis(outputs["hidden"], batch["masked_positions"][..., None], axis=1)
        nll, hits = head.nll(hidden, batch["masked_targets"], batch["masked_weights"], table=outputs.get("table"))
        return {"masked": nll, "masked_accuracy": hits}

    coefficients = staticmethod(lambda coefficient: {"masked": coefficient})


class NextSentence:
    """-log p(B follows A | [CLS]) (BERT section 3.1); direction full, layout pairs.

    Under a causal mask the first position sees nothing, so other directions are refused.
    """

    name, directions = "next_sentence", ("full",)

    def __init__(self, settings, tokenizer):
        pass

    def fields(self, rows: dict, draw: Draw) -> dict:
        if "next_sentence_labels" not in rows:
            raise UserError("objectives.next_sentence needs sentence pairs: data.layout='pairs'")
        return {"next_sentence_weights": (rows["length"] > 0).astype(np.float32)}

    def weights(self, batch: dict) -> dict:
        total = jnp.sum(batch["next_sentence_weights"])
        return {"next_sentence": total, "next_sentence_accuracy": total}

    def sums(self, head, outputs: dict, batch: dict, key) -> dict:
        logits, labels, weights = (
            head.logits(outputs["hidden"]),
            batch["next_sentence_labels"],
            batch["next_sentence_weights"],
        )
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
        hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        return {"next_sentence": -jnp.sum(weights * picked), "next_sentence_accuracy": jnp.sum(weights * hits)}

    coefficients = staticmethod(lambda coefficient: {"next_sentence": coefficient})


OBJECTIVES: dict[str, Callable] = {o.name: o for o in (Causal, Bidirectional, Masked, NextSentence)} | TASK_OBJECTIVES


def make_objectives(config, tokenizer, *, evaluation: bool = False) -> tuple[list, dict[str, float]]:
    """(the objectives of `config.objectives`, {name of a sum: its coefficient in the loss}).

    A group with a `name` "module:function" is an objective of the user's own: function(settings, tokenizer) returns an
    object with this module's interface. evaluation: the full softmax where training samples it.
    """
    objectives, coefficients = [], {}
    for name, settings in config.objectives.items():
        if evaluation and "samples" in settings:
            settings = settings.copy_and_resolve_references().unlock()
            settings.samples = 0
        outside = settings.get("name")
        make = import_from_outside(outside, f"objectives.{name}.name") if outside else OBJECTIVES[name]
        objective = make(settings, tokenizer)
        objectives.append(objective)
        coefficients |= objective.coefficients(settings.coefficient)
    return objectives, coefficients
