"""`generate` with the cache gives the tokens that `generate` without it gives."""

import itertools

import pytest
import tolerances
import torch
from conftest import tiny_config
from transformers import CompileConfig, TextStreamer

from modeling_convt5 import ConvT5ForConditionalGeneration
from modeling_convt5.cache_convt5 import CACHE

MIXERS = ("depthwise", "lightweight", "dynamic", "attention", ["lightweight", "attention"])
WINDOWS = list(itertools.product((1, 2, 4, 7, 31), (1, 2, 5)))  # (kernel size, dilation)
LENGTHS = {"min_new_tokens": 12, "max_new_tokens": 16}
PROMPT = torch.tensor([[0, 11, 12, 13, 14]])
STRATEGIES = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "several returns": {"num_beams": 4, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam sampling": {"do_sample": True, "num_beams": 3, "top_k": 20, "temperature": 1.5},
    "sampled returns": {"do_sample": True, "num_return_sequences": 2, "top_p": 0.9},
    "given decoder inputs": {"decoder_input_ids": PROMPT.expand(3, -1)},
    "tokens forced and suppressed": {
        "forced_bos_token_id": 9,
        "forced_eos_token_id": 3,
        "suppress_tokens": [4, 5, 6],
        "begin_suppress_tokens": [7, 8],
        "repetition_penalty": 1.3,
    },
    # These two decode one text at a time, and roll the state back.
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "decoder_input_ids": PROMPT},
    "assistant model": {"assistant_model": None},
}
ONE_TEXT = ("prompt lookup", "assistant model")


def _model(seed=1, **overrides):
    torch.manual_seed(seed)
    # Untied: with tied embeddings random weights mostly repeat the start token.
    config = tiny_config(tie_word_embeddings=False, eos_token_id=3, **overrides)
    return ConvT5ForConditionalGeneration(config).eval()


