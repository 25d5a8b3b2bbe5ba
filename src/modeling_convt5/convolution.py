r"""The convolution that takes the place of self-attention (PyTorch).

With x of shape (B, L, D), a filter w with K taps, l of them left of the current position, and f(c)
the filter that channel c uses, every op here computes

    y[b, t, c] = sum_{i = 0 .. K-1}  w[f(c), i] * x[b, t + (i - l) * dilation, c]

where positions outside the row, in padding or in another segment count as zero.

    depthwise    w is the parameter itself                          (Tay et al. 2021, section 3.1.1)
    lightweight  w is softmax-normalised over its K taps            (section 3.1.2)
    dynamic      w[b, t] is predicted from position t, then softmax (section 3.1.3)

f(c) = c // (D / F) with sharing "block" (the paper; Wu et al. 2019 call F the heads) and
f(c) = c mod F with sharing "strided" (the paper's released code). Softmax and sums are taken in
float32 for half-precision inputs; the result has the dtype of x.

Which formulation runs is chosen once, in `_convolve`, from shapes and `is_compiling()` alone.

Shapes: B batch, L length, D d_model, F num_filters, C = D / F channels of a filter, K kernel_size,
S state length = left_taps * dilation, T a number of new tokens in decoding.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Measured on CPU (benchmarks/results): from this kernel size on, block-banded products beat one
# pass over the input per tap for predicted filters.
_BAND_MIN_KERNEL_SIZE = 12
_BAND_BLOCK = 32
# Elements of predicted filters that `dynamic_conv` holds at a time when F * K > D (32 MB in fp32).
_CHUNK_ELEMENTS = 2**23


def depthwise_conv(
    x: torch.Tensor,
    filter: torch.Tensor,
    left_taps: int,
    dilation: int = 1,
    sharing: str = "block",
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Depthwise convolution along the length.

    Args:
        x: (B, L, D), floating point.
        filter: (F, K), F a divisor of D; tap 0 is the oldest. (B, L, F, K) for filters of their
            own at every position.
        left_taps: taps left of the current position: K // 2 centres, K - 1 is causal.
        dilation: distance between two taps, in tokens.
        sharing: "block" or "strided", which channels share a filter.
        attention_mask: (B, L), non-zero for tokens; padding is read as zero.
        segment_ids: (B, L), integers >= 1 for the examples packed in a row, 0 for padding.

    Returns:
        (B, L, D) in the dtype of x.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    _check(x, filter.shape, left_taps, dilation, sharing, attention_mask, segment_ids)
    x = hide_padding(x, attention_mask, segment_ids)
    return _convolve(x, filter, left_taps * dilation, dilation, sharing, segment_ids)


def lightweight_conv(
    x: torch.Tensor,
    filter: torch.Tensor,
    left_taps: int,
    dilation: int = 1,
    sharing: str = "block",
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`depthwise_conv` with every filter softmax-normalised over its taps.

    `dropout` is the probability of dropping a normalised tap (DropConnect); the other arguments,
    the result and the errors are those of `depthwise_conv`.
    """
    filter = normalize_filter(filter, dropout)
    return depthwise_conv(x, filter, left_taps, dilation, sharing, attention_mask, segment_ids)


