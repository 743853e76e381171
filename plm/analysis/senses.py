"""How a word's vector moves with its context: its occurrences in a corpus, clustered, beside its one static vector.

The table of ELMo's example for "play" (table 4 of the paper) for any word and model. What counts:
- An occurrence is a word between spaces that is the word asked for, without case and without punctuation around it; its
  vector is the mean of the word's own pieces. Equal sentences count once. Of more than `most` those with the lowest
  hashes are taken, so that the choice depends on the corpus alone.
- Vectors are brought to length 1; near means a large cosine. A nearest occurrence is always in another sentence.
- Clusters are those of k-means (10 starts). Unless their number is given it is the k from 2 to `most_clusters` with the
  largest mean silhouette (cosine); if that is below `least_silhouette` there is one.
- A cluster's telling words: those within `span` places of its occurrences that most exceed what the word's other
  occurrences have there, by the log of the ratio of shares (with half a count added) times the root of their count.
- The static vector is the model's own input embedding, or that of a GloVe or word2vec file; its neighbours are among
  the `vocabulary` most frequent words of the corpus.

Clusters are what the model tells apart, no more: topics and grammar as well as senses.
"""

import dataclasses
import heapq
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from plm.analysis.features import two_directions
from plm.data import reading, static_vectors
from plm.errors import UserError
from plm.inference import lines
from plm.progress import Progress
from plm.randomness import stable_hash

AROUND = "\"'`.,;:!?()[]{}<>*_-“”‘’…"
KEPT_WORDS = 1_000_000  # distinct words that are counted; beyond, the rarest are forgotten


@dataclasses.dataclass(frozen=True)
class Settings:
    """See the module. layer: of the model, 0 the embedding; clusters: 0 to choose by silhouette; neighbours: nearest
    ones of each; examples: of each cluster in the table."""

    layer: int = -1
    most: int = 500
    clusters: int = 0
    most_clusters: int = 6
    least_silhouette: float = 0.1
    neighbours: int = 3
    examples: int = 2
    span: int = 6
    vocabulary: int = 20_000
    projection: str = "pca"
    seed: int = 0

    def __post_init__(self):
        if self.most < 2 or self.neighbours < 1 or self.examples < 1 or self.clusters < 0:
            raise UserError(
                f"most={self.most} must be at least 2, neighbours={self.neighbours} and examples={self.examples} at"
                f" least 1, clusters={self.clusters} at least 0 (0 chooses)"
            )
        if self.projection not in ("pca", "tsne"):
            raise UserError(f"projection={self.projection!r} must be pca or tsne")


@dataclasses.dataclass(frozen=True)
class Occurrence:
    """words: of the sentence; position: of the word in it; line: of the file, from 1."""

    words: tuple[str, ...]
    position: int
    line: int

    def context(self, span: int) -> tuple[str, str, str]:
        """What stands before, the word itself, what stands behind; cut ends are marked."""
        start, stop = max(self.position - span, 0), self.position + 1 + span
        before, after = self.words[start : self.position], self.words[self.position + 1 : stop]
        left = " ".join(["…"] * (start > 0) + list(before))
        right = " ".join([*after, *["…"] * (stop < len(self.words))])
        return left, self.words[self.position], right


def bare(word: str) -> str:
    return word.strip(AROUND).lower()


