"""What tasks are measured by, and the files in which their predictions are handed in.

Every metric is a share in [0, 1] (correlations: [-1, 1]) of a whole split at once: gold examples and one prediction for
each, in the same order. Sums over devices and processes are made before, by gathering predictions; nothing here depends
on how they were batched.

| metric       | predictions                         | by                                                             |
| ------------ | ----------------------------------- | -------------------------------------------------------------- |
| accuracy     | class, choice, or a tuple of tags   | scikit-learn; of tags over all words                           |
| f1_positive  | class                               | scikit-learn; class 1 of two (MRPC, QQP)                       |
| f1_macro     | class                               | scikit-learn; the mean over classes                            |
| matthews     | class                               | scikit-learn (CoLA)                                            |
| pearson      | score                               | scipy (STS-B)                                                  |
| spearman     | score                               | scipy, ties by mean rank (STS-B)                               |
| entity_f1    | a tuple of tags                     | seqeval, as CoNLL's conlleval: whole entities of BIO tags      |
| exact_match  | text, "" for no answer              | SQuAD's normalisation, the best of the gold answers            |
| f1           | text, "" for no answer              | SQuAD's, over bags of words, the best of the gold answers      |

A prediction that is the same for all examples has no correlation with anything; pearson, spearman and matthews are 0
then, so that a degenerate run is a row of the table and not a hole in it.
"""

import json
import os
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from plm.data.examples import Example, Task
from plm.errors import UserError

Predictions = Sequence[Any]

# ------------------------------------------------------------------------------------------------------ classes, scores


def _flat(gold: Sequence[Example], predictions: Predictions) -> tuple[list, list]:
    """Labels and predictions, of tagging word by word. Errors: ValueError for unequal lengths."""
    if len(gold) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(gold)} examples")
    labels, predicted = [example.label for example in gold], list(predictions)
    if not labels or not isinstance(labels[0], tuple):
        return labels, predicted
    for example, tags in zip(gold, predicted, strict=True):
        if len(example.label) != len(tags):
            raise ValueError(f"{example.where}: {len(tags)} tags for {len(example.label)} words")
    return [tag for tags in labels for tag in tags], [tag for tags in predicted for tag in tags]


def accuracy(gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()) -> float:
    from sklearn.metrics import accuracy_score  # takes as long to load as JAX, and most commands never ask for it

    return float(accuracy_score(*_flat(gold, predictions)))


def f1_positive(gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()) -> float:
    from sklearn.metrics import f1_score

    if len(labels) != 2:
        raise UserError(f"metric f1_positive needs two classes, not {len(labels)}; f1_macro takes any number")
    return float(f1_score(*_flat(gold, predictions), pos_label=1, zero_division=0.0))


def f1_macro(gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()) -> float:
    """Over the classes that the gold labels hold; one that is never predicted counts 0."""
    from sklearn.metrics import f1_score

    truth, predicted = _flat(gold, predictions)
    classes = sorted(set(truth))
    return float(f1_score(truth, predicted, labels=classes, average="macro", zero_division=0.0))


def matthews(gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(*_flat(gold, predictions)))


def pearson(gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()) -> float:
    from scipy import stats  # most commands read this module and never correlate

    return _correlation(stats.pearsonr, gold, predictions)


def spearman(gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()) -> float:
    from scipy import stats

    return _correlation(stats.spearmanr, gold, predictions)


def _correlation(function: Callable, gold: Sequence[Example], predictions: Predictions) -> float:
    x, y = (np.asarray(values, np.float64) for values in _flat(gold, predictions))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(function(x, y).statistic)


def entity_f1(gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()) -> float:
    """labels: the tags' names ("O", "B-person"); an I- that continues nothing begins an entity, as in conlleval."""
    from seqeval.metrics import f1_score

    _flat(gold, predictions)
    truth = [[labels[tag] for tag in example.label] for example in gold]
    predicted = [[labels[tag] for tag in tags] for tags in predictions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a split or a prediction without entities is F1 = 0, and no news
        return float(f1_score(truth, predicted, zero_division=0))


# ---------------------------------------------------------------------------------------------------------------- SQuAD

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no articles, single spaces; in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()) -> float:
    return float(np.mean([squad_scores(e, text)[0] for e, text in zip(gold, predictions, strict=True)]))


