"""Two texts at once, the convolution's weakness, and its remedy: attention in the encoder.

    python -m benchmarks.benchmark_two_sentences --work_dir WORK [--snli snli.dev.jsonl]

Three encoders of the tiny preset, the decoder always lightweight: convolutions only, one attention
layer among them, attention everywhere. They learn

- a generated task: a first text of facts ("kay red . moe blue ..."), filler, then a claim ("moe
  red ?"), to be answered with yes or no. Claim and fact lie farther apart than the convolutions'
  receptive field, and every word of the claim is in the facts, so that only pairs decide. Once with
  a decoder that attends to the encoder, once with one that sees the encoder's mean;
- SNLI's development rows, split (its training rows are not at hand), --tokenizer and --snli given.

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
ENCODERS = {
    "convolutions only": ["lightweight"] * 4,
    "one attention layer": ["lightweight", "lightweight", "attention", "lightweight"],
    "attention everywhere": ["attention"] * 4,
}
SPLITS = {"train": 20, "validation": 1, "test": 2}  # in units of --test_rows / 2
FILLER = [f"f{i}" for i in range(16)]


def claim_row(generator: random.Random, args: argparse.Namespace) -> dict:
    """One row of the generated task: {"text", "label"}."""
    names = generator.sample(range(args.values), args.facts)
    colours = generator.sample(range(args.values), args.facts)
    asked, right = generator.randrange(args.facts), generator.random() < 0.5
    other = (asked + generator.randrange(1, args.facts)) % args.facts
    facts = [f"n{name} c{colour} ." for name, colour in zip(names, colours, strict=True)]
    filler = generator.choices(FILLER, k=args.gap)
    claim = f"n{names[asked]} c{colours[asked if right else other]} ?"
    return {"text": " ".join([*facts, *filler, claim]), "label": "yes" if right else "no"}


def make_claims(folder: Path, args: argparse.Namespace) -> None:
    """The generated task's files and its tokenizer, a word a token."""
    if (folder / "tokenizer" / "tokenizer.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, share) in enumerate(SPLITS.items()):
        generator = random.Random(number)
        rows = (claim_row(generator, args) for _ in range(share * args.test_rows // 2))
        write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    words = ["<pad>", "</s>", "<unk>", ".", "?", "yes", "no", *FILLER]
    words += [f"{kind}{i}" for kind in "nc" for i in range(args.values)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")


def commands(args: argparse.Namespace) -> dict[Path, tuple[str, str, list[str]]]:
    """{folder: (task, encoder, arguments of python)}."""
    made_of = (args.facts, args.values, args.gap, args.test_rows)
    claims, found = args.work_dir / "claims-{}-{}-{}-{}".format(*made_of), {}
    make_claims(claims, args)
    files = {f"{split}_file": claims / f"{split}.jsonl" for split in SPLITS}
    tasks = {}
    for name, cross in (("claims, attending", True), ("claims, mean only", False)):
        fields = {"task": "custom", **files, "tokenizer": claims / "tokenizer"}
        fields |= {"max_steps": args.steps, "per_device_train_batch_size": 64}
        tasks[name] = (cross, fields)
    if args.snli:
        folder = args.work_dir / "snli"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(args.snli, folder / "train.jsonl")  # split by finetune.py
        fields = {"task": "mnli", "data_dir": folder, "tokenizer": args.tokenizer}
        tasks["snli"] = (True, fields | {"max_steps": args.snli_steps, "max_input_length": 96})
    for task, (cross, fields) in tasks.items():
        for encoder, mixers in ENCODERS.items():
            overrides = [
                f"encoder_mixers={json.dumps(mixers)}",
                f"cross_attention={json.dumps(cross)}",
                "dropout_rate=0.0",
            ]
            fields = {**fields, "model": PRESET, "config_overrides": overrides, "seeds": args.seeds}
            folder = args.work_dir / "cells" / f"{task}-{encoder}".replace(", ", "-")
            found[Path(str(folder).replace(" ", "-"))] = (
                task,
                encoder,
                ["examples/finetune.py", *options(fields)],
            )
    return found


def report(results: dict) -> str:
    """The page."""
    lines = [
        f"# Two texts at once, {results['date']}",
        "",
        f"    {results['command']}",
        "",
        f"{results['hardware']}, {results['cores']} cores. Accuracy in per cent, mean ± standard "
        f"deviation over seeds {', '.join(map(str, results['seeds']))}; guessing is right in 50 "
        f"(claims) and 34 (SNLI). {PRESET}, untrained, its encoder's mixers replaced. Claims: "
        f"{results['facts']} facts, a gap of {results['gap']} tokens, the decoder attending to the "
        "encoder or seeing its mean only. "
        + "; ".join(f"{task}: {rows}" for task, rows in results["rows"].items())
        + ".",
        "",
        "| encoder | receptive field | " + " | ".join(results["accuracy"]) + " |",
        "|---" * (2 + len(results["accuracy"])) + "|",
    ]
    for encoder, field in results["receptive_field"].items():
        cells = [
            f"{100 * found[encoder]['mean']:.1f} ± {100 * found[encoder]['std']:.1f}"
            for found in results["accuracy"].values()
        ]
        lines.append(f"| {encoder} | {field or 'all'} | " + " | ".join(cells) + " |")
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
    add("--facts", type=int, default=6, help="of a row")
    add("--values", type=int, default=32, help="different names, and colours")
    add("--gap", type=int, default=30, help="tokens between the facts and the claim")
    add("--test_rows", type=int, default=4000, help="generated; ten times as many to train on")
    add("--steps", type=int, default=2000)
    add("--snli_steps", type=int, default=1000)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--workers", type=int, default=os.cpu_count() or 1, help="trainings at once")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    field = ConvT5Config.from_preset(PRESET).receptive_field("encoder")
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
            encoder: ConvT5Config.from_preset(PRESET, encoder_mixers=mixers).receptive_field()
            for encoder, mixers in ENCODERS.items()
        },
        "accuracy": accuracy,
    }
    write_results(results_path(args.output_dir, "two-sentences"), results, report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
