"""The PyTorch models: T5 exactly where the mixers are attention, and no leaks anywhere."""

import re

import pytest
import tolerances
import torch
from conftest import tiny_config
from transformers import T5Config, T5ForConditionalGeneration

from modeling_convt5 import (
    ConvT5EncoderModel,
    ConvT5ForConditionalGeneration,
    ConvT5Model,
)
from modeling_convt5.cache_convt5 import CACHE

MIXERS = ("depthwise", "lightweight", "dynamic", "attention", ["attention", "dynamic"])
# A packed row holds the examples 1 and 2, then padding.
SEGMENTS = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2, 0]])
DECODER_SEGMENTS = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 0]])

T5_NAMES = (
    (r"\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias", ".relative_attention_bias"),
    (r"\.block\.", ".layers."),
    (r"layer\.0\.SelfAttention", "mixer"),
    (r"layer\.0\.layer_norm", "pre_mixer_norm"),
    (r"layer\.1\.EncDecAttention", "cross_attention"),
    (r"^(decoder.*)layer\.1\.layer_norm", r"\1pre_cross_attention_norm"),
    (r"layer\.[12]\.DenseReluDense", "mlp"),
    (r"layer\.[12]\.layer_norm", "pre_mlp_norm"),
    (r"final_layer_norm", "final_norm"),
)


def _from_t5(name):
    for pattern, replacement in T5_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _batch(config, batch=2, length=9, target_length=6):
    return {
        "input_ids": torch.randint(2, config.vocab_size, (batch, length)),
        "labels": torch.randint(2, config.vocab_size, (batch, target_length)),
    }


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("feed_forward_proj", ["relu", "gated-gelu"])
def test_all_attention_is_t5(feed_forward_proj, tied, implementation):
    fields = {
        "vocab_size": 99,
        "d_model": 48,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": feed_forward_proj,
        "tie_word_embeddings": tied,
        "attn_implementation": implementation,
    }
    t5 = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **fields)).eval()
    if not tied:
        t5.lm_head.weight = torch.nn.Parameter(torch.randn(99, 48) / 7)
    attention = {"encoder_mixers": "attention", "decoder_mixers": "attention"}
    model = ConvT5ForConditionalGeneration(tiny_config(**fields, **attention)).eval()
    model.load_state_dict({_from_t5(name): w for name, w in t5.state_dict().items()})
    batch = {
        "input_ids": torch.randint(2, 99, (3, 17)),
        "attention_mask": torch.ones(3, 17).long(),
        "labels": torch.randint(2, 99, (3, 9)),
    }
    batch["attention_mask"][1, 12:] = 0
    batch["attention_mask"][2, :5] = 0
    batch["labels"][0, 6:] = -100
    expected = t5(**batch, output_hidden_states=True)
    actual = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(actual.logits, expected.logits, atol=tolerances.T5_VALUES, rtol=0)
    torch.testing.assert_close(actual.loss, expected.loss, atol=tolerances.T5_VALUES, rtol=0)
    for stack in ("encoder_hidden_states", "decoder_hidden_states"):
        for ours, theirs in zip(actual[stack], expected[stack], strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerances.T5_VALUES, rtol=0)
    expected.loss.backward()
    actual.loss.backward()
    gradients = {_from_t5(name): p.grad for name, p in t5.named_parameters()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        largest = gradients[name].abs().max()
        assert (
            parameter.grad - gradients[name]
        ).abs().max() <= tolerances.T5_GRADIENTS * largest, name
    del batch["labels"]
    kwargs = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(**batch, **kwargs), t5.generate(**batch, **kwargs))


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_padding_never_reaches_a_token(mixer):
    config = tiny_config(encoder_mixers=mixer, decoder_mixers=mixer)
    model = ConvT5ForConditionalGeneration(config).eval()
    ids, labels = torch.randint(2, 40, (1, 8)), torch.randint(2, 40, (1, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]])
    decoder_mask = torch.tensor([[0, 1, 1, 1, 0]])
    kwargs = {"attention_mask": mask, "decoder_attention_mask": decoder_mask}
    first = model(input_ids=ids, decoder_input_ids=labels, **kwargs).logits[decoder_mask > 0]
    ids, labels = ids.masked_fill(mask == 0, 31), labels.masked_fill(decoder_mask == 0, 32)
    second = model(input_ids=ids, decoder_input_ids=labels, **kwargs).logits[decoder_mask > 0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("mixer", ["depthwise", "lightweight", "dynamic"])
def test_shifting_the_text_in_its_padding_shifts_the_output(mixer):
    model = ConvT5EncoderModel(tiny_config(encoder_mixers=mixer)).eval()
    text = torch.randint(2, 40, (1, 6))
    outputs = []
    for left in (0, 3, 7):
        padding = (left, 7 - left)
        ids = torch.nn.functional.pad(text, padding)
        mask = torch.nn.functional.pad(torch.ones_like(text), padding)
        output = model(input_ids=ids, attention_mask=mask).last_hidden_state
        outputs.append(output[:, left : left + 6])
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=tolerances.FLOAT32_STATES, rtol=0)


