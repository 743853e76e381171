"""Continuing texts, piece by piece, with what was read before kept on the device."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from plm.errors import UserError
from plm.inference import batches
from plm.models.graph import ModelGraph
from plm.randomness import generator

ROWS = 64  # prompts that are continued together on a device


@dataclasses.dataclass(frozen=True)
class Options:
    """See `Model.generate`. Errors: UserError for a value out of range."""

    tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...]

    def __post_init__(self):
        if self.tokens < 1 or not 0 <= self.temperature < float("inf") or self.top_k < 0:
            raise UserError(
                f"tokens={self.tokens} must be at least 1, temperature={self.temperature:g} and top_k={self.top_k} at"
                " least 0"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p:g} must be above 0 and at most 1 (all pieces)")
        if not all(isinstance(one, str) and one for one in self.stop):
            raise UserError(f"stop={list(self.stop)!r} must be strings that are not empty")


def generate(model, prompts: Sequence[str], options: Options) -> list[str]:
    """See `Model.generate`."""
    if model.head == "masked":
        raise UserError(
            f"{model.source} was trained to fill masks (direction={model.direction!r}) and cannot continue a text:"
            " use fill_mask, or a causal or bidirectional model"
        )
    tokenizer, roles = model.tokenizer, model.tokenizer.roles
    encoded, open_words = tokenizer.encode_open(prompts)
    for text, ids in zip(prompts, encoded, strict=True):
        if not ids and not model.frame[0] and "eod" not in roles:
            raise UserError(f"prompt {text!r} holds nothing for the tokenizer to read: give some text")
    texts = [[*model.frame[0], *ids] or [roles["eod"]] for ids in encoded]
    made: list[list[int]] = []
    group = ROWS * batches.mesh().size
    for first in range(0, len(texts), group):
        part = texts[first : first + group]
        draws = [generator(options.seed, "generate", row) for row in range(first, first + len(part))]
        made += _continue(model, part, draws, open_words, options)
    return [_written(tokenizer, before, after, options.stop) for before, after in zip(encoded, made, strict=True)]


def _continue(model, texts: list[list[int]], draws: list, open_words: list[str], options: Options) -> list[list[int]]:
    """The new ids of each text; texts holds framed ids."""
    tokenizer, roles = model.tokenizer, model.tokenizer.roles
    ends = {roles[role] for role in ("eos", "eod") if role in roles}
    never = np.array([i for role, i in roles.items() if i not in ends], np.int64)
    # So many pieces hold every stop string that the newest one completes: a piece has a byte of text at least.
    tail = max((len(one.encode()) for one in options.stop), default=0) + 4
    longest = model.longest
    windows = [text[-longest:] if longest else list(text) for text in texts]
    memory = _Memory(model, max(map(len, windows)) + options.tokens, open_words)
    new: list[list[int]] = [[] for _ in texts]
    going = set(range(len(texts)))
    scores = memory.read(windows)
    for step in range(options.tokens):
        scores[:, never] = -np.inf
        for row in sorted(going):
            token = draw(scores[row], options, draws[row])
            if token in ends:
                going.discard(row)
                continue
            new[row].append(token)
            if any(one in tokenizer.decode(new[row][-tail:]) for one in options.stop):
                going.discard(row)
        if not going or step + 1 == options.tokens:
            break
        full = [row for row in going if len(windows[row]) == longest]
        for row in full:
            windows[row] = windows[row][longest // 2 :]
        for row in going:
            windows[row].append(new[row][-1])
        scores = memory.read(windows) if full else memory.go_on(windows, going)
    return new


def draw(scores: np.ndarray, options: Options, rng: np.random.Generator) -> int:
    """An id by scores [vocabulary]; -inf is never drawn."""
    if options.temperature == 0:
        return int(scores.argmax())
    scores = scores.astype(np.float64) / options.temperature
    if options.top_k and options.top_k < len(scores):
        scores[scores < np.partition(scores, -options.top_k)[-options.top_k]] = -np.inf
    shares = np.exp(scores - scores.max())
    if options.top_p < 1:
        order = np.argsort(-shares, kind="stable")
        sums = np.cumsum(shares[order])
        shares[order[np.searchsorted(sums, options.top_p * sums[-1]) + 1 :]] = 0
    cumulative = np.cumsum(shares)
    return min(int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")), len(scores) - 1)


def _written(tokenizer, before: list[int], after: list[int], stop: Sequence[str]) -> str:
    """The text of `after` as it stands behind that of `before`, its leading space included, up to a stop string."""
    head, whole = tokenizer.decode(before), tokenizer.decode([*before, *after])
    text = whole[len(head) :] if whole.startswith(head) else " " + tokenizer.decode(after)
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


class _Memory:
    """Scores of what comes next for rows of ids, with the model's cache of what it has read.

    Two compiled programs, of one width of prompt and of one token, whatever is generated. A model from outside the
    package without `initial_cache` reads its rows again for every token.
    """

    def __init__(self, model, length: int, open_words: list[str]):
        self.model, self.open_words = model, open_words
        self.slots = batches.bucket(length, model.longest)
        self.keeps = hasattr(model.graph.bind(model.params), "initial_cache")
        self.cache = None

    def read(self, windows: list[list[int]]) -> np.ndarray:
        """float32 [rows, vocabulary] behind each row, read from its beginning."""
        n = batches.padded_rows(len(windows))
        width = batches.bucket(max(map(len, windows)), self.model.longest) if self.keeps else self.slots
        batch = self.model.batch(windows, n, width, self.open_words)
        slots = self.slots if self.keeps else 0
        scores, self.cache = self.model.run(_read_program, batch, head=self.model.head, slots=slots)
        return np.array(scores[: len(windows)])

    def go_on(self, windows: list[list[int]], going: set[int]) -> np.ndarray:
        """The same when the rows in `going` have one more id than before; the other rows' scores mean nothing."""
        if not self.keeps:
            return self.read(windows)
        n = batches.padded_rows(len(windows))
        batch = self.model.batch([[window[-1]] for window in windows], n, 1, self.open_words)
        start = np.zeros(n, np.int32)
        for row in going:
            start[row] = len(windows[row]) - 1
        scores, self.cache = self.model.run(
            _next_program, batch | {"start": start}, self.cache, donate=(2,), head=self.model.head
        )
        return np.array(scores[: len(windows)])


def _read_program(graph: ModelGraph, head: str, slots: int) -> Callable:
    """slots: places of the cache, 0 for none."""

    def program(params, batch):
        model = graph.bind(params)
        B = batch["length"].shape[0]
        carry = {}
        if slots:
            carry = {"forward": model.initial_cache(B, slots)}
            batch = batch | {"start": jnp.zeros(B, jnp.int32)}
        outputs, after = model(batch, carry)
        last = (batch["length"] - 1)[:, None]
        return _scores(model, head, outputs, last), after.get("forward")

    return program


def _next_program(graph: ModelGraph, head: str) -> Callable:
    def program(params, batch, cache):
        model = graph.bind(params)
        outputs, after = model({k: v for k, v in batch.items() if k != "length"}, {"forward": cache})
        last = jnp.zeros((batch["start"].shape[0], 1), jnp.int32)
        return _scores(model, head, outputs, last), after["forward"]

    return program


def _scores(model, head: str, outputs: dict, last_Bx1: jax.Array) -> jax.Array:
    hidden = outputs["forward"] if "forward" in outputs else outputs["hidden"]
    return model.heads[head].logits(jnp.take_along_axis(hidden, last_Bx1[..., None], axis=1))[:, 0]
