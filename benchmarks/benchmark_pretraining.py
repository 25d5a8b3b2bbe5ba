"""Whether the data and the checkpoints hold pre-training up, as ratios within one run.

    python benchmarks/benchmark_pretraining.py --data TEXT --tokenizer tokenizer.json

1. rows: prepared rows with span corruption that one thread makes a second, over the rows that a
   step of tiny_cpu.py consumes in that time.
2. pipeline: time of a step fed by the pipeline over that of the same step on one fixed batch.
3. checkpoints: `--steps` steps are timed with and without an asynchronous checkpoint at their
   start, which is written long before they end; the difference is what a checkpoint costs, and is
   given as a share of `checkpoint_every` steps.

Kinds take turns, round after round; the ratios are of medians. The table goes to standard output
and OUTPUT_DIR/pretraining_<hardware>_<date>.md, every single time into the .json beside it.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import jax
from tqdm import trange

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.benchmark_convolution import processor, write  # noqa: E402
from pretraining.settings import load  # noqa: E402
from pretraining.train import set_up  # noqa: E402


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class Trainer:
    """Steps of a run, from the pipeline or on one batch."""

    def __init__(self, run):
        self.run, self.state, self.data = run, run.start(), iter(run.batches)
        self.fixed = run.to_devices(next(self.data))
        self.steps(2, fixed=True)

    def steps(self, count: int, fixed: bool) -> None:
        for _ in range(count):
            batch = self.fixed if fixed else self.run.to_devices(next(self.data))
            self.state, _ = self.run.train(self.state, batch)
        jax.block_until_ready(self.state)

    def save(self, step: int) -> None:
        self.run.checkpoints.save(step, self.state, self.data.get_state())


def measure(args: argparse.Namespace, workdir: Path) -> tuple[dict[str, float], dict]:
    """The ratios, and the seconds of every round."""
    overrides = [f"data_dir={args.data}", f"tokenizer={args.tokenizer}", *args.override]
    config = str(ROOT / "pretraining" / "configs" / "tiny_cpu.py")
    run = set_up(load(config, overrides), workdir)
    settings, trainer = run.settings, Trainer(run)
    place = [(number, number % len(run.batches.rows)) for number in range(settings.batch_size)]
    times: dict = {"rows": [], "fixed": [], "pipeline": [], "saved": [], "unsaved": []}

    def saving(step):
        trainer.save(step)
        trainer.steps(args.steps, fixed=True)

    for step in trange(1, args.rounds + 1, unit="round", disable=None):
        times["rows"].append(timed(lambda: run.batches.make(zip(*place, strict=True))))
        times["fixed"].append(timed(lambda: trainer.steps(args.rows_steps, fixed=True)))
        times["pipeline"].append(timed(lambda: trainer.steps(args.rows_steps, fixed=False)))
        times["unsaved"].append(timed(lambda: trainer.steps(args.steps, fixed=True)))
        times["saved"].append(timed(lambda step=step: saving(step)))
        run.checkpoints.wait()
    run.checkpoints.close()
    median = {name: statistics.median(values) for name, values in times.items()}
    interval = settings.checkpoint_every * median["unsaved"] / args.steps
    return {
        "rows a second of one thread": settings.batch_size / median["rows"],
        "rows made / rows consumed": median["fixed"] / args.rows_steps / median["rows"],
        "step with pipeline / on one batch": median["pipeline"] / median["fixed"],
        "seconds that a checkpoint costs": median["saved"] - median["unsaved"],
        f"{settings.checkpoint_every} steps with a checkpoint / without": 1
        + (median["saved"] - median["unsaved"]) / interval,
    }, times


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="text or records")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows_steps", type=int, default=20, help="steps of a round of 1 and 2")
    parser.add_argument("--steps", type=int, default=60, help="steps of a round of 3")
    parser.add_argument("--override", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--output_dir", default="benchmarks/results")
    args = parser.parse_args(arguments)
    if min(args.rounds, args.rows_steps, args.steps) < 1:
        parser.error("--rounds, --rows_steps and --steps must be 1 or more.")
    with tempfile.TemporaryDirectory() as workdir:
        found, times = measure(args, Path(workdir))
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/benchmark_pretraining.py", *given])
    for name in ("data", "tokenizer"):
        command = command.replace(getattr(args, name), name.upper())
    rows = "\n".join(f"| {name} | {value:,.3f} |" for name, value in found.items())
    page = (
        f"# Pipeline and checkpoints\n\n`{command}`, {date.today()}, {processor()}, "
        f"{os.cpu_count()} cores\n\n| | |\n|---|---|\n{rows}\n"
    )
    slug = "-".join(processor().lower().split()[:2])
    stem = Path(args.output_dir) / f"pretraining_{slug}_{date.today()}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "ratios": found, "seconds": times}
    write(stem.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    write(stem.with_suffix(".md"), page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