@pytest.mark.parametrize("positions", [None, "learned", "sinusoidal"])
@pytest.mark.parametrize("cross_attention", [True, False])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_packed_examples_equal_separate_ones(mixer, cross_attention, positions):
    config = tiny_config(
        encoder_mixers=mixer,
        decoder_mixers=mixer,
        cross_attention=cross_attention,
        position_embeddings=positions,
    )
    # In float64, where nothing but a leak is larger than the tolerance.
    model = ConvT5ForConditionalGeneration(config).double().eval()
    batch = _batch(config)
    segments = {"segment_ids": SEGMENTS, "decoder_segment_ids": DECODER_SEGMENTS}
    packed = model(**batch, **segments).logits
    for row in range(2):
        for example in (1, 2):
            here, there = SEGMENTS[row] == example, DECODER_SEGMENTS[row] == example
            alone = model(
                input_ids=batch["input_ids"][row : row + 1, here],
                labels=batch["labels"][row : row + 1, there],
            ).logits
            torch.testing.assert_close(
                packed[row, there], alone[0], atol=tolerances.FLOAT64_MODEL, rtol=0
            )


@pytest.mark.parametrize("cross_attention", [True, False])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_gradients_across_segments_and_padding_are_exactly_zero(mixer, cross_attention):
    config = tiny_config(
        encoder_mixers=mixer, decoder_mixers=mixer, cross_attention=cross_attention
    )
    model = ConvT5ForConditionalGeneration(config).eval()
    inputs = torch.randn(2, 9, 16, requires_grad=True)
    decoder_inputs = torch.randn(2, 6, 16, requires_grad=True)
    logits = model(
        inputs_embeds=inputs,
        decoder_inputs_embeds=decoder_inputs,
        segment_ids=SEGMENTS,
        decoder_segment_ids=DECODER_SEGMENTS,
    ).logits
    for example in (1, 2):
        loss = logits[DECODER_SEGMENTS == example].square().sum()
        gradients = torch.autograd.grad(loss, (inputs, decoder_inputs), retain_graph=True)
        for gradient, segments in zip(gradients, (SEGMENTS, DECODER_SEGMENTS), strict=True):
            assert gradient[segments == example].abs().max() > 0
            assert gradient[segments != example].abs().max() == 0


def test_a_decoder_without_cross_attention_learns_the_class_of_its_input():
    config = tiny_config(cross_attention=False, d_model=32, initializer_factor=1.0, vocab_size=24)
    model = ConvT5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def batch(size):
        # The class is the token that occurs twice, anywhere among distractors.
        label = torch.randint(4, 8, (size, 1))
        ids = torch.cat([torch.randint(8, 24, (size, 6)), label, label], dim=1)
        order = torch.rand(size, 8).argsort(dim=1)
        return {"input_ids": ids.gather(1, order), "labels": label}

    for _ in range(150):
        model(**batch(32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    test = batch(500)
    predictions = model.eval()(**test).logits.argmax(-1)
    assert (predictions == test["labels"]).float().mean() > 0.95


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_gradient_checkpointing_changes_no_gradient(mixer):
    config = tiny_config(encoder_mixers=mixer, decoder_mixers=mixer, filter_dropout=0.3)
    model = ConvT5ForConditionalGeneration(config).train()
    batch, gradients = _batch(config), []
    for checkpointing in (False, True):
        if checkpointing:  # the name in transformers 5, and in 4
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)()
        model.zero_grad()
        torch.manual_seed(3)
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_labels_make_decoder_inputs_and_ignore_minus_100():
    config = tiny_config()
    model = ConvT5ForConditionalGeneration(config).eval()
    batch = _batch(config)
    batch["labels"][:, 4:] = -100
    output = model(**batch)
    expected = torch.nn.functional.pad(batch["labels"][:, :-1], (1, 0)).masked_fill(
        torch.tensor([[0, 0, 0, 0, 0, 1]]).bool(), 0
    )
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(batch["labels"]), expected)
    again = model(input_ids=batch["input_ids"], decoder_input_ids=expected)
    assert torch.equal(output.logits, again.logits)
    by_hand = torch.nn.functional.cross_entropy(
        output.logits[:, :4].flatten(0, 1), batch["labels"][:, :4].flatten()
    )
    torch.testing.assert_close(output.loss, by_hand)
    summed = model(**batch, num_items_in_batch=torch.tensor(16)).loss
    torch.testing.assert_close(summed, by_hand * 8 / 16)


