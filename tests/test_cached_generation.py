"""The sweep: `generate` with a cache gives the tokens that it gives without, for every strategy.

A combination is a strategy, a mixer, a window (kernel size and dilation), cross-attention or none,
and a padding side. Its tokens are generated without a cache, with one, and with a static one, and
compared for equality. A part runs by default; all of it, and how many combinations that are:

    python -m pytest -m slow tests/test_cached_generation.py
"""

import itertools

import pytest
import torch
from conftest import tiny_config
from transformers import TextStreamer

from modeling_convt5 import ConvT5ForConditionalGeneration
from modeling_convt5.cache_convt5 import CACHE

MIXERS = {
    "depthwise": "depthwise",
    "lightweight": "lightweight",
    "dynamic": "dynamic",
    "attention": "attention",
    "hybrid": ["lightweight", "attention"],
    "hybrid that begins with attention": ["attention", "dynamic"],
}
WINDOWS = list(itertools.product((1, 2, 4, 7, 31), (1, 2, 5)))  # (kernel size, dilation)
LENGTHS = {"min_new_tokens": 9, "max_new_tokens": 12}
# Random weights fall into short cycles, which would hide a state that is wrong later on.
NO_CYCLES = {"no_repeat_ngram_size": 2}
PROMPT_LENGTH = 40  # of the strategies that draft
CHUNKS = (2, 1, 3)  # of a prompt; the rest of it, which is longer than the window, comes last


def build(mixer, window, cross_attention, seed=1, **fields):
    """A tiny model in float64, where no two tokens tie but for a wrong state."""
    torch.manual_seed(seed)
    config = tiny_config(
        encoder_mixers=MIXERS[mixer],
        decoder_mixers=MIXERS[mixer],
        decoder_kernel_size=window[0],
        decoder_dilation=window[1],
        cross_attention=cross_attention,
        # Without positions a kernel of one tap scores all orders of the same tokens alike.
        position_embeddings="learned" if window[0] == 1 else None,
        # With tied embeddings random weights mostly repeat the start token.
        tie_word_embeddings=False,
        eos_token_id=3,
        **fields,
    )
    return ConvT5ForConditionalGeneration(config).double().eval()


