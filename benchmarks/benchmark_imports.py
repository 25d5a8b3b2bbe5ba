"""How long it takes to import the Flax side, where PyTorch is installed and where it is not.

    python benchmarks/benchmark_imports.py --without .venv-flax/bin/python

Each import is a fresh process; the median of several is printed, and their ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys

SCRIPT = """
import sys, time
start = time.perf_counter()
import modeling_convt5.modeling_flax_convt5
print(time.perf_counter() - start, "torch" in sys.modules)
"""


def seconds(python: str, rounds: int) -> tuple[float, bool]:
    """The median time of the import, and whether PyTorch came with it."""
    times = []
    for _ in range(rounds + 1):
        run = subprocess.run([python, "-c", SCRIPT], capture_output=True, text=True, check=True)
        time, torch = run.stdout.split()
        times.append(float(time))
    return statistics.median(times[1:]), torch == "True"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with_torch", default=sys.executable, help="a Python with PyTorch")
    parser.add_argument("--without", default=".venv-flax/bin/python", help="and one without")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = {}
    for name, python in (("with", args.with_torch), ("without", args.without)):
        found[name], torch = seconds(python, args.rounds)
        if torch != (name == "with"):
            sys.exit(f"{python}: expected an environment {name} PyTorch.")
        print(f"{name} PyTorch: {found[name]:.2f} s")
    found["ratio"] = found["with"] / found["without"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
