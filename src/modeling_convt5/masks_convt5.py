"""What a stack and its attention layers are told of their tokens: masks, positions, biases.

Shapes: B batch, L length, D d_model, N num_heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_convt5 import ConvT5Config


class TokenMasks:
    """What a stack knows of its tokens.

    Attributes:
        length: new tokens L.
        past: tokens in the cache, a tensor if it is static.
        places: (L,), where the new tokens stand in the row, tokens in the cache included.
        keys: the row's length: past + L, or the size of a static cache.
        segment_ids: (B, L) or None.
        tokens: (B, L), non-zero for tokens, or None when every position is one.
    """

    def __init__(self, inputs_embeds, attention_mask, segment_ids, past=0, keys=None):
        """`past` tokens are in the cache (a tensor if it is static, with room for `keys`)."""
        batch, self.length = inputs_embeds.shape[:2]
        self.past = past
        if self.length == 0:
            raise ValueError("The input has length 0: pass at least one token.")
        self.keys = past + self.length if keys is None else keys
        self.places = torch.arange(self.length, device=inputs_embeds.device) + past
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
                f"attention_mask has shape {tuple(mask.shape)}, expected (batch, length) = "
                f"{(batch, self.keys)}: one entry per token, 0 for padding."
            )
        return mask.index_select(1, self.places)

    def whole_mask(self) -> torch.Tensor | None:
        """The mask (B, keys), for what looks back on the whole row, which a convolution does not.

        A mask of the new tokens alone says nothing against those in the cache.
        """
        if self._mask is None or self._mask.shape == (self._batch, self.keys):
            return self._mask
        whole = self._mask.new_ones(self._batch, self.keys)
        return whole.index_copy(1, self.places, self._mask)

    def positions(self) -> torch.LongTensor:
        """(B, L): positions count real tokens, and restart in every packed example."""
        mask = self.whole_mask()
        if mask is not None:
            positions = (mask != 0).long().cumsum(-1) - 1
            positions = positions.clamp(min=0).index_select(1, self.places)
        else:
            positions = self.places.expand(self._batch, -1)
        if self.segment_ids is not None:
            first = F.pad(self.segment_ids[:, 1:] != self.segment_ids[:, :-1], (1, 0), value=True)
            starts = torch.where(first, positions, torch.zeros_like(positions)).cummax(-1).values
            positions = positions - starts
        return positions


def check_tensor(name: str, value) -> None:
    """Raise ValueError for what a tokenizer returns unless it is asked for tensors."""
    if value is not None and not torch.is_tensor(value):
        raise ValueError(
            f"{name} is a {type(value).__name__}, expected a tensor: call the tokenizer with "
            "return_tensors='pt', or use torch.tensor."
        )


def check_mask(name: str, mask: torch.Tensor) -> None:
    """Raise ValueError for a mask that is added to scores, where 0 is a token: ours say 1."""
    if mask.is_floating_point() and not torch.compiler.is_compiling() and bool((mask < 0).any()):
        raise ValueError(
            f"{name} holds negative numbers (the lowest is {float(mask.min())}), expected 1 for "
            "tokens and 0 for padding, not a mask to be added to scores."
        )


def check_encoder_states(states, mask, segment_ids, inputs_embeds: torch.Tensor) -> None:
    """Raise ValueError unless encoder states (B, L, D) and their masks (B, L) fit the decoder's.

    Args:
        inputs_embeds: (B, M, D), the decoder's inputs.
    """
    batch, d_model = inputs_embeds.shape[0], inputs_embeds.shape[2]
    check_tensor("The first entry of encoder_outputs", states)
    if states.dim() != 3 or states.shape[1] == 0 or states.shape[2] != d_model:
        raise ValueError(
            f"The encoder's states have shape {tuple(states.shape)}, expected (batch, length of at "
            f"least 1, d_model = {d_model}): pass encoder_outputs as this model's encoder returned "
            "them."
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
                f"{name} has shape {tuple(value.shape)}, expected (batch, length) = "
                f"{tuple(states.shape[:2])} of the encoder's states: one entry per token."
            )


def _check_segments(segment_ids, shape):
    if segment_ids.shape != shape:
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)}, expected (batch, length) = "
            f"{shape}: the number of each token's example, 0 for padding."
        )
    if segment_ids.is_floating_point() or segment_ids.dtype == torch.bool:
        raise ValueError(
            f"segment_ids has dtype {segment_ids.dtype}, expected integers: 1, 2, ... for the "
            "packed examples, 0 for padding."
        )


def self_attention_bias(
    table: nn.Embedding, masks: TokenMasks, config: ConvT5Config, causal: bool
) -> torch.Tensor:
    """T5's relative position bias, with the lowest number wherever a query may not look.

    Returns:
        (1 or B, N, L, keys) in the dtype of the table.
    """
    places = masks.places
    distance = torch.arange(masks.keys, device=places.device)[None, :] - places[:, None]
    buckets = relative_position_bucket(
        distance,
        bidirectional=not causal,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )
    # The table may lie on another device, or on none while it is offloaded.
    bias = table(buckets).to(places.device).permute(2, 0, 1)[None]
    visible = (distance <= 0)[None, None] if causal else None
    mask = masks.whole_mask()
    if mask is not None:
        real = (mask != 0)[:, None, None, :]
        visible = real if visible is None else visible & real
    if masks.segment_ids is not None:
        same = _same_segment(masks.segment_ids, masks.segment_ids)
        visible = same if visible is None else visible & same
    if visible is None:
        return bias
    return bias.masked_fill(~visible.expand(-1, -1, *distance.shape), _lowest(bias))


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
    zeros = hidden_states.new_zeros(visible.shape)
    return zeros.masked_fill(~visible, _lowest(zeros))


def _same_segment(queries, keys):
    """(B, 1, L, keys): a token sees its example, padding sees everything.

    A row of scores that is masked throughout has wrong gradients in some attention kernels.
    """
    same = (queries[:, :, None] == keys[:, None, :]) & (keys != 0)[:, None, :]
    return (same | ~same.any(-1, keepdim=True))[:, None]


def _lowest(x):
    return torch.finfo(x.dtype).min


def relative_position_bucket(
    distance: torch.LongTensor, bidirectional: bool, num_buckets: int, max_distance: int
) -> torch.LongTensor:
    """T5's buckets of key position minus query position (Raffel et al. 2020, section 2.1).

    Half of the buckets are single distances, the rest grow logarithmically up to `max_distance`;
    with `bidirectional` the upper half of all buckets is for keys right of the query.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    scale = (num_buckets - exact) / math.log(max_distance / exact)
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
    return offset + torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


def sinusoids(positions, d_model):
    """Sines, then cosines, of d_model / 2 wavelengths from 2 pi to 20,000 pi (Mesh-TensorFlow)."""
    count = d_model // 2
    rates = torch.arange(count, device=positions.device, dtype=torch.float32)
    rates = torch.exp(rates * (-math.log(1.0e4) / max(count - 1, 1)))
    angles = positions[..., None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
