"""Damaged checkpoints and wrong calls: what the user is told, and that nothing is lost."""

import json
import logging
import pickle
import shutil

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache, TextStreamer

from modeling_convt5 import (
    ConvT5Config,
    ConvT5ForConditionalGeneration,
    ConvT5ForQuestionAnswering,
    ConvT5ForSequenceClassification,
    ConvT5ForTokenClassification,
)
from modeling_convt5.cache_convt5 import CACHE

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


class _Trap:
    """An object whose pickle, once read, leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _pickle_only(name):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        torch.save({"lm_head.weight": _Trap(folder / "unpickled")}, folder / name)

    return damage


def _pickle_under_a_false_name(folder):
    torch.save({"lm_head.weight": _Trap(folder / "unpickled")}, folder / "model.safetensors")


def _cut_in_the_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:300])


def _header_longer_than_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes((10**9).to_bytes(8, "little") + path.read_bytes()[8:])


def _of_another_size(folder):
    ConvT5ForConditionalGeneration(tiny_config(d_model=8, d_ff=24)).save_pretrained(folder / "b")
    (folder / "b" / "model.safetensors").replace(folder / "model.safetensors")


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _a_folder_for_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def _empty(folder):
    for path in folder.iterdir():
        path.unlink()


def _broken_index(folder):
    _lose_a_shard(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def _index_of_a_file_that_is_not_there(folder):
    _lose_a_shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(
        json.dumps({**index, "weight_map": {"lm_head.weight": "weights-9.safetensors"}})
    )


def _wrong_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layers.0.mlp.wo.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _lose_a_shard(folder):
    model = LOAD(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    next(folder.glob("model-00002-*")).unlink()


CUT = "weights of .* cannot be read .*cut short"
DAMAGE = {
    "weights cut short": (_truncate, CUT),
    "weights cut in their header": (_cut_in_the_header, CUT),
    "a header longer than the file": (_header_longer_than_the_file, CUT),
    "weights that are none": (_garbage, CUT),
    "empty weights": (_write("model.safetensors", b""), CUT),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "a folder in place of weights": (_a_folder_for_weights, "no file named model.safetensors"),
    "an empty folder": (_empty, "no file named model.safetensors"),
    "a pickle": (_pickle_only("pytorch_model.bin"), "no file named model.safetensors"),
    "a pickle of another name": (_pickle_only("model.bin"), "no file named model.safetensors"),
    "a pickle under a false name": (_pickle_under_a_false_name, CUT),
    "a weight of another shape": (_wrong_shape, "ignore_mismatched_sizes"),  # after a table
    "weights of another size": (_of_another_size, "ignore_mismatched_sizes"),
    "a shard is missing": (_lose_a_shard, "model-00002"),
    "an index of a missing file": (_index_of_a_file_that_is_not_there, "weights-9.safetensors"),
    "a broken index": (_broken_index, CUT),
    "broken config.json": (_write("config.json", b"{"), "valid JSON"),
    "empty config.json": (_write("config.json", b""), "config.json' is not a valid JSON"),
    "config.json that is no text": (_write("config.json", b"\xff\xfe\x00"), "not a valid JSON"),
    "another model's configuration": (
        lambda f: _edit(f, model_type="t5"),
        "model_type='t5' is not allowed: expected 'convt5'",
    ),
    "an unknown mixer": (lambda f: _edit(f, encoder_mixers="fourier"), "encoder_mixers.*fourier"),
    "a list of a wrong length": (
        lambda f: _edit(f, decoder_kernel_size=[7, 7, 7]),
        r"decoder_kernel_size=\[7, 7, 7\]",
    ),
    "filters that divide nothing": (lambda f: _edit(f, num_filters=5), "num_filters.*5"),
    "a size in words": (lambda f: _edit(f, d_model="large"), "d_model.*large"),
    "an unknown problem type": (
        lambda f: _edit(f, problem_type="ranking"),
        "problem_type='ranking' .*'regression'",
    ),
    "no labels": (lambda f: _edit(f, num_labels=0, id2label={}), "num_labels=0"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_named(case, folder):
    damage, message = DAMAGE[case]
    damage(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises((OSError, ValueError, RuntimeError), match=message):
        LOAD(folder)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("case", ["weights cut short", "a broken index", "a pickle"])
def test_auto_classes_say_the_same(case, folder):
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(OSError, match=message):
        AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert not (folder / "unpickled").exists()


def test_weights_of_another_size_are_listed(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    _wrong_shape(folder)
    with pytest.raises(RuntimeError):
        LOAD(folder)
    row = next(row for row in caplog.text.splitlines() if "encoder.layers.0.mlp.wo.weight" in row)
    assert "[3, 3]" in row and "[16, 32]" in row


def test_a_pickle_can_be_asked_for(folder):
    # The trap is set: where pickles are read, torch refuses what is not a tensor.
    _pickle_only("pytorch_model.bin")(folder)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        LOAD(folder, use_safetensors=False)
    weights = ConvT5ForConditionalGeneration(tiny_config()).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    loaded = LOAD(folder, use_safetensors=False).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


WRONG_ARGUMENTS = {
    "a misspelt field": ({"encoder_mixer": "dynamic"}, TypeError, "encoder_mixer"),
    "an unknown attention": (
        {"attn_implementation": "flash"},
        ValueError,
        'implementation="flash"',
    ),
    "an unknown dtype": ({"dtype": "float33"}, ValueError, "dtype"),
    "a wrong field": ({"encoder_kernel_size": 0}, ValueError, "encoder_kernel_size=0"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments_of_loading_are_named(case, whole):
    arguments, error, message = WRONG_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        LOAD(whole, **arguments)


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


IDS, STATES = torch.ones(2, 4).long(), torch.ones(2, 4, 16)
ADDED = torch.tensor([[0.0, 0.0, 0.0, -1e9]] * 2)  # a mask for scores
TWO = {"input_ids": IDS, "decoder_input_ids": IDS}
FORWARD = {
    "a token beyond the vocabulary": ({"input_ids": IDS * 40}, "^input_ids holds 40, .* 0 to 39"),
    "a negative token": ({"input_ids": -IDS}, "^input_ids holds -1, expected 0 to 39"),
    "the mark of no label": ({"decoder_input_ids": IDS * -100}, "decoder_input_ids holds -100"),
    "ids of one dimension": ({"input_ids": IDS[0]}, r"input_ids has shape \(4,\)"),
    "ids that are no integers": ({"input_ids": IDS.float()}, "torch.float32, expected torch.int64"),
    "ids that are booleans": ({"input_ids": IDS.bool()}, "torch.bool, expected torch.int64"),
    "ids of a tokenizer's lists": ({"input_ids": [[1, 1]]}, "input_ids is a list.*return_tensors"),
    "embeddings of a wrong width": (
        {"input_ids": None, "inputs_embeds": torch.ones(2, 4, 5)},
        r"inputs_embeds has shape \(2, 4, 5\)",
    ),
    "embeddings that are integers": (
        {"input_ids": None, "inputs_embeds": STATES.long()},
        "inputs_embeds has .* torch.int64, expected floating point",
    ),
    "a mask of another batch": (
        {"attention_mask": torch.ones(3, 4)},
        r"attention_mask has shape \(3, 4\)",
    ),
    "a mask of one dimension": (
        {"attention_mask": torch.ones(4)},
        r"attention_mask has shape \(4,",
    ),
    "a mask of one column": ({"attention_mask": IDS[:, :1]}, r"attention_mask has shape \(2, 1\)"),
    "a mask of a tokenizer's lists": ({"attention_mask": [[1]]}, "attention_mask is a list"),
    "a mask for scores": (
        {"attention_mask": ADDED},
        r"negative numbers \(the lowest is -1000000000",
    ),
    "a decoder mask for scores": ({"decoder_attention_mask": ADDED}, "negative numbers"),
    "a decoder mask that is too long": (
        {"decoder_attention_mask": torch.ones(2, 6)},
        r"attention_mask has shape \(2, 6\)",
    ),
    "an encoder of length 0": ({"input_ids": IDS[:, :0]}, "length 0"),
    "a decoder of length 0": ({"decoder_input_ids": IDS[:, :0]}, "length 0"),
    "another batch in the decoder": (
        {"decoder_input_ids": torch.ones(3, 4).long()},
        "batch of 3.*2",
    ),
    "labels of another length than the decoder's inputs": (
        {"labels": IDS[:, :3]},
        r"labels has shape \(2, 3\) .* of shape \(2, 4\)",
    ),
    "labels on their side": ({"labels": IDS.T}, r"labels has shape \(4, 2\)"),
    "labels that are no integers": ({"labels": IDS.float()}, "labels has .* torch.float32"),
    "labels in a list": ({"labels": [[1]], "decoder_input_ids": None}, "labels is a list"),
    "a label beyond the vocabulary": ({"labels": IDS * 40}, "labels holds 40, expected 0 to 39"),
    "a negative label": ({"labels": IDS * -5}, "labels holds -5, expected 0 to 39"),
    "one kind of segments": ({"segment_ids": IDS}, "go together"),
    "decoder segments of another length": (
        {"segment_ids": IDS, "decoder_segment_ids": IDS[:, :2]},
        r"segment_ids has shape \(2, 2\)",
    ),
    "encoder states alone": ({"encoder_outputs": STATES}, "encoder_outputs is a Tensor"),
    "no encoder states": ({"encoder_outputs": ()}, "encoder_outputs begins with None"),
    "encoder states of another width": (
        {"encoder_outputs": (torch.ones(2, 4, 5),)},
        r"states have shape \(2, 4, 5\), .*d_model = 16",
    ),
    "encoder states of length 0": ({"encoder_outputs": (STATES[:, :0],)}, r"shape \(2, 0, 16\)"),
    "a mask that the encoder did not see": (
        {"encoder_outputs": (STATES,), "attention_mask": IDS[:, :1]},
        r"attention_mask has shape \(2, 1\), expected .*\(2, 4\) of the encoder's states",
    ),
    "segments that the encoder did not see": (
        {"encoder_outputs": (STATES,), "segment_ids": IDS[:, :3], "decoder_segment_ids": IDS},
        r"segment_ids has shape \(2, 3\), expected .*\(2, 4\) of the encoder's states",
    ),
    "a cache without states": ({CACHE: DynamicCache()}, f"{CACHE} is a DynamicCache"),
}


@pytest.mark.parametrize("case", FORWARD)
def test_wrong_calls_are_named(case):
    inputs, message = FORWARD[case]
    model = ConvT5ForConditionalGeneration(tiny_config()).eval()
    with pytest.raises(ValueError, match=message):
        model(**{**TWO, **inputs})


CACHES = {
    "another batch": (
        {},
        {"input_ids": torch.ones(3, 4).long(), "decoder_input_ids": torch.ones(3, 1).long()},
        "filled by 2 rows, the decoder's inputs are 3",
    ),
    "another text": (
        {},
        {"input_ids": torch.ones(2, 7).long()},
        "holds a text of 4 tokens, the encoder's states one of 7",
    ),
    "another kernel size": ({"decoder_kernel_size": 3}, {}, "filled by another model"),
    "another width": ({"d_model": 8}, {}, "filled by another model: .* width 16, expected 8"),
    "another number of heads": ({"num_heads": 2}, {}, r"filled by another model: .*\(4, 4\)"),
    "packed rows": ({}, {"segment_ids": IDS, "decoder_segment_ids": IDS}, "one example per row"),
    "a mask of another length": ({}, {"decoder_attention_mask": torch.ones(2, 7)}, r"\(2, 7\)"),
    "a token beyond the vocabulary": ({}, {"decoder_input_ids": IDS * 40}, "holds 40"),
}


@pytest.mark.parametrize("case", CACHES)
def test_a_cache_is_not_spoilt_by_a_wrong_call(case):
    fields, inputs, message = CACHES[case]
    mixers = {"decoder_mixers": ["lightweight", "attention"]}
    model = ConvT5ForConditionalGeneration(tiny_config(**mixers)).eval()
    other = ConvT5ForConditionalGeneration(tiny_config(**mixers, **fields)).eval()

    def continued(cache):
        return model(**{**TWO, "decoder_input_ids": IDS[:, :1], CACHE: cache}).logits

    expected = continued(model(**TWO, use_cache=True)[CACHE])
    cache = model(**TWO, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match=message):
        (other if fields else model)(**{**TWO, **inputs, CACHE: cache})
    assert torch.equal(continued(cache), expected)


HEADS = {
    "a class too many": (
        ConvT5ForSequenceClassification,
        {"labels": torch.tensor([0, 3])},
        "labels holds 3, expected 0 to 2, .*num_labels",
    ),
    "a label too few": (
        ConvT5ForSequenceClassification,
        {"labels": torch.tensor([0])},
        r"labels has shape \(1,\)",
    ),
    "labels of another length": (
        ConvT5ForTokenClassification,
        {"labels": IDS[:, :3]},
        r"labels has shape \(2, 3\)",
    ),
    "a class of tokens too many": (
        ConvT5ForTokenClassification,
        {"labels": IDS * 7},
        "labels holds 7, expected 0 to 2",
    ),
    "several answers": (
        ConvT5ForQuestionAnswering,
        {"start_positions": IDS, "end_positions": IDS},
        r"start_positions or end_positions has shape \(2, 4\)",
    ),
    "half an answer": (
        ConvT5ForQuestionAnswering,
        {"start_positions": IDS[:, 0]},
        "start_positions and end_positions go together",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_wrong_labels_of_heads_are_named(case):
    head, inputs, message = HEADS[case]
    labels = {} if head is ConvT5ForQuestionAnswering else {"num_labels": 3}
    with pytest.raises(ValueError, match=message):
        head(tiny_config(**labels)).eval()(input_ids=IDS, **inputs)


GENERATE = {
    "no room": ({"max_new_tokens": 0}, "max_new_tokens"),
    "an unknown cache": ({"cache_implementation": "no-such"}, "cache_implementation"),
    "no beam": ({"num_beams": 0}, "num_beams=0 is not allowed: expected at least 1"),
    "more returns than beams": ({"num_beams": 2, "num_return_sequences": 3}, "num_return_seq"),
    "a misspelt argument": ({"max_new_token": 3}, "max_new_token"),
    "an argument of other models": ({"token_type_ids": IDS}, "token_type_ids"),
    "assisted decoding of two texts": ({"prompt_lookup_num_tokens": 3}, "batch"),
    "a static cache that is to be taken back": (
        {"prompt_lookup_num_tokens": 3, "cache_implementation": "static", "inputs": IDS[:1]},
        "cache_implementation='static' cannot be combined with assisted",
    ),
    "guidance": ({"guidance_scale": 2.0}, "guidance_scale=2.0 is not supported"),
    "no temperature": ({"temperature": 0.0, "do_sample": True}, "temperature.*strictly positive"),
    "an unknown word to avoid": ({"bad_words_ids": [[99]]}, r"\[99\]"),
    "a search in a repository": ({"penalty_alpha": 0.6, "top_k": 4}, "trust_remote_code"),
    "a stream of beams": (
        {"num_beams": 2, "streamer": TextStreamer(None)},
        "streamer.*cannot be used with beam search",
    ),
    "no text": ({"inputs": IDS[:, :0]}, "length 0"),
    "a token beyond the vocabulary": ({"inputs": IDS * 99}, "input_ids holds 99"),
    "tokens that are no integers": ({"inputs": IDS.float()}, "torch.float32"),
    "a mask of another length": ({"attention_mask": IDS[:, :3]}, r"mask has shape \(2, 3\)"),
    "a start beyond the vocabulary": ({"decoder_start_token_id": 99}, "decoder_input_ids holds 99"),
    "a beginning of another batch": (
        {"decoder_input_ids": torch.ones(3, 1).long()},
        r"decoder_input_ids has shape \(3, 1\), expected .*\(2, at least 1\)",
    ),
    "an empty beginning": (
        {"decoder_input_ids": IDS[:, :0]},
        r"decoder_input_ids has shape \(2, 0",
    ),
}


@pytest.mark.parametrize("case", GENERATE)
def test_wrong_generation_arguments_are_named(case):
    arguments, message = GENERATE[case]
    model = ConvT5ForConditionalGeneration(tiny_config()).eval()
    with pytest.raises(ValueError, match=message):
        model.generate(**{"inputs": IDS, "max_new_tokens": 3, **arguments})


def test_generation_without_a_start_token_says_so():
    model = ConvT5ForConditionalGeneration(tiny_config(decoder_start_token_id=None)).eval()
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        model.generate(IDS, max_new_tokens=3)


def test_a_vocabulary_of_nothing_is_refused():
    model = ConvT5ForConditionalGeneration(tiny_config()).eval()
    weights = model.shared.weight.clone()
    with pytest.raises(ValueError, match="new_num_tokens=0 is not allowed"):
        model.resize_token_embeddings(0)
    assert torch.equal(model.shared.weight, weights)


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    model = ConvT5ForConditionalGeneration(ConvT5Config(**tiny_config().to_diff_dict()))
    with pytest.raises((OSError, AssertionError, ValueError)):
        model.config.save_pretrained(tmp_path / "taken")
    with pytest.raises(ValueError, match="taken' is a file, expected a folder"):
        model.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
