"""One layer of ConvT5 in Flax, the twin of layers_convt5.py: token mixing, then channel mixing.

Parameters have the names and the shapes of the PyTorch twin's, so that a parameter's path is its
key in model.safetensors and no weight is ever transposed. They are kept in `param_dtype` and
computed with in `dtype`. Dropout is drawn from the key `dropout_rng`; without one nothing drops.
In half precision each operation works in float32 and rounds once, where PyTorch's does.

Shapes: B batch, L length, D d_model, F num_filters, K kernel_size, N num_heads, H d_kv.
"""

from functools import partial

try:  # in a `try`, or transformers would ask PyTorch's users to install JAX
    import jax
    import jax.numpy as jnp
    from flax import nnx
except ImportError as error:
    raise ImportError("ConvT5 in Flax needs JAX and Flax: pip install jax flax") from error

from .cache_flax_convt5 import FlaxLayerCache
from .configuration_convt5 import ConvT5Config, LayerSpec
from .convolution_flax import (
    conv_step,
    depthwise_conv,
    drop,
    dynamic_conv,
    hide_padding,
    lightweight_conv,
    narrow,
    normalize_filter,
    predict_filter,
    wide_matmul,
    widen,
)

# T5's "gelu" is exact and "gelu_new" the tanh approximation, as in transformers.
ACT2FN = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


class FlaxLinear(nnx.Module):
    """y = x W^T + b with W (out_features, in_features), as `torch.nn.Linear` keeps it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: ConvT5Config,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        fan_in: int | None = None,
    ):
        std = config.initializer_factor * (fan_in or in_features) ** -0.5
        self.dtype = dtype
        self.weight = _normal(rngs, (out_features, in_features), std, param_dtype)
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., in_features) -> (..., out_features), in `dtype`."""
        y = wide_matmul(x.astype(self.dtype), self.weight[...].astype(self.dtype).T)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        return narrow(y, self.dtype)


