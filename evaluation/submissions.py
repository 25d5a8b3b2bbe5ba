"""Files for the leaderboards of GLUE, SuperGLUE and SQuAD, and their validators.

    python -m evaluation.submissions write --benchmark glue --predictions O --output glue.zip
    python -m evaluation.submissions check --benchmark glue glue.zip

O is what `python -m evaluation.run --tasks …` wrote with the test files. What is written is checked
at once. Exit code 0, or 2 where something is missing or malformed; every fault names its line.
"""

import argparse
import json
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .data import read_file
from .tasks import ENTAILMENT, TRUTH, TWO_WAY, get_task

SHOWN = 20  # faults named in one message


@dataclass(frozen=True)
class File:
    """One file of a submission: whose predictions it holds, how many, and what they may be.

    `labels` are the words of the classes in the task's order; "score" for a number from 0 to 5,
    "text" for any, "nested" for MultiRC's answers inside questions inside paragraphs.
    """

    task: str
    split: str
    rows: int
    labels: tuple | str


GLUE = {
    "AX.tsv": File("ax", "test", 1104, ENTAILMENT),
    "CoLA.tsv": File("cola", "test", 1063, ("0", "1")),
    "MNLI-m.tsv": File("mnli", "test", 9796, ENTAILMENT),
    "MNLI-mm.tsv": File("mnli", "test_mismatched", 9847, ENTAILMENT),
    "MRPC.tsv": File("mrpc", "test", 1725, ("0", "1")),
    "QNLI.tsv": File("qnli", "test", 5463, TWO_WAY),
    "QQP.tsv": File("qqp", "test", 390965, ("0", "1")),
    "RTE.tsv": File("rte", "test", 3000, TWO_WAY),
    "SST-2.tsv": File("sst2", "test", 1821, ("0", "1")),
    "STS-B.tsv": File("stsb", "test", 1379, "score"),
    "WNLI.tsv": File("wnli", "test", 146, ("0", "1")),
}
SUPERGLUE = {
    "AX-b.jsonl": File("axb", "test", 1104, TWO_WAY),
    "AX-g.jsonl": File("axg", "test", 356, TWO_WAY),
    "BoolQ.jsonl": File("boolq", "test", 3245, ("false", "true")),
    "CB.jsonl": File("cb", "test", 250, ("entailment", "contradiction", "neutral")),
    "COPA.jsonl": File("copa", "test", 500, (0, 1)),
    "MultiRC.jsonl": File("multirc", "test", 9693, "nested"),
    "ReCoRD.jsonl": File("record", "test", 10000, "text"),
    "RTE.jsonl": File("rte", "test", 3000, TWO_WAY),
    "WiC.jsonl": File("wic", "test", 1400, ("false", "true")),
    "WSC.jsonl": File("wsc", "test", 146, TRUTH),
}


def _raise(faults: list[str]) -> None:
    if faults:
        more = f"\n… and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ValueError("\n".join(faults[:SHOWN]) + more)


