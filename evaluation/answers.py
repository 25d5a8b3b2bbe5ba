"""What every framework's answers have in common: ways of answering, batches, and their meaning."""

from collections.abc import Sequence

import numpy as np

from .metrics import INVALID
from .tasks import Task

METHODS = ("score", "generate", "head")


def check_method(task: Task, method: str | None) -> str:
    """The way of answering: the one asked for, or the task's own.

    Raises:
        ValueError: if the task cannot be answered that way.
    """
    default = "generate" if task.kind in ("text", "answers") else "score"
    possible = {
        "classification": METHODS,
        "similarity": METHODS,
        "text": ("generate",),
        "answers": ("generate", "head"),
        "entity": ("score", "generate"),
    }[task.kind]
    method = method or default
    if method not in possible:
        raise ValueError(
            f"method={method!r} does not answer task {task.name!r}: choose one of "
            f"{', '.join(possible)}."
        )
    return method


def check_words(task: Task, method: str, tokenizer) -> list[str]:
    """Notes on classes that a model cannot tell apart, or cannot write, with this tokenizer.

    Raises:
        ValueError: instead, where the label words are the user's own and can be renamed.
    """
    if method == "head" or task.kind != "classification":
        return []
    ids = tokenizer(list(task.words), truncation=True, max_length=task.target_length)["input_ids"]
    seen: dict[tuple, str] = {}
    faults = []
    for word, tokens in zip(task.words, map(tuple, ids), strict=True):
        if tokens in seen:
            faults.append(
                f"the labels {seen[tokens]!r} and {word!r} are the same tokens: rename one in the "
                "data, use another tokenizer, or --method head"
            )
        elif method == "generate" and tokenizer.unk_token_id in tokens:
            faults.append(
                f"the label {word!r} has characters that the tokenizer lacks, so that no model can "
                "write it: rename it in the data, or use --method score or head"
            )
        seen[tokens] = word
    if faults and task.name == "custom":
        raise ValueError(f"{faults[0]}.")
    return faults


def longest_target(task: Task, tokenizer, rows: Sequence[dict]) -> int:
    """The most tokens to generate. Where only the whole text counts, longer ones are wrong."""
    labels = [row["label"] for row in rows]
    if task.kind != "text" or None in labels:
        return task.target_length
    longest = max(map(len, tokenizer(text_target=labels)["input_ids"]))
    return min(longest, task.target_length)


def from_scores(task: Task, candidates: list[str], log_probabilities: np.ndarray) -> dict:
    """The answer that the candidates' log-probabilities give, and their shares."""
    _check_numbers(log_probabilities)
    shares = np.exp(log_probabilities - np.logaddexp.reduce(log_probabilities))
    best = int(np.argmax(log_probabilities))
    prediction = best
    if task.kind == "similarity":
        prediction = float(shares @ np.array([float(word) for word in candidates]))
    elif task.kind == "entity":
        prediction = candidates[best]
    return {"prediction": prediction, "scores": [float(share) for share in shares]}


def from_text(task: Task, text: str) -> int | float | str:
    """What a generated text means: a class (or `INVALID`), a similarity, or itself."""
    if task.kind == "classification":
        words, text = [" ".join(word.split()) for word in task.words], " ".join(text.split())
        if text in words:
            return words.index(text)
        alike = [i for i, word in enumerate(words) if word.lower() == text.lower()]
        return alike[0] if len(alike) == 1 else INVALID
    if task.kind == "similarity":
        try:
            return float(np.clip(float(text.replace(" ", "")), 0, 5))
        except ValueError:
            return 2.5  # no number: the middle
    return text


def from_logits(task: Task, logits: np.ndarray) -> dict:
    """The answer of a classification head (num_labels,), and the classes' probabilities."""
    _check_numbers(logits)
    if task.kind == "similarity":
        return {"prediction": float(np.clip(logits[0], 0, 5))}
    shares = np.exp(logits - np.logaddexp.reduce(logits))
    return {"prediction": int(np.argmax(logits)), "scores": [float(share) for share in shares]}


def _check_numbers(scores):
    if np.isnan(scores).any():
        raise ValueError(
            "The model computes NaN: its training has diverged (lower the learning rate), or its "
            "checkpoint is damaged."
        )


def batches(texts: Sequence[str], sizes: Sequence[int], most: int, rows: int) -> list[list[int]]:
    """Row numbers in batches: longest texts first, at most `rows` rows and `most` of `sizes`."""
    found, total = [[]], 0
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if found[-1] and (len(found[-1]) == rows or total + sizes[i] > most):
            found.append([])
            total = 0
        found[-1].append(i)
        total += sizes[i]
    return found if found[0] else []
