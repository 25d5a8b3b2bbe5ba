"""Converted Mesh-TensorFlow models: equal to the original's equations, and whole in every name.

The original here is the plain NumPy model of mesh_tf_reference.py. With MESH_TF_CHECKPOINTS set to
a folder of real checkpoints (each with the reference.npz of a real run) those are compared, too.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM

import modeling_convt5
from conversion import verify
from conversion.convert_mesh_tf import convert, read
from modeling_convt5 import ConvT5ForConditionalGeneration
from tests.mesh_tf_reference import DECODER, ENCODER, MeshModel, both
from tests.tf_bundle import write_bundle
from tests.tolerances import FLOAT32_LOGITS, MESH_TF

# Between them: everything that the released code can be told, and ConvT5 has a field for.
MODELS = {
    "lightweight": MeshModel(),
    "dynamic": MeshModel(kind=both("dynamic")),
    "both kinds": MeshModel(kind={"encoder": "lightweight", "decoder": "dynamic"}),
    "strided": MeshModel(kind=both("dynamic"), repeats=both(2)),
    "strided in one stack": MeshModel(repeats={"encoder": 4, "decoder": 1}),
    "strided by coprime numbers": MeshModel(
        d_model=12, kind=both("dynamic"), repeats={"encoder": 2, "decoder": 3}
    ),
    "lopsided": MeshModel(window={"encoder": (-2, 5), "decoder": (-5, 0)}),
    "even kernel": MeshModel(window={"encoder": (-1, 2), "decoder": (-3, 0)}),
    "single tap": MeshModel(window=both((0, 0))),
    "only behind": MeshModel(window={"encoder": (-4, -1), "decoder": (-4, 0)}),
    "only ahead": MeshModel(window={"encoder": (0, 3), "decoder": (-3, 0)}),
    "activation": MeshModel(conv_activation="relu"),
    "gelu activation": MeshModel(conv_activation="gelu", kind=both("dynamic")),
    "sizes": MeshModel(
        blocks={"encoder": 1, "decoder": 3}, d_ff=10, num_heads=3, d_kv=7, d_model=8
    ),
    "one head": MeshModel(num_heads=1, d_kv=5),
    "gated": MeshModel(ffn=["gelu", "linear"]),
    "gated with biases": MeshModel(ffn=["swish", "linear"], ffn_bias=True),
    "gelu with biases": MeshModel(ffn="gelu", ffn_bias=True),
    "no positions": MeshModel(positions=both(None)),
    "sinusoids": MeshModel(positions=both("sinusoidal")),
    "two position tables": MeshModel(max_length={"encoder": 32, "decoder": 20}),
    "positions in the decoder only": MeshModel(positions={"encoder": None, "decoder": "learned"}),
    "two tables": MeshModel(shared_embedding=False),
    "two tables, untied": MeshModel(shared_embedding=False, tied=False),
    "untied": MeshModel(tied=False),
    "classifier weights": MeshModel(classifier_weights=True),
    "classifier weights, untied": MeshModel(classifier_weights=True, tied=False),
    "no block scope": MeshModel(block_scope=False),
    "legacy names": MeshModel(legacy=True),
    "epsilon": MeshModel(epsilon=1e-2),
    "T5": MeshModel(
        block={
            "encoder": ["attention", "mlp"],
            "decoder": ["attention", "cross", "mlp"],
        },
        positions=both(None),
        legacy=True,
    ),
    "attention without relative positions": MeshModel(
        block={"encoder": ["attention", "mlp"], "decoder": DECODER}, relative=False
    ),
    "mixed stacks": MeshModel(
        block={
            "encoder": [*ENCODER, "attention", "mlp"],
            "decoder": ["conv", "mlp", "attention", "cross", "mlp"],
        },
        blocks={"encoder": 2, "decoder": 1},
        kind=both("dynamic"),
        block_scope=False,
    ),
}


def write_checkpoint(folder, model=None, variables=None, **options):
    """A checkpoint as Mesh-TensorFlow leaves it; `options` are those of `write_bundle`."""
    model = model or MeshModel()
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(model.random_variables() if variables is None else variables)
    values["global_step"] = np.int64(1000)
    for name in list(values)[:3]:
        values[f"{name}_slot_v"] = np.zeros_like(values[name])
    write_bundle(folder / "model.ckpt-1000", values, **options)
    (folder / "checkpoint").write_text(
        'model_checkpoint_path: "model.ckpt-1000"\nall_model_checkpoint_paths: "model.ckpt-1000"\n'
    )
    (folder / "operative_config.gin").write_text(model.gin())
    return folder


def reference_outputs(model, variables, length=8):
    """What a reference file holds, computed in NumPy: rows of several lengths, padded."""
    rng = np.random.default_rng(1)
    inputs = rng.integers(2, model.vocab, (3, 11))
    targets = rng.integers(2, model.vocab, (3, 9))
    for row, (i, t) in enumerate([(11, 9), (7, 4), (2, 1)]):
        inputs[row, i - 1], inputs[row, i:] = 1, 0
        targets[row, t - 1], targets[row, t:] = 1, 0
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    forced = np.where(targets != 0, shifted, 0)
    encoded, logits = model.forward(variables, inputs, forced, mask_start=True)
    _, incremental = model.forward(variables, inputs, shifted, mask_start=False)
    return {
        "inputs": inputs,
        "targets": targets,
        "decoder_input_ids": forced,
        "encoder_output": encoded,
        "logits": logits,
        "incremental_logits": incremental,
        "greedy_ids": model.greedy(variables, inputs, length),
    }


# In Flax every model is compiled anew, so most of them are left to the slow tests.
IN_FLAX = {"both kinds", "strided in one stack", "two position tables", "mixed stacks"}


@pytest.mark.parametrize(
    "framework, name",
    [("pytorch", name) for name in MODELS]
    + [("flax", name) for name in sorted(IN_FLAX)]
    + [
        pytest.param("flax", name, marks=pytest.mark.slow) for name in MODELS if name not in IN_FLAX
    ],
)
def test_a_converted_model_computes_what_the_original_does(framework, name, tmp_path):
    if framework == "flax":
        pytest.importorskip("flax", reason="Flax is not installed")
    model = MODELS[name]
    variables = model.random_variables()
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    convert(checkpoint, tmp_path / "model", progress=False)
    outputs = reference_outputs(model, variables)
    parity = verify.compare(tmp_path / "model", outputs, "NumPy", framework, MESH_TF)
    assert parity.passed, verify.markdown([parity])
    assert parity.wrong_tokens == 0 and max(parity.divergences) < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_every_name_stands_in_the_table_once_and_nothing_is_lost_on_the_way_back(name, tmp_path):
    source = read(write_checkpoint(tmp_path, MODELS[name]))
    model = ConvT5ForConditionalGeneration(source.config)
    tied = model._tied_weights_keys
    expected = {key: tuple(w.shape) for key, w in model.state_dict().items() if key not in tied}
    assert {entry.key: entry.shape for entry in source.entries} == expected
    assert len(source.entries) == len(expected)
    names = [name for entry in source.entries for name in entry.variables]
    assert sorted(names) == sorted(MODELS[name].shapes())
    for entry in source.entries:
        arrays = [source.checkpoint.read(name) for name in entry.variables]
        weight = entry.to_weight(arrays)
        back = entry.to_variables(weight)
        assert [a.tobytes() for a in arrays] == [np.ascontiguousarray(b).tobytes() for b in back]
        assert entry.to_weight(back).tobytes() == weight.tobytes()
    assert source.dropped == {"optimizer slots": 3, "global_step": 1}


def test_masters_in_bfloat16_are_read_exactly(tmp_path):
    model = MeshModel(kind=both("dynamic"))
    variables = model.random_variables()
    narrow = tuple(
        n for n in variables if "pointwise" not in n and "depthwise_dense_0/bias" not in n
    )
    for name in narrow:
        variables[name] = (variables[name].view(np.uint32) & 0xFFFF0000).view(np.float32)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, variables, bfloat16=narrow)
    report = convert(checkpoint, tmp_path / "model", progress=False)
    assert f"{len(narrow)} in bfloat16, {len(variables) - len(narrow)} in float32" in report
    outputs = reference_outputs(model, variables)
    parity = verify.compare(tmp_path / "model", outputs, "NumPy", tolerance=MESH_TF)
    assert parity.passed, verify.markdown([parity])
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_written_rounded_to_the_nearest(dtype, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "exact", progress=False)
    convert(checkpoint, tmp_path / "half", dtype=dtype, progress=False)
    kind = getattr(torch, dtype)
    with (
        safe_open(tmp_path / "exact" / "model.safetensors", "pt") as exact,
        safe_open(tmp_path / "half" / "model.safetensors", "pt") as half,
    ):
        assert exact.keys() == half.keys() and exact.metadata() == {"format": "pt"}
        for key in exact.keys():
            assert torch.equal(exact.get_tensor(key).to(kind), half.get_tensor(key))
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "half").dtype == kind
    outputs = reference_outputs(MeshModel(), MeshModel().random_variables())
    parity = verify.compare(tmp_path / "half", outputs, "NumPy")
    assert (
        parity.passed
        and not verify.compare(tmp_path / "half", outputs, "NumPy", tolerance=MESH_TF).passed
    )


def test_the_start_mask_is_off_unless_asked_for(tmp_path):
    """Generation then equals the original's decoding; its scores in training need the mask."""
    model = MeshModel()
    convert(write_checkpoint(tmp_path / "checkpoint", model), tmp_path / "model", progress=False)
    outputs = reference_outputs(model, model.random_variables())
    tokens = outputs["targets"] != 0
    given = {
        "input_ids": torch.as_tensor(outputs["inputs"]),
        "attention_mask": torch.as_tensor(outputs["inputs"] != 0),
        "decoder_input_ids": torch.as_tensor(outputs["decoder_input_ids"]),
    }
    plain = ConvT5ForConditionalGeneration.from_pretrained(tmp_path / "model")
    masked = ConvT5ForConditionalGeneration.from_pretrained(
        tmp_path / "model", mask_decoder_start=True
    )
    assert not plain.config.mask_decoder_start
    with torch.no_grad():
        found = [m(**given).logits.numpy()[tokens] for m in (plain, masked)]
    assert np.abs(found[1] - outputs["logits"][tokens]).max() < FLOAT32_LOGITS
    assert np.abs(found[0] - outputs["logits"][tokens]).max() > 0.01


