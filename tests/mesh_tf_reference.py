"""Mesh-TensorFlow's released convolutional models in NumPy, as plain as loops allow, with random
weights: what the converter is held to where the original is not at hand.

`MeshModel` knows the variables' names and the settings of the gin file; `forward` computes from the
variables by name. Nothing here is taken from the converter. Everything is float64.

Shapes: B batch, L length, M target length, D d_model, V vocabulary, K taps.
"""

from dataclasses import dataclass, field

import numpy as np

ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "swish": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}
CLASSES = {
    "conv": "LocalConvAttnBlock",
    "attention": "SelfAttention",
    "cross": "EncDecAttention",
    "mlp": "DenseReluDense",
}
ENCODER, DECODER = ["conv", "mlp"], ["conv", "cross", "mlp"]


def both(value):
    return {"encoder": value, "decoder": value}


@dataclass
class MeshModel:
    """The settings of a model; those in dictionaries are the encoder's and the decoder's."""

    vocab: int = 128
    d_model: int = 16
    d_ff: int = 24
    num_heads: int = 2
    d_kv: int = 6
    block: dict = field(default_factory=lambda: {"encoder": ENCODER, "decoder": DECODER})
    blocks: dict = field(default_factory=lambda: both(2))
    kind: dict = field(default_factory=lambda: both("lightweight"))
    window: dict = field(default_factory=lambda: {"encoder": (-4, 4), "decoder": (-8, 0)})
    repeats: dict = field(default_factory=lambda: both(1))
    conv_activation: str = "linear"
    ffn: str | list = "relu"
    ffn_bias: bool = False
    shared_embedding: bool = True
    tied: bool = True
    classifier_weights: bool = False
    positions: dict = field(default_factory=lambda: both("learned"))  # or "sinusoidal", None
    max_length: dict = field(default_factory=lambda: both(32))
    block_scope: bool = True
    legacy: bool = False
    buckets: int = 8
    relative: bool = True
    epsilon: float = 1e-6
    dropout: float = 0.1

    # --- names -------------------------------------------------------------------------------

    def sublayers(self, stack):
        """(scope, kind) of each sublayer, in order."""
        result = []
        for b in range(self.blocks[stack]):
            for n, kind in enumerate(self.block[stack]):
                at = (
                    f"block_{b:03d}/layer_{n:03d}"
                    if self.block_scope
                    else (f"layer_{len(result):03d}")
                )
                result.append((f"{stack}/{at}", kind))
        return result

    def norm(self, scope):
        return f"{scope}/{'layer_norm' if self.legacy else 'rms_norm'}/scale"

    def final_norm(self, stack):
        return f"{stack}/{'final_layer_norm' if self.legacy else 'rms_norm'}/scale"

    def table(self, stack, leaf):
        """The name of the stack's "embedding" or "positional_embedding"."""
        shared = self.shared_embedding
        if leaf == "positional_embedding":
            same_length = self.max_length["encoder"] == self.max_length["decoder"]
            shared = shared and same_length and None not in self.positions.values()
        return f"shared/{leaf}" if shared else f"{stack}/{leaf}"

    def relative_bias(self, stack):
        """The first attention's table serves the whole stack."""
        scopes = [scope for scope, kind in self.sublayers(stack) if kind == "attention"]
        return f"{scopes[0]}/SelfAttention/relative_attention_bias"

    # --- variables ---------------------------------------------------------------------------

    def shapes(self):
        """Name -> shape of every variable."""
        d, result = self.d_model, {}
        for stack in ("encoder", "decoder"):
            result[self.table(stack, "embedding")] = (self.vocab, d)
            if self.positions[stack] == "learned":
                table = self.table(stack, "positional_embedding")
                result[table] = (self.max_length[stack], d)
            for scope, kind in self.sublayers(stack):
                result[self.norm(scope)] = (d,)
                inner = f"{scope}/{CLASSES[kind]}"
                result |= getattr(self, f"_{kind}_shapes")(stack, inner)
            result[self.final_norm(stack)] = (d,)
            if self.relative and "attention" in self.block[stack]:
                result[self.relative_bias(stack)] = (self.num_heads, self.buckets)
        if not self.tied:
            result["decoder/logits/kernel"] = (d, self.vocab)
        return result

    def _conv_shapes(self, stack, scope):
        d, m = self.d_model, self.d_model // self.repeats[stack]
        first, last = self.window[stack]
        separable = f"{scope}/separable_conv1d"
        denses = [f"{scope}/local_conv_inp_{i}" for i in range(2)]
        denses += [f"{separable}/pointwise_dense", f"{scope}/local_conv_attn_op_projection"]
        result = {}
        for name in denses:
            result |= {f"{name}/kernel": (d, d), f"{name}/bias": (d,)}
        result[f"{separable}/depthwise_conv_hack/depthwise_dense_0/bias"] = (d,)
        for i in range(last - first + 1):
            if self.kind[stack] == "dynamic":
                name = f"{scope}/dyn_conv_depthwise_dense_{i}"
                result |= {f"{name}/kernel": (d, m), f"{name}/bias": (m,)}
            else:
                result[f"{scope}/lightwt_depthwise_dense_{i}/kernel"] = (m,)
        return result

    def _attention_shapes(self, stack, scope):
        d, inner = self.d_model, self.num_heads * self.d_kv
        return {f"{scope}/{part}": (d, inner) for part in "qkv"} | {f"{scope}/o": (inner, d)}

    _cross_shapes = _attention_shapes

    def _mlp_shapes(self, stack, scope):
        gated = isinstance(self.ffn, list)
        result = {}
        for part in ("wi_0", "wi_1") if gated else ("wi",):
            result[f"{scope}/{part}/kernel"] = (self.d_model, self.d_ff)
            result |= {f"{scope}/{part}/bias": (self.d_ff,)} if self.ffn_bias else {}
        result[f"{scope}/wo/kernel"] = (self.d_ff, self.d_model)
        return result | ({f"{scope}/wo/bias": (self.d_model,)} if self.ffn_bias else {})

    def random_variables(self, seed=0):
        """Values of order 1 everywhere, so that no mistake is hidden by a small weight."""
        rng = np.random.default_rng(seed)
        values = {}
        for name, shape in self.shapes().items():
            value = rng.standard_normal(shape)
            if name.endswith("/scale"):
                value = 1 + 0.3 * value
            elif name.endswith("/bias"):
                value *= 0.3
            elif len(shape) == 2 and "embedding" not in name and "relative" not in name:
                value *= shape[0] ** -0.5
            elif self.classifier_weights and name.endswith("/embedding"):
                value *= shape[1] ** -0.5
            values[name] = value.astype(np.float32)
        return values

    # --- gin ---------------------------------------------------------------------------------

    def gin(self):
        """The operative configuration, as far as it concerns the model."""
        lines = [
            "import mesh_tensorflow.transformer.transformer",
            "# Macros:",
            *(f"{name} = {getattr(self, name)}" for name in ("d_model", "d_ff", "d_kv")),
            f"num_heads = {self.num_heads}  # of attention",
            f"dropout_rate = {self.dropout}",
            f"Bitransformer.shared_embedding = {self.shared_embedding}",
            f"VocabEmbedding.scale_variable_like_classifier_weights = {self.classifier_weights}",
            f"sublayer_rms_norm.epsilon = {self.epsilon}",
            "sublayer_dropout.dropout_rate = %dropout_rate",
            "unit_scaling_convention.value = False",
            "run.batch_size = ('tokens_per_batch', 65536)",
            "run.layout_rules = \\",
            "    'batch:batch,d_ff:model # not a comment'",
        ]
        for stack in ("encoder", "decoder"):
            lines += self._stack_gin(stack)
        return "\n".join(lines) + "\n"

    def _stack_gin(self, stack):
        classes = [f"@transformer_layers.{CLASSES[kind]}" for kind in self.block[stack]]
        first, last = self.window[stack]
        position = self.positions[stack]
        settings = {
            "make_layer_stack.layers": "\\\n    [" + ",\n     ".join(classes) + "]",
            "make_layer_stack.num_layers": self.blocks[stack],
            "make_layer_stack.block_scope": self.block_scope,
            "DenseReluDense.activation": repr(self.ffn),
            "DenseReluDense.hidden_size": "%d_ff",
            "DenseReluDense.use_bias": self.ffn_bias,
            "LayerStack.dropout_rate": self.dropout if self.legacy else None,
            "LayerStack.norm_epsilon": 1e-6 if self.legacy else None,
            "LayerStack.sublayers_initial": "[@transformer.sublayer_dropout]",
            "LayerStack.sublayers_final": "[@transformer.sublayer_rms_norm, "
            "@transformer.sublayer_dropout]",
            "LayerStack.sublayers_per_layer": "[@transformer.sublayer_rms_norm, "
            "@transformer.sublayer_call_layer, @transformer.sublayer_dropout, "
            "@transformer.sublayer_residual]",
            "Unitransformer.d_model": "%d_model",
            "Unitransformer.max_length": self.max_length[stack],
            "Unitransformer.positional_embedding": position is not None,
            "Unitransformer.sinusoid_positional_embedding": position == "sinusoidal",
            "Unitransformer.shared_embedding_and_softmax_weights": self.tied,
        }
        if {"attention", "cross"} & set(self.block[stack]):
            settings["SelfAttention.num_heads"] = "%num_heads"
            settings["SelfAttention.key_value_size"] = "%d_kv"
            settings["SelfAttention.fold_scaling_into_initializer"] = True
        if "attention" in self.block[stack]:
            settings["SelfAttention.relative_attention_num_buckets"] = self.buckets
            settings["SelfAttention.relative_attention_type"] = (
                "'bias_shared'" if self.relative else None
            )
        if "conv" in self.block[stack]:
            settings["LocalConvAttnBlock.output_size"] = "%d_model"
            settings["LocalConvAttnBlock.activation"] = repr(self.conv_activation)
            settings["LocalConvAttnBlock.attention_type"] = repr(self.kind[stack] + "_conv")
            settings["LocalConvAttnBlock.min_relative_pos"] = first
            settings["LocalConvAttnBlock.max_relative_pos"] = last
            settings["LocalConvAttnBlock.num_unique_depth_filters"] = 2  # reaches nobody
            settings["Conv1DLocalAttn.num_unique_depth_filters"] = self.repeats[stack]
        return [f"{stack}/{name} = {value}" for name, value in settings.items()]

    # --- the model ---------------------------------------------------------------------------

    def forward(self, variables, inputs, decoder_inputs, mask_start):
        """encoder_output (B, L, D) and logits (B, M, V).

        Args:
            inputs, decoder_inputs: (B, L) and (B, M) ids, 0 for padding.
            mask_start: hide decoder inputs that are 0 from the convolutions: as in training, not
                as in decoding.
        """
        return _Forward(self, variables)(inputs, decoder_inputs, mask_start)

    def greedy(self, variables, inputs, length):
        """(B, length) ids, zeros after each row's 1."""
        ids = np.zeros((len(inputs), length + 1), np.int64)
        ended = np.zeros(len(inputs), bool)
        for t in range(length):
            _, logits = self.forward(variables, inputs, ids[:, : t + 1], mask_start=False)
            ids[:, t + 1] = np.where(ended, 0, logits[:, t].argmax(-1))
            ended |= ids[:, t + 1] == 1
        return ids[:, 1:]


