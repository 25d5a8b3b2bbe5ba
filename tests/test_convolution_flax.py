"""The Flax ops against the same plain loops, over the same cases as the PyTorch ops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tolerances
import torch
from test_convolution import COVER, D_MODEL, OPS, Case, _assert_close, _call, _hidden, _inputs

from modeling_convt5 import convolution_flax

# Each case with one of the ops in turn; all three in `make test-all`.
IN_TURN = [(OPS[i % 3], case) for i, case in enumerate(COVER)]
SAMPLE = Case(7, "129", 2, "2", "strided", "centred", "both")


def _op(op, case, arrays):
    """The op on arrays by name: JAX hands dictionaries back in alphabetical order."""
    mask, segments = (None if a is None else jnp.asarray(a.numpy()) for a in _hidden(case))
    window = {"left_taps": case.left_taps, "dilation": case.dilation, "sharing": case.sharing}
    if op == "dynamic":
        window["kernel_size"] = case.kernel_size
    function = getattr(convolution_flax, f"{op}_conv")
    return function(**arrays, **window, attention_mask=mask, segment_ids=segments)


def _values_and_gradients(op, case, arrays, grad_output, dtype):
    function = partial(_op, op, case)

    def both(leaves, grad_output):
        y, backward = jax.vjp(function, leaves)
        return y, backward(grad_output)[0]

    leaves = {key: jnp.asarray(array, dtype) for key, array in arrays.items()}
    y, gradients = jax.jit(both)(leaves, jnp.asarray(grad_output, dtype))
    assert y.dtype == dtype
    return y, gradients


def _assert_follows_reference(op, case, name):
    arrays, grad_output = _inputs(op, case)
    with jax.enable_x64(name == "float64"):
        dtype = jnp.dtype(name)
        rounded = {key: np.asarray(a).astype(dtype) for key, a in arrays.items()}
        arrays = {key: array.astype(np.float64) for key, array in rounded.items()}
        grad_output = grad_output.astype(dtype).astype(np.float64)
        y, gradients = _values_and_gradients(op, case, arrays, grad_output, dtype)
    expected_y, expected = reference.values_and_gradients(
        lambda **leaves: _call(reference, op, case, leaves), arrays, grad_output
    )
    values = tolerances.DYNAMIC_VALUES if op == "dynamic" else tolerances.CONVOLUTION
    table = tolerances.DYNAMIC_GRADIENTS if op == "dynamic" else tolerances.CONVOLUTION
    _assert_close(_tensor(y), expected_y, values[name], f"{case} {name} values")
    for key, gradient in gradients.items():
        what = f"{case} {name} gradient of {key}"
        _assert_close(_tensor(gradient), expected[key], table[name], what)


def _tensor(array):
    return torch.tensor(np.asarray(array).astype(np.float64))


@pytest.mark.parametrize(("op", "case"), IN_TURN, ids=str)
def test_values_and_gradients_are_those_of_the_loop(op, case):
    _assert_follows_reference(op, case, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float64", "float32"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", COVER, ids=str)
def test_every_op_on_every_case(op, case, name):
    _assert_follows_reference(op, case, name)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", OPS)
def test_narrow_dtypes_accumulate_in_float32(op, name):
    _assert_follows_reference(op, SAMPLE, name)


@pytest.mark.parametrize("left_taps", [3, 9, 40])
@pytest.mark.parametrize("sharing", ["block", "strided"])
def test_chunks_are_the_whole_row(sharing, left_taps, monkeypatch):
    """Chunks of the least size against one: values and gradients, window inside and far outside."""
    rng = np.random.default_rng(0)
    K, F = 4, D_MODEL
    arguments = {
        "x": rng.normal(size=(2, 37, D_MODEL)),
        "source": rng.normal(size=(2, 37, D_MODEL)),
        "weight": rng.normal(size=(F * K, D_MODEL)) / 8,
        "bias": rng.normal(size=F * K),
    }
    segments = jnp.asarray(np.sort(rng.integers(1, 4, size=(2, 37)), axis=1))

    def loss(arguments):
        y = convolution_flax.dynamic_conv(
            **arguments,
            kernel_size=K,
            left_taps=left_taps,
            dilation=2,
            sharing=sharing,
            segment_ids=segments,
        )
        return (y**2).sum(), y

    results = []
    with jax.enable_x64(True):
        for elements in (2**23, 1):
            monkeypatch.setattr(convolution_flax, "_CHUNK_ELEMENTS", elements)
            results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments))
    whole, chunks = map(jax.tree.leaves, results)
    for expected, actual in zip(whole, chunks, strict=True):
        scale = max(float(np.abs(expected).max()), 1e-3)
        assert np.abs(actual - expected).max() <= tolerances.BETWEEN_FORMULATIONS * scale


@pytest.mark.parametrize("op", OPS)
def test_nothing_leaks_from_padding_or_another_segment(op):
    """Other contents there change no bit of a token's output, and get a gradient of exactly 0."""
    arrays, _ = _inputs(op, SAMPLE)
    mask, segments = (array.numpy() for array in _hidden(SAMPLE))
    mine = (segments == 1) & (mask != 0)

    def outputs(x):
        return _op(op, SAMPLE, {**arrays, "x": x})

    arrays = {key: jnp.asarray(array, jnp.float32) for key, array in arrays.items()}
    x = arrays["x"]
    other = jnp.where(mine[:, :, None], x, jnp.inf)
    other = jnp.where(((segments != 1) & (mask != 0))[:, :, None], 7.0, other)
    assert (np.asarray(outputs(x))[mine] == np.asarray(outputs(other))[mine]).all()
    gradient = jax.grad(lambda x: jnp.where(mine[:, :, None], outputs(x), 0).sum())(x)
    assert (np.asarray(gradient)[~mine] == 0).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("sharing", ["block", "strided"])
