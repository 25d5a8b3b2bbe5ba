"""What a stack and its attention layers are told of their tokens, the twin of masks_convt5.py.

Shapes: B batch, L length, D d_model, N num_heads.
"""

import math
from collections.abc import Callable

import numpy as np

try:  # in a `try`, or transformers would ask PyTorch's users to install JAX
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError("ConvT5 in Flax needs JAX and Flax: pip install jax flax") from error

from .configuration_convt5 import ConvT5Config


class FlaxTokenMasks:
    """What a stack knows of its tokens.

    Attributes:
        length: new tokens L.
        past: tokens in the cache, an array if there is one.
        places: (L,), where the new tokens stand in the row, tokens in the cache included.
        keys: the row's length: L, or the size of the cache.
        segment_ids: (B, L) or None.
        tokens: (B, L), non-zero for tokens, or None when every position is one.
    """

    def __init__(self, inputs_embeds, attention_mask, segment_ids, past=0, keys=None):
        """`past` tokens are in the cache, which has room for `keys`."""
        batch, self.length = inputs_embeds.shape[:2]
        self.past = past
        if self.length == 0:
            raise ValueError("The input has length 0: pass at least one token.")
        self.keys = self.length if keys is None else keys
        self.places = jnp.arange(self.length) + past
        self.segment_ids = segment_ids
        if segment_ids is not None:
            _check_segments(segment_ids, (batch, self.length))
        self._mask, self._batch = attention_mask, batch
        self.tokens = self._mask_of_new_tokens()

    def _mask_of_new_tokens(self):
        mask, batch = self._mask, self._batch
        if mask is None:
            return None
        check_mask("attention_mask", mask)
        if mask.shape == (batch, self.length):
            return mask
        if mask.shape != (batch, self.keys):
            raise ValueError(
                f"attention_mask has shape {mask.shape}, expected (batch, length) = "
                f"{(batch, self.keys)}: one entry per token, 0 for padding."
            )
        return jnp.take(mask, self.places, axis=1)

    def whole_mask(self) -> jax.Array | None:
        """The mask (B, keys), for what looks back on the whole row, which a convolution does not.

        A mask of the new tokens alone says nothing against those in the cache.
        """
        if self._mask is None or self._mask.shape == (self._batch, self.keys):
            return self._mask
        whole = jnp.ones((self._batch, self.keys), self._mask.dtype)
        return whole.at[:, self.places].set(self._mask)

    def positions(self) -> jax.Array:
        """(B, L): positions count real tokens, and restart in every packed example."""
        mask = self.whole_mask()
        if mask is not None:
            positions = jnp.cumsum(mask != 0, axis=-1) - 1
            positions = jnp.take(jnp.maximum(positions, 0), self.places, axis=1)
        else:
            positions = jnp.broadcast_to(self.places, (self._batch, self.length))
        if self.segment_ids is not None:
            first = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
            first = jnp.pad(first, ((0, 0), (1, 0)), constant_values=True)
            starts = jax.lax.cummax(jnp.where(first, positions, 0), axis=1)
            positions = positions - starts
        return positions


def check_tensor(name: str, value) -> None:
    """Raise ValueError for what a tokenizer returns unless it is asked for arrays."""
    if value is not None and not hasattr(value, "ndim"):
        raise ValueError(
            f"{name} is a {type(value).__name__}, expected an array: call the tokenizer with "
            "return_tensors='np', or use jnp.array."
        )


def check_mask(name: str, mask: jax.Array) -> None:
    """Raise ValueError for a mask that is added to scores, where 0 is a token: ours say 1."""
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        return
    negative = (mask < 0).any()
    if not isinstance(negative, jax.core.Tracer) and bool(negative):
        raise ValueError(
            f"{name} holds negative numbers (the lowest is {float(mask.min())}), expected 1 for "
            "tokens and 0 for padding, not a mask to be added to scores."
        )


