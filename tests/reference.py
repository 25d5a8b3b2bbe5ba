r"""The convolution as plain loops: what every implementation is held to.

    y[b, t, c] = sum_{i = 0 .. K-1}  w[b, t, f(c), i] * x[b, t + (i - left_taps) * dilation, c]

Positions outside the row, in padding or in another segment count as zero. In PyTorch and float64
for the sake of autograd; `values_and_gradients` hands NumPy arrays to and fro, so that
implementations in other frameworks are held to the same loops.

Shapes: B batch, L length, D d_model, F num_filters, K kernel_size, T new tokens.
"""

from collections.abc import Callable

import numpy as np
import torch


def depthwise_conv(
    x, filter, left_taps, dilation=1, sharing="block", attention_mask=None, segment_ids=None
):
    """The filter (F, K) is the same at every position, or (B, L, F, K) gives each its own."""
    _, length, channels = x.shape
    filters, kernel_size = filter.shape[-2:]
    filter_of_channel = [
        c // (channels // filters) if sharing == "block" else c % filters for c in range(channels)
    ]
    for tokens in (attention_mask, segment_ids):
        if tokens is not None:
            x = torch.where((tokens != 0)[:, :, None], x, 0.0)
    inputs = x.unbind(1)
    taps = filter.expand(len(x), length, filters, kernel_size)[:, :, filter_of_channel]
    taps = [at_t.unbind(-1) for at_t in taps.unbind(1)]
    outputs = []
    for t in range(length):
        y = torch.zeros_like(x[:, 0])
        for i in range(kernel_size):
            s = t + (i - left_taps) * dilation
            if not 0 <= s < length:
                continue
            term = taps[t][i] * inputs[s]
            if segment_ids is not None:
                same_segment = segment_ids[:, s] == segment_ids[:, t]
                term = torch.where(same_segment[:, None], term, 0.0)
            y = y + term
        outputs.append(y)
    return torch.stack(outputs, dim=1)


def lightweight_conv(x, filter, *window):
    """`window`: left_taps, dilation, sharing, attention_mask, segment_ids."""
    return depthwise_conv(x, softmax_over_taps(filter), *window)


def dynamic_conv(x, source, weight, bias, kernel_size, *window):
    return depthwise_conv(x, predict_filter(source, weight, bias, kernel_size), *window)


def predict_filter(source, weight, bias, kernel_size):
    """Row f * K + i of the weight predicts tap i of filter f."""
    logits = torch.stack([source @ row for row in weight.unbind(0)], dim=-1)
    if bias is not None:
        logits = logits + bias
    return softmax_over_taps(logits.unflatten(-1, (-1, kernel_size)))


def softmax_over_taps(filter):
    exponentials = (filter - filter.detach().amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def conv_step(x, conv_state, filter, dilation=1, sharing="block"):
    """New tokens x (B, T, D) after the state (B, S, D): the outputs of the last T positions."""
    seen = torch.cat([conv_state, x], dim=1)
    new = x.shape[1]
    if filter.dim() == 4:  # the earlier positions' filters do not matter
        filter = torch.cat([filter[:, :1].expand(-1, conv_state.shape[1], -1, -1), filter], dim=1)
    y = depthwise_conv(seen, filter, conv_state.shape[1] // dilation, dilation, sharing)
    return y[:, -new:], seen[:, new:]


def values_and_gradients(
    function: Callable, inputs: dict[str, np.ndarray], grad_output: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output of `function(**inputs)` and the gradient of each input, in float64."""
    leaves = {
        name: torch.tensor(np.asarray(array, dtype=np.float64), requires_grad=True)
        for name, array in inputs.items()
    }
    y = function(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), torch.as_tensor(grad_output).double())
    return y.detach().numpy(), {
        name: gradient.numpy() for name, gradient in zip(leaves, gradients, strict=True)
    }