def _batch(side="right"):
    ids = torch.randint(4, 40, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    padding = slice(7, None) if side == "right" else slice(None, 4)
    mask[1, padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _generate(model, batch, **kwargs):
    torch.manual_seed(2)
    # Random weights fall into short cycles, which would hide a state that is wrong later on.
    return model.generate(**batch, no_repeat_ngram_size=2, **LENGTHS, **kwargs)


def _compare(mixer, window, cross_attention, side, strategy):
    """Uncached, cached and static decoding give the same tokens."""
    fields = {
        "encoder_mixers": mixer,
        "decoder_mixers": mixer,
        "decoder_kernel_size": window[0],
        "decoder_dilation": window[1],
        "cross_attention": cross_attention,
        # Without positions a kernel of one tap scores all orders of the same tokens alike.
        "position_embeddings": "learned" if window[0] == 1 else None,
    }
    model, batch, kwargs = _model(**fields), _batch(side), dict(STRATEGIES[strategy])
    if strategy in ONE_TEXT:
        batch = {key: value[1:2] for key, value in batch.items()}
    plain = {k: v for k, v in kwargs.items() if k not in ("prompt_lookup_num_tokens",)}
    if "assistant_model" in kwargs:
        del plain["assistant_model"]
        kwargs["assistant_model"] = _model(seed=1, **{**fields, "num_decoder_layers": 2})
        # Nearly the model itself, so that some of its drafts are taken and some are not.
        with torch.no_grad():
            kwargs["assistant_model"].lm_head.weight.add_(torch.randn(40, 16), alpha=0.2)
    uncached = _generate(model, batch, use_cache=False, **plain)
    assert uncached.unique().numel() > 5, "a constant output would prove nothing"
    assert torch.equal(_generate(model, batch, **kwargs), uncached)
    if strategy not in ONE_TEXT:
        static = _generate(model, batch, cache_implementation="static", **kwargs)
        assert torch.equal(static, uncached)


def _windows(mixer):
    return WINDOWS[:1] if mixer == "attention" else WINDOWS  # attention has no window


@pytest.mark.parametrize("cross_attention", [True, False])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_cached_equals_uncached(mixer, cross_attention):
    cases = itertools.cycle(itertools.product(_windows(mixer), ("left", "right")))
    for strategy in STRATEGIES:
        for window, side in itertools.islice(cases, 3):
            _compare(mixer, window, cross_attention, side, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cross_attention", [True, False])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_cached_equals_uncached_for_every_combination(mixer, cross_attention, strategy):
    for window, side in itertools.product(_windows(mixer), ("left", "right")):
        _compare(mixer, window, cross_attention, side, strategy)


COMPILED = [
    ("lightweight", (7, 1), True),
    ("lightweight", (1, 1), False),
    ("lightweight", (4, 5), True),
    ("dynamic", (7, 1), True),
    ("dynamic", (31, 2), False),
    ("dynamic", (2, 1), True),
    ("depthwise", (4, 2), True),
    ("depthwise", (31, 5), False),
    ("attention", (1, 1), True),
    ("attention", (1, 1), False),
    (["lightweight", "attention"], (7, 1), True),
    (["dynamic", "attention"], (4, 2), False),
]


def _compiled_once(backend, mixer, window, cross_attention, **kwargs):
    """Compiled decoding gives the uncached tokens, from one graph for all positions."""
    model = _model(
        encoder_mixers=mixer,
        decoder_mixers=mixer,
        decoder_kernel_size=window[0],
        decoder_dilation=window[1],
        cross_attention=cross_attention,
    )
    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators only
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    uncached = _generate(model, _batch(), use_cache=False, **kwargs)
    compiled = _generate(
        model, _batch(), cache_implementation="static", compile_config=compile_config, **kwargs
    )
    assert torch.equal(compiled, uncached)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("mixer", "window", "cross_attention"), COMPILED, ids=str)
def test_static_decoding_is_one_graph(mixer, window, cross_attention):
    _compiled_once("eager", mixer, window, cross_attention)


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "window", "cross_attention"), COMPILED, ids=str)
def test_static_decoding_compiled(mixer, window, cross_attention):
    _compiled_once("inductor", mixer, window, cross_attention)


def test_static_decoding_of_masked_prompts_is_one_graph():
    prompts = torch.nn.functional.pad(PROMPT.expand(3, -1), (2, 0))
    mask = (torch.arange(7) >= torch.tensor([[2], [0], [4]])).long()
    kwargs = {"decoder_input_ids": prompts, "decoder_attention_mask": mask}
    _compiled_once("eager", ["lightweight", "attention"], (4, 2), True, **kwargs)


