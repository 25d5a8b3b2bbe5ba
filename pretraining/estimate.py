"""What a run will take, computed: `python -m pretraining.estimate --config FILE [--override ...]`.

These lines head each configuration file. Floating-point operations are the model's own (three
forward passes' worth a step, `metrics.model_flops`), hours those at 40 % of the hardware's peak.
"""

import argparse
import sys

from modeling_convt5 import ConvT5Config

from .metrics import PEAK_FLOPS, model_flops
from .settings import Settings, load

UTILISATION = 0.4
# Name, number of devices as JAX counts them, kind. The paper used the first: 16 chips, 32 cores.
HARDWARE = (
    ("16 TPU v3 chips", 32, "TPU v3"),
    ("v5e-8", 8, "TPU v5e"),
    ("v4-32 pod", 16, "TPU v4"),
)


def estimate(settings: Settings) -> list[str]:
    """Parameters, tokens, FLOPs, and on each hardware the steps a second and the hours."""
    config = ConvT5Config.from_preset(settings.model, **settings.model_overrides)
    row = model_flops(config, settings.inputs_length, settings.targets_length)
    step = settings.batch_size * row
    tokens = settings.train_steps * settings.batch_size * settings.raw_length
    lines = [
        f"parameters {config.num_parameters():,}",
        f"tokens     {tokens:.3g}, {settings.batch_size} x {settings.raw_length} raw ones a step",
        f"FLOPs      {step:.2e} a step, {step * settings.train_steps:.2e} in all",
    ]
    for name, count, kind in HARDWARE:
        rate = UTILISATION * count * PEAK_FLOPS[kind] / step
        hours = settings.train_steps / rate / 3600
        lines.append(f"{name:<16}{rate:8.4g} steps/s {hours:8.3g} h  (computed, not run)")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretraining.estimate", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--override", nargs="+", action="extend", default=[])
    args = parser.parse_args(arguments)
    print("\n".join(estimate(load(args.config, args.override))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
