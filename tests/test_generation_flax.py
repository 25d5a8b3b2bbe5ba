"""`generate` in Flax: PyTorch's tokens and scores, rule by rule, in one compiled program."""

import numpy as np
import parity
import pytest
import tolerances
import torch

from modeling_convt5 import generation_flax_convt5

STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returns": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0},
    "early": {"num_beams": 4, "early_stopping": True, "length_penalty": 0.5},
    "never": {"num_beams": 2, "early_stopping": "never", "length_penalty": -1.0},
    "longer": {"num_beams": 2, "early_stopping": "never", "min_new_tokens": 4},
    "two ends": {"num_beams": 2, "eos_token_id": [1, 7]},
}


@pytest.fixture(scope="module")
def pairs():
    """Larger weights than T5's, so that results differ in length and end early."""
    made = {}

    def get(name):
        if name not in made:
            overrides = {**parity.MODELS, **parity.SWITCHES, "alone": {"cross_attention": False}}
            made[name] = parity.pair(
                "ForConditionalGeneration", {**overrides[name], "initializer_factor": 1.5}
            )
        return made[name]

    return get


def _texts(seed, side="right"):
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 60, (4, 13))
    mask = np.ones_like(ids)
    for row, padding in enumerate(rng.integers(0, 12, 4)):
        mask[row, slice(13 - padding, 13) if side == "right" else slice(0, padding)] = 0
    return np.where(mask, ids, 0), mask


def _assert_same(model, twin, ids, mask, prompt=None, **arguments):
    expected = model.generate(
        torch.tensor(ids),
        attention_mask=None if mask is None else torch.tensor(mask),
        decoder_input_ids=None if prompt is None else torch.tensor(prompt),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **arguments,
    )
    actual = twin.generate(ids, mask, prompt, return_dict_in_generate=True, **arguments)
    np.testing.assert_array_equal(expected.sequences.numpy(), actual.sequences)
    if actual.sequences_scores is not None:
        difference = np.abs(expected.sequences_scores.numpy() - actual.sequences_scores).max()
        assert difference <= tolerances.TWIN_SCORES


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_are_pytorchs(strategy, pairs):
    model, twin = pairs("lightweight")
    for seed, side in ((0, "right"), (1, "left")):
        _assert_same(model, twin, *_texts(seed, side), max_new_tokens=9, **STRATEGIES[strategy])


@pytest.mark.parametrize("name", ["hybrid", "alone", "released", "switches"])
def test_every_kind_of_layer_decodes_alike(name, pairs):
    model, twin = pairs(name)
    for arguments in ({}, {"num_beams": 3}):
        _assert_same(model, twin, *_texts(2), max_new_tokens=7, **arguments)


def test_prompts_and_masks_are_read_as_pytorch_reads_them(pairs):
    model, twin = pairs("hybrid")
    ids, mask = _texts(3)
    for prompt in ([[0, 5, 9]] * 4, [[5, 9]] * 4):
        for arguments in ({}, {"num_beams": 2}):
            _assert_same(model, twin, ids, mask, np.array(prompt), max_new_tokens=5, **arguments)
    _assert_same(model, twin, ids, None, max_new_tokens=5)
    with pytest.warns(UserWarning, match="model-agnostic default"):  # PyTorch's: 20 tokens
        _assert_same(model, twin, ids, mask)
    _assert_same(model, twin, ids, mask, max_length=6)


def test_sampling_is_reproducible_and_keeps_to_its_limits(pairs):
    _, twin = pairs("lightweight")
    ids, mask = _texts(4)
    arguments = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3}
    first, again, other = (twin.generate(ids, mask, **arguments, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape[0] == 12 and (first != other).any()
    greedy = twin.generate(ids, mask, max_new_tokens=6)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        sampled = twin.generate(ids, mask, do_sample=True, max_new_tokens=6, **narrow)
        np.testing.assert_array_equal(greedy, sampled)
    beams = twin.generate(ids, mask, do_sample=True, num_beams=3, max_new_tokens=6, seed=5)
    assert beams.shape[0] == 4


def test_one_program_serves_all_positions_and_lengths_of_a_bucket(pairs):
    _, twin = pairs("lightweight")
    ids, mask = _texts(5)
    before = generation_flax_convt5._generate._cache_size()
    for length in (13, 9, 5):
        twin.generate(ids[:, :length], mask[:, :length] | 1, max_new_tokens=11)
    assert generation_flax_convt5._generate._cache_size() == before + 1


def test_settings_come_from_the_checkpoint(pairs, tmp_path):
    model, twin = pairs("lightweight")
    ids, mask = _texts(6)
    twin.save_pretrained(tmp_path)
    settings = tmp_path / "generation_config.json"
    text = settings.read_text().replace("{", '{"max_new_tokens": 4, "num_beams": 2,', 1)
    settings.write_text(text)
    loaded = type(twin).from_pretrained(tmp_path)
    expected = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=4, num_beams=2
    )
    np.testing.assert_array_equal(expected, loaded.generate(ids, mask))
    settings.write_text(text.replace("{", '{"repetition_penalty": 1.3,', 1))
    loaded = type(twin).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="generation_config.json sets repetition_penalty=1.3"):
        loaded.generate(ids, mask)


WRONG = {
    "unknown": ({"repetition_penalty": 2.0}, "does not support repetition_penalty"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens=0"),
    "cold": ({"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
    "top_p": ({"do_sample": True, "top_p": 1.5}, "top_p=1.5"),
    "top_k": ({"do_sample": True, "top_k": -1}, "top_k=-1"),
    "beams": ({"num_beams": 0}, "num_beams=0"),
    "stopping": ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping='soon'"),
    "returns": ({"num_return_sequences": 2}, "num_return_sequences=2, expected at most 1"),
    "beam returns": ({"num_beams": 2, "num_return_sequences": 3}, "expected at most 2"),
    "mask": ({"attention_mask": np.ones((4, 3))}, r"attention_mask has shape \(4, 3\)"),
    "prompt": ({"decoder_input_ids": np.zeros((3, 1), int)}, r"decoder_input_ids has shape \(3, 1"),
    "short": ({"max_length": 1}, "max_length=1"),
    "floats": ({"input_ids": np.ones((4, 3))}, "expected integers"),
    "empty": ({"input_ids": np.ones((4, 0), int)}, "pass some tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_fail_before_work_starts(name, pairs, monkeypatch):
    _, twin = pairs("lightweight")
    monkeypatch.setattr(generation_flax_convt5, "_generate", None)
    changes, text = WRONG[name]
    with pytest.raises(ValueError, match=text):
        twin.generate(**{"input_ids": _texts(0)[0], **changes})


def test_too_many_tokens_for_the_position_table(pairs):
    _, twin = pairs("released")
    with pytest.raises(ValueError, match="more positions than the table has"):
        twin.generate(_texts(0)[0], max_new_tokens=600)
