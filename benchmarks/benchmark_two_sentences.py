"""Two texts at once, the convolution's weakness, and its remedy: attention in the encoder.

    python -m benchmarks.benchmark_two_sentences --work_dir WORK [--snli snli.dev.jsonl]

Three encoders, the decoder always lightweight: convolutions only, attention in the last layer,
attention everywhere. They learn, from nothing,

- questions, generated: a text of facts ("n2 c9 n0 c61 ..."), filler, then a name ("n0 ?"), to be
  answered with what follows the name in the text. Facts and question lie farther apart than the
  convolutions' receptive field. The model is small (`QUESTIONS`) and its decoder has no
  cross-attention: it sees the encoder's mean, so that the encoder has to bring the texts together;
- SNLI's development rows, split (its training rows are not at hand), --tokenizer and --snli given,
  with the tiny preset and its cross-attention, by the classification head: over 300 steps the label
  words' shared tokens drown what the first of them says.

Runs what is missing in WORK. Results go to OUTPUT_DIR/two-sentences_<hardware>_<date>.json, .md.
"""

import argparse
import json
import os
import random
import shutil
import sys
from datetime import date
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.benchmark_convolution import processor, write
from benchmarks.cells import options, results_path, run_cells, said, write_results
from modeling_convt5 import ConvT5Config

PRESET = "lightweight-tiny"
ENCODERS = ("convolutions only", "attention in the last layer", "attention everywhere")
QUESTIONS = {
    "num_layers": 2,
    "num_decoder_layers": 1,
    "d_model": 64,
    "d_ff": 256,
    "num_heads": 4,
    "d_kv": 16,
    "cross_attention": False,
    "dropout_rate": 0.0,
}
FILLER = [f"f{i}" for i in range(16)]


def config(task: str, encoder: str) -> dict:
    """The fields that differ from the preset."""
    fields = dict(QUESTIONS) if task == "questions" else {}
    layers = ConvT5Config.from_preset(PRESET, **fields).num_layers
    attention = {ENCODERS[0]: 0, ENCODERS[1]: 1, ENCODERS[2]: layers}[encoder]
    mixers = ["lightweight"] * (layers - attention) + ["attention"] * attention
    return {**fields, "encoder_mixers": mixers}


def receptive_field(task: str, encoder: str) -> int | None:
    """Tokens that a position of the encoder can see, None for all."""
    return ConvT5Config.from_preset(PRESET, **config(task, encoder)).receptive_field("encoder")


def question_row(generator: random.Random, args: argparse.Namespace) -> dict:
    """One row of the generated task: {"text", "label"}."""
    names = generator.sample(range(args.facts), args.facts)
    values = generator.sample(range(args.values), args.facts)
    facts = [f"n{name} c{value}" for name, value in zip(names, values, strict=True)]
    filler = generator.choices(FILLER, k=args.gap)
    asked = generator.randrange(args.facts)
    text = " ".join([*facts, *filler, f"n{names[asked]} ?"])
    return {"text": text, "label": f"c{values[asked]}"}


