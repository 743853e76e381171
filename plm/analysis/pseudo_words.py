"""Senses without labels: can a contextual vector tell which of two words stood here, when both are written alike?

A pseudo-word joins two words into one written form and so has two known senses (Gale, Church & Yarowsky 1992; Schuetze
1992). Held-out sentences with the one or the other word are written with the same form, a model embeds them, and the
vectors at that position are asked which word it really was.

The rule that picks pairs and sentences (`choose`), fixed before any model is looked at:
- Words are whitespace-separated, all lower-case letters, at least three of them, ranked by frequency in the training
  split (ties by spelling); the first `skip_ranks` ranks, mostly function words, are passed over.
- A sentence counts for a word when the word stands in it exactly once, as a bare word, with `margin` words or more on
  each side, in at most `longest` words; equal sentences count once.
- Going down the ranks, words with at least `fewest` such held-out sentences are paired with the next one: neighbours
  in frequency (one that begins with the same four letters, mostly an inflection, is passed over). Sentences that hold
  both words are left out; both words get the same number of sentences, at most `most`, taken from the documents in
  turn. Pairs that fall below `fewest` are passed over.

The form. Every sentence of a pair is written once with the first word and once with the second, and the two scores are
averaged. So the form is a known, ordinary word for every tokenizer (a glued form such as `wordone` would be cut into
pieces that differ from tokenizer to tokenizer, or become UNK), no word is favoured, and a static vector, which sees
the form alone, is at chance by construction: all its vectors are equal and every comparison is a tie.

The measures, per pair and layer, cosine similarity, ties count half:
- nearest_neighbour: is the nearest other occurrence of the same word? Occurrence i of a word is compared with all
  others except itself and occurrence i of the other word, so that both words have equally many candidates.
- auc: the probability that two occurrences of the same word are nearer than two of different words.
Chance is 0.5 for both. No two occurrences come from one sentence. The pair is the unit: means and bootstrap intervals
are over pairs. `random_init` is the same model before training.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest

import numpy as np
from scipy.stats import rankdata

from plm.analysis.features import two_directions
from plm.randomness import generator, stable_hash
from plm.reporting.statistics import bootstrap_interval

# embed(sentences of words, position of the target word in each) -> {layer name: float32 [n, features]}, layers from
# the bottom to the top.
Embed = Callable[[list[list[str]], list[int]], dict[str, np.ndarray]]

MEASURES = ("nearest_neighbour", "auc")


@dataclass(frozen=True)
class Settings:
    """Numbers of the rule; the module's text says what they mean."""

    skip_ranks: int = 100
    pairs: int = 50
    most: int = 32
    fewest: int = 4
    longest: int = 40
    margin: int = 3


@dataclass(frozen=True)
class Occurrence:
    """A held-out sentence as words, and where the target stands in it."""

    words: tuple[str, ...]
    position: int


@dataclass(frozen=True)
class Pair:
    """Two words of neighbouring frequency and equally many sentences of each."""

    words: tuple[str, str]
    occurrences: tuple[tuple[Occurrence, ...], tuple[Occurrence, ...]]

    @property
    def n(self) -> int:
        """Sentences per word."""
        return len(self.occurrences[0])

    def written_as(self, form: str) -> tuple[list[list[str]], list[int]]:
        """All sentences, the first word's before the second's, with `form` in the target's place."""
        everything = [occurrence for side in self.occurrences for occurrence in side]
        sentences = [[*o.words[: o.position], form, *o.words[o.position + 1 :]] for o in everything]
        return sentences, [o.position for o in everything]


def choose(
    train_documents: Iterable[Sequence[str]],
    held_out_documents: Iterable[Sequence[str]],
    settings: Settings = Settings(),
) -> list[Pair]:
    """The pairs that the rule gives; documents are sequences of sentences. Empty when the text is too small."""
    frequency: Counter[str] = Counter()
    for document in train_documents:
        for sentence in document:
            frequency.update(sentence.split())
    ranked = sorted((word for word in frequency if _plain(word)), key=lambda word: (-frequency[word], word))
    candidates = dict.fromkeys(ranked[settings.skip_ranks :])

    found: dict[str, dict[int, list[Occurrence]]] = defaultdict(lambda: defaultdict(list))
    seen = set()
    for document_index, document in enumerate(held_out_documents):
        for sentence in document:
            words = tuple(sentence.split())
            if len(words) > settings.longest or words in seen:
                continue
            seen.add(words)
            counts = Counter(map(_bare, words))
            for position in range(settings.margin, len(words) - settings.margin):
                word = words[position]
                if word in candidates and counts[word] == 1:
                    found[word][document_index].append(Occurrence(words, position))

    pairs: list[Pair] = []
    waiting = None
    for word in candidates:
        if len(pairs) == settings.pairs:
            break
        if sum(map(len, found[word].values())) < settings.fewest:
            continue
        if waiting is None:
            waiting = word
            continue
        if word[:4] == waiting[:4]:
            continue
        sides = []
        for own, other in ((waiting, word), (word, waiting)):
            alone = {
                index: [o for o in occurrences if all(_bare(w) != other for w in o.words)]
                for index, occurrences in found[own].items()
            }
            sides.append(_in_turn(alone, own))
        n = min(settings.most, *map(len, sides))
        if n >= settings.fewest:
            pairs.append(Pair((waiting, word), (tuple(sides[0][:n]), tuple(sides[1][:n]))))
        waiting = None
    return pairs


