"""Fixtures that every test shares: one tiny configuration, and quiet, offline, two-core runs."""

import os
import shutil
import sys
import tempfile
from collections import Counter, defaultdict

# Before transformers is imported: no test may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# XLA compiles many small programs here, each run once: optimising them takes longer than they do.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Remote code is copied here, not into the user's own cache.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="convt5-tests-")

import pytest
import torch

from modeling_convt5 import ConvT5Config


def tiny_config(**overrides) -> ConvT5Config:
    """Two layers a stack, 16 channels: small enough to build in a millisecond."""
    fields = {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_heads": 4,
        "num_layers": 2,
        "dropout_rate": 0.0,
        "num_filters": 2,
        # Larger weights than T5's: the tests look for differences, not for small losses.
        "initializer_factor": 2.0,
    }
    return ConvT5Config(**{**fields, **overrides})


def interruptible(command: list) -> list[str]:
    """A command that Ctrl-C ends: a shell's background jobs, and what they start, ignore it."""
    script = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", script, *map(str, command)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
    """For each sweep a line with its number of combinations, which its tests report in parts."""
    sweeps = defaultdict(Counter)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            name = report.nodeid.split("[")[0]
            sweeps[name].update(dict(report.user_properties))
    for name, counts in sweeps.items():
        if "combinations" in counts:
            terminalreporter.write_line(
                f"{name}: " + ", ".join(f"{number} {what}" for what, number in counts.items())
            )
