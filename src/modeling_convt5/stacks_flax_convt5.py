"""What every ConvT5 model in Flax is made of, the twin of stacks_convt5.py.

Shapes: B batch, L length, D d_model.
"""

try:  # in a `try`, or transformers would ask PyTorch's users to install JAX
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
except ImportError as error:
    raise ImportError("ConvT5 in Flax needs JAX and Flax: pip install jax flax") from error

from .cache_flax_convt5 import FlaxCache, new_cache
from .checkpoint_flax_convt5 import FlaxCheckpointMixin
from .configuration_convt5 import ConvT5Config
from .convolution_flax import drop, hide_padding
from .layers_flax_convt5 import (
    FlaxConvT5Layer,
    FlaxEmbedding,
    FlaxLinear,
    FlaxRMSNorm,
    add,
    narrow,
    split_rng,
    widen,
)
from .masks_flax_convt5 import (
    FlaxTokenMasks,
    check_encoder_states,
    check_tensor,
    cross_attention_bias,
    self_attention_bias,
    sinusoids,
)
from .outputs_flax_convt5 import FlaxBaseModelOutput, FlaxBaseModelOutputWithPastAndCrossAttentions


class FlaxConvT5PreTrainedModel(FlaxCheckpointMixin, nnx.Module):
    """What all models share: their settings, their embeddings, loading and saving.

    Args:
        config: a `ConvT5Config`.
        dtype: what is computed in; None is `param_dtype`.
        param_dtype: what the parameters are kept in.
        rngs: draws the initial weights; None is `nnx.Rngs(0)`.
        mesh: the devices that batches are spread over (axes "data" and "fsdp"), or None.
        scan_layers: run repeating layers as a loop, so that compile time grows with the pattern
            of layers and not with their number. Parameters and results are the same.
        remat: compute a layer again in the backward pass instead of keeping what is inside it.
    """

    config_class = ConvT5Config

    def __init__(
        self,
        config: ConvT5Config,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs | None = None,
        mesh: Mesh | None = None,
        scan_layers: bool = False,
        remat: bool = False,
    ):
        self.config = config
        self.param_dtype = jnp.dtype(param_dtype)
        self.dtype = self.param_dtype if dtype is None else jnp.dtype(dtype)
        self.mesh = mesh
        self._build(
            {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs or nnx.Rngs(0)},
            {"mesh": mesh, "scan_layers": scan_layers, "remat": remat},
        )

    def _build(self, common, running):
        """Create the parameters, in the order of the PyTorch twin.

        `common` is what every module takes, `running` what stacks take besides.
        """
        raise NotImplementedError(f"{type(self).__name__} is a base class: use a model.")

    def _add_embeddings(self, config: ConvT5Config, common: dict) -> None:
        """Create the tables that the stacks share."""
        if config.share_embeddings:
            self.shared = FlaxEmbedding(config.vocab_size, config.d_model, config, **common)
        if config.position_embeddings == "learned" and config.share_position_embeddings:
            self.shared_positions = FlaxEmbedding(
                config.max_position_embeddings, config.d_model, config, **common
            )

    def _tables(self, stack: str) -> tuple[FlaxEmbedding, FlaxEmbedding | None]:
        """The token and the position table of a stack."""
        own = getattr(self, stack)
        tokens = self.shared if self.config.share_embeddings else own.embed_tokens
        return tokens, getattr(self, "shared_positions", own.embed_positions)

    def get_input_embeddings(self) -> FlaxEmbedding:
        return self._tables("encoder")[0]

    def _decoder_inputs_from_inputs(self, input_ids, attention_mask, segment_ids):
        """What the heads that read a text twice give the decoder: ids (B, L) and their mask.

        The text shifted right, as in T5. Left padding stays hidden and the start token takes its
        last place, so that it changes nothing; right padding is behind every token anyway.
        """
        if segment_ids is not None or attention_mask is None:
            return self._shift_right(input_ids, segment_ids), None
        seen = jax.lax.cummax((attention_mask != 0).astype(jnp.int32), axis=1)
        return self._shift_right(input_ids, seen), seen

    def _shift_right(self, input_ids: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Decoder inputs (B, L) from labels (B, L): the start token, then all labels but the last.

        -100 becomes the pad token; every example packed in a row begins with the start token.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                f"decoder_start_token_id={start} and pad_token_id={pad}: both must be set in the "
                "configuration to make decoder inputs from labels. T5 uses 0 for both."
            )
        shifted = jnp.pad(input_ids[:, :-1], ((0, 0), (1, 0)), constant_values=start)
        if segment_ids is not None:
            first = segment_ids[:, 1:] != segment_ids[:, :-1]
            first = jnp.pad(first, ((0, 0), (1, 0)), constant_values=True)
            shifted = jnp.where(first, start, shifted)
        return jnp.where(shifted == -100, pad, shifted)


