"""Eight simulated devices give what one device gives; each byte is read once; bad meshes are named.

JAX fixes the number of devices when it starts, so the work is done in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import tolerances
import torch

from modeling_convt5 import ConvT5ForConditionalGeneration

SIZES = {"vocab_size": 64, "d_model": 16, "d_ff": 32}
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from modeling_convt5 import FlaxConvT5ForConditionalGeneration
from modeling_convt5.checkpoint_flax_convt5 import named_parameters

folder, *options = sys.argv[1:]
sizes = json.loads(options[0])
mesh = jax.make_mesh(
    tuple(sizes.values()), tuple(sizes),
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
)
rng = np.random.default_rng(0)
inputs = {
    "input_ids": rng.integers(2, 60, (8, 11)),
    "labels": rng.integers(2, 60, (8, 7)),
    "attention_mask": (np.arange(11) < rng.integers(3, 12, (8, 1))).astype(int),
}

def run(**loading):
    model = FlaxConvT5ForConditionalGeneration.from_pretrained(folder, **loading)
    graphdef, state = nnx.split(model)
    def loss(state):
        output = nnx.merge(graphdef, state)(**inputs)
        return output.loss, output.logits
    (loss, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    found = {"loss": loss, "logits": logits}
    found |= {key: p[...] for key, p in named_parameters(nnx.merge(graphdef, gradients))}
    return {key: np.asarray(value) for key, value in found.items()}, model

one, _ = run()
many, model = run(mesh=mesh, scan_layers=True, remat=True)
worst = max(np.abs(one[k] - many[k]).max() / max(np.abs(one[k]).max(), 1e-3) for k in one)
parameters = dict(named_parameters(model))
total = sum(p[...].nbytes for p in parameters.values())
held = sum(s.data.nbytes for p in parameters.values() for s in p[...].addressable_shards)
print(json.dumps({
    "worst": float(worst), "bytes": total, "read": model.bytes_read, "held": held / total,
    "devices": len(jax.devices()),
}))
"""


def _run(folder, sizes):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(sizes)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    return run, json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    overrides = {**SIZES, **parity.MODELS["hybrid"]}
    path = tmp_path_factory.mktemp("model")
    ConvT5ForConditionalGeneration(parity.parity_config(**overrides)).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 8},
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"tensor": 4, "data": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_are_one(folder, sizes):
    run, found = _run(folder, sizes)
    assert run.returncode == 0, run.stderr
    assert found["devices"] == 8
    assert found["worst"] <= tolerances.TWIN_OUTPUTS
    assert found["read"] == found["bytes"]
    copies = sizes.get("data", 1)
    assert copies <= found["held"] <= 8 if copies == 8 else found["held"] < 4.5


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"tensor": 8}, r"mlp.wi.weight has shape \(36, 16\): the mesh splits 36 in 8 over tensor"),
        ({"model": 8}, "The mesh has the axis model, expected some of data, fsdp and tensor"),
    ],
    ids=str,
)
def test_meshes_that_do_not_fit(sizes, text, tmp_path):
    torch.manual_seed(0)
    overrides = {"d_ff": 36, "vocab_size": 64}
    ConvT5ForConditionalGeneration(parity.parity_config(**overrides)).save_pretrained(tmp_path)
    run, _ = _run(tmp_path, sizes)
    assert run.returncode != 0 and re.search(text, run.stderr), run.stderr
