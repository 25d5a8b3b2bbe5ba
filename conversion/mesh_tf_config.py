"""The configuration of the ConvT5 model that a Mesh-TensorFlow checkpoint holds.

Every size comes from the variables' shapes, what shapes cannot tell (windows, heads, activations,
dropout, sinusoids) from operative_config.gin. What both tell must agree. Settings of the gin file
under which Mesh-TensorFlow computes something that ConvT5 does not are refused.
"""

import math
from typing import Any

from modeling_convt5 import ConvT5Config

from .gin_config import GinConfig, Reference
from .mesh_tf_names import (
    ATTENTION,
    CONVOLUTION,
    CROSS_ATTENTION,
    MLP,
    STACKS,
    MappingError,
    Names,
)
from .tf_checkpoint import Variable

# (function, parameter): the values under which ConvT5 computes the same. None is also "not set".
_ONLY = {
    ("unit_scaling_convention", "value"): (False,),
    ("SelfAttention", "fold_scaling_into_initializer"): (True,),
    ("SelfAttention", "num_memory_heads"): (0,),
    ("SelfAttention", "shared_kv"): (False,),
    ("SelfAttention", "combine_dims"): (True,),
    ("SelfAttention", "keep_query_heads_dims"): (False,),
    ("SelfAttention", "attention_func"): (),
    ("SelfAttention", "attention_kwargs"): ({},),
    ("SelfAttention", "use_hyperprompt"): (False,),
    ("SelfAttention", "hyperprompt_length_encoder"): (),
    ("SelfAttention", "hyperprompt_length_decoder"): (),
    ("SelfAttention", "relative_attention_type"): ("bias", "bias_shared"),
    ("EncDecAttention", "relative_attention_type"): (),
    ("Unitransformer", "ensemble"): (),
    ("Unitransformer", "input_full_attention"): (False,),
    ("make_layer_stack", "layer_stack_cls"): ("LayerStack",),
    ("make_bitransformer", "encoder_name"): ("encoder",),
    ("make_bitransformer", "decoder_name"): ("decoder",),
    ("make_bitransformer", "bitransformer_cls"): ("Bitransformer",),
    ("get_vocab_embedding_cls", "cls"): ("VocabEmbedding",),
}
# Around each sublayer, and last; dropouts and the mask of padding may stand anywhere.
_SUBLAYERS = {
    "sublayers_initial": [],
    "sublayers_per_layer": ["sublayer_rms_norm", "sublayer_call_layer", "sublayer_residual"],
    "sublayers_final": ["sublayer_rms_norm"],
}
_NO_EFFECT = ("sublayer_dropout", "sublayer_mask_padding", "sublayer_clip_activation_gradient")
# Mesh-TensorFlow's activations by ConvT5's names; its gelu is the tanh approximation.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu_new",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}


def infer_config(
    variables: dict[str, Variable],
    names: Names,
    gin: GinConfig | None,
    num_heads: int | None = None,
) -> tuple[ConvT5Config, list[str]]:
    """The model's configuration, and what had to be assumed because no gin file says it.

    Args:
        variables: the checkpoint's.
        names: the structure that their names tell.
        gin: the operative configuration, or None where there is none.
        num_heads: for a checkpoint without gin file whose variables do not tell.

    Raises:
        MappingError: for sizes that variables and gin file state differently (both are shown), and
            for settings that ConvT5 does not have.
    """
    return _Inference(variables, names, gin, num_heads).run()


