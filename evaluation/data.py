"""Rows of a task from local files or from the Hub, whatever the file writes them as.

A row is a dictionary: the task's columns, `label` (a class number, a number, a text, or None where
it is hidden), the task's extra columns, and for tasks with several right answers `answers`.
"""

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .layouts import flatten
from .tasks import Task

USUAL = {
    "train": ("train", "training"),
    "validation": ("validation", "dev", "valid", "val"),
    "test": ("test", "testing"),
}
TEXT_FORMATS = ("tsv", "csv", "txt", "label")
FORMATS = ("tsv", "csv", "jsonl", "json", "parquet", "txt", "label")

Record = tuple[str, dict[str, Any]]  # where it stands, and its columns as the file has them


@dataclass
class Data:
    """The rows of each split, and what is to be said about them."""

    rows: dict[str, list[dict]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load(task: Task, data_dir: str | Path | None = None, splits: Iterable[str] = ()) -> Data:
    """A task's rows, from the files of a folder or, without one, from the Hub.

    Args:
        data_dir: holds a file for each split, found by name: `train.*`, `validation.*` or `dev.*`,
            `test.*`, in tsv, csv, jsonl, json or parquet, each plain or .gz; or a folder of that
            kind named as the task.
        splits: those to read; all of the task's by default. What is not there is left out.

    Raises:
        ValueError: if nothing is there, and for a file that cannot be understood, naming the line.
    """
    data = Data()
    wanted = tuple(splits) or tuple(dict.fromkeys([*task.rows, *USUAL]))
    if data_dir is None:
        for split, records in _hub_splits(task, wanted):
            data.rows[split] = _rows(task, records, data.notes, split)
    else:
        folder = Path(data_dir)
        folder = folder / task.name if (folder / task.name).is_dir() else folder
        for split in wanted:
            path = find_file(folder, task, split)
            if path is not None:
                labels = find_file(folder, task, task.label_files.get(split, ""))
                data.rows[split] = read_file(task, path, data.notes, split, labels)
        if not data.rows:
            raise ValueError(
                f"data_dir={str(data_dir)!r} holds no file of task {task.name!r}: expected "
                f"{', '.join(f'{split}.*' for split in wanted)} in {', '.join(FORMATS)}, plain or "
                ".gz."
            )
    data.notes += compare_sizes(task, data.rows) + count_duplicates(task, data.rows)
    return data


def find_file(folder: Path, task: Task, split: str) -> Path | None:
    """The file of a split, or None.

    Raises:
        ValueError: if the folder is not there, or two files claim the split.
    """
    if not folder.is_dir():
        raise ValueError(
            f"data_dir={str(folder)!r} is not a folder. Pass one with the task's files."
        )
    names = {}
    for path in sorted(folder.iterdir()):
        stem, _, ending = path.name.lower().removesuffix(".gz").rpartition(".")
        if path.is_file() and ending in FORMATS:
            names.setdefault(stem, []).append(path)
    for stem in (*task.files.get(split, ()), *USUAL.get(split, (split,))):
        for name in (stem, f"{task.name}.{stem}", f"{task.name}_{stem}", f"{task.name}-{stem}"):
            found = names.get(name.lower(), [])
            if len(found) > 1:
                raise ValueError(
                    f"{folder} holds {' and '.join(path.name for path in found)}, both for the "
                    f"split {split!r}: leave one of them there."
                )
            if found:
                return found[0]
    return None


def read_file(
    task: Task,
    path: str | Path,
    notes: list[str],
    split: str = "",
    labels: str | Path | None = None,
) -> list[dict]:
    """The rows of one file; what was left out is added to `notes`.

    Args:
        labels: a csv file with an `id` of the rows and their label, where it is kept apart.

    Raises:
        ValueError: naming the file and the line of what cannot be understood.
    """
    path = Path(path)
    ending = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if ending not in FORMATS:
        raise ValueError(
            f"{path} is of no known format: expected one of {', '.join(FORMATS)}, plain or .gz."
        )
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Check its name.")
    content = _content(path)
    if ending == "parquet":
        records = _read_parquet(path, content)
    else:
        text = _decode(content, path, task.latin1)
        if ending in TEXT_FORMATS:
            records = _read_columns(task, path, text, "," if ending == "csv" else "\t", notes)
        else:
            records = _read_json(path, text)
    if labels is not None:
        apart = csv.DictReader(io.StringIO(_decode(_content(labels), labels, task.latin1)))
        known = {row.get("id"): row for row in apart}
        records = ((where, {**known.get(row.get("id"), {}), **row}) for where, row in records)
    rows = _rows(task, records, notes, split or path.name, is_csv=ending == "csv")
    if not rows:
        raise ValueError(f"{path} holds no rows. Check its content, or move it away.")
    return rows


def _content(path):
    """The bytes of a file, plain or .gz."""
    content = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged, or not a .gz file ({error}).") from None


def _decode(content, path, latin1):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if latin1:  # the encoding of the official files
            return content.decode("iso-8859-1")
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is not UTF-8 text ({error.reason}).") from None


def _read_parquet(path, content) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged, or no parquet file ({error}).") from None
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))