def scores(vectors: np.ndarray, n: int) -> dict[str, float]:
    """nearest_neighbour and auc of 2n vectors [2n, features], the first n of the one word, the others of the other."""
    unit = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(unit, axis=1, keepdims=True)
    unit = np.divide(unit, norms, out=np.zeros_like(unit), where=norms > 0)
    # Rounding makes equal vectors tie exactly, whatever order the products were summed in.
    similarity = np.round(unit @ unit.T, 9)
    same = np.zeros((2 * n, 2 * n), bool)
    same[:n, :n] = same[n:, n:] = True
    itself, partner = np.eye(2 * n, dtype=bool), np.roll(np.eye(2 * n, dtype=bool), n, axis=1)
    nearest_same = np.where(same & ~itself, similarity, -np.inf).max(axis=1)
    nearest_other = np.where(~same & ~partner, similarity, -np.inf).max(axis=1)
    nearest = np.mean((nearest_same > nearest_other) + 0.5 * (nearest_same == nearest_other))
    above = np.triu(np.ones_like(same), 1)
    ranks = rankdata(np.concatenate([similarity[above & same], similarity[above & ~same]]))
    n_same, n_other = n * (n - 1), n * n
    auc = (ranks[:n_same].sum() - n_same * (n_same + 1) / 2) / (n_same * n_other)
    return {"nearest_neighbour": float(nearest), "auc": float(auc)}


def evaluate(
    embed: Embed,
    pairs: Sequence[Pair],
    *,
    control: Embed | None = None,
    settings: Settings = Settings(),
) -> tuple[list[dict], dict]:
    """Rows for `results.jsonl` and the record for `senses.json`, for a model and its random-init control.

    Rows: suite `pseudo_words`; metric `<variant>/<measure>/<layer>`, variant `trained`, `random_init`, `static` (layer
    `form`) or `trained-random_init` (the paired difference); value = mean over pairs, n = pairs, low and high = 95%
    bootstrap interval over pairs.

    Record: rule (text), settings, layers (bottom to top), headline_layer (the top one), pairs [{words, n, scores:
    {variant: {layer: {measure: value}}}}], and picture: the pair whose trained auc in the headline layer is the median,
    written as its first word, in the two main directions of its vectors: {words, form, n, layer, truth [2n] of 0 / 1,
    panels: {variant: {points [2n][2], explained [2], nearest_neighbour, auc}}, examples: [[before, after, 0 / 1]]}.
    With no pairs there are no rows, and the record's `reason` says why.
    """
    rule = (
        f"words of the training split from frequency rank {settings.skip_ranks + 1} on, paired with their neighbour in "
        f"rank; {settings.fewest} to {settings.most} held-out sentences each, never both words in one sentence; each "
        "pair is written once as its first and once as its second word"
    )
    record: dict = {"rule": rule, "settings": asdict(settings), "pairs": []}
    if not pairs:
        enough = f"{settings.fewest} or more held-out sentences each"
        record["reason"] = f"the text is too small: no two words of neighbouring frequency stand in {enough}"
        return [], record

    variants = {"trained": embed, "random_init": control, "static": _static}
    vectors = {
        name: _embed_all(function, pairs) for name, function in variants.items() if function is not None
    }  # variant -> layer -> pair -> form -> [2n, features]
    table = {
        name: {
            layer: [
                {m: float(np.mean([s[m] for s in by_form])) for m in MEASURES}
                for by_form in ([scores(x, pair.n) for x in forms] for pair, forms in zip(pairs, blocks, strict=True))
            ]
            for layer, blocks in layers.items()
        }
        for name, layers in vectors.items()
    }

    rows = []

    def add(name: str, layer: str, measure: str, values: list[float]) -> None:
        low, high = bootstrap_interval(np.array(values))
        metric = f"{name}/{measure}/{layer}"
        row = {"suite": "pseudo_words", "metric": metric, "split": "valid", "n": len(values)}
        rows.append(row | {"value": float(np.mean(values)), "low": low, "high": high})

    for name, layers in table.items():
        for layer, by_pair in layers.items():
            for measure in MEASURES:
                values = [pair[measure] for pair in by_pair]
                add(name, layer, measure, values)
                if name == "trained" and layer in table.get("random_init", {}):
                    before = [pair[measure] for pair in table["random_init"][layer]]
                    add("trained-random_init", layer, measure, [a - b for a, b in zip(values, before, strict=True)])

    layers = list(vectors["trained"])
    record |= {"layers": layers, "headline_layer": layers[-1]}
    for index, pair in enumerate(pairs):
        by_variant = {name: {layer: x[index] for layer, x in by.items()} for name, by in table.items()}
        record["pairs"].append({"words": list(pair.words), "n": pair.n, "scores": by_variant})
    record["picture"] = _picture(pairs, vectors, table, layers[-1])
    return rows, record