class _Forward:
    def __init__(self, model, variables):
        self.model = model
        self.variables = {name: value.astype(np.float64) for name, value in variables.items()}

    def __call__(self, inputs, decoder_inputs, mask_start):
        tokens = inputs != 0
        encoded = self.stack("encoder", inputs, tokens, None, None)
        shown = decoder_inputs != 0 if mask_start else np.ones(decoder_inputs.shape, bool)
        decoded = self.stack("decoder", decoder_inputs, shown, encoded, tokens)
        if not self.model.tied:
            return encoded, decoded @ self.variables["decoder/logits/kernel"]
        if not self.model.classifier_weights:
            decoded = decoded * self.model.d_model**-0.5
        return encoded, decoded @ self.variables[self.model.table("decoder", "embedding")].T

    def stack(self, name, ids, tokens, encoded, encoder_tokens):
        model = self.model
        x = self.variables[model.table(name, "embedding")][ids]
        if model.classifier_weights:
            x = x * model.d_model**0.5
        length = ids.shape[1]
        if model.positions[name] == "learned":
            x = x + self.variables[model.table(name, "positional_embedding")][:length]
        elif model.positions[name] == "sinusoidal":
            rates = np.exp(-np.log(1e4) * np.arange(model.d_model // 2) / (model.d_model // 2 - 1))
            angles = np.arange(length)[:, None] * rates
            x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        for scope, kind in model.sublayers(name):
            h = self.rms_norm(x, model.norm(scope))
            inner = f"{scope}/{CLASSES[kind]}"
            if kind == "conv":
                x = x + self.convolution(name, inner, h, tokens)
            elif kind == "mlp":
                x = x + self.mlp(inner, h)
            elif kind == "cross":
                visible = np.broadcast_to(
                    encoder_tokens[:, None, :], (*ids.shape, encoder_tokens.shape[1])
                )
                x = x + self.attention(inner, h, encoded, visible)
            else:
                x = x + self.self_attention(name, inner, h, tokens)
        return self.rms_norm(x, model.final_norm(name))

    def rms_norm(self, x, name):
        mean = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.model.epsilon) * self.variables[name]

    def dense(self, scope, x):
        return x @ self.variables[f"{scope}/kernel"] + self.variables.get(f"{scope}/bias", 0)

    def convolution(self, stack, scope, h, tokens):
        model, length = self.model, h.shape[1]
        first, last = model.window[stack]
        gate = self.dense(f"{scope}/local_conv_inp_1", h)
        g = self.dense(f"{scope}/local_conv_inp_0", h) / (1 + np.exp(-gate))
        taps = []
        for i in range(last - first + 1):
            if model.kind[stack] == "dynamic":
                tap = self.dense(f"{scope}/dyn_conv_depthwise_dense_{i}", g)
            else:
                tap = self.variables[f"{scope}/lightwt_depthwise_dense_{i}/kernel"]
                tap = np.broadcast_to(tap, (*h.shape[:2], len(tap)))
            taps.append(np.concatenate([tap] * model.repeats[stack], axis=-1))
        weights = np.exp(taps) / np.exp(taps).sum(axis=0)
        masked = g * tokens[:, :, None]
        separable = f"{scope}/separable_conv1d"
        bias = self.variables[f"{separable}/depthwise_conv_hack/depthwise_dense_0/bias"]
        y = np.zeros_like(g) + bias
        for t in range(length):
            for i, weight in enumerate(weights):
                if 0 <= t + first + i < length:
                    y[:, t] += weight[:, t] * masked[:, t + first + i]
        y = self.dense(f"{separable}/pointwise_dense", y)
        y = ACTIVATIONS[model.conv_activation](y)
        return self.dense(f"{scope}/local_conv_attn_op_projection", y)

    def mlp(self, scope, h):
        if isinstance(self.model.ffn, str):
            hidden = ACTIVATIONS[self.model.ffn](self.dense(f"{scope}/wi", h))
        else:
            parts = [self.dense(f"{scope}/wi_{i}", h) for i in range(2)]
            hidden = ACTIVATIONS[self.model.ffn[0]](parts[0]) * parts[1]
        return self.dense(f"{scope}/wo", hidden)

    def self_attention(self, stack, scope, h, tokens):
        length, causal = h.shape[1], stack == "decoder"
        visible = np.broadcast_to(tokens[:, None, :], (len(h), length, length))
        bias = 0
        if causal:  # a row's padding is behind every token
            visible = np.broadcast_to(np.tril(np.ones((length, length), bool)), visible.shape)
        if self.model.relative:
            table = self.variables[self.model.relative_bias(stack)]
            buckets = [
                [self.bucket(key - query, causal) for key in range(length)]
                for query in range(length)
            ]
            bias = table[:, np.array(buckets)]
        return self.attention(scope, h, h, visible, bias)

    def bucket(self, distance, causal, max_distance=128):
        """T5's: half of the buckets for single distances, the rest growing logarithmically."""
        count, start = self.model.buckets, 0
        if not causal:
            count //= 2
            start = count if distance > 0 else 0
        distance = max(-distance, 0) if causal else abs(distance)
        exact = count // 2
        if distance < exact:
            return start + distance
        far = np.log(distance / exact) / np.log(max_distance / exact) * (count - exact)
        return start + min(exact + int(far), count - 1)

    def attention(self, scope, h, memory, visible, bias=0):
        heads = self.model.num_heads

        def split(x):
            return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

        q = split(h @ self.variables[f"{scope}/q"])
        k, v = (split(memory @ self.variables[f"{scope}/{part}"]) for part in "kv")
        scores = q @ k.transpose(0, 1, 3, 2) + bias
        scores = np.where(visible[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = (weights @ v).transpose(0, 2, 1, 3)
        return mixed.reshape(*mixed.shape[:2], -1) @ self.variables[f"{scope}/o"]