def test_embeddings_and_encoder_outputs_stand_in_for_ids():
    config = tiny_config()
    model = ConvT5ForConditionalGeneration(config).eval()
    batch = _batch(config)
    expected = model(**batch).logits
    embeds = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(model(inputs_embeds=embeds, labels=batch["labels"]).logits, expected)
    encoder_outputs = model.get_encoder()(batch["input_ids"])
    for reused in (encoder_outputs, encoder_outputs.to_tuple()):
        logits = model(encoder_outputs=reused, labels=batch["labels"]).logits
        assert torch.equal(logits, expected)
    assert torch.equal(model(**batch, return_dict=False)[1], expected), (
        "a tuple holds the loss, then the logits"
    )


def test_hidden_states_and_attentions_are_counted_as_in_t5():
    config = tiny_config(
        num_layers=3, num_decoder_layers=2, encoder_mixers=["dynamic", "attention", "depthwise"]
    )
    model = ConvT5Model(config).eval()
    ids = torch.randint(2, 40, (2, 7))
    output = model(
        input_ids=ids, decoder_input_ids=ids, output_hidden_states=True, output_attentions=True
    )
    assert len(output.encoder_hidden_states) == 4
    assert len(output.decoder_hidden_states) == 3
    assert output.encoder_hidden_states[-1] is output.encoder_last_hidden_state
    assert [tuple(w.shape) for w in output.encoder_attentions] == [(2, 4, 7, 7)]
    assert len(output.cross_attentions) == 2
    assert output.decoder_attentions == ()


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_token_embeddings(tied):
    model = ConvT5ForConditionalGeneration(tiny_config(tie_word_embeddings=tied)).eval()
    batch = _batch(model.config)
    before = model(**batch).logits
    model.resize_token_embeddings(50)
    after = model(**batch).logits
    assert after.shape[-1] == 50 and model.config.vocab_size == 50
    torch.testing.assert_close(after[..., :40], before)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert (model.lm_head.weight is model.shared.weight) == tied


def test_resizing_two_token_tables():
    model = ConvT5ForConditionalGeneration(tiny_config(share_embeddings=False)).eval()
    batch = _batch(model.config)
    before = model(**batch).logits
    model.resize_token_embeddings(50)
    for stack in (model.encoder, model.decoder):
        assert stack.embed_tokens.weight.shape == (50, 16)
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    torch.testing.assert_close(model(**batch).logits[..., :40], before)


def test_a_decoder_alone_reads_its_own_text():
    # What transformers' own suites ask of every decoder: run without the encoder's states.
    for cross_attention in (True, False):
        model = ConvT5ForConditionalGeneration(tiny_config(cross_attention=cross_attention)).eval()
        assert model.get_decoder()(input_ids=torch.ones(2, 5).long())[0].shape == (2, 5, 16)


def test_weights_are_tied_as_the_configuration_says():
    model = ConvT5ForConditionalGeneration(tiny_config(tie_word_embeddings=False))
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    assert model.lm_head.weight is not model.shared.weight
    apart = ConvT5ForConditionalGeneration(tiny_config(share_embeddings=False))
    assert apart.encoder.embed_tokens.weight is not apart.decoder.embed_tokens.weight
    assert apart.lm_head.weight is apart.decoder.embed_tokens.weight


