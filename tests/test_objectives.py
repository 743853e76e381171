"""Objectives: which positions, targets and negatives a row gets, from (seed, step, row) alone."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from toys import VOCABULARY, ToyTokenizer

from plm.errors import UserError
from plm.models.heads import log_uniform_probabilities
from plm.training.objectives import Bidirectional, Causal, Draw, Masked, NextSentence, make_objectives

CLS, SEP, MASK = 2, 3, 4
TOKENIZER = ToyTokenizer()
N, T = 400, 40


def rows_of(n: int = N, length: int = T, *, seed: int = 0, low: int = 5) -> dict:
    """[CLS] text [SEP] in rows of T, as a layout gives them; rows of even number are full, odd ones have `length`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(low, VOCABULARY, (n, T)).astype(np.int32)
    lengths = np.where(np.arange(n) % 2, length, T).astype(np.int32)
    tokens[:, 0] = CLS
    tokens[np.arange(n), lengths - 1] = SEP
    at = np.arange(T)[None]
    tokens[at >= lengths[:, None]] = 0
    following = np.full_like(tokens, -1)
    following[:, :-1] = np.where(at[:, 1:] < lengths[:, None], tokens[:, 1:], -1)
    return {
        "tokens": tokens,
        "next_tokens": following,
        "length": lengths,
        "example": np.arange(n, dtype=np.int64) + 1000,
        "special": (at == 0) | (at == lengths[:, None] - 1) | (at >= lengths[:, None]),
    }


def slice_of(rows: dict, start: int, stop: int) -> dict:
    return {name: array[start:stop] for name, array in rows.items()}


def masked(tokenizer=TOKENIZER, **settings) -> Masked:
    values = {"rate": 0.15, "mask": 0.8, "random": 0.1, "keep": 0.1, "max_predictions": 20}
    return Masked(ConfigDict({**values, "static": False, "whole_word": False, **settings}), tokenizer)


def draw(step: int = 0, n: int = N, *, seed: int = 7, start: int = 0, salt: str = "train") -> Draw:
    return Draw(seed, step, range(start, start + n), salt)


def chosen_of(fields: dict) -> np.ndarray:
    """bool [n, T]: the positions that are predicted."""
    chosen = np.zeros(fields["tokens"].shape, bool)
    row, slot = np.nonzero(fields["masked_weights"])
    chosen[row, fields["masked_positions"][row, slot]] = True
    return chosen


# Masking


def test_eighty_ten_ten():
    rows = rows_of()
    counts = np.zeros(3)
    for step in range(5):
        fields = masked().fields(rows, draw(step))
        before, after = rows["tokens"][chosen_of(fields)], fields["tokens"][chosen_of(fields)]
        counts += [(after == MASK).sum(), ((after != MASK) & (after != before)).sum(), (after == before).sum()]
    n = counts.sum()
    assert n == 5 * N * 6
    # A random token is the old one with probability 1 / V, and [MASK] too: they count as kept and as masked.
    wanted = np.array([0.8 + 0.1 / VOCABULARY, 0.1 - 0.2 / VOCABULARY, 0.1 + 0.1 / VOCABULARY])
    assert np.all(np.abs(counts / n - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / n)), counts / n


def test_random_tokens_come_from_the_whole_vocabulary_and_positions_from_the_whole_row():
    rows = rows_of()
    fields = masked(mask=0.0, random=1.0, keep=0.0).fields(rows, draw())
    seen = np.bincount(fields["tokens"][chosen_of(fields)], minlength=VOCABULARY)
    assert seen.min() > 0
    assert seen.max() < 3 * N * 6 / VOCABULARY
    where = chosen_of(fields).sum(axis=0)
    assert where[1:-1].min() > 0.5 * where[1:-1].mean()


