"""Metrics against scikit-learn's and SciPy's, and SQuAD's by the book, on random inputs."""

import random
import re
import string

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as reference
from tolerances import METRIC

from evaluation import metrics
from evaluation.tasks import TASKS, get_task

WORDS = "The a an cat, sat. on  mat! U.S. 1,000 (and) of".split(" ")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_classes(seed, classes):
    generator = np.random.default_rng(seed)
    size = int(generator.integers(2, 300))
    targets, predictions = generator.integers(0, classes, (2, size))
    if seed % 2:  # better than chance
        predictions = np.where(generator.random(size) < 0.7, targets, predictions)
    expected = {
        "accuracy": reference.accuracy_score(targets, predictions),
        "macro_f1": reference.f1_score(targets, predictions, average="macro", zero_division=0),
        "matthews": reference.matthews_corrcoef(targets, predictions),
    }
    if classes == 2:
        expected["f1"] = reference.f1_score(targets, predictions, zero_division=0)
    for name, value in expected.items():
        assert abs(metrics.CLASSES[name](targets, predictions) - value) <= METRIC, name


@pytest.mark.parametrize("seed", range(20))
def test_correlations(seed):
    generator = np.random.default_rng(seed)
    size = int(generator.integers(2, 200))
    targets = np.round(generator.random(size) * 5, 1)
    predictions = np.round(targets + generator.normal(size=size), seed % 3)
    if np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        pytest.fail("a constant input proves nothing")
    for name, function in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
        found = metrics.CLASSES[name](targets, predictions)
        assert abs(found - function(targets, predictions).statistic) <= METRIC, name


def test_a_constant_input_has_no_correlation():
    constant, other = np.ones(4), np.arange(4)
    assert metrics.pearson(constant, other) == metrics.spearman(other, constant) == 0
    assert metrics.matthews(constant, other) == 0


def by_the_book(text):
    """Rajpurkar et al. 2016, section 6.1: punctuation and articles are ignored."""
    text = re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower())
    return [word for word in text.split() if word not in ("a", "an", "the")]


def f1_by_the_book(answer, prediction):
    """The harmonic mean of precision and recall of the words, each matched once."""
    answer, prediction = by_the_book(answer), by_the_book(prediction)
    left, matched = list(answer), 0
    for word in prediction:
        if word in left:
            left.remove(word)
            matched += 1
    if matched == 0:
        return 0.0
    precision, recall = matched / len(prediction), matched / len(answer)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat.", "cat"),
        ("U.S.", "us"),
        ("1,000", "1000"),
        ("a-b", "ab"),
        ("Anthem the", "anthem"),
        ("the-cat an", "thecat"),
        ("\u00a0Tür\n", "tür"),
    ],
)
def test_normalisation(text, expected):
    assert metrics.normalize_answer(text) == expected


@pytest.mark.parametrize("seed", range(50))
def test_answers(seed):
    generator = random.Random(seed)

    def text(least):
        return " ".join(generator.choices(WORDS, k=generator.randint(least, 5))) + "cat"

    answers, prediction = [text(0) for _ in range(3)], text(0)
    if seed % 3 == 0:
        prediction = answers[1].upper() + " the!"
    exact = max(float(by_the_book(answer) == by_the_book(prediction)) for answer in answers)
    score = max(f1_by_the_book(answer, prediction) for answer in answers)
    assert metrics.answer_exact_match(answers, prediction) == exact
    assert abs(metrics.answer_f1(answers, prediction) - score) <= METRIC


def test_an_invalid_label_is_wrong_and_no_class_of_its_own():
    targets, predictions = np.array([0, 1, 1]), np.array([0, 1, metrics.INVALID])
    assert metrics.accuracy(targets, predictions) == 2 / 3
    assert metrics.macro_f1(targets, predictions) == pytest.approx((1 + 2 / 3) / 2)


def test_cogs_by_type():
    rows = [{"label": "x ( 1 )", "type": kind} for kind in ("a", "a", "b")]
    found = metrics.compute(get_task("cogs"), rows, ["x  ( 1 )", "y", "x ( 1 )"])
    assert found == {"exact_match": 2 / 3, "exact_match/a": 0.5, "exact_match/b": 1.0}


def test_multirc_counts_questions():
    labels, predictions = [1, 0, 1, 0], [1, 0, 1, 1]
    rows = [
        {"label": label, "idx": {"paragraph": 0, "question": i // 2, "answer": i % 2}}
        for i, label in enumerate(labels)
    ]
    found = metrics.compute(get_task("multirc"), rows, predictions)
    assert found["group_exact_match"] == 0.5
    assert found["f1"] == pytest.approx(reference.f1_score(labels, predictions))


def test_bootstrap_covers_a_known_accuracy():
    generator = np.random.default_rng(0)
    task, inside, widths = get_task("sst2"), 0, []
    for seed in range(40):
        right = generator.random(200) < 0.8
        rows = [{"label": 1}] * 200
        low, high = metrics.bootstrap(task, rows, list(right.astype(int)), 200, seed=seed)[
            "accuracy"
        ]
        inside += low <= 0.8 <= high
        widths.append(high - low)
    # Normal theory: 2 * 1.96 * sqrt(0.8 * 0.2 / 200) = 0.111; 95 % of 40 is 38, less 4 sigma 32.
    assert inside >= 32
    assert np.mean(widths) == pytest.approx(0.111, abs=0.015)


def test_every_task_names_metrics_that_exist():
    for task in TASKS.values():
        known = {
            "classification": {*metrics.CLASSES, "group_exact_match"},
            "similarity": metrics.CLASSES,
            "text": metrics.TEXTS,
        }.get(task.kind, metrics.ANSWERS)
        assert set(task.metrics) <= set(known), task.name


def test_missing_predictions_are_refused():
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        metrics.compute(get_task("sst2"), [{"label": 0}] * 2, [0])