def _read_json(path, text) -> Iterator[Record]:
    """A list, the `data` of an object (SQuAD's layout), or an object on each line."""
    if path.name.lower().removesuffix(".gz").endswith(".json"):
        try:
            content = json.loads(text)
        except ValueError:
            content = None  # SuperGLUE's kind: lines
        if isinstance(content, dict) and isinstance(content.get("data"), list):
            content = content["data"]
        elif isinstance(content, dict) and "\n" not in text.strip():
            content = None
        if isinstance(content, list):
            yield from ((f"{path}, row {i}", _object(r, path, i)) for i, r in enumerate(content, 1))
            return
        if content is not None:
            raise ValueError(
                f"{path} holds neither a list, nor an object with a list `data`, nor an object on "
                "each line."
            )
    # Not splitlines: texts hold separators of their own, which JSON leaves as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", _object(json.loads(line), path, number)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from None


def _object(value, path, number):
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number} is {value!r:.60}, expected an object of columns.")
    return value


def _read_columns(task, path, text, separator, notes) -> Iterator[Record]:
    """A table with a header, the columns of an official file without, or an official raw file."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    if task.raw and re.fullmatch(task.raw, first.strip()):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                match = re.fullmatch(task.raw, line.strip())
                if match is None:
                    raise ValueError(f"{path}, line {number} is {line!r:.60}, not as {task.raw}.")
                yield f"{path}, line {number}", match.groupdict()
        return
    if separator == "\t":  # official files leave quotation marks as they are
        lines = (line.rstrip("\r") for line in text.split("\n"))
        table = ((i, line.split("\t")) for i, line in enumerate(lines, 1) if line.strip())
    else:
        csv.field_size_limit(1 << 30)
        reader = csv.reader(io.StringIO(text, newline=""))
        table = ((reader.line_num, cells) for cells in reader if cells)
    start = next(table, None)
    if start is None:
        return
    number, header = start[0], [cell.strip().lower() for cell in start[1]]
    names = _header(task, header)
    twice = [name for name, count in Counter(names or ()).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: its header names {twice[0]!r} twice. Rename one of them.")
    if names is None:
        names = _headerless(task, path, len(header))
        yield f"{path}, line {number}", dict(zip(names, start[1], strict=True))
    for number, cells in table:
        if [cell.strip().lower() for cell in cells] == header and names == header:
            continue
        if len(cells) != len(names):
            fault = (
                f"{path}, line {number} has {len(cells)} columns, expected {len(names)}: "
                f"{', '.join(names)}."
            )
            if not task.broken_lines:
                raise ValueError(fault)
            notes.append(f"left out: {fault}")
            continue
        yield f"{path}, line {number}", dict(zip(names, cells, strict=True))


def _header(task, cells):
    """The cells if they name a column that the task reads."""
    known = {name.lower() for column, others in task.columns.items() for name in (column, *others)}
    known |= {name.lower() for parts in task.joined.values() for name in parts}
    return cells if known & set(cells) else None


def _headerless(task, path, count):
    for names in task.headerless:
        if len(names) == count:
            return list(names)
    expected = "; or ".join(", ".join(names) for names in task.headerless)
    raise ValueError(
        f"{path} begins with a line of {count} columns that names none of "
        f"{', '.join(task.columns)}"
        + (f", nor are these the columns of an official file: {expected}." if expected else ".")
        + " Put the columns' names on the first line."
    )


def _rows(task, records: Iterable[Record], notes, split, is_csv=False) -> list[dict]:
    rows, dropped = [], 0
    pairs = [
        (where, flat)
        for where, record in records
        for flat in flatten(task.name, where, _lower_names(where, record))
    ]
    shift = _first_class(task, pairs, notes, split, is_csv)
    if pairs and not any(name.lower() in record for name in task.label for _, record in pairs):
        told = f"{', '.join(pairs[0][1])}; a label would be called {' or '.join(task.label)}"
        if task.name == "custom":
            raise ValueError(f"{pairs[0][0]} has no label: its columns are {told}.")
        notes.append(f"{split}: without labels, its columns are {told}")
    for where, record in pairs:
        row = _row(task, record, where, shift)
        if row is None:
            dropped += 1
        else:
            rows.append(row)
    if dropped:
        notes.append(f"{split}: {dropped} rows without one of the task's classes left out")
    # Hidden labels are all hidden; single ones are rows that count for nothing (-1 in Jigsaw's).
    labelled = [row for row in rows if row["label"] is not None]
    if 0 < len(labelled) < len(rows):
        notes.append(f"{split}: {len(rows) - len(labelled)} rows without a label left out")
        return labelled
    return rows


def _lower_names(where, record):
    lower = {name.lower(): value for name, value in record.items()}
    if len(lower) < len(record):
        twice = Counter(name.lower() for name in record).most_common(1)[0][0]
        raise ValueError(f"{where} has {twice!r} twice, in upper and lower case. Rename one.")
    return lower


def _first_class(task, pairs, notes, split, is_csv):
    """1 if classes are numbered from 1, as in the official csv of AG News, else 0."""
    if task.name != "ag_news":
        return 0
    values = {_word(_get(record, task.label)) for _, record in pairs}
    if "0" in values:
        return 0
    if "4" in values or any("class index" in record for _, record in pairs):
        return 1
    if values <= {"1", "2", "3"}:
        notes.append(f"{split}: has neither class 0 nor 4, and is taken to count from {is_csv:d}")
    return int(is_csv)


def _get(record, names):
    """The first of the columns that is there and not empty; NaN is what tables write for that."""
    for name in names:
        value = record.get(name.lower())
        if value is not None and value == value:
            return value
    return None


def _text(value, where, column):
    if isinstance(value, bytes):
        raise ValueError(f"{where}: {column!r} holds bytes, expected text. Write it as a string.")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: {column!r} holds half a character (a lone surrogate), {text!r:.60}."
        ) from None
    return text


def _row(task, record, where, shift):
    row = {}
    for column, others in task.columns.items():
        value = _get(record, (column, *others))
        if value is None and column in task.joined:
            parts = [_get(record, (part,)) for part in task.joined[column]]
            value = None if None in parts else " ".join(parts)
        if value is None and any(name.lower() in record for name in (column, *others)):
            raise ValueError(f"{where}: its {column!r} is empty. Remove that row.")
        if value is None:
            raise ValueError(
                f"{where} has no column {column!r}: it has {', '.join(record)}. Rename one of them "
                f"to {' or '.join((column, *others))}."
            )
        row[column] = _list(value, where) if column == "entities" else _text(value, where, column)
        if not row[column] and column == "entities":
            raise ValueError(f"{where}: its {column!r} is empty. Remove that row.")
    for name in task.extra:
        if record.get(name) is not None:
            row[name] = record[name]
    value = _get(record, task.label)
    if isinstance(value, str):
        value = value.strip()
        if task.name == "custom" and value.lower() == "nan":
            value = None
    if task.kind in ("answers", "entity"):
        row["answers"], row["answer_starts"] = _answers(value, where)
        row["label"] = row["answers"][0] if row["answers"] else None
        return row
    if value is None or value == "":
        row["label"] = None
        return row
    if task.kind == "text":
        row["label"] = _text(value, where, task.label[0])
        return row
    column = next(name for name in task.label if _get(record, (name,)) is not None)
    if column in OLD_NUMBERS and is_number(value):
        raise ValueError(
            f"{where}: the label {value!r} is a number of an older copy of TREC, which counts in "
            f"an order of its own. Write the classes as words, or use the column {task.label[0]!r}."
        )
    try:
        row["label"] = number = read_label(task, value, shift)
    except ValueError as error:
        if str(value).lower() in task.label:  # a header in the middle, as some mirrors have it
            return None
        raise ValueError(f"{where}: {error}") from None
    return None if number is DROPPED else row


DROPPED = object()
# TREC's columns whose numbers follow no order that is written in the data set.
OLD_NUMBERS = {"label-coarse", "label-fine"}


def read_label(task: Task, value: Any, shift: int = 0) -> int | float | None | object:
    """A label as files write it -> the class number, the similarity, or None if it is hidden.

    Args:
        shift: the number that the file gives the first class.

    Returns:
        `DROPPED` for a row that belongs to none of the task's classes.

    Raises:
        ValueError: naming the label and the classes.
    """
    word = _word(value)
    if word in task.spellings:
        return DROPPED if task.spellings[word] is None else task.spellings[word]
    words = [name.lower() for name in task.words]
    if task.kind == "classification":
        text = str(value).strip()
        if text in task.words:  # a user's labels may differ in case only
            return task.words.index(text)
        if word in words:
            return words.index(word)
    number = float(word) if is_number(word) else None
    if task.kind == "classification" and all(map(is_number, words)):
        # A user's classes are numbers, 1 to 5 perhaps: none of them is meant by its place.
        if number in map(float, words):
            return [float(name) for name in words].index(number)
        if number is None or not math.isnan(number):
            raise ValueError(
                f"label {value!r} is none of task {task.name!r}: expected {', '.join(task.words)}."
            )
    if isinstance(value, bool):
        return int(value)
    if number is not None and (number == -1 or math.isnan(number)):
        return None
    if number is not None and math.isinf(number):
        number = None
    if task.kind == "similarity" and number is not None and 0 <= number <= 5:
        return number
    if "toxicity" in task.label and number is not None and 0 <= number <= 1:
        return int(number >= 0.5)  # the share of raters that find the text toxic
    if task.kind == "classification" and number is not None and number == int(number):
        if 0 <= number - shift < len(words):
            return int(number) - shift
    allowed = "a number from 0 to 5" if task.kind == "similarity" else ", ".join(task.words[:60])
    raise ValueError(
        f"label {value!r} is none of task {task.name!r}: expected {allowed}"
        + (f", or a number from {shift} to {len(words) - 1 + shift}." if words else ".")
    )


def is_number(value: Any) -> bool:
    """Whether a label is a number, or a text that is one."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _word(value):
    """A label as text, in lower case; a whole number without decimals, as "1.0" may be meant."""
    word = str(value).strip().lower()
    try:
        number = float(word)
    except ValueError:
        return word
    return str(int(number)) if math.isfinite(number) and number == int(number) else word