def _archive(path: Path, expected: dict[str, File]) -> tuple[dict[str, list[str]], list[str]]:
    """The lines of each file in a zip, and what is wrong with the zip itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            contents = {name: archive.read(name) for name in names if name in expected}
    # Damaged, encrypted, packed in a way that Python does not know: each has an error of its own.
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a zip file that can be read: {error}.") from None
    faults = [f"{path} lacks {name}" for name in expected if name not in contents]
    faults += [
        f"{path} holds {name}, which is no part of it" for name in names if name not in expected
    ]
    faults += [f"{path} holds {name} twice" for name in {n for n in names if names.count(n) > 1}]
    lines = {}
    for name, content in contents.items():
        try:
            lines[name] = content.decode("utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            faults.append(f"{name}, line {line}: not UTF-8 ({error.reason})")
    return lines, faults


def check_glue(path: str | Path) -> None:
    """Check a zip of GLUE's 11 files.

    Raises:
        ValueError: naming file and line of every fault (the first 20).
    """
    lines, faults = _archive(Path(path), GLUE)
    for name, content in lines.items():
        faults += _check_tsv(name, GLUE[name], content)
    _raise(faults)


def _check_tsv(name, file, lines) -> Iterator[str]:
    if lines[0] != "index\tprediction":
        yield f"{name}, line 1: {lines[0]!r:.60}, expected 'index\\tprediction'"
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        if len(cells) != 2:
            yield f"{name}, line {number}: {len(cells)} columns, expected 2"
            continue
        if cells[0] != str(number - 2):
            yield f"{name}, line {number}: index {cells[0]!r}, expected {number - 2}"
        if file.labels == "score":
            if not _is_score(cells[1]):
                yield f"{name}, line {number}: {cells[1]!r}, expected a number from 0 to 5"
        elif cells[1] not in file.labels:
            yield f"{name}, line {number}: {cells[1]!r}, expected {' or '.join(file.labels)}"
    if len(lines) - 1 != file.rows:
        yield f"{name}, line {len(lines)}: ends after {len(lines) - 1} rows, expected {file.rows}"


def _is_score(text):
    return bool(re.fullmatch(r"[0-9]+(\.[0-9]+)?", text)) and float(text) <= 5


def check_superglue(path: str | Path) -> None:
    """Check a zip of SuperGLUE's 10 files.

    Raises:
        ValueError: naming file and line of every fault (the first 20).
    """
    lines, faults = _archive(Path(path), SUPERGLUE)
    for name, content in lines.items():
        file = SUPERGLUE[name]
        counted, seen = 0, set()
        for number, line in enumerate(content, 1):
            where = f"{name}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                faults.append(f"{where}: not JSON ({error})")
                continue
            check = _check_nested if file.labels == "nested" else _check_label
            found, rows = check(file, row, seen)
            faults += [f"{where}: {fault}" for fault in found]
            counted += rows
        if counted != file.rows:
            faults.append(
                f"{name}, line {len(content)}: ends after {counted} rows, expected {file.rows}"
            )
    _raise(faults)


def _check_index(row, seen, upto=None):
    index = row.get("idx")
    if type(index) is not int or index < 0 or (upto is not None and index >= upto):
        return [f"idx is {index!r}, expected a number from 0" + (f" to {upto - 1}" if upto else "")]
    if index in seen:
        return [f"idx {index} was there before"]
    seen.add(index)
    return []


def _check_label(file, row, seen):
    if not isinstance(row, dict) or set(row) != {"idx", "label"}:
        return [f"{row!r:.60}, expected an object of idx and label"], 1
    faults = _check_index(row, seen, file.rows)
    label = row["label"]
    if file.labels == "text":
        if not isinstance(label, str) or not label.strip():
            faults.append(f"label is {label!r:.60}, expected a text")
    elif label not in file.labels or type(label) is not type(file.labels[0]):
        faults.append(f"label is {label!r:.60}, expected {' or '.join(map(repr, file.labels))}")
    return faults, 1


def _check_nested(file, row, seen):
    try:
        faults, count, inside = _check_index(row, seen), 0, set()
        for question in row["passage"]["questions"]:
            faults += _check_index(question, inside)
            answers = set()
            for answer in question["answers"]:
                count += 1
                faults += _check_index(answer, answers)
                if answer["label"] not in (0, 1) or type(answer["label"]) is not int:
                    faults.append(f"label is {answer['label']!r:.60}, expected 0 or 1")
    except (KeyError, TypeError, AttributeError) as error:
        shape = '{"idx", "passage": {"questions": [{"idx", "answers": [{"idx", "label"}]}]}}'
        return [f"{error!r}: expected {shape}"], 0
    return faults, count


def check_squad(path: str | Path, data: str | Path) -> None:
    """Check SQuAD's JSON {id: text} against the questions of the official file `data`.

    Raises:
        ValueError: naming the line of every fault (the first 20).
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from None
    try:
        pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply to be read") from None
    if not text.lstrip().startswith("{"):
        raise ValueError(f"{path}, line 1: expected an object of question ids and answers")
    questions = read_file(get_task("squad"), data, [])
    if not all("id" in row for row in questions):
        raise ValueError(f"{data} has questions without an id: pass the official file.")
    ids = [row["id"] for row in questions]
    wanted, seen, faults, place = set(ids), set(), [], 0
    for key, value in pairs:
        found = text.find(json.dumps(key), place)
        place = found + 1 if found >= 0 else place
        where = f"{path}, line {text[:place].count(chr(10)) + 1}"
        if key in seen:
            faults.append(f"{where}: id {key!r} was there before")
        elif key not in wanted:
            faults.append(f"{where}: id {key!r} is no question of {data}")
        if not isinstance(value, str):
            faults.append(f"{where}: the answer is {value!r:.60}, expected a text")
        seen.add(key)
    last = text.rstrip().count("\n") + 1
    faults += [f"{path}, line {last}: ends without id {i!r}" for i in ids if i not in seen]
    _raise(faults)


def read_predictions(folder: str | Path, task: str, split: str) -> list[dict]:
    """The lines of O/TASK/predictions_SPLIT.jsonl.

    Raises:
        ValueError: if the file is not there, with the command that writes it.
    """
    path = Path(folder) / task / f"predictions_{split}.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: run `python -m evaluation.run --tasks {task} --output_dir "
            f"{folder}` with the official test files."
        )
    rows = []
    # Not splitlines: texts hold separators of their own, which JSON leaves as they are.
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                row["prediction"], _place(row["index"] if task != "squad" else 0)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no prediction ({type(error).__name__}: {error}): "
                    "run the evaluation again."
                ) from None
            rows.append(row)
    return rows


def _place(index):
    """An index as a number, or as the numbers of MultiRC and ReCoRD."""
    if isinstance(index, dict):
        return {name: int(value) for name, value in index.items()}
    return int(index)


