"""One folder for both frameworks: round trips to the byte, sharded or not; damage is named."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tolerances
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_hub import CODE, SOURCE

import modeling_convt5
from modeling_convt5 import (
    ConvT5ForConditionalGeneration,
    ConvT5ForSequenceClassification,
    FlaxConvT5EncoderModel,
    FlaxConvT5ForConditionalGeneration,
    FlaxConvT5ForSequenceClassification,
    FlaxConvT5Model,
)
from modeling_convt5.checkpoint_flax_convt5 import CODE as SAVED_CODE
from modeling_convt5.checkpoint_flax_convt5 import named_parameters

# An environment with Flax and without PyTorch; the Makefile makes it.
FLAX_ONLY = Path(__file__).parents[1] / ".venv-flax/bin/python"


def _saved(folder, head="ForConditionalGeneration", **overrides):
    """A PyTorch model in `folder`."""
    torch.manual_seed(0)
    model = getattr(modeling_convt5, f"ConvT5{head}")(parity.parity_config(**overrides))
    model.save_pretrained(folder)
    return model


def _payload(path):
    """The bytes of a safetensors file behind its header, and the header without metadata."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    return content[8 + size :], header


@pytest.mark.parametrize("shards", ["50GB", "8KB"])
@pytest.mark.parametrize("name", ["hybrid", "unshared", "released"])
@pytest.mark.parametrize("head", ["ForConditionalGeneration", "EncoderModel"])
def test_round_trips_are_exact_to_the_byte(head, name, shards, tmp_path):
    """PyTorch -> Flax -> PyTorch -> Flax: the same files with the same bytes."""
    overrides = {**parity.MODELS, **parity.SWITCHES}[name]
    model = _saved(tmp_path / "0", head, **overrides)
    for step in (1, 2, 3):
        prefix = "" if step == 2 else "Flax"
        loaded = getattr(modeling_convt5, f"{prefix}ConvT5{head}")
        loaded = loaded.from_pretrained(tmp_path / f"{step - 1}")
        loaded.save_pretrained(tmp_path / f"{step}", max_shard_size=shards)
    files = [{path.name: path for path in (tmp_path / n).glob("model*.safetensors")} for n in "123"]
    assert set(files[0]) == set(files[1]) == set(files[2])
    assert (len(files[0]) > 1) == (shards == "8KB")
    for file in files[0]:
        assert _payload(files[0][file]) == _payload(files[1][file]) == _payload(files[2][file])
    state = model.state_dict()
    for key, parameter in named_parameters(loaded):
        assert (state[key].numpy() == parameter[...]).all(), key
    assert loaded.num_parameters() == model.num_parameters()


def test_a_saved_folder_is_complete(tmp_path):
    """What PyTorch writes, Flax writes: config, code, generation settings, nothing else."""
    _saved(tmp_path / "torch")
    FlaxConvT5ForConditionalGeneration.from_pretrained(tmp_path / "torch").save_pretrained(
        tmp_path / "flax"
    )
    names = [{path.name for path in (tmp_path / n).iterdir()} for n in ("torch", "flax")]
    assert names[0] == names[1] and set(SAVED_CODE) == CODE
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("torch", "flax")]
    assert configs[0] == configs[1]
    settings = [
        json.loads((tmp_path / n / "generation_config.json").read_text()) for n in ("torch", "flax")
    ]
    assert settings[0] == settings[1]


def test_saving_again_leaves_no_stale_shard(tmp_path):
    _saved(tmp_path)
    twin = FlaxConvT5ForConditionalGeneration.from_pretrained(tmp_path)
    twin.save_pretrained(tmp_path, max_shard_size="8KB")
    assert not (tmp_path / "model.safetensors").exists()
    twin.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_are_kept_and_changed_on_demand(dtype, tmp_path):
    model = _saved(tmp_path / "32").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "16")
    twin = FlaxConvT5ForConditionalGeneration.from_pretrained(tmp_path / "16")
    assert twin.param_dtype == twin.dtype == jnp.dtype(dtype)
    twin.save_pretrained(tmp_path / "again")
    assert _payload(tmp_path / "16/model.safetensors") == _payload(
        tmp_path / "again/model.safetensors"
    )
    wide = FlaxConvT5ForConditionalGeneration.from_pretrained(
        tmp_path / "16", param_dtype=jnp.float32, dtype=dtype
    )
    assert wide.param_dtype == jnp.float32 and wide.dtype == jnp.dtype(dtype)