@pytest.mark.parametrize("static", [False, True])
def test_specials_and_padding_are_never_chosen_and_the_rest_stays(static):
    rows = rows_of(length=11)
    fields = masked(rate=0.9, max_predictions=40, static=static).fields(rows, draw())
    chosen = chosen_of(fields)
    assert not np.any(chosen & rows["special"])
    assert np.array_equal(fields["tokens"][~chosen], rows["tokens"][~chosen])
    np.testing.assert_array_equal(chosen[0::2].sum(axis=1), 36)
    np.testing.assert_array_equal(chosen[1::2].sum(axis=1), 9)  # round(0.9 x 11) = 10, but 9 are free
    positions, weights = fields["masked_positions"], fields["masked_weights"]
    for row in range(0, N, 37):
        used = positions[row, weights[row] > 0]
        assert np.all(np.diff(used) > 0)
        np.testing.assert_array_equal(fields["masked_targets"][row, weights[row] > 0], rows["tokens"][row, used])
    assert np.all(positions[weights == 0] == 0)
    assert np.all(fields["masked_targets"][weights == 0] == 0)


@pytest.mark.parametrize(
    ("rate", "length", "limit", "count"),
    [(0.15, 40, 20, 6), (0.15, 4, 20, 1), (0.01, 40, 20, 1), (0.5, 40, 7, 7), (0.15, 17, 20, 3)],
)
def test_counts_are_rounded_at_least_one_and_capped(rate, length, limit, count):
    fields = masked(rate=rate, max_predictions=limit).fields(rows_of(20, length), draw(n=20))
    assert fields["masked_positions"].shape == (20, min(limit, T))
    np.testing.assert_array_equal(fields["masked_weights"][1::2].sum(axis=1), count)


def test_rows_that_only_pad_have_no_predictions():
    rows = rows_of(4)
    rows["length"][2], rows["special"][2] = 0, True
    assert masked().fields(rows, draw(n=4))["masked_weights"].sum(axis=1).tolist() == [6, 6, 0, 6]


def test_dynamic_masks_change_with_the_step_and_static_ones_follow_the_example():
    rows = rows_of(50)
    first, second = (chosen_of(masked().fields(rows, draw(step, 50))) for step in (0, 1))
    assert np.mean(np.all(first == second, axis=1)) < 0.1
    fields = [masked(static=True).fields(rows, draw(step, 50)) for step in (0, 9)]
    for name in fields[0]:
        np.testing.assert_array_equal(fields[0][name], fields[1][name])
    # The same examples elsewhere in the batch, in another order.
    order = np.random.default_rng(1).permutation(50)
    moved = masked(static=True).fields({k: v[order] for k, v in rows.items()}, draw(3, 50, start=100))
    np.testing.assert_array_equal(moved["tokens"], fields[0]["tokens"][order])
    other = masked(static=True).fields(rows | {"example": rows["example"] + 1000}, draw(0, 50))
    assert np.mean(np.all(chosen_of(other) == chosen_of(fields[0]), axis=1)) < 0.1


def test_held_out_masks_depend_on_the_example_only():
    rows = rows_of(12)
    whole = masked().fields(rows, draw(0, 12, salt="eval"))
    half = masked().fields(slice_of(rows, 6, 12), draw(1, 6, salt="eval"))
    np.testing.assert_array_equal(whole["tokens"][6:], half["tokens"])
    assert not np.array_equal(whole["tokens"], masked(static=True).fields(rows, draw(0, 12))["tokens"])


def test_whole_words():
    # Ids from 40 on continue the word before them.
    rows = rows_of(low=20)
    objective = masked(whole_word=True, rate=0.3)
    chosen = chosen_of(objective.fields(rows, draw()))
    assert chosen.any(axis=1).all()
    assert np.all(chosen.sum(axis=1) <= 12)
    assert chosen.sum() > 0.8 * 12 * N
    continues = (rows["tokens"] >= 40) & ~rows["special"]
    continues[:, 1] = False  # after [CLS] a word begins, whatever its piece
    together = continues[:, 1:]
    np.testing.assert_array_equal(chosen[:, 1:][together], chosen[:, :-1][together])
    pieces = masked(rate=0.3).fields(rows, draw())
    split = chosen_of(pieces)
    assert np.any(split[:, 1:][together] != split[:, :-1][together])


def test_whole_words_need_a_tokenizer_that_knows_them():
    class Blind(ToyTokenizer):
        continuations, kind = None, "byte_bpe"

    masked(Blind())
    with pytest.raises(UserError, match="whole_word: the 'byte_bpe' tokenizer does not tell where words begin"):
        masked(Blind(), whole_word=True)


def test_shares_must_add_up():
    with pytest.raises(UserError, match=r"mask \+ random \+ keep = 1\.1 must be 1"):
        masked(keep=0.2)


