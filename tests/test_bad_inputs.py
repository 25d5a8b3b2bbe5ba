"""Damaged checkpoints and wrong calls: what the user is told, and that nothing is lost."""

import json
import shutil

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from modeling_convt5 import ConvT5Config, ConvT5ForConditionalGeneration

LOAD = ConvT5ForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    ConvT5ForConditionalGeneration(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def _edit(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields}))


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def _garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 4000)


def _pickle_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"malicious": print}, folder / "model.bin")


def _wrong_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layers.0.mlp.wo.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _lose_a_shard(folder):
    model = LOAD(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    next(folder.glob("model-00002-*")).unlink()


DAMAGE = {
    "weights cut short": (_truncate, "rror"),
    "weights that are none": (_garbage, "rror"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "a pickle in their place": (_pickle_only, "model.safetensors"),
    "a weight of another shape": (_wrong_shape, "ignore_mismatched_sizes"),  # after a table
    "a shard is missing": (_lose_a_shard, "model-00002"),
    "broken config.json": (lambda f: (f / "config.json").write_text("{"), "valid JSON"),
    "an unknown mixer": (lambda f: _edit(f, encoder_mixers="fourier"), "encoder_mixers.*fourier"),
    "a list of a wrong length": (
        lambda f: _edit(f, decoder_kernel_size=[7, 7, 7]),
        r"decoder_kernel_size=\[7, 7, 7\]",
    ),
    "filters that divide nothing": (lambda f: _edit(f, num_filters=5), "num_filters.*5"),
    "a size in words": (lambda f: _edit(f, d_model="large"), "d_model.*large"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_named(case, folder):
    damage, message = DAMAGE[case]
    damage(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(Exception, match=message) as caught:
        LOAD(folder)
    assert not isinstance(caught.value, KeyError | AttributeError | AssertionError), caught.value
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_renamed_weights_are_reported(folder, caplog):
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layers.0.mixer.flter"] = weights.pop("encoder.layers.0.mixer.filter")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _, info = LOAD(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"encoder.layers.0.mixer.filter"}
    assert set(info["unexpected_keys"]) == {"encoder.layers.0.mixer.flter"}


@pytest.mark.parametrize("name", ["convolution.py", "modeling_convt5.py", "layers_convt5.py"])
def test_missing_code_is_named(name, folder, monkeypatch):
    (folder / name).unlink()
    monkeypatch.setattr(AutoModelForSeq2SeqLM, "_model_mapping", {})  # as if not installed
    with pytest.raises(OSError, match=name.removesuffix(".py")):
        AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)


def test_a_missing_configuration_is_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises((OSError, ValueError), match="config.json"):
        AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)


def test_another_model_type_is_not_taken_for_this_one(folder):
    _edit(folder, model_type="no-such-model", auto_map={})
    with pytest.raises(ValueError, match="no-such-model"):
        AutoConfig.from_pretrained(folder)


IDS = torch.ones(2, 4).long()
FORWARD = {
    "a token beyond the vocabulary": (
        {"input_ids": IDS * 40, "decoder_input_ids": IDS}, IndexError, "index out of range"
    ),
    "ids of one dimension": (
        {"input_ids": IDS[0], "decoder_input_ids": IDS}, ValueError, r"input_ids has shape \(4,\)"
    ),
    "ids that are no integers": (
        {"input_ids": IDS.float(), "decoder_input_ids": IDS}, ValueError, "torch.float32"
    ),
    "embeddings of a wrong width": (
        {"inputs_embeds": torch.ones(2, 4, 5), "decoder_input_ids": IDS},
        ValueError, r"inputs_embeds has shape \(2, 4, 5\)"
    ),
    "a mask of another batch": (
        {"input_ids": IDS, "attention_mask": torch.ones(3, 4), "decoder_input_ids": IDS},
        ValueError, r"attention_mask has shape \(3, 4\)"
    ),
    "a decoder mask that is too long": (
        {"input_ids": IDS, "decoder_input_ids": IDS, "decoder_attention_mask": torch.ones(2, 6)},
        ValueError, r"attention_mask has shape \(2, 6\)"
    ),
    "a decoder of length 0": (
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :0]}, ValueError, "length 0"
    ),
    "another batch in the decoder": (
        {"input_ids": IDS, "decoder_input_ids": torch.ones(3, 4).long()},
        ValueError, "batch of 3.*2"
    ),
    "labels of another length than the decoder's inputs": (
        {"input_ids": IDS, "decoder_input_ids": IDS, "labels": IDS[:, :3]},
        ValueError, r"labels has shape \(2, 3\), expected \(2, 4\)"
    ),
    "a label beyond the vocabulary": (
        {"input_ids": IDS, "labels": IDS * 40}, IndexError, "out of"
    ),
    "decoder segments of another length": (
        {"input_ids": IDS, "segment_ids": IDS, "decoder_input_ids": IDS,
         "decoder_segment_ids": IDS[:, :2]},
        ValueError, r"segment_ids has shape \(2, 2\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FORWARD)
def test_wrong_calls_are_named(case):
    inputs, error, message = FORWARD[case]
    model = ConvT5ForConditionalGeneration(tiny_config()).eval()
    with pytest.raises(error, match=message):
        model(**inputs)


GENERATE = {
    "no room": ({"max_new_tokens": 0}, "max_new_tokens"),
    "an unknown cache": ({"cache_implementation": "no-such"}, "cache_implementation"),
    "more returns than beams": ({"num_beams": 2, "num_return_sequences": 3}, "num_return_seq"),
    "a misspelt argument": ({"max_new_token": 3}, "max_new_token"),
    "assisted decoding of two texts": ({"prompt_lookup_num_tokens": 3}, "batch"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_wrong_generation_arguments_are_named(case):
    arguments, message = GENERATE[case]
    model = ConvT5ForConditionalGeneration(tiny_config()).eval()
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, **{"max_new_tokens": 3, **arguments})


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    model = ConvT5ForConditionalGeneration(ConvT5Config(**tiny_config().to_diff_dict()))
    with pytest.raises((OSError, AssertionError, ValueError)):
        model.config.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
