"""Configuration of ConvT5: T5's fields, the convolution's fields, and the named presets.

A ConvT5 layer is T5's with one slot changed: the token mixing of a layer is a convolution
("depthwise", "lightweight", "dynamic") or T5's own self-attention ("attention"). Most users type
one preset name, `ConvT5Config.from_preset("lightweight-base")`; the rare switches at the end of
`ConvT5Config.__init__` exist so that the released Mesh-TensorFlow checkpoints convert exactly.

This file imports no deep-learning framework.
"""

import os
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .presets_convt5 import DILATED_WINDOWS, PRESETS

MIXERS = ("depthwise", "lightweight", "dynamic", "attention")
FILTER_SHARINGS = ("block", "strided")
POSITION_EMBEDDINGS = (None, "learned", "sinusoidal")
# Written into every saved config.json, so that each Auto class finds its code in the folder.
AUTO_MAP = {
    "AutoConfig": "configuration_convt5.ConvT5Config",
    "AutoModel": "modeling_convt5.ConvT5Model",
    "AutoModelForSeq2SeqLM": "modeling_convt5.ConvT5ForConditionalGeneration",
    "AutoModelForTextEncoding": "modeling_convt5.ConvT5EncoderModel",
    "AutoModelForSequenceClassification": "modeling_convt5.ConvT5ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_convt5.ConvT5ForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_convt5.ConvT5ForQuestionAnswering",
}
CUSTOM_PIPELINES = {
    "text2text-generation": {
        "impl": "pipeline_convt5.Text2TextGenerationPipeline",
        "pt": ["AutoModelForSeq2SeqLM"],
        "tf": [],
    }
}
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
ACTIVATIONS = ("linear", "relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid")


@dataclass(frozen=True)
class LayerSpec:
    """What one layer of a stack is made of.

    Attributes:
        mixer: one of `MIXERS`.
        kernel_size: number of taps K (unused by "attention").
        dilation: distance between two taps, in tokens.
        left_taps: how many of the K taps lie left of the current position; output t reads
            positions t + (i - left_taps) * dilation for i = 0 ... K - 1.
        cross_attention: whether the layer attends to the encoder (decoder only).
    """

    mixer: str
    kernel_size: int
    dilation: int
    left_taps: int
    cross_attention: bool

    @property
    def state_length(self) -> int:
        """Length of the `conv_state` that one-token decoding keeps, in tokens."""
        return 0 if self.mixer == "attention" else self.left_taps * self.dilation


