"""Span corruption against a plain-loop reference written from T5's description."""

import itertools

import numpy as np
import pytest
import torch

from pretraining.collator import SpanCorruptionCollator
from pretraining.span_corruption import (
    apply_noise_mask,
    lengths,
    noise_counts,
    noise_mask,
    random_lengths,
    raw_length_for,
    span_corruption,
)

FIRST_SENTINEL, EOS = 999, 1


def reference(tokens, mask):
    """One row, token by token: a span of noise becomes a sentinel in the inputs, and each
    sentinel with the tokens it hides makes the targets."""
    inputs, targets, sentinel = [], [], FIRST_SENTINEL + 1
    for i, (token, noise) in enumerate(zip(tokens, mask, strict=True)):
        if noise:
            if i == 0 or not mask[i - 1]:
                sentinel -= 1
                inputs.append(sentinel)
                targets.append(sentinel)
            targets.append(token)
        else:
            inputs.append(token)
    return [*inputs, EOS], [*targets, EOS]


def spans(mask):
    return [len(list(group)) for noise, group in itertools.groupby(mask) if noise]


@pytest.mark.parametrize(("inputs", "raw", "targets"), [(512, 568, 114), (1024, 1137, 229)])
def test_t5_lengths(inputs, raw, targets):
    assert raw_length_for(inputs) == (raw, targets)
    assert lengths(raw) == (inputs, targets)


@pytest.mark.parametrize("density", [0.15, 0.5, 0.01, 0.99])
@pytest.mark.parametrize("mean", [1.0, 3.0, 8.0])
def test_raw_length_is_the_longest_that_fits(density, mean):
    for wanted in range(3, 60):
        raw, targets = raw_length_for(wanted, density, mean)
        assert lengths(raw, density, mean)[0] <= wanted < lengths(raw + 1, density, mean)[0]
        assert lengths(raw, density, mean)[1] == targets


@pytest.mark.parametrize("raw", [2, 3, 7, 20, 141, 568])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 1.0), (0.3, 8.0)])
def test_equals_the_reference(raw, density, mean):
    rng = np.random.default_rng(raw)
    tokens = rng.integers(2, 900, (5, raw))
    mask = noise_mask(rng, 5, raw, density, mean)
    inputs, targets = apply_noise_mask(tokens, mask, FIRST_SENTINEL, EOS)
    for row in range(5):
        expected = reference(tokens[row].tolist(), mask[row].tolist())
        assert (inputs[row].tolist(), targets[row].tolist()) == expected
    assert (inputs.shape[1], targets.shape[1]) == lengths(raw, density, mean)
    assert inputs.dtype == targets.dtype == tokens.dtype


@pytest.mark.parametrize("raw", [2, 10, 141])
def test_noise_has_its_count_and_spans(raw):
    noise, count = noise_counts(raw)
    mask = noise_mask(np.random.default_rng(0), 50, raw)
    assert not mask[:, 0].any() and mask[:, -1].all()
    assert (mask.sum(axis=1) == noise).all()
    assert all(len(spans(row)) == count for row in mask)


def test_one_raw_row_can_be_read_back():
    tokens = np.arange(10, 151)[None]
    inputs, targets = span_corruption(tokens, np.random.default_rng(3), FIRST_SENTINEL)
    hidden, current = {}, None
    for token in targets[0, :-1].tolist():
        if token > 900:
            current = hidden.setdefault(token, [])
        else:
            current.append(token)
    whole = [t for token in inputs[0, :-1].tolist() for t in hidden.get(token, [token])]
    assert whole == tokens[0].tolist()


def test_compositions_are_uniform():
    found = random_lengths(np.random.default_rng(0), 6000, 5, 3)
    assert (found.sum(axis=1) == 5).all() and (found >= 1).all()
    kinds, counts = np.unique(found, axis=0, return_counts=True)
    assert len(kinds) == 6  # 4 borders, 2 of them drawn
    assert counts.min() > 850 and counts.max() < 1150


def test_an_equal_generator_gives_an_equal_result():
    tokens = np.random.default_rng(0).integers(2, 900, (4, 60))
    first, again, other = (
        span_corruption(tokens, np.random.default_rng(seed), FIRST_SENTINEL) for seed in (7, 7, 8)
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_counts(1), r"raw_length \(=1\) must be at least 2"),
        (lambda: noise_counts(9, 1.0), r"noise_density \(=1.0\)"),
        (lambda: noise_counts(9, 0.15, 0.5), r"mean_noise_span_length \(=0.5\)"),
        (lambda: raw_length_for(2), r"inputs_length \(=2\) must be at least 3"),
        (lambda: span_corruption(np.ones(9, int), None, 9), r"shape \(9,\)"),
        (lambda: span_corruption(np.ones((2, 9)), None, 9), r"float64"),
        (
            lambda: span_corruption(np.ones((1, 900), int), None, 9, num_sentinels=20),
            r"45 noise spans, but the vocabulary has 20 sentinels",
        ),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def features(*lengths):
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(2, 900, length)} for length in lengths]


def test_collator_makes_batches_that_depend_on_seed_and_tokens_alone():
    rows = features(60, 60, 60)
    batch = SpanCorruptionCollator(FIRST_SENTINEL)(rows)
    again = SpanCorruptionCollator(FIRST_SENTINEL)([dict(row) for row in rows])
    other = SpanCorruptionCollator(FIRST_SENTINEL, seed=1)(rows)
    inputs, targets = lengths(60)
    assert batch["input_ids"].shape == (3, inputs) and batch["labels"].shape == (3, targets)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    assert (batch["labels"][:, 0] == FIRST_SENTINEL).all()


def test_collator_takes_lists_and_rejects_rows_of_several_lengths():
    rows = features(60, 60)
    lists = [{"input_ids": row["input_ids"].tolist()} for row in rows]
    collate = SpanCorruptionCollator(FIRST_SENTINEL)
    assert torch.equal(collate(rows)["labels"], collate(lists)["labels"])
    with pytest.raises(ValueError, match=r"lengths \[59, 60\], expected one length"):
        collate(features(59, 60))