class FlaxConvT5Stack(nnx.Module):
    """The encoder or the decoder: embeddings, layers, final norm.

    Args:
        config: the model's configuration.
        stack: "encoder" or "decoder".
        dtype, param_dtype, rngs, mesh, scan_layers, remat: as in `FlaxConvT5PreTrainedModel`.
    """

    def __init__(
        self,
        config: ConvT5Config,
        stack: str,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        mesh: Mesh | None = None,
        scan_layers: bool = False,
        remat: bool = False,
    ):
        self.config, self.is_decoder = config, stack == "decoder"
        self.mesh, self.scan_layers, self.remat = mesh, scan_layers, remat
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed_tokens = self.embed_positions = None
        if not config.share_embeddings:
            table = FlaxEmbedding(config.vocab_size, config.d_model, config, **common)
            self.embed_tokens = nnx.data(table)
        if config.position_embeddings == "learned" and not config.share_position_embeddings:
            rows = config.max_position_embeddings
            self.embed_positions = nnx.data(FlaxEmbedding(rows, config.d_model, config, **common))
        specs = config.layer_specs(stack)
        self.layers = nnx.List([FlaxConvT5Layer(config, spec, **common) for spec in specs])
        self.relative_attention_bias = self.encoder_summary = None
        if any(spec.mixer == "attention" for spec in specs):
            table = (config.relative_attention_num_buckets, config.num_heads, config)
            bias = FlaxEmbedding(*table, **common, fan_in=config.d_model)
            self.relative_attention_bias = nnx.data(bias)
        if self.is_decoder and not config.has_cross_attention:
            summary = FlaxLinear(config.d_model, config.d_model, False, config, **common)
            self.encoder_summary = nnx.data(summary)
        self.final_norm = FlaxRMSNorm(
            config.d_model, config.layer_norm_epsilon, config, param_dtype
        )

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        encoder_hidden_states: jax.Array | None = None,
        encoder_attention_mask: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
        past_key_values: FlaxCache | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        tables: tuple[FlaxEmbedding | None, FlaxEmbedding | None] = (None, None),
        dropout_rng: jax.Array | None = None,
    ) -> FlaxBaseModelOutput | FlaxBaseModelOutputWithPastAndCrossAttentions:
        """Run the stack; `attention_mask` and `segment_ids` are (B, L), see `FlaxConvT5Model`.

        Args:
            tables: the token and the position table that this stack reads.

        Returns `hidden_states` as T5 does: the embeddings, every layer's output, and last the
        final norm's. `attentions` has one entry for each layer whose mixer is "attention".
        """
        self._check_inputs(input_ids, inputs_embeds, attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self._embed_tokens(input_ids, tables[0])
        if encoder_hidden_states is not None:
            check_encoder_states(
                encoder_hidden_states, encoder_attention_mask, encoder_segment_ids, inputs_embeds
            )
        if past_key_values is not None and not isinstance(past_key_values, FlaxCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, expected what "
                "`init_cache` or an earlier call returned."
            )
        past, keys = 0, None
        if past_key_values is not None:
            past, keys = past_key_values.seen, past_key_values.length
        masks = FlaxTokenMasks(inputs_embeds, attention_mask, segment_ids, past, keys)
        hidden_states = self._embed(inputs_embeds, masks, tables[1])
        if self.encoder_summary is not None:
            if past_key_values is not None:
                hidden_states = add(hidden_states, past_key_values.encoder_summary)
            elif encoder_hidden_states is not None:
                summary = self._summarise(
                    encoder_hidden_states, encoder_attention_mask, encoder_segment_ids, segment_ids
                )
                hidden_states = add(hidden_states, summary)
        first_rng, *rngs, last_rng = split_rng(dropout_rng, len(self.layers) + 2)
        hidden_states = drop(hidden_states, self.config.dropout_rate, first_rng)
        tokens = masks.tokens
        if self.is_decoder and self.config.mask_decoder_start:
            tokens = self._hide_start(input_ids, tokens)
        self_bias = None
        if self.relative_attention_bias is not None:
            self_bias = self_attention_bias(
                self.relative_attention_bias, masks, self.config, causal=self.is_decoder
            )
        cross_bias = None
        if encoder_hidden_states is not None and self.config.has_cross_attention:
            cross_bias = cross_attention_bias(
                hidden_states, encoder_attention_mask, encoder_segment_ids, segment_ids
            )
        known = (tokens, segment_ids, self_bias, encoder_hidden_states, cross_bias)
        if past_key_values is None and not (output_attentions or output_hidden_states):
            hidden_states = self._run(hidden_states, known, rngs)
            all_hidden_states, weights = [], ((), ())
        else:
            options = {"output_attentions": output_attentions, "places": masks.places}
            hidden_states, all_hidden_states, weights, past_key_values = self._run_and_keep(
                hidden_states, known, rngs, past_key_values, options
            )
        hidden_states = self.final_norm(hidden_states)
        hidden_states = drop(hidden_states, self.config.dropout_rate, last_rng)
        fields = {
            "last_hidden_state": hidden_states,
            "hidden_states": (*all_hidden_states, hidden_states) if output_hidden_states else None,
            "attentions": _present(weights[0]) if output_attentions else None,
        }
        if not self.is_decoder:
            return FlaxBaseModelOutput(**fields)
        return FlaxBaseModelOutputWithPastAndCrossAttentions(
            **fields,
            past_key_values=past_key_values,
            cross_attentions=_present(weights[1]) if output_attentions else None,
        )

    def _run(self, hidden_states, known, rngs):
        """All layers, those that repeat as a loop if `scan_layers`, with `remat` if asked for."""
        hidden_states = self._spread(hidden_states)
        runs = [(i, 1, 1) for i in range(len(self.layers))]
        if self.scan_layers:
            stack = "decoder" if self.is_decoder else "encoder"
            runs = repeating_runs(self.config.layer_specs(stack))
        for start, period, repeats in runs:
            parts = [nnx.split(self.layers[start + i]) for i in range(period * repeats)]
            graphs = [graph for graph, _ in parts[:period]]

            def one_period(hidden_states, operands, graphs=graphs):
                for graph, (state, rng) in zip(graphs, operands, strict=True):
                    layer = nnx.merge(graph, state)
                    hidden_states = layer(hidden_states, *known, dropout_rng=rng)[0]
                    hidden_states = self._spread(hidden_states)
                return hidden_states, None

            if self.remat:
                one_period = jax.checkpoint(one_period)
            operands = [
                (state, rng)
                for (_, state), rng in zip(parts, rngs[start : start + len(parts)], strict=True)
            ]
            if repeats == 1:
                hidden_states, _ = one_period(hidden_states, operands)
            else:
                turns = [operands[i * period : (i + 1) * period] for i in range(repeats)]
                stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *turns)
                hidden_states, _ = jax.lax.scan(one_period, hidden_states, stacked)
        return hidden_states

    def _run_and_keep(self, hidden_states, known, rngs, past_key_values, options):
        """All layers one by one, keeping states, weights and caches on the way."""
        all_hidden_states, weights, caches = [], ([], []), []
        for i, layer in enumerate(self.layers):
            all_hidden_states.append(hidden_states)
            cache = None if past_key_values is None else past_key_values.layers[i]
            hidden_states, *kept, cache = layer(
                hidden_states, *known, cache, **options, dropout_rng=rngs[i]
            )
            weights[0].append(kept[0])
            weights[1].append(kept[1])
            caches.append(cache)
        if past_key_values is not None:
            seen = past_key_values.seen + hidden_states.shape[1]
            past_key_values = past_key_values.replace(layers=tuple(caches), seen=seen)
        return hidden_states, all_hidden_states, weights, past_key_values

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        encoder_hidden_states: jax.Array,
        encoder_attention_mask: jax.Array | None = None,
    ) -> FlaxCache:
        """An empty cache for at most `max_length` tokens, the encoder's keys and values in it."""
        cross = [
            None
            if layer.cross_attention is None
            else layer.cross_attention.keys_values(encoder_hidden_states)
            for layer in self.layers
        ]
        summary = None
        if self.encoder_summary is not None:
            summary = self._summarise(encoder_hidden_states, encoder_attention_mask, None, None)
        dtype = encoder_hidden_states.dtype
        return new_cache(self.config, batch_size, max_length, dtype, cross, summary)

    def _check_inputs(self, input_ids, inputs_embeds, attention_mask):
        prefix = "decoder_" if self.is_decoder else ""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"You must specify exactly one of {prefix}input_ids or {prefix}inputs_embeds"
                f"{' (or labels)' if self.is_decoder else ''}."
            )
        check_tensor(f"{prefix}input_ids", input_ids)
        check_tensor(f"{prefix}inputs_embeds", inputs_embeds)
        check_tensor(f"{prefix}attention_mask", attention_mask)
        if input_ids is not None:
            if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
                raise ValueError(
                    f"{prefix}input_ids has shape {input_ids.shape} and dtype {input_ids.dtype}, "
                    "expected integers of shape (batch, length)."
                )
            return
        shape, d_model = inputs_embeds.shape, self.config.d_model
        is_float = jnp.issubdtype(inputs_embeds.dtype, jnp.floating)
        if len(shape) != 3 or shape[2] != d_model or not is_float:
            raise ValueError(
                f"{prefix}inputs_embeds has shape {shape} and dtype {inputs_embeds.dtype}, "
                f"expected floating point of shape (batch, length, d_model = {d_model})."
            )

    def _embed_tokens(self, input_ids, table):
        """Outside of `jit` ids are checked; inside, an id that is no row of the table gives NaN."""
        size = self.config.vocab_size
        least, most = (input_ids.min(), input_ids.max()) if input_ids.size else (0, 0)
        if not isinstance(least, jax.core.Tracer):  # in `jit` a constant's are tracers, too
            least, most = int(least), int(most)
            if least < 0 or most >= size:
                name = f"{'decoder_' if self.is_decoder else ''}input_ids"
                raise ValueError(
                    f"{name} holds {least if least < 0 else most}, expected 0 to {size - 1}, the "
                    "tokens of the vocabulary. Use the model's own tokenizer; -100 belongs in "
                    "labels only."
                )
        return table(input_ids)

    def _embed(self, inputs_embeds, masks, positions_table):
        if self.config.scale_embeddings:
            scaled = widen(inputs_embeds) * self.config.d_model**0.5
            inputs_embeds = narrow(scaled, inputs_embeds.dtype)
        if self.config.position_embeddings is None:
            return inputs_embeds
        # Padding repeats the position of its neighbour, so the length bounds every position. What
        # a cache will hold is checked before generation.
        longest, allowed = masks.length, self.config.max_position_embeddings
        if longest > allowed:
            raise ValueError(
                f"A row of {longest} tokens is longer than the position table "
                f"(max_position_embeddings={allowed}). Shorten the input, or use a model without "
                "position embeddings: convolutions need none."
            )
        positions = masks.positions()
        if positions_table is not None:
            return add(inputs_embeds, positions_table(positions))
        positions = sinusoids(positions, self.config.d_model)
        return add(inputs_embeds, narrow(positions, inputs_embeds.dtype))

    def _hide_start(self, input_ids, tokens):
        if input_ids is None:
            raise ValueError(
                "ConvT5Config.mask_decoder_start=True hides the start token, which cannot be told "
                "from decoder_inputs_embeds: pass decoder_input_ids."
            )
        real = input_ids != self.config.decoder_start_token_id
        return real if tokens is None else real & (tokens != 0)

    def _summarise(self, encoder_hidden_states, encoder_mask, encoder_segments, segments):
        """The masked mean of the encoder's output, projected: (B, 1 or L, D)."""
        states = encoder_hidden_states
        dtype = jnp.promote_types(states.dtype, jnp.float32)
        weights = jnp.ones((states.shape[0], 1, states.shape[1]), dtype)
        if encoder_segments is not None:
            weights = (segments[:, :, None] == encoder_segments[:, None, :]).astype(dtype)
        for tokens in (encoder_mask, encoder_segments):
            if tokens is not None:
                weights = weights * (tokens != 0)[:, None, :]
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1)
        mean = weights @ hide_padding(states, encoder_mask, encoder_segments).astype(dtype)
        return self.encoder_summary(narrow(mean, states.dtype))

    def _spread(self, hidden_states):
        """Keep a batch spread over the mesh; left to itself XLA may gather it on each device."""
        if self.mesh is None:
            return hidden_states
        axes = tuple(name for name in ("data", "fsdp") if name in self.mesh.axis_names)
        count = 1
        for name in axes:
            count *= self.mesh.shape[name]
        if hidden_states.shape[0] % count:
            return hidden_states
        sharding = NamedSharding(self.mesh, PartitionSpec(axes))
        return jax.lax.with_sharding_constraint(hidden_states, sharding)


def repeating_runs(specs: list) -> list[tuple[int, int, int]]:
    """A list split into runs (start, period, repeats), the longest repetition from each start.

    [a, a, a, b, c, b, c] -> [(0, 1, 3), (3, 2, 2)]; what does not repeat is a run of its own.
    """
    runs, start = [], 0
    while start < len(specs):
        best = (1, 1)
        for period in range(1, (len(specs) - start) // 2 + 1):
            pattern, repeats = specs[start : start + period], 1
            while pattern == specs[start + repeats * period : start + (repeats + 1) * period]:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        runs.append((start, *best))
        start += best[0] * best[1]
    return runs


def _present(weights):
    return tuple(w for w in weights if w is not None)
