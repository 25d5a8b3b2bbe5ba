"""Mesh-TensorFlow's variables beside ConvT5's weights: one table, read in both directions.

`Names` is what a checkpoint's names say of the model's structure; `table` lists every weight of the
ConvT5 model with the variables it is made of. Every variable stands in the table exactly once;
whatever the table and a file do not agree on is an error that lists all of it (`check`).

The variables of a stack S, with b the number of a block, and l of a sublayer in it:

    S/block_{b:03d}/layer_{l:03d}/rms_norm/scale      legacy: layer_norm/scale
    S/block_{b:03d}/layer_{l:03d}/KIND/...            without block scope: S/layer_{l:03d}/...
    S/rms_norm/scale                                  legacy: S/final_layer_norm/scale

Dense kernels are (in, out), PyTorch's weights are (out, in).
Shapes: D d_model, F num_filters, K kernel_size, V vocabulary, m filters of one variable.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from modeling_convt5 import ConvT5Config

from .tf_checkpoint import Variable

STACKS = ("encoder", "decoder")
CONVOLUTION, ATTENTION = "LocalConvAttnBlock", "SelfAttention"
CROSS_ATTENTION, MLP = "EncDecAttention", "DenseReluDense"
_KINDS = (CONVOLUTION, ATTENTION, CROSS_ATTENTION, MLP)
_LIGHTWEIGHT, _DYNAMIC = "lightwt_depthwise_dense", "dyn_conv_depthwise_dense"
# What an optimizer keeps for a variable (Adafactor, Adam). With the step, all that is dropped.
_SLOT = re.compile(r"^(?P<variable>.+)(_slot_(v|vr|vc|m)|/adam_[mv])$")
_STEP = "global_step"


class MappingError(ValueError):
    """A checkpoint that is not a ConvT5 model, or not a whole one; the message lists everything."""


@dataclass(frozen=True)
class Layer:
    """The scopes of one ConvT5 layer's sublayers; `cross_attention` is None where it has none."""

    mixer: str
    cross_attention: str | None
    mlp: str


@dataclass(frozen=True)
class Names:
    """The structure that a checkpoint's names tell.

    Attributes:
        layers: of each stack.
        blocks: of each stack, the kinds of the sublayers of each block (one block in all where
            there is no block scope).
        norm, final_norm: of each stack, the scope of a sublayer's norm, and the last norm's.
        mixers: ConvT5's mixer, by the scope of the sublayer.
        taps: kernel size, by the scope of a convolution.
        embeddings: the token table of each stack.
        positions: the position table of each stack, or None.
        relative_bias: the variable of each stack's relative positions, or None.
        logits: the kernel of untied logits, or None.
        block_scope, gated_mlp, mlp_bias: whether the names say so.
    """

    layers: dict[str, list[Layer]]
    blocks: dict[str, list[list[str]]]
    norm: dict[str, str]
    final_norm: dict[str, str]
    mixers: dict[str, str]
    taps: dict[str, int]
    embeddings: dict[str, str]
    positions: dict[str, str | None]
    relative_bias: dict[str, str | None]
    logits: str | None
    block_scope: dict[str, bool]
    gated_mlp: bool
    mlp_bias: bool