def find(path: str, word: str, most: int) -> tuple[list[Occurrence], int, Counter]:
    """(occurrences in the order of the file, how many there are in all, counts of all words without case).

    Errors: UserError when the word does not occur, and for a text that `plm.inference.lines` refuses.
    """
    if len(word.split()) != 1 or not bare(word):
        raise UserError(f"word {word!r}: one word without spaces would be right")
    wanted, facts = bare(word), lines.check(path)
    bar = Progress("looking for the word", facts.bytes, unit="B", enabled=True)
    kept: list = []
    seen: set[int] = set()
    counts: Counter[str] = Counter()
    total = 0
    for line in lines.read(path):
        words = tuple(line.text.split())
        forms = [bare(one) for one in words]
        counts.update(filter(None, forms))
        if len(counts) > KEPT_WORDS:
            counts = Counter(dict(counts.most_common(KEPT_WORDS // 2)))
        if wanted in forms:
            key = stable_hash("occurrence", *words, bits=64)
            if key not in seen:
                seen.add(key)
                for position in (place for place, form in enumerate(forms) if form == wanted):
                    total += 1
                    rank = stable_hash("occurrence", position, *words, bits=64)
                    entry = (-rank, line.number, position, words)
                    (heapq.heappushpop if len(kept) == most else heapq.heappush)(kept, entry)
        bar.add(line.stop - bar.n)
    bar.close()
    if not kept:
        raise UserError(f"the word {word!r} does not occur in {path}")
    found = sorted((number, position, words) for _, number, position, words in kept)
    return [Occurrence(words, position, number + 1) for number, position, words in found], total, counts


def contextual(model, occurrences: Sequence[Occurrence], layer: int) -> np.ndarray:
    """float32 [occurrences, features]: the mean of the pieces of each occurrence's word."""
    texts = [" ".join(one.words) for one in occurrences]
    found: list = [None] * len(texts)
    tokens = model.tokenize(texts)
    bar = Progress("embedding", len(texts), unit="sentences", enabled=True)
    for index, vectors in model.embed_each(texts, layer, "subwords"):
        one = occurrences[index]
        own = np.flatnonzero(tokens[index].word == one.position)
        own = own[_core(model, one.words[one.position], len(own))]
        found[index] = vectors[own].mean(axis=0) if len(own) else np.zeros(vectors.shape[1], np.float32)
        bar.add(1)
    bar.close()
    return np.stack(found)


def _core(model, written: str, n: int) -> slice:
    """Which of the n pieces of a word are its own and not those of the punctuation around it."""
    core = written.strip(AROUND)
    if core == written:
        return slice(0, n)
    # Read together, so that an unknown word has one id in both.
    whole, alone = reading.read(model.tokenizer, [written, core]).ids
    for start in range(len(whole) - len(alone) + 1):
        if np.array_equal(whole[start : start + len(alone)], alone):
            return slice(start, start + len(alone))
    return slice(0, n)  # byte-level pieces that hold a quotation mark and the word


def unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def cluster(vectors: np.ndarray, settings: Settings) -> tuple[np.ndarray, dict[int, float]]:
    """(cluster of each, the largest is 0; {k: mean silhouette} of every k that was tried); vectors of length 1."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    n = len(np.unique(vectors.round(6), axis=0))
    if settings.clusters > n:
        raise UserError(f"--clusters={settings.clusters} of {n} different vectors: at most {n} would be right")
    tried = [settings.clusters] if settings.clusters else range(2, min(settings.most_clusters, n - 1) + 1)
    labels, scores = {1: np.zeros(len(vectors), int)}, {}
    for k in tried:
        if k > 1:
            labels[k] = KMeans(k, n_init=10, random_state=settings.seed).fit_predict(vectors)
            if k < len(vectors):
                scores[k] = float(silhouette_score(vectors, labels[k], metric="cosine"))
    best = settings.clusters or max(scores, key=scores.get, default=1)
    if not settings.clusters and scores.get(best, 0) < settings.least_silhouette:
        best = 1
    order = np.argsort(-np.bincount(labels[best]), kind="stable")
    return np.argsort(order)[labels[best]], scores


def nearest(vectors: np.ndarray, occurrences: Sequence[Occurrence], n: int) -> list[list[tuple[int, float]]]:
    """For each occurrence (index, cosine) of the n nearest in other sentences, best first."""
    similarity = vectors @ vectors.T
    line = np.array([one.line for one in occurrences])
    similarity[line[:, None] == line[None]] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :n]
    return [
        [(int(j), float(similarity[i, j])) for j in row if similarity[i, j] > -np.inf] for i, row in enumerate(order)
    ]


def project(vectors: np.ndarray, settings: Settings) -> tuple[np.ndarray, str]:
    """(points [n, 2], what the axes are)."""
    if settings.projection == "tsne" and len(vectors) > 4:
        from sklearn.manifold import TSNE

        perplexity = min(30, (len(vectors) - 1) / 3)
        points = TSNE(
            2, perplexity=perplexity, metric="cosine", init="random", random_state=settings.seed
        ).fit_transform(vectors)
        return points, f"t-SNE, perplexity {perplexity:.0f}: near is near, far says little"
    points, shares = two_directions(vectors)
    return points, f"two main directions, {100 * shares.sum():.0f}% of the variance"


def telling_words(occurrences: Sequence[Occurrence], labels: np.ndarray, span: int, n: int = 6) -> list[list[str]]:
    """Of each cluster the words around it that most exceed those around the other occurrences; see the module."""
    around = [Counter() for _ in range(labels.max() + 1)]
    for one, label in zip(occurrences, labels, strict=True):
        near = {bare(w) for w in one.words[max(one.position - span, 0) : one.position + span + 1]}
        around[label].update(near - {"", bare(one.words[one.position])})
    sizes = np.bincount(labels)
    everything = sum(around, Counter())
    found = []
    for label, counts in enumerate(around):
        others = len(labels) - sizes[label]

        def weight(word: str, counts=counts, size=sizes[label], others=others) -> float:
            here = (counts[word] + 0.5) / (size + 1)
            there = (everything[word] - counts[word] + 0.5) / (others + 1)
            return math.log(here / there) * math.sqrt(counts[word])

        ranked = sorted((word for word in counts if counts[word] > 1), key=lambda word: (-weight(word), word))
        found.append([word for word in ranked[:n] if weight(word) > 0])
    return found


def static_neighbours(model, word: str, counts: Counter, settings: Settings, path: str, n: int = 10):
    """(where the vector is from, [(word, cosine)] of the nearest words, without the word itself)."""
    word = bare(word)
    ranked = sorted((w for w in counts if w.isalpha() and counts[w] > 1), key=lambda w: (-counts[w], w))
    words = [w for w in ranked[: settings.vocabulary] if w != word]
    if path:
        table = static_vectors.read(path, f"--static={path}")
        if word not in table:
            raise UserError(f"--static={path}: the word {word!r} has no vector there")
        words = [w for w in words if w in table]
        rows = np.stack([table[w] for w in [word, *words]])
        source = Path(path).name
    else:
        rows, source = model.static([word, *words]), "input embedding"
    rows = unit(rows)
    similarity = rows[1:] @ rows[0]
    best = np.argsort(-similarity, kind="stable")[:n]
    return source, [(words[i], float(similarity[i])) for i in best]


def analyse(model, word: str, path: str, settings: Settings, *, static: str = "") -> dict:
    """Everything that is written and drawn, as JSON values: see `tables` and `plm.reporting.sense_picture`."""
    occurrences, total, counts = find(path, word, settings.most)
    source, neighbours = static_neighbours(model, word, counts, settings, static)
    vectors = unit(contextual(model, occurrences, settings.layer))
    labels, silhouettes = cluster(vectors, settings)
    near = nearest(vectors, occurrences, settings.neighbours)
    points, axes = project(vectors, settings)
    telling = telling_words(occurrences, labels, settings.span)
    clusters = []
    for label, words in enumerate(telling):
        members = np.flatnonzero(labels == label)
        centre = unit(vectors[members].mean(axis=0))
        by_centre = members[np.argsort(-(vectors[members] @ centre), kind="stable")]
        same = [labels[j] == label for i in members for j, _ in near[i][:1]]
        clusters.append(
            {
                "size": len(members),
                "telling_words": words,
                "nearest_in_same_cluster": float(np.mean(same)) if same else None,
                "central": [int(i) for i in by_centre],
            }
        )
    rows = [
        {
            "line": one.line,
            "text": " ".join(one.words),
            "position": one.position,
            "context": list(one.context(settings.span)),
            "cluster": int(label),
            "point": [round(float(x), 5) for x in point],
            "nearest": [[j, round(similarity, 4)] for j, similarity in by],
        }
        for one, label, point, by in zip(occurrences, labels, points, near, strict=True)
    ]
    return {
        "word": bare(word),
        "model": model.source,
        "step": model.step,
        "layer": settings.layer % model.n_layers,
        "occurrences_in_text": total,
        "settings": dataclasses.asdict(settings),
        "silhouettes": {str(k): round(score, 4) for k, score in silhouettes.items()},
        "axes": axes,
        "static": {"source": source, "nearest": [[w, round(s, 4)] for w, s in neighbours]},
        "clusters": clusters,
        "occurrences": rows,
    }


def examples(found: dict) -> list[tuple[int, int]]:
    """(cluster, occurrence): the most central ones of each cluster, all with something else in their contexts."""
    chosen = []
    for label, one in enumerate(found["clusters"]):
        contexts: set[tuple] = set()
        for index in one["central"]:
            context = tuple(found["occurrences"][index]["context"])
            if context not in contexts and len(contexts) < found["settings"]["examples"]:
                contexts.add(context)
                chosen.append((label, index))
    return chosen


def markdown(found: dict) -> str:
    """ELMo's table for this word."""
    word, rows = found["word"], found["occurrences"]

    def context(index: int) -> str:
        before, middle, after = (part.replace("|", "\\|") for part in rows[index]["context"])
        return f"{before} **{middle}** {after}".strip()

    nearest_words = ", ".join(w for w, _ in found["static"]["nearest"])
    shown = len(rows)
    count = f"{shown:,}" if shown == found["occurrences_in_text"] else f"{shown:,} of {found['occurrences_in_text']:,}"
    lines_ = [
        f"# {word}",
        "",
        f"{count} occurrences, layer {found['layer']} of {found['model']} (step {found['step']:,}).",
        "",
        "| cluster | occurrences | telling words | nearest occurrence in the same cluster |",
        "| --- | ---: | --- | ---: |",
    ]
    for label, one in enumerate(found["clusters"]):
        share = "" if one["nearest_in_same_cluster"] is None else f"{one['nearest_in_same_cluster']:.0%}"
        lines_.append(f"| {name(label)} | {one['size']} | {', '.join(one['telling_words'])} | {share} |")
    lines_ += ["", "| | source | nearest |", "| --- | --- | --- |"]
    lines_.append(f"| static ({found['static']['source']}) | {word} | {nearest_words} |")
    for label, index in examples(found):
        near = "<br>".join(f"{name(rows[j]['cluster'])}: {context(j)}" for j, _ in rows[index]["nearest"])
        lines_.append(f"| {name(label)} | {context(index)} | {near} |")
    return "\n".join(lines_) + "\n"


def name(label: int) -> str:
    """A, B, C, ..."""
    return chr(ord("A") + label) if label < 26 else str(label + 1)


def table(found: dict) -> list[dict]:
    """A row for each occurrence, for a CSV file."""
    rows = found["occurrences"]
    return [
        {
            "cluster": name(row["cluster"]),
            "line": row["line"],
            "before": row["context"][0],
            "word": row["context"][1],
            "after": row["context"][2],
            "x": row["point"][0],
            "y": row["point"][1],
            "nearest_line": rows[row["nearest"][0][0]]["line"] if row["nearest"] else "",
            "nearest_cosine": row["nearest"][0][1] if row["nearest"] else "",
        }
        for row in rows
    ]


def make_output(path: str) -> Path:
    """The folder for what `write` writes, made if it is not there. Errors: UserError where that cannot be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output={path} can be no folder ({error.strerror}); a folder, or a new name is right"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output={path}: the folder cannot be written; check its permissions")
    return folder


def write(found: dict, folder: Path, say: Callable[[str], None]) -> None:
    """senses.json, senses.md, occurrences.csv, senses.png and senses.svg."""
    import csv

    from plm.reporting.sense_picture import draw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "senses.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")
    (folder / "senses.md").write_text(markdown(found), "utf-8")
    with open(folder / "occurrences.csv", "w", newline="", encoding="utf-8") as file:
        rows = table(found)
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(found, folder)
    for file in ("senses.md", "occurrences.csv", "senses.json", "senses.png", "senses.svg"):
        say(str(folder / file))