def texts(side):
    """Three inputs of which one is padded."""
    ids = torch.randint(4, 40, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, slice(7, None) if side == "right" else slice(None, 4)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def prompts(length):
    """Decoder inputs (3, length) that begin with the start token."""
    ids = torch.randint(4, 40, (3, length), generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.pad(ids[:, 1:], (1, 0))


def reach(model):
    return max(spec.state_length for spec in model.config.layer_specs("decoder"))


# A strategy is a function of the model, a batch, its padding side and the cache's arguments.


def plain(**arguments):
    def run(model, batch, side, cache):
        torch.manual_seed(2)
        return model.generate(**batch, **{**LENGTHS, **NO_CYCLES, **arguments, **cache})

    return run


def prompted(length):
    """A decoder prompt of `length` tokens, or of `length(model)`."""

    def run(model, batch, side, cache):
        prompt = prompts(length(model) if callable(length) else length)
        return plain(decoder_input_ids=prompt)(model, batch, side, cache)

    return run


def padded_prompts(model, batch, side, cache):
    prompt, mask = prompts(9), torch.ones(3, 9).long()
    for row, padding in enumerate((3, 0, 5)):
        mask[row, slice(9 - padding, None) if side == "right" else slice(None, padding)] = 0
    arguments = {"decoder_input_ids": prompt * mask, "decoder_attention_mask": mask}
    return plain(**arguments)(model, batch, side, cache)


def in_chunks(**arguments):
    """A prompt longer than the window in chunks, each read into the cache the last returned."""

    def run(model, batch, side, cache):
        prompt = prompts(sum(CHUNKS) + reach(model) + 4)
        arguments.setdefault("num_beams", 1)
        last = plain(decoder_input_ids=prompt, **arguments)
        if cache == {"use_cache": False}:
            return last(model, batch, side, cache)
        if cache:
            cache = {**cache, "max_cache_len": prompt.shape[1] + LENGTHS["max_new_tokens"]}
        for end in itertools.accumulate(CHUNKS):
            output = model.generate(
                **batch,
                **cache,
                decoder_input_ids=prompt[:, :end],
                max_new_tokens=1,
                return_dict_in_generate=True,
            )
            cache = {CACHE: output[CACHE]}
            assert cache[CACHE].get_seq_length() == end
        if arguments["num_beams"] > 1:
            cache[CACHE].batch_repeat_interleave(arguments["num_beams"])
        return last(model, batch, side, cache)

    return run


def with_scores(model, batch, side, cache):
    arguments = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = plain(**arguments)(model, batch, side, cache)
    assert len(output.scores) == len(output.logits) == output.sequences.shape[1] - 1
    # float32: generate picks tokens by the processed scores, which are greedy's maximum.
    picked = torch.stack([scores.argmax(-1) for scores in output.scores], dim=1)
    tokens = output.sequences[:, 1:]
    ended = (tokens == 3).cumsum(1) - (tokens == 3).long() > 0  # padding follows the end
    assert torch.equal(picked.masked_fill(ended, 0), tokens)
    return output.sequences


def reusing_encoder_outputs(model, batch, side, cache):
    """What the encoder returned, as it is, for two generations in a row."""
    mask = {"attention_mask": batch["attention_mask"]}
    if cache == {"use_cache": False}:
        return plain()(model, batch, side, cache)
    batch = {"encoder_outputs": model.get_encoder()(**batch), **mask}
    plain(do_sample=True)(model, batch, side, cache)
    return plain()(model, batch, side, cache)


class Collector(TextStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens = torch.tensor([self.tokens])


def streamed(model, batch, side, cache):
    streamer = Collector()
    batch = {name: value[1:2] for name, value in batch.items()}
    # One row of few tokens: without repetition it has more different ones.
    tokens = plain(streamer=streamer, no_repeat_ngram_size=1)(model, batch, side, cache)
    assert torch.equal(streamer.tokens, tokens)
    return tokens


def assisted(**arguments):
    """Drafts that are taken in part, so that the state is rolled back; one text at a time."""

    def run(model, batch, side, cache):
        batch = {name: value[1:2] for name, value in batch.items()}
        # Prompt lookup drafts what follows an earlier occurrence of the last tokens: a prompt with
        # most of the vocabulary gives it something at every step, and repetition must be allowed.
        common = {"no_repeat_ngram_size": 4, "decoder_input_ids": prompts(PROMPT_LENGTH)[:1]}
        if cache == {"use_cache": False}:
            return plain(**common)(model, batch, side, cache)
        drafts = dict(arguments) or {"assistant_model": draft_model(model)}
        return plain(**common, **drafts)(model, batch, side, cache)

    return run


def draft_model(model):
    """Nearly the model itself: some of its drafts are taken and some are not."""
    draft = ConvT5ForConditionalGeneration(model.config).to(model.dtype).eval()
    draft.load_state_dict(model.state_dict())
    draft.generation_config.update(num_assistant_tokens=3)
    with torch.no_grad():
        noise = torch.randn(draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(7))
        draft.lm_head.weight.add_(noise, alpha=0.4)
    return draft


STRATEGIES = {
    "greedy": plain(),
    "beam": plain(num_beams=4),
    "beam, several returns": plain(num_beams=4, num_return_sequences=3),
    "beam, early stopping": plain(num_beams=3, early_stopping=True, length_penalty=2.0),
    "sampling": plain(do_sample=True, top_k=0),
    "sampling, several returns": plain(do_sample=True, num_return_sequences=2, top_p=0.9),
    "beam sampling": plain(do_sample=True, num_beams=3, top_k=20, temperature=1.5),
    "tokens forced and suppressed": plain(
        forced_bos_token_id=9,
        forced_eos_token_id=3,
        suppress_tokens=[4, 5, 6],
        begin_suppress_tokens=[7, 8],
        repetition_penalty=1.3,
    ),
    "decoder inputs of 2 tokens": prompted(2),
    "decoder inputs of 5 tokens": prompted(5),
    "decoder inputs longer than the window": prompted(lambda model: reach(model) + 3),
    "padded decoder inputs": padded_prompts,
    "continued in chunks": in_chunks(),
    "continued in chunks, with beams": in_chunks(num_beams=3),
    "scores": with_scores,
    "streaming": streamed,
    "encoder outputs reused": reusing_encoder_outputs,
    "prompt lookup": assisted(prompt_lookup_num_tokens=3),
    "assistant model": assisted(),
}
# What takes tokens back or changes the batch of a cache has no static form; see test_generation.py.
NOT_STATIC = ("prompt lookup", "assistant model", "continued in chunks, with beams")


def compare(strategy, mixer, window, cross_attention, side):
    """Generate without a cache and with each kind; returns how many comparisons were made."""
    model, run = build(mixer, window, cross_attention), STRATEGIES[strategy]
    uncached = run(model, texts(side), side, {"use_cache": False})
    assert uncached.unique().numel() > 5, "a constant output would prove nothing"
    kinds = [{}] if strategy in NOT_STATIC else [{}, {"cache_implementation": "static"}]
    for cache in kinds:
        tokens = run(model, texts(side), side, cache)
        assert torch.equal(tokens, uncached), f"{cache or 'dynamic cache'}: other tokens"
    return len(kinds)


def sweep(combinations, record_property):
    """Compare each combination, and report all that differ, not only the first."""
    compared, differing = 0, []
    for combination in combinations:
        try:
            compared += compare(*combination)
        except Exception as error:
            differing.append(f"{combination}: {type(error).__name__}: {error}")
    record_property("combinations", len(combinations))
    record_property("comparisons", compared)
    record_property("failures", len(differing))
    assert not differing, "\n".join(differing)


def windows(mixer):
    if mixer == "attention":
        return WINDOWS[:1]  # it has no window
    # The second hybrid differs from the first in which layer tells the cache's length.
    return WINDOWS[::4] if mixer == "hybrid that begins with attention" else WINDOWS


@pytest.mark.parametrize("cross_attention", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
def test_cached_equals_uncached(mixer, cross_attention, record_property):
    """Every strategy in one window, a different one for each; sides and windows take turns."""
    cases = list(itertools.product(windows(mixer), ("left", "right")))
    first = 19 * list(MIXERS).index(mixer) + 11 * cross_attention
    combinations = []
    for i, strategy in enumerate(STRATEGIES, first):
        window, side = cases[i * 7 % len(cases)]
        combinations.append((strategy, mixer, window, cross_attention, side))
    sweep(combinations, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cross_attention", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
def test_cached_equals_uncached_for_every_combination(
    mixer, cross_attention, strategy, record_property
):
    combinations = [
        (strategy, mixer, window, cross_attention, side)
        for window, side in itertools.product(windows(mixer), ("left", "right"))
    ]
    sweep(combinations, record_property)


@pytest.mark.parametrize("strategy", ["prompt lookup", "assistant model"])
def test_some_drafts_are_taken_and_some_rejected(strategy):
    """Else the strategies that draft would never roll a state back, or never keep one."""
    rounds = generated = read = kept = 0
    for window in WINDOWS:
        model, lengths = build("lightweight", window, True), []
        model.register_forward_pre_hook(
            lambda _, args, kwargs, lengths=lengths: lengths.append(
                kwargs["decoder_input_ids"].shape[1]
            ),
            with_kwargs=True,
        )
        tokens = STRATEGIES[strategy](model, texts("right"), "right", {})
        rounds, read = rounds + len(lengths), read + sum(lengths)
        generated, kept = generated + tokens.shape[1] - PROMPT_LENGTH, kept + tokens.shape[1] - 1
    assert rounds < generated, "no draft was taken"
    assert read > kept, "no draft was rejected"