@dataclass(frozen=True)
class Entry:
    """One weight of ConvT5 and the variables it is made of.

    Attributes:
        key, shape: ConvT5's.
        variables: names in the order in which they are joined; none for a weight of zeros.
        variable_shape: of each of them.
        arrangement: one of those of `to_weight`.
    """

    key: str
    shape: tuple[int, ...]
    variables: tuple[str, ...]
    variable_shape: tuple[int, ...]
    arrangement: str

    def to_weight(self, arrays: list[np.ndarray]) -> np.ndarray:
        """ConvT5's weight from the variables' values."""
        if self.arrangement == "as is":
            return arrays[0]
        if self.arrangement == "transposed":
            return arrays[0].T
        if self.arrangement == "joined":  # rows of one dense after another
            return np.concatenate([array.T for array in arrays])
        if self.arrangement == "taps":  # (m,) or (D, m) a tap -> (m, K[, D]) -> rows f * K + i
            weight = np.stack([array.T for array in arrays], axis=1)
            copies = self._filters // weight.shape[0]
            return np.tile(weight, (copies, *[1] * (weight.ndim - 1))).reshape(self.shape)
        weight = np.zeros(self.shape, np.float32)  # "padded": rows that the variable has not
        for array in arrays:
            weight[: len(array)] = array
        return weight

    def to_variables(self, weight: np.ndarray) -> list[np.ndarray]:
        """The inverse of `to_weight`."""
        if self.arrangement == "as is":
            return [weight]
        if self.arrangement == "transposed":
            return [weight.T]
        if self.arrangement == "joined":
            return [part.T for part in np.split(weight, len(self.variables))]
        if self.arrangement == "taps":
            taps = weight.reshape(self._filters, len(self.variables), *self.variable_shape[:-1])
            return [taps[: self.variable_shape[-1], i].T for i in range(len(self.variables))]
        return [weight[: self.variable_shape[0]] for _ in self.variables]

    @property
    def _filters(self) -> int:
        """F: channel c uses filter c mod F, so where m < F the filters repeat."""
        return math.prod(self.shape) // (len(self.variables) * math.prod(self.variable_shape[:-1]))


def read_names(names: Iterable[str]) -> Names:
    """The structure of a model from its variables' names.

    Raises:
        MappingError: for sublayers that ConvT5 does not have, or not in that order.
    """
    names = {name for name in names if not is_dropped(name)}
    sublayers = {stack: _sublayers(names, stack) for stack in STACKS}
    kinds = {scope: kind for found in sublayers.values() for scope, kind in found}
    layers = {stack: _layers(stack, found) for stack, found in sublayers.items()}
    norm, final_norm = {}, {}
    for stack in STACKS:
        legacy = not any(f"{scope}/rms_norm/scale" in names for scope, _ in sublayers[stack])
        norm[stack] = "layer_norm" if legacy else "rms_norm"
        usual = "final_layer_norm" if legacy else "rms_norm"
        found = [n for n in ("rms_norm", "layer_norm") if f"{stack}/{n}/scale" in names]
        final_norm[stack] = f"{stack}/{found[0] if found else usual}/scale"
    mixers, taps = {}, {}
    for stack in STACKS:
        convolutions = [scope for scope, kind in sublayers[stack] if kind == CONVOLUTION]
        counts = {scope: _taps(names, f"{scope}/{CONVOLUTION}") for scope in convolutions}
        for scope, (mixer, _) in counts.items():
            mixers[scope] = mixer
            # One window a stack: a layer with fewer taps than another lacks variables.
            taps[scope] = max(count for _, count in counts.values())
    mixers |= {scope: "attention" for scope, kind in kinds.items() if kind == ATTENTION}
    mlp = [f"{scope}/{MLP}" for scope, kind in kinds.items() if kind == MLP]
    return Names(
        layers=layers,
        blocks={stack: _blocks(found) for stack, found in sublayers.items()},
        norm=norm,
        final_norm=final_norm,
        mixers=mixers,
        taps=taps,
        embeddings={s: _shared_or_own(names, s, "embedding") or "shared/embedding" for s in STACKS},
        positions={s: _shared_or_own(names, s, "positional_embedding") for s in STACKS},
        relative_bias={s: _relative_bias(names, sublayers[s]) for s in STACKS},
        logits="decoder/logits/kernel" if "decoder/logits/kernel" in names else None,
        block_scope={s: "/block_" in sublayers[s][0][0] for s in STACKS},
        gated_mlp=any(f"{scope}/wi_0/kernel" in names for scope in mlp),
        mlp_bias=any(f"{scope}/wo/bias" in names for scope in mlp),
    )


def table(config: ConvT5Config, names: Names, variables: dict[str, Variable]) -> list[Entry]:
    """Every weight of the model with its variables, in the order of the model's own state.

    Args:
        config: the model's configuration.
        names: the checkpoint's structure.
        variables: the checkpoint's. Only filters and position tables are looked up: these may be
            smaller than the model's weights.
    """
    return _Table(config, names, variables).entries