def _picture(pairs: Sequence[Pair], vectors: dict, table: dict, layer: str) -> dict:
    by_auc = sorted(range(len(pairs)), key=lambda index: table["trained"][layer][index]["auc"])
    chosen = by_auc[(len(pairs) - 1) // 2]
    pair = pairs[chosen]
    panels = {}
    for name in ("trained", "random_init"):
        if layer in vectors.get(name, {}):
            block = vectors[name][layer][chosen][0]
            points, explained = two_directions(_unit(block))
            panels[name] = {"points": points.round(4).tolist(), "explained": explained.round(4).tolist()}
            panels[name] |= scores(block, pair.n)
    examples = [
        [" ".join(o.words[: o.position]), " ".join(o.words[o.position + 1 :]), truth]
        for truth, side in enumerate(pair.occurrences)
        for o in side[:3]
    ]
    truth = [0] * pair.n + [1] * pair.n
    return {
        "words": list(pair.words),
        "form": pair.words[0],
        "n": pair.n,
        "layer": layer,
        "truth": truth,
        "panels": panels,
        "examples": examples,
    }


def _embed_all(embed: Embed, pairs: Sequence[Pair]) -> dict[str, list[list[np.ndarray]]]:
    """layer -> pair -> written form (first, second word) -> [2n, features], from one call of `embed`."""
    sentences, targets = [], []
    for pair in pairs:
        for form in pair.words:
            more_sentences, more_targets = pair.written_as(form)
            sentences += more_sentences
            targets += more_targets
    borders = np.cumsum([2 * pair.n for pair in pairs for _ in pair.words])[:-1]
    result = {}
    for layer, everything in embed(sentences, targets).items():
        if len(everything) != len(sentences):
            raise ValueError(f"layer {layer!r}: {len(everything)} vectors for {len(sentences)} sentences")
        blocks = np.split(np.asarray(everything), borders)
        result[layer] = [blocks[2 * index : 2 * index + 2] for index in range(len(pairs))]
    return result


def _static(sentences: list[list[str]], targets: list[int]) -> dict[str, np.ndarray]:
    """A vector of the written form and of nothing else. Which one does not matter: equal forms, equal vectors."""
    table: dict[str, np.ndarray] = {}
    for words, target in zip(sentences, targets, strict=True):
        if words[target] not in table:
            table[words[target]] = generator("static vector", words[target]).standard_normal(16)
    return {"form": np.stack([table[words[target]] for words, target in zip(sentences, targets, strict=True)])}


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def _in_turn(by_document: dict[int, list[Occurrence]], word: str) -> list[Occurrence]:
    """One occurrence of each document, then a second of each, ...; the order within and between them is by hash."""

    def order(occurrence: Occurrence) -> int:
        return stable_hash("pseudo-word", word, *occurrence.words, bits=64)

    queues = sorted((sorted(o, key=order) for o in by_document.values() if o), key=lambda queue: order(queue[0]))
    return [o for turn in zip_longest(*queues) for o in turn if o is not None]


def _plain(word: str) -> bool:
    return len(word) > 2 and word.isalpha() and word == word.lower()


def _bare(word: str) -> str:
    """The word without case and the punctuation around it: `Word,` also is an occurrence of `word`."""
    return word.strip("\"'`.,;:!?()[]{}<>*_-“”‘’").lower()
