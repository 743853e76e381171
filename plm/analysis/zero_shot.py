"""Tasks without training: the heuristics of the GPT paper (Radford et al. 2018, section 5, figure 2 right).

| rule          | tasks           | prediction                                                                        |
| ------------- | --------------- | --------------------------------------------------------------------------------- |
| sentiment     | `sst2`          | " very" is appended; the likelier one of the next words "positive" and "negative" |
| acceptability | `cola`          | mean log-probability of the pieces above a threshold                              |
| answers       | multiple choice | the choice with the highest mean log-probability of its pieces, after the text    |

The paper names no threshold; here it is the one with the best Matthews correlation on the part that selects. The paper
keeps only the two words' probabilities, so the rest of the vocabulary does not matter. A word of several pieces has the
product of theirs. The rules are made for models that read forward; of two towers the forward one is asked, and of a
masked model the pseudo-log-likelihood of the same words stands in, each piece masked with those behind it in its word.
A text longer than the model's positions is read in windows: the pieces that are scored have at least half of a window
before them. The paper's fourth rule (Winograd schemas) has no task here.

Because a rule's threshold between classes may be far off where its order is not (a model may find "positive" likelier
everywhere), rules with two classes also give `auc`: the share of pairs of one example of each class in the right order.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from sklearn.metrics import matthews_corrcoef, roc_auc_score

from plm.analysis import task_metrics
from plm.analysis.results import Table, row
from plm.data.examples import Example
from plm.data.tasks import TaskData
from plm.errors import UserError

SENTIMENT = ("negative", "positive")  # what class 0 and class 1 are called
CHUNK = 2048  # examples scored together: the last batches of each chunk have shapes of their own

Done = Callable[[int], None]


def rule_of(data: TaskData) -> str:
    """Errors: UserError for a task without a rule."""
    if data.task.kind == "choice":
        return "answers"
    if data.name in _RULES:
        return _RULES[data.name]
    raise UserError(
        f"suite zero_shot has no rule for task {data.name!r} ({data.task.kind}): sst2, cola and choices have"
    )


def measure(model, data: TaskData, done: Done = lambda n: None) -> dict[str, float]:
    """{metric: value} on the second part of `TaskData.selection_and_report`. done: is told of every example scored.

    Nothing is trained; only acceptability's threshold is chosen, on the first part. Beside the task's metrics, of rules
    with two classes: `auc`, and `said_1`, the share of examples that got class 1.
    """
    rule = rule_of(data)
    (_, selection), (_, report) = data.selection_and_report()
    if rule == "answers":
        return _score(data, report, answers(model, report, done))
    scores = sentiment if rule == "sentiment" else acceptability
    of_report, at = scores(model, report, done), 0.0
    if rule == "acceptability":
        at = best_threshold(scores(model, selection, done), _labels(selection))
    said = of_report > at
    auc = roc_auc_score(_labels(report), of_report)
    return _score(data, report, said.astype(int).tolist()) | {"auc": float(auc), "said_1": float(said.mean())}


def summary(data: TaskData, found: Mapping[str, Mapping[str, float]]) -> tuple[list[dict], Table]:
    """(rows, table) of {"trained": as `measure` gives it, "random_init": ...}.

    Metrics: `TASK/MODEL/METRIC`, and `TASK/chance/METRIC`: of classes always the commonest one, of choices the mean of
    1 / their number.
    """
    _, (split, report) = data.selection_and_report()
    found = {**found, "chance": _chance(data, report)}
    rows = [
        row(f"{data.name}/{name}/{metric}", split, len(report), value)
        for name, values in found.items()
        for metric, value in values.items()
    ]
    metrics = list(dict.fromkeys(metric for values in found.values() for metric in values))
    body = [[name, *(values.get(metric) for metric in metrics)] for name, values in found.items()]
    title = f"Zero-shot {data.name} ({rule_of(data)}), {split}: {len(report):,} examples"
    return rows, Table(title, ["model", *metrics], body)


def n_scored(data: TaskData) -> int:
    """Examples that one model is asked about."""
    (_, selection), (_, report) = data.selection_and_report()
    return len(report) + (len(selection) if rule_of(data) == "acceptability" else 0)


# --------------------------------------------------------------------------------------------------------------- rules


def sentiment(model, examples: Sequence[Example], done: Done = lambda n: None) -> np.ndarray:
    """float64 [n]: log P(positive | text very) - log P(negative | text very)."""
    stems = [f"{example.texts[0]} very" for example in examples]
    texts = [f"{stem} {word}" for stem in stems for word in SENTIMENT]
    from_word = [len(stem.split()) for stem in stems for _ in SENTIMENT]
    sums = [pieces.sum() for pieces in _pieces(model, texts, from_word, len(SENTIMENT), done)]
    return np.array(sums).reshape(-1, 2) @ [-1.0, 1.0]


def acceptability(model, examples: Sequence[Example], done: Done = lambda n: None) -> np.ndarray:
    """float64 [n]: the mean log-probability of the text's pieces."""
    texts = [example.texts[0] for example in examples]
    return np.array([_mean(pieces) for pieces in _pieces(model, texts, [0] * len(texts), 1, done)])


