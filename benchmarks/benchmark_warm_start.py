"""What a T5's weights are worth to a convolution: continued pre-training from three beginnings.

    python -m benchmarks.benchmark_warm_start --data_dir DIR

Trains a small T5 on the text of DIR (every *.jsonl and *.jsonl.gz, field "text"), turns it into a
lightweight ConvT5 with `conversion.convert_t5`, and trains on with span corruption from

    warm start    what convert_t5 writes
    copied rest   the same with freshly drawn convolutions: what their own derivation adds
    random        everything freshly drawn

all with the same data in the same order, Adafactor at one rate. The loss is that of held-out text
(documents, not rows). Results go to OUTPUT_DIR/warm_start_<hardware>_<date>.json and .md.
"""

import argparse
import gzip
import json
import shlex
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import Adafactor, AutoTokenizer, T5Config, T5ForConditionalGeneration

from benchmarks.benchmark_convolution import processor, write
from conversion import convert_t5
from examples.quickstart_training import make_tokenizer
from modeling_convt5 import ConvT5ForConditionalGeneration
from pretraining.collator import SpanCorruptionCollator
from pretraining.span_corruption import raw_length_for

BEGINNINGS = ("warm start", "copied rest", "random")


def token_rows(tokenizer, texts: list[str], raw_length: int) -> np.ndarray:
    """The texts as one stream, </s> between them, cut into rows (N, raw_length) without padding."""
    ids = [i for encoded in tokenizer.backend_tokenizer.encode_batch(texts) for i in encoded.ids]
    count = len(ids) // raw_length
    if count == 0:
        raise SystemExit(f"The text has only {len(ids)} tokens, expected {raw_length} or more.")
    return np.array(ids[: count * raw_length], dtype=np.int64).reshape(count, raw_length)


def read_texts(folder: Path) -> list[str]:
    """Every document's text, in the order of the files."""
    texts = []
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    if len(texts) < 20:
        raise SystemExit(
            f"--data_dir {folder}: {len(texts)} documents in *.jsonl and *.jsonl.gz, expected at "
            'least 20 lines with a field "text".'
        )
    return texts


