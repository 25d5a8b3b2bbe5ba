"""Time and memory of the convolution, beside the projections of the block that it stands in.

    python benchmarks/benchmark_convolution.py

Times are shares of the time of the block's own two dense projections (d_model -> 2 d_model and
d_model -> d_model) on the same tokens: what the convolution adds to a layer, which depends less on
the machine than seconds do. Every round times everything once, one after the other, and the table
holds the median over rounds of op / projections within a round, so that a load which comes and goes
weighs on both; the slow baselines are part of the first rounds only. "Forward" runs without
autograd; "forward+backward" computes the gradients of all inputs. Writes
OUTPUT_DIR/convolution_<hardware>_<date>.md, and .json with every single time.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from modeling_convt5 import convolution

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINES = ("conv1d", "unfold", "dynamic_unfold")
COLUMNS = {
    "lightweight": "`lightweight_conv`",
    "dynamic": "`dynamic_conv` without prediction",
    "prediction": "`predict_filter`",
    "conv1d": "`F.conv1d`, groups = d",
    "unfold": "unfold + einsum",
    "dynamic_unfold": "unfold + einsum, dynamic",
}


class Candidate(NamedTuple):
    function: Callable
    inputs: tuple[torch.Tensor, ...]


def candidates(
    tokens: int, length: int, d_model: int, num_filters: int, kernel_size: int, dtype: torch.dtype
) -> dict[str, Candidate]:
    """What is timed: the projections, the ops, and the two usual ways to write them."""

    def tensor(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    batch = max(1, tokens // length)
    x, source = tensor(batch, length, d_model), tensor(batch, length, d_model)
    filter, weight = tensor(num_filters, kernel_size), tensor(num_filters * kernel_size, d_model)
    left_taps = kernel_size // 2

    def project(x, in_proj, out_proj):
        return F.linear(x, in_proj), F.linear(x, out_proj)

    def dynamic(x, taps):
        return convolution._convolve(x, taps, left_taps, 1, "block")

    def conv1d(x, filter):
        taps = filter.softmax(-1).repeat_interleave(d_model // num_filters, dim=0)
        y = F.conv1d(x.mT, taps[:, None], padding=left_taps, groups=d_model)
        return y[..., :length].mT

    def windows(x):
        x = F.pad(x, (0, 0, left_taps, kernel_size - 1 - left_taps))
        return x.unfold(1, kernel_size, 1).unflatten(2, (num_filters, -1))

    def unfold(x, filter):
        return torch.einsum("blfck,fk->blfc", windows(x), filter.softmax(-1)).flatten(2)

    def dynamic_unfold(x, taps):
        return torch.einsum("blfck,blfk->blfc", windows(x), taps).flatten(2)

    with torch.no_grad():
        taps = convolution.predict_filter(source, weight, None, kernel_size)
    taps = taps.to(dtype).requires_grad_()
    return {
        "projections": Candidate(
            project, (x, tensor(2 * d_model, d_model), tensor(d_model, d_model))
        ),
        "lightweight": Candidate(
            lambda x, filter: convolution.lightweight_conv(x, filter, left_taps), (x, filter)
        ),
        "dynamic": Candidate(dynamic, (x, taps)),
        "prediction": Candidate(
            lambda source, weight: convolution.predict_filter(source, weight, None, kernel_size),
            (source, weight),
        ),
        "conv1d": Candidate(conv1d, (x, filter)),
        "unfold": Candidate(unfold, (x, filter)),
        "dynamic_unfold": Candidate(dynamic_unfold, (x, taps)),
    }


def seconds(candidate: Candidate, backward: bool, least: float = 0.03) -> float:
    """Mean time of a call, of as many calls as fill `least` seconds."""
    calls, elapsed = 0, 0.0
    while elapsed < least:
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            outputs = tree_leaves(candidate.function(*candidate.inputs))
        elapsed += time.perf_counter() - start
        if backward:
            grad_outputs = [torch.ones_like(y) for y in outputs]
            start = time.perf_counter()
            torch.autograd.grad(outputs, candidate.inputs, grad_outputs)
            elapsed += time.perf_counter() - start
        calls += 1
    return elapsed / calls


class Memory(NamedTuple):
    """In units of x, without the op's inputs: held from forward for backward (the output is part
    of it), and the most at any moment of forward and backward."""

    held: float
    peak: float


class _LiveStorage(TorchDispatchMode):
    """Counts the bytes of tensors that operations return, until they are freed."""

    def __init__(self, inputs):
        super().__init__()
        self.live = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self._count(output.untyped_storage())
        return outputs

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self.known.discard(key)
        self.live -= size


def measure_memory(
    op: str, batch: int, length: int, d_model: int, num_filters: int, kernel_size: int
) -> Memory:
    """Memory of `lightweight_conv` or `dynamic_conv`, which here predicts its filters from x."""
    x = torch.randn(batch, length, d_model, requires_grad=True)
    if op == "lightweight":
        parameter = torch.randn(num_filters, kernel_size, requires_grad=True)
        arguments = (x, parameter)
    else:
        parameter = torch.randn(num_filters * kernel_size, d_model, requires_grad=True)
        arguments = (x, x, parameter, None, kernel_size)
    grad_output = torch.ones_like(x)
    with _LiveStorage([x, parameter, grad_output]) as storage:
        y = getattr(convolution, f"{op}_conv")(*arguments, left_taps=kernel_size // 2)
        held = storage.live
        torch.autograd.grad(y, (x, parameter), grad_output)
    return Memory(held / x.nbytes, storage.peak / x.nbytes)


def measure_times(args: argparse.Namespace) -> list[dict]:
    """One record for each kernel size and length, with the seconds of each round."""
    settings = [(k, n) for k in args.kernel_sizes for n in args.lengths]
    progress = tqdm(total=len(settings) * (args.rounds + 1), desc="time", unit="round")
    records = []
    for kernel_size, length in settings:
        shape = (args.tokens, length, args.d_model, args.num_filters, kernel_size)
        timed = candidates(*shape, DTYPES[args.dtype])
        times = {name: {"forward": [], "forward_backward": []} for name in timed}
        for round_ in range(args.rounds + 1):
            for name, candidate in timed.items():
                if name in BASELINES and not 1 <= round_ <= args.baseline_rounds:
                    continue
                for what, backward in (("forward", False), ("forward_backward", True)):
                    elapsed = seconds(candidate, backward, least=0.03 if round_ else 1e-9)
                    if round_:  # the first round warms up
                        times[name][what].append(elapsed)
            progress.update()
        records.append({"kernel_size": kernel_size, "length": length, "seconds": times})
    progress.close()
    return records


def share(record: dict, name: str, what: str) -> float:
    """Median over the rounds of the time as a share of the projections' in the same round."""
    times, projections = record["seconds"][name][what], record["seconds"]["projections"][what]
    return statistics.median(t / p for t, p in zip(times, projections, strict=False))


