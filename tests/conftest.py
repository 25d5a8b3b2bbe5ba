"""Fixtures that every test shares: one tiny configuration, and quiet, offline, two-core runs."""

import os
import tempfile

# Before transformers is imported: no test may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

_modules = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
os.environ["HF_MODULES_CACHE"] = _modules.name  # remote code goes here, not into the user's cache

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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