def f1(gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()) -> float:
    return float(np.mean([squad_scores(e, text)[1] for e, text in zip(gold, predictions, strict=True)]))


def squad_scores(example: Example, prediction: str) -> tuple[float, float]:
    """(exact match, F1) of one question: the best over its gold answers.

    A question without an answer is right with "" only, and so for both metrics (SQuAD 2.0's rule). Gold answers that
    normalise to nothing count only where there is no other.
    """
    answers = [answer.text for answer in example.answers if normalized(answer.text)] or [""]
    exact = max(float(normalized(prediction) == normalized(answer)) for answer in answers)
    return exact, max(_overlap(prediction, answer) for answer in answers)


def _overlap(prediction: str, answer: str) -> float:
    predicted, right = normalized(prediction).split(), normalized(answer).split()
    if not predicted or not right:
        return float(predicted == right)
    common = sum((Counter(predicted) & Counter(right)).values())
    # 2 p r / (p + r) with precision common / predicted and recall common / right.
    return 2 * common / (len(predicted) + len(right))


def best_null_threshold(
    gold: Sequence[Example], texts: Sequence[str], null_odds: Sequence[float], metric: str = "f1"
) -> tuple[float, float]:
    """(threshold, score): a question counts as unanswerable where its null odds are above the threshold.

    texts: the best answers that are not empty. null_odds: score of no answer minus that of the text. The threshold is
    one of the odds or -inf (nothing is answered); of equally good ones the lowest, so that fewer questions are
    answered. To be chosen on dev and applied elsewhere.
    """
    place = ("exact_match", "f1").index(metric)
    answered = np.array([squad_scores(e, text)[place] for e, text in zip(gold, texts, strict=True)])
    empty = np.array([squad_scores(e, "")[place] for e in gold])
    odds = np.asarray(null_odds, np.float64)
    order = np.argsort(odds, kind="stable")
    # After the k-th step all questions with odds up to that of step k are answered, the others are not.
    totals = np.concatenate([[0.0], np.cumsum((answered - empty)[order])]) + empty.sum()
    thresholds = np.concatenate([[-np.inf], odds[order]])
    last_of_equals = np.append(thresholds[1:] != thresholds[:-1], True)
    best = int(np.argmax(np.where(last_of_equals, totals, -np.inf)))
    return float(thresholds[best]), float(totals[best] / len(odds))


# ------------------------------------------------------------------------------------------------------------ all of it

METRICS: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        accuracy,
        f1_positive,
        f1_macro,
        matthews,
        pearson,
        spearman,
        entity_f1,
        exact_match,
        f1,
    )
}


def score(
    task: Task, gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()
) -> dict[str, float]:
    """{metric: value} of the task's metrics, the one that selects first.

    Errors: UserError for a metric that is not in METRICS; ValueError for unequal numbers of examples and predictions.
    """
    unknown = [name for name in task.metrics if name not in METRICS]
    if unknown:
        raise UserError(f"metric {unknown[0]!r} is not known: {', '.join(METRICS)}")
    if not gold:
        raise ValueError("no examples")
    return {name: METRICS[name](gold, predictions, labels) for name in task.metrics}


def majority(train: Sequence[Example], gold: Sequence[Example]) -> list[Any]:
    """Predictions for gold examples: always the commonest class, of words the commonest tag, of the training examples.

    [] where an answer is no class: similarities, spans.
    """
    labels = [example.label for example in train]
    if labels and all(isinstance(label, int) for label in labels):
        return [Counter(labels).most_common(1)[0][0]] * len(gold)
    if labels and all(isinstance(label, tuple) for label in labels):
        commonest = Counter(tag for label in labels for tag in label).most_common(1)[0][0]
        return [(commonest,) * len(example.words) for example in gold]
    return []


def _counts_of_classes(example: Example, prediction: Any, labels: Sequence[str]) -> tuple[float, float]:
    if isinstance(example.label, tuple):
        return float(sum(a == b for a, b in zip(example.label, prediction, strict=True))), float(len(example.label))
    return float(example.label == prediction), 1.0


def _counts_of_positives(example: Example, prediction: Any, labels: Sequence[str]) -> tuple[float, float]:
    return 2.0 * (example.label == prediction == 1), float((example.label == 1) + (prediction == 1))


