"""Metrics as fractions from 0 to 1 (correlations from -1 to 1), with bootstrap intervals.

The definitions are scikit-learn's, SciPy's and, for answers, those of SQuAD 1.1's own evaluation;
they stand here so that nothing needs to be downloaded to compute them.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from .tasks import Task

INVALID = -1  # the class of a generated text that is no label word: never right


def accuracy(targets: np.ndarray, predictions: np.ndarray) -> float:
    """The share of equal pairs; both (N,) class numbers."""
    return float(np.mean(np.asarray(targets) == np.asarray(predictions)))


def _counts(targets, predictions, label):
    targets, predictions = np.asarray(targets) == label, np.asarray(predictions) == label
    return int((targets & predictions).sum()), int(targets.sum()), int(predictions.sum())


def f1(targets: np.ndarray, predictions: np.ndarray, positive: int = 1) -> float:
    """F1 of one class; 0 where it neither occurs nor is predicted."""
    both, true, predicted = _counts(targets, predictions, positive)
    return 2 * both / (true + predicted) if true + predicted else 0.0


def macro_f1(targets: np.ndarray, predictions: np.ndarray) -> float:
    """The mean F1 of the classes that occur or are predicted."""
    classes = set(np.unique(targets)) | set(np.unique(predictions))
    scores = [f1(targets, predictions, label) for label in sorted(classes - {INVALID})]
    return float(np.mean(scores))


def matthews(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004); 0 where it is undefined."""
    targets, predictions = _as_integers(targets, predictions)
    size = 1 + max(targets.max(), predictions.max())
    table = np.bincount(targets * size + predictions, minlength=size * size).reshape(size, size)
    table = table.astype(np.float64)
    true, predicted, total = table.sum(1), table.sum(0), table.sum()
    covariance = table.trace() * total - true @ predicted
    spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def _as_integers(*arrays):
    _, places = np.unique(np.concatenate(arrays), return_inverse=True)
    return np.split(places.reshape(-1), [len(arrays[0])])


def pearson(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson's correlation of two (N,) arrays; 0 where one of them is constant."""
    x, y = (
        np.asarray(a, np.float64) - np.mean(a, dtype=np.float64) for a in (targets, predictions)
    )
    spread = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / spread, -1, 1)) if spread > 0 else 0.0


def spearman(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank."""
    return pearson(_ranks(targets), _ranks(predictions))


def _ranks(values):
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]


def normalize_answer(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_exact_match(answers: Sequence[str], prediction: str) -> float:
    """1 if the prediction is one of the right answers, after `normalize_answer`."""
    return float(normalize_answer(prediction) in map(normalize_answer, answers))


def answer_f1(answers: Sequence[str], prediction: str) -> float:
    """The best F1 of the prediction's words and those of a right answer."""
    return max(_word_f1(answer, prediction) for answer in answers)


def _word_f1(answer, prediction):
    answer, prediction = normalize_answer(answer).split(), normalize_answer(prediction).split()
    common = sum((Counter(answer) & Counter(prediction)).values())
    return 2 * common / (len(answer) + len(prediction)) if common else 0.0


def text_exact_match(target: str, prediction: str) -> float:
    """1 if both are the same but for white space."""
    return float(target.split() == prediction.split())


CLASSES: dict[str, Callable] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
TEXTS: dict[str, Callable] = {"exact_match": text_exact_match}
ANSWERS: dict[str, Callable] = {"exact_match": answer_exact_match, "f1": answer_f1}


def _scorer(task, name, rows, predictions):
    """A function of the numbers of rows (or of questions), and how many of them there are."""
    if name == "group_exact_match":  # MultiRC: a question counts if all its answers are right
        groups = defaultdict(list)
        for i, row in enumerate(rows):
            groups[_question(row)].append(i)
        scores = np.array(
            [all(rows[i]["label"] == predictions[i] for i in group) for group in groups.values()],
            np.float64,
        )
        return lambda index: float(scores[index].mean()), len(scores)
    if task.kind in ("classification", "similarity"):
        dtype = np.int64 if task.kind == "classification" else np.float64
        targets = np.array([row["label"] for row in rows], dtype)
        predicted = np.array(predictions, dtype)
        function = CLASSES[name]
        return lambda index: function(targets[index], predicted[index]), len(rows)
    table, key = (TEXTS, "label") if task.kind == "text" else (ANSWERS, "answers")
    scores = np.array(
        [table[name](row[key], text) for row, text in zip(rows, predictions, strict=True)]
    )
    return lambda index: float(scores[index].mean()), len(rows)


def _question(row):
    place = row.get("idx")
    if isinstance(place, dict):
        return place["paragraph"], place["question"]
    return row["paragraph"], row["question"]


def compute(task: Task, rows: list[dict], predictions: list) -> dict[str, float]:
    """The task's metrics; COGS' also by type of generalisation, as `exact_match/TYPE`.

    Args:
        rows: of `data.load`, with labels.
        predictions: for each row a class number (`INVALID` for none), a similarity or a text.

    Raises:
        ValueError: if there are no rows, or not a prediction for each.
    """
    _check(rows, predictions)
    found = {}
    for name in task.metrics:
        function, size = _scorer(task, name, rows, predictions)
        found[name] = function(np.arange(size))
    types = sorted({row["type"] for row in rows if "type" in row})
    for kind in types if len(types) > 1 else ():
        chosen = [i for i, row in enumerate(rows) if row["type"] == kind]
        part = [rows[i] for i in chosen], [predictions[i] for i in chosen]
        for name in task.metrics:
            function, size = _scorer(task, name, *part)
            found[f"{name}/{kind}"] = function(np.arange(size))
    return found


def bootstrap(
    task: Task,
    rows: list[dict],
    predictions: list,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Percentile intervals [low, high] of the task's metrics (Efron 1979).

    Rows are drawn with replacement; questions where a metric counts questions.
    """
    _check(rows, predictions)
    intervals = {}
    for name in task.metrics:
        function, size = _scorer(task, name, rows, predictions)
        generator = np.random.default_rng(seed)
        scores = [function(generator.integers(0, size, size)) for _ in range(resamples)]
        tails = ((1 - level) / 2, (1 + level) / 2)
        intervals[name] = [float(value) for value in np.quantile(scores, tails)]
    return intervals


def _check(rows, predictions):
    if not rows or len(rows) != len(predictions):
        raise ValueError(
            f"There are {len(predictions)} predictions for {len(rows)} rows: pass one for each of "
            "at least one row."
        )