class _Table:
    """Builds `entries`; each method adds what one module of the model consists of."""

    def __init__(self, config, names, variables):
        self.config, self.names, self.variables = config, names, variables
        self.entries: list[Entry] = []
        self._embeddings()
        for stack in STACKS:
            self._stack(stack)
        if names.logits:
            vocab, d_model = config.vocab_size, config.d_model
            self._add("lm_head.weight", (vocab, d_model), [names.logits], "transposed")

    def _embeddings(self):
        config, names = self.config, self.names
        shape = (config.vocab_size, config.d_model)
        for stack in STACKS[:1] if config.share_embeddings else STACKS:
            key = "shared" if config.share_embeddings else f"{stack}.embed_tokens"
            self._add(f"{key}.weight", shape, [names.embeddings[stack]])
        if config.position_embeddings != "learned":
            return
        shape = (config.max_position_embeddings, config.d_model)
        shared = config.share_position_embeddings
        for stack in STACKS[:1] if shared else STACKS:
            key = "shared_positions" if shared else f"{stack}.embed_positions"
            source = names.positions[stack]
            own = (self._size(source, 0, shape[0]), config.d_model)
            self._add(f"{key}.weight", shape, [source] if source else [], "padded", own)

    def _stack(self, stack):
        config, names = self.config, self.names
        specs = config.layer_specs(stack)
        if any(spec.mixer == "attention" for spec in specs):
            key, source = f"{stack}.relative_attention_bias.weight", names.relative_bias[stack]
            shape = (config.relative_attention_num_buckets, config.num_heads)
            sources, arrangement = ([source], "transposed") if source else ([], "padded")
            self._add(key, shape, sources, arrangement)
        for i, (layer, spec) in enumerate(zip(names.layers[stack], specs, strict=True)):
            key = f"{stack}.layers.{i}"
            self._norm(f"{key}.pre_mixer_norm", stack, layer.mixer)
            if spec.mixer == "attention":
                self._attention(f"{key}.mixer", f"{layer.mixer}/{ATTENTION}")
            else:
                self._convolution(f"{key}.mixer", f"{layer.mixer}/{CONVOLUTION}", spec)
            if layer.cross_attention:
                self._norm(f"{key}.pre_cross_attention_norm", stack, layer.cross_attention)
                scope = f"{layer.cross_attention}/{CROSS_ATTENTION}"
                self._attention(f"{key}.cross_attention", scope)
            self._norm(f"{key}.pre_mlp_norm", stack, layer.mlp)
            self._mlp(f"{key}.mlp", f"{layer.mlp}/{MLP}")
        self._add(f"{stack}.final_norm.weight", (config.d_model,), [names.final_norm[stack]])

    def _norm(self, key, stack, scope):
        source = f"{scope}/{self.names.norm[stack]}/scale"
        self._add(f"{key}.weight", (self.config.d_model,), [source])

    def _attention(self, key, scope):
        d_model, inner = self.config.d_model, self.config.num_heads * self.config.d_kv
        for part in ("q", "k", "v"):
            self._add(f"{key}.{part}.weight", (inner, d_model), [f"{scope}/{part}"], "transposed")
        self._add(f"{key}.o.weight", (d_model, inner), [f"{scope}/o"], "transposed")

    def _convolution(self, key, scope, spec):
        config, d_model = self.config, self.config.d_model
        gates = [f"{scope}/local_conv_inp_{i}" for i in range(2)]  # W_I, then the gate's W_S
        self._dense(f"{key}.in_proj", gates, d_model, d_model, config.mixer_bias)
        self._filter(key, scope, spec)
        separable = f"{scope}/separable_conv1d"
        bias = f"{separable}/depthwise_conv_hack/depthwise_dense_0/bias"
        self._add(f"{key}.conv_bias", (d_model,), [bias])
        for name, source in (
            ("pointwise", f"{separable}/pointwise_dense"),
            ("out_proj", f"{scope}/local_conv_attn_op_projection"),
        ):
            self._dense(f"{key}.{name}", [source], d_model, d_model, config.mixer_bias)

    def _filter(self, key, scope, spec):
        config, d_model = self.config, self.config.d_model
        filters, rows = config.filters_per_layer, config.filters_per_layer * spec.kernel_size
        name = _DYNAMIC if spec.mixer == "dynamic" else _LIGHTWEIGHT
        taps = [f"{scope}/{name}_{i}" for i in range(spec.kernel_size)]
        kernels, biases = [f"{tap}/kernel" for tap in taps], [f"{tap}/bias" for tap in taps]
        own = self._size(kernels[0], -1, filters)
        if spec.mixer == "dynamic":
            projection = f"{key}.filter_proj"
            self._add(f"{projection}.weight", (rows, d_model), kernels, "taps", (d_model, own))
            self._add(f"{projection}.bias", (rows,), biases, "taps", (own,))
        else:
            self._add(f"{key}.filter", (filters, spec.kernel_size), kernels, "taps", (own,))

    def _mlp(self, key, scope):
        d_model, d_ff, bias = self.config.d_model, self.config.d_ff, self.config.mlp_bias
        for part in ("wi_0", "wi_1") if self.names.gated_mlp else ("wi",):
            self._dense(f"{key}.{part}", [f"{scope}/{part}"], d_model, d_ff, bias)
        self._dense(f"{key}.wo", [f"{scope}/wo"], d_ff, d_model, bias)

    def _dense(self, key, scopes, inputs, outputs, bias):
        rows = len(scopes) * outputs
        kernels, biases = [f"{s}/kernel" for s in scopes], [f"{s}/bias" for s in scopes]
        self._add(f"{key}.weight", (rows, inputs), kernels, "joined", (inputs, outputs))
        if bias:
            self._add(f"{key}.bias", (rows,), biases, "joined", (outputs,))

    def _add(self, key, shape, sources, arrangement="as is", variable_shape=None):
        if variable_shape is None:
            variable_shape = shape[::-1] if arrangement == "transposed" else shape
        self.entries.append(Entry(key, shape, tuple(sources), variable_shape, arrangement))

    def _size(self, name, axis, largest):
        """A size of a variable that may be smaller than the model's; `largest` if it is not."""
        shape = self.variables[name].shape if name in self.variables else ()
        return shape[axis] if shape and 1 <= shape[axis] <= largest else largest


