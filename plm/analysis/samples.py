"""What a model writes: held-out sentences continued, and a word of each filled in; the same ones for every run.

The rule that picks them (`choose`), fixed before any model is looked at: in each held-out document the sentences of
`shortest` to `longest` words, of these the one with the lowest hash; then the `number` documents whose sentence hashes
lowest. A continuation gets the first half of the sentence's words as its prompt. For a mask the word is taken out whose
place hashes lowest among the sentence's frequent words: lower-case letters only, three at least, among the `frequent`
most frequent such words of the held-out text, so that most tokenizers have them in one piece.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from plm.inference.filling import MASK
from plm.inference.model import Model
from plm.randomness import stable_hash


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the rule and of the sampling."""

    number: int = 4
    shortest: int = 10
    longest: int = 30
    frequent: int = 500
    tokens: int = 40
    temperature: float = 0.8
    top_k: int = 40
    seed: int = 0
    guesses: int = 5


def choose(documents: Iterable[Sequence[str]], settings: Settings = Settings()) -> list[dict]:
    """[{prompt: first half, masked: sentence with one [MASK], truth: the word}]; documents: held-out, of sentences.

    Sentences without a frequent word are passed over; a text too small gives fewer.
    """
    counts: Counter[str] = Counter()
    best = []
    seen = set()
    for document in documents:
        candidates = []
        for sentence in document:
            words = sentence.split()
            counts.update(word for word in words if _plain(word))
            if settings.shortest <= len(words) <= settings.longest and sentence not in seen and MASK not in sentence:
                seen.add(sentence)
                candidates.append((stable_hash("sample", sentence, bits=64), words))
        if candidates:
            best.append(min(candidates))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    frequent = set(ranked[: settings.frequent])
    chosen = []
    for _, words in sorted(best):
        places = [place for place in range(1, len(words)) if words[place] in frequent]
        if not places:
            continue
        place = min(places, key=lambda place: stable_hash("sample mask", place, *words, bits=64))
        masked = " ".join([*words[:place], MASK, *words[place + 1 :]])
        chosen.append({"prompt": " ".join(words[: len(words) // 2]), "masked": masked, "truth": words[place]})
        if len(chosen) == settings.number:
            break
    return chosen


def make(model: Model, chosen: Sequence[dict], settings: Settings = Settings()) -> list[dict]:
    """Entries of samples.json (`plm.reporting.runs`): continuations of a model that reads forward, or filled masks."""
    if not chosen:
        return []
    if "masked" in model.config.objectives:
        filled = model.fill_mask([one["masked"] for one in chosen], settings.guesses)
        return [
            {
                "kind": "fill_mask",
                "step": model.step,
                "text": one["masked"],
                "masked": [
                    {"truth": one["truth"], "predictions": [[piece.strip(), share] for piece, share in guesses]}
                    for guesses in masks
                ],
            }
            for one, masks in zip(chosen, filled, strict=True)
        ]
    texts = model.generate(
        [one["prompt"] for one in chosen],
        settings.tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
    )
    how = f"temperature {settings.temperature:g}, top-k {settings.top_k}, seed {settings.seed}"
    if model.direction == "both":
        how += ", forward tower"
    return [
        {"kind": "continuation", "step": model.step, "prompt": one["prompt"], "text": text, "settings": how}
        for one, text in zip(chosen, texts, strict=True)
    ]


def _plain(word: str) -> bool:
    return len(word) > 2 and word.isascii() and word.isalpha() and word == word.lower()