# Slices and names


class Lossless(ToyTokenizer):
    byte_lengths = np.arange(VOCABULARY, dtype=np.int32) % 7


def every_objective(tokenizer):
    settings = ConfigDict({"samples": 12})
    objectives = [Causal({}, tokenizer), Bidirectional(settings, tokenizer), masked(tokenizer)]
    return [*objectives, masked(tokenizer, static=True), NextSentence(None, tokenizer)]


@pytest.mark.parametrize("start", [0, 1, 13])
def test_a_slice_of_the_rows_is_the_slice_of_the_whole(start):
    rows = rows_of(20) | {"next_sentence_labels": np.arange(20, dtype=np.int32) % 2}
    for objective in every_objective(Lossless()):
        whole = objective.fields(dict(rows), draw(4, 20))
        part = objective.fields(slice_of(rows, start, start + 5), draw(4, 5, start=start))
        assert whole.keys() == part.keys()
        for name, array in whole.items():
            if name == "shared":
                for shared in array:
                    np.testing.assert_array_equal(array[shared], part[name][shared])
            else:
                np.testing.assert_array_equal(array[start : start + 5], part[name], err_msg=name)
                assert array.dtype in (np.int32, np.float32), name


class Head:
    """The interface of both heads, with scores that come from nothing."""

    def nll(self, x, targets, weights, *, table=None, shared=None):
        return jnp.sum(weights * 2.0), jnp.sum(weights * 0.5)

    def logits(self, x):
        return jnp.stack([x[:, 0, 0], -x[:, 0, 0]], axis=-1)


@pytest.mark.parametrize("tokenizer", [ToyTokenizer(), Lossless()])
def test_sums_and_weights_have_the_same_names_and_coefficients_are_among_them(tokenizer):
    rows = rows_of(6, 30) | {"next_sentence_labels": np.arange(6, dtype=np.int32) % 2}
    x = jnp.ones((6, T, 3))
    for objective in every_objective(tokenizer):
        batch = rows | objective.fields(dict(rows), draw(0, 6))
        weights = objective.weights(batch)
        sums = objective.sums(Head(), {"hidden": x, "forward": x, "backward": x}, batch, None)
        assert weights.keys() == sums.keys()
        assert objective.coefficients(3.0).keys() <= sums.keys()
        assert sum(objective.coefficients(3.0).values()) == 3.0
        for array in (*weights.values(), *sums.values()):
            assert jnp.shape(array) == ()
        assert any("bits" in name for name in sums) == (
            isinstance(objective, Causal | Bidirectional) and isinstance(tokenizer, Lossless)
        )


def test_weights_count_the_targets_and_bytes_the_text():
    rows = rows_of(6, 30)
    batch = Causal({}, Lossless()).fields(rows, draw(0, 6))
    weights = Causal({}, Lossless()).weights(batch)
    assert float(weights["causal"]) == rows["length"].sum() - 6
    targets = rows["next_tokens"][rows["next_tokens"] >= 0]
    assert float(weights["causal_bits_per_byte"]) == Lossless.byte_lengths[targets].sum()
    sums = Causal({}, Lossless()).sums(Head(), {"hidden": jnp.ones((6, T, 3))}, batch, None)
    np.testing.assert_allclose(sums["causal_bits_per_byte"], 2 * weights["causal"] / math.log(2), rtol=1e-6)


def test_open_ids_are_closed_in_targets():
    rows = rows_of(2)
    rows["tokens"][0, 5] = rows["next_tokens"][0, 4] = VOCABULARY + 9
    assert Causal({}, TOKENIZER).fields(rows, draw(0, 2))["causal_targets"][0, 4] == TOKENIZER.role("unk")
    everything = masked(rate=1.0, max_predictions=T).fields(rows, draw(0, 2))
    assert everything["masked_targets"][0, 4] == TOKENIZER.role("unk")  # position 5 is the fifth that is free


# Bidirectional


