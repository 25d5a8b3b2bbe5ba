"""Which rows train, which choose the checkpoint, and which are answered once, at the end."""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .data import Data, count_duplicates, is_labelled, is_number, load, read_file
from .tasks import ANSWERED_BY, Task, custom_task, get_task

HELD_OUT = 0.1  # of the training rows, where the task has no split to spare
AT_MOST = 2000


@dataclass
class Arrangement:
    """Rows to train on, rows that choose the checkpoint, and the splits answered at the end."""

    train: list[dict]
    selection: list[dict]
    final: dict[str, list[dict]]


def load_task(
    name: str,
    data_dir: str | None,
    files: Sequence[str | None] = (None, None, None),
    text_column: str = "text",
    label_column: str = "label",
) -> tuple[Task, Data]:
    """A task and its rows; `custom` takes its label words from its training file.

    Args:
        files: of `custom`: for training, and if there are any for validation and test.

    Raises:
        ValueError: for a file that is missing or cannot be understood, and for files or columns
            that the task does not take.
    """
    if name != "custom":
        if any(files) or (text_column, label_column) != ("text", "label"):
            raise ValueError(
                f"task={name!r} takes no --train_file, --validation_file, --test_file, "
                "--text_column or --label_column: pass --data_dir, a folder of its files, or "
                "--task custom."
            )
        task = get_task(name)
        return task, load(task, data_dir)
    if data_dir is not None:
        raise ValueError(f"data_dir={data_dir!r}: task `custom` takes --train_file instead.")
    if not files[0]:
        raise ValueError("task `custom` needs --train_file, and --text_column, --label_column.")
    as_text = replace(custom_task([], text_column, label_column), kind="text", metrics=())
    labels = {row["label"] for row in read_file(as_text, files[0], [])} - {None}
    if all(map(is_number, labels)):  # tables write 1 as 1.0 where a cell of the column is empty
        words = sorted({re.sub(r"\.0+$", "", label) for label in labels}, key=float)
    else:
        words = sorted(labels)
    if len(words) < 2:
        raise ValueError(
            f"label_column={label_column!r} of {files[0]} has the values {words}: "
            "expected at least two classes. Check its name."
        )
    task, data = custom_task(words, text_column, label_column), Data()
    for split, path in zip(("train", "validation", "test"), files, strict=True):
        if path:
            data.rows[split] = read_file(task, path, data.notes, split)
    data.notes += count_duplicates(task, data.rows)
    return task, data


def fingerprint(task: Task, rows: Arrangement) -> str:
    """SHA-256 of the classes and all rows, by which a run that goes on knows its data again."""
    found = hashlib.sha256(json.dumps(task.words).encode())
    for some in (rows.train, rows.selection, *rows.final.values()):
        found.update(b"\0")
        for row in some:
            found.update(json.dumps(row, default=str).encode())
    return found.hexdigest()


def arrange(
    task: Task,
    data: Data,
    max_train_rows: int | None = None,
    max_validation_rows: int | None = AT_MOST,
    max_test_rows: int | None = None,
) -> Arrangement:
    """Give each row one purpose, the same whatever the seed of a training.

    The split that is reported never chooses a checkpoint: where it is the validation split, because
    there are no labelled test rows, a part of the training rows chooses. `data.notes` says so.

    Raises:
        ValueError: if there are no labelled training rows, and for a number of rows below 1.
    """
    limits = {"train": max_train_rows, "validation": max_validation_rows, "test": max_test_rows}
    for split, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"max_{split}_rows={limit}: expected 1 or more rows.")
    rows = dict(data.rows)
    train = [row for row in rows.pop("train", []) if row["label"] is not None]
    if not train:
        hint = ""
        if task.name in ANSWERED_BY:
            hint = f" It is answered by a model of {ANSWERED_BY[task.name]}: use evaluation.run."
        raise ValueError(
            f"Task {task.name!r} has no labelled training rows here: a file train.* with a column "
            f"{' or '.join(task.label)} is needed.{hint}"
        )
    generator = random.Random(0)
    generator.shuffle(train)
    if is_labelled(rows.get("test", [])) and is_labelled(rows.get("validation", [])):
        selection = rows.pop("validation")
        generator.shuffle(selection)
    else:
        train, selection = _hold_out(train, "validation", data.notes)
    if not any(is_labelled(some) for some in rows.values()):
        name = "held_out" if "test" in rows else "test"  # the task's own keep their predictions
        train, rows[name] = _hold_out(train, name, data.notes)
    if max_train_rows is not None and len(train) > max_train_rows:
        data.notes.append(f"train: {max_train_rows} of {len(train)} rows used")
        train = train[:max_train_rows]
    final = {split: some_of(some, max_test_rows) for split, some in rows.items()}
    if max_test_rows is not None:
        data.notes.append(f"at most {max_test_rows} rows of each split evaluated")
    return Arrangement(train, selection[:max_validation_rows], final)


def some_of(rows: list[dict], count: int | None) -> list[dict]:
    """At most `count` rows, the same every time and in their order; official files are sorted."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), count))]


def _hold_out(train, purpose, notes):
    count = min(AT_MOST, max(1, int(len(train) * HELD_OUT)))
    if count >= len(train):
        raise ValueError(
            f"{len(train)} training rows are too few to keep some back for {purpose}: give a "
            "validation file and a test file."
        )
    notes.append(f"{purpose}: {count} training rows held out")
    return train[count:], train[:count]
