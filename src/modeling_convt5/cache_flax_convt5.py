"""Decoding state in Flax: constant size and shape, so that one compiled loop serves all positions.

The counterpart of cache_convt5.py. transformers' caches are objects that change; here a cache is a
pytree that goes in and comes out.

Shapes: B batch, S state length = left_taps * dilation, D d_model, N num_heads, H d_kv.
"""

try:  # in a `try`, or transformers would ask PyTorch's users to install JAX
    import jax
    import jax.numpy as jnp
    from flax import struct
except ImportError as error:
    raise ImportError("ConvT5 in Flax needs JAX and Flax: pip install jax flax") from error


@struct.dataclass
class FlaxLayerCache:
    """What one decoder layer remembers; what its kind of layer does not need is None.

    Attributes:
        conv_state: (B, S, D), the last S inputs of a convolution, oldest first.
        keys, values: (B, N, length, H) of an attention mixer, `length` the most tokens it can hold.
        cross_keys, cross_values: (B, N, encoder length, H) of the cross-attention.
    """

    conv_state: jax.Array | None = None
    keys: jax.Array | None = None
    values: jax.Array | None = None
    cross_keys: jax.Array | None = None
    cross_values: jax.Array | None = None


@struct.dataclass
class FlaxCache:
    """What a decoder remembers.

    Attributes:
        layers: one `FlaxLayerCache` a layer.
        seen: number of tokens read so far, an int32 array of shape ().
        encoder_summary: (B, 1, D), what a decoder without cross-attention knows of its input.
        length: the most tokens that attention mixers can hold; convolutions have no limit.
    """

    layers: tuple[FlaxLayerCache, ...]
    seen: jax.Array
    encoder_summary: jax.Array | None
    length: int = struct.field(pytree_node=False)

    def reorder_cache(self, beam_idx: jax.Array) -> "FlaxCache":
        """What a beam search goes on from: the rows `beam_idx` (B,) of every layer.

        A row takes the place of another row of the same text, so what was made from the text
        (cross-attention's keys and values, the encoder's summary) stays as it is.
        """
        own = ("conv_state", "keys", "values")
        layers = []
        for layer in self.layers:
            held = {name: getattr(layer, name) for name in own}
            held = {name: x[beam_idx] for name, x in held.items() if x is not None}
            layers.append(layer.replace(**held))
        return self.replace(layers=tuple(layers))


def new_cache(config, batch: int, length: int, dtype, cross, encoder_summary) -> FlaxCache:
    """An empty cache for the decoder of this configuration.

    Args:
        batch, length: rows, and the most tokens in each.
        dtype: of the states.
        cross: for each layer the encoder's keys and values (B, N, L, H), or None.
        encoder_summary: (B, 1, D) or None.
    """
    heads = (batch, config.num_heads, length, config.d_kv)
    layers = []
    for spec, cross_layer in zip(config.layer_specs("decoder"), cross, strict=True):
        own = {}
        if spec.mixer == "attention":
            own = {"keys": jnp.zeros(heads, dtype), "values": jnp.zeros(heads, dtype)}
        else:
            own["conv_state"] = jnp.zeros((batch, spec.state_length, config.d_model), dtype)
        if cross_layer is not None:
            own["cross_keys"], own["cross_values"] = cross_layer
        layers.append(FlaxLayerCache(**own))
    return FlaxCache(tuple(layers), jnp.zeros((), jnp.int32), encoder_summary, length)
