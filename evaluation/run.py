"""Evaluate a model on tasks: `python -m evaluation.run --model M --tasks sst2 … --output_dir O`.

Writes O/TASK/results.json and O/TASK/predictions_SPLIT.jsonl, and O/results.json: the record of a
single task, a list of the records of several. Exit code 0, or 2 for a wrong argument or file.
"""

import argparse
import sys
from pathlib import Path

from . import with_evaluate
from .answers import METHODS, check_method, check_words
from .data import Data, is_labelled, load, read_file
from .prediction import load_model, predict
from .results import (
    check_at_least,
    evaluate_splits,
    main_split,
    make_record,
    read_results,
    write_json,
)
from .splits import some_of
from .tasks import ANSWERED_BY, TASKS, Task, custom_task, get_task


def evaluation_splits(data: Data, asked: list[str] | None = None) -> list[str]:
    """The splits to answer: those asked for, or all but the training rows."""
    if asked:
        missing = [split for split in asked if split not in data.rows]
        if missing:
            raise ValueError(
                f"splits={missing} are not there; the data has {', '.join(data.rows)}."
            )
        return asked
    found = [split for split in data.rows if split != "train"]
    if not found:
        raise ValueError("The data has training rows only: there is nothing to evaluate on.")
    return found


def evaluate_task(args, task: Task, data: Data, model, tokenizer, method) -> dict:
    """One task's record; its files are written."""
    method = check_method(task, args.method or method)
    data.notes += check_words(task, method, tokenizer)
    rows = {
        split: some_of(data.rows[split], args.max_rows)
        for split in evaluation_splits(data, args.splits)
    }
    if args.max_rows:
        data.notes.append(f"at most {args.max_rows} rows of each split evaluated")

    def answer(some):
        answers = predict(
            task,
            model,
            tokenizer,
            some,
            method,
            args.max_input_length,
            args.batch_size,
            args.num_beams,
        )
        if args.check_with_evaluate and is_labelled(some):
            with_evaluate.check(task, some, [answer["prediction"] for answer in answers])
        return answers

    folder = Path(args.output_dir) / task.name
    metrics, intervals = evaluate_splits(task, rows, answer, folder)
    if not metrics:
        data.notes.append("no split has all its labels: there are predictions, but no metrics")
    record = make_record(
        task.name,
        args.model,
        [metrics],
        rows,
        evaluated_on=main_split(rows),
        method=method,
        confidence_95=intervals,
        checked_with_evaluate=args.check_with_evaluate,
        notes=data.notes,
    )
    write_json(folder / "results.json", record)
    return record


def load_task(args, name: str, model) -> tuple[Task, Data]:
    """The task and its rows; for `custom` from `--test_file` and the model's own label words."""
    if name != "custom":
        task = get_task(name)
        return task, load(task, args.data_dir)
    if not args.test_file:
        raise ValueError("task `custom` needs --test_file, a file with the text and its label.")
    words = [model.config.id2label[i] for i in range(len(model.config.id2label))]
    task, notes = custom_task(words, args.text_column, args.label_column), []
    return task, Data({"test": read_file(task, args.test_file, notes, "test")}, notes)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers out of range, files of a task that is not asked for, another's folder.

    Raises:
        ValueError: naming the argument.
    """
    check_at_least(1, max_rows=args.max_rows, max_input_length=args.max_input_length)
    check_at_least(1, batch_size=args.batch_size, num_beams=args.num_beams)
    columns = (args.text_column, args.label_column) != ("text", "label")
    if "custom" not in args.tasks and (args.test_file or columns):
        raise ValueError("--test_file, --text_column and --label_column are of --tasks custom.")
    path = Path(args.output_dir) / "results.json"
    if path.is_file():
        for record in read_results(path):
            if "evaluation.run" not in record["command"]:
                raise ValueError(
                    f"output_dir={args.output_dir!r} holds the results of `{record['command']:.80}`"
                    ": choose another folder."
                )


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluation.run", description=__doc__)
    parser.add_argument("--model", required=True, help="a saved folder, or owner/name on the Hub")
    parser.add_argument("--revision", help="the commit to load from the Hub")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--tasks", nargs="+", required=True, choices=[*TASKS, "custom"])
    parser.add_argument("--data_dir", help="files of the task, or a folder of them for each task")
    parser.add_argument("--test_file", help="of task custom")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--splits", nargs="+", help="all but train by default")
    parser.add_argument("--method", choices=METHODS, help="the task's own by default")
    parser.add_argument("--max_rows", type=int, help="of each split; all by default")
    parser.add_argument("--max_input_length", type=int, default=512, help="tokens")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--check_with_evaluate",
        action="store_true",
        help="compute the metrics a second time with Hugging Face's `evaluate`",
    )
    parser.add_argument("--num_beams", type=int, default=1)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    try:
        import modeling_convt5  # noqa: F401 - registers the family
    except ImportError:
        pass  # then the folder's own code is needed: --trust_remote_code
    try:
        check_arguments(args)
        model, tokenizer, method = load_model(args.model, args.revision, args.trust_remote_code)
        records = []
        for name in args.tasks:
            task, data = load_task(args, name, model)
            if name in ANSWERED_BY:
                data.notes.append(
                    f"{name} has no training rows; its input is {ANSWERED_BY[name]}'s"
                )
            records.append(evaluate_task(args, task, data, model, tokenizer, method))
            for line in _summary(records[-1]):
                print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(Path(args.output_dir) / "results.json", records[0] if len(records) == 1 else records)
    return 0


def _summary(record):
    for name, metric in record["metrics"].items():
        interval = record["confidence_95"].get(name)
        bounds = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
        yield f"{record['task']}: {name} {metric['mean']:.4f}{bounds}"
    yield from (f"{record['task']}: {note}" for note in record["notes"])


if __name__ == "__main__":
    sys.exit(main())
