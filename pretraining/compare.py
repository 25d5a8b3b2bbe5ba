"""The four models side by side: the same tokens, then a task, with and without pre-training.

    python -m pretraining.compare --data_dir TEXT --task_dir SST2 --tokenizer T --output_dir O

For each of lightweight, dynamic, dilated and transformer: `pretraining.main` with tiny_cpu.py to
every step of --milestones, an export at each, and fine-tuning of every export and of the untrained
model on --labels examples, --seeds times. Everything that is finished is kept: the same command
goes on where it stopped. O/results.json, O/report.md and two figures are made from what is there.
"""

import argparse
import csv
import gzip
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from .metrics import read_records  # noqa: E402
from .plot import plot  # noqa: E402
from .prepare import prepare, write_json  # noqa: E402
from .records import is_prepared  # noqa: E402

FAMILIES = ("lightweight", "dynamic", "dilated", "transformer")
CONFIG = Path(__file__).parent / "configs" / "tiny_cpu.py"
WORDS = ("negative", "positive")


def read_task(folder: str, split: str) -> list[tuple[str, int]]:
    """(sentence, 0 or 1) pairs of SST-2's tab-separated files, plain or gzipped.

    Raises:
        ValueError: if there is no such file, or no label in a line.
    """
    paths = [Path(folder) / f"{split}.tsv{end}" for end in ("", ".gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"--task_dir {folder}: there is no {paths[0].name} or {paths[1].name}.")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [line for line in lines if line[:2] != ["sentence", "label"]]
    wrong = [line for line in rows if len(line) != 2 or line[1] not in ("0", "1")]
    if wrong:
        raise ValueError(f"{path}: expected a sentence, a tab, and 0 or 1; got {wrong[0]}.")
    return [(text, int(label)) for text, label in rows]


def pretrain(args: argparse.Namespace, family: str, records: Path, steps: int) -> Path:
    """Train a family to a step; returns the folder of its export."""
    workdir = Path(args.output_dir) / family
    export = workdir / f"hub-{steps}"
    if (export / "README.md").is_file():
        return export
    overrides = [f"data_dir={records}", f"tokenizer={args.tokenizer}", f"train_steps={steps}"]
    overrides += [f"model={family}-tiny", *args.override]
    command = [sys.executable, "-m", "pretraining.main", "--config", str(CONFIG)]
    command += ["--workdir", str(workdir), "--export", str(export), "--override", *overrides]
    print(shlex.join(command), flush=True)
    code = subprocess.run(command, cwd=Path(__file__).parents[1]).returncode
    if code in (75, -signal.SIGTERM):
        raise SystemExit(75)  # pre-empted: so is this command
    if code:
        raise SystemExit(f"Pre-training {family} ended with exit code {code}; see above.")
    return export


def finetune(args: argparse.Namespace, folder: Path, pretrained: bool, seed: int) -> float:
    """Accuracy on the development split after fine-tuning on labels as text, in PyTorch."""
    import numpy as np
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.optimization import Adafactor

    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    if not pretrained:
        model = type(model)(model.config)
    train, test = read_task(args.task_dir, "train"), read_task(args.task_dir, "dev")
    train = [train[i] for i in rng.permutation(len(train))[: args.labels]]
    test = test[: args.test_rows]

    def encode(rows):
        return tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")

    words = tokenizer(list(WORDS), padding=True, return_tensors="pt").input_ids
    words[words == tokenizer.pad_token_id] = -100
    optimizer = Adafactor(
        model.parameters(), lr=args.learning_rate, relative_step=False, scale_parameter=True
    )
    model.train()
    for _ in range(args.epochs):
        order = rng.permutation(len(train))
        for start in range(0, len(order) - args.batch_size + 1, args.batch_size):
            rows = [train[i] for i in order[start : start + args.batch_size]]
            labels = words[[label for _, label in rows]]
            optimizer.zero_grad()
            model(**_inputs(encode(rows)), labels=labels).loss.backward()
            optimizer.step()
    model.eval()
    right = 0
    for start in range(0, len(test), args.batch_size):
        rows = test[start : start + args.batch_size]
        scores = [_log_likelihood(model, encode(rows), words[label]) for label in (0, 1)]
        found = torch.stack(scores).argmax(0).tolist()
        right += sum(guess == label for guess, (_, label) in zip(found, rows, strict=True))
    return right / len(test)


def _inputs(encoded):
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _log_likelihood(model, encoded, label):
    """Of one label's tokens (T,), for every row: (B,)."""
    import torch

    labels = label[None].expand(len(encoded["input_ids"]), -1)
    with torch.no_grad():
        logits = model(**_inputs(encoded), labels=labels).logits.log_softmax(-1)
    chosen = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(labels == -100, 0.0).sum(-1)


def run(args: argparse.Namespace) -> dict:
    """Everything that is missing; returns the results."""
    output = Path(args.output_dir)
    records = output / "records"
    if not is_prepared(records):
        prepare(args.data_dir, args.tokenizer, records)
    results = {}
    for steps in args.milestones:  # breadth first, so that all four can be compared early
        for family in FAMILIES:
            folder = pretrain(args, family, records, steps)
            for start in (steps, 0):  # 0: the same model, untrained
                for seed in args.seeds:
                    name = output / "scores" / f"{family}-{start}-{seed}.json"
                    if not name.is_file():
                        name.parent.mkdir(exist_ok=True)
                        accuracy = finetune(args, folder, start > 0, seed)
                        write_json(name, {"accuracy": accuracy})
                    score = json.loads(name.read_text())["accuracy"]
                    results.setdefault(family, {}).setdefault(str(start), {})[str(seed)] = score
            report(output, results, args)
    return results


def report(output: Path, results: dict, args: argparse.Namespace) -> None:
    """results.json, the table, the curves of the losses and of the gain."""
    command = shlex.join(["python", "-m", "pretraining.compare", *args.command])
    runs = {family: read_records(output / family / "metrics.jsonl") for family in results}
    lines = [f"`{command}`", "", "| | held-out loss | tokens/s (median) | untrained | "]
    steps = sorted({int(s) for scores in results.values() for s in scores} - {0})
    lines[-1] += " | ".join(f"{step:,} steps" for step in steps) + " |"
    lines.append("|---" * (4 + len(steps)) + "|")
    for family, scores in results.items():
        held_out = [r["loss"] for r in runs[family] if r["split"] == "eval"]
        speed = [r["tokens_per_second"] for r in runs[family] if "tokens_per_second" in r]
        cells = [f"{held_out[-1]:.3f}", f"{statistics.median(speed):,.0f}" if speed else "-"]
        for step in (0, *steps):
            values = [100 * v for v in scores.get(str(step), {}).values()]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    write_json(output / "results.json", {"command": command, "accuracy": results})
    (output / "report.md").write_text("\n".join(lines) + "\n")
    plot(runs, output / "losses.png")
    figure, axes = plt.subplots(figsize=(6, 4))
    for family, scores in results.items():
        points = sorted((int(s), statistics.mean(v.values())) for s, v in scores.items())
        axes.plot(*zip(*points, strict=True), marker=".", label=family)
    axes.set(xlabel="steps of pre-training", ylabel="accuracy after fine-tuning")
    axes.legend()
    figure.savefig(output / "gain.png", dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretraining.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data_dir", required=True, help="text to pre-train on")
    parser.add_argument("--task_dir", required=True, help="train.tsv and dev.tsv of SST-2")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--milestones", type=int, nargs="+", default=[2500, 5000, 10_000], help="steps"
    )
    parser.add_argument("--labels", type=int, default=2000)
    parser.add_argument("--test_rows", type=int, default=872)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument(
        "--override", nargs="+", default=[], metavar="FIELD=VALUE", help="of tiny_cpu.py"
    )
    args = parser.parse_args(arguments)
    args.command = sys.argv[1:] if arguments is None else list(arguments)
    if args.milestones != sorted(set(args.milestones)) or args.milestones[0] < 1:
        parser.error("--milestones must be rising step numbers.")
    for name in ("data_dir", "task_dir", "tokenizer"):
        value = getattr(args, name)
        if os.path.exists(value):
            setattr(args, name, os.path.abspath(value))
    args.output_dir = os.path.abspath(args.output_dir)
    read_task(args.task_dir, "dev")  # before hours of training
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