def dynamic_conv(
    x: torch.Tensor,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: int,
    left_taps: int,
    dilation: int = 1,
    sharing: str = "block",
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Convolution whose filters are predicted at every output position, then softmax-normalised.

    Equivalent to filters of shape (B, L, F, K) from `predict_filter`, but where F * K > D they are
    computed and recomputed in chunks along the length, so that memory stays linear in L * D.

    Args:
        x: (B, L, D), the values that are mixed.
        source: (B, L, D), what the filters are predicted from (in ConvT5 the gated input).
        weight: (F * K, D), row f * K + i predicts tap i of filter f.
        bias: (F * K,) or None.
        kernel_size: K.
        left_taps, dilation, sharing, attention_mask, segment_ids, dropout: as in
            `lightweight_conv`.

    Returns:
        (B, L, D) in the dtype of x.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    if kernel_size < 1:
        raise ValueError(f"dynamic_conv: kernel_size={kernel_size}, expected 1 or more.")
    if weight.dim() != 2 or weight.shape[0] % kernel_size or weight.shape[1] != source.shape[-1]:
        raise ValueError(
            f"dynamic_conv: weight has shape {tuple(weight.shape)}, expected (F * K, "
            f"{source.shape[-1]}) with K = kernel_size = {kernel_size}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"dynamic_conv: bias has shape {tuple(bias.shape)}, expected "
            f"{tuple(weight.shape[:1])}, one entry per row of weight."
        )
    if source.shape != x.shape:
        raise ValueError(
            f"dynamic_conv: source has shape {tuple(source.shape)}, expected that of x, "
            f"{tuple(x.shape)}."
        )
    one_filter = (weight.shape[0] // kernel_size, kernel_size)
    _check(x, one_filter, left_taps, dilation, sharing, attention_mask, segment_ids)
    x = hide_padding(x, attention_mask, segment_ids)
    reach = left_taps * dilation

    def convolve(x, source, keys, queries, origin):
        filter = predict_filter(source, weight, bias, kernel_size, dropout)
        return _convolve(x, filter, origin, dilation, sharing, keys, queries)

    batch, length, channels = x.shape
    if weight.shape[0] <= channels:
        return convolve(x, source, segment_ids, segment_ids, reach)
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():
        convolve = partial(checkpoint, convolve, use_reentrant=False)
    if torch.compiler.is_compiling():  # a loop would fix the length, or be unrolled over it
        return convolve(x, source, segment_ids, segment_ids, reach)
    step = max(1, _CHUNK_ELEMENTS // max(1, batch * weight.shape[0]))
    chunks = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        first = max(0, start - reach)
        last = min(length, max(first, stop + (kernel_size - 1) * dilation - reach))
        keys = None if segment_ids is None else segment_ids[:, first:last]
        queries = None if segment_ids is None else segment_ids[:, start:stop]
        origin = reach + first - start
        chunks.append(convolve(x[:, first:last], source[:, start:stop], keys, queries, origin))
    return torch.cat(chunks, dim=1)


def conv_step(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    filter: torch.Tensor,
    dilation: int = 1,
    sharing: str = "block",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution's output for T new tokens, given the S inputs that came before them.

    Args:
        x: (B, T, D), the new inputs.
        conv_state: (B, S, D), the previous inputs, oldest first, zeros before the first token.
        filter: (F, K), or (B, T, F, K) for predicted filters; already normalised.
        dilation, sharing: as in `depthwise_conv`.

    Returns:
        The output (B, T, D) and the new state (B, S, D), both in the dtype of x.

    Raises:
        ValueError: for a state of fewer than (K - 1) * dilation inputs.
    """
    state_length, length = conv_state.shape[1], x.shape[1]
    reach = (filter.shape[-1] - 1) * dilation
    if state_length < reach:
        raise ValueError(
            f"conv_step: conv_state has shape {tuple(conv_state.shape)}, expected (B, S, D) with "
            f"S >= (K - 1) * dilation = {reach}."
        )
    window = torch.cat([conv_state.to(x.dtype), x], dim=1)
    if length > 1:
        y = _shift(window, filter, 0, dilation, sharing, length)
    else:
        dtype = _accumulation_dtype(x)
        taps_BKD = window[:, : reach + 1 : dilation].to(dtype)
        taps = _group(taps_BKD, filter.shape[-2], sharing)
        filter_BKF = filter.to(dtype).reshape(-1, *filter.shape[-2:]).transpose(1, 2)
        y = (taps * _broadcast(filter_BKF, sharing)).sum(1, keepdim=True).reshape(x.shape)
    return y.to(x.dtype), window[:, window.shape[1] - state_length :]


def next_conv_state(x: torch.Tensor, state_length: int) -> torch.Tensor:
    """The `conv_state` after a row x (B, L, D) read from its start: (B, S, D), zero-padded."""
    return F.pad(x, (0, 0, max(0, state_length - x.shape[1]), 0))[:, -state_length or x.shape[1] :]


def normalize_filter(filter: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Softmax over the taps, in float32 or wider, then DropConnect: (..., K) -> (..., K)."""
    filter = torch.softmax(filter, dim=-1, dtype=_accumulation_dtype(filter))
    return F.dropout(filter, dropout) if dropout else filter


def predict_filter(
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Normalised filters (B, L, F, K) predicted from source (B, L, D); see `dynamic_conv`."""
    return normalize_filter(
        F.linear(source, weight, bias).unflatten(-1, (-1, kernel_size)), dropout
    )


def hide_padding(
    x: torch.Tensor, attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """x (B, L, D) with every padded position set to exactly zero, whatever it held."""
    for tokens in (attention_mask, segment_ids):
        if tokens is not None:
            x = x.masked_fill((tokens == 0)[:, :, None], 0.0)
    return x


def _convolve(x, filter, origin, dilation, sharing, keys=None, queries=None):
    """Choose the formulation. Tap i of output t reads x[t + i * dilation - origin].

    `keys` and `queries` are the segment ids of the inputs and outputs; queries default to keys.
    """
    queries = keys if queries is None else queries
    kernel_size, predicted = filter.shape[-1], filter.dim() == 4
    length = filter.shape[1] if predicted else x.shape[1]
    # The sums are float32 by construction; autocast would put them back into half precision.
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():
            return _shift(x, filter, origin, dilation, sharing, length, keys, queries)
        if not predicted and keys is None:
            return _conv2d(x, filter, origin, dilation, sharing)
        wide = kernel_size >= _BAND_MIN_KERNEL_SIZE and filter.shape[-2] < x.shape[-1]
        if predicted and keys is None and dilation == 1 and wide:
            return _BandConvolution.apply(x, filter, origin, sharing)
        return _ShiftConvolution.apply(x, filter, keys, queries, origin, dilation, sharing)


def _conv2d(x, filter, origin, dilation, sharing):
    """One filter per channel through the library's depthwise kernel.

    A 2-D convolution over (B, D, L, 1) with channels-last strides takes (B, L, D) as it lies in
    memory, where a 1-D convolution would transpose it. The permutation below yields such strides
    for the last dimension as well, `transpose(1, 2).unsqueeze(-1)` does not and is copied.
    """
    batch, length, channels = x.shape
    kernel_size = filter.shape[-1]
    dtype = _accumulation_dtype(x)
    repeats = channels // filter.shape[0]
    filter = filter.to(dtype)
    if sharing == "block":
        filter = filter.repeat_interleave(repeats, dim=0)
    else:
        filter = filter.repeat(repeats, 1)
    padding = max(origin, (kernel_size - 1) * dilation - origin)
    y = F.conv2d(
        x.to(dtype).unsqueeze(2).permute(0, 3, 1, 2),
        filter[:, None, :, None],
        padding=(padding, 0),
        dilation=(dilation, 1),
        groups=channels,
    )
    start = padding - origin
    return y.squeeze(-1)[:, :, start : start + length].transpose(1, 2).to(x.dtype)


def _shift(x, filter, origin, dilation, sharing, length, keys=None, queries=None):
    """One shifted product per tap, in plain operations: what a compiler fuses into one pass."""
    kernel_size = filter.shape[-1]
    dtype = _accumulation_dtype(x)
    right = length + (kernel_size - 1) * dilation - origin - x.shape[1]
    window = F.pad(x, (0, 0, origin, right))
    if keys is not None:
        keys = F.pad(keys, (origin, right))
    y = None
    for i, tap in enumerate(filter.to(dtype).unbind(-1)):
        start = i * dilation
        inputs = window[:, start : start + length].to(dtype)
        if keys is not None:
            other = keys[:, start : start + length] != queries
            inputs = inputs.masked_fill(other[:, :, None], 0.0)
        term = _group(inputs, tap.shape[-1], sharing) * _broadcast(tap, sharing)
        y = term if y is None else y + term
    return y.flatten(2).to(x.dtype)


class _ShiftConvolution(torch.autograd.Function):
    """`_shift` with a backward that saves nothing but its inputs and allocates no (L, K, D)."""

    @staticmethod
    def forward(ctx, x, filter, keys, queries, origin, dilation, sharing):
        ctx.save_for_backward(x, filter, keys, queries)
        ctx.window = origin, dilation, sharing
        length = filter.shape[1] if filter.dim() == 4 else x.shape[1]
        inputs, taps, _ = _operands(x, filter, sharing)
        y = inputs.new_zeros(x.shape[0], length, *inputs.shape[2:])
        for i, read, write in _overlaps(x.shape[1], length, filter.shape[-1], origin, dilation):
            seen = inputs[:, read]
            if keys is not None:
                other = keys[:, read] != queries[:, write]
                seen = seen.masked_fill(other[:, :, None, None], 0.0)
            y[:, write].addcmul_(seen, _at(taps, i, write))
        return y.flatten(2).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, filter, keys, queries = ctx.saved_tensors
        origin, dilation, sharing = ctx.window
        length = grad_output.shape[1]
        inputs, taps, channel_dim = _operands(x, filter, sharing)
        grad_y = _group(grad_output.to(inputs.dtype), filter.shape[-2], sharing)
        grad_inputs = torch.zeros_like(inputs) if ctx.needs_input_grad[0] else None
        grad_filter = torch.zeros_like(filter, dtype=inputs.dtype)
        for i, read, write in _overlaps(x.shape[1], length, filter.shape[-1], origin, dilation):
            grad, tap = grad_y[:, write], _at(taps, i, write)
            other = None if keys is None else (keys[:, read] != queries[:, write])[:, :, None]
            if grad_inputs is not None and other is None:
                grad_inputs[:, read].addcmul_(grad, tap)
            elif grad_inputs is not None:
                grad_inputs[:, read] += (grad * tap).masked_fill_(other[..., None], 0.0)
            if ctx.needs_input_grad[1]:
                product = (grad * inputs[:, read]).sum(channel_dim)
                if other is not None:
                    product = product.masked_fill_(other, 0.0)
                if filter.dim() == 4:
                    grad_filter[:, write, :, i] = product
                else:
                    grad_filter[:, i] = product.sum((0, 1))
        grad_x = None if grad_inputs is None else grad_inputs.flatten(2).to(x.dtype)
        return grad_x, grad_filter.to(filter.dtype), None, None, None, None, None


class _BandConvolution(torch.autograd.Function):
    """Predicted filters of long kernels as batched products with a banded matrix per block.

    A block of 32 outputs is (32, 32 + K - 1) x (32 + K - 1, C): dense arithmetic on a band that is
    mostly full, in place of K passes over the input. Dilation 1, no segments.
    """

    @staticmethod
    def forward(ctx, x, filter, origin, sharing):
        ctx.save_for_backward(x, filter)
        ctx.window = origin, sharing
        y = _band(filter, x) @ _band_windows(x, filter, origin, sharing)
        return _unblock(y, filter.shape[1], sharing).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, filter = ctx.saved_tensors
        origin, sharing = ctx.window
        length, kernel_size = filter.shape[1], filter.shape[-1]
        grad_y = grad_output.to(_accumulation_dtype(x))
        blocks = -(-length // _BAND_BLOCK)
        grad_y = F.pad(grad_y, (0, 0, 0, blocks * _BAND_BLOCK - length))
        grad_y = grad_y.unflatten(1, (blocks, _BAND_BLOCK))
        grad_y = _by_filter(grad_y, filter.shape[-2], sharing)
        grad_x = grad_filter = None
        if ctx.needs_input_grad[1]:
            grad_band = grad_y @ _band_windows(x, filter, origin, sharing).transpose(-1, -2)
            grad_filter = _diagonals(grad_band, kernel_size).permute(0, 1, 3, 2, 4)
            grad_filter = grad_filter.flatten(1, 2)[:, :length].to(filter.dtype)
        if ctx.needs_input_grad[0]:
            grad_windows = _band(filter, x).transpose(-1, -2) @ grad_y
            pieces = -(-grad_windows.shape[-2] // _BAND_BLOCK)
            batch, channels = x.shape[0], x.shape[-1]
            folded = grad_y.new_zeros(batch, blocks + pieces, _BAND_BLOCK, channels)
            for j in range(pieces):
                piece = grad_windows[..., j * _BAND_BLOCK : (j + 1) * _BAND_BLOCK, :]
                rows = piece.shape[-2]
                folded[:, j : j + blocks, :rows] += _to_rows(piece, sharing)
            folded = folded.flatten(1, 2)
            tail = max(0, origin + x.shape[1] - folded.shape[1])
            grad_x = F.pad(folded, (0, 0, 0, tail))[:, origin : origin + x.shape[1]].to(x.dtype)
        return grad_x, grad_filter, None, None


def _band(filter, x):
    """Filters (B, L, F, K) as bands (B, blocks, F, 32, 32 + K - 1); row r starts in column r."""
    filter = filter.to(_accumulation_dtype(x))
    batch, length, filters, kernel_size = filter.shape
    blocks = -(-length // _BAND_BLOCK)
    filter = F.pad(filter, (0, 0, 0, 0, 0, blocks * _BAND_BLOCK - length))
    filter = filter.unflatten(1, (blocks, _BAND_BLOCK)).transpose(2, 3)
    width = _BAND_BLOCK + kernel_size - 1
    band = filter.new_zeros(batch, blocks, filters, _BAND_BLOCK, width)
    _diagonals(band, kernel_size).copy_(filter)
    return band


def _diagonals(band, kernel_size):
    """The taps of a band (..., 32, 32 + K - 1) as a view (..., 32, K)."""
    band = band.contiguous()
    *outer, row, column = band.stride()
    size = (*band.shape[:-1], kernel_size)
    return band.as_strided(size, (*outer, row + column, column))


def _band_windows(x, filter, origin, sharing):
    """The inputs that each block of outputs reads: (B, blocks, F, 32 + K - 1, C)."""
    length, filters, kernel_size = filter.shape[1:]
    blocks = -(-length // _BAND_BLOCK)
    span = blocks * _BAND_BLOCK + kernel_size - 1
    x = F.pad(x.to(_accumulation_dtype(x)), (0, 0, origin, span - origin - x.shape[1]))
    batch, _, channels = x.shape
    size = (batch, blocks, _BAND_BLOCK + kernel_size - 1, channels)
    windows = x.as_strided(size, (x.stride(0), _BAND_BLOCK * x.stride(1), x.stride(1), x.stride(2)))
    return _by_filter(windows, filters, sharing)


def _by_filter(rows, filters, sharing):
    """(B, blocks, rows, D) -> (B, blocks, F, rows, C)."""
    if sharing == "block":
        return rows.unflatten(-1, (filters, -1)).permute(0, 1, 3, 2, 4)
    return rows.unflatten(-1, (-1, filters)).permute(0, 1, 4, 2, 3)


def _to_rows(grouped, sharing):
    """(B, blocks, F, rows, C) -> (B, blocks, rows, D), the inverse of `_by_filter`."""
    order = (0, 1, 3, 2, 4) if sharing == "block" else (0, 1, 3, 4, 2)
    return grouped.permute(order).flatten(3)


def _unblock(grouped, length, sharing):
    return _to_rows(grouped, sharing).flatten(1, 2)[:, :length]


def _operands(x, filter, sharing):
    """x grouped by filter, the filter in the accumulation dtype, and the dimension of C."""
    dtype = _accumulation_dtype(x)
    inputs = _group(x.to(dtype), filter.shape[-2], sharing)
    taps = _broadcast_taps(filter.to(dtype), sharing)
    return inputs, taps, -1 if sharing == "block" else -2


def _group(x, filters, sharing):
    """(B, L, D) -> (B, L, F, C) for block sharing, (B, L, C, F) for strided."""
    return x.unflatten(-1, (filters, -1) if sharing == "block" else (-1, filters))


def _broadcast(tap, sharing):
    """(..., F) -> a shape that multiplies grouped inputs."""
    return tap.unsqueeze(-1 if sharing == "block" else -2)


def _broadcast_taps(filter, sharing):
    """(F, K) or (B, L, F, K) -> taps first, each of a shape that multiplies grouped inputs."""
    return _broadcast(filter.movedim(-1, 0), sharing)


def _at(taps, i, write):
    tap = taps[i]
    return tap[:, write] if tap.dim() == 4 else tap


def _overlaps(input_length, length, kernel_size, origin, dilation):
    """(tap, input slice, output slice) for each tap that reads inside the row at all."""
    for i in range(kernel_size):
        offset = i * dilation - origin
        start, stop = max(0, -offset), min(length, input_length - offset)
        if start < stop:
            yield i, slice(start + offset, stop + offset), slice(start, stop)


def _accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(x, shape, left_taps, dilation, sharing, attention_mask, segment_ids):
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f"convolution: x has shape {tuple(x.shape)} and dtype {x.dtype}, expected (B, L, D) "
            "in floating point."
        )
    positions = () if len(shape) == 2 else x.shape[:2]
    fits = len(shape) in (2, 4) and shape[:-2] == positions
    if not fits or min(shape[-2:]) < 1 or x.shape[-1] % shape[-2]:
        raise ValueError(
            f"convolution: filter has shape {tuple(shape)}, expected (F, K) or (B, L, F, K) "
            f"with (B, L) = {tuple(x.shape[:2])}, K >= 1 and F a divisor of D = {x.shape[-1]}."
        )
    if left_taps < 0 or dilation < 1:
        raise ValueError(
            f"convolution: left_taps={left_taps} and dilation={dilation}, expected left_taps >= 0 "
            "and dilation >= 1."
        )
    if sharing not in ("block", "strided"):
        raise ValueError(f"convolution: sharing={sharing!r}, expected 'block' or 'strided'.")
    for name, value in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if value is not None and value.shape != x.shape[:2]:
            raise ValueError(
                f"convolution: {name} has shape {tuple(value.shape)}, expected (B, L) = "
                f"{tuple(x.shape[:2])}, one entry per token of x."
            )
    if segment_ids is not None and (segment_ids.is_floating_point() or segment_ids.is_complex()):
        raise ValueError(
            f"convolution: segment_ids has dtype {segment_ids.dtype}, expected integers: 1, 2, ... "
            "for the packed examples, 0 for padding."
        )
