"""Decoding: one compiled graph, chunks, padding, roll-back, and what is refused.

That every strategy gives the same tokens with a cache as without is test_cached_generation.py.
"""

import pytest
import tolerances
import torch
from conftest import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, TextStreamer

from modeling_convt5 import ConvT5ForConditionalGeneration
from modeling_convt5.cache_convt5 import CACHE, new_static_cache

MIXERS = ("depthwise", "lightweight", "dynamic", "attention", ["lightweight", "attention"])
LENGTHS = {"min_new_tokens": 12, "max_new_tokens": 16}
PROMPT = torch.tensor([[0, 11, 12, 13, 14]])
STRATEGIES = {"greedy": {}, "beam": {"num_beams": 4}, "sampling": {"do_sample": True, "top_k": 0}}


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


def _compiled_once(backend, mixer, window, cross_attention, record_property=None, **kwargs):
    """Two compiled generations give the uncached tokens, every position from the same one graph."""
    model = _model(
        encoder_mixers=mixer,
        decoder_mixers=mixer,
        decoder_kernel_size=window[0],
        decoder_dilation=window[1],
        cross_attention=cross_attention,
    ).double()
    graphs, runs = [], []

    def counting(graph, inputs):
        compiled = torch._dynamo.lookup_backend(backend)(graph, inputs)
        graphs.append(compiled)

        def run(*args):
            runs.append(1)
            return compiled(*args)

        return run

    compile_config = CompileConfig(fullgraph=True, mode=None, backend=counting)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators only
    static = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    steps = 0
    for texts in (_batch("right"), _batch("left")):
        uncached = _generate(model, texts, use_cache=False, **kwargs)
        assert torch.equal(_generate(model, texts, **static, **kwargs), uncached)
        prompt = kwargs.get("decoder_input_ids", uncached[:, :1])
        steps += uncached.shape[1] - prompt.shape[1] - 1  # the prompt itself is read uncompiled
    assert len(graphs) == torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(runs) == steps
    assert not torch._dynamo.utils.counters["graph_break"]
    if record_property is not None:
        for name, number in (("combinations", 1), ("graphs", len(graphs)), ("steps", steps)):
            record_property(name, number)


@pytest.mark.parametrize(("mixer", "window", "cross_attention"), COMPILED, ids=str)
def test_static_decoding_is_one_graph(mixer, window, cross_attention, record_property):
    _compiled_once("eager", mixer, window, cross_attention, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "window", "cross_attention"), COMPILED, ids=str)
def test_static_decoding_compiled(mixer, window, cross_attention, record_property):
    _compiled_once("inductor", mixer, window, cross_attention, record_property)


def test_static_decoding_of_masked_prompts_is_one_graph():
    prompts = torch.nn.functional.pad(PROMPT.expand(3, -1), (2, 0))
    mask = (torch.arange(7) >= torch.tensor([[2], [0], [4]])).long()
    kwargs = {"decoder_input_ids": prompts, "decoder_attention_mask": mask}
    _compiled_once("eager", ["lightweight", "attention"], (4, 2), True, **kwargs)


def test_static_sampling_is_one_graph():
    _compiled_once("eager", ["dynamic", "attention"], (7, 1), True, do_sample=True, top_k=0)


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


class Shapes(TorchDispatchMode):
    """Every operation that runs, with the shapes of what it reads and makes."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, made)) if isinstance(t, torch.Tensor)]
        self.operations.append((str(func), [tuple(t.shape) for t in tensors]))
        return made


@pytest.mark.parametrize("cross_attention", [True, False])
@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("mixer", ["depthwise", "lightweight", "dynamic"])
def test_a_step_does_the_same_work_at_every_position(mixer, implementation, cross_attention):
    """To the shape of every tensor, so that the 2,048th token takes as long as the 32nd."""
    model = _model(decoder_mixers=mixer, cross_attention=cross_attention)
    encoded, work = model.get_encoder()(**_batch()), []
    for position in (32, 2048):
        cache = new_static_cache(model.config, 4096, 11) if implementation else None
        call = {"encoder_outputs": encoded, "use_cache": True}
        ids = torch.randint(4, 40, (3, position))
        cache = model(**call, decoder_input_ids=ids, **{CACHE: cache})[CACHE]
        one = {"decoder_input_ids": torch.full((3, 1), 7), CACHE: cache}
        with Shapes() as shapes:
            model(**call, **one)
            model(**call, **one, decoder_attention_mask=torch.ones(3, 1))
        assert cache.get_seq_length() == position + 2
        work.append(shapes.operations)
    assert work[0] == work[1] and len(work[0]) > 50


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


REFUSED = {
    "an offloaded cache": (
        {"cache_implementation": "offloaded"},
        "cache_implementation='offloaded'",
    ),
    "a quantised cache": (
        {"cache_implementation": "quantized"},
        "cache_implementation='quantized'",
    ),
    "an offloaded static cache": (
        {"cache_implementation": "offloaded_static"},
        "cache_implementation='offloaded_static'",
    ),
    "drafts from a text into a static cache": (
        {"cache_implementation": "static", "prompt_lookup_num_tokens": 3},
        "cache_implementation='static' cannot be combined",
    ),
    "drafts from layers that predict nothing": (
        {"assistant_early_exit": 1},
        "assistant_early_exit=1 is not supported",
    ),
    "prompts cut by transformers": (
        {"prefill_chunk_size": 4},
        "prefill_chunk_size=4 is not supported",
    ),
    "guidance": ({"guidance_scale": 2.0}, "guidance_scale=2.0 is not supported"),
    "several returns of drafts": (
        {"prompt_lookup_num_tokens": 3, "num_return_sequences": 2, "do_sample": True},
        "num_return_sequences has to be 1",
    ),
    # Strategies that transformers 5 moved to repositories of their own.
    "beam groups": (
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        "requires `trust_remote_code=True`",
    ),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "requires `trust_remote_code=True`"),
    "contrasting layers": ({"dola_layers": "low"}, "requires `trust_remote_code=True`"),
    "constraints": (
        {"num_beams": 4, "force_words_ids": [[5]]},
        "requires `trust_remote_code=True`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_supported_is_refused_before_any_work(case):
    arguments, message = REFUSED[case]
    model = _model()
    model.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
    with pytest.raises(ValueError, match=message):
        _generate(model, _batch(), **arguments)


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="generate_batch .+ is not supported"):
        _model().generate_batch([[5, 6, 7]])


def test_a_static_cache_that_is_too_small_is_refused_before_any_work():
    model, batch = _model(), _batch()
    output = _generate(model, batch, cache_implementation="static", return_dict_in_generate=True)
    arguments = {"decoder_input_ids": output.sequences, CACHE: output[CACHE]}
    with pytest.raises(ValueError, match="more room than the static .+ has .16 tokens."):
        model.generate(**batch, **arguments, max_new_tokens=2)


def test_a_cache_of_another_batch_is_refused():
    for mixer in ("lightweight", "attention"):
        model, batch = _model(decoder_mixers=mixer), _batch()
        output = model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True)
        arguments = {"decoder_input_ids": output.sequences, CACHE: output[CACHE]}
        with pytest.raises(ValueError, match="filled by 3 rows, the decoder's inputs are 12"):
            model.generate(**batch, **arguments, max_new_tokens=2, num_beams=4)


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
