"""The Flax models: PyTorch's outputs, gradients and decoding states; plain JAX inside."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tolerances
import torch
from flax import nnx

from modeling_convt5 import (
    FlaxConvT5EncoderModel,
    FlaxConvT5ForConditionalGeneration,
    FlaxConvT5ForSequenceClassification,
)
from modeling_convt5.cache_convt5 import CACHE
from modeling_convt5.masks_convt5 import relative_position_bucket as torch_bucket
from modeling_convt5.masks_flax_convt5 import relative_position_bucket
from modeling_convt5.stacks_flax_convt5 import repeating_runs

CASES = parity.cases()
# Every model and every head at least once; all of them in `make test-all` and `parity.py`.
IN_TURN = [case for i, case in enumerate(CASES) if i % 6 == (i // 6) % 6]


def _assert_parity(case, kinds=("padded", "packed")):
    head, _, overrides = case
    model, twin = parity.pair(head, overrides)
    for kind in kinds:
        model.zero_grad()
        found = parity.differences(model, twin, parity.batch(head, kind))
        assert found["output"] <= tolerances.TWIN_OUTPUTS, (kind, found)
        assert found["gradient"] <= tolerances.TWIN_GRADIENTS, (kind, found)


@pytest.mark.parametrize("case", IN_TURN, ids=lambda case: f"{case[0]}-{case[1]}")
def test_outputs_states_and_gradients_are_pytorchs(case):
    _assert_parity(case, kinds=("padded",) if CASES.index(case) % 2 else ("packed",))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_every_head_of_every_model_is_pytorchs(case):
    _assert_parity(case)


@pytest.mark.parametrize("name", ["dynamic", "hybrid"])
def test_bfloat16_follows_pytorch(name):
    head = "ForConditionalGeneration"
    model, twin = parity.pair(head, parity.MODELS[name], "bfloat16")
    found = parity.differences(model, twin, parity.batch(head, "padded"))
    assert found["relative output"] <= tolerances.TWIN_BFLOAT16


@pytest.mark.parametrize("name", ["hybrid", "dilated", "released"])
def test_decoding_states_are_pytorchs(name):
    """A prompt of three tokens, then one at a time: logits and every layer's state."""
    overrides = {**parity.MODELS, **parity.SWITCHES}[name]
    model, twin = parity.pair("ForConditionalGeneration", overrides)
    inputs = parity.batch("ForConditionalGeneration", "padded")
    ids, mask, tokens = (
        inputs[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")
    )
    hidden = twin.encode(ids, mask).last_hidden_state
    cache, past = twin.init_cache(len(ids), 8, hidden, mask), None
    step = nnx.jit(lambda twin, new, cache: twin.decode(new, hidden, mask, past_key_values=cache))
    for new in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:5]):
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                decoder_input_ids=torch.tensor(new),
                **{CACHE: past},
                use_cache=True,
            )
        past = output[CACHE]
        twin_output = step(twin, new, cache)
        cache = twin_output.past_key_values
        difference = np.abs(output.logits.numpy() - twin_output.logits).max()
        assert difference <= tolerances.TWIN_OUTPUTS
    assert int(cache.seen) == past.get_seq_length() == 5
    for layer, twin_layer in zip(past.self_attention_cache.layers, cache.layers, strict=True):
        if twin_layer.conv_state is not None:
            state, twin_state = layer.conv_state, twin_layer.conv_state
        else:
            state, twin_state = layer.keys, twin_layer.keys[:, :, :5]
        assert state.shape == twin_state.shape
        assert np.abs(state.numpy() - twin_state).max() <= tolerances.TWIN_OUTPUTS


def test_relative_positions_have_t5s_buckets():
    distance = np.arange(-3000, 3000)
    for bidirectional in (True, False):
        for buckets, longest in ((32, 128), (8, 20), (64, 1000), (4, 3)):
            expected = torch_bucket(torch.tensor(distance), bidirectional, buckets, longest)
            actual = relative_position_bucket(
                jnp.asarray(distance), bidirectional, buckets, longest
            )
            assert (expected.numpy() == actual).all(), (bidirectional, buckets, longest)


