"""Speed and memory of ConvT5 beside transformers' T5 of the same size (the paper's Figure 1).

    python benchmarks/benchmark_model.py
    python benchmarks/benchmark_model.py --what encoder --layers 2 12 --rounds 5
    python benchmarks/benchmark_model.py --framework flax

Every length has the same number of tokens in a batch. The models of one length are timed in turn,
round after round in one process, and the tables hold ratios of medians: a load that comes and goes
weighs on all alike. Memory is the peak of a fresh process for each cell, above what it held when
the model was built; in Flax it is what XLA plans. Results are kept cell by cell in
OUTPUT_DIR/model_<hardware>_<date>.json (model-flax_...), so an interrupted run goes on where it
stopped; the tables (.md) and the plot (.png) are drawn from it.
"""

import argparse
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from benchmark_convolution import processor, write
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from modeling_convt5 import ConvT5Config, ConvT5EncoderModel, ConvT5ForConditionalGeneration
from modeling_convt5.cache_convt5 import CACHE, new_static_cache

CONVOLUTIONS = ("lightweight", "dynamic", "dilated", "hybrid")
BASELINES = ("T5 sdpa", "T5 eager")
MODELS = CONVOLUTIONS + BASELINES
PARTS = ("encoder", "compiled", "training", "generation", "memory")


def configuration(name: str, args: argparse.Namespace, layers: int, **fields):
    """The presets' settings at the size of the run; "hybrid" has attention in its last layer."""
    size = {
        "d_model": args.d_model,
        "d_kv": 64,
        "num_heads": args.d_model // 64,
        "d_ff": 4 * args.d_model,
        "num_layers": layers,
        "dropout_rate": 0.0,
        **fields,
    }
    if name in BASELINES:
        return T5Config(**size, decoder_start_token_id=0, attn_implementation=name.split()[1])
    family = name if name != "hybrid" else "lightweight"
    config = ConvT5Config.from_preset(f"{family}-base", **_windows(family, layers), **size)
    if name == "hybrid":
        config.encoder_mixers = ["lightweight"] * (layers - 1) + ["attention"]
    return config