def answers(model, examples: Sequence[Example], done: Done = lambda n: None) -> list[int]:
    """The choice with the highest mean log-probability given the text and the question; of equal ones the first."""
    predictions = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        stems = [" ".join(example.texts) for example in chunk]
        texts = [f"{stem} {choice}" for stem, one in zip(stems, chunk, strict=True) for choice in one.choices]
        from_word = [len(stem.split()) for stem, one in zip(stems, chunk, strict=True) for _ in one.choices]
        means = iter([_mean(pieces) for pieces in _pieces(model, texts, from_word, len(texts), lambda n: None)])
        predictions += [int(np.argmax([next(means) for _ in one.choices])) for one in chunk]
        done(len(chunk))
    return predictions


def best_threshold(scores: np.ndarray, labels: Sequence[int]) -> float:
    """The threshold above which class 1 has the best Matthews correlation, halfway between two neighbouring scores; of
    equally good ones the lowest."""
    ranked = np.unique(scores)
    candidates = np.concatenate([ranked[:1] - 1, (ranked[1:] + ranked[:-1]) / 2])
    # At most 1,000 of them: what is between two quantiles makes no difference that could be told on a test set.
    candidates = candidates[np.unique(np.linspace(0, len(candidates) - 1, 1000).astype(int))]
    return float(max(candidates, key=lambda at: (matthews_corrcoef(labels, scores > at), -at)))


_RULES = {"sst2": "sentiment", "cola": "acceptability"}


def _pieces(model, texts: Sequence[str], from_word: Sequence[int], of_example: int, done: Done) -> list[np.ndarray]:
    """The log-probabilities of each text's pieces from a word on; of_example: texts of one example."""
    found = []
    size = CHUNK * of_example
    for start in range(0, len(texts), size):
        first = from_word[start : start + size]
        scores = model.score(texts[start : start + size], within_words=True, from_word=first)
        for score, word in zip(scores, first, strict=True):
            values = score.directions["forward" if "forward" in score.directions else "masked"]
            found.append(values[score.tokens.word >= word])
        done(len(first) // of_example)
    return found


def _mean(pieces: np.ndarray) -> float:
    return float(pieces.mean()) if len(pieces) else -np.inf


# ------------------------------------------------------------------------------------------------------------- results


def _labels(examples: Sequence[Example]) -> list[int]:
    return [example.label for example in examples]


def _score(data: TaskData, examples: Sequence[Example], predictions: list[int]) -> dict[str, float]:
    return task_metrics.score(data.task, examples, predictions, data.labels)


def _chance(data: TaskData, examples: Sequence[Example]) -> dict[str, float]:
    if data.task.kind == "choice":
        return {"accuracy": float(np.mean([1 / len(example.choices) for example in examples]))}
    commonest = int(np.bincount(_labels(examples)).argmax())
    found = _score(data, examples, [commonest] * len(examples))
    return found | {"auc": 0.5, "said_1": float(commonest)}
