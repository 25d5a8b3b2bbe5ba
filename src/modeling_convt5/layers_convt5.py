"""One layer of ConvT5: token mixing (convolution or T5's attention), then channel mixing.
Shapes: B batch, L length, D d_model, F num_filters, K kernel_size, N num_heads, H d_kv.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_convt5 import ConvStateLayer
from .configuration_convt5 import ConvT5Config, LayerSpec
from .convolution import (
    conv_step,
    depthwise_conv,
    dynamic_conv,
    hide_padding,
    lightweight_conv,
    next_conv_state,
    normalize_filter,
)


class ConvT5Convolution(nn.Module):
    """The convolution mixer: in_proj and its gate -> convolution -> (pointwise) -> out_proj.

    Paper, section 3: X1 = (W_I X) * sigmoid(W_S X), X2 = Conv(X1), X3 = W_O X2. The rows of
    `in_proj` are W_I, then W_S.
    """

    def __init__(self, config: ConvT5Config, spec: LayerSpec):
        super().__init__()
        self.mixer, self.kernel_size = spec.mixer, spec.kernel_size
        self.left_taps, self.dilation = spec.left_taps, spec.dilation
        self.state_length = spec.state_length
        self.sharing, self.filter_dropout = config.filter_sharing, config.filter_dropout
        self.gate = config.gate
        d_model, bias, filters = config.d_model, config.mixer_bias, config.filters_per_layer
        self.in_proj = nn.Linear(d_model, (2 if self.gate else 1) * d_model, bias=bias)
        if self.mixer == "dynamic":
            self.filter_proj = nn.Linear(d_model, filters * self.kernel_size, bias=bias)
            self.filter_proj.fan_in = self.kernel_size * d_model  # Mesh-TensorFlow's
        else:
            self.filter = nn.Parameter(torch.empty(filters, self.kernel_size))
        self.conv_bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.pointwise = nn.Linear(d_model, d_model, bias=bias) if config.pointwise else None
        self.activation = (
            None if config.pointwise_activation == "linear" else ACT2FN[config.pointwise_activation]
        )
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        state: ConvStateLayer | None = None,
    ) -> torch.Tensor:
        """Mix hidden_states (B, L, D) along the length.

        Args:
            tokens: (B, L), non-zero where the convolution may read.
            segment_ids: (B, L), the example of a packed row that each token belongs to.
            state: what earlier tokens left behind, in decoding; updated.
        """
        x = saturate(self.in_proj(hidden_states))
        if self.gate:
            x = F.glu(x, dim=-1)
        if state is None:
            y = self._convolve(x, tokens, segment_ids)
        else:
            y = self._decode(x, tokens, state)
        if self.conv_bias is not None:
            y = y + self.conv_bias
        if self.pointwise is not None:
            y = self.pointwise(y)
        if self.activation is not None:
            y = self.activation(y)
        return self.out_proj(saturate(y))

    def _convolve(self, x, tokens, segment_ids):
        window = (self.left_taps, self.dilation, self.sharing, tokens, segment_ids)
        if self.mixer == "depthwise":
            return depthwise_conv(x, self._dropped_filter(), *window)
        if self.mixer == "lightweight":
            return lightweight_conv(x, self.filter, *window, dropout=self._dropout)
        weight, bias = self.filter_proj.weight, self.filter_proj.bias
        # An adapter, a quantised or an offloaded projection has no weight to read: call it.
        if type(self.filter_proj) is not nn.Linear or weight.device != x.device:
            return depthwise_conv(x, self._step_filter(x), *window)
        return dynamic_conv(x, x, weight, bias, self.kernel_size, *window, dropout=self._dropout)

    def _decode(self, x, tokens, state):
        conv_state = state.read()
        hidden = hide_padding(x, tokens)
        if conv_state is None:
            y = self._convolve(x, tokens, None)
            conv_state = next_conv_state(hidden, state.state_length)
        else:
            conv_state = conv_state.to(x.device)
            y, conv_state = conv_step(
                hidden, conv_state, self._step_filter(x), self.dilation, self.sharing
            )
        state.write(conv_state, hidden)
        return y

    def _step_filter(self, x):
        """The filter that `conv_step` takes: normalised and, if dynamic, predicted from x."""
        if self.mixer == "depthwise":
            return self._dropped_filter()
        if self.mixer == "lightweight":
            return normalize_filter(self.filter, self._dropout)
        logits = self.filter_proj(x).unflatten(-1, (-1, self.kernel_size))
        return normalize_filter(logits, self._dropout)

    def _dropped_filter(self):
        return F.dropout(self.filter, self._dropout) if self._dropout else self.filter

    @property
    def _dropout(self) -> float:
        return self.filter_dropout if self.training else 0.0


class ConvT5Attention(nn.Module):
    """T5's attention: no 1/sqrt(H), no biases, the position bias added to the scores.

    Serves as the mixer "attention" and as cross-attention.
    """

    is_causal = False  # the mask carries causality; keeps sdpa from adding its own

    def __init__(self, config: ConvT5Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.dropout, self.head_dim = config.dropout_rate, config.d_kv
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.q.fan_in = config.d_model * config.d_kv  # in place of a 1/sqrt(H) on the scores
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from hidden_states (B, L, D) to themselves or to encoder_hidden_states.

        Args:
            bias: added to the scores, broadcastable to (B, N, L, keys); carries mask and positions.

        Returns:
            The output (B, L, D) and, if asked for, the weights (B, N, L, keys).
        """
        query = self._heads(self.q(hidden_states))
        if encoder_hidden_states is None:
            key, value = self._heads(self.k(hidden_states)), self._heads(self.v(hidden_states))
            if past_key_values is not None:
                cache = past_key_values.self_attention_cache
                key, value = cache.update(key, value, self.layer_idx)
        else:
            key, value = self._encoder_keys_values(encoder_hidden_states, past_key_values)
        attend = eager_attention_forward
        if not output_attentions and self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, bias, scaling=1.0, dropout=dropout)
        output = saturate(output.reshape(*hidden_states.shape[:2], -1))
        return self.o(output), weights

    def _encoder_keys_values(self, encoder_hidden_states, past_key_values):
        """Computed once a generation, then read back from the cache."""
        cache = None if past_key_values is None else past_key_values.cross_attention_cache
        if cache is not None and past_key_values.is_updated.get(self.layer_idx):
            layer = cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key = self._heads(self.k(encoder_hidden_states))
        value = self._heads(self.v(encoder_hidden_states))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
        return key, value

    def _heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """The definition of attention that transformers' faster implementations stand in for."""
    scores = saturate(torch.matmul(query, key.transpose(2, 3)) * scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = F.dropout(weights.to(query.dtype), dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ConvT5MLP(nn.Module):
    """Channel mixing: wo(act(wi x)), or wo(act(wi_0 x) * wi_1 x) when gated."""

    def __init__(self, config: ConvT5Config):
        super().__init__()
        bias = config.mlp_bias
        self.gated = config.is_gated_act
        if self.gated:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=bias)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=bias)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=bias)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=bias)
        self.activation = ACT2FN[config.dense_act_fn]
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gated:
            hidden = self.activation(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        else:
            hidden = self.activation(self.wi(hidden_states))
        return self.wo(saturate(self.dropout(hidden)))


class ConvT5ClassificationHead(nn.Module):
    """T5's head for whole sequences: dense, tanh, projection, with dropout before each dense."""

    def __init__(self, config: ConvT5Config):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.d_model, config.num_labels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., num_labels)."""
        hidden_states = torch.tanh(self.dense(self.dropout(hidden_states)))
        return self.out_proj(self.dropout(hidden_states))


class ConvT5Layer(GradientCheckpointingLayer):
    """One layer: token mixing, cross-attention where the layer has it, channel mixing."""

    def __init__(self, config: ConvT5Config, spec: LayerSpec, layer_idx: int):
        super().__init__()
        d_model, eps = config.d_model, config.layer_norm_epsilon
        self.layer_idx = layer_idx
        self.pre_mixer_norm = nn.RMSNorm(d_model, eps)
        if spec.mixer == "attention":
            self.mixer = ConvT5Attention(config, layer_idx)
        else:
            self.mixer = ConvT5Convolution(config, spec)
        self.cross_attention = None
        if spec.cross_attention:
            self.pre_cross_attention_norm = nn.RMSNorm(d_model, eps)
            self.cross_attention = ConvT5Attention(config, layer_idx)
        self.pre_mlp_norm = nn.RMSNorm(d_model, eps)
        self.mlp = ConvT5MLP(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        self_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        cross_bias: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns hidden_states (B, L, D) and the mixer's and the cross-attention's weights."""
        self_weights = cross_weights = None
        normed = self.pre_mixer_norm(hidden_states)
        if isinstance(self.mixer, ConvT5Attention):
            mixed, self_weights = self.mixer(
                normed, self_bias, None, past_key_values, output_attentions
            )
        else:
            state = None
            if past_key_values is not None:
                state = past_key_values.self_attention_cache.layers[self.layer_idx]
            mixed = self.mixer(normed, tokens, segment_ids, state)
        hidden_states = saturate(hidden_states + self.dropout(mixed))
        if self.cross_attention is not None and encoder_hidden_states is not None:
            normed = self.pre_cross_attention_norm(hidden_states)
            attended, cross_weights = self.cross_attention(
                normed, cross_bias, encoder_hidden_states, past_key_values, output_attentions
            )
            hidden_states = saturate(hidden_states + self.dropout(attended))
        mixed = self.dropout(self.mlp(self.pre_mlp_norm(hidden_states)))
        hidden_states = saturate(hidden_states + mixed)
        return hidden_states, self_weights, cross_weights


def saturate(x: torch.Tensor) -> torch.Tensor:
    """x, with the infinities of float16 at its largest number; other dtypes as they are.

    T5's activations were trained in bfloat16 and exceed float16's 65,504. Where a row has met an
    infinity once, a product with a negative weight makes it NaN for good.
    """
    if x.dtype != torch.float16:
        return x
    return x.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