@pytest.mark.parametrize("strategy", ["greedy", "beam", "sampling"])
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
        output = model(**batch, decoder_input_ids=piece, use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        pieces.append(output.logits)
    torch.testing.assert_close(
        torch.cat(pieces, dim=1), full, atol=tolerances.FLOAT64_MODEL, rtol=0
    )


def test_conv_state_has_a_constant_size():
    model = _model(decoder_kernel_size=[4, 7], decoder_dilation=[2, 1])
    cache = None
    for _ in range(3):
        output = model(
            **_batch(),
            decoder_input_ids=torch.randint(4, 40, (3, 9)),
            use_cache=True,
            **{CACHE: cache},
        )
        cache = output[CACHE]
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
    cache = model(**batch, decoder_input_ids=ids[:, :3], use_cache=True)[CACHE]
    cache.activate_past_recording()
    wrong = torch.randint(4, 40, (3, 5))
    cache = model(**batch, decoder_input_ids=wrong, use_cache=True, **{CACHE: cache})[CACHE]
    for layer in cache.self_attention_cache.layers:
        layer.crop(-5)
    logits = model(**batch, decoder_input_ids=ids[:, 3:], use_cache=True, **{CACHE: cache}).logits
    torch.testing.assert_close(logits, full[:, 3:], atol=tolerances.FLOAT64_MODEL, rtol=0)
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("implementation", ["offloaded", "quantized", "offloaded_static"])
def test_caches_without_a_use_are_refused_before_any_work(implementation):
    with pytest.raises(ValueError, match=f"cache_implementation='{implementation}' is not"):
        _generate(_model(), _batch(), cache_implementation=implementation)


def test_more_tokens_than_positions_are_refused_before_any_work():
    model = _model(position_embeddings="learned", max_position_embeddings=15)
    with pytest.raises(ValueError, match="up to 17 tokens needs more positions"):
        _generate(model, _batch())
    model = _model(position_embeddings="learned", max_position_embeddings=16)
    expected = _generate(model, _batch(), use_cache=False)
    assert torch.equal(_generate(model, _batch()), expected)
    # A static cache may have room for more tokens than are generated.
    roomy = {"cache_implementation": "static", "max_cache_len": 40}
    assert torch.equal(_generate(model, _batch(), **roomy), expected)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("mixer", ["lightweight", "dynamic", ["lightweight", "attention"]], ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_generation_continues_from_a_returned_cache(mixer, chunk, implementation):
    model, batch = _model(decoder_mixers=mixer, decoder_kernel_size=4), _batch()
    kwargs = {"return_dict_in_generate": True, "suppress_tokens": [3]}
    whole = model.generate(**batch, max_new_tokens=14, **kwargs).sequences
    static = {"cache_implementation": "static", "max_cache_len": 32} if implementation else {}
    first = model.generate(**batch, max_new_tokens=5, **static, **kwargs)
    # What follows is given in chunks, of which the last one is generated from.
    ids, cache = whole[:, : 6 + chunk], first[CACHE]
    assert cache.get_seq_length() == 5
    again = model.generate(
        **batch, decoder_input_ids=ids, **{CACHE: cache}, max_new_tokens=8 - chunk, **kwargs
    )
    assert torch.equal(again.sequences, whole[:, :14])
    with pytest.raises(ValueError, match="holds 2 tokens, but .+ has read 13"):
        model.generate(**batch, decoder_input_ids=ids[:, :2], **{CACHE: cache}, max_new_tokens=2)


def test_encoder_outputs_and_scores_and_streams():
    class Collector(TextStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model, batch = _model(decoder_mixers=["dynamic", "attention"]).double(), _batch()
    plain = _generate(model, batch)
    encoder_outputs = model.get_encoder()(**batch)
    reused = model.generate(
        encoder_outputs=encoder_outputs,
        attention_mask=batch["attention_mask"],
        no_repeat_ngram_size=2,
        **LENGTHS,
    )
    assert torch.equal(reused, plain)
    streamer = Collector()
    one = {key: value[:1] for key, value in batch.items()}
    tokens = _generate(model, one, streamer=streamer)
    assert streamer.tokens == [*tokens[0].tolist(), "end"]
    outputs = model.generate(
        **batch, max_new_tokens=6, return_dict_in_generate=True, output_logits=True
    )
    full = model(**batch, decoder_input_ids=outputs.sequences, use_cache=False).logits
    for step, logits in enumerate(outputs.logits):
        close = {"atol": tolerances.FLOAT32_LOGITS, "rtol": 0}
        torch.testing.assert_close(logits.double(), full[:, step], **close)


def test_rolling_back_unrecorded_tokens_is_refused():
    model = _model()
    cache = model(**_batch(), decoder_input_ids=torch.ones(3, 2).long(), use_cache=True)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache[CACHE].self_attention_cache.crop(-1)


def test_a_cache_of_another_model_is_refused():
    hybrid, batch = _model(decoder_mixers=["attention", "lightweight"]), _batch()
    ids = torch.ones(3, 2).long()
    cache = hybrid(**batch, decoder_input_ids=ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="filled by another model"):
        _model()(**batch, decoder_input_ids=ids, use_cache=True, **{CACHE: cache})
