"""Time, speed and memory of converting a checkpoint of the size of the largest released one.

    python -m benchmarks.benchmark_conversion --scratch DIR

Writes a Mesh-TensorFlow checkpoint with the shapes of the large dynamic model (1.2 billion random
parameters, 4.8 GB; DIR needs 10 GB), converts it in a process of its own and measures that process,
and reads every variable once with this project's reader and, where it is installed, with
TensorFlow's. Results go to OUTPUT_DIR/conversion_<hardware>_<date>.json and .md.
"""

import argparse
import importlib.util
import json
import math
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.benchmark_convolution import processor, write
from conversion.crc32c import crc32c
from conversion.tf_checkpoint import Checkpoint
from tests.mesh_tf_reference import MeshModel, both
from tests.tf_bundle import write_bundle

SHARDS = 16


def write_checkpoint(folder: Path, args: argparse.Namespace) -> int:
    """Write the checkpoint, variable by variable; returns its number of parameters."""
    model = MeshModel(
        vocab=args.vocab_size,
        d_model=args.d_model,
        d_ff=4 * args.d_model,
        num_heads=16,
        d_kv=args.d_model // 16,
        blocks=both(args.num_layers),
        kind=both("dynamic"),
        max_length=both(512),
    )
    rng = np.random.default_rng(0)
    shapes = model.shapes()
    values = {
        name: partial(lambda shape: rng.random(shape, np.float32) - 0.5, shape)
        for name, shape in shapes.items()
    }
    write_bundle(folder / "model.ckpt-524288", values, shards=SHARDS, checksum=crc32c)
    (folder / "operative_config.gin").write_text(model.gin())
    return sum(math.prod(shape) for shape in shapes.values())


def measure_conversion(checkpoint: Path, output: Path) -> dict:
    """Seconds, and peak memory in bytes, of the command."""
    command = [sys.executable, "-m", "conversion.convert_mesh_tf"]
    start = time.perf_counter()
    run = subprocess.run(
        [*command, "--checkpoint", str(checkpoint), "--output", str(output)],
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if run.returncode:
        raise SystemExit(run.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak, "report": run.stdout.splitlines()[1:4]}


def measure_reading(prefix: Path) -> dict[str, float]:
    """Seconds to read every variable once, by reader; both check every checksum."""
    seconds = {}
    start = time.perf_counter()
    own = Checkpoint(prefix)
    for name in own.variables:
        own.read(name)
    seconds["conversion.tf_checkpoint"] = time.perf_counter() - start
    if importlib.util.find_spec("tensorflow"):
        import tensorflow as tf

        start = time.perf_counter()
        reader = tf.train.load_checkpoint(str(prefix))
        for name in own.variables:
            reader.get_tensor(name)
        seconds["TensorFlow"] = time.perf_counter() - start
    return seconds


def report(results: dict) -> str:
    size, run = results["bytes"], results["conversion"]
    lines = [
        f"# Converting {results['parameters']:,} parameters, {results['date']}",
        "",
        f"    {results['command']}",
        "",
        f"{results['hardware']}, {results['software']}; {size / 1e9:.2f} GB in {SHARDS} files, "
        "just written, so in the system's file cache as far as it has room.",
        "",
        f"- whole command: {run['seconds']:.0f} s, {size / 1e6 / run['seconds']:.0f} MB/s, peak "
        f"memory {run['peak_bytes'] / 1e9:.2f} GB",
        *(
            f"- reading alone, {name}: {seconds:.1f} s, {size / 1e6 / seconds:.0f} MB/s"
            for name, seconds in results["reading_seconds"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scratch", type=Path, required=True, help="a folder on a disk with 10 GB of room")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    add("--d_model", type=int, default=1024)
    add("--num_layers", type=int, default=24, help="of each stack")
    add("--vocab_size", type=int, default=32128)
    add("--hardware", default=processor(), help="the name in the report and the file")
    add("--overwrite", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    slug = "-".join(args.hardware.lower().split()[:2])
    path = args.output_dir / f"conversion_{slug}_{date.today()}.json"
    if path.exists() and not args.overwrite:
        raise SystemExit(f"{path} exists. Pass --overwrite to replace it.")
    for folder in (args.output_dir, args.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.benchmark_conversion", *arguments])
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        parameters = write_checkpoint(Path(scratch), args)
        prefix = Path(scratch) / "model.ckpt-524288"
        reading = measure_reading(prefix)
        conversion = measure_conversion(prefix.parent, Path(scratch) / "model")
    results = {
        "command": command.replace(str(args.scratch), "DIR").replace(str(args.output_dir), "DIR2"),
        "date": str(date.today()),
        "hardware": args.hardware,
        "software": f"NumPy {np.__version__}",
        "parameters": parameters,
        "bytes": 4 * parameters,
        "conversion": conversion,
        "reading_seconds": reading,
    }
    write(path, json.dumps(results, indent=1) + "\n")
    write(path.with_suffix(".md"), report(results))
    print(report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