def _labels(file: File, rows: list[dict]) -> list:
    if file.labels == "score":
        return [f"{min(max(row['prediction'], 0.0), 5.0):.3f}" for row in rows]
    if file.labels == "text":
        return [row["prediction"] for row in rows]
    for row in rows:
        if row["prediction"] not in range(-1, len(file.labels)):
            raise ValueError(
                f"{file.task}, {file.split}, index {row['index']}: prediction {row['prediction']!r}"
                f" is none of the {len(file.labels)} classes. Run the evaluation again."
            )
    # A generated text that is no label word stands for the first class: a file has no gaps.
    return [file.labels[max(0, row["prediction"])] for row in rows]


def write_glue(predictions: str | Path, output: str | Path) -> None:
    """Write and check GLUE's zip from a folder of `evaluation.run`."""

    def table(file):
        rows = read_predictions(predictions, file.task, file.split)
        rows.sort(key=lambda row: int(row["index"]))
        pairs = zip(rows, _labels(file, rows), strict=True)
        return ["index\tprediction", *(f"{row['index']}\t{label}" for row, label in pairs)]

    _write_archive(output, GLUE, table, check_glue)


def write_superglue(predictions: str | Path, output: str | Path) -> None:
    """Write and check SuperGLUE's zip from a folder of `evaluation.run`."""

    def lines(file):
        rows = read_predictions(predictions, file.task, file.split)
        if file.labels == "nested":
            return [json.dumps(row) for row in _nest(rows)]
        pairs = zip(rows, _labels(file, rows), strict=True)
        return [json.dumps({"idx": _index(row), "label": label}) for row, label in pairs]

    _write_archive(output, SUPERGLUE, lines, check_superglue)


def _index(row):
    index = row["index"]
    return index["query"] if isinstance(index, dict) else int(index)


def _nest(rows):
    paragraphs: dict[int, dict[int, list]] = {}
    for row in rows:
        place = row["index"]
        questions = paragraphs.setdefault(place["paragraph"], {})
        answer = {"idx": place["answer"], "label": max(0, row["prediction"])}
        questions.setdefault(place["question"], []).append(answer)
    for paragraph, questions in paragraphs.items():
        listed = [{"idx": idx, "answers": answers} for idx, answers in questions.items()]
        yield {"idx": paragraph, "passage": {"questions": listed}}


def _write_archive(output, files, lines: Callable[[File], list[str]], check):
    contents = {name: "\n".join(lines(file)) + "\n" for name, file in files.items()}
    with _checked(output, check) as unfinished:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)


@contextmanager
def _checked(output, check):
    """A name to write to; only what passes the check gets the name `output`."""
    unfinished = Path(output).with_name(f".{Path(output).name}.{os.getpid()}")
    try:
        yield unfinished
        check(unfinished)
        os.replace(unfinished, output)
    except ValueError as error:
        raise ValueError(str(error).replace(str(unfinished), str(output))) from None
    finally:
        unfinished.unlink(missing_ok=True)


def write_squad(predictions: str | Path, output: str | Path, data: str | Path) -> None:
    """Write and check SQuAD's JSON from a folder of `evaluation.run`."""
    rows = read_predictions(predictions, "squad", "validation")
    if not all("id" in row for row in rows):
        raise ValueError(
            f"The predictions in {predictions} have no ids: evaluate on the official file, {data}."
        )
    answers = {row["id"]: row["prediction"] for row in rows}
    with _checked(output, lambda path: check_squad(path, data)) as unfinished:
        text = json.dumps(answers, indent=0, ensure_ascii=False) + "\n"
        unfinished.write_text(text, "utf-8")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.submissions", description=__doc__)
    parser.add_argument("action", choices=("write", "check"))
    parser.add_argument("file", nargs="?", help="the file to check")
    parser.add_argument("--benchmark", choices=("glue", "superglue", "squad"), required=True)
    parser.add_argument("--predictions", help="the --output_dir of evaluation.run")
    parser.add_argument("--output", help="the file to write")
    parser.add_argument("--data", help="SQuAD's dev-v1.1.json, whose ids are expected")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    args = parser.parse_intermixed_args(argv)
    if args.benchmark == "squad" and not args.data:
        parser.error("--benchmark squad needs --data, the official file with the questions")
    if args.action == "write" and not (args.predictions and args.output):
        parser.error("write needs --predictions and --output")
    if args.action == "write" and Path(args.output).is_dir():
        parser.error(f"--output {args.output} is a folder. Name a file.")
    if args.action == "write" and Path(args.output).exists() and not args.overwrite:
        parser.error(f"--output {args.output} exists. Pass --overwrite to replace it.")
    if args.action == "write" and not Path(args.output).absolute().parent.is_dir():
        parser.error(f"--output {args.output}: its folder is not there. Make it first.")
    if args.action == "check" and not args.file:
        parser.error("check needs the file")
    actions = {
        "glue": (write_glue, check_glue),
        "superglue": (write_superglue, check_superglue),
        "squad": (write_squad, check_squad),
    }
    write, check = actions[args.benchmark]
    data = [args.data] if args.benchmark == "squad" else []
    try:
        if args.action == "write":
            write(args.predictions, args.output, *data)
        else:
            check(args.file, *data)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output or args.file}: ready to submit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