class Data:
    """Rows of tokens, corrupted anew for every batch, the same for every model."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        texts = read_texts(args.data_dir)[: args.documents]
        held_out = texts[:: args.held_out_every]
        training = [text for i, text in enumerate(texts) if i % args.held_out_every]
        make_tokenizer(args, training, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vocab_size = len(tokenizer)
        self.collator = SpanCorruptionCollator(tokenizer.convert_tokens_to_ids("<extra_id_0>"))
        raw_length, _ = raw_length_for(args.length)
        self.rows = token_rows(tokenizer, training, raw_length)
        rows = token_rows(tokenizer, held_out, raw_length)
        count = args.eval_batches * args.batch_size
        rows = rows[np.random.default_rng(0).permutation(len(rows))[:count]]
        self.held_out = [self.batch(rows[i : i + 32]) for i in range(0, len(rows), 32)]
        self.batch_size = args.batch_size

    def batch(self, rows):
        return self.collator([{"input_ids": row} for row in rows])

    def batches(self, steps: int, seed: int):
        order = np.random.default_rng(seed)
        for _ in range(steps):
            yield self.batch(self.rows[order.integers(len(self.rows), size=self.batch_size)])


@torch.no_grad()
def held_out_loss(model, data: Data) -> float:
    """Cross-entropy of a label, in nats."""
    model.eval()
    losses = [model(**batch).loss.item() for batch in data.held_out]
    model.train()
    return statistics.fmean(losses)


def train(model, data: Data, steps: int, seed: int, args, marks=()) -> dict[int, float]:
    """Train in place; the held-out loss at the steps `marks`."""
    optimizer = Adafactor(
        model.parameters(), lr=args.learning_rate, scale_parameter=True, relative_step=False
    )
    torch.manual_seed(seed)
    model.train()
    losses = {0: held_out_loss(model, data)} if 0 in marks else {}
    batches = data.batches(steps, seed)
    for step, batch in enumerate(tqdm(batches, total=steps, disable=None), start=1):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in marks:
            losses[step] = held_out_loss(model, data)
    return losses


def begin(name: str, folder: Path, seed: int) -> ConvT5ForConditionalGeneration:
    """A model in one of the `BEGINNINGS`."""
    warm = ConvT5ForConditionalGeneration.from_pretrained(folder)
    if name == "warm start":
        return warm
    torch.manual_seed(seed)
    model = ConvT5ForConditionalGeneration(warm.config)
    if name == "copied rest":
        weights = {key: w for key, w in warm.state_dict().items() if ".mixer." not in key}
        model.load_state_dict(weights, strict=False)
    return model


def measure(args: argparse.Namespace) -> dict:
    """The losses of every beginning and seed, by step."""
    marks = sorted({0, *args.marks, args.steps})
    losses = {name: [] for name in BEGINNINGS}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        data = Data(args, scratch / "tokenizer")
        config = T5Config(
            vocab_size=data.vocab_size,
            d_model=args.d_model,
            d_kv=args.d_model // args.num_heads,
            num_heads=args.num_heads,
            d_ff=4 * args.d_model,
            num_layers=args.num_layers,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        torch.manual_seed(0)
        t5 = T5ForConditionalGeneration(config)
        t5_loss = train(t5, data, args.t5_steps, 0, args, marks=[args.t5_steps])[args.t5_steps]
        t5.save_pretrained(scratch / "t5")
        warm = scratch / "warm"
        convert_t5.convert(scratch / "t5", warm, args.mixer, args.kernel_size)
        for seed in args.seeds:
            for name in BEGINNINGS:
                model = begin(name, warm, seed)
                losses[name].append(train(model, data, args.steps, seed + 1, args, marks))
    return {
        "t5_loss": t5_loss,
        "t5_parameters": t5.num_parameters(),
        "parameters": model.num_parameters(),
        "losses": losses,
    }


def report(results: dict) -> str:
    """The page: the command, what was trained, and the table of losses."""
    args, losses = results["settings"], results["losses"]
    lines = [
        f"# Warm start of a {args['mixer']} ConvT5 from T5, {results['date']}",
        "",
        f"    {results['command']}",
        "",
        f"{results['hardware']}, {results['software']}. T5 of {results['t5_parameters']:,} "
        f"parameters, trained for {args['t5_steps']:,} steps of {args['batch_size']} x "
        f"{args['length']} tokens, held-out loss {results['t5_loss']:.3f}; ConvT5 of "
        f"{results['parameters']:,}, K = {args['kernel_size']}. Held-out loss in nats a label, "
        f"mean (and standard deviation) of {len(args['seeds'])} seeds, by steps of continued "
        "pre-training:",
        "",
        "| steps | " + " | ".join(BEGINNINGS) + " |",
        "|---" * (1 + len(BEGINNINGS)) + "|",
    ]
    for step in losses[BEGINNINGS[0]][0]:
        cells = [_mean([run[step] for run in losses[name]]) for name in BEGINNINGS]
        lines.append(f"| {int(step):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values):
    spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="folder of *.jsonl[.gz] with a field text")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    add("--mixer", default="lightweight", choices=("depthwise", "lightweight", "dynamic"))
    add("--kernel_size", type=int, default=7)
    add("--t5_steps", type=int, default=1000)
    add("--steps", type=int, default=200, help="of continued pre-training")
    add("--marks", type=int, nargs="*", default=[10, 30, 100], help="steps to evaluate")
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--learning_rate", type=float, default=0.01)
    add("--batch_size", type=int, default=32)
    add("--length", type=int, default=64, help="of the corrupted inputs, in tokens")
    add("--vocab_size", type=int, default=4000)
    add("--d_model", type=int, default=128)
    add("--num_heads", type=int, default=4)
    add("--num_layers", type=int, default=2, help="of each stack")
    add("--eval_batches", type=int, default=8)
    add("--documents", type=int, default=1500, help="the first so many")
    add("--held_out_every", type=int, default=20, help="documents: every n-th is held out")
    add("--hardware", default=processor(), help="the name in the report and the file")
    add("--overwrite", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    slug = "-".join(args.hardware.lower().split()[:2])
    path = args.output_dir / f"warm_start_{slug}_{date.today()}.json"
    if path.exists() and not args.overwrite:
        raise SystemExit(f"{path} exists. Pass --overwrite to replace it.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.benchmark_warm_start", *arguments])
    settings = {k: v for k, v in vars(args).items() if k not in ("data_dir", "output_dir")}
    results = {
        "command": command.replace(str(args.data_dir), "DIR").replace(str(args.output_dir), "DIR2"),
        "date": str(date.today()),
        "hardware": args.hardware,
        "software": f"PyTorch {torch.__version__}, transformers {transformers.__version__}",
        "settings": settings,
        **measure(args),
    }
    # JSON turns the steps into strings: the page is drawn from what a reader of the file gets.
    results = json.loads(json.dumps(results))
    write(path, json.dumps(results, indent=1) + "\n")
    write(path.with_suffix(".md"), report(results))
    print(report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