def test_tied_weights_are_found_under_any_of_their_names(tmp_path):
    _saved(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    table = weights.pop("shared.weight")
    expected = FlaxConvT5ForConditionalGeneration.from_pretrained(tmp_path).shared.weight[...]
    save_file({**weights, "lm_head.weight": table}, path)
    twin = FlaxConvT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert (twin.shared.weight[...] == expected).all()
    save_file({**weights, "shared.weight": table, "encoder.embed_tokens.weight": table}, path)
    FlaxConvT5ForConditionalGeneration.from_pretrained(tmp_path)


def test_a_checkpoint_opens_with_another_head(tmp_path, caplog):
    model = _saved(tmp_path / "lm", tie_word_embeddings=False)
    twin = FlaxConvT5ForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=5)
    assert twin.classification_head.out_proj.weight.shape == (5, 16)
    assert "classification_head.dense.weight" in caplog.text and "lm_head" not in caplog.text
    assert (twin.shared.weight[...] == model.shared.weight.detach().numpy()).all()
    twin.save_pretrained(tmp_path / "labels")
    again = ConvT5ForSequenceClassification.from_pretrained(tmp_path / "labels")
    assert again.config.num_labels == 5
    FlaxConvT5EncoderModel.from_pretrained(tmp_path / "labels")
    FlaxConvT5Model.from_pretrained(tmp_path / "labels")
    narrower = FlaxConvT5ForSequenceClassification.from_pretrained(
        tmp_path / "labels", num_labels=2, ignore_mismatched_sizes=True
    )
    assert narrower.classification_head.out_proj.weight.shape == (2, 16)
    head = narrower.classification_head.dense.weight[...]
    assert (head == twin.classification_head.dense.weight[...]).all()


# --- Damage --------------------------------------------------------------------------------------


def _change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _rewrite(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def _cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def _index(folder, key, name):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][key] = name
    path.write_text(json.dumps(index))


DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), OSError, "holds no config.json"),
    "config is not JSON": (
        lambda d: (d / "config.json").write_text("{"),
        OSError,
        "config.json is damaged",
    ),
    "another model": (
        lambda d: _change(d / "config.json", model_type="t5"),
        ValueError,
        "of model_type 't5', expected 'convt5'",
    ),
    "a wrong field": (
        lambda d: _change(d / "config.json", num_filters=3),
        ValueError,
        "num_filters=3",
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        OSError,
        "holds neither model.safetensors nor",
    ),
    "a pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        OSError,
        "pytorch_model.bin is a pickle, which ConvT5 never opens",
    ),
    "cut short": (
        lambda d: _cut(d / "model.safetensors", 4000),
        OSError,
        "model.safetensors cannot be read as safetensors",
    ),
    "empty": (lambda d: _cut(d / "model.safetensors", 0), OSError, "cut short"),
    "garbage": (
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 5000),
        OSError,
        "damaged, cut short or another",
    ),
    "a missing weight": (
        lambda d: _rewrite(d, lambda w: w.pop("encoder.layers.0.mlp.wi.weight")),
        ValueError,
        r"missing: encoder.layers.0.mlp.wi.weight \(32, 16\)",
    ),
    "an unexpected weight": (
        lambda d: _rewrite(d, lambda w: w.update(extra=np.zeros(3, np.float32))),
        ValueError,
        r"unexpected: extra \(3,\)",
    ),
    "a wrong shape": (
        lambda d: _rewrite(
            d, lambda w: w.update({"encoder.final_norm.weight": np.zeros(7, np.float32)})
        ),
        ValueError,
        r"wrong shape: encoder.final_norm.weight is \(7,\), the model's is \(16,\)",
    ),
    "integers": (
        lambda d: _rewrite(
            d, lambda w: w.update({"encoder.final_norm.weight": np.zeros(16, np.int64)})
        ),
        ValueError,
        "wrong dtype: encoder.final_norm.weight is I64",
    ),
    "settings are not JSON": (
        lambda d: (d / "generation_config.json").write_text("[1"),
        OSError,
        "generation_config.json is damaged",
    ),
}
DAMAGED_SHARDS = {
    "a missing shard": (
        lambda d: next(d.glob("model-00001*")).unlink(),
        OSError,
        "names the shard 'model-00001",
    ),
    "a shard outside": (
        lambda d: _index(d, "shared.weight", "../model.safetensors"),
        OSError,
        r"names the shard '../model.safetensors'",
    ),
    "an index that errs": (
        lambda d: _index(d, "no.such", next(d.glob("model-00002*")).name),
        OSError,
        "says that no.such is in model-00002",
    ),
    "an index that is none": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        OSError,
        "index.json is damaged",
    ),
}