def check_encoder_states(states, mask, segment_ids, inputs_embeds: jax.Array) -> None:
    """Raise ValueError unless encoder states (B, L, D) and their masks (B, L) fit the decoder's.

    Args:
        inputs_embeds: (B, M, D), the decoder's inputs.
    """
    batch, d_model = inputs_embeds.shape[0], inputs_embeds.shape[2]
    check_tensor("The first entry of encoder_outputs", states)
    if states.ndim != 3 or states.shape[1] == 0 or states.shape[2] != d_model:
        raise ValueError(
            f"The encoder's states have shape {states.shape}, expected (batch, length of at least "
            f"1, d_model = {d_model}): pass encoder_outputs as this model's encoder returned them."
        )
    if states.shape[0] != batch:
        raise ValueError(
            f"The decoder's inputs are a batch of {batch}, the encoder's states one of "
            f"{states.shape[0]}: expected one text of each for every example."
        )
    for name, value in (("attention_mask", mask), ("segment_ids", segment_ids)):
        check_tensor(name, value)
        if value is not None and value.shape != states.shape[:2]:
            raise ValueError(
                f"{name} has shape {value.shape}, expected (batch, length) = {states.shape[:2]} of "
                "the encoder's states: one entry per token."
            )


def _check_segments(segment_ids, shape):
    if segment_ids.shape != shape:
        raise ValueError(
            f"segment_ids has shape {segment_ids.shape}, expected (batch, length) = {shape}: the "
            "number of each token's example, 0 for padding."
        )
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids has dtype {segment_ids.dtype}, expected integers: 1, 2, ... for the "
            "packed examples, 0 for padding."
        )


def self_attention_bias(
    table: Callable, masks: FlaxTokenMasks, config: ConvT5Config, causal: bool
) -> jax.Array:
    """T5's relative position bias, with the lowest number wherever a query may not look.

    Returns:
        (1 or B, N, L, keys) in the dtype of the table.
    """
    distance = jnp.arange(masks.keys)[None, :] - masks.places[:, None]
    buckets = relative_position_bucket(
        distance,
        bidirectional=not causal,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )
    bias = table(buckets).transpose(2, 0, 1)[None]
    visible = (distance <= 0)[None, None] if causal else None
    whole_mask = masks.whole_mask()
    if whole_mask is not None:
        real = (whole_mask != 0)[:, None, None, :]
        visible = real if visible is None else visible & real
    if masks.segment_ids is not None:
        same = _same_segment(masks.segment_ids, masks.segment_ids)
        visible = same if visible is None else visible & same
    if visible is None:
        return bias
    return jnp.where(visible, bias, _lowest(bias))


def cross_attention_bias(hidden_states, encoder_mask, encoder_segments, segments):
    """0 where a decoder position may see an encoder position, the lowest number elsewhere."""
    visible = None
    if encoder_mask is not None:
        visible = (encoder_mask != 0)[:, None, None, :]
    if encoder_segments is not None:
        same = _same_segment(segments, encoder_segments)
        visible = same if visible is None else visible & same
    if visible is None:
        return None
    zero = jnp.zeros((), hidden_states.dtype)
    return jnp.where(visible, zero, _lowest(zero))


def _same_segment(queries, keys):
    """(B, 1, L, keys): a token sees its example, padding sees everything.

    A row of scores that is masked throughout has wrong gradients in some attention kernels.
    """
    same = (queries[:, :, None] == keys[:, None, :]) & (keys != 0)[:, None, :]
    return (same | ~same.any(-1, keepdims=True))[:, None]


def _lowest(x):
    return jnp.asarray(jnp.finfo(x.dtype).min, x.dtype)


def relative_position_bucket(
    distance: jax.Array, bidirectional: bool, num_buckets: int, max_distance: int
) -> jax.Array:
    """T5's buckets of key position minus query position (Raffel et al. 2020, section 2.1).

    Half of the buckets are single distances, the rest grow logarithmically up to `max_distance`;
    with `bidirectional` the upper half of all buckets is for keys right of the query.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0) * num_buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    # Where each further bucket begins, worked out on the host: an accelerator's logarithm may fall
    # on the other side of a border.
    far = np.arange(exact, max(max_distance, exact) + 1)
    scale = (num_buckets - exact) / math.log(max_distance / exact)
    steps = (np.log(far.astype(np.float32) / np.float32(exact)) * np.float32(scale)).astype(int)
    begins = jnp.asarray(far[np.searchsorted(steps, np.arange(1, num_buckets - exact))])
    beyond = exact + (distance[..., None] >= begins).sum(-1, dtype=distance.dtype)
    return offset + jnp.where(distance < exact, distance, beyond)


def sinusoids(positions, d_model):
    """Sines, then cosines, of d_model / 2 wavelengths from 2 pi to 20,000 pi (Mesh-TensorFlow)."""
    count = d_model // 2
    rates = jnp.exp(jnp.arange(count, dtype=jnp.float32) * (-math.log(1.0e4) / max(count - 1, 1)))
    angles = positions[..., None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
