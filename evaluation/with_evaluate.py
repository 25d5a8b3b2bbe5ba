"""The same metrics by Hugging Face's `evaluate`, whose modules are Spaces on the Hub.

`evaluation.metrics` computes everything without a download; this checks it against the library
that leaderboards use, where that is installed and can load its modules.
"""

import math
from collections.abc import Callable

from . import metrics
from .metrics import INVALID
from .tasks import Task

# Ours: the library's module, its result, and how it is told the classes that count.
CLASSES: dict[str, tuple[str, str, Callable]] = {
    "accuracy": ("accuracy", "accuracy", lambda classes: {}),
    "f1": ("f1", "f1", lambda classes: {"labels": [1], "average": "macro"}),
    "macro_f1": ("f1", "f1", lambda classes: {"labels": classes, "average": "macro"}),
    "matthews": ("matthews_correlation", "matthews_correlation", lambda classes: {}),
    "pearson": ("pearsonr", "pearsonr", lambda classes: {}),
    "spearman": ("spearmanr", "spearmanr", lambda classes: {}),
}
TOLERANCE = 1e-9  # sums in another order; the two agree to 1e-12 on random inputs


def compute(task: Task, rows: list[dict], predictions: list) -> dict[str, float]:
    """As `metrics.compute`, by `evaluate`; what it has no metric for is left out.

    Raises:
        ValueError: if the library is not installed, or cannot load a module.
    """
    if task.kind == "text":
        texts = [" ".join(text.split()) for text in predictions]
        truths = [" ".join(row["label"].split()) for row in rows]
        return {"exact_match": float(_computed("exact_match", texts, truths)["exact_match"])}
    if task.kind in ("answers", "entity"):
        texts = [{"id": str(i), "prediction_text": text} for i, text in enumerate(predictions)]
        answers = [
            {"text": row["answers"], "answer_start": [0] * len(row["answers"])} for row in rows
        ]
        truths = [{"id": str(i), "answers": answer} for i, answer in enumerate(answers)]
        result = _computed("squad", texts, truths)
        return {name: result[name] / 100 for name in task.metrics}
    truths, found = [row["label"] for row in rows], {}
    classes = sorted({*truths, *predictions} - {INVALID})
    for name in task.metrics:
        if name in CLASSES:
            module, key, options = CLASSES[name]
            value = float(_computed(module, predictions, truths, **options(classes))[key])
            found[name] = 0.0 if math.isnan(value) else value  # a constant input has no correlation
    return found


def check(task: Task, rows: list[dict], predictions: list) -> None:
    """Compare `compute` with `metrics.compute`.

    Raises:
        ValueError: naming the first metric that differs, or as `compute`.
    """
    ours = metrics.compute(task, rows, predictions)
    for name, value in compute(task, rows, predictions).items():
        if abs(ours[name] - value) > TOLERANCE:
            raise ValueError(
                f"{task.name}: {name} is {ours[name]!r} here, but {value!r} by `evaluate`: report "
                "it, with the predictions."
            )


def _computed(name, predictions, references, **options):
    """The result of one of the library's modules."""
    try:
        import evaluate
    except ImportError:
        raise ValueError("--check_with_evaluate needs the library: pip install evaluate.") from None
    try:
        module = evaluate.load(name)
    except Exception as error:  # it raises what its downloads do
        raise ValueError(
            f"--check_with_evaluate: `evaluate` cannot load its module {name!r} ({error!r:.200}). "
            "It is a Space on the Hub: check the network, or leave the check out."
        ) from error
    return module.compute(predictions=predictions, references=references, **options)