def measure_memories(args: argparse.Namespace) -> list[dict]:
    settings = [("lightweight", args.num_filters, k) for k in args.kernel_sizes]
    settings += [("dynamic", args.num_filters, k) for k in args.kernel_sizes]
    settings += [("dynamic", args.d_model, min(args.kernel_sizes))]
    length = args.lengths[len(args.lengths) // 2]
    records = []
    for op, filters, kernel_size in tqdm(settings, desc="memory", unit="op"):
        batch = max(1, args.tokens // length)
        memory = measure_memory(op, batch, length, args.d_model, filters, kernel_size)
        shape = {"num_filters": filters, "kernel_size": kernel_size, "length": length}
        records.append({"op": op, **shape, **memory._asdict()})
    return records


def processor() -> str:
    """The model of the processor; never the name of the machine."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.machine()


def report(results: dict) -> str:
    """The results as a page of Markdown."""
    settings = results["settings"]
    lines = [
        f"# The convolution on {results['hardware']}, {results['date']}",
        "",
        f"    {results['command']}",
        "",
        f"{settings['threads']} threads, {settings['dtype']}, {settings['tokens']:,} tokens, "
        f"d_model {settings['d_model']}, F = {settings['num_filters']}, median of "
        f"{settings['rounds']} rounds (conv1d and unfold: {settings['baseline_rounds']}). "
        + ", ".join(f"{k} {v}" for k, v in results["versions"]),
        "",
        "## Time",
        "",
        "As a share of the block's own projections, d_model -> 2 d_model and d_model -> d_model: "
        "forward / forward+backward.",
        "",
        "| K | length | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for record in results["times"]:
        cells = [
            f"{share(record, name, 'forward'):.3f} / {share(record, name, 'forward_backward'):.3f}"
            for name in COLUMNS
        ]
        row = [str(record["kernel_size"]), str(record["length"]), *cells]
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "## Memory",
        "",
        "In units of x, without the op's inputs: what forward leaves for backward (the output is "
        "1 of it), and the most at any moment of forward and backward (the gradient of x is 1 of "
        "it). Counted by the tensors that operations return; float32; filters predicted from x.",
        "",
        "| op | K | F | length | held for backward | peak |",
        "|---|---|---|---|---|---|",
    ]
    for r in results["memory"]:
        lines.append(
            f"| {r['op']} | {r['kernel_size']} | {r['num_filters']} | {r['length']} | "
            f"{r['held']:.2f} | {r['peak']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """All of the file or none of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kernel_sizes", type=int, nargs="+", default=[7, 15, 31], help="default: 7 15 31")
    add("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="default: 128 512 2048")
    add("--tokens", type=int, default=8192, help="tokens of a batch (default: 8192)")
    add("--d_model", type=int, default=768, help="default: 768")
    add("--num_filters", type=int, default=12, help="filters of a layer, F (default: 12)")
    add("--rounds", type=int, default=5, help="timed rounds after a first one (default: 5)")
    add(
        "--baseline_rounds",
        type=int,
        default=1,
        help="the first of them also time conv1d and "
        "unfold, which take most of the time (default: 1)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--threads", type=int, default=2, help="default: 2")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    add("--overwrite", action="store_true", help="replace results of the same day and hardware")
    args = parser.parse_args(arguments)
    if args.d_model % args.num_filters:
        parser.error(
            f"--num_filters {args.num_filters} must divide --d_model {args.d_model}: each filter "
            "is shared by d_model / num_filters channels."
        )
    for name in (
        "kernel_sizes",
        "lengths",
        "tokens",
        "num_filters",
        "rounds",
        "baseline_rounds",
        "threads",
    ):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name} {values}: expected 1 or more.")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    hardware, today = processor(), date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    paths = [args.output_dir / f"convolution_{slug}_{today}{end}" for end in (".md", ".json")]
    for path in paths:
        if path.exists() and not args.overwrite:
            sys.exit(f"{path} exists. Pass --overwrite to replace it.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    settings = {k: v for k, v in vars(args).items() if k not in ("output_dir", "overwrite")}
    results = {
        "command": shlex.join(["python", "benchmarks/benchmark_convolution.py", *arguments]),
        "date": today,
        "hardware": f"{hardware} ({os.cpu_count()} cores)",
        "versions": [("Python", platform.python_version()), ("PyTorch", torch.__version__)],
        "settings": settings,
        "times": measure_times(args),
        "memory": measure_memories(args),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    page = report(results)
    write(paths[0], page)
    write(paths[1], json.dumps(results, indent=1) + "\n")
    print(page)
    print(f"written to {paths[0]} and {paths[1].name}")


if __name__ == "__main__":
    main(sys.argv[1:])
