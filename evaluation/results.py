"""One results file: written by fine-tuning and evaluation, read by cards and leaderboards."""

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from huggingface_hub import EvalResult

from .data import is_labelled
from .metrics import bootstrap, compute
from .tasks import TASKS, Task


def summarise(per_seed: Sequence[dict[str, float]]) -> dict[str, dict]:
    """{name: {"mean", "std", "per_seed"}} of the metrics of each seed.

    `std` is the sample's, with one degree of freedom less; 0 for a single seed.
    """
    found = {}
    for name in per_seed[0]:
        values = [metrics[name] for metrics in per_seed]
        found[name] = {**_mean_and_std(values), "per_seed": values}
    return found


def _mean_and_std(values):
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": spread}


def main_split(rows: dict[str, list[dict]]) -> str | None:
    """The split whose metrics stand for the task: labelled test rows, else validation."""
    for split in ("test", "validation", *rows):
        if split in rows and split != "train" and is_labelled(rows[split]):
            return split
    return None


def evaluate_splits(task: Task, rows: dict[str, list[dict]], answer, output: Path | None):
    """Answer splits, keep the predictions, and compute the metrics of those with labels.

    Args:
        rows: of each split.
        answer: a function of rows that returns `prediction.predict`'s list.
        output: the folder for `predictions_SPLIT.jsonl`; None writes none.

    Returns:
        (metrics, intervals): those of the main split under their names, those of another as
        `SPLIT_metric`.
    """
    main, metrics, intervals = main_split(rows), {}, {}
    for split, some in rows.items():
        if not some:
            continue
        answers = answer(some)
        if output is not None:
            _write_predictions(task, output / f"predictions_{split}.jsonl", some, answers)
        if is_labelled(some):
            predictions = [a["prediction"] for a in answers]
            prefix = "" if split == main else f"{split}_"
            found, bounds = (f(task, some, predictions) for f in (compute, bootstrap))
            metrics |= {prefix + name: value for name, value in found.items()}
            intervals |= {prefix + name: value for name, value in bounds.items()}
    return metrics, intervals


def _write_predictions(task, path, rows, answers):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            line = {"index": row.get("idx", row.get("index", number)), **answer}
            if "id" in row:
                line["id"] = row["id"]
            if task.kind == "classification" and answer["prediction"] >= 0:
                line["label_word"] = task.words[answer["prediction"]]
            line["target"] = row["answers"] if "answers" in row else row["label"]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def make_record(task_name, model, metrics_of_seeds, rows, **more) -> dict:
    """The record of a results file; `more` is kept beside what every reader relies on."""
    return {
        "task": task_name,
        "model": model,
        "metrics": summarise(metrics_of_seeds),
        "rows": {split: len(some) for split, some in rows.items()},
        "command": this_command(),
        **more,
    }


def this_command() -> str:
    """The command line of this process, as one would type it."""
    module = sys.modules["__main__"].__spec__
    program = f"python -m {module.name}" if module else f"python {sys.argv[0]}"
    words = list(sys.argv[1:])
    for i, word in enumerate(words):  # commands are published
        name, equals, _ = word.partition("=")
        if name.startswith("--") and name.endswith("token"):
            if equals:
                words[i] = f"{name}=***"
            elif i + 1 < len(words):
                words[i + 1] = "***"
    return " ".join([program, *map(shlex.quote, words)])


def check_at_least(least: float, **arguments: float | None) -> None:
    """Refuse numbers below `least`, and those that are none; None stands for "not given".

    Raises:
        ValueError: naming the argument.
    """
    for name, value in arguments.items():
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"--{name} {value}: expected a number, {least} or more.")


def claim_folder(folder: Path, arguments: dict, write: bool = True) -> None:
    """Refuse a folder in which a run with other arguments has begun; leave ours there.

    Args:
        arguments: values for JSON; `rows_sha256` among them tells other data from the same.
        write: whether this process is the one that writes.

    Raises:
        ValueError: naming the arguments that differ.
    """
    path = folder / "arguments.json"
    ours = json.loads(json.dumps(arguments, default=str))
    if path.is_file() and any(folder.glob("seed_*")):
        theirs = json.loads(path.read_text("utf-8"))
        names = sorted({*ours, *theirs})
        differ = [name for name in names if ours.get(name) != theirs.get(name)]
        if differ:
            told = "; ".join(f"{n} was {theirs.get(n)!r}, is {ours.get(n)!r}" for n in differ[:5])
            raise ValueError(
                f"output_dir={str(folder)!r} holds another run ({told}): choose another folder, or "
                "remove that one."
            )
    elif write:
        write_json(path, ours)