# --- Functional JAX ------------------------------------------------------------------------------


def _model(**options):
    overrides = {
        key: options.pop(key) for key in list(options) if key not in ("scan_layers", "remat")
    }
    config = parity.parity_config(**overrides)
    return FlaxConvT5ForConditionalGeneration(config, rngs=nnx.Rngs(3), **options)


def _loss(graphdef, state, inputs, dropout_rng=None):
    return nnx.merge(graphdef, state)(**inputs, dropout_rng=dropout_rng).loss


DEEP = {
    "num_layers": 5,
    "num_decoder_layers": 2,
    "encoder_mixers": ["lightweight", "attention"] * 2 + ["dynamic"],
    "decoder_mixers": "dynamic",
    "dropout_rate": 0.1,
    "filter_dropout": 0.1,
}


@pytest.mark.parametrize(
    "options",
    [{"scan_layers": True}, {"remat": True}, {"scan_layers": True, "remat": True}],
    ids=str,
)
def test_scan_and_remat_change_nothing(options):
    """Loss and gradients, dropout included, of loops over layers and of recomputed ones."""
    inputs = parity.batch("ForConditionalGeneration", "padded")
    results = []
    for model in (_model(**DEEP), _model(**DEEP, **options)):
        graphdef, state = nnx.split(model)
        function = jax.jit(jax.value_and_grad(_loss, argnums=1), static_argnums=0)
        results.append(function(graphdef, state, inputs, jax.random.key(7)))
    for plain, other in zip(*map(jax.tree.leaves, results), strict=True):
        largest = max(float(np.abs(plain).max()), 1e-6)
        assert np.abs(plain - other).max() <= tolerances.TWIN_GRADIENTS * largest


def test_runs_of_layers():
    assert repeating_runs(list("aaabcbc")) == [(0, 1, 3), (3, 2, 2)]
    assert repeating_runs(list("aab")) == [(0, 1, 2), (2, 1, 1)]
    assert repeating_runs(list("aaba" * 3)) == [(0, 4, 3)]
    assert repeating_runs([]) == []


def test_the_scanned_program_does_not_grow_with_depth():
    def size(layers):
        graphdef, state = nnx.split(_model(num_layers=layers, scan_layers=True))
        inputs = parity.batch("ForConditionalGeneration", "padded")
        lowered = jax.jit(_loss, static_argnums=0).lower(graphdef, state, inputs)
        return lowered.as_text().count("dot_general")

    assert size(4) == size(12)


def test_dropout_is_drawn_from_the_key():
    model = _model(dropout_rate=0.2)
    inputs = parity.batch("ForConditionalGeneration", "padded")
    once, again, other = (
        model(**inputs, dropout_rng=jax.random.key(seed)).logits for seed in (0, 0, 1)
    )
    assert (once == again).all() and (once != other).any()
    assert (model(**inputs).logits == model(**inputs).logits).all()


def test_a_training_step_with_donated_buffers():
    graphdef, state = nnx.split(_model())
    inputs = parity.batch("ForConditionalGeneration", "padded")

    @jax.jit
    def unchanged(state):
        return _loss(graphdef, state, inputs)

    def step(state):
        loss, gradients = jax.value_and_grad(_loss, argnums=1)(graphdef, state, inputs)
        return jax.tree.map(lambda w, g: w - 0.1 * g, state, gradients), loss

    step = jax.jit(step, donate_argnums=0)
    before = float(unchanged(state))
    losses = []
    for _ in range(5):
        state, loss = step(state)
        losses.append(float(loss))
    assert abs(losses[0] - before) <= tolerances.FLOAT32_LOGITS and losses[-1] < losses[0]