def _windows(family, layers):
    """The dilated preset has one window a layer; other depths spread them over their layers."""
    if family != "dilated":
        return {}
    preset = ConvT5Config.from_preset("dilated-base")
    return {
        field: [getattr(preset, field)[12 * i // layers] for i in range(layers)]
        for stack in ("encoder", "decoder")
        for field in (f"{stack}_kernel_size", f"{stack}_dilation")
    }


def build(name: str, args: argparse.Namespace, layers: int, encoder_only: bool = True, **fields):
    torch.manual_seed(0)
    t5 = name in BASELINES
    if encoder_only:
        cls = T5EncoderModel if t5 else ConvT5EncoderModel
    else:
        cls = T5ForConditionalGeneration if t5 else ConvT5ForConditionalGeneration
    return cls(configuration(name, args, layers, **fields))


def batch(args: argparse.Namespace, length: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(2, 1000, (max(1, args.tokens // length), length))


def in_turn(calls: dict, rounds: int) -> dict[str, float | None]:
    """Median seconds of each call, one after the other in every round; None where memory ends."""
    times = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            if times[name] is None:
                continue
            try:
                start = time.perf_counter()
                call()
                if round_:  # the first one warms up, and compiles
                    times[name].append(time.perf_counter() - start)
            except (MemoryError, RuntimeError) as error:
                if "memory" not in str(error) and not isinstance(error, MemoryError):
                    raise
                times[name] = None
    return {name: t and statistics.median(t) for name, t in times.items()}


def measure_encoder(args, layers, length, compiled=False) -> dict:
    """Seconds of the encoder alone, forward and forward+backward."""
    ids, calls = batch(args, length), {"forward": {}, "forward+backward": {}}
    for name in args.models:
        model = build(name, args, layers, vocab_size=1000)
        run = torch.compile(model) if compiled else model

        def forward(run=run):
            with torch.no_grad():
                run(ids)

        def forward_backward(run=run):
            run(ids)[0].sum().backward()

        calls["forward"][name] = forward
        calls["forward+backward"][name] = forward_backward
        if compiled:
            calls["forward"][f"{name} (not compiled)"] = lambda model=model: _no_grad(model, ids)
    return {what: in_turn(models, args.rounds) for what, models in calls.items()}


def _no_grad(model, ids):
    with torch.no_grad():
        model(ids)


def measure_training(args, layers, length) -> dict:
    """Seconds of a whole step: loss, gradients, AdamW; targets are T5's 114 for 512 inputs."""
    ids, calls = batch(args, length), {}
    labels = ids[:, : max(2, length * 114 // 512)]
    for name in args.models:
        model = build(name, args, layers, encoder_only=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(model=model, optimizer=optimizer):
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        calls[name] = step
    return {"step": in_turn(calls, args.rounds)}


def measure_generation(args, layers) -> dict:
    """Seconds a token after 32 and after 2,048 tokens, batch 1; and tokens a second, batch 8."""
    encoded = batch(args, 512)[:1]
    positions, results = (32, 2048), {}
    cases = [(name, cache) for name in MODELS for cache in ("dynamic", "static")]
    cases += [(f"{name} alone", c) for name in CONVOLUTIONS[:3] for c in ("dynamic", "static")]
    for name, cache in cases:
        if name in BASELINES and cache == "static":
            continue
        family, alone = name.removesuffix(" alone"), name.endswith(" alone")
        fields = {"cross_attention": False} if alone else {}
        model = build(family, args, layers, False, vocab_size=1000, **fields).eval()
        steps = {p: _decoder(model, encoded, p, cache, args) for p in positions}
        for _ in range(5):
            for step in steps.values():
                step()
        times = {p: [] for p in positions}
        for _ in range(args.steps):
            for p, step in steps.items():
                start = time.perf_counter()
                step()
                times[p].append(time.perf_counter() - start)
        results[f"{name}, {cache} cache"] = {str(p): statistics.median(t) for p, t in times.items()}
    return {"token": results, "throughput": _throughput(args, layers)}


@torch.no_grad()
def _decoder(model, encoded, position, cache, args):
    """A call that decodes one more token of a row which has `position` tokens already."""
    encoder_outputs = model.get_encoder()(encoded)
    past = None
    if cache == "static":
        length = position + args.steps + 8
        past = new_static_cache(model.config, length, encoded.shape[1])
    ids = torch.randint(2, 1000, (1, position))

    @torch.no_grad()
    def read(ids, past):
        return model(
            encoder_outputs=encoder_outputs,
            decoder_input_ids=ids,
            **{CACHE: past},
            use_cache=True,
        )[CACHE]

    state = {"past": read(ids, past)}

    def step():
        state["past"] = read(ids[:, :1], state["past"])

    return step


def _throughput(args, layers) -> dict[str, float]:
    ids, calls, count = batch(args, 512)[:8], {}, args.steps
    for name in MODELS:
        model = build(name, args, layers, False, vocab_size=1000).eval()
        arguments = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        calls[name] = lambda model=model, arguments=arguments: model.generate(ids, **arguments)
    seconds = in_turn(calls, args.rounds)
    return {name: len(ids) * count / second for name, second in seconds.items()}


def measure_memory(args, layers, length, name, backward) -> float:
    """MB at the peak of one pass, above the process with its model; run in a fresh process."""
    torch.set_num_threads(args.threads)
    model = build(name, args, layers, vocab_size=1000)
    ids = torch.randint(2, 1000, (max(1, args.tokens // length), length))
    with torch.set_grad_enabled(backward):
        model(ids[:, :32])  # libraries allocate at their first call
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output = model(ids)[0]
        if backward:
            output.sum().backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / 1024  # kilobytes on Linux


def in_fresh_process(args, job: list) -> dict | float | None:
    """One measurement in a process of its own, with less memory than would halt the machine."""
    command = [sys.executable, __file__, "--job", json.dumps(job), *forwarded(args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run_job(args: argparse.Namespace) -> None:
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    limit = int(0.8 * available) + 2**33  # address space, of which libraries reserve some
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(args.threads)
    part, *rest = json.loads(args.job)
    measures = flax_side().MEASURES if args.framework == "flax" else MEASURES
    print(json.dumps(measures[part](args, *rest)))


MEASURES = {
    "encoder": measure_encoder,
    "compiled": lambda *job: measure_encoder(*job, compiled=True),
    "training": measure_training,
    "generation": measure_generation,
    "memory": measure_memory,
}


def flax_side():
    """The measurements in Flax, which PyTorch's users need not be able to import."""
    import benchmark_model_flax

    return benchmark_model_flax


def jobs(args: argparse.Namespace) -> list[list]:
    if args.framework == "flax":
        return flax_side().jobs(args)
    found = []
    for layers in args.layers:
        if "encoder" in args.what:
            found += [["encoder", layers, length] for length in args.lengths]
    layers = min(args.layers)
    for part in ("compiled", "training"):
        if part in args.what:
            found += [[part, layers, length] for length in args.lengths]
    if "generation" in args.what:
        found.append(["generation", layers])
    if "memory" in args.what:
        for length in [*args.lengths, *args.memory_lengths]:
            for name in MODELS if length in args.lengths else CONVOLUTIONS[:3]:
                found.append(["memory", layers, length, name, False])
                if length in args.lengths:
                    found.append(["memory", layers, length, name, True])
    return found


def ratio(baseline: float | None, seconds: float | None) -> str:
    if seconds is None:
        return "out of memory"
    return "T5 out of memory" if baseline is None else f"{baseline / seconds:.2f}"


def contestants(results: dict) -> tuple[tuple[str, ...], str]:
    """The models of a run and the one that the others are measured against."""
    if results["settings"]["framework"] == "flax":
        return flax_side().MODELS, flax_side().BASELINE
    return MODELS, "T5 sdpa"


def speed_table(results: dict, part: str, layers: int, what: str) -> list[str]:
    """Rows of a table: how many times as fast as T5, by length."""
    cells, (models, baseline) = results["cells"], contestants(results)
    others = [name for name in models if name != baseline]
    lines = ["| length | " + " | ".join(others) + " |", "|---|" + "---|" * len(others)]
    for key, cell in cells.items():
        job = json.loads(key)
        if job[:2] == [part, layers] and cell and what in cell:
            times = cell[what]
            ratios = [
                ratio(times[baseline], times[name]) if name in times else "" for name in others
            ]
            lines.append(f"| {job[2]:,} | " + " | ".join(ratios) + " |")
    return lines if len(lines) > 2 else []


def report(results: dict) -> str:
    """The results as a page of Markdown."""
    cells, settings = results["cells"], results["settings"]
    lines = [
        f"# ConvT5 and T5 on {results['hardware']}, {results['date']}",
        "",
        f"    {results['command']}",
        "",
        f"d_model {settings['d_model']}, {settings['tokens']:,} tokens a batch (one row where a "
        f"row is longer), {settings['threads']} threads, float32, median of {settings['rounds']} "
        "rounds. " + ", ".join(f"{k} {v}" for k, v in results["versions"]),
    ]
    titles = {
        ("encoder", "forward"): "Encoder, forward",
        ("encoder", "forward+backward"): "Encoder, forward and backward",
        ("compiled", "forward"): "Encoder, forward, all compiled",
        ("compiled", "forward+backward"): "Encoder, forward and backward, all compiled",
        ("training", "step"): "Training step",
    }
    for (part, what), title in titles.items():
        for layers in sorted({json.loads(key)[1] for key in cells}):
            table = speed_table(results, part, layers, what)
            if table:
                lines += ["", f"## {title}, {layers} layers a stack", ""]
                lines += [f"How many times as fast as {contestants(results)[1]}.", "", *table]
    lines += generation_tables(results)
    if settings["framework"] == "flax":
        keyed = {tuple(json.loads(key)): cell for key, cell in cells.items()}
        lines += flax_memory_table(keyed) + flax_side().extra_tables(keyed)
    else:
        lines += compiled_gain(cells) + memory_table(cells)
    return "\n".join(lines) + "\n"


def compiled_gain(cells: dict) -> list[str]:
    lines = []
    for key, cell in cells.items():
        part, *job = json.loads(key)
        if part == "compiled" and cell:
            times = cell["forward"]
            gains = [
                ratio(times[f"{name} (not compiled)"], times[name]) if name in times else ""
                for name in MODELS
            ]
            lines.append(f"| {job[1]:,} | " + " | ".join(gains) + " |")
    if not lines:
        return []
    head = ["| length | " + " | ".join(MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    return ["", "## What compiling gains: eager time / compiled time, forward", "", *head, *lines]


def generation_tables(results: dict) -> list[str]:
    cells, (_, name_of_baseline) = results["cells"], contestants(results)
    cell = next((c for key, c in cells.items() if json.loads(key)[0] == "generation"), None)
    if not cell:
        return []
    lines = ["", "## Decoding one token, batch 1, 512 input tokens", ""]
    lines += [
        "| model | after 32 tokens, ms | after 2,048 tokens, ms | ratio |",
        "|---|---|---|---|",
    ]
    for name, times in cell["token"].items():
        early, late = (1000 * times[position] for position in ("32", "2048"))
        lines.append(f"| {name} | {early:.2f} | {late:.2f} | {late / early:.3f} |")
    lines += ["", "`alone`: no cross-attention.", "", "## Greedy generation, batch 8", ""]
    lines += [f"| model | tokens a second | times {name_of_baseline} |", "|---|---|---|"]
    baseline = cell["throughput"][name_of_baseline]
    for name, speed in cell["throughput"].items():
        lines.append(f"| {name} | {speed:.0f} | {speed / baseline:.2f} |")
    return lines


def memory_table(cells: dict) -> list[str]:
    rows: dict[tuple, dict] = {}
    for key, cell in cells.items():
        part, *job = json.loads(key)
        if part == "memory":
            _, length, name, backward = job
            rows.setdefault((backward, length), {})[name] = cell
    lines = []
    for backward, title in ((False, "forward"), (True, "forward and backward")):
        some = {length: cell for (b, length), cell in rows.items() if b == backward}
        if some:
            lines += ["", f"## Peak memory of the encoder, {title}, MB", ""]
            lines += ["| length | " + " | ".join(MODELS) + " |", "|---|" + "---|" * len(MODELS)]
        for length, cell in some.items():
            texts = [
                "" if name not in cell else "out of memory" if cell[name] is None
                else f"{cell[name]:,.0f}"
                for name in MODELS
            ]  # fmt: skip
            lines.append(f"| {length:,} | " + " | ".join(texts) + " |")
    return lines


def flax_memory_table(cells: dict) -> list[str]:
    lines = []
    for what in ("forward", "forward+backward"):
        rows = [(job[2], cell[what]) for job, cell in cells.items() if job[0] == "memory" and cell]
        if rows:
            models = list(rows[0][1])
            lines += ["", f"## What XLA plans for the encoder, {what}, MB", ""]
            lines += ["| length | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
        for length, cell in rows:
            lines.append(f"| {length:,} | " + " | ".join(f"{cell[m]:,.0f}" for m in models) + " |")
    return lines


def plot(results: dict, path: Path) -> None:
    """Speed against T5, and memory, by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = {tuple(json.loads(key)): cell for key, cell in results["cells"].items() if cell}
    models, baseline = contestants(results)
    flax = results["settings"]["framework"] == "flax"
    layers = min((job[1] for job in cells if job[0] == "encoder"), default=None)
    panels = [("encoder", "forward"), ("encoder", "forward+backward"), ("memory", False)]
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axis, (part, what) in zip(axes, panels, strict=True):
        for name in models:
            points = []
            for job, cell in cells.items():
                if part == job[0] == "memory" and (flax or job[3:] == (name, what)):
                    points.append((job[2], cell["forward"][name] if flax else cell))
                elif part == job[0] == "encoder" and job[1] == layers:
                    times = cell[what]
                    if times.get(name) and times[baseline]:
                        points.append((job[2], times[baseline] / times[name]))
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2 if part != "memory" else 10)
        axis.set_xlabel("length, tokens")
        title = {"memory": "encoder, forward: peak memory, MB"}
        axis.set_title(title.get(part, f"encoder, {what}: speed relative to {baseline}"))
        axis.grid(alpha=0.3)
    axes[0].legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def forwarded(args: argparse.Namespace) -> list[str]:
    """The arguments that a measurement in a fresh process needs."""
    names = ("framework", "d_model", "tokens", "rounds", "steps", "threads")
    parts = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    return [*parts, "--models", *args.models]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, lengths = parser.add_argument, [64, 128, 512, 2048, 4096, 8192]
    add("--framework", choices=["torch", "flax"], default="torch", help="default: torch")
    add("--what", nargs="+", help="parts, default: all of them")
    add("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all, in PyTorch")
    add("--layers", type=int, nargs="+", default=[2], help="layers of a stack (default: 2)")
    add("--lengths", type=int, nargs="+", default=lengths, help="default: 64 ... 8192")
    add("--memory_lengths", type=int, nargs="*", default=[16384, 32768, 65536], help="forward only")
    add("--d_model", type=int, default=768, help="a multiple of 64 (default: 768)")
    add("--tokens", type=int, default=4096, help="tokens of a batch (default: 4096)")
    add("--rounds", type=int, default=5, help="timed rounds after a first one (default: 5)")
    add("--steps", type=int, default=100, help="tokens decoded for a median (default: 100)")
    add("--threads", type=int, default=2, help="default: 2")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    add("--overwrite", action="store_true", help="measure again what the day's results hold")
    add("--job", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    args = parser.parse_args(arguments)
    parts = flax_side().PARTS if args.framework == "flax" else PARTS
    args.what = args.what or list(parts)
    for part in args.what:
        if part not in parts:
            parser.error(f"--what {part}: expected some of {', '.join(parts)}.")
    if args.framework == "torch" and "T5 sdpa" not in args.models:
        parser.error("--models: expected 'T5 sdpa' among them, which the others are compared with.")
    if args.d_model % 64:
        parser.error(f"--d_model {args.d_model}: expected a multiple of 64, the size of a head.")
    for name in ("layers", "lengths", "tokens", "rounds", "steps", "threads", "d_model"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name} {values}: expected 1 or more.")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    if args.job:
        run_job(args)
        return
    hardware, today = processor(), date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    model = "model" if args.framework == "torch" else "model-flax"
    path = args.output_dir / f"{model}_{slug}_{today}.json"
    results = {
        "command": shlex.join(["python", "benchmarks/benchmark_model.py", *arguments]),
        "date": today,
        "hardware": f"{hardware} ({os.cpu_count()} cores)",
        "versions": [
            ("Python", platform.python_version()),
            ("PyTorch", torch.__version__),
            ("transformers", transformers.__version__),
            *((name, version(name)) for name in ("jax", "flax") if args.framework == "flax"),
        ],
        "settings": {
            key: getattr(args, key)
            for key in ("framework", "d_model", "tokens", "rounds", "threads")
        },
        "cells": {},
    }
    if path.exists() and not args.overwrite:
        kept = json.loads(path.read_text())
        if kept["settings"] != results["settings"]:
            sys.exit(
                f"{path} holds results of other settings ({kept['settings']}). Pass --overwrite "
                "to replace them, or another --output_dir."
            )
        results["cells"] = kept["cells"]
        if results["command"] not in kept["command"].splitlines():
            results["command"] = f"{kept['command']}\n    {results['command']}"
        print(f"{path}: {len(results['cells'])} cells are kept, the others measured.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    bar = tqdm(jobs(args), unit="cell")
    for job in bar:
        key = json.dumps(job)
        bar.set_postfix_str(" ".join(map(str, job)))
        if key not in results["cells"]:
            results["cells"][key] = in_fresh_process(args, job)
            write(path, json.dumps(results, indent=1) + "\n")
    page = report(results)
    write(path.with_suffix(".md"), page)
    plot(results, path.with_suffix(".png"))
    print(page)
    print(f"written to {path}, .md and .png")


if __name__ == "__main__":
    main(sys.argv[1:])