class FlaxEmbedding(nnx.Module):
    """A table (rows, D), as `torch.nn.Embedding` keeps it."""

    def __init__(
        self,
        rows: int,
        features: int,
        config: ConvT5Config,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        fan_in: int = 1,
    ):
        self.dtype = dtype
        std = config.initializer_factor * fan_in**-0.5
        self.weight = _normal(rngs, (rows, features), std, param_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """(...) integers -> (..., D), in `dtype`; NaN for an id that is no row of the table."""
        return narrow(jnp.take(self.weight[...], ids, axis=0, mode="fill"), self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (..., rows): the tied logits, in `dtype`."""
        logits = wide_matmul(x.astype(self.dtype), self.weight[...].astype(self.dtype).T)
        return narrow(logits, self.dtype)


class FlaxRMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 or wider; the result has the dtype of x."""

    def __init__(self, features: int, eps: float, config: ConvT5Config, param_dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.full(features, config.initializer_factor, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widen(x)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return narrow(wide * scale * self.weight[...].astype(wide.dtype), x.dtype)


class FlaxConvT5Convolution(nnx.Module):
    """The convolution mixer: in_proj and its gate -> convolution -> (pointwise) -> out_proj.

    Paper, section 3: X1 = (W_I X) * sigmoid(W_S X), X2 = Conv(X1), X3 = W_O X2. The rows of
    `in_proj` are W_I, then W_S.
    """

    def __init__(
        self,
        config: ConvT5Config,
        spec: LayerSpec,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.mixer, self.kernel_size = spec.mixer, spec.kernel_size
        self.left_taps, self.dilation = spec.left_taps, spec.dilation
        self.sharing, self.filter_dropout = config.filter_sharing, config.filter_dropout
        self.gate, self.state_length = config.gate, spec.state_length
        d_model, bias, filters = config.d_model, config.mixer_bias, config.filters_per_layer
        common = {"config": config, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.in_proj = FlaxLinear(d_model, (2 if self.gate else 1) * d_model, bias, **common)
        if self.mixer == "dynamic":
            fan_in = self.kernel_size * d_model  # Mesh-TensorFlow's
            self.filter_proj = FlaxLinear(
                d_model, filters * self.kernel_size, bias, **common, fan_in=fan_in
            )
        else:
            std = config.initializer_factor * self.kernel_size**-0.5
            self.filter = _normal(rngs, (filters, self.kernel_size), std, param_dtype)
        self.conv_bias = nnx.Param(jnp.zeros(d_model, param_dtype)) if bias else None
        self.pointwise = FlaxLinear(d_model, d_model, bias, **common) if config.pointwise else None
        self.activation = config.pointwise_activation
        self.out_proj = FlaxLinear(d_model, d_model, bias, **common)

    def __call__(
        self,
        hidden_states: jax.Array,
        tokens: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: FlaxLayerCache | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> tuple[jax.Array, FlaxLayerCache | None]:
        """Mix hidden_states (B, L, D) along the length.

        Args:
            tokens: (B, L), non-zero where the convolution may read.
            segment_ids: (B, L), the example of a packed row that each token belongs to.
            state: what earlier tokens left behind, in decoding.

        Returns:
            The mixed states (B, L, D), and the state that these tokens leave behind.
        """
        x = saturate(self.in_proj(hidden_states))
        if self.gate:
            value, gate = jnp.split(widen(x), 2, axis=-1)
            x = narrow(value * jax.nn.sigmoid(gate), x.dtype)
        if state is None:
            y = self._convolve(x, tokens, segment_ids, dropout_rng)
        else:
            y, state = self._decode(x, tokens, state)
        if self.conv_bias is not None:
            y = add(y, self.conv_bias[...].astype(y.dtype))
        if self.pointwise is not None:
            y = self.pointwise(y)
        if self.activation != "linear":
            y = activate(self.activation, y)
        return self.out_proj(saturate(y)), state

    def _convolve(self, x, tokens, segment_ids, dropout_rng):
        window = (self.left_taps, self.dilation, self.sharing, tokens, segment_ids)
        drops = {"dropout": self.filter_dropout, "dropout_rng": dropout_rng}
        if self.mixer == "depthwise":
            filter = drop(self.filter[...], self.filter_dropout, dropout_rng)
            return depthwise_conv(x, filter, *window)
        if self.mixer == "lightweight":
            return lightweight_conv(x, self.filter[...], *window, **drops)
        weight, bias = self._prediction(x.dtype)
        return dynamic_conv(x, x, weight, bias, self.kernel_size, *window, **drops)

    def _decode(self, x, tokens, state):
        """One or more new tokens; a state of zeros is that of a row's beginning."""
        hidden = hide_padding(x, tokens)
        filter = self._step_filter(x)
        y, conv_state = conv_step(hidden, state.conv_state, filter, self.dilation, self.sharing)
        return y, state.replace(conv_state=conv_state)

    def _step_filter(self, x):
        """The filter that `conv_step` takes: normalised and, if dynamic, predicted from x."""
        if self.mixer == "depthwise":
            return self.filter[...]
        if self.mixer == "lightweight":
            return normalize_filter(self.filter[...])
        return predict_filter(x, *self._prediction(x.dtype), self.kernel_size)

    def _prediction(self, dtype):
        bias = self.filter_proj.bias
        bias = None if bias is None else bias[...].astype(dtype)
        return self.filter_proj.weight[...].astype(dtype), bias


class FlaxConvT5Attention(nnx.Module):
    """T5's attention: no 1/sqrt(H), no biases, the position bias added to the scores.

    Serves as the mixer "attention" and as cross-attention.
    """

    def __init__(
        self, config: ConvT5Config, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.dropout, self.head_dim = config.dropout_rate, config.d_kv
        inner = config.num_heads * config.d_kv
        common = {"config": config, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        fan_in = config.d_model * config.d_kv  # in place of a 1/sqrt(H) on the scores
        self.q = FlaxLinear(config.d_model, inner, False, **common, fan_in=fan_in)
        self.k = FlaxLinear(config.d_model, inner, False, **common)
        self.v = FlaxLinear(config.d_model, inner, False, **common)
        self.o = FlaxLinear(inner, config.d_model, False, **common)

    def __call__(
        self,
        hidden_states: jax.Array,
        bias: jax.Array | None = None,
        encoder_hidden_states: jax.Array | None = None,
        past_key_values: FlaxLayerCache | None = None,
        output_attentions: bool = False,
        places: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, FlaxLayerCache | None]:
        """Attend from hidden_states (B, L, D) to themselves or to encoder_hidden_states.

        Args:
            bias: added to the scores, broadcastable to (B, N, L, keys); carries mask and positions.
            places: (L,), where in a cache the new keys and values go.

        Returns:
            The output (B, L, D), the weights (B, N, L, keys) if asked for, and the cache with the
            new keys and values.
        """
        query = self._heads(self.q(hidden_states))
        if encoder_hidden_states is None:
            key, value = self._heads(self.k(hidden_states)), self._heads(self.v(hidden_states))
            if past_key_values is not None:
                key = past_key_values.keys.at[:, :, places].set(key)
                value = past_key_values.values.at[:, :, places].set(value)
                past_key_values = past_key_values.replace(keys=key, values=value)
        elif past_key_values is not None:
            key, value = past_key_values.cross_keys, past_key_values.cross_values
        else:
            key, value = self.keys_values(encoder_hidden_states)
        output, weights = eager_attention_forward(
            query, key, value, bias, self.dropout, dropout_rng
        )
        output = saturate(output.reshape(*hidden_states.shape[:2], -1))
        return self.o(output), weights if output_attentions else None, past_key_values

    def keys_values(self, encoder_hidden_states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The encoder's keys and values (B, N, L, H), computed once a generation."""
        key = self._heads(self.k(encoder_hidden_states))
        return key, self._heads(self.v(encoder_hidden_states))

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], -1, self.head_dim).swapaxes(1, 2)


def eager_attention_forward(query, key, value, attention_mask, dropout=0.0, dropout_rng=None):
    """The definition of attention: (B, N, L, H), (B, N, keys, H) -> (B, L, N, H) and weights."""
    scores = wide_matmul(query, key.swapaxes(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    # Normalised after the product with the values, as PyTorch's sdpa does.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = drop(narrow(weights, query.dtype), dropout, dropout_rng)
    output = narrow(wide_matmul(weights, value) / total, query.dtype)
    return output.swapaxes(1, 2), narrow(weights / total, query.dtype)


class FlaxConvT5MLP(nnx.Module):
    """Channel mixing: wo(act(wi x)), or wo(act(wi_0 x) * wi_1 x) when gated."""

    def __init__(
        self, config: ConvT5Config, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        bias = config.mlp_bias
        common = {"config": config, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gated = config.is_gated_act
        if self.gated:
            self.wi_0 = FlaxLinear(config.d_model, config.d_ff, bias, **common)
            self.wi_1 = FlaxLinear(config.d_model, config.d_ff, bias, **common)
        else:
            self.wi = FlaxLinear(config.d_model, config.d_ff, bias, **common)
        self.wo = FlaxLinear(config.d_ff, config.d_model, bias, **common)
        self.activation, self.dropout = config.dense_act_fn, config.dropout_rate

    def __call__(self, hidden_states: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        if self.gated:
            gate = activate(self.activation, self.wi_0(hidden_states))
            hidden = narrow(widen(gate) * widen(self.wi_1(hidden_states)), gate.dtype)
        else:
            hidden = activate(self.activation, self.wi(hidden_states))
        return self.wo(saturate(drop(hidden, self.dropout, dropout_rng)))


class FlaxConvT5ClassificationHead(nnx.Module):
    """T5's head for whole sequences: dense, tanh, projection, with dropout before each dense."""

    def __init__(
        self, config: ConvT5Config, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        common = {"config": config, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dense = FlaxLinear(config.d_model, config.d_model, True, **common)
        self.dropout = config.classifier_dropout
        self.out_proj = FlaxLinear(config.d_model, config.num_labels, True, **common)

    def __call__(self, hidden_states: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """(..., D) -> (..., num_labels)."""
        first, second = split_rng(dropout_rng, 2)
        hidden_states = jnp.tanh(self.dense(drop(hidden_states, self.dropout, first)))
        return self.out_proj(drop(hidden_states, self.dropout, second))


class FlaxConvT5Layer(nnx.Module):
    """One layer: token mixing, cross-attention where the layer has it, channel mixing."""

    def __init__(
        self,
        config: ConvT5Config,
        spec: LayerSpec,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        d_model, eps = config.d_model, config.layer_norm_epsilon
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.pre_mixer_norm = FlaxRMSNorm(d_model, eps, config, param_dtype)
        if spec.mixer == "attention":
            self.mixer = FlaxConvT5Attention(config, **common)
        else:
            self.mixer = FlaxConvT5Convolution(config, spec, **common)
        self.cross_attention = None
        if spec.cross_attention:
            self.pre_cross_attention_norm = FlaxRMSNorm(d_model, eps, config, param_dtype)
            self.cross_attention = nnx.data(FlaxConvT5Attention(config, **common))
        self.pre_mlp_norm = FlaxRMSNorm(d_model, eps, config, param_dtype)
        self.mlp = FlaxConvT5MLP(config, **common)
        self.dropout = config.dropout_rate

    def __call__(
        self,
        hidden_states: jax.Array,
        tokens: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        self_bias: jax.Array | None = None,
        encoder_hidden_states: jax.Array | None = None,
        cross_bias: jax.Array | None = None,
        past_key_values: FlaxLayerCache | None = None,
        output_attentions: bool = False,
        places: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None, FlaxLayerCache | None]:
        """Returns hidden_states (B, L, D), both attentions' weights, and this layer's cache."""
        rngs = split_rng(dropout_rng, 6)
        self_weights = cross_weights = None
        normed = self.pre_mixer_norm(hidden_states)
        if isinstance(self.mixer, FlaxConvT5Attention):
            mixed, self_weights, past_key_values = self.mixer(
                normed, self_bias, None, past_key_values, output_attentions, places, rngs[0]
            )
        else:
            mixed, past_key_values = self.mixer(
                normed, tokens, segment_ids, past_key_values, rngs[0]
            )
        hidden_states = add(hidden_states, drop(mixed, self.dropout, rngs[1]))
        if self.cross_attention is not None and encoder_hidden_states is not None:
            normed = self.pre_cross_attention_norm(hidden_states)
            attended, cross_weights, past_key_values = self.cross_attention(
                normed,
                cross_bias,
                encoder_hidden_states,
                past_key_values,
                output_attentions,
                None,
                rngs[2],
            )
            hidden_states = add(hidden_states, drop(attended, self.dropout, rngs[3]))
        mixed = drop(self.mlp(self.pre_mlp_norm(hidden_states), rngs[4]), self.dropout, rngs[5])
        hidden_states = add(hidden_states, mixed)
        return hidden_states, self_weights, cross_weights, past_key_values


def saturate(x: jax.Array) -> jax.Array:
    """x, with the infinities of float16 at its largest number; other dtypes as they are.

    T5's activations were trained in bfloat16 and exceed float16's 65,504. Where a row has met an
    infinity once, a product with a negative weight makes it NaN for good.
    """
    if x.dtype != jnp.float16:
        return x
    return jnp.clip(x, jnp.finfo(x.dtype).min, jnp.finfo(x.dtype).max)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y in the dtype of x, summed in float32 and rounded once."""
    return saturate(narrow(widen(x) + widen(y), x.dtype))


def activate(name: str, x: jax.Array) -> jax.Array:
    """The activation of that name, in float32 and rounded once."""
    return narrow(ACT2FN[name](widen(x)), x.dtype)


def split_rng(rng: jax.Array | None, count: int) -> list[jax.Array | None]:
    """`count` keys for dropout, or as many None."""
    return [None] * count if rng is None else list(jax.random.split(rng, count))


def _normal(rngs, shape, std, param_dtype):
    sample = jax.random.normal(rngs.params(), shape, jnp.promote_types(param_dtype, jnp.float32))
    return nnx.Param((sample * std).astype(param_dtype))