def _counts_of_entities(example: Example, prediction: Any, labels: Sequence[str]) -> tuple[float, float]:
    from seqeval.metrics.sequence_labeling import get_entities

    gold, found = (set(get_entities([labels[tag] for tag in tags])) for tags in (example.label, prediction))
    return 2.0 * len(gold & found), float(len(gold) + len(found))


# (a, b) of one example for each metric that is sum(a) / sum(b) over examples.
COUNTS: dict[str, Callable[[Example, Any, Sequence[str]], tuple[float, float]]] = {
    "accuracy": _counts_of_classes,
    "f1_positive": _counts_of_positives,
    "entity_f1": _counts_of_entities,
    "exact_match": lambda example, prediction, labels: (squad_scores(example, prediction)[0], 1.0),
    "f1": lambda example, prediction, labels: (squad_scores(example, prediction)[1], 1.0),
}


def counts(
    task: Task, gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()
) -> dict[str, list[tuple[float, float]]]:
    """{metric: [(a, b) of each example]} of those of the task's metrics that are sum(a) / sum(b): what resampling of
    examples needs. The others (correlations, f1_macro) are no such ratio and are left out."""
    return {
        name: [COUNTS[name](e, prediction, labels) for e, prediction in zip(gold, predictions, strict=True)]
        for name in task.metrics
        if name in COUNTS
    }


# ---------------------------------------------------------------------------------------------------- predictions files


def submission(task: Task, gold: Sequence[Example], predictions: Predictions, labels: Sequence[str] = ()) -> str:
    """The text of a predictions file in the task's official format (`Task.submission`).

    glue: TSV `index, prediction`, classes by name, scores with three digits. squad: {id: text}. conll: `word gold
    predicted` (no gold: `word predicted`), a blank line after each sentence, as conlleval reads it. wic: a T or an F a
    line. mclwic: [{"id", "tag"}]. jsonl, for all others: {"id", "prediction"} a line, a choice by its number.
    """
    if len(gold) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(gold)} examples")
    pairs = list(zip(gold, predictions, strict=True))
    named = [_named(task, prediction, labels) for _, prediction in pairs]
    match task.submission:
        case "glue":
            return "index\tprediction\n" + "".join(f"{e.id}\t{name}\n" for e, name in zip(gold, named, strict=True))
        case "squad":
            return json.dumps({example.id: text for example, text in pairs}, ensure_ascii=False) + "\n"
        case "conll":
            return "".join(_conll(example, tags, labels) for example, tags in pairs)
        case "wic":
            return "".join(f"{name}\n" for name in named)
        case "mclwic":
            tags = [{"id": example.id, "tag": name} for example, name in zip(gold, named, strict=True)]
            return json.dumps(tags, indent=1) + "\n"
        case _:
            lines = [{"id": example.id, "prediction": name} for example, name in zip(gold, named, strict=True)]
            return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _named(task: Task, prediction, labels: Sequence[str]):
    if task.kind == "similarity":
        return f"{float(prediction):.3f}" if task.submission == "glue" else float(prediction)
    if task.kind in ("choice", "span"):
        return prediction if isinstance(prediction, str) else int(prediction)
    if task.kind == "tagging":
        return [labels[tag] for tag in prediction]
    return labels[prediction]


def _conll(example: Example, tags: Sequence[int], labels: Sequence[str]) -> str:
    if len(tags) != len(example.words):
        raise ValueError(f"{example.where}: {len(tags)} tags for {len(example.words)} words")
    gold = [f"{labels[tag]} " for tag in example.label] if example.label is not None else [""] * len(tags)
    lines = (f"{w} {g}{labels[tag]}\n" for w, g, tag in zip(example.words, gold, tags, strict=True))
    return "".join(lines) + "\n"


def read_squad_predictions(path: str | os.PathLike, gold: Sequence[Example]) -> tuple[list[str], list[str]]:
    """(texts in the order of gold, ids without a prediction, whose text is ""); ids that gold lacks are left out.

    Errors: UserError where the file is not {id: text}.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable predictions ({error})") from None
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for text in found.values()):
        raise UserError(f"{path}: {{id: text}} would be right")
    return [found.get(e.id, "") for e in gold], [e.id for e in gold if e.id not in found]
