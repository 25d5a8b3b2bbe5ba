"""The paper's table 2 at our scale: four models, not pre-trained and pre-trained, on four tasks.

    python -m benchmarks.benchmark_table2 --data_dir DATA --text TEXT --tokenizer tokenizer.json \\
        --work_dir WORK

DATA holds a folder for each of sst2, imdb and cogs, besides nli/mnli.dev.jsonl (MNLI's training
rows are not at hand: these are split), s140/test_359_binary.jsonl, which the models of sst2 answer,
and, for --tasks squad-head squad-text, xquad/xquad.en.json, of whose articles every sixth is held
out: answered by the question-answering head, and as a text. Missing pre-trainings and fine-tunings
are run, the former as benchmark_families.py does, whose --work_dir WORK may be; what is in WORK is
kept, so that an interrupted run goes on.

Every cell is examples/finetune.py with the settings of `CELLS`: the best on validation rows, the
test rows answered once. "Gain" is the paper's: by how many per cent of the untrained model's
number the pre-trained one's is higher. Whether a pre-trained decoder reads what it is given is
said by its held-out loss with the input of another row. Results go to
OUTPUT_DIR/table2_<hardware>_<date>.json, .md; with other --tasks than these, to table2-TASKS_….
"""

import argparse
import json
import os
import shutil
import sys
from datetime import date
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from benchmarks.benchmark_convolution import processor, write
from benchmarks.benchmark_families import FAMILIES, folder_of_tokenizer, pretrain
from benchmarks.cells import options, results_path, run_cells, said, write_results
from examples.continue_pretraining import Rows
from pretraining.collator import SpanCorruptionCollator
from pretraining.configs.tiny_cpu import config
from pretraining.prepare import prepare
from pretraining.records import is_prepared

# Task: seeds, and finetune.py's arguments. So small models learn at ten times the paper's rate;
# rows of like length make a batch. The longest test texts of COGS have 300 tokens.
SMALL = {"learning_rate": 1e-2, "train_sampling_strategy": "group_by_length"}
SQUAD = {"learning_rate": 1e-2, "max_steps": 100, "eval_steps": 50, "max_input_length": 320}
SQUAD["per_device_train_batch_size"] = 16
CELLS = {
    "sst2": ([0, 1, 2], {**SMALL, "max_steps": 300, "eval_steps": 100, "max_input_length": 64}),
    "imdb": (
        [0],
        {
            **SMALL,
            "max_steps": 150,
            "eval_steps": 75,
            "per_device_train_batch_size": 16,
            "max_input_length": 192,
            "max_validation_rows": 300,
            "max_test_rows": 2000,
        },
    ),
    "mnli": ([0], {**SMALL, "max_steps": 300, "eval_steps": 150, "max_input_length": 96}),
    "cogs": (
        [0],
        {
            **SMALL,
            "max_steps": 1000,
            "eval_steps": 500,
            "lr_scheduler_type": "linear",
            "config_overrides": "dropout_rate=0.0",
            "per_device_train_batch_size": 16,
            "max_input_length": 64,
            "max_validation_rows": 100,
            "max_test_rows": 1000,
        },
    ),
    "squad-head": ([0], {"method": "head", **SQUAD}),
    "squad-text": ([0], {**SQUAD, "max_steps": 400, "eval_steps": 100}),
}
# What COGS comes to in more steps, for one model.
LONGER = ("lightweight", "not pre-trained", {"max_steps": 2000, "eval_steps": 1000})
PAPERS = ["sst2", "imdb", "mnli", "cogs"]
METRIC = {"cogs": "exact_match", "squad-head": "f1", "squad-text": "f1"}  # else accuracy
STARTS = ("not pre-trained", "pre-trained")


def task_folders(args: argparse.Namespace) -> dict[str, Path]:
    """Where each task's files are; MNLI's development rows under the name of training rows."""
    found = {task: args.data_dir / task for task in ("sst2", "imdb", "cogs")}
    renamed = {
        "mnli": (args.data_dir / "nli" / "mnli.dev.jsonl", "train.jsonl"),
        "s140": (args.data_dir / "s140" / "test_359_binary.jsonl", "dev.jsonl"),
    }
    for task, (source, name) in renamed.items():
        found[task] = args.work_dir / "data" / task
        found[task].mkdir(parents=True, exist_ok=True)
        if not (found[task] / name).exists():
            shutil.copyfile(source, found[task] / name)
    if any(task.startswith("squad") for task in args.tasks):
        found["squad"] = args.work_dir / "data" / "squad"
        split_articles(args.data_dir / "xquad" / "xquad.en.json", found["squad"])
    return found


def split_articles(source: Path, folder: Path) -> None:
    """Files of SQuAD's schema without a common article: every sixth is for validation."""
    articles = json.loads(source.read_text("utf-8"))["data"]
    folder.mkdir(parents=True, exist_ok=True)
    for split, is_held_out in (("train", False), ("validation", True)):
        some = [a for i, a in enumerate(articles) if (i % 6 == 5) == is_held_out]
        write(folder / f"{split}.json", json.dumps({"version": "1.1", "data": some}))


