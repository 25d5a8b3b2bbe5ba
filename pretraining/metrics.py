"""What a run writes down about itself: lines of JSON, throughput, and the device's peak."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from modeling_convt5 import ConvT5Config

# Dense floating-point operations a second of one device, bfloat16, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v3": 61.5e12,  # a core; the chip has two
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
}


class JsonLines:
    """A file with one record a line, each written at once, so that a reader never sees half of one.

    Args:
        path: appended to.
        write: whether this process writes; only one may.
    """

    def __init__(self, path: str | os.PathLike, write: bool = True):
        self.path, self.write = Path(path), write

    def keep_until(self, step: int) -> None:
        """Drop what a run wrote after the step at which it is taken up again, and a torn line."""
        if not self.write or not self.path.exists():
            return
        kept = [line for line, record in _lines(self.path) if record["step"] <= step]
        temporary = self.path.with_name(f"{self.path.name}.incomplete")
        with open(temporary, "wb") as file:
            file.write(b"".join(kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; a number that is not finite becomes null."""
        if not self.write:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        line = (json.dumps(finite, allow_nan=False) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while line:  # a full disk takes a part, and then says so
                line = line[os.write(handle, line) :]
        finally:
            os.close(handle)

    def sync(self) -> None:
        """Have the disk hold every record so far, before a checkpoint relies on them."""
        if self.write and self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())


class Board:
    """The records for TensorBoard, if tensorboardX is installed.

    Args:
        folder: for its files.
        write: whether this process writes.
    """

    def __init__(self, folder: Path, write: bool):
        self.writer = None
        if write:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                return
            self.writer = SummaryWriter(str(folder))

    def add(self, record: dict[str, Any]) -> None:
        """Every number of a record, under its split."""
        if self.writer is not None:
            for key, value in record.items():
                if key not in ("step", "split"):
                    self.writer.add_scalar(f"{record['split']}/{key}", value, record["step"])
            self.writer.flush()


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a file.

    Raises:
        ValueError: if there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file. Pass a work directory of a run.")
    return [record for _, record in _lines(Path(path))]


def _lines(path):
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError):
            continue  # torn when the power went
        if line.endswith(b"\n"):
            yield line, record


def model_flops(config: ConvT5Config, inputs_length: int, targets_length: int) -> float:
    """Floating-point operations of training on one row: three forward passes' worth."""
    encoder = config.flops_per_token(inputs_length)["encoder"] * inputs_length
    decoder = config.flops_per_token(targets_length)["decoder"] * targets_length
    return 3 * (encoder + decoder)


def peak_flops() -> float | None:
    """Operations a second of all devices; measured on a CPU, None for a device not in the table."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        return _measured_flops() * jax.process_count()
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] * jax.device_count() if matches else None


def _measured_flops(size: int = 512) -> float:
    """The best of five products of matrices."""
    with jax.default_device(jax.local_devices()[0]):
        x = jnp.ones((size, size), jnp.float32)
        multiply = jax.jit(lambda x: x @ x)
        multiply(x).block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            multiply(x).block_until_ready()
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


class Throughput:
    """Step time, tokens a second and the share of the peak, since the last call.

    Args:
        flops: of one step.
        peak: of all devices, or None.
    """

    def __init__(self, flops: float, peak: float | None):
        self.flops, self.peak, self.steps, self.since = flops, peak, 0, None

    def step(self) -> None:
        """Count a step; the first one, which compiles, only starts the clock."""
        if self.since is not None:
            self.steps += 1

    def start(self) -> None:
        """Start the clock anew, after a pause that belongs to no step."""
        self.steps, self.since = 0, time.perf_counter()

    def report(self, tokens: int) -> dict[str, float]:
        """Figures of the steps since the clock was started, each of `tokens` tokens."""
        if not self.steps:
            return {}
        seconds = (time.perf_counter() - self.since) / self.steps
        figures = {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds}
        if self.peak:
            figures["flops_utilisation"] = self.flops / seconds / self.peak
        return figures