def make_questions(folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    """The generated task's files, and its tokenizer, a word a token, in `folder`."""
    sizes = {"train": args.train_rows, "validation": 500, "test": args.test_rows}
    files = {f"{split}_file": folder / f"{split}.jsonl" for split in sizes}
    if (folder / "tokenizer" / "tokenizer.json").is_file():
        return files
    folder.mkdir(parents=True, exist_ok=True)
    for number, (path, size) in enumerate(zip(files.values(), sizes.values(), strict=True)):
        generator = random.Random(number)
        rows = (question_row(generator, args) for _ in range(size))
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    words = ["<pad>", "</s>", "<unk>", "?", *FILLER]
    words += [f"n{i}" for i in range(args.facts)] + [f"c{i}" for i in range(args.values)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    return files


def commands(args: argparse.Namespace) -> dict[Path, tuple[str, str, list[str]]]:
    """{folder: (task, encoder, arguments of python)}."""
    made_of = (args.facts, args.values, args.gap, args.train_rows, args.test_rows)
    folder, found = args.work_dir / "questions-{}-{}-{}-{}-{}".format(*made_of), {}
    tasks = {
        "questions": {
            "task": "custom",
            **make_questions(folder, args),
            "tokenizer": folder / "tokenizer",
            "max_steps": args.steps,
            "eval_steps": -(-args.steps // 5),
            "per_device_train_batch_size": 64,
        }
    }
    if args.snli:
        folder = args.work_dir / "snli"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(args.snli, folder / "train.jsonl")  # split by finetune.py
        tasks["snli"] = {
            "task": "mnli",
            "method": "head",
            "data_dir": folder,
            "tokenizer": args.tokenizer,
            "max_steps": args.snli_steps,
            "eval_steps": -(-args.snli_steps // 3),
            "max_input_length": 96,
            "train_sampling_strategy": "group_by_length",
        }
    for task, fields in tasks.items():
        for encoder in ENCODERS:
            changed = [f"{n}={json.dumps(value)}" for n, value in config(task, encoder).items()]
            fields = {**fields, "model": PRESET, "config_overrides": changed}
            fields |= {"seeds": args.seeds, "learning_rate": args.learning_rate}
            folder = args.work_dir / "cells" / f"{task}-{encoder}".replace(" ", "-")
            found[folder] = (task, encoder, ["examples/finetune.py", *options(fields)])
    return found


def report(results: dict) -> str:
    """The page."""
    tasks = results["accuracy"]
    lines = [
        f"# Two texts at once, {results['date']}",
        "",
        f"    {results['command']}",
        "",
        f"{results['hardware']}, {results['cores']} cores. Accuracy in per cent, mean ± standard "
        f"deviation over seeds {', '.join(map(str, results['seeds']))}, not pre-trained; beside it "
        "how many tokens a position of the encoder sees. Questions: "
        f"{results['facts']} facts, a gap of {results['gap']} tokens; who knows the facts but not "
        f"which is asked for is right in {100 / results['facts']:.0f}. "
        + ("SNLI: guessing is right in 34. " if "snli" in tasks else "")
        + "Rows: "
        + "; ".join(f"{task} {rows}" for task, rows in results["rows"].items())
        + ".",
        "",
        "| encoder | " + " | ".join(f"{task} | sees" for task in tasks) + " |",
        "|---" * (1 + 2 * len(tasks)) + "|",
    ]
    for encoder in ENCODERS:
        cells = []
        for task, found in tasks.items():
            accuracy = found[encoder]
            cells.append(f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f}")
            cells.append(f"{results['receptive_field'][task][encoder] or 'all'}")
        lines.append(f"| {encoder} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.benchmark_two_sentences",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--work_dir", type=Path, required=True, help="files and results, to go on from")
    add("--snli", type=Path, help="SNLI's rows as jsonl: premise, hypothesis, label")
    add("--tokenizer", type=Path, help="of SNLI's texts")
    add("--facts", type=int, default=4, help="of a row")
    add("--values", type=int, default=64, help="that a name can have")
    add("--gap", type=int, default=16, help="tokens between the facts and the question")
    add("--train_rows", type=int, default=80_000, help="generated")
    add("--test_rows", type=int, default=2000, help="generated")
    add("--steps", type=int, default=2500)
    add("--snli_steps", type=int, default=300)
    add("--learning_rate", type=float, default=1e-2)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--workers", type=int, default=os.cpu_count() or 1, help="trainings at once")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    field = receptive_field("questions", ENCODERS[0])
    if args.gap < field:
        parser.error(f"--gap {args.gap}: expected the receptive field, {field}, or more.")
    if not 2 <= args.facts <= args.values:
        parser.error(f"--facts {args.facts}: expected 2 or more, at most --values {args.values}.")
    if (args.snli is None) != (args.tokenizer is None):
        parser.error("--snli and --tokenizer go together.")
    for name in ("snli", "tokenizer"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            parser.error(f"--{name} {path}: there is no such file.")
        setattr(args, name, path and path.absolute())
    args.work_dir = args.work_dir.absolute()
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    cells = commands(args)
    try:
        records = run_cells({folder: cell[-1] for folder, cell in cells.items()}, args.workers)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    accuracy, rows = {}, {}
    for folder, (task, encoder, _) in cells.items():
        accuracy.setdefault(task, {})[encoder] = records[folder]["metrics"]["accuracy"]
        rows[task] = ", ".join(f"{n:,} {split}" for split, n in records[folder]["rows"].items())
    results = {
        "command": said("benchmark_two_sentences", arguments, args),
        "date": str(date.today()),
        "hardware": processor(),
        "cores": os.cpu_count(),
        "seeds": args.seeds,
        "facts": args.facts,
        "gap": args.gap,
        "rows": rows,
        "receptive_field": {
            task: {encoder: receptive_field(task, encoder) for encoder in ENCODERS}
            for task in accuracy
        },
        "accuracy": accuracy,
    }
    write_results(results_path(args.output_dir, "two-sentences"), results, report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
