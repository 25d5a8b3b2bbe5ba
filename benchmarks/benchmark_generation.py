"""Do PyTorch and Flax say the same, and how fast, on a trained checkpoint and real text?

    make quickstart
    python benchmarks/benchmark_generation.py --quickstart runs/quickstart

Beginnings of the quickstart's test docstrings, of random length, go through both frameworks' greedy
and beam search; then all of the test docstrings are classified. Tokens, scores and labels are
compared, and tokens a second counted, batch by batch in turn, compilation left out. Writes
OUTPUT_DIR/generation_<hardware>_<date>.json and .md; exits with 1 where anything differs.
"""

import argparse
import json
import os
import re
import shlex
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from benchmark_convolution import processor, write
from tqdm import tqdm
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.quickstart_training import TextToLabel, held_out, scores  # noqa: E402
from modeling_convt5 import (  # noqa: E402
    ConvT5ForConditionalGeneration,
    FlaxConvT5ForConditionalGeneration,
)

STRATEGIES = {"greedy": {}, "4 beams": {"num_beams": 4}}


def prompts(tokenizer, rows: list[dict], count: int, longest: int) -> list[list[int]]:
    """Beginnings of texts, 1 to `longest` tokens and the end token."""
    rng = np.random.default_rng(0)
    texts = [rows[i]["text"] for i in rng.permutation(len(rows))[:count]]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lengths = rng.integers(1, longest + 1, len(ids))
    return [row[:n] + [tokenizer.eos_token_id] for row, n in zip(ids, lengths, strict=True)]


def padded(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask (B, L), padded on the right."""
    ids = np.zeros((len(rows), length), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def compare(model, twin, rows: list[list[int]], batch: int, arguments: dict) -> dict:
    """Both frameworks on the same batches, in turn."""
    longest = max(map(len, rows))
    found = {"prompts": 0, "identical": 0, "largest score difference": 0.0}
    found |= {"tokens": 0, "PyTorch seconds": 0.0, "Flax seconds": 0.0}
    for start in tqdm(range(0, len(rows) - batch + 1, batch), desc=str(arguments), unit="batch"):
        ids, mask = padded(rows[start : start + batch], longest)
        torch_ids = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        options = {**arguments, "return_dict_in_generate": True}
        if start == 0:  # compiles
            twin.generate(ids, mask, **options).sequences.block_until_ready()
            model.generate(**torch_ids, output_scores=True, do_sample=False, **options)
        begin = time.perf_counter()
        expected = model.generate(**torch_ids, output_scores=True, do_sample=False, **options)
        middle = time.perf_counter()
        actual = twin.generate(ids, mask, **options)
        actual.sequences.block_until_ready()
        found["Flax seconds"] += time.perf_counter() - middle
        found["PyTorch seconds"] += middle - begin
        found["prompts"] += len(ids)
        found["tokens"] += int((expected.sequences[:, 1:] != 0).sum())
        same = expected.sequences.shape == actual.sequences.shape
        if same:
            found["identical"] += int(
                (expected.sequences.numpy() == np.asarray(actual.sequences)).all(-1).sum()
            )
        if actual.sequences_scores is not None:
            difference = np.abs(expected.sequences_scores.numpy() - actual.sequences_scores).max()
            largest = max(found["largest score difference"], float(difference))
            found["largest score difference"] = largest
    return found


def classify(twin, task: TextToLabel, rows: list[dict], batch: int = 64) -> list[str]:
    """The label that the Flax model generates for each text."""
    inputs = task.tokenize(rows)["input_ids"]
    longest, labels = max(map(len, inputs)), []
    for start in tqdm(range(0, len(inputs), batch), desc="classifying in Flax", unit="batch"):
        part = inputs[start : start + batch]
        ids, mask = padded(part + [[1]] * (batch - len(part)), longest)
        generated = twin.generate(ids, mask, max_new_tokens=12)[: len(part)]
        texts = task.tokenizer.batch_decode(np.asarray(generated), skip_special_tokens=True)
        labels += [text.strip() for text in texts]
    return labels


def report(results: dict) -> str:
    """The results as a page of Markdown."""
    lines = [f"# One checkpoint, two frameworks: {results['hardware']}, {results['date']}", ""]
    lines += [f"    {results['command']}", ""]
    lines += ["| search | prompts | identical | tokens/s PyTorch | tokens/s Flax | score |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, found in results["generation"].items():
        speeds = [found["tokens"] / found[f"{f} seconds"] for f in ("PyTorch", "Flax")]
        lines.append(
            f"| {name} | {found['prompts']} | {found['identical']} | {speeds[0]:,.0f} | "
            f"{speeds[1]:,.0f} | {found['largest score difference']:.1e} |"
        )
    labels = results["classification"]
    lines += ["", "`score`: the largest difference of a beam's score.", ""]
    lines.append(
        f"Classifying {labels['rows']} test docstrings: {labels['identical']} labels identical; "
        f"accuracy {labels['PyTorch']:.4f} (PyTorch), {labels['Flax']:.4f} (Flax)."
    )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quickstart", type=Path, required=True, help="output_dir of a finished quickstart")
    add("--prompts", type=int, default=240, help="default: 240")
    add("--longest", type=int, default=96, help="tokens of the longest prompt (default: 96)")
    add("--batch", type=int, default=8, help="prompts of a batch (default: 8)")
    add("--max_new_tokens", type=int, default=24, help="default: 24")
    add("--rows", type=int, default=2000, help="docstrings to classify (default: 2000)")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    folder = args.quickstart / "hub"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = ConvT5ForConditionalGeneration.from_pretrained(folder).eval()
    twin = FlaxConvT5ForConditionalGeneration.from_pretrained(folder)
    rows, input_length = held_out(args.quickstart)
    texts = prompts(tokenizer, rows, args.prompts, args.longest)
    generation = {}
    for name, strategy in STRATEGIES.items():
        options = {**strategy, "max_new_tokens": args.max_new_tokens}
        generation[name] = compare(model, twin, texts, args.batch, options)
    task, rows = TextToLabel(tokenizer, input_length), rows[: args.rows]
    torch_labels, labels = task.predict(model, rows), classify(twin, task, rows)
    hardware = processor()
    results = {
        "command": shlex.join(["python", "benchmarks/benchmark_generation.py", *arguments]),
        "date": date.today().isoformat(),
        "hardware": f"{hardware} ({os.cpu_count()} cores)",
        "generation": generation,
        "classification": {
            "rows": len(rows),
            "identical": sum(a == b for a, b in zip(torch_labels, labels, strict=True)),
            "PyTorch": scores(rows, torch_labels)["accuracy"],
            "Flax": scores(rows, labels)["accuracy"],
        },
    }
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / f"generation_{slug}_{results['date']}.json"
    write(path, json.dumps(results, indent=1) + "\n")
    write(path.with_suffix(".md"), report(results))
    print(report(results))
    same = all(found["prompts"] == found["identical"] for found in generation.values())
    return 0 if same and results["classification"]["identical"] == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
