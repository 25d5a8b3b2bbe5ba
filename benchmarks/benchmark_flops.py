"""Floating-point operations and speed against length (the paper's Figures 1 and 2), in Flax.

    python benchmarks/benchmark_flops.py
    python benchmarks/benchmark_flops.py --rounds 5      # speed as well, on this machine

Operations are those that XLA counts in the forward pass of an encoder with its layers written out
(a loop's body would be counted once), beside `ConvT5Config.flops_per_token`, which counts matrix
products and taps only. "Slope" is how the operations of a row grow when its length doubles: 2 is
linear, 4 quadratic. Speed is measured interleaved, in rounds, the median of each.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
from benchmark_convolution import processor, write
from flax import nnx

from modeling_convt5 import ConvT5Config, FlaxConvT5EncoderModel

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FAMILIES = ("lightweight", "dynamic", "dilated", "transformer")
# The convolutions' operations differ by less than the width of a line.
STYLES = {"lightweight": ".-", "dynamic": "x--", "dilated": "+:", "transformer": ".-"}


def configuration(family: str, args: argparse.Namespace) -> ConvT5Config:
    """The preset, with other layers if asked for."""
    layers = {"num_layers": args.layers} if args.layers else {}
    return ConvT5Config.from_preset(f"{family}-{args.size}", **layers)


def counted(config: ConvT5Config, length: int) -> float:
    """What XLA counts for one row of `length` tokens, without running anything."""
    model = nnx.eval_shape(lambda: FlaxConvT5EncoderModel(config))
    graph, state = nnx.split(model)

    def encode(state, ids):
        return nnx.merge(graph, state)(ids).last_hidden_state

    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.jit(encode).lower(state, ids).cost_analysis()["flops"]


def speeds(args: argparse.Namespace, length: int) -> dict[str, float]:
    """Rows a second of every family, interleaved."""
    runs, rows = {}, max(1, args.tokens // length)
    for family in FAMILIES:
        model = FlaxConvT5EncoderModel(configuration(family, args))
        ids = jnp.ones((rows, length), jnp.int32)
        runs[family] = nnx.jit(lambda m, i: m(i).last_hidden_state), model, ids
    seconds = {family: [] for family in FAMILIES}
    for round_number in range(args.rounds + 1):
        for family, (encode, model, ids) in runs.items():
            start = time.perf_counter()
            encode(model, ids).block_until_ready()
            if round_number:  # the first round compiles
                seconds[family].append(time.perf_counter() - start)
    return {family: rows / statistics.median(times) for family, times in seconds.items()}


def measure(args: argparse.Namespace) -> list[dict]:
    """A record for each length and family."""
    records = []
    for length in args.lengths:
        speed = speeds(args, length) if args.rounds else {}
        for family in FAMILIES:
            config = configuration(family, args)
            record = {
                "length": length,
                "family": family,
                "xla": counted(config, length),
                "twice": counted(config, 2 * length),
                "formula": config.flops_per_token(length)["encoder"] * length,
            }
            if speed:
                record["rows_per_second"] = speed[family]
            records.append(record)
            print(json.dumps(record), flush=True)
    return records


def page(records: list[dict], command: str, args: argparse.Namespace) -> str:
    """The records as tables."""
    lines = [
        f"# Operations against length, {args.size}",
        "",
        f"`{command}`, {date.today()}, JAX {jax.__version__}, {processor()}. "
        "GFLOPs of the encoder for one row: XLA's count / the formula; in brackets how the count "
        "grows when the length doubles.",
        "",
        "| length | " + " | ".join(FAMILIES) + " |",
        "|---" * (len(FAMILIES) + 1) + "|",
    ]
    for length in args.lengths:
        row = [r for r in records if r["length"] == length]
        cells = [
            f"{r['xla'] / 1e9:,.2f} / {r['formula'] / 1e9:,.2f} (x {r['twice'] / r['xla']:.2f})"
            for r in row
        ]
        lines.append(f"| {length:,} | " + " | ".join(cells) + " |")
    if args.rounds:
        lines += ["", "Rows a second on this machine:", ""]
        lines += ["| length | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"]
        for length in args.lengths:
            cells = [f"{r['rows_per_second']:,.2f}" for r in records if r["length"] == length]
            lines.append(f"| {length:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(records: list[dict], path: Path) -> None:
    """Operations, and speed where it was measured, against length."""
    fields = [("xla", "FLOPs a row (XLA)"), ("rows_per_second", "rows a second")]
    fields = [(field, label) for field, label in fields if field in records[0]]
    drawing, axes = plt.subplots(1, len(fields), figsize=(5.5 * len(fields), 4.2), squeeze=False)
    for axis, (field, label) in zip(axes[0], fields, strict=True):
        for family in FAMILIES:
            points = [(r["length"], r[field]) for r in records if r["family"] == family]
            axis.plot(*zip(*points, strict=True), STYLES[family], label=family)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="base", choices=("tiny", "small", "base", "large"))
    parser.add_argument("--layers", type=int, help="layers of the stack (those of the preset)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096]
    )
    parser.add_argument("--rounds", type=int, default=0, help="0 measures no speed")
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch, for the speed")
    parser.add_argument("--output_dir", default="benchmarks/results")
    args = parser.parse_args(arguments)
    if min(args.lengths) < 1 or args.rounds < 0:
        parser.error("--lengths must be 1 or more, --rounds 0 or more.")
    command = shlex.join(["python", "benchmarks/benchmark_flops.py", *(arguments or sys.argv[1:])])
    records = measure(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"flops_{args.size}_{date.today()}"
    content = {"command": command, "records": records}
    write(stem.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    write(stem.with_suffix(".md"), page(records, command, args))
    figure(records, stem.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