def write_json(path: Path, content) -> None:
    """All of a file or nothing of it, whenever the process is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(temporary, path)


def read_results(path: str | Path) -> list[dict]:
    """The records of a results file, one for each task.

    Raises:
        ValueError: naming the file and the field that is missing or wrong.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a results file: {error}.") from None
    records = content if isinstance(content, list) else [content]
    if not records:
        raise ValueError(f"{path} holds no records: run the evaluation again.")
    for record in records:
        _check(path, record)
    return records


def _check(path, record):
    kinds = {"task": str, "model": str, "metrics": dict, "rows": dict, "command": str}
    for name, kind in kinds.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise ValueError(
                f"{path} has no {name!r} of type {kind.__name__}: it is not what "
                "examples/finetune.py or evaluation.run writes."
            )
    if not re.fullmatch(r"\w[\w-]*", record["task"]):
        raise ValueError(f"{path}: task is {record['task']!r}, expected letters, digits, - and _.")
    if not isinstance(record.get("evaluated_on", ""), (str, type(None))):
        raise ValueError(f"{path}: evaluated_on is {record['evaluated_on']!r}, expected a split.")
    for name, metric in record["metrics"].items():
        values = metric.get("per_seed") if isinstance(metric, dict) else None
        numbers = [None]
        if values and isinstance(values, list):
            numbers = [metric.get("mean"), metric.get("std"), *values]
        for number in numbers:
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not is_number or not math.isfinite(number):
                raise ValueError(
                    f"{path}: metric {name!r} is {metric!r:.80}, expected mean, std and per_seed "
                    "as finite numbers."
                )
        for field, expected in _mean_and_std(values).items():
            if abs(expected - metric[field]) > 1e-9:
                raise ValueError(
                    f"{path}: metric {name!r} has {field} {metric[field]}, but its seeds' is "
                    f"{expected}: run the command again, numbers are not typed by hand."
                )


def data_set(task: str) -> tuple[str, str, str]:
    """(identifier, configuration, name) of a task's data set, for leaderboards."""
    if task in TASKS and TASKS[task].hub is not None:
        return TASKS[task].hub[0], TASKS[task].hub[1], task
    return task, "default", task


def headline(record: dict) -> list[str]:
    """The task's own metrics among those of a record, in its order."""
    task: Task | None = TASKS.get(record["task"])
    names = task.metrics if task else tuple(record["metrics"])
    return [name for name in names if name in record["metrics"]]


def eval_results(records: Sequence[dict], date: str | None = None) -> dict[str, str]:
    """{`.eval_results/TASK.yaml`: text}; `date` is ISO 8601, or the commit's."""
    # Imported here because the huggingface_hub of transformers 4 has neither, and can evaluate.
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    for record in records:
        name, config, _ = data_set(record["task"])
        entries = [
            EvalResultEntry(
                dataset_id=name,
                task_id=config,
                value=record["metrics"][metric]["mean"],
                date=date,
                notes=f"{metric}, {len(record['metrics'][metric]['per_seed'])} seed(s), "
                f"{record.get('evaluated_on', 'test')} rows",
            )
            for metric in headline(record)
        ]
        content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        files[f".eval_results/{record['task']}.yaml"] = content
    return files


def model_index(records: Sequence[dict]) -> list[EvalResult]:
    """The same numbers for a card's `model-index`."""
    found = []
    for record in records:
        name, config, label = data_set(record["task"])
        for metric in headline(record):
            found.append(
                EvalResult(
                    task_type="text2text-generation",
                    dataset_type=name,
                    dataset_name=label,
                    dataset_config=config,
                    dataset_split=record.get("evaluated_on", "test"),
                    metric_type=metric,
                    metric_name=metric,
                    metric_value=record["metrics"][metric]["mean"],
                )
            )
    return found


def plot_curves(histories: dict[str, list[dict]], metric: str, path: Path) -> None:
    """The training loss and a validation metric by step, a line for each of Trainer's histories."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("loss", metric), strict=True):
        for label, history in histories.items():
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=label)
        axis.set(xlabel="step", ylabel=name.removeprefix("eval_"))
    axes[1].legend()
    figure.savefig(path, dpi=120)