def check(entries: list[Entry], variables: dict[str, Variable]) -> dict[str, int]:
    """That table and checkpoint name the same variables, in the same shapes.

    Returns:
        How many variables of each kind the conversion leaves out: optimizer slots and the step.

    Raises:
        MappingError: listing every missing and unclaimed variable, and every wrong shape.
    """
    expected = {name: entry.variable_shape for entry in entries for name in entry.variables}
    assert len(expected) == sum(len(entry.variables) for entry in entries)
    problems = [
        f"missing: {name} {shape}" for name, shape in expected.items() if name not in variables
    ]
    dropped = {"optimizer slots": 0, _STEP: 0}
    for name, variable in variables.items():
        slot = _SLOT.match(name)
        if name in expected:
            if variable.shape != expected[name]:
                problems.append(
                    f"wrong shape: {name} is {variable.shape}, expected {expected[name]}"
                )
            elif "float" not in variable.dtype:
                problems.append(f"wrong dtype: {name} is {variable.dtype}, expected a float")
        elif name == _STEP:
            dropped[_STEP] += 1
        elif slot and slot["variable"] in expected:
            dropped["optimizer slots"] += 1
        else:
            problems.append(f"unclaimed: {name} {variable.shape}")
    if problems:
        raise MappingError(
            "The checkpoint's variables are not those of a ConvT5 model:\n  "
            + "\n  ".join(problems)
        )
    return dropped


def is_dropped(name: str) -> bool:
    """Whether a name is an optimizer's slot or the step, which a model does not need."""
    return name == _STEP or bool(_SLOT.match(name))