def pretrained(args: argparse.Namespace) -> dict[str, Path]:
    """The exports of all four models after --pretrain_steps; trained where they are missing."""
    records = args.work_dir / "records"
    if not is_prepared(records):
        prepare(str(args.text), args.tokenizer, records)
    return {
        family: pretrain(args.work_dir, family, args.pretrain_steps, args.tokenizer, args.override)
        for family in args.families
    }


def held_out_losses(export: Path, records: Path, rows: int = 256) -> dict[str, float]:
    """Span corruption of held-out rows, in nats per token.

    Returns:
        "own input", and "another's": every row's targets, with the input of the row before it. A
        decoder that has not learned to read the encoder loses nothing by that.
    """
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(export, trust_remote_code=True).eval()
    collator = SpanCorruptionCollator(
        tokenizer.convert_tokens_to_ids("<extra_id_0>"), tokenizer.eos_token_id
    )
    held_out = Rows(records, "validation", config.inputs_length)
    batch = collator([held_out[row] for row in range(min(rows, len(held_out)))])
    shifted = {n: value if n == "labels" else value.roll(1, 0) for n, value in batch.items()}
    with torch.inference_mode():
        found = [model(**inputs).loss.item() for inputs in (batch, shifted)]
    return dict(zip(("own input", "another's"), found, strict=True))


def measure(args: argparse.Namespace, exports: dict[str, Path]) -> dict:
    """{task: {family: {start: the record of its results.json}}}, what is missing made first."""
    folders = task_folders(args)
    cells = args.work_dir / f"table2-{args.pretrain_steps}"
    tokenizer = folder_of_tokenizer(args.work_dir, args.tokenizer)
    fine_tunings, answers = {}, {}
    for family, export in exports.items():
        for start in STARTS:
            name = f"{family}-{start.replace(' ', '-')}"
            fields = {"model": export if start == "pre-trained" else f"{family}-tiny"}
            fields["tokenizer"] = tokenizer
            for task in args.tasks:
                seeds, settings = CELLS[task]
                task_id = task.split("-")[0]
                more = {"data_dir": folders[task_id], "seeds": seeds, **settings, **args.finetune}
                command = ["examples/finetune.py", *options({"task": task_id, **fields, **more})]
                fine_tunings[cells / f"{task}-{name}"] = (task, family, start, command)
                if (task, family, start) == ("cogs", *LONGER[:2]):
                    more = {**more, **LONGER[2], **args.finetune}
                    command = ["examples/finetune.py", *options({"task": "cogs", **fields, **more})]
                    fine_tunings[cells / f"longer-{name}"] = ("longer", family, start, command)
            if "sst2" in args.tasks:
                fields = {"model": cells / f"sst2-{name}" / "model", "tasks": "sst2"}
                fields |= {"data_dir": folders["s140"], "max_input_length": 64}
                command = ["-m", "evaluation.run", *options(fields)]
                answers[cells / f"s140-{name}"] = ("s140", family, start, command)
    found: dict = {}
    for commands in (fine_tunings, answers):
        records = run_cells({folder: c[-1] for folder, c in commands.items()}, args.workers)
        for folder, (task, family, start, _) in commands.items():
            found.setdefault(task, {}).setdefault(family, {})[start] = records[folder]
    return found


def number(record: dict, task: str) -> dict:
    """Mean, spread and number of seeds of a task's metric, in per cent."""
    metric = record["metrics"][METRIC.get(task, "accuracy")]
    return {
        "mean": 100 * metric["mean"],
        "std": 100 * metric["std"],
        "seeds": len(metric["per_seed"]),
    }


def table(found: dict) -> list[str]:
    """The numbers as Markdown, with the paper's rows of gains."""
    lines = ["| model | | " + " | ".join(found) + " |", "|---" * (2 + len(found)) + "|"]
    for family in next(iter(found.values())):
        means: dict = {}
        for start in STARTS:
            numbers = [number(records[family][start], task) for task, records in found.items()]
            means[start] = [n["mean"] for n in numbers]
            cells = [
                f"{n['mean']:.1f}" + (f" ± {n['std']:.1f}" if n["seeds"] > 1 else "")
                for n in numbers
            ]
            lines.append(f"| {family} | {start} | " + " | ".join(cells) + " |")
        pairs = zip(*(means[start] for start in STARTS), strict=True)
        gains = [
            f"{100 * (after / before - 1):+.1f} %" if before else "" for before, after in pairs
        ]
        lines.append(f"| {family} | gain | " + " | ".join(gains) + " |")
    return lines


