"""`generate` with the cache gives the tokens that `generate` without it gives."""

import itertools

import pytest
import torch
from conftest import tiny_config

from modeling_convt5 import ConvT5ForConditionalGeneration

MIXERS = ("depthwise", "lightweight", "dynamic", "attention", ["lightweight", "attention"])
KERNEL_SIZES = (1, 4, 7, 31)
DILATIONS = (1, 2)
SIDES = ("left", "right", "right", "left", "left")  # so that every strategy meets both
LENGTHS = {"min_new_tokens": 12, "max_new_tokens": 16}
STRATEGIES = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "sampling": {"do_sample": True, "top_k": 0},
}


def _model(**overrides):
    torch.manual_seed(1)
    # Untied: with tied embeddings random weights mostly repeat the start token.
    config = tiny_config(tie_word_embeddings=False, eos_token_id=3, **overrides)
    return ConvT5ForConditionalGeneration(config).eval()


def _batch(side="right"):
    ids = torch.randint(4, 40, (3, 11))
    mask = torch.ones_like(ids)
    padding = slice(7, None) if side == "right" else slice(None, 4)
    mask[1, padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _generate(model, batch, **kwargs):
    torch.manual_seed(2)
    # Random weights fall into short cycles, which would hide a state that is wrong later on.
    return model.generate(**batch, no_repeat_ngram_size=2, **LENGTHS, **kwargs)


@pytest.mark.parametrize("cross_attention", [True, False])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_cached_equals_uncached(mixer, cross_attention):
    cases = itertools.product(KERNEL_SIZES, DILATIONS, STRATEGIES)
    for (kernel_size, dilation, strategy), side in zip(cases, itertools.cycle(SIDES), strict=False):
        if mixer == "attention" and (kernel_size, dilation) != (KERNEL_SIZES[0], 1):
            continue  # attention has no window
        model = _model(
            encoder_mixers=mixer,
            decoder_mixers=mixer,
            decoder_kernel_size=kernel_size,
            decoder_dilation=dilation,
            cross_attention=cross_attention,
        )
        batch = _batch(side)
        cached = _generate(model, batch, **STRATEGIES[strategy])
        uncached = _generate(model, batch, use_cache=False, **STRATEGIES[strategy])
        assert cached.unique().numel() > 5, "a constant output would prove nothing"
        assert torch.equal(cached, uncached), (kernel_size, dilation, strategy, side)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_side_does_not_matter(strategy):
    model = _model(encoder_mixers="dynamic")
    ids = torch.randint(4, 40, (1, 9))
    alone = _generate(model, {"input_ids": ids}, **STRATEGIES[strategy])
    for padding in ((5, 0), (0, 5)):
        batch = {
            "input_ids": torch.nn.functional.pad(ids, padding, value=17),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), padding),
        }
        assert torch.equal(alone, _generate(model, batch, **STRATEGIES[strategy]))


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 7], [1, 3, 8], [12]], ids=str)
def test_chunks_of_any_size_equal_the_full_row(mixer, chunks):
    model = _model(decoder_mixers=mixer, decoder_kernel_size=4, decoder_dilation=2).double()
    batch, decoder_ids = _batch(), torch.randint(4, 40, (3, 12))
    full = model(**batch, decoder_input_ids=decoder_ids, use_cache=False).logits
    cache, pieces = None, []
    for piece in decoder_ids.split(chunks, dim=1):
        output = model(**batch, decoder_input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-10, rtol=0)


def test_conv_state_has_a_constant_size():
    model = _model(decoder_kernel_size=[4, 7], decoder_dilation=[2, 1])
    cache = None
    for _ in range(3):
        output = model(
            **_batch(),
            decoder_input_ids=torch.randint(4, 40, (3, 9)),
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        shapes = [tuple(layer.conv_state.shape) for layer in cache.self_attention_cache.layers]
        assert shapes == [(3, 6, 16), (3, 6, 16)]
    assert cache.get_seq_length() == 27


def test_left_padded_decoder_prompts():
    model = _model(decoder_mixers=["dynamic", "attention"])
    batch = {"input_ids": torch.randint(4, 40, (1, 8))}
    prompt = torch.tensor([[0, 11, 12, 13]])
    alone = _generate(model, batch, decoder_input_ids=prompt)
    padded = torch.nn.functional.pad(prompt, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (3, 0))
    together = _generate(model, batch, decoder_input_ids=padded, decoder_attention_mask=mask)
    assert torch.equal(alone, together[:, 3:])


def test_past_recording_rolls_back():
    model = _model(decoder_kernel_size=4).double()
    batch, ids = _batch(), torch.randint(4, 40, (3, 10))
    full = model(**batch, decoder_input_ids=ids, use_cache=False).logits
    cache = model(**batch, decoder_input_ids=ids[:, :3], use_cache=True).past_key_values
    cache.activate_past_recording()
    wrong = torch.randint(4, 40, (3, 5))
    cache = model(
        **batch, decoder_input_ids=wrong, past_key_values=cache, use_cache=True
    ).past_key_values
    for layer in cache.self_attention_cache.layers:
        layer.crop(-5)
    logits = model(
        **batch, decoder_input_ids=ids[:, 3:], past_key_values=cache, use_cache=True
    ).logits
    torch.testing.assert_close(logits, full[:, 3:], atol=1e-10, rtol=0)
    assert cache.get_seq_length() == 10


def test_static_cache_is_refused_before_any_work():
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        _generate(_model(), _batch(), cache_implementation="static")


def test_rolling_back_unrecorded_tokens_is_refused():
    model = _model()
    cache = model(**_batch(), decoder_input_ids=torch.ones(3, 2).long(), use_cache=True)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.past_key_values.self_attention_cache.crop(-1)


def test_a_cache_of_another_model_is_refused():
    hybrid, batch = _model(decoder_mixers=["attention", "lightweight"]), _batch()
    ids = torch.ones(3, 2).long()
    cache = hybrid(**batch, decoder_input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled by another model"):
        _model()(**batch, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
