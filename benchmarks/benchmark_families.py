"""The four models side by side: the same tokens, then a task, with and without pre-training.

    python -m benchmarks.benchmark_families --text TEXT --task_dir SST2 --work_dir WORK \\
        --tokenizer tokenizer.json

Trains lightweight, dynamic, dilated and transformer with pretraining/configs/tiny_cpu.py to every
step of --milestones, exports each, and fine-tunes every export and the untrained model with
examples/finetune.py. What is finished is kept in WORK: the same command goes on where it stopped,
and --milestones may grow. Results go to OUTPUT_DIR/families_<hardware>_<date>.json and .md, with
the curves of the losses and of the gain beside them.
"""

import argparse
import os
import shlex
import signal
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

import matplotlib

from benchmarks.benchmark_convolution import processor
from benchmarks.cells import ROOT, options, results_path, run_cells, said, write_results
from pretraining.export import save_tokenizer
from pretraining.metrics import read_records
from pretraining.plot import plot
from pretraining.prepare import prepare
from pretraining.records import is_prepared
from pretraining.tokens import open_tokenizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FAMILIES = ("lightweight", "dynamic", "dilated", "transformer")
CONFIG = ROOT / "pretraining" / "configs" / "tiny_cpu.py"
PREEMPTED = 75


def pretrain(work: Path, family: str, steps: int, tokenizer: str, override: list[str]) -> Path:
    """Train a family on WORK/records to a step; returns the folder of its export.

    Raises:
        SystemExit: if training was pre-empted (75: run again to go on) or failed.
    """
    export = work / family / f"hub-{steps}"
    if (export / "README.md").is_file():
        return export
    fields = [f"data_dir={work / 'records'}", f"tokenizer={tokenizer}", f"train_steps={steps}"]
    fields += [f"model={family}-tiny", *override]
    command = [sys.executable, "-m", "pretraining.main", "--config", str(CONFIG)]
    command += ["--workdir", str(work / family), "--export", str(export), "--override", *fields]
    print(shlex.join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code in (PREEMPTED, -signal.SIGTERM):
        raise SystemExit(PREEMPTED)
    if code:
        raise SystemExit(f"Pre-training {family} ended with exit code {code}; see above.")
    return export


def folder_of_tokenizer(work: Path, tokenizer: str) -> Path:
    """WORK/tokenizer, which transformers can open."""
    if not (work / "tokenizer" / "tokenizer.json").is_file():
        save_tokenizer(open_tokenizer(tokenizer), work / "tokenizer")
    return work / "tokenizer"


def measure(args: argparse.Namespace) -> dict[str, dict[str, dict]]:
    """{family: {step: the record of its results.json}}; step 0 is without pre-training."""
    work = args.work_dir
    if not is_prepared(work / "records"):
        prepare(str(args.text), args.tokenizer, work / "records")
    tokenizer, fine_tunings = folder_of_tokenizer(work, args.tokenizer), {}
    for steps in args.milestones:  # breadth first: all four can be compared early
        for family in FAMILIES:
            export = pretrain(work, family, steps, args.tokenizer, args.override)
            for start, model in ((0, f"{family}-tiny"), (steps, export)):
                fields = {"task": args.task, "model": model, "tokenizer": tokenizer}
                fields |= {"data_dir": args.task_dir, "seeds": args.seeds}
                fields |= {"max_train_rows": args.labels, "max_steps": args.finetune_steps}
                fields |= {"max_input_length": 64, "eval_steps": max(1, args.finetune_steps // 4)}
                fields |= {"train_sampling_strategy": "group_by_length"}
                fields |= {"learning_rate": args.finetune_rate}
                folder = work / "cells" / f"{args.task}-{family}-{start}"
                command = ["examples/finetune.py", *options(fields)]
                fine_tunings[folder] = (family, str(start), command)
    records = run_cells({folder: cell[-1] for folder, cell in fine_tunings.items()}, args.workers)
    found: dict = {family: {} for family in FAMILIES}
    for folder, (family, start, _) in fine_tunings.items():
        found[family][start] = records[folder]
    return found


def summary(args: argparse.Namespace, found: dict, losses: dict) -> dict:
    """What the page and the figures are made of."""
    families = {}
    for family, records in losses.items():
        held_out = [[r["step"], r["loss"]] for r in records if r["split"] == "eval"]
        speed = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
        steps = [r["seconds_per_step"] for r in records if "seconds_per_step" in r]
        families[family] = {
            "held_out": held_out,
            "tokens_per_second": statistics.median(speed),
            "minutes": statistics.fmean(steps) * records[-1]["step"] / 60,
            "accuracy": {start: r["metrics"]["accuracy"] for start, r in found[family].items()},
            "train_rows": found[family]["0"]["rows"]["train"],
            "test_rows": found[family]["0"]["rows"][found[family]["0"]["evaluated_on"]],
        }
    return {
        "date": str(date.today()),
        "hardware": processor(),
        "cores": os.cpu_count(),
        "task": args.task,
        "labels": args.labels,
        "families": families,
    }


def report(results: dict) -> str:
    """The page."""
    families = results["families"]
    steps = sorted({int(s) for row in families.values() for s in row["accuracy"]})
    first = families[FAMILIES[0]]
    lines = [
        f"# The four families, pre-trained on the same tokens, {results['date']}",
        "",
        f"    {results['command']}",
        "",
        f"{results['hardware']}, {results['cores']} cores. Held-out loss in nats a target token; "
        f"accuracy on {results['task']} in per cent, mean ± standard deviation over seeds, after "
        f"fine-tuning on {first['train_rows']:,} rows ({first['test_rows']:,} test rows), by steps "
        "of pre-training.",
        "",
        "| | held-out loss | tokens/s (median) | minutes | "
        + " | ".join(f"{step:,} steps" for step in steps)
        + " |",
        "|---" * (4 + len(steps)) + "|",
    ]
    for family, row in families.items():
        cells = [f"{row['held_out'][-1][1]:.3f}", f"{row['tokens_per_second']:,.0f}"]
        cells.append(f"{row['minutes']:.0f}")
        for step in steps:
            found = row["accuracy"][str(step)]
            cells.append(f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    for name in ("losses", "gain"):
        lines += ["", f"![{name}]({results['stem']}_{name}.png)"]
    return "\n".join(lines) + "\n"


def draw_gain(results: dict, path: Path) -> None:
    """Accuracy against steps of pre-training."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for family, row in results["families"].items():
        points = sorted(
            (int(s), 100 * v["mean"], 100 * v["std"]) for s, v in row["accuracy"].items()
        )
        steps, means, spreads = zip(*points, strict=True)
        axes.errorbar(steps, means, spreads, marker=".", capsize=2, label=family)
    axes.set(xlabel="steps of pre-training", ylabel=f"accuracy on {results['task']} (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.benchmark_families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--text", type=Path, required=True, help="what to pre-train on")
    add("--task", default="sst2", help="to fine-tune on, one with accuracy")
    add("--task_dir", type=Path, required=True, help="the task's files")
    add("--tokenizer", type=Path, required=True, help="tokenizer.json")
    add("--work_dir", type=Path, required=True, help="models and results, to go on from")
    add("--milestones", type=int, nargs="+", default=[1500, 6000], help="steps")
    add("--labels", type=int, default=2000, help="training rows of the task")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--finetune_steps", type=int, default=160)
    add("--finetune_rate", type=float, default=1e-2, help="learning rate; so small a model's")
    add("--override", nargs="+", default=[], metavar="FIELD=VALUE", help="of tiny_cpu.py")
    add("--workers", type=int, default=os.cpu_count() or 1, help="fine-tunings at once")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    if args.milestones != sorted(set(args.milestones)) or args.milestones[0] < 1:
        parser.error("--milestones must be rising step numbers.")
    if args.workers < 1:
        parser.error("--workers must be 1 or more.")
    for name in ("text", "task_dir", "tokenizer"):
        if not getattr(args, name).exists():
            parser.error(f"--{name} {getattr(args, name)}: there is no such file or folder.")
    for name in ("text", "task_dir", "tokenizer", "work_dir"):
        setattr(args, name, getattr(args, name).absolute())
    args.tokenizer = str(args.tokenizer)
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    try:
        found = measure(args)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from None
    losses = {f: read_records(args.work_dir / f / "metrics.jsonl") for f in FAMILIES}
    results = summary(args, found, losses)
    path = results_path(args.output_dir, "families")
    results |= {"command": said("benchmark_families", arguments, args), "stem": path.stem}
    write_results(path, results, report(results))
    plot(losses, path.with_name(f"{path.stem}_losses.png"))
    draw_gain(results, path.with_name(f"{path.stem}_gain.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