def by_type(records: dict, longer: dict) -> list[str]:
    """COGS' generalisation split by type, for every model."""
    columns = {
        f"{family}, {start}{more}": {
            name.split("/")[-1]: metric
            for name, metric in record["metrics"].items()
            if name.startswith("gen_")
        }
        for found, more in ((records, ""), (longer, ", longer"))
        for family, starts in found.items()
        for start, record in starts.items()
    }
    types = sorted({name for column in columns.values() for name in column})
    lines = ["", "COGS, exact match on the generalisation split, by type:", ""]
    lines += ["| type | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in types:
        cells = [
            f"{100 * column[name]['mean']:.1f}" if name in column else ""
            for column in columns.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def rows_used(found: dict) -> str:
    """How many rows of each split every task has used."""
    parts = []
    for task, records in found.items():
        if task == "longer":
            continue
        rows = next(iter(records.values()))[STARTS[0]]["rows"]
        parts.append(f"{task} " + ", ".join(f"{n:,} {split}" for split, n in rows.items()))
    return "; ".join(parts)


def report(results: dict) -> str:
    """The page."""
    lines = [
        f"# Table 2 at our scale, {results['date']}",
        "",
        f"    {results['command']}",
        "",
        f"{results['hardware']}, {results['cores']} cores. The tiny presets, pre-trained for "
        f"{results['pretrain_steps']:,} steps. Exact match for COGS, F1 for SQuAD, accuracy for "
        "the others, in per cent; ± is the standard deviation over seeds. Rows: "
        f"{results['rows']}."
        + " Sentiment140's training rows are not at hand: the models of sst2 answer its test rows."
        * ("s140" in results["records"])
        + " Settings of `examples/finetune.py`:",
        "",
    ]
    for task, (seeds, fields) in results["cells"].items():
        said = ", ".join(f"{name} {value}" for name, value in fields.items())
        lines.append(f"- {task}: seeds {', '.join(map(str, seeds))}; {said}")
    records = dict(results["records"])
    longer = records.pop("longer", None)
    lines += ["", *table(records)]
    if longer:
        family, start, _ = LONGER
        lines += [
            "",
            f"COGS, {family}, {start}, with {int(results['longer']['max_steps']):,} steps instead: "
            f"{number(longer[family][start], 'cogs')['mean']:.1f}.",
        ]
    lines += [
        "",
        "Held-out loss of the pre-trained models (nats per token), each row with its own input and "
        "with another row's:",
        "",
        "| model | own input | another's | difference |",
        "|---|---|---|---|",
    ]
    for family, loss in results["held_out"].items():
        own, other = loss.values()
        lines.append(f"| {family} | {own:.2f} | {other:.2f} | {other - own:.2f} |")
    if "cogs" in records:
        lines += by_type(records["cogs"], longer or {})
    return "\n".join(lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="folders of the tasks")
    add("--text", type=Path, required=True, help="what to pre-train on")
    add("--tokenizer", type=Path, required=True, help="tokenizer.json")
    add("--work_dir", type=Path, required=True, help="models and results, to go on from")
    add("--tasks", nargs="+", choices=CELLS, default=PAPERS)
    add("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    add("--pretrain_steps", type=int, default=1000)
    add("--override", nargs="+", default=[], metavar="FIELD=VALUE", help="of tiny_cpu.py")
    add("--finetune", nargs="+", default=[], metavar="NAME=VALUE", help="for every task")
    add("--workers", type=int, default=os.cpu_count() or 1, help="fine-tunings at once")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    for name in ("data_dir", "text", "tokenizer"):
        if not getattr(args, name).exists():
            parser.error(f"--{name} {getattr(args, name)}: there is no such file or folder.")
    for name in ("data_dir", "text", "tokenizer", "work_dir"):
        setattr(args, name, getattr(args, name).absolute())
    args.tokenizer = str(args.tokenizer)
    try:
        args.finetune = dict(text.split("=", 1) for text in args.finetune)
    except ValueError:
        parser.error(f"--finetune {args.finetune}: expected NAME=VALUE.")
    if args.workers < 1:
        parser.error("--workers must be 1 or more.")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    try:
        exports = pretrained(args)
        found = measure(args, exports)
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    results = {
        "command": said("benchmark_table2", arguments, args),
        "date": str(date.today()),
        "hardware": processor(),
        "cores": os.cpu_count(),
        "pretrain_steps": args.pretrain_steps,
        "cells": {task: (CELLS[task][0], CELLS[task][1] | args.finetune) for task in args.tasks},
        "longer": LONGER[2] | args.finetune,
        "held_out": {f: held_out_losses(e, args.work_dir / "records") for f, e in exports.items()},
        "rows": rows_used(found),
        "records": {
            task: {
                family: {start: {"metrics": r["metrics"]} for start, r in starts.items()}
                for family, starts in families.items()
            }
            for task, families in found.items()
        },
    }
    kind = "-".join(["table2", *([] if args.tasks == PAPERS else args.tasks)])
    write_results(results_path(args.output_dir, kind), results, report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
