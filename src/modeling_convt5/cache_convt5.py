"""Decoding state: a constant-size `conv_state` per convolution, keys and values elsewhere.

`ConvStateCache` is the self-attention half of an `EncoderDecoderCache`; the other half keeps the
cross-attention keys and values and is transformers' own `DynamicCache`. `StaticConvStateCache` is
its counterpart for compiled decoding: every tensor keeps its address and shape.

Shapes: B batch, T new tokens, S state length = left_taps * dilation, D d_model.
"""

import warnings

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
)
from transformers.modeling_outputs import Seq2SeqLMOutput

# transformers 5.24 renames `past_key_values` to `cache`, in outputs and within `generate`.
CACHE = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"


class ConvStateLayer(CacheLayerMixin):
    """The last S inputs of one convolution, oldest first.

    Attributes:
        conv_state: (B, S, D), or None before the first token. While past states are recorded (for
            assisted decoding) it also keeps the inputs before the last S, until `crop`.
        seen: number of tokens read so far.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, state_length: int):
        super().__init__()
        self.state_length = state_length
        self.conv_state: torch.Tensor | None = None
        self.seen = 0
        self.record_past = False

    def read(self) -> torch.Tensor | None:
        """The state (B, S, D), or None before the first token."""
        if self.conv_state is None or not self.record_past:
            return self.conv_state
        return self.conv_state[:, self.conv_state.shape[1] - self.state_length :]

    def write(self, conv_state: torch.Tensor, x: torch.Tensor) -> None:
        """Store the state (B, S, D) that follows the new inputs x (B, T, D)."""
        self.seen += x.shape[1]
        if self.record_past:
            past = self.conv_state
            if past is None:
                past = x.new_zeros(x.shape[0], self.state_length, x.shape[2])
            conv_state = torch.cat([past, x], dim=1)
        # A copy: a slice would keep the whole row of a long prompt alive.
        self.conv_state = conv_state.clone()
        self.is_initialized = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (transformers passes a negative number)."""
        if not self.record_past:
            raise RuntimeError(
                "A convolution's state cannot be rolled back unless its past is recorded: call "
                "`activate_past_recording()` on the cache before the tokens that may be removed."
            )
        if self.conv_state is None:
            return
        removed = abs(tokens_to_remove)
        end = self.conv_state.shape[1] - removed
        if end < self.state_length:
            raise ValueError(
                f"crop({tokens_to_remove}): only {self.conv_state.shape[1] - self.state_length} "
                "tokens were recorded since the last crop, no more can be removed."
            )
        self.conv_state = self.conv_state[:, end - self.state_length : end].clone()
        self.seen -= removed

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        self.conv_state, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.conv_state is not None:
            self.conv_state = self.conv_state[indices.to(self.conv_state.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.conv_state is not None:
            self.conv_state = self.conv_state.repeat_interleave(repeats, dim=0)

    def offload(self) -> None:
        if self.conv_state is not None:
            self.conv_state = self.conv_state.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Nothing to bring back early: a state is small, and moved when it is read."""

    def get_seq_length(self, *args) -> int:
        return self.seen

    def get_mask_sizes(self, query_length, *args) -> tuple[int, int]:
        # transformers 5 passes the number of queries, transformers 4 their positions.
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # the name in transformers 4
        return -1

    def lazy_initialization(self, *args) -> None:
        raise NotImplementedError("A convolution has no keys and values; see `read` and `write`.")

    def update(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("A convolution has no keys and values; see `read` and `write`.")


class ConvStateCache(DynamicCache):
    """What the decoder's mixers remember: one layer of state per decoder layer.

    Args:
        config: the `ConvT5Config` whose decoder layers decide which kind each layer is.
    """

    def __init__(self, config):
        layers = [
            DynamicLayer() if spec.mixer == "attention" else ConvStateLayer(spec.state_length)
            for spec in config.layer_specs("decoder")
        ]
        Cache.__init__(self, layers=layers)


class StaticConvStateLayer(ConvStateLayer):
    """`ConvStateLayer` that is written in place, so that one compiled graph serves all positions.

    Attributes:
        seen: number of tokens read so far, a tensor: a number would be compiled into the graph.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, state_length: int):
        super().__init__(state_length)
        self.seen = torch.tensor(0)

    def write(self, conv_state: torch.Tensor, x: torch.Tensor) -> None:
        if self.conv_state is None:
            self.conv_state, self.seen = torch.zeros_like(conv_state), self.seen.to(x.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.conv_state)
                torch._dynamo.mark_static_address(self.seen)
            self.is_initialized = True
        self.conv_state.copy_(conv_state)
        self.seen.add_(x.shape[1])

    def reset(self) -> None:
        # A state of zeros is that of a row's beginning.
        if self.conv_state is not None:
            self.conv_state.zero_()
        self.seen.zero_()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.conv_state is not None:
            self.conv_state.copy_(self.conv_state[indices.to(self.conv_state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("A static cache has a fixed batch size: use a `ConvStateCache`.")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("A static cache cannot be rolled back: use a `ConvStateCache`.")

    def activate_past_recording(self) -> None:
        raise NotImplementedError("A static cache records no past: use a `ConvStateCache`.")


class StaticConvStateCache(Cache):
    """`ConvStateCache` with fixed addresses and shapes.

    Args:
        config: the `ConvT5Config` whose decoder layers decide which kind each layer is.
        max_cache_len: the most tokens that attention layers can hold; convolutions have no limit.
    """

    def __init__(self, config, max_cache_len: int):
        super().__init__(
            layers=[
                StaticLayer(max_cache_len)
                if spec.mixer == "attention"
                else StaticConvStateLayer(spec.state_length)
                for spec in config.layer_specs("decoder")
            ]
        )
        self.key_length = max_cache_len


def new_cache(config) -> EncoderDecoderCache:
    """An empty cache for the decoder of this configuration."""
    return EncoderDecoderCache(ConvStateCache(config), DynamicCache())


def new_static_cache(config, max_cache_len: int, encoder_length: int) -> EncoderDecoderCache:
    """An empty cache of fixed size, for at most `max_cache_len` decoder tokens."""
    cross = [StaticLayer(encoder_length) for _ in range(config.num_decoder_layers)]
    return EncoderDecoderCache(StaticConvStateCache(config, max_cache_len), Cache(layers=cross))


def given_cache(
    cache: EncoderDecoderCache | None, past_key_values: EncoderDecoderCache | None
) -> EncoderDecoderCache | None:
    """The cache that a caller passed by either name; the old one draws transformers' warning."""
    if past_key_values is not None and CACHE == "cache" and not torch.compiler.is_compiling():
        warnings.warn(
            "`past_key_values` is deprecated, as in transformers since 5.24: pass `cache`.",
            FutureWarning,
            stacklevel=3,
        )
    return past_key_values if cache is None else cache


def check_cache(
    cache: EncoderDecoderCache,
    config,
    inputs_embeds: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None,
) -> None:
    """Refuse a cache that these inputs did not fill, before anything is added to it.

    Args:
        inputs_embeds: (B, T, D), the decoder's new tokens.
        encoder_hidden_states: (B, L, D), the text that cross-attention looks at.

    Raises:
        ValueError: if the states held are another model's, another batch's or another text's.
    """
    batch, head = inputs_embeds.shape[0], (config.num_heads, config.d_kv)
    cross = cache.cross_attention_cache.layers
    for layer in [*cache.self_attention_cache.layers, *cross]:
        is_state = isinstance(layer, ConvStateLayer)
        held = layer.conv_state if is_state else layer.keys
        if held is None:
            continue
        width, expected = (
            (held.shape[2], config.d_model) if is_state else ((held.shape[1], held.shape[3]), head)
        )
        if width != expected:
            raise ValueError(
                f"{CACHE} was filled by another model: it holds states of width {width}, "
                f"expected {expected}. Pass the cache that this model returned."
            )
        if held.shape[0] != batch:
            raise ValueError(
                f"{CACHE} was filled by {held.shape[0]} rows, the decoder's inputs are {batch}: "
                "both must be the same. To go on with beams or several returns, call "
                f"{CACHE}.batch_repeat_interleave(number) first."
            )
        if layer in cross and encoder_hidden_states is not None:
            if held.shape[2] != encoder_hidden_states.shape[1]:
                raise ValueError(
                    f"{CACHE} holds a text of {held.shape[2]} tokens, the encoder's states "
                    f"one of {encoder_hidden_states.shape[1]}: begin a new cache with a new text."
                )