def _list(value, where):
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{where}: {value!r:.60} is not a list in JSON.") from None
    return list(value)


def _answers(value, where):
    """Texts and, where they are known, the characters at which they begin."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{where}: answers {value!r:.60} are not JSON.") from None
    if value is None or value == "":
        return [], []
    if isinstance(value, str):
        return [value], []
    try:
        if isinstance(value, dict):  # the Hub's layout
            texts, starts = value["text"], value.get("answer_start", [])
        elif value and isinstance(value[0], dict):  # the official layout
            starts = [answer.get("answer_start", answer.get("start")) for answer in value]
            texts = [answer["text"] for answer in value]
        else:
            texts, starts = value, []
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("the texts are no list of texts")
        return list(texts), [] if None in starts else list(starts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: answers {value!r:.60} are neither a list of texts nor laid out as SQuAD's "
            f"({type(error).__name__}: {error})."
        ) from None


def _hub_splits(task, wanted):
    if task.hub is None:
        raise ValueError(
            f"Task {task.name!r} has no data set on the Hub: pass --data_dir with its files."
        )
    from datasets import get_dataset_split_names, load_dataset

    name, config, revision = task.hub
    present = get_dataset_split_names(name, config, revision=revision)
    for split in wanted:
        theirs = task.hub_splits.get(split, split)
        if theirs in present:
            rows = load_dataset(name, config, split=theirs, revision=revision)
            yield split, ((f"{name}, {theirs}, row {i}", row) for i, row in enumerate(rows, 1))


def compare_sizes(task: Task, rows: dict[str, list[dict]]) -> list[str]:
    """A note for each split whose number of rows is not the official one."""
    return [
        f"{split}: {len(rows[split])} rows, officially {official}"
        for split, official in task.rows.items()
        if split in rows and len(rows[split]) != official
    ]


def count_duplicates(task: Task, rows: dict[str, list[dict]]) -> list[str]:
    """A note for each split with inputs that the training rows have as well."""

    def inputs(row):
        return tuple(" ".join(str(row[column]).split()) for column in task.columns)

    seen = Counter(inputs(row) for row in rows.get("train", ()))
    notes = []
    for split, others in rows.items():
        if split != "train" and seen:
            count = sum(inputs(row) in seen for row in others)
            if count:
                notes.append(f"{split}: {count} of {len(others)} inputs are also training inputs")
    return notes


def is_labelled(rows: list[dict]) -> bool:
    """Whether the labels of a split are known, all of them."""
    return bool(rows) and all(row["label"] is not None for row in rows)