def test_packed_examples_are_alone():
    """Two examples in one row are what each is in a row of its own; gradients across are 0."""
    model = _model(encoder_mixers=["lightweight", "attention"], decoder_mixers="dynamic")
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(2, 60, (1, 9)), rng.integers(2, 60, (1, 7))
    segments, target_segments = [[1] * 4 + [2] * 5], [[1] * 3 + [2] * 4]
    packed = model(
        input_ids=ids,
        decoder_input_ids=targets,
        segment_ids=np.array(segments),
        decoder_segment_ids=np.array(target_segments),
    ).logits
    first = model(input_ids=ids[:, :4], decoder_input_ids=targets[:, :3]).logits
    second = model(input_ids=ids[:, 4:], decoder_input_ids=targets[:, 3:]).logits
    alone = jnp.concatenate([first, second], axis=1)
    assert np.abs(packed - alone).max() <= tolerances.TWIN_OUTPUTS

    def mine(embeds):
        output = model.encoder(inputs_embeds=embeds, segment_ids=np.array(segments))
        return (output.last_hidden_state[:, :4] ** 2).sum()

    gradient = jax.grad(mine)(model.shared(ids))
    assert (gradient[:, 4:] == 0).all() and (gradient[:, :4] != 0).any()


def test_mixed_precision_keeps_float32_masters():
    model = FlaxConvT5ForConditionalGeneration(parity.parity_config(), dtype=jnp.bfloat16)
    output = model(**parity.batch("ForConditionalGeneration", "padded"))
    assert output.logits.dtype == jnp.bfloat16 and output.loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


# --- Errors --------------------------------------------------------------------------------------

IDS = np.arange(2, 12).reshape(2, 5)
BAD_INPUTS = {
    "nothing": ({}, ValueError, "exactly one of input_ids or inputs_embeds"),
    "no decoder inputs": ({"input_ids": IDS}, ValueError, "decoder_input_ids"),
    "floats": ({"input_ids": IDS * 1.0, "labels": IDS}, ValueError, "expected integers"),
    "one row": ({"input_ids": IDS[0], "labels": IDS}, ValueError, r"shape \(5,\)"),
    "no tokens": ({"input_ids": IDS[:, :0], "labels": IDS}, ValueError, "length 0"),
    "foreign ids": (
        {"input_ids": IDS + 60, "labels": IDS},
        ValueError,
        "input_ids holds 71, expected 0 to 59",
    ),
    "negative ids": ({"input_ids": IDS - 9, "labels": IDS}, ValueError, "input_ids holds -7"),
    "mask": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 4)), "labels": IDS},
        ValueError,
        r"attention_mask has shape \(2, 4\)",
    ),
    "batches": ({"input_ids": IDS, "labels": IDS[:1]}, ValueError, "a batch of 1"),
    "one segment": (
        {"input_ids": IDS, "segment_ids": IDS, "labels": IDS},
        ValueError,
        "segment_ids and decoder_segment_ids go together",
    ),
    "embeddings": (
        {"inputs_embeds": np.ones((2, 5, 3)), "labels": IDS},
        ValueError,
        "d_model = 16",
    ),
    "cache": (
        {"input_ids": IDS, "decoder_input_ids": IDS, "past_key_values": ()},
        ValueError,
        "past_key_values is a tuple",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_wrong_inputs_say_what_is_expected(name):
    inputs, error, text = BAD_INPUTS[name]
    with pytest.raises(error, match=text):
        _model()(**inputs)


def test_a_text_without_an_end_cannot_be_classified():
    model = FlaxConvT5ForSequenceClassification(parity.parity_config())
    with pytest.raises(ValueError, match=r"Rows \[0, 1\] of input_ids hold no end-of-sequence"):
        model(input_ids=IDS)
    assert np.isnan(nnx.jit(lambda model: model(input_ids=IDS).logits)(model)).all()


def test_inputs_may_be_constants_of_a_jitted_function():
    model = FlaxConvT5EncoderModel(parity.parity_config())
    ids, mask = jnp.asarray(IDS), jnp.ones(IDS.shape, jnp.float32)
    inside = nnx.jit(lambda model: model(ids, mask).last_hidden_state)(model)
    np.testing.assert_allclose(inside, model(ids, mask).last_hidden_state, atol=1e-5)