def test_the_start_token_is_hidden_only_where_asked():
    config = tiny_config(decoder_mixers="depthwise")
    model = ConvT5ForConditionalGeneration(config).eval()
    batch = _batch(config)
    seen = model(**batch).logits
    model.config.mask_decoder_start = True
    hidden = model(**batch).logits
    assert (seen - hidden).abs().max() > 1e-3
    ids = model._shift_right(batch["labels"])
    not_start = (ids != 0).long()
    model.config.mask_decoder_start = False
    by_mask = model(**batch, decoder_attention_mask=not_start).logits
    torch.testing.assert_close(by_mask, hidden)
    model.config.mask_decoder_start = True
    with pytest.raises(ValueError, match="mask_decoder_start"):
        model(input_ids=batch["input_ids"], decoder_inputs_embeds=torch.zeros(2, 3, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype):
    config = tiny_config(
        encoder_mixers=["dynamic", "attention"], num_filters=None, initializer_factor=1.0
    )
    model = ConvT5ForConditionalGeneration(config).eval()
    batch = _batch(config)
    expected = model(**batch).logits
    actual = model.to(dtype)(**batch).logits
    assert actual.dtype == dtype
    assert (actual - expected).abs().max() <= tolerances.HALF_PRECISION_MODEL * expected.abs().max()


WRONG_INPUTS = {
    "no ids": ({}, "exactly one of input_ids or inputs_embeds"),
    "ids and embeds": (
        {"input_ids": torch.ones(2, 4).long(), "inputs_embeds": torch.ones(2, 4, 16)},
        "exactly one of input_ids or inputs_embeds",
    ),
    "no decoder input": (
        {"input_ids": torch.ones(2, 4).long()},
        "decoder_input_ids or decoder_inputs_embeds",
    ),
    "length 0": (
        {"input_ids": torch.ones(2, 0).long(), "decoder_input_ids": torch.ones(2, 3).long()},
        "length 0",
    ),
    "mask too short": (
        {
            "input_ids": torch.ones(2, 4).long(),
            "attention_mask": torch.ones(2, 3),
            "decoder_input_ids": torch.ones(2, 3).long(),
        },
        r"attention_mask has shape \(2, 3\), expected \(batch, length\) = \(2, 4\)",
    ),
    "mask of four dimensions": (
        {
            "input_ids": torch.ones(2, 4).long(),
            "attention_mask": torch.ones(2, 1, 4, 4),
            "decoder_input_ids": torch.ones(2, 3).long(),
        },
        "attention_mask has shape",
    ),
    "one kind of segments": (
        {
            "input_ids": torch.ones(2, 4).long(),
            "segment_ids": torch.ones(2, 4).long(),
            "decoder_input_ids": torch.ones(2, 3).long(),
        },
        "go together",
    ),
    "float segments": (
        {
            "input_ids": torch.ones(2, 4).long(),
            "segment_ids": torch.ones(2, 4),
            "decoder_input_ids": torch.ones(2, 3).long(),
            "decoder_segment_ids": torch.ones(2, 3).long(),
        },
        "segment_ids has dtype torch.float32",
    ),
    "segments too long": (
        {
            "input_ids": torch.ones(2, 4).long(),
            "segment_ids": torch.ones(2, 5).long(),
            "decoder_input_ids": torch.ones(2, 3).long(),
            "decoder_segment_ids": torch.ones(2, 3).long(),
        },
        r"segment_ids has shape \(2, 5\)",
    ),
    "a tuple for a cache": (
        {
            "input_ids": torch.ones(2, 4).long(),
            "decoder_input_ids": torch.ones(2, 3).long(),
            "cache": ((torch.ones(2, 4),),),
            "use_cache": True,
        },
        f"{CACHE} is a tuple",
    ),
    "longer than the position table": (
        {
            "input_ids": torch.ones(2, 9).long(),
            "decoder_input_ids": torch.ones(2, 3).long(),
        },
        "longer than the position table",
    ),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_inputs_are_named(case):
    inputs, message = WRONG_INPUTS[case]
    positions = {"position_embeddings": "learned", "max_position_embeddings": 8}
    config = tiny_config(**(positions if "position" in case else {}))
    with pytest.raises(ValueError, match=message):
        ConvT5ForConditionalGeneration(config)(**inputs)
