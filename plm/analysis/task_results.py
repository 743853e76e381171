"""From what a model predicts of a task's rows to answers, and from answers to metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plm.analysis import task_metrics
from plm.analysis.span_decoding import Decoded, WindowLogits, decode
from plm.data.task_rows import TaskSplit
from plm.training.config import OBJECTIVE_OF_KIND


def answers(split: TaskSplit, predicted: Mapping[int, np.ndarray]) -> list[Any]:
    """One prediction for each example of the split, as `task_metrics` takes them; of spans `Decoded`.

    predicted: item -> the objective's prediction of it, every item of the split.
    """
    kind = split.task.task.kind
    if len(predicted) != split.n_items:
        raise ValueError(f"{len(predicted)} predictions for {split.n_items} items")
    if kind == "span":
        return _decoded(split, predicted)
    if kind == "tagging":
        return _tags(split, predicted)
    ordered = [predicted[item] for item in range(split.n_items)]
    if kind == "similarity":
        return [float(scores[0]) for scores in ordered]
    return [int(np.argmax(scores)) for scores in ordered]


def _tags(split: TaskSplit, predicted: Mapping[int, np.ndarray]) -> list[tuple[int, ...]]:
    """The tags of each example's words, of all its rows."""
    found: list[tuple[int, ...]] = [()] * len(split.examples)
    counts = np.diff(split.arrays["tag_offsets"]).tolist()
    for item, (example, count) in enumerate(zip(split.arrays["item_example"].tolist(), counts, strict=True)):
        found[example] += tuple(map(int, predicted[item][:count]))
    return found


def _decoded(split: TaskSplit, predicted: Mapping[int, np.ndarray]) -> list[Decoded]:
    arrays = split.arrays
    rows: list[list[WindowLogits]] = [[] for _ in split.examples]
    for item, example in enumerate(arrays["item_example"].tolist()):
        start, end = predicted[item].T
        window = tuple(map(int, arrays["windows"][item]))
        rows[example].append(WindowLogits(start, end, window, int(arrays["offset"][item])))
    borders = arrays["piece_offsets"]
    return [
        decode(own, example.texts[1], arrays["piece_spans"][borders[number] : borders[number + 1]])
        for number, (own, example) in enumerate(zip(rows, split.examples, strict=True))
    ]


def null_threshold(split: TaskSplit, decoded: Sequence[Decoded]) -> float | None:
    """Above which null odds a question counts as unanswerable, best for this split; None where every one has an answer.

    To be chosen on the split that settings are selected by, and applied to the one that is reported.
    """
    if not split.task.task.unanswerable:
        return None
    texts, odds = [one.text for one in decoded], [one.null_odds for one in decoded]
    return task_metrics.best_null_threshold(split.examples, texts, odds, split.task.task.metrics[0])[0]


def final(split: TaskSplit, found: Sequence[Any], threshold: float | None = None) -> list[Any]:
    """Predictions of `answers` with the texts of spans decided."""
    return [one.answer(threshold) for one in found] if split.task.task.kind == "span" else list(found)


def score(split: TaskSplit, predictions: Sequence[Any]) -> dict[str, float]:
    """{metric: value} of the task's metrics."""
    return task_metrics.score(split.task.task, split.examples, predictions, split.task.labels)


def measure(split: TaskSplit, predictions: Mapping[str, Mapping[int, np.ndarray]]) -> dict[str, float]:
    """The task's metrics of what the objectives predict, {objective: {item: prediction}}; a null threshold is the best
    for this very split, so that it is for selection only."""
    found = answers(split, predictions[OBJECTIVE_OF_KIND[split.task.task.kind]])
    threshold = null_threshold(split, found) if split.task.task.kind == "span" else None
    return score(split, final(split, found, threshold))
