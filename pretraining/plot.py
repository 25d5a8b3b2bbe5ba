"""Loss curves of runs: `python -m pretraining.plot WORKDIR [WORKDIR ...] --output losses.png`."""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from .metrics import read_records  # noqa: E402


def plot(runs: dict[str, list[dict]], path: Path) -> None:
    """Training and held-out loss against steps.

    Args:
        runs: {name: records of its metrics.jsonl}.
        path: the figure; its suffix says the format.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for number, (name, records) in enumerate(runs.items()):
        for split, style in (("train", {"alpha": 0.4}), ("eval", {"marker": ".", "ls": "--"})):
            points = [
                (record["step"], record["loss"])
                for record in records
                if record["split"] == split and record["loss"] is not None
            ]
            if points:
                label = f"{name}, {'held out' if split == 'eval' else 'training'}"
                axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats a target token)")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretraining.plot", description=__doc__)
    parser.add_argument("workdirs", nargs="+", help="work directories of runs")
    parser.add_argument("--output", default="losses.png", help="the figure (%(default)s)")
    args = parser.parse_args(arguments)
    names = [Path(name).name for name in args.workdirs]
    if len(set(names)) < len(names):
        names = args.workdirs  # runs of one name in several folders
    records = [read_records(Path(folder) / "metrics.jsonl") for folder in args.workdirs]
    runs = dict(zip(names, records, strict=True))
    plot(runs, Path(args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