class _Inference:
    def __init__(self, variables, names, gin, num_heads):
        self.variables, self.names, self.gin, self.num_heads = variables, names, gin, num_heads
        self.assumed: list[str] = []
        self.problems: list[str] = []
        self._d_model = self._size(names.embeddings["encoder"], 2, 1)

    def run(self):
        fields = {**self._sizes(), **self._mixers(), **self._attention(), **self._mlp()}
        fields |= {**self._embeddings(), **self._regularisation()}
        if self.gin is not None:
            self._check_structure()
            self._check_settings()
        if self.problems:
            raise MappingError(
                "The checkpoint cannot be converted:\n  " + "\n  ".join(self.problems)
            )
        return ConvT5Config(**fields), self.assumed

    # --- what is read ------------------------------------------------------------------------

    def _size(self, name, rank, axis):
        """A size of a variable that must be there."""
        if name not in self.variables:
            raise MappingError(f"missing: {name}, from which the model's sizes are read.")
        shape = self.variables[name].shape
        if len(shape) != rank or min(shape) < 1:
            raise MappingError(f"wrong shape: {name} is {shape}, expected {rank} sizes.")
        return shape[axis]

    def _get(self, stack, function, parameter, default=None):
        return default if self.gin is None else self.gin.get(stack, function, parameter, default)

    def _agree(self, what, from_shapes, from_gin):
        """A value that the gin file states must be that of the variables."""
        if from_gin is not None and from_gin != from_shapes:
            self.problems.append(
                f"{what}: the variables say {from_shapes}, {self.gin.path.name} says {from_gin}"
            )

    def _both(self, what, values):
        """The one value of both stacks; ConvT5 has no field for two."""
        if values["encoder"] != values["decoder"]:
            self.problems.append(
                f"{what}: {values['encoder']!r} in the encoder and {values['decoder']!r} in the "
                "decoder, which ConvT5 cannot express"
            )
        return values["decoder"]

    # --- the fields --------------------------------------------------------------------------

    def _sizes(self):
        for stack in STACKS:
            for function, parameter in (
                ("Unitransformer", "d_model"),
                (CONVOLUTION, "output_size"),
            ):
                size = self._get(stack, function, parameter)
                self._agree(f"{stack}'s {parameter}", self._d_model, size)
        layers = self.names.layers
        return {
            "num_layers": len(layers["encoder"]),
            "num_decoder_layers": len(layers["decoder"]),
        }

    def _mixers(self):
        fields, filters, activations = {}, set(), {}
        for stack in STACKS:
            scopes = [layer.mixer for layer in self.names.layers[stack]]
            fields[f"{stack}_mixers"] = _one([self.names.mixers[scope] for scope in scopes])
            convolutions = [scope for scope in scopes if scope in self.names.taps]
            if convolutions:
                fields |= self._window(stack, self.names.taps[convolutions[0]])
                filters |= {self._filters(stack, scope) for scope in convolutions}
                activations[stack] = _name(self._get(stack, CONVOLUTION, "activation", "linear"))
        if filters:
            count, d_model = math.lcm(*filters), self._d_model
            fields["num_filters"] = None if count == d_model else count
            fields |= {"filter_sharing": "strided", "mixer_bias": True, "pointwise": True}
            fields["pointwise_activation"] = self._pointwise_activation(activations)
        return fields

    def _window(self, stack, kernel_size):
        first = self._get(stack, CONVOLUTION, "min_relative_pos")
        last = self._get(stack, CONVOLUTION, "max_relative_pos")
        fields = {f"{stack}_kernel_size": kernel_size}
        if self.gin is None:
            usual = "centred" if stack == "encoder" else "ending at the current position"
            self.assumed.append(f"the {stack}'s window of {kernel_size} taps: {usual}")
        elif first is None or last is None:
            self.problems.append(
                f"{stack}'s window: {self.gin.path.name} does not set {CONVOLUTION}."
                "min_relative_pos and max_relative_pos, so it is not whole"
            )
        elif not (_is_int(first) and _is_int(last) and last - first + 1 == kernel_size):
            self.problems.append(
                f"{stack}'s kernel size: the variables say {kernel_size}, {self.gin.path.name} "
                f"says positions {first} to {last}"
            )
        elif first > 0 or (stack == "decoder" and last > 0):
            self.problems.append(
                f"{stack}'s window: positions {first} to {last}, expected a first one of at most 0"
                + (" and a last one of at most 0" if stack == "decoder" else "")
            )
        elif -first != (kernel_size // 2 if stack == "encoder" else kernel_size - 1):
            fields[f"{stack}_left_taps"] = -first
        return fields

    def _filters(self, stack, scope):
        """Filters of a convolution: every variable of a tap has one column, or entry, for each."""
        mixer = self.names.mixers[scope]
        name, rank = ("dyn_conv", 2) if mixer == "dynamic" else ("lightwt", 1)
        kernel = f"{scope}/{CONVOLUTION}/{name}_depthwise_dense_0/kernel"
        filters = self._size(kernel, rank, -1)
        if self._d_model % filters:
            raise MappingError(
                f"wrong shape: {kernel} is {self.variables[kernel].shape}; its last size must "
                f"divide d_model = {self._d_model}."
            )
        # LocalConvAttnBlock has a parameter of that name too, which it passes to nobody.
        parameter = "num_unique_depth_filters"
        subclass = "DynamicConv1DLocalAttn" if mixer == "dynamic" else "LightweightConv1DLocalAttn"
        repeats = self._get(stack, "Conv1DLocalAttn", parameter)
        repeats = self._get(stack, subclass, parameter, repeats)
        self._agree(f"{stack}'s {parameter}", self._d_model // filters, repeats)
        kind = self._get(stack, CONVOLUTION, "attention_type")
        if len({self.names.mixers[s] for s in self.names.taps if s.startswith(stack)}) == 1:
            self._agree(f"{stack}'s attention_type", f"{mixer}_conv", kind)
        return filters

    def _pointwise_activation(self, activations):
        if self.gin is None:
            self.assumed.append("no activation after the pointwise dense")
        activation = next(iter(activations.values()))
        if len(activations) == 2:
            activation = self._both("LocalConvAttnBlock.activation", activations)
        if activation in ("linear", None):
            return "linear"
        return self._activation("LocalConvAttnBlock.activation", activation)

    def _activation(self, what, activation):
        if activation not in _ACTIVATIONS:
            self.problems.append(
                f"{what} is {activation!r}, expected one of {', '.join(map(repr, _ACTIVATIONS))}"
            )
        return _ACTIVATIONS.get(activation, "relu")

    def _attention(self):
        layers = self.names.layers
        cross = [layer.cross_attention is not None for layer in layers["decoder"]]
        if not any(cross):
            raise MappingError(
                f"The decoder has no {CROSS_ATTENTION}: expected it in one layer at least."
            )
        scopes = {
            stack: [f"{layer.mixer}/{ATTENTION}" for layer in layers[stack] if self._attends(layer)]
            for stack in STACKS
        }
        scopes["decoder"] += [
            f"{layer.cross_attention}/{CROSS_ATTENTION}"
            for layer in layers["decoder"]
            if layer.cross_attention
        ]
        inner = self._size(f"{scopes['decoder'][0]}/q", 2, 1)
        heads = self._heads(inner, [stack for stack in STACKS if scopes[stack]])
        fields = {"num_heads": heads, "d_kv": inner // heads, "cross_attention": _one(cross)}
        for stack in STACKS:
            attends = any(self._attends(layer) for layer in layers[stack])
            if attends and self.names.relative_bias[stack] is None:
                kind = self._get(stack, ATTENTION, "relative_attention_type")
                self._agree(f"{stack}'s relative_attention_type", None, kind)
                if self.gin is None:
                    self.assumed.append(f"no relative positions in the {stack}'s attention")
        buckets = {
            stack: self._size(name, 2, 1)
            for stack, name in self.names.relative_bias.items()
            if name is not None
        }
        for stack, count in buckets.items():
            parameter = "relative_attention_num_buckets"
            self._agree(f"{stack}'s {parameter}", count, self._get(stack, ATTENTION, parameter))
            fields[parameter] = count
        if len(buckets) == 2:
            self._both("relative_attention_num_buckets", buckets)
        return fields

    def _attends(self, layer):
        return self.names.mixers[layer.mixer] == "attention"

    def _heads(self, inner, stacks):
        """Number of heads: a table of relative positions, the gin file or the caller tells it."""
        heads, sizes = {}, {}  # by who states them
        for name in filter(None, self.names.relative_bias.values()):
            heads[name] = self._size(name, 2, 0)
        if self.gin is not None:
            for stack in stacks:
                source = f"{self.gin.path.name} ({stack})"
                macros = self.gin.macro("num_heads"), self.gin.macro("d_kv")
                heads[source] = self._get(stack, ATTENTION, "num_heads", macros[0])
                sizes[source] = self._get(stack, ATTENTION, "key_value_size", macros[1])
        if self.num_heads is not None:
            heads["--num_heads"] = self.num_heads
        heads = {source: value for source, value in heads.items() if value is not None}
        sizes = {source: value for source, value in sizes.items() if value is not None}
        said = [f"{source} says num_heads = {value}" for source, value in heads.items()]
        said += [f"{source} says key_value_size = {value}" for source, value in sizes.items()]
        if not said:
            raise MappingError(
                f"num_heads: the variables say that num_heads * d_kv = {inner}, but not how many "
                "heads these are. Put the operative_config.gin beside the checkpoint, or pass "
                "--num_heads."
            )
        if all(_is_int(value) and value >= 1 for value in [*heads.values(), *sizes.values()]):
            counts = {*heads.values(), *(inner // size for size in sizes.values())}
            count = counts.pop()
            products = [size * count for size in sizes.values()]
            if not counts and count >= 1 and inner % count == 0 and set(products) <= {inner}:
                return count
        raise MappingError(
            f"num_heads: the variables say num_heads * d_kv = {inner}; " + "; ".join(said) + "."
        )

    def _mlp(self):
        names, layers = self.names, self.names.layers
        first = "wi_0" if names.gated_mlp else "wi"
        kernel = f"{layers['encoder'][0].mlp}/{MLP}/{first}/kernel"
        d_ff = self._size(kernel, 2, 1)
        activations = {}
        for stack in STACKS:
            self._agree(f"{stack}'s d_ff", d_ff, self._get(stack, MLP, "hidden_size"))
            self._agree(f"{stack}'s use_bias", names.mlp_bias, self._get(stack, MLP, "use_bias"))
            activations[stack] = self._mlp_activation(stack)
        projection = self._both("DenseReluDense.activation", activations)
        return {"d_ff": d_ff, "mlp_bias": names.mlp_bias, "feed_forward_proj": projection}

    def _mlp_activation(self, stack):
        """T5's name of what DenseReluDense.activation says: a name, or a list of two factors."""
        gated = self.names.gated_mlp
        usual = ["gelu", "linear"] if gated else "relu"
        value = self._get(stack, MLP, "activation")
        if value is None:
            self.assumed.append(f"the {stack}'s DenseReluDense.activation: {usual}")
            value = usual
        factors = [_name(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
        what = f"{stack}'s DenseReluDense.activation"
        if gated != (len(factors) == 2) or (gated and factors[1] not in ("linear", None)):
            expected = "[ACTIVATION, 'linear'] (wi_0, wi_1)" if gated else "one activation (wi)"
            self.problems.append(f"{what}: the variables say {expected}, the gin file {value!r}")
            return "relu"
        if gated and factors[0] == "gelu":
            return "gated-gelu"  # T5's name for the tanh approximation with a gate
        return ("gated-" if gated else "") + self._activation(what, factors[0])

    def _embeddings(self):
        names, d_model = self.names, self._d_model
        shapes = {stack: self._size(names.embeddings[stack], 2, 0) for stack in STACKS}
        shared, tied = len(set(names.embeddings.values())) == 1, names.logits is None
        self._both("the vocabulary's size", shapes)
        self._agree("shared_embedding", shared, self._get("", "Bitransformer", "shared_embedding"))
        parameter = "shared_embedding_and_softmax_weights"
        self._agree(parameter, tied, self._get("decoder", "Unitransformer", parameter))
        parameter = "scale_variable_like_classifier_weights"
        scaled = {stack: self._get(stack, "VocabEmbedding", parameter) for stack in STACKS}
        if None in scaled.values():
            self.assumed.append(f"VocabEmbedding.{parameter} = False")
        scaled = self._both(parameter, {stack: bool(value) for stack, value in scaled.items()})
        return {
            "vocab_size": shapes["decoder"],
            "d_model": d_model,
            "share_embeddings": shared,
            "tie_word_embeddings": tied,
            "scale_embeddings": scaled,
            "scale_decoder_outputs": tied and not scaled,
            **self._positions(shared),
        }

    def _positions(self, shared):
        """Learned where there is a table, sinusoids where the gin file says so, else none."""
        kinds, lengths = {}, {}
        for stack in STACKS:
            table = self.names.positions[stack]
            sinusoid = self._get(stack, "Unitransformer", "sinusoid_positional_embedding")
            if sinusoid is None and not table:
                self.assumed.append(f"no sinusoids in the {stack}")
            kinds[stack] = "sinusoidal" if sinusoid else "learned" if table else None
            if kinds[stack] is None:
                learned = self._get(stack, "Unitransformer", "positional_embedding")
                self._agree(f"{stack}'s positional_embedding", False, learned)
                continue
            length = self._get(stack, "Unitransformer", "max_length")
            if kinds[stack] == "learned":
                lengths[stack] = self._size(table, 2, 0)
                self._agree(f"{stack}'s max_length", lengths[stack], length)
            elif length is not None:
                lengths[stack] = length
        fields = {}
        used = set(kinds.values())
        if used in ({"learned"}, {"learned", None}):
            same = self.names.positions["encoder"] == self.names.positions["decoder"]
            fields = {"position_embeddings": "learned", "share_position_embeddings": same}
        elif used == {"sinusoidal"}:
            fields = {"position_embeddings": "sinusoidal"}
        elif used != {None}:
            self._both("position embeddings", kinds)
        if lengths:
            # A shorter table is filled up with zeros: what Mesh-TensorFlow adds beyond its end.
            fields["max_position_embeddings"] = max(lengths.values())
        return fields

    def _regularisation(self):
        """Dropout and the norms' epsilon."""
        rates, epsilons = {}, {}
        for stack in STACKS:
            macro = None if self.gin is None else self.gin.macro("dropout_rate")
            rate = self._get(stack, "sublayer_dropout", "dropout_rate", macro)
            legacy = self._get(stack, "LayerStack", "dropout_rate")
            rates[stack] = rate if legacy is None else legacy
            epsilons[stack] = self._get(stack, "sublayer_rms_norm", "epsilon", 1e-6)
        fields = {"layer_norm_epsilon": self._both("sublayer_rms_norm.epsilon", epsilons)}
        if rates["decoder"] is None:
            self.assumed.append("dropout_rate 0.1")
            return fields
        return fields | {"dropout_rate": self._both("dropout_rate", rates)}

    # --- what only has to be as expected -------------------------------------------------------

    def _check_structure(self):
        for stack in STACKS:
            blocks, scope = self.names.blocks[stack], self.names.block_scope[stack]
            self._agree(
                f"{stack}'s block_scope", scope, self._get(stack, "make_layer_stack", "block_scope")
            )
            layers = self._get(stack, "make_layer_stack", "layers")
            count = self._get(stack, "make_layer_stack", "num_layers")
            if layers is not None:
                layers = [str(item) for item in layers] if isinstance(layers, (list, tuple)) else []
                own = blocks if scope else [blocks[0][: len(layers)]]
                for kinds in own[:1] + [kinds for kinds in own[1:] if kinds != own[0]]:
                    self._agree(f"{stack}'s layers", kinds, layers)
                if not scope and layers:
                    blocks = [layers] * (len(blocks[0]) // len(layers))
            if layers or scope:
                self._agree(f"{stack}'s number of blocks", len(blocks), count)

    def _check_settings(self):
        for (function, parameter), allowed in _ONLY.items():
            for stack in STACKS:
                value = _name(self._get(stack, function, parameter))
                if value is not None and value not in allowed:
                    self._refuse(f"{function}.{parameter}", value, allowed)
        for stack in STACKS:
            if self._get(stack, "LayerStack", "dropout_rate") is not None:
                continue  # legacy: Mesh-TensorFlow ignores the lists and takes the usual ones
            for parameter, usual in _SUBLAYERS.items():
                value = self._get(stack, "LayerStack", parameter)
                if value is None:
                    continue
                items = value if isinstance(value, list) else [value]
                names = [
                    str(item).replace("legacy_final_", "").replace("legacy_", "") for item in items
                ]
                if [name for name in names if name not in _NO_EFFECT] != usual:
                    self._refuse(f"LayerStack.{parameter}", names, usual)

    def _refuse(self, what, value, allowed):
        problem = f"{what} = {value!r} in {self.gin.path.name}, expected {allowed or None}"
        if problem not in self.problems:
            self.problems.append(problem)


def _one(values: list) -> Any:
    """The value that all layers have, or the list."""
    return values[0] if all(value == values[0] for value in values) else values


def _name(value: Any) -> Any:
    return str(value) if isinstance(value, Reference) else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