def test_steps_are_the_whole_row(sharing, dilation, predicted):
    """A prompt, one token, a chunk: the outputs and the state of the whole row."""
    rng = np.random.default_rng(0)
    K, L, state_length = 4, 11, 3 * dilation
    shape = (2, L, 4, K) if predicted else (4, K)
    with jax.enable_x64(True):
        x, filter = jnp.asarray(rng.normal(size=(2, L, 8))), jnp.asarray(rng.normal(size=shape))
        whole = convolution_flax.depthwise_conv(x, filter, K - 1, dilation, sharing)
        state, outputs = convolution_flax.next_conv_state(x[:, :2], state_length), []
        for start, stop in ((2, 3), (3, 4), (4, L)):
            part = filter[:, start:stop] if predicted else filter
            y, state = convolution_flax.conv_step(x[:, start:stop], state, part, dilation, sharing)
            outputs.append(y)
        y = jnp.concatenate(outputs, axis=1)
        assert np.abs(y - whole[:, 2:]).max() <= tolerances.BETWEEN_FORMULATIONS * 10
        assert (state == convolution_flax.next_conv_state(x, state_length)).all()


def test_backward_keeps_its_inputs_only():
    """What XLA needs beside inputs and outputs grows with L * D, not with L * K * D."""
    L, K = 2048, 31
    x, filter = jnp.zeros((1, L, D_MODEL)), jnp.zeros((2, K))

    def gradients(x, filter):
        return jax.grad(
            lambda x, filter: (convolution_flax.lightweight_conv(x, filter, 15) ** 2).sum(), (0, 1)
        )(x, filter)

    compiled = jax.jit(gradients).lower(x, filter).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 6 * x.nbytes


BAD_ARGUMENTS = {
    "x without a batch": ({"x": jnp.zeros((5, 8))}, r"\(B, L, D\)"),
    "integers": ({"x": jnp.zeros((1, 5, 8), jnp.int32)}, "floating point"),
    "filters that do not divide": ({"filter": jnp.zeros((3, 4))}, "F a divisor of D = 8"),
    "no taps": ({"filter": jnp.zeros((2, 0))}, "K >= 1"),
    "negative window": ({"left_taps": -1}, "left_taps=-1"),
    "no dilation": ({"dilation": 0}, "dilation=0"),
    "sharing": ({"sharing": "blocks"}, "sharing='blocks'"),
    "mask": ({"attention_mask": jnp.ones((1, 4))}, r"attention_mask has shape \(1, 4\)"),
    "segments": ({"segment_ids": jnp.ones((1, 5))}, "segment_ids has dtype float32"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_wrong_arguments_say_what_is_expected(name):
    changes, text = BAD_ARGUMENTS[name]
    arguments = {"x": jnp.zeros((1, 5, 8)), "filter": jnp.zeros((2, 4)), "left_taps": 3}
    with pytest.raises(ValueError, match=text):
        convolution_flax.depthwise_conv(**{**arguments, **changes})