@pytest.mark.parametrize("name", [*DAMAGE, *DAMAGED_SHARDS])
def test_damage_is_named(name, tmp_path):
    model = _saved(tmp_path / "whole")
    if name in DAMAGED_SHARDS:
        shutil.rmtree(tmp_path / "whole")
        model.save_pretrained(tmp_path / "whole", max_shard_size="8KB")
    damage, error, text = {**DAMAGE, **DAMAGED_SHARDS}[name]
    damage(tmp_path / "whole")
    with pytest.raises(error, match=text):
        FlaxConvT5ForConditionalGeneration.from_pretrained(tmp_path / "whole")


def test_every_fault_is_in_one_error(tmp_path):
    _saved(tmp_path)

    def change(weights):
        del weights["encoder.layers.1.mlp.wo.weight"], weights["decoder.final_norm.weight"]
        weights["more"] = np.zeros(2, np.float32)

    _rewrite(tmp_path, change)
    with pytest.raises(ValueError) as error:
        FlaxConvT5ForConditionalGeneration.from_pretrained(tmp_path)
    for text in ("encoder.layers.1.mlp.wo.weight", "decoder.final_norm.weight", "more"):
        assert text in str(error.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_no_folder(name):
    with pytest.raises(OSError, match="is not a folder"):
        FlaxConvT5ForConditionalGeneration.from_pretrained(name)


def test_misspelt_arguments(tmp_path):
    _saved(tmp_path)
    with pytest.raises(TypeError, match="got nam_labels"):
        FlaxConvT5ForConditionalGeneration.from_pretrained(tmp_path, nam_labels=2)


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    model = FlaxConvT5ForConditionalGeneration(parity.parity_config(), rngs=nnx.Rngs(0))
    with pytest.raises(FileExistsError, match="is a file"):
        model.save_pretrained(path)
    assert path.read_text() == "mine"


# --- Either framework without the other ----------------------------------------------------------


def test_neither_framework_imports_the_other():
    for path in SOURCE.glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
        assert not ({"torch"} <= imported and imported & {"jax", "flax"}), path.name


def test_the_flax_modeling_file_imports_its_siblings_itself():
    """transformers 4 fetches no others."""
    text = (SOURCE / "modeling_flax_convt5.py").read_text()
    named = set(re.findall(r"^from \.(\w+) import", text, re.MULTILINE))
    for path in [SOURCE / f"{name}.py" for name in named]:
        found = re.findall(r"^from \.(\w+) import", path.read_text(), re.MULTILINE)
        assert set(found) <= named, path.name


WITHOUT_TORCH = """
import importlib.util, sys
import numpy as np
assert importlib.util.find_spec("torch") is None, "this environment has PyTorch"
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder, output = sys.argv[1:]
name = "modeling_flax_convt5.FlaxConvT5ForConditionalGeneration"
model = get_class_from_dynamic_module(name, folder).from_pretrained(folder)
ids = np.arange(2, 14).reshape(2, 6)
np.savez(output, logits=model(ids, decoder_input_ids=ids).logits, ids=model.generate(ids))
model.save_pretrained(output + ".saved")
"""


@pytest.mark.skipif(not FLAX_ONLY.exists(), reason="`make test` makes the environment .venv-flax")
def test_remote_code_without_pytorch(tmp_path):
    """Two lines load the class from a folder; what it saves opens in PyTorch."""
    model = _saved(tmp_path / "folder", **parity.MODELS["hybrid"]).eval()
    output = tmp_path / "output.npz"
    command = [FLAX_ONLY, "-I", "-c", WITHOUT_TORCH, tmp_path / "folder", output]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": ""}
    run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ids = torch.arange(2, 14).reshape(2, 6)
    results = np.load(output)
    logits = model(input_ids=ids, decoder_input_ids=ids).logits.detach().numpy()
    assert np.abs(logits - results["logits"]).max() <= tolerances.TWIN_OUTPUTS
    generated = model.generate(ids, do_sample=False, max_new_tokens=20)
    np.testing.assert_array_equal(generated, results["ids"])
    saved = Path(f"{output}.saved")
    assert CODE <= {path.name for path in saved.iterdir()}
    again = ConvT5ForConditionalGeneration.from_pretrained(saved)
    assert all((a == b).all() for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_flax_is_imported_only_on_demand():
    script = (
        "import sys, modeling_convt5; assert 'jax' not in sys.modules; "
        "modeling_convt5.FlaxConvT5Model; assert 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