class ConvT5Config(PretrainedConfig):
    """Configuration of every ConvT5 model; arguments not listed here are `PretrainedConfig`'s.

    Fields marked "per layer" take one value for the whole stack or a list with one per layer.

    Args:
        vocab_size, d_model, d_kv, d_ff, num_layers, num_decoder_layers, num_heads,
        relative_attention_num_buckets, relative_attention_max_distance, dropout_rate,
        layer_norm_epsilon, initializer_factor, feed_forward_proj, use_cache, pad_token_id,
        eos_token_id, decoder_start_token_id, tie_word_embeddings, classifier_dropout:
            as in `T5Config`, with its defaults.
        encoder_mixers, decoder_mixers (per layer): "depthwise" (plain filter), "lightweight"
            (filter softmax-normalised over its taps), "dynamic" (filter predicted from each
            position's gated input, then softmax) or "attention" (T5's self-attention).
        encoder_kernel_size, decoder_kernel_size (per layer): taps K of a filter, 1 or more.
        encoder_dilation, decoder_dilation (per layer): distance between taps, 1 or more.
        encoder_left_taps, decoder_left_taps (per layer): taps left of the current position. None
            centres the window in the encoder (for an even K the extra tap is on the left) and
            ends it at the current position in the decoder (K - 1).
        num_filters: distinct filters F of a layer, a divisor of d_model; None is one per channel.
        filter_sharing: "block" (the paper: d_model / F consecutive channels share a filter) or
            "strided" (the released code: channel c uses filter c mod F).
        filter_dropout: probability of dropping a tap of the normalised filter in training
            (DropConnect; 0.1 in fairseq's lightweight convolution).
        gate: multiply the mixer's input projection by a sigmoid gate (paper, section 3).
        cross_attention (per layer): whether a decoder layer attends to the encoder. Where no
            layer does, the masked mean of the encoder's output, through one learned projection,
            is added to the decoder's input embeddings.
        mixer_bias: biases on every dense of the convolution mixer and on its filters.
        mlp_bias: biases on the denses of the feed-forward sublayer.
        pointwise: an extra d_model x d_model dense after the convolution (released code).
        pointwise_activation: activation after the pointwise dense, one of `ACTIVATIONS`.
        position_embeddings: None (a convolution needs none), "learned" or "sinusoidal".
        max_position_embeddings: length of the position table; longer inputs raise ValueError.
        share_embeddings: one token table for encoder and decoder.
        share_position_embeddings: one table of learned positions for encoder and decoder; None
            follows `share_embeddings`.
        scale_embeddings: multiply token embeddings by sqrt(d_model).
        scale_decoder_outputs: multiply the decoder's output by d_model ** -0.5 before the
            logits; None follows `tie_word_embeddings`, as in T5.
        mask_decoder_start: hide decoder positions that hold `decoder_start_token_id` from the
            convolutions, as the released code does in training and scoring but not in decoding.

    Raises:
        ValueError: naming the field, its value, what is allowed and the fix.
    """

    model_type = "convt5"
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    def __init__(
        self,
        vocab_size: int = 32128,
        d_model: int = 512,
        d_kv: int = 64,
        d_ff: int = 2048,
        num_layers: int = 6,
        num_decoder_layers: int | None = None,
        num_heads: int = 8,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        dropout_rate: float = 0.1,
        layer_norm_epsilon: float = 1e-6,
        initializer_factor: float = 1.0,
        feed_forward_proj: str = "relu",
        is_encoder_decoder: bool = True,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 1,
        decoder_start_token_id: int | None = 0,
        tie_word_embeddings: bool = True,
        classifier_dropout: float = 0.0,
        encoder_mixers: str | list[str] = "lightweight",
        decoder_mixers: str | list[str] = "lightweight",
        encoder_kernel_size: int | list[int] = 7,
        decoder_kernel_size: int | list[int] = 7,
        encoder_dilation: int | list[int] = 1,
        decoder_dilation: int | list[int] = 1,
        encoder_left_taps: int | list[int | None] | None = None,
        decoder_left_taps: int | list[int | None] | None = None,
        num_filters: int | None = None,
        filter_sharing: str = "block",
        filter_dropout: float = 0.0,
        gate: bool = True,
        cross_attention: bool | list[bool] = True,
        # The rare switches: what the released checkpoints need beyond the paper's block.
        mixer_bias: bool = False,
        mlp_bias: bool = False,
        pointwise: bool = False,
        pointwise_activation: str = "linear",
        position_embeddings: str | None = None,
        max_position_embeddings: int = 512,
        share_embeddings: bool = True,
        share_position_embeddings: bool | None = None,
        scale_embeddings: bool = False,
        scale_decoder_outputs: bool | None = None,
        mask_decoder_start: bool = False,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.d_kv = d_kv
        self.d_ff = d_ff
        self.num_layers = num_layers
        self.num_decoder_layers = num_layers if num_decoder_layers is None else num_decoder_layers
        self.num_heads = num_heads
        self.relative_attention_num_buckets = relative_attention_num_buckets
        self.relative_attention_max_distance = relative_attention_max_distance
        self.dropout_rate = dropout_rate
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_factor = initializer_factor
        self.feed_forward_proj = feed_forward_proj
        self.use_cache = use_cache
        self.classifier_dropout = classifier_dropout
        self.encoder_mixers = encoder_mixers
        self.decoder_mixers = decoder_mixers
        self.encoder_kernel_size = encoder_kernel_size
        self.decoder_kernel_size = decoder_kernel_size
        self.encoder_dilation = encoder_dilation
        self.decoder_dilation = decoder_dilation
        self.encoder_left_taps = encoder_left_taps
        self.decoder_left_taps = decoder_left_taps
        self.num_filters = num_filters
        self.filter_sharing = filter_sharing
        self.filter_dropout = filter_dropout
        self.gate = gate
        self.cross_attention = cross_attention
        self.mixer_bias = mixer_bias
        self.mlp_bias = mlp_bias
        self.pointwise = pointwise
        self.pointwise_activation = pointwise_activation
        self.position_embeddings = position_embeddings
        self.max_position_embeddings = max_position_embeddings
        self.share_embeddings = share_embeddings
        self.share_position_embeddings = (
            share_embeddings if share_position_embeddings is None else share_position_embeddings
        )
        self.scale_embeddings = scale_embeddings
        self.scale_decoder_outputs = (
            tie_word_embeddings if scale_decoder_outputs is None else scale_decoder_outputs
        )
        self.mask_decoder_start = mask_decoder_start
        # Set here as well as through `super()`: transformers 4 and 5 treat the arguments of the
        # base class differently, and T5 has no beginning-of-sequence token.
        self.tie_word_embeddings = tie_word_embeddings
        kwargs.setdefault("bos_token_id", None)
        super().__init__(
            pad_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            decoder_start_token_id=decoder_start_token_id,
            is_encoder_decoder=is_encoder_decoder,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        # Plain attributes in every version of transformers: JSON must carry them.
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id
        self.decoder_start_token_id = decoder_start_token_id
        self._validate()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ConvT5Config":
        """As `PretrainedConfig.from_dict`, but not for another model's dictionary.

        Raises:
            ValueError: for a `model_type` other than "convt5", whose weights would not be found.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            _fail(
                "model_type",
                model_type,
                repr(cls.model_type),
                "Open other models with an Auto class, such as AutoModelForSeq2SeqLM.",
            )
        loaded = super().from_dict(config_dict, **kwargs)
        # Fields given beside the dictionary are set without passing `__init__`.
        (loaded[0] if isinstance(loaded, tuple) else loaded)._validate()
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As `PretrainedConfig.save_pretrained`, with all of `AUTO_MAP` and the pipelines."""
        self.auto_map, self.custom_pipelines = dict(AUTO_MAP), deepcopy(CUSTOM_PIPELINES)
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As `PretrainedConfig.to_dict`; `pipeline()` leaves classes where JSON needs names."""
        output = super().to_dict()
        if "custom_pipelines" in output:
            output["custom_pipelines"] = deepcopy(CUSTOM_PIPELINES)
        return output

    def __hash__(self) -> int:
        # Configurations are compared by content; Flax keeps models' settings as dictionary keys.
        return hash(self.to_json_string(use_diff=False))

    @property
    def is_gated_act(self) -> bool:
        """Whether the feed-forward sublayer is gated ("gated-gelu" and the like), as in T5 1.1."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def dense_act_fn(self) -> str:
        """Activation of the feed-forward sublayer; T5's "gated-gelu" is the tanh approximation."""
        if self.feed_forward_proj == "gated-gelu":
            return "gelu_new"
        return self.feed_forward_proj.removeprefix("gated-")

    @property
    def filters_per_layer(self) -> int:
        """F: distinct filters of one convolution layer."""
        return self.d_model if self.num_filters is None else self.num_filters

    def layer_specs(self, stack: str) -> list[LayerSpec]:
        """Every layer of one stack, first to last.

        Args:
            stack: "encoder" or "decoder".

        Raises:
            ValueError: if a per-layer list does not fit the number of layers, or a window is wrong.
        """
        count = self.num_layers if stack == "encoder" else self.num_decoder_layers
        mixers = self._per_layer(f"{stack}_mixers", count)
        kernel_sizes = self._per_layer(f"{stack}_kernel_size", count)
        dilations = self._per_layer(f"{stack}_dilation", count)
        left_taps = self._per_layer(f"{stack}_left_taps", count)
        cross = self._per_layer("cross_attention", count) if stack == "decoder" else [False] * count
        specs = []
        for i in range(count):
            kernel_size, left = kernel_sizes[i], left_taps[i]
            if left is None:
                left = kernel_size // 2 if stack == "encoder" else kernel_size - 1
            specs.append(LayerSpec(mixers[i], kernel_size, dilations[i], left, cross[i]))
        return specs

    @property
    def has_cross_attention(self) -> bool:
        """Whether any decoder layer attends to the encoder; if none does, its mean is added."""
        return any(spec.cross_attention for spec in self.layer_specs("decoder"))

    def receptive_field(self, stack: str = "encoder") -> int | None:
        """Tokens that one output of a stack can see; None is all of them (an attention layer)."""
        specs = self.layer_specs(stack)
        if any(spec.mixer == "attention" for spec in specs):
            return None
        return 1 + sum((spec.kernel_size - 1) * spec.dilation for spec in specs)

    def num_parameters(self) -> int:
        """Parameters of `ConvT5ForConditionalGeneration`, tied weights counted once."""
        d, tables = self.d_model, 1 if self.share_embeddings else 2
        total = tables * self.vocab_size * d
        if not self.tie_word_embeddings:
            total += self.vocab_size * d
        if self.position_embeddings == "learned":
            position_tables = 1 if self.share_position_embeddings else 2
            total += position_tables * self.max_position_embeddings * d
        if not self.has_cross_attention:
            total += d * d
        for stack in ("encoder", "decoder"):
            specs = self.layer_specs(stack)
            total += d + sum(self._layer_parameters(spec) for spec in specs)
            if any(spec.mixer == "attention" for spec in specs):
                total += self.relative_attention_num_buckets * self.num_heads
        return total

    def _layer_parameters(self, spec: LayerSpec) -> int:
        d, filters = self.d_model, self.filters_per_layer * spec.kernel_size
        attention = 4 * d * self.num_heads * self.d_kv
        bias = int(self.mixer_bias)
        if spec.mixer == "attention":
            mixer = attention
        else:
            denses = (2 if self.gate else 1) + self.pointwise + 1
            mixer = denses * (d * d + bias * d) + bias * d
            mixer += (d * filters + bias * filters) if spec.mixer == "dynamic" else filters
        wide = (2 if self.is_gated_act else 1) * self.d_ff
        mlp = d * wide + self.d_ff * d + (wide + d if self.mlp_bias else 0)
        cross = attention + d if spec.cross_attention else 0
        return mixer + mlp + cross + 2 * d

    def flops_per_token(self, length: int = 512) -> dict[str, float]:
        """Forward floating-point operations (two per multiply-add) for one token of each stack.

        Counts the matrix products and the filters' taps, at `length` tokens in both stacks;
        norms, activations and softmaxes are left out. Attention's `length` term makes the cost
        of a row quadratic, the convolution's K term keeps it linear. "decoder" includes
        cross-attention (with its keys and values, one encoder token per decoder token) and
        the logits.
        """
        d, inner = self.d_model, self.num_heads * self.d_kv
        mlp = d * self.d_ff * (3 if self.is_gated_act else 2)
        totals = {}
        for stack in ("encoder", "decoder"):
            total = self.vocab_size * d if stack == "decoder" else 0
            for spec in self.layer_specs(stack):
                total += mlp
                attended = 4 * d * inner + 2 * length * inner
                total += attended if spec.cross_attention else 0
                if spec.mixer == "attention":
                    total += attended
                    continue
                denses = (2 if self.gate else 1) + self.pointwise + 1
                total += denses * d * d + spec.kernel_size * d
                if spec.mixer == "dynamic":
                    total += d * self.filters_per_layer * spec.kernel_size
            totals[stack] = 2.0 * total
        return totals

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ConvT5Config":
        """A named configuration: {lightweight, dynamic, dilated, transformer}-{tiny, small, base,
        large} (the paper's block; the paper gives base only, the other sizes are ours) or
        released-{lightweight-small, lightweight-base, lightweight-large, dynamic-base,
        dynamic-large} (the published checkpoints; sizes inferred from parameter counts).

        Args:
            name: one of `PRESETS`.
            overrides: fields that replace the preset's.

        Raises:
            ValueError: for an unknown name or a wrong override.
        """
        if name not in PRESETS:
            raise ValueError(
                f"ConvT5Config.from_preset(name={name!r}): unknown preset. "
                f"Choose one of {', '.join(PRESETS)}."
            )
        unknown = sorted(set(overrides) - set(cls().to_dict()) - set(cls.attribute_map))
        if unknown:
            raise ValueError(
                f"ConvT5Config.from_preset({name!r}): unknown field {', '.join(unknown)}. "
                "Check the spelling against ConvT5Config's arguments."
            )
        overrides = {cls.attribute_map.get(key, key): value for key, value in overrides.items()}
        fields = {**PRESETS[name], **overrides}
        if name.startswith("dilated-"):
            for stack, key in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
                count = fields.get(key) or fields["num_layers"]
                windows = [DILATED_WINDOWS[12 * i // count] for i in range(count)]
                overrides.setdefault(f"{stack}_kernel_size", [taps for taps, _ in windows])
                overrides.setdefault(f"{stack}_dilation", [dilation for _, dilation in windows])
        return cls(**{**fields, **overrides})

    def _per_layer(self, field: str, count: int) -> list:
        value = getattr(self, field)
        if not isinstance(value, (list, tuple)):
            return [value] * count
        if len(value) != count:
            layers = "num_layers" if field.startswith("encoder") else "num_decoder_layers"
            _fail(field, value, f"one value or a list of {layers}={count} values", "Fit the list.")
        return list(value)

    def _validate(self) -> None:
        self._validate_sizes()
        self._validate_choices()
        for stack in ("encoder", "decoder"):
            specs = self._validate_layers(stack)
            if stack == "decoder":
                for spec in specs:
                    if spec.left_taps < spec.kernel_size - 1 and spec.mixer != "attention":
                        _fail(
                            "decoder_left_taps",
                            self.decoder_left_taps,
                            f"at least kernel size - 1 = {spec.kernel_size - 1}",
                            "A decoder window may not reach right of the current position; "
                            "leave it None for a causal window.",
                        )

    def _validate_sizes(self) -> None:
        for field in (
            "vocab_size",
            "d_model",
            "d_kv",
            "d_ff",
            "num_layers",
            "num_decoder_layers",
            "num_heads",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
            "max_position_embeddings",
        ):
            if not _is_int(getattr(self, field), 1):
                _fail(field, getattr(self, field), "an integer of at least 1", "Set a size.")
        buckets = self.relative_attention_num_buckets
        exact = {"encoder": buckets // 4, "decoder": buckets // 2}
        for stack in ("encoder", "decoder"):
            if "attention" in _as_list(getattr(self, f"{stack}_mixers")):
                if exact[stack] < 1:
                    _fail(
                        "relative_attention_num_buckets",
                        buckets,
                        f"at least {4 if stack == 'encoder' else 2} with attention in the {stack}",
                        "T5 uses 32.",
                    )
                if self.relative_attention_max_distance <= exact[stack]:
                    _fail(
                        "relative_attention_max_distance",
                        self.relative_attention_max_distance,
                        f"more than {exact[stack]}, the distances that have a bucket of their own",
                        "T5 uses 128 with 32 buckets.",
                    )
        if self.num_labels < 1:
            _fail("num_labels", self.num_labels, "at least 1", "A regression has one.")
        filters = self.num_filters
        if filters is not None and (not _is_int(filters, 1) or self.d_model % filters):
            _fail(
                "num_filters",
                filters,
                f"None or a divisor of d_model={self.d_model}",
                "The paper uses 2; None gives every channel its own filter.",
            )
        for field in ("dropout_rate", "filter_dropout", "classifier_dropout"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                _fail(field, value, "a number from 0 to below 1", "It is a probability.")
        for field in ("layer_norm_epsilon", "initializer_factor"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                _fail(field, value, "a number above 0", "T5 uses 1e-6 and 1.0.")

    def _validate_choices(self) -> None:
        choices = {
            "filter_sharing": FILTER_SHARINGS,
            "pointwise_activation": ACTIVATIONS,
            "position_embeddings": POSITION_EMBEDDINGS,
            "problem_type": PROBLEM_TYPES,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                names = ", ".join(repr(name) for name in allowed)
                _fail(field, getattr(self, field), f"one of {names}", "Check the spelling.")
        if self.pointwise_activation != "linear" and not self.pointwise:
            _fail(
                "pointwise_activation",
                self.pointwise_activation,
                "'linear' while pointwise=False",
                "Set pointwise=True: the activation follows the pointwise dense.",
            )
        if self.position_embeddings == "sinusoidal" and self.d_model % 2:
            _fail("d_model", self.d_model, "an even number", "Sinusoids come in pairs.")
        projection = self.feed_forward_proj
        plain = ACTIVATIONS[1:]
        if not isinstance(projection, str) or projection.removeprefix("gated-") not in plain:
            _fail(
                "feed_forward_proj",
                projection,
                f"an activation or 'gated-' and an activation, of {', '.join(plain)}",
                "T5 uses 'relu', T5 1.1 'gated-gelu'.",
            )
        for field in (
            "use_cache",
            "tie_word_embeddings",
            "gate",
            "mixer_bias",
            "mlp_bias",
            "pointwise",
            "share_embeddings",
            "share_position_embeddings",
            "scale_embeddings",
            "scale_decoder_outputs",
            "mask_decoder_start",
        ):
            if not isinstance(getattr(self, field), bool):
                _fail(field, getattr(self, field), "True or False", "Set a boolean.")

    def _validate_layers(self, stack: str) -> list[LayerSpec]:
        for mixer in _as_list(getattr(self, f"{stack}_mixers")):
            if mixer not in MIXERS:
                names = ", ".join(repr(name) for name in MIXERS)
                _fail(f"{stack}_mixers", mixer, f"one of {names}", "Check the spelling.")
        for field, least in (("kernel_size", 1), ("dilation", 1), ("left_taps", 0)):
            for value in _as_list(getattr(self, f"{stack}_{field}")):
                if not (_is_int(value, least) or (value is None and field == "left_taps")):
                    _fail(
                        f"{stack}_{field}",
                        value,
                        f"an integer of at least {least}" + (" or None" if least == 0 else ""),
                        "Give one value or a list of one per layer.",
                    )
        for value in _as_list(self.cross_attention):
            if not isinstance(value, bool):
                _fail("cross_attention", value, "True or False", "Or a list of one per layer.")
        return self.layer_specs(stack)


def _fail(field: str, value: Any, allowed: str, fix: str) -> None:
    raise ValueError(f"ConvT5Config.{field}={value!r} is not allowed: expected {allowed}. {fix}")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
