"""Held to TensorFlow's own reader, and to Mesh-TensorFlow's own graph, where they are installed.

With MESH_TF_CHECKPOINTS set to a folder of real checkpoints, those are read and run, too.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from conversion import verify
from conversion.convert_mesh_tf import convert
from conversion.tf_checkpoint import Checkpoint, find_checkpoint
from tests.mesh_tf_reference import MeshModel, both
from tests.test_conversion_models import MODELS, reference_outputs, write_checkpoint
from tests.tf_bundle import write_bundle
from tests.tolerances import MESH_TF

tf = pytest.importorskip("tensorflow", reason="TensorFlow (the extra `conversion`) is absent")
needs_mesh = pytest.mark.skipif(
    not verify.mesh_tensorflow_is_installed(), reason="Mesh-TensorFlow is absent"
)
# What TensorFlow and the libraries beside it say about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


def assert_equal_bits(own, reader, name):
    found, expected = own.read(name), reader.get_tensor(name)
    if own.variables[name].dtype == "bfloat16":
        assert expected.dtype.name == "bfloat16"
        expected = expected.astype(np.float32)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("shards", [1, 3])
def test_what_tensorflow_writes_is_read_bit_for_bit(shards, tmp_path):
    rng = np.random.default_rng(0)
    names, tensors = [], []
    for kind in KINDS:
        for i, shape in enumerate([(), (7,), (3, 5, 2), (0, 4), (300, 129)]):
            names.append(f"scope_{i}/{kind}")
            tensors.append(tf.cast(tf.constant(rng.standard_normal(shape) * 9), kind))
    parts = []
    for i in range(shards):
        parts.append(str(tmp_path / f"part-{i}"))
        own = slice(i, None, shards)
        count = len(names[own])
        tf.raw_ops.SaveV2(
            prefix=parts[-1],
            tensor_names=names[own],
            shape_and_slices=[""] * count,
            tensors=tensors[own],
        )
    prefix = str(tmp_path / "whole-12")
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=prefix)
    own, reader = Checkpoint(prefix), tf.train.load_checkpoint(prefix)
    assert sorted(own.variables) == sorted(reader.get_variable_to_shape_map()) == sorted(names)
    assert len(own.files) == 1 + shards and own.step == 12
    for name in names:
        assert_equal_bits(own, reader, name)


def test_what_the_tests_write_is_what_tensorflow_reads(tmp_path):
    rng = np.random.default_rng(0)
    values = {f"a/{i}/x": rng.standard_normal((i, 3)).astype(np.float32) for i in range(1, 40)}
    write_bundle(tmp_path / "x", values, shards=3)
    reader = tf.train.load_checkpoint(str(tmp_path / "x"))
    for name, value in values.items():
        assert reader.get_tensor(name).tobytes() == value.tobytes()


def _real_checkpoints():
    folder = os.environ.get("MESH_TF_CHECKPOINTS")
    found = sorted(path.parent for path in Path(folder).glob("*/*.index")) if folder else []
    reason = "MESH_TF_CHECKPOINTS names no folder of checkpoints"
    return [pytest.param(path, id=path.name) for path in found] or [
        pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))
    ]


@pytest.mark.parametrize("folder", _real_checkpoints())
def test_a_real_checkpoint_is_read_bit_for_bit(folder):
    prefix = find_checkpoint(folder)
    own, reader = Checkpoint(prefix), tf.train.load_checkpoint(str(prefix))
    assert sorted(own.variables) == sorted(reader.get_variable_to_shape_map())
    for name in own.variables:
        assert_equal_bits(own, reader, name)


@needs_mesh
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_equations_are_what_mesh_tensorflow_computes(name, tmp_path):
    """The NumPy model that the other tests trust, and the converted one, against the real graph."""
    model = MODELS[name]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    outputs = reference_outputs(model, model.random_variables())
    prefix = find_checkpoint(checkpoint)
    tokens = outputs["inputs"].astype(np.int32), outputs["targets"].astype(np.int32)
    original = verify.mesh_outputs(prefix, checkpoint / "operative_config.gin", *tokens, 8)
    is_input, is_target = (ids != 0 for ids in tokens)
    for key, where in (
        ("encoder_output", is_input),
        ("logits", is_target),
        ("incremental_logits", slice(None)),
    ):
        assert np.abs(original[key][where] - outputs[key][where]).max() < MESH_TF, key
    found = verify.until_end(original["greedy_ids"])
    assert (found == verify.until_end(outputs["greedy_ids"])).all()


@needs_mesh
def test_verify_runs_the_original_graph(tmp_path):
    model = MeshModel(kind=both("dynamic"), blocks=both(1))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    report = convert(checkpoint, tmp_path / "model", verified=True, progress=False)
    assert "| checkpoint | Mesh-TensorFlow | pytorch |" in report
