r"""The convolution that takes the place of self-attention (JAX), the twin of convolution.py.

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

A shifted product per tap, which XLA fuses into one pass over the input. The gradient of the
filters, which it would not fuse, is written out: nothing of size (L, K, D) is ever stored.

Shapes: B batch, L length, D d_model, F num_filters, C = D / F channels of a filter, K kernel_size,
S state length = left_taps * dilation, T a number of new tokens in decoding.
"""

from functools import partial

try:  # in a `try`, or transformers would ask PyTorch's users to install JAX
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError("ConvT5 in Flax needs JAX and Flax: pip install jax flax") from error

# Rows of a block whose gradients of the filters are one product.
_BAND_BLOCK = 32
# Elements of predicted filters that `dynamic_conv` holds at a time when F * K > D (32 MB in fp32).
_CHUNK_ELEMENTS = 2**23


def depthwise_conv(
    x: jax.Array,
    filter: jax.Array,
    left_taps: int,
    dilation: int = 1,
    sharing: str = "block",
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
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
    _check(x, filter, left_taps, dilation, sharing, attention_mask, segment_ids)
    x = hide_padding(x, attention_mask, segment_ids)
    return _convolve(left_taps * dilation, dilation, sharing, x, filter, segment_ids, segment_ids)


def lightweight_conv(
    x: jax.Array,
    filter: jax.Array,
    left_taps: int,
    dilation: int = 1,
    sharing: str = "block",
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """`depthwise_conv` with every filter softmax-normalised over its taps.

    `dropout` is the probability of dropping a normalised tap (DropConnect), drawn from
    `dropout_rng`; the other arguments, the result and the errors are those of `depthwise_conv`.
    """
    filter = normalize_filter(filter, dropout, dropout_rng)
    return depthwise_conv(x, filter, left_taps, dilation, sharing, attention_mask, segment_ids)


def dynamic_conv(
    x: jax.Array,
    source: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    kernel_size: int,
    left_taps: int,
    dilation: int = 1,
    sharing: str = "block",
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Convolution whose filters are predicted at every output position, then softmax-normalised.

    Equivalent to filters of shape (B, L, F, K) from `predict_filter`, but where F * K > D they are
    computed and recomputed in chunks along the length, so that memory stays linear in L * D.

    Args:
        x: (B, L, D), the values that are mixed.
        source: (B, L, D), what the filters are predicted from (in ConvT5 the gated input).
        weight: (F * K, D), row f * K + i predicts tap i of filter f.
        bias: (F * K,) or None.
        kernel_size: K.
        left_taps, dilation, sharing, attention_mask, segment_ids, dropout, dropout_rng: as in
            `lightweight_conv`.

    Returns:
        (B, L, D) in the dtype of x.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    if kernel_size < 1:
        raise ValueError(f"dynamic_conv: kernel_size={kernel_size}, expected 1 or more.")
    if weight.ndim != 2 or weight.shape[0] % kernel_size or weight.shape[1] != source.shape[-1]:
        raise ValueError(
            f"dynamic_conv: weight has shape {weight.shape}, expected (F * K, "
            f"{source.shape[-1]}) with K = kernel_size = {kernel_size}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"dynamic_conv: bias has shape {bias.shape}, expected {weight.shape[:1]}, one entry "
            "per row of weight."
        )
    if source.shape != x.shape:
        raise ValueError(
            f"dynamic_conv: source has shape {source.shape}, expected that of x, {x.shape}."
        )
    one_filter = weight[:, :1].reshape(-1, kernel_size)
    _check(x, one_filter, left_taps, dilation, sharing, attention_mask, segment_ids)
    x = hide_padding(x, attention_mask, segment_ids)
    origin = left_taps * dilation

    def convolve(origin, x, source, keys, queries, dropout_rng):
        filter = predict_filter(source, weight, bias, kernel_size, dropout, dropout_rng)
        return _convolve(origin, dilation, sharing, x, filter, keys, queries)

    if weight.shape[0] <= x.shape[-1]:
        return convolve(origin, x, source, segment_ids, segment_ids, dropout_rng)
    reach = (kernel_size - 1) * dilation
    step = max(1, reach, _CHUNK_ELEMENTS // max(1, x.shape[0] * weight.shape[0]))
    convolve = jax.checkpoint(convolve, static_argnums=(0,))
    if step >= x.shape[1]:
        return convolve(origin, x, source, segment_ids, segment_ids, dropout_rng)
    return _in_chunks(convolve, step, origin, reach, x, source, segment_ids, dropout_rng)


def _in_chunks(convolve, step, origin, reach, x, source, segment_ids, dropout_rng):
    """`convolve` one stretch of `step` outputs after another, each with the inputs it reads."""
    batch, length, channels = x.shape
    count = -(-length // step)
    right = count * step - length
    x = jnp.pad(x, ((0, 0), (origin, right + max(0, reach - origin)), (0, 0)))
    source = jnp.pad(source, ((0, 0), (0, right), (0, 0)))

    def stretches(array, extra):
        """(B, count * step + more, ...) -> (count, B, step + extra, ...), overlapping by extra."""
        array = jnp.pad(array, ((0, 0), (0, step), *((0, 0),) * (array.ndim - 2)))
        whole = array[:, : (count + 1) * step].reshape(batch, count + 1, step, *array.shape[2:])
        overlapping = jnp.concatenate([whole[:, :-1], whole[:, 1:, :extra]], axis=2)
        return jnp.moveaxis(overlapping, 1, 0)

    keys = queries = rngs = None
    if segment_ids is not None:
        sides = (origin, right + max(0, reach - origin))
        keys = stretches(jnp.pad(segment_ids, ((0, 0), sides)), reach)
        queries = stretches(jnp.pad(segment_ids, ((0, 0), (0, right))), 0)
    if dropout_rng is not None:
        rngs = jax.random.split(dropout_rng, count)

    def body(_, stretch):
        return None, convolve(0, *stretch)

    operands = (stretches(x, reach), stretches(source, 0), keys, queries, rngs)
    _, y = jax.lax.scan(body, None, operands)
    return jnp.moveaxis(y, 0, 1).reshape(batch, count * step, channels)[:, :length]


def conv_step(
    x: jax.Array,
    conv_state: jax.Array,
    filter: jax.Array,
    dilation: int = 1,
    sharing: str = "block",
) -> tuple[jax.Array, jax.Array]:
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
    state_length = conv_state.shape[1]
    reach = (filter.shape[-1] - 1) * dilation
    if state_length < reach:
        raise ValueError(
            f"conv_step: conv_state has shape {conv_state.shape}, expected (B, S, D) with "
            f"S >= (K - 1) * dilation = {reach}."
        )
    window = jnp.concatenate([conv_state.astype(x.dtype), x], axis=1)
    y = _shift(0, dilation, sharing, window, filter, None, None, x.shape[1])
    return y, window[:, window.shape[1] - state_length :]


def next_conv_state(x: jax.Array, state_length: int) -> jax.Array:
    """The `conv_state` after a row x (B, L, D) read from its start: (B, S, D), zero-padded."""
    x = jnp.pad(x, ((0, 0), (max(0, state_length - x.shape[1]), 0), (0, 0)))
    return x[:, x.shape[1] - state_length :]


def normalize_filter(
    filter: jax.Array, dropout: float = 0.0, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Softmax over the taps, in float32 or wider, then DropConnect: (..., K) -> (..., K)."""
    filter = jax.nn.softmax(widen(filter), axis=-1)
    return drop(filter, dropout, dropout_rng)


def predict_filter(
    source: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    kernel_size: int,
    dropout: float = 0.0,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Normalised filters (B, L, F, K) predicted from source (B, L, D); see `dynamic_conv`."""
    logits = wide_matmul(source, weight.T)
    if bias is not None:
        logits = logits + bias
    logits = narrow(logits, source.dtype)
    logits = logits.reshape(*logits.shape[:-1], -1, kernel_size)
    return normalize_filter(logits, dropout, dropout_rng)


def hide_padding(
    x: jax.Array, attention_mask: jax.Array | None, segment_ids: jax.Array | None = None
) -> jax.Array:
    """x (B, L, D) with every padded position set to exactly zero, whatever it held."""
    for tokens in (attention_mask, segment_ids):
        if tokens is not None:
            x = jnp.where((tokens != 0)[:, :, None], x, jnp.zeros((), x.dtype))
    return x


def widen(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 if that is what it is."""
    return x.astype(_accumulation_dtype(x))


def narrow(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x rounded to `dtype`, once and for all.

    A cast alone does not hold: where XLA joins operations it goes on with what a bfloat16 would
    have lost, so that results would depend on what is compiled together.
    """
    if dtype == jnp.bfloat16:
        info = jnp.finfo(dtype)
        x = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(dtype)


@jax.custom_vjp
def wide_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y in float32 or wider; the products of its backward pass have the operands' dtype."""
    return jnp.matmul(x, y, preferred_element_type=_accumulation_dtype(x))


def _wide_matmul_backward(operands, gradient):
    _, backward = jax.vjp(jnp.matmul, *operands)
    return backward(gradient.astype(operands[0].dtype))


wide_matmul.defvjp(lambda x, y: (wide_matmul(x, y), (x, y)), _wide_matmul_backward)


def drop(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Dropout: each entry is zero with probability `rate`, the rest is scaled by 1 / (1 - rate).

    Nothing is dropped without `rng`.
    """
    if not rate or rng is None:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _convolve(origin, dilation, sharing, x, filter, keys, queries):
    """Tap i of output t reads x[t + i * dilation - origin], where keys and queries are equal.

    `keys` and `queries` are the segment ids of the inputs and outputs, or None.
    """
    length = filter.shape[1] if filter.ndim == 4 else x.shape[1]
    return _shift(origin, dilation, sharing, x, filter, keys, queries, length)


def _shift(origin, dilation, sharing, x, filter, keys, queries, length):
    """One shifted product per tap."""
    dtype = _accumulation_dtype(x)
    filter = filter.astype(dtype)
    behind = length + (filter.shape[-1] - 1) * dilation - origin
    window, window_keys = _pad(x, origin, behind), _pad(keys, origin, behind)
    y = None
    for i in range(filter.shape[-1]):
        inputs = window[:, i * dilation : i * dilation + length].astype(dtype)
        inputs = _within(inputs, queries, window_keys, i * dilation, length)
        term = inputs * _per_channel(filter[..., i], x.shape[-1], sharing)
        y = term if y is None else y + term
    return narrow(y, x.dtype)


def _convolve_forward(origin, dilation, sharing, x, filter, keys, queries):
    y = _convolve(origin, dilation, sharing, x, filter, keys, queries)
    return y, (x, filter, keys, queries)


def _convolve_backward(origin, dilation, sharing, saved, grad_y):
    """The same passes for the gradients: dx sums over taps, dw over channels (and positions).

    Input s is read by tap i of output s + origin - i * dilation.
    """
    x, filter, keys, queries = saved
    dtype = _accumulation_dtype(x)
    kernel_size, read, written = filter.shape[-1], x.shape[1], grad_y.shape[1]
    reach = (kernel_size - 1) * dilation
    before, behind = max(0, reach - origin), origin + read
    grad_y = grad_y.astype(dtype)
    grads, askers = _pad(grad_y, before, behind), _pad(queries, before, behind)
    taps = filter.astype(dtype)
    taps = _pad(taps, before, behind) if filter.ndim == 4 else taps
    grad_x = None
    for i in range(kernel_size):
        start = before + origin - i * dilation
        grad = _within(grads[:, start : start + read], keys, askers, start, read)
        tap = taps[:, start : start + read, :, i] if filter.ndim == 4 else taps[:, i]
        term = grad * _per_channel(tap, x.shape[-1], sharing)
        grad_x = term if grad_x is None else grad_x + term
    ahead = written + reach - origin
    window = _pad(x, origin, ahead).astype(dtype)
    operands = (grad_y, window, queries, _pad(keys, origin, ahead))
    grad_filter = _filter_gradient(filter.shape, dilation, sharing, *operands)
    return grad_x.astype(x.dtype), grad_filter.astype(filter.dtype), None, None


def _filter_gradient(shape, dilation, sharing, grad_y, window, queries, window_keys):
    """dw[f, i] sums grad_y[t, c] * window[t + i * dilation, c] over c, and over t if not predicted.

    As batched products on blocks of 32 positions, of which dw is the band around the diagonal,
    where that band is no larger than the input; else one tap after another. All taps at once would
    store (L, K, D).
    """
    *positions, filters, kernel_size = shape
    length, channels = grad_y.shape[1:]
    width = _BAND_BLOCK + (kernel_size - 1) * dilation
    if width <= channels // filters:
        grads = _blocks(grad_y, 0)
        bands = _contract(grads, _blocks(window, width - _BAND_BLOCK), filters, sharing)
        if queries is not None:
            asker = _blocks(queries, 0)[:, :, None, :, None]
            same = asker == _blocks(window_keys, width - _BAND_BLOCK)[:, :, None, None, :]
            bands = jnp.where(same, bands, 0)
        taps = _diagonals(bands)[..., ::dilation]  # (B, blocks, F, 32, K)
        taps = jnp.moveaxis(taps, 2, 3).reshape(taps.shape[0], -1, filters, kernel_size)
        return taps[:, :length] if positions else taps.sum((0, 1))

    def one_tap(i):
        inputs = jax.lax.dynamic_slice_in_dim(window, i * dilation, length, axis=1)
        product = grad_y * inputs
        if queries is not None:
            others = jax.lax.dynamic_slice_in_dim(window_keys, i * dilation, length, axis=1)
            product = _within(product, queries, others, 0, length)
        return _per_filter(product if positions else product.sum((0, 1)), filters, sharing)

    return jnp.moveaxis(jax.lax.map(one_tap, jnp.arange(kernel_size)), 0, -1)


def _blocks(x, extra):
    """(B, L or more, ...) -> (B, blocks, 32 + extra, ...): blocks that overlap by `extra`."""
    count = -(-(x.shape[1] - extra) // _BAND_BLOCK)
    ahead = -(-extra // _BAND_BLOCK)
    x = _pad(x, 0, (count + ahead) * _BAND_BLOCK)
    x = x.reshape(x.shape[0], count + ahead, _BAND_BLOCK, *x.shape[2:])
    overlapping = jnp.concatenate([x[:, j : j + count] for j in range(ahead + 1)], axis=2)
    return overlapping[:, :, : _BAND_BLOCK + extra]


def _contract(grads, windows, filters, sharing):
    """Products over the channels of each filter: (B, blocks, F, 32, 32 + extra)."""
    split = (filters, -1) if sharing == "block" else (-1, filters)
    grads = grads.reshape(*grads.shape[:-1], *split)
    windows = windows.reshape(*windows.shape[:-1], *split)
    equation = "bntfc,bnsfc->bnfts" if sharing == "block" else "bntcf,bnscf->bnfts"
    return jnp.einsum(equation, grads, windows, precision=jax.lax.Precision.HIGHEST)


def _diagonals(bands):
    """(..., 32, 32 + extra) -> (..., 32, extra + 1): entry o of row t is column t + o."""
    *outer, rows, width = bands.shape
    skewed = jnp.pad(bands.reshape(*outer, rows * width), ((0, 0),) * len(outer) + ((0, rows),))
    return skewed.reshape(*outer, rows, width + 1)[..., : width - rows + 1]


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _pad(x, before, behind):
    """x (B, L, ...) behind `before` zeros, cut or filled up to `behind` positions of its own."""
    if x is None:
        return None
    right = max(0, behind - x.shape[1])
    padded = jnp.pad(x, ((0, 0), (before, right), *((0, 0),) * (x.ndim - 2)))
    return padded[:, : before + behind]


def _within(values, segments, others, start, length):
    """values (B, L, D), zero where `segments` and those of the other side of a tap differ."""
    if segments is None:
        return values
    same = segments == others[:, start : start + length]
    return jnp.where(same[:, :, None], values, jnp.zeros((), values.dtype))


def _per_channel(tap, channels, sharing):
    """(..., F) -> (..., D): the filter's tap of every channel."""
    *outer, filters = tap.shape
    if sharing == "block":
        shape = (*outer, filters, channels // filters)
        return jnp.broadcast_to(tap[..., None], shape).reshape(*outer, channels)
    shape = (*outer, channels // filters, filters)
    return jnp.broadcast_to(tap[..., None, :], shape).reshape(*outer, channels)


def _per_filter(products, filters, sharing):
    """(..., D) -> (..., F): the sum over the channels that share a filter."""
    outer, channels = products.shape[:-1], products.shape[-1]
    if sharing == "block":
        return products.reshape(*outer, filters, channels // filters).sum(-1)
    return products.reshape(*outer, channels // filters, filters).sum(-2)


def _accumulation_dtype(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _check(x, filter, left_taps, dilation, sharing, attention_mask, segment_ids):
    if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"convolution: x has shape {x.shape} and dtype {x.dtype}, expected (B, L, D) in "
            "floating point."
        )
    positions = () if filter.ndim == 2 else x.shape[:2]
    fits = filter.ndim in (2, 4) and filter.shape[:-2] == positions
    if not fits or filter.shape[-1] < 1 or x.shape[-1] % filter.shape[-2]:
        raise ValueError(
            f"convolution: filter has shape {filter.shape}, expected (F, K) or (B, L, F, K) with "
            f"(B, L) = {x.shape[:2]}, K >= 1 and F a divisor of D = {x.shape[-1]}."
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
                f"convolution: {name} has shape {value.shape}, expected (B, L) = {x.shape[:2]}, "
                "one entry per token of x."
            )
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"convolution: segment_ids has dtype {segment_ids.dtype}, expected integers: 1, 2, ... "
            "for the packed examples, 0 for padding."
        )