def test_a_folder_of_shards_loads_as_one_file_does(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", MODELS["untied"])
    convert(checkpoint, tmp_path / "one", progress=False)
    monkeypatch.setattr("conversion.model_folder.MAX_SHARD_BYTES", 10_000)
    convert(checkpoint, tmp_path / "many", progress=False)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    one, many = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("one", "many")
    )
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)


def test_the_folder_is_complete_and_needs_no_installed_package(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "model", progress=False)
    code = """
import sys
sys.modules["modeling_convt5"] = None  # as where it is not installed
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.num_parameters())
"""
    alone = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    assert alone.stdout.split()[-1:] == [str(model.num_parameters())], alone.stderr
    assert model.config.architectures == ["ConvT5ForConditionalGeneration"]
    assert model.num_parameters() == model.config.num_parameters()
    assert model.generation_config.decoder_start_token_id == 0
    assert model.generation_config.eos_token_id == 1
    files = {path.name for path in (tmp_path / "model").iterdir()}
    sources = Path(modeling_convt5.__file__).parent.glob("*.py")
    expected = {path.name for path in sources} - {"__init__.py", "__main__.py"}
    expected |= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert files == expected


# --- real checkpoints -----------------------------------------------------------------------------


def _real_checkpoints():
    folder = os.environ.get("MESH_TF_CHECKPOINTS")
    found = sorted(path.parent for path in Path(folder).glob("*/reference.npz")) if folder else []
    reason = "MESH_TF_CHECKPOINTS names no folder of checkpoints with reference.npz"
    return [pytest.param(path, id=path.name) for path in found] or [
        pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))
    ]


@pytest.mark.parametrize("framework", ["pytorch", "flax"])
@pytest.mark.parametrize("checkpoint", _real_checkpoints())
def test_a_real_checkpoint_computes_what_the_real_run_did(checkpoint, framework, tmp_path):
    if framework == "flax":
        pytest.importorskip("flax", reason="Flax is not installed")
    convert(checkpoint, tmp_path / "model", progress=False)
    with np.load(checkpoint / "reference.npz") as file:
        parity = verify.compare(tmp_path / "model", dict(file), "reference.npz", framework)
    assert parity.tolerance == MESH_TF
    assert parity.passed and parity.wrong_tokens == 0, verify.markdown([parity])
