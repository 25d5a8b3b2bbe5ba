"""The convolution's ops against plain loops, in every formulation; no leaks; errors that help."""

import itertools
import random
import shutil
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import reference
import tolerances
import torch

from benchmarks.benchmark_convolution import measure_memory
from modeling_convt5 import convolution

OPS = ("depthwise", "lightweight", "dynamic")
D_MODEL = 64
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Case(NamedTuple):
    """What an op is called with; `hidden` says which inputs it must not read."""

    kernel_size: int
    length: str
    dilation: int
    filters: str
    sharing: str
    window: str
    hidden: str

    def __str__(self):
        return (
            f"K{self.kernel_size}-L={self.length}-dilation{self.dilation}-F={self.filters}-"
            f"{self.sharing}-{self.window}-{self.hidden}"
        )

    @property
    def L(self):
        K = self.kernel_size
        return {"1": 1, "2": 2, "K-1": max(1, K - 1), "K": K, "129": 129}[self.length]

    @property
    def F(self):
        return {"1": 1, "2": 2, "D/2": D_MODEL // 2, "D": D_MODEL}[self.filters]

    @property
    def left_taps(self):
        K = self.kernel_size
        return {"centred": K // 2, "causal": K - 1, "lopsided": K // 4}[self.window]


FACTORS = Case(
    kernel_size=(1, 2, 3, 4, 7, 8, 9, 15, 31),
    length=("1", "2", "K-1", "K", "129"),
    dilation=(1, 2, 5),
    filters=("1", "2", "D/2", "D"),
    sharing=("block", "strided"),
    window=("centred", "causal", "lopsided"),
    hidden=("nothing", "padding", "segments", "both"),
)


def _pairs(case):
    return set(itertools.combinations(enumerate(case), 2))


def _pairwise_cover(seed=0):
    """Few cases in which every two values of two factors meet at least once."""
    rng = random.Random(seed)
    uncovered = set()
    for (i, first), (j, second) in itertools.combinations(enumerate(FACTORS), 2):
        uncovered |= {((i, a), (j, b)) for a in first for b in second}
    cases = []
    while uncovered:
        candidates = [Case(*map(rng.choice, FACTORS)) for _ in range(200)]
        best = max(candidates, key=lambda case: len(_pairs(case) & uncovered))
        if not _pairs(best) & uncovered:  # the last few pairs are too rare to be met by chance
            values = dict(next(iter(sorted(uncovered, key=str))))
            best = Case(*(values.get(i, v) for i, v in enumerate(best)))
        cases.append(best)
        uncovered -= _pairs(best)
    return cases


COVER = _pairwise_cover()
# Kernels that run as banded products: long, predicted, dilation 1, no segments, F < D.
BANDS = [
    Case(K, length, 1, filters, sharing, window, hidden)
    for (K, length), (filters, sharing, window, hidden) in zip(
        itertools.product((15, 31), FACTORS.length),
        itertools.cycle(
            [
                ("2", "block", "centred", "padding"),
                ("1", "strided", "causal", "nothing"),
                ("D/2", "strided", "lopsided", "padding"),
            ]
        ),
        strict=False,
    )
]


def _inputs(op, case, seed=0, batch=2):
    """Arrays by the op's argument names, in values that half precision would round."""
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(size=(batch, case.L, D_MODEL))}
    if op == "dynamic":
        arrays["source"] = rng.normal(size=(batch, case.L, D_MODEL))
        arrays["weight"] = rng.normal(size=(case.F * case.kernel_size, D_MODEL)) / 8
        arrays["bias"] = rng.normal(size=case.F * case.kernel_size)
    else:
        arrays["filter"] = rng.normal(size=(case.F, case.kernel_size))
    return arrays, rng.normal(size=(batch, case.L, D_MODEL))


def _hidden(case, batch=2):
    """attention_mask with padding on both sides; segment_ids of up to three examples a row."""
    t, L = torch.arange(case.L), case.L
    mask = segments = None
    if case.hidden in ("padding", "both"):
        mask = torch.stack([(t >= L // 5) & (t < L - L // 3), t < max(1, L // 2)])[:batch].long()
    if case.hidden in ("segments", "both"):
        first = 1 + (t >= L // 4).long() + (t >= L // 2).long()
        second = torch.where(t < L - L // 3, 1 + (t >= L // 3).long(), 0)
        segments = torch.stack([first, second])[:batch]
    return mask, segments


def _call(module, op, case, arrays, **options):
    """The op of `module` (the package's or the reference) on the arguments of a case."""
    arguments = list(arrays.values())
    if op == "dynamic":
        arguments.append(case.kernel_size)
    window = (case.left_taps, case.dilation, case.sharing, *_hidden(case, len(arrays["x"])))
    return getattr(module, f"{op}_conv")(*arguments, *window, **options)


def _values_and_gradients(op, case, arrays, grad_output, dtype):
    leaves = {
        name: torch.tensor(array).to(dtype).requires_grad_() for name, array in arrays.items()
    }
    y = _call(convolution, op, case, leaves)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, list(leaves.values()), torch.tensor(grad_output).to(dtype))
    return y, dict(zip(leaves, gradients, strict=True))


def _assert_close(actual, expected, tolerance, what):
    """Relative to the largest expected entry."""
    actual = actual.detach().double().numpy()
    deviation, largest = np.abs(actual - expected).max(), np.abs(expected).max()
    assert np.isfinite(actual).all() and deviation <= tolerance * max(largest, 1e-3), (
        f"{what}: off by {deviation:.2e} where the largest entry is {largest:.2e}"
    )


def _assert_follows_reference(op, case, dtypes):
    arrays, grad_output = _inputs(op, case)
    for name in dtypes:
        dtype = DTYPES[name]
        # What the op is given is what the reference is given: rounded inputs, then exact loops.
        arrays, grad_output = (
            {key: torch.tensor(a).to(dtype).double().numpy() for key, a in arrays.items()},
            torch.tensor(grad_output).to(dtype).double().numpy(),
        )
        y, gradients = _values_and_gradients(op, case, arrays, grad_output, dtype)
        expected_y, expected = reference.values_and_gradients(
            lambda **leaves: _call(reference, op, case, leaves), arrays, grad_output
        )
        values = tolerances.DYNAMIC_VALUES if op == "dynamic" else tolerances.CONVOLUTION
        _assert_close(y, expected_y, values[name], f"{case} {name} values")
        table = tolerances.DYNAMIC_GRADIENTS if op == "dynamic" else tolerances.CONVOLUTION
        for key, gradient in gradients.items():
            _assert_close(gradient, expected[key], table[name], f"{case} {name} gradient of {key}")


# --- Against the loops ---------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", COVER, ids=str)
def test_values_and_gradients_are_those_of_the_loop(op, case):
    _assert_follows_reference(op, case, ["float64", "float32"])


@pytest.mark.parametrize("case", BANDS, ids=str)
def test_banded_products_are_the_loop(case):
    _assert_follows_reference("dynamic", case, ["float64", "float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", COVER[::6] + BANDS[4::5], ids=str)
def test_half_precision_sums_in_float32(op, case, dtype):
    _assert_follows_reference(op, case, [dtype])


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("length", FACTORS.length)
@pytest.mark.parametrize("kernel_size", FACTORS.kernel_size)
def test_every_combination_is_the_loop(kernel_size, length, op):
    for rest in itertools.product(*FACTORS[2:]):
        _assert_follows_reference(op, Case(kernel_size, length, *rest), ["float64"])


def test_a_difference_would_be_seen():
    """The tolerances are tight: one tap at one position in the wrong place is caught."""
    case = Case(4, "129", 2, "2", "block", "centred", "padding")
    arrays, _ = _inputs("lightweight", case)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    y = _call(convolution, "lightweight", case, tensors)
    for wrong in ({"window": "lopsided"}, {"dilation": 1}, {"sharing": "strided"}):
        other = _call(reference, "lightweight", case._replace(**wrong), tensors)
        assert (y - other).abs().max() > 1e-2


# --- Every formulation ---------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", COVER[::3], ids=str)
def test_the_formulation_for_compilers_is_the_loop(op, case, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    _assert_follows_reference(op, case, ["float64", "float32"])


@pytest.mark.parametrize("positions", [1, 3, 50])
@pytest.mark.parametrize(
    "case", [case for case in COVER if case.L > 2 and case.F * case.kernel_size > D_MODEL], ids=str
)
def test_chunks_are_the_loop(case, positions, monkeypatch):
    elements = 2 * case.F * case.kernel_size * positions
    monkeypatch.setattr(convolution, "_CHUNK_ELEMENTS", elements)
    _assert_follows_reference("dynamic", case, ["float64"])


def test_chunks_of_bands_are_the_loop(monkeypatch):
    case = Case(31, "129", 1, "D/2", "block", "centred", "padding")
    monkeypatch.setattr(convolution, "_CHUNK_ELEMENTS", 2 * case.F * case.kernel_size * 40)
    _assert_follows_reference("dynamic", case, ["float64", "float32"])


FEW = {
    "depthwise": Case(4, "K", 1, "D/2", "block", "centred", "padding"),
    "lightweight": Case(3, "K", 2, "2", "strided", "causal", "both"),
    "dynamic": Case(3, "K", 2, "2", "block", "lopsided", "both"),
    "dynamic in chunks": Case(3, "K-1", 1, "D", "strided", "centred", "padding"),
    "dynamic in bands": Case(15, "K", 1, "1", "block", "centred", "padding"),
}


@pytest.mark.parametrize("what", FEW)
def test_gradcheck(what):
    """Against finite differences, which know nothing of the reference either."""
    op, case, channels = what.split()[0], FEW[what], 4
    filters = {"1": 1, "2": 2, "D/2": 2, "D": 4}[case.filters]
    arguments = [torch.randn(2, case.L, channels)]
    if op == "dynamic":
        arguments += [torch.randn(2, case.L, channels)]
        arguments += [torch.randn(filters * case.kernel_size, channels)]
        arguments += [torch.randn(filters * case.kernel_size)]
    else:
        arguments += [torch.randn(filters, case.kernel_size)]
    arguments = [argument.double().requires_grad_() for argument in arguments]

    def call(*tensors):
        return _call(convolution, op, case, dict(zip(("x", 1, 2, 3), tensors, strict=False)))

    assert torch.autograd.gradcheck(call, arguments)


@pytest.mark.parametrize(
    ("what", "frozen"),
    [(what, "x") for what in FEW]
    + [(what, "source" if "dynamic" in what else "filter") for what in FEW]
    + [(what, "weight") for what in FEW if "dynamic" in what],
)
def test_frozen_inputs_leave_the_other_gradients_alone(what, frozen):
    op, case = what.split()[0], FEW[what]
    arrays, grad_output = _inputs(op, case)
    _, expected = _values_and_gradients(op, case, arrays, grad_output, torch.float64)
    leaves = {k: torch.tensor(a).requires_grad_(k != frozen) for k, a in arrays.items()}
    _call(convolution, op, case, leaves).backward(torch.tensor(grad_output))
    assert leaves[frozen].grad is None
    for name in leaves.keys() - {frozen}:
        assert torch.equal(leaves[name].grad, expected[name]), name


# --- Compiled and exported -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "filters", "backend"),
    [(op, filters, "aot_eager") for op in OPS for filters in ("2", "D")]
    + [pytest.param(op, "2", "inductor", marks=pytest.mark.slow) for op in OPS]
    + [("dynamic", "D", "inductor")],
)
def test_compiles_into_one_graph(op, filters, backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    case = Case(2, "129", 1, filters, "block", "centred", "both")
    arrays, grad_output = _inputs(op, case)
    expected_y, expected = _values_and_gradients(op, case, arrays, grad_output, torch.float64)
    leaves = {k: torch.tensor(a).requires_grad_() for k, a in arrays.items()}
    compiled = torch.compile(partial(_call, convolution, op, case), fullgraph=True, backend=backend)
    y = compiled(leaves)
    y.backward(torch.tensor(grad_output))
    limit = {"atol": tolerances.BETWEEN_FORMULATIONS, "rtol": tolerances.BETWEEN_FORMULATIONS}
    torch.testing.assert_close(y, expected_y, **limit)
    for name, gradient in expected.items():
        torch.testing.assert_close(leaves[name].grad, gradient, **limit)


class _Module(torch.nn.Module):
    def __init__(self, op, case, arrays):
        super().__init__()
        self.op, self.case = op, case
        self.constants = [torch.tensor(a) for k, a in arrays.items() if k not in ("x", "source")]

    def forward(self, x, attention_mask):
        inputs = (x, x) if self.op == "dynamic" else (x,)
        size = (self.case.kernel_size,) if self.op == "dynamic" else ()
        window = (self.case.left_taps, self.case.dilation, self.case.sharing, attention_mask)
        op = getattr(convolution, f"{self.op}_conv")
        return op(*inputs, *self.constants, *size, *window)


@pytest.mark.parametrize("filters", ["2", "D"])
@pytest.mark.parametrize("op", OPS)
def test_exports_with_any_length(op, filters):
    case = Case(7, "129", 1, filters, "block", "causal", "padding")
    module = _Module(op, case, _inputs(op, case)[0])
    length = torch.export.Dim("length", min=2, max=4096)
    example = (torch.randn(2, 20, D_MODEL).double(), torch.ones(2, 20).long())
    dynamic_shapes = ({1: length}, {1: length})
    exported = torch.export.export(module, example, dynamic_shapes=dynamic_shapes).module()
    for other in (3, 20, 129):
        x, mask = torch.randn(2, other, D_MODEL).double(), torch.ones(2, other).long()
        mask[0, other // 2 :] = 0
        tolerance = tolerances.BETWEEN_FORMULATIONS
        torch.testing.assert_close(exported(x, mask), module(x, mask), atol=tolerance, rtol=0)


# --- Filter dropout ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [what for what in FEW if what != "depthwise"])
def test_backward_drops_the_taps_that_forward_dropped(what, monkeypatch):
    """Given its taps, y is linear in x, so <y, g> = <x, dx> if and only if both used the same."""
    monkeypatch.setattr(convolution, "_CHUNK_ELEMENTS", 600)
    op, case = what.split()[0], FEW[what]._replace(hidden="nothing")
    arrays, grad_output = _inputs(op, case)
    leaves = {k: torch.tensor(a).requires_grad_() for k, a in arrays.items()}
    y = _call(convolution, op, case, leaves, dropout=0.5)
    again = _call(convolution, op, case, leaves, dropout=0.5)
    assert not torch.equal(y, again)
    g = torch.tensor(grad_output)
    (grad_x,) = torch.autograd.grad(y, leaves["x"], g)
    limit = {"atol": tolerances.BETWEEN_FORMULATIONS * y.numel(), "rtol": 0}
    torch.testing.assert_close((y * g).sum(), (leaves["x"] * grad_x).sum(), **limit)


def test_filter_dropout_drops_whole_taps_and_keeps_the_mean():
    filter = torch.randn(4000, 5).double()[:1].expand(4000, 5)
    kept = convolution.normalize_filter(filter)
    assert torch.equal(convolution.normalize_filter(filter, 0.0), kept)
    dropped = convolution.normalize_filter(filter, 0.25)
    assert ((dropped == 0) | torch.isclose(dropped, kept / 0.75)).all()
    mean = tolerances.DROPOUT_MEAN
    torch.testing.assert_close(dropped.mean(0), kept[0], atol=0, rtol=mean)
    assert (convolution.normalize_filter(filter, 1.0) == 0).all()


# --- Nothing leaks -------------------------------------------------------------------------------

FORMULATIONS = {  # op, kernel size, filters; how it is run
    "depthwise": ("depthwise", 4, "D/2"),
    "lightweight": ("lightweight", 9, "2"),
    "dynamic": ("dynamic", 7, "2"),
    "dynamic in chunks": ("dynamic", 4, "D"),
    "dynamic in bands": ("dynamic", 15, "2"),
    "depthwise compiled": ("depthwise", 4, "D/2"),
    "dynamic compiled": ("dynamic", 7, "2"),
}


def _formulation(name, monkeypatch, hidden):
    op, kernel_size, filters = FORMULATIONS[name]
    monkeypatch.setattr(convolution, "_CHUNK_ELEMENTS", 2 * kernel_size * D_MODEL * 5)
    if "compiled" in name:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    case = Case(kernel_size, "129", 1, filters, "block", "centred", hidden)
    arrays, _ = _inputs(op, case)
    return op, case, {name: torch.tensor(a).requires_grad_() for name, a in arrays.items()}


def _examples(case):
    """(B, L): which example each token belongs to, 0 for padding."""
    mask, segments = _hidden(case)
    examples = torch.ones(2, case.L).long() if segments is None else segments
    return examples if mask is None else examples * mask


@pytest.mark.parametrize("hidden", ["padding", "segments", "both"])
@pytest.mark.parametrize("name", FORMULATIONS)
def test_gradients_of_other_examples_and_padding_are_exactly_zero(name, hidden, monkeypatch):
    op, case, leaves = _formulation(name, monkeypatch, hidden)
    y = _call(convolution, op, case, leaves)
    examples = _examples(case)
    for example in examples.unique()[examples.unique() > 0]:
        loss = y[examples == example].square().sum()
        tokens = [leaves[key] for key in ("x", "source") if key in leaves]
        for gradient in torch.autograd.grad(loss, tokens, retain_graph=True):
            assert (gradient[examples != example] == 0).all()
            assert (gradient[examples == example] != 0).all(-1).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("hidden", ["padding", "segments", "both"])
@pytest.mark.parametrize("name", FORMULATIONS)
def test_what_others_hold_changes_no_bit(name, hidden, value, monkeypatch):
    """Neither the outputs of an example nor the gradients of its own tokens."""
    op, case, leaves = _formulation(name, monkeypatch, hidden)
    examples = _examples(case)
    own = examples == (1 if hidden == "padding" else 2)
    results = []
    for fill in (False, True):
        inputs = dict(leaves)
        for key in leaves.keys() & {"x", "source"}:
            inputs[key] = leaves[key].detach().masked_fill(~own[:, :, None] & fill, value)
        with torch.no_grad():
            results.append([_call(convolution, op, case, inputs)[own]])
        if hidden != "segments" and "source" in inputs:
            # A hidden position still has an output, whose filter carries its gradient.
            inputs["source"] = leaves["source"].detach()
        tokens = [inputs[key].requires_grad_() for key in ("x", "source") if key in inputs]
        y = _call(convolution, op, case, inputs)[own]
        gradients = torch.autograd.grad(y.square().sum(), tokens)
        results[-1] += [gradient[own] for gradient in gradients]
    for clean, filled in zip(*results, strict=True):
        assert torch.equal(clean, filled)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_causal_windows_do_not_see_the_future(name, monkeypatch):
    op, case, leaves = _formulation(name, monkeypatch, "nothing")
    case = case._replace(window="causal")
    y = _call(convolution, op, case, leaves)
    gradient = torch.autograd.grad(y[:, :60].square().sum(), leaves["x"])[0]
    assert (gradient[:, 60:] == 0).all() and (gradient[:, :60] != 0).all()
    with torch.no_grad():
        leaves["x"][:, 60:] = 7.0
    assert torch.equal(_call(convolution, op, case, leaves)[:, :60], y[:, :60])


# --- Step by step --------------------------------------------------------------------------------


@pytest.mark.parametrize("dilation", FACTORS.dilation)
@pytest.mark.parametrize("kernel_size", FACTORS.kernel_size)
@pytest.mark.parametrize("op", OPS)
def test_steps_of_any_size_are_the_whole_row(op, kernel_size, dilation):
    case = Case(kernel_size, "129", dilation, "2", "strided", "causal", "nothing")
    tensors = {name: torch.tensor(array) for name, array in _inputs(op, case)[0].items()}
    tensors |= {name: tensors[name][:, :40] for name in ("x", "source") if name in tensors}
    x, whole = tensors["x"], _call(reference, op, case, tensors)
    if op == "dynamic":
        predictor = tensors["source"], tensors["weight"], tensors["bias"], kernel_size
        filter = convolution.predict_filter(*predictor)
    else:
        filter = tensors["filter"]
        filter = filter if op == "depthwise" else convolution.normalize_filter(filter)
    limit = {"atol": tolerances.BETWEEN_FORMULATIONS, "rtol": 0}
    for prompt, step in itertools.product((0, 1, 17), (1, 2, 5, kernel_size, kernel_size + 3)):
        pieces = [whole[:, :prompt]]
        state = convolution.next_conv_state(x[:, :prompt], (kernel_size - 1) * dilation)
        for start in range(prompt, x.shape[1], step):
            new = slice(start, start + step)
            taps = filter[:, new] if op == "dynamic" else filter
            y, state = convolution.conv_step(x[:, new], state, taps, dilation, "strided")
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **limit)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_the_loop(dtype, tokens):
    """Also where the state is longer than the taps reach: left_taps of more than K - 1."""
    x, state = torch.randn(2, tokens, 8), torch.randn(2, 10, 8)
    x, state, filter = (t.to(DTYPES[dtype]) for t in (x, state, torch.randn(2, tokens, 4, 3)))
    y, next_state = convolution.conv_step(x, state, filter, 2)
    assert y.dtype == x.dtype and next_state.dtype == x.dtype
    expected, expected_state = reference.conv_step(x.double(), state.double(), filter.double(), 2)
    _assert_close(y, expected.numpy(), tolerances.CONVOLUTION[dtype], "step")
    assert torch.equal(next_state.double(), expected_state)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("state_length", [0, 1, 3, 12])
def test_the_state_after_a_row_is_its_end(length, state_length):
    x = torch.randn(2, length, 3)
    rows = torch.cat([torch.zeros(2, state_length, 3), x], dim=1)
    assert torch.equal(convolution.next_conv_state(x, state_length), rows[:, length:])


# --- Layouts, modes and limits -------------------------------------------------------------------


@pytest.mark.parametrize("what", FEW)
def test_any_strides(what):
    op, case = what.split()[0], FEW[what]
    tensors = {name: torch.tensor(array) for name, array in _inputs(op, case)[0].items()}
    transposed = {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in tensors.items()}
    sliced = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in tensors.items()}
    expected = _call(convolution, op, case, tensors)
    for layout in (transposed, sliced):
        leaves = {name: t.requires_grad_() for name, t in layout.items()}
        y = _call(convolution, op, case, leaves)
        tolerance = tolerances.BETWEEN_FORMULATIONS
        torch.testing.assert_close(y, expected, atol=tolerance, rtol=0)
        y.sum().backward()  # a gradient that is expanded, of stride 0


@pytest.mark.parametrize("what", FEW)
def test_a_batch_of_no_rows(what):
    op, case = what.split()[0], FEW[what]
    tensors = {name: torch.tensor(array) for name, array in _inputs(op, case)[0].items()}
    tensors |= {name: tensors[name][:0] for name in ("x", "source") if name in tensors}
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    y = _call(convolution, op, case, leaves)
    assert y.shape == (0, case.L, D_MODEL)
    y.sum().backward()
    for name in leaves.keys() - {"x", "source"}:
        assert (leaves[name].grad == 0).all()


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_the_sums_in_float32(op):
    case = Case(7, "129", 1, "2", "block", "centred", "segments")
    arrays, _ = _inputs(op, case)
    tensors = {name: torch.tensor(array).float() for name, array in arrays.items()}
    y = _call(convolution, op, case, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = _call(convolution, op, case, tensors)
    assert under_autocast.dtype == torch.float32
    if op == "dynamic":  # the filter's projection is a dense product, which autocast is for
        tolerance = tolerances.DYNAMIC_VALUES["bfloat16"]
        _assert_close(under_autocast, y.numpy(), tolerance, "under autocast")
    else:
        assert torch.equal(under_autocast, y)


def test_meta_tensors_give_shapes():
    x = torch.empty(2, 9, D_MODEL, device="meta")
    filter = torch.empty(2, 7, device="meta")
    weight = torch.empty(14, D_MODEL, device="meta")
    assert convolution.lightweight_conv(x, filter, 3).shape == x.shape
    assert convolution.dynamic_conv(x, x, weight, None, 7, 3).shape == x.shape


def test_second_derivatives_are_right_or_refused():
    x, filter = torch.randn(1, 4, 4).double(), torch.randn(2, 3).double()
    inputs = (x.requires_grad_(), filter.requires_grad_())
    assert torch.autograd.gradgradcheck(partial(convolution.lightweight_conv, left_taps=1), inputs)
    segments = torch.ones(1, 4).long()
    y = convolution.lightweight_conv(x, filter, 1, segment_ids=segments)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# In units of x, without the inputs. Held for backward: the output is 1, filters (B, L, F, K) add
# F * K / D. At the peak, in backward: the output, the gradients of x by both ways, one tap's
# products; and where F = D, a chunk's filters and their gradients, each 1 in the shorter row.
MEMORY = {
    "lightweight": (2, 1.01, 2.1),
    "dynamic, F << D": (2, 1.06, 4.1),
    "dynamic, F = D": (256, 1.01, 7.0),
}


@pytest.mark.parametrize("what", MEMORY)
def test_memory_is_linear_and_holds_no_tap_per_channel(what, monkeypatch):
    """Of size (B, L, K, D) would be 7 times x."""
    filters, held, peak = MEMORY[what]
    monkeypatch.setattr(convolution, "_CHUNK_ELEMENTS", 4 * 64 * 256 * 7)  # 64 of the positions
    op = what.split(",")[0]
    measured = []
    for length in (512, 1024):
        memory = measure_memory(op, 4, length, 256, filters, 7)
        assert memory.held <= held and memory.peak <= peak, memory
        measured.append(memory)
    assert measured[1].peak <= 1.02 * measured[0].peak, "more than linear in the length"


# --- Errors --------------------------------------------------------------------------------------

X = torch.zeros(2, 5, 8)
X_IS = "convolution: x has shape {} and dtype {}, expected (B, L, D) in floating point."
FILTER_IS = (
    "convolution: filter has shape {}, expected (F, K) or (B, L, F, K) with (B, L) = (2, 5), "
    "K >= 1 and F a divisor of D = 8."
)
TOKENS_ARE = "convolution: {} has shape {}, expected (B, L) = (2, 5), one entry per token of x."
WINDOW_IS = "convolution: left_taps={} and dilation={}, expected left_taps >= 0 and dilation >= 1."
ERRORS = {
    "x without a length": ({"x": X[0]}, X_IS.format("(5, 8)", "torch.float32")),
    "x of integers": ({"x": X.long()}, X_IS.format("(2, 5, 8)", "torch.int64")),
    "F does not divide D": ({"filter": torch.zeros(3, 4)}, FILTER_IS.format("(3, 4)")),
    "filter without taps": ({"filter": torch.zeros(2, 0)}, FILTER_IS.format("(2, 0)")),
    "filter a row of taps": ({"filter": torch.zeros(4)}, FILTER_IS.format("(4,)")),
    "left_taps -1": ({"left_taps": -1}, WINDOW_IS.format(-1, 1)),
    "dilation 0": ({"dilation": 0}, WINDOW_IS.format(1, 0)),
    "sharing misspelt": (
        {"sharing": "stride"},
        "convolution: sharing='stride', expected 'block' or 'strided'.",
    ),
    "mask too short": (
        {"attention_mask": torch.ones(2, 4)},
        TOKENS_ARE.format("attention_mask", "(2, 4)"),
    ),
    "mask of attention's shape": (
        {"attention_mask": torch.ones(2, 1, 1, 5)},
        TOKENS_ARE.format("attention_mask", "(2, 1, 1, 5)"),
    ),
    "segments of one row": (
        {"segment_ids": torch.ones(5).long()},
        TOKENS_ARE.format("segment_ids", "(5,)"),
    ),
    "segments as floats": (
        {"segment_ids": torch.ones(2, 5)},
        "convolution: segment_ids has dtype torch.float32, expected integers: 1, 2, ... for the "
        "packed examples, 0 for padding.",
    ),
}
WEIGHT_IS = "dynamic_conv: weight has shape {}, expected (F * K, 8) with K = kernel_size = 4."
DYNAMIC_ERRORS = {
    "weight not of whole filters": ({"weight": torch.zeros(7, 8)}, WEIGHT_IS.format("(7, 8)")),
    "weight for another d_model": ({"weight": torch.zeros(8, 6)}, WEIGHT_IS.format("(8, 6)")),
    "no taps": ({"kernel_size": 0}, "dynamic_conv: kernel_size=0, expected 1 or more."),
    "bias of another length": (
        {"bias": torch.zeros(4)},
        "dynamic_conv: bias has shape (4,), expected (8,), one entry per row of weight.",
    ),
    "source of another length": (
        {"source": X[:, :4]},
        "dynamic_conv: source has shape (2, 4, 8), expected that of x, (2, 5, 8).",
    ),
    "F does not divide D": ({"weight": torch.zeros(12, 8)}, FILTER_IS.format("(3, 4)")),
}


@pytest.mark.parametrize("op", ["depthwise", "lightweight"])
@pytest.mark.parametrize("wrong", ERRORS)
def test_errors_name_the_value_and_what_is_expected(wrong, op):
    changes, message = ERRORS[wrong]
    with pytest.raises(ValueError) as error:
        arguments = {"x": X, "filter": torch.zeros(2, 4), "left_taps": 1} | changes
        getattr(convolution, f"{op}_conv")(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("wrong", DYNAMIC_ERRORS)
def test_errors_of_predicted_filters(wrong):
    changes, message = DYNAMIC_ERRORS[wrong]
    arguments = {"x": X, "source": X, "weight": torch.zeros(8, 8), "bias": None, "kernel_size": 4}
    with pytest.raises(ValueError) as error:
        convolution.dynamic_conv(**arguments | changes, left_taps=1)
    assert str(error.value) == message


def test_a_step_refuses_a_state_shorter_than_its_taps_reach():
    with pytest.raises(ValueError) as error:
        convolution.conv_step(X, X[:, :3], torch.zeros(2, 4), dilation=2)
    assert str(error.value) == (
        "conv_step: conv_state has shape (2, 3, 8), expected (B, S, D) with "
        "S >= (K - 1) * dilation = 6."
    )