def test_the_backward_row_is_the_row_from_its_end():
    rows = rows_of(4, 9)
    fields = Bidirectional(ConfigDict({"samples": 0}), TOKENIZER).fields(rows, draw(0, 4))
    assert "shared" not in fields
    for row in range(4):
        n = int(rows["length"][row])
        backward = rows["tokens"][row, :n][::-1]
        np.testing.assert_array_equal(fields["tokens_backward"][row, :n], backward)
        np.testing.assert_array_equal(fields["bidirectional_backward_targets"][row, : n - 1], backward[1:])
        np.testing.assert_array_equal(
            fields["bidirectional_backward_weights"][row], (np.arange(T) < n - 1).astype(np.float32)
        )
        np.testing.assert_array_equal(fields["bidirectional_targets"][row, : n - 1], rows["tokens"][row, 1:n])


def test_a_backward_stream_of_the_layout_is_taken_as_it_is():
    rows = rows_of(3)
    stream = {"tokens_backward": rows["tokens"] + 1, "next_tokens_backward": rows["next_tokens"]}
    fields = Bidirectional(ConfigDict({"samples": 0}), TOKENIZER).fields(rows | stream, draw(0, 3))
    assert "tokens_backward" not in fields
    np.testing.assert_array_equal(fields["bidirectional_backward_targets"], np.maximum(rows["next_tokens"], 0))


def test_negatives_are_unique_log_uniform_and_know_their_number_of_tries():
    size, samples, steps = VOCABULARY, 10, 3000
    objective = Bidirectional(ConfigDict({"samples": samples}), TOKENIZER)
    counts, tries = np.zeros(size), []
    for step in range(steps):
        negatives, n = objective.negatives(draw(step))
        assert len(np.unique(negatives)) == samples == len(negatives)
        assert n >= samples
        counts += np.bincount(negatives, minlength=size)
        tries.append(int(n))
    p = log_uniform_probabilities(size)
    assert abs(p.sum() - 1) < 1e-9
    assert np.all(np.diff(counts[:6]) < 0)
    # The first draw of a step is log-uniform itself; later ones are given that they are new.
    first = np.bincount([objective.negatives(draw(step))[0][0] for step in range(steps)], minlength=size) / steps
    assert np.all(np.abs(first - p) < 4.5 * np.sqrt(p * (1 - p) / steps))
    # What the correction relies on: in n draws an id is seen with probability 1 - (1 - p)^n.
    expected = np.mean([-np.expm1(n * np.log1p(-p)) for n in tries], axis=0)
    np.testing.assert_allclose(counts / steps, expected, atol=0.04)
    again = objective.negatives(draw(5))
    np.testing.assert_array_equal(again[0], objective.negatives(draw(5, n=3, start=90))[0])


def test_as_many_negatives_as_words_are_refused():
    with pytest.raises(UserError, match="samples=50 must be below the vocabulary's 50"):
        Bidirectional(ConfigDict({"samples": VOCABULARY}), TOKENIZER)


def test_evaluation_uses_the_full_softmax():
    config = ConfigDict({"objectives": {"bidirectional": {"coefficient": 2.0, "samples": 8}}})
    training, coefficients = make_objectives(config, TOKENIZER)
    evaluation, same = make_objectives(config, TOKENIZER, evaluation=True)
    assert (training[0].samples, evaluation[0].samples, config.objectives.bidirectional.samples) == (8, 0, 8)
    assert coefficients == same == {"bidirectional_forward": 1.0, "bidirectional_backward": 1.0}


# Next sentence


def test_next_sentence_needs_pairs():
    with pytest.raises(UserError, match=r"next_sentence needs sentence pairs: data.layout='pairs'"):
        NextSentence(None, TOKENIZER).fields(rows_of(2), draw(0, 2))


def test_next_sentence_counts_real_rows():
    objective = NextSentence(None, TOKENIZER)
    rows = {"length": np.array([9, 0, 4], np.int32), "next_sentence_labels": np.array([0, 0, 1], np.int32)}
    batch = {name: jnp.asarray(array) for name, array in (rows | objective.fields(rows, draw(0, 3))).items()}
    x = jnp.asarray([1.0, 5.0, 1.0])[:, None, None] * jnp.ones((3, 2, 4))
    sums = objective.sums(Head(), {"hidden": x}, batch, None)
    assert float(objective.weights(batch)["next_sentence"]) == 2.0
    assert float(sums["next_sentence_accuracy"]) == 1.0
    np.testing.assert_allclose(sums["next_sentence"], np.log1p(np.exp(-2.0)) + np.log1p(np.exp(2.0)), rtol=1e-6)