def _sublayers(names, stack):
    """(scope, kind) of a stack's sublayers, in order."""
    pattern = re.compile(rf"^({stack}/(?:block_(\d{{3}})/)?layer_(\d{{3}}))/(\w+)/")
    found, unknown = {}, []
    for name in sorted(names):
        match = pattern.match(name)
        if not match or match[4] in ("rms_norm", "layer_norm"):
            continue
        place = (-1 if match[2] is None else int(match[2]), int(match[3]))
        kinds = {kind for _, kind in found.get(place, set())}
        if match[4] not in _KINDS or kinds - {match[4]}:
            unknown.append(name)
        else:
            found.setdefault(place, set()).add((match[1], match[4]))
    if unknown:
        raise MappingError(
            f"The {stack} has sublayers that ConvT5 has not (it has {', '.join(_KINDS)}, one in "
            "each layer scope):\n  unclaimed: " + "\n  unclaimed: ".join(unknown)
        )
    if not found:
        raise MappingError(
            f"There are no variables {stack}/.../layer_NNN/: not a Mesh-TensorFlow encoder-decoder."
        )
    blocks = sorted({block for block, _ in found})
    places = [(b, n) for b in blocks for n in range(1 + max(n for c, n in found if c == b))]
    whole = blocks == [-1] or blocks == list(range(len(blocks)))
    absent = [place for place in places if place not in found]
    if not whole or absent:
        at = ", ".join(f"layer {n}" + (f" of block {b}" if b >= 0 else "") for b, n in absent)
        raise MappingError(
            f"The {stack} is not whole: it has the blocks {blocks}"
            + (f", and no variables of {at}." if absent else ", expected 0, 1, 2 ... or none.")
        )
    return [sublayer for place in places for sublayer in found[place]]


def _layers(stack, sublayers):
    """ConvT5's layers: a mixer, cross-attention in a decoder, an mlp."""
    layers, rest = [], list(sublayers)
    while rest:
        mixer = rest.pop(0) if rest[0][1] in (CONVOLUTION, ATTENTION) else None
        cross = rest.pop(0) if rest and rest[0][1] == CROSS_ATTENTION else None
        mlp = rest.pop(0) if rest and rest[0][1] == MLP else None
        if not mixer or not mlp or (cross and stack == "encoder"):
            raise MappingError(
                f"The {stack}'s sublayers are {', '.join(kind for _, kind in sublayers)}: "
                f"expected, again and again, {CONVOLUTION} or {ATTENTION}, then "
                + (f"{CROSS_ATTENTION}, then " if stack == "decoder" else "")
                + f"{MLP}."
            )
        layers.append(Layer(mixer[0], cross and cross[0], mlp[0]))
    return layers


def _blocks(sublayers):
    blocks = {}
    for scope, kind in sublayers:
        blocks.setdefault(scope.rsplit("/", 1)[0], []).append(kind)
    return list(blocks.values())


def _taps(names, scope):
    """The mixer and the number of taps of a convolution."""
    pattern = re.compile(rf"^{re.escape(scope)}/({_LIGHTWEIGHT}|{_DYNAMIC})_(0|[1-9]\d{{0,3}})/")
    matches = [match for match in map(pattern.match, names) if match]
    kinds = {match[1] for match in matches}
    if len(kinds) != 1:
        raise MappingError(
            f"{scope} has {'no filters' if not kinds else 'filters of two kinds'}: expected "
            f"{_LIGHTWEIGHT}_0, _1, ... or {_DYNAMIC}_0, _1, ..."
        )
    mixer = "dynamic" if kinds == {_DYNAMIC} else "lightweight"
    return mixer, 1 + max(int(match[2]) for match in matches)


def _shared_or_own(names, stack, leaf):
    own = f"{stack}/{leaf}"
    return f"shared/{leaf}" if f"shared/{leaf}" in names else own if own in names else None


def _relative_bias(names, sublayers):
    """Of the first attention that has one; with "bias_shared" it serves all the others."""
    for scope, kind in sublayers:
        name = f"{scope}/{ATTENTION}/relative_attention_bias"
        if kind == ATTENTION and name in names:
            return name
    return None
