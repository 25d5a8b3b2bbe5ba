"""ConvT5 in Flax: T5 whose token mixing is a convolution (Tay et al. 2021, arXiv 2105.03322).

The twin of modeling_convt5.py, with the same names, and the same folder on the Hub. A layer is
pre_mixer_norm -> mixer -> (pre_cross_attention_norm -> cross_attention) -> pre_mlp_norm -> mlp,
each sublayer with a residual; the mixer is the one slot that varies. Read on in
stacks_flax_convt5.py (encoder and decoder), layers_flax_convt5.py (one layer) and
convolution_flax.py.

    model = FlaxConvT5ForConditionalGeneration.from_pretrained(folder)
    logits = model(input_ids, attention_mask, decoder_input_ids).logits
    graphdef, state = nnx.split(model)      # and then jax.jit, jax.grad and the like

Dropout is on where a key `dropout_rng` is passed, and off without one.

Shapes: B batch, L length, M target length, D d_model, V vocabulary.
"""

try:  # in a `try`, or transformers would ask PyTorch's users to install JAX
    import jax
    import jax.numpy as jnp
    from flax import nnx
except ImportError as error:
    raise ImportError("ConvT5 in Flax needs JAX and Flax: pip install jax flax") from error

# All siblings are named here: transformers 4 fetches only the files that this one imports itself.
from .cache_flax_convt5 import FlaxCache
from .checkpoint_flax_convt5 import FlaxCheckpointMixin  # noqa: F401
from .configuration_convt5 import ConvT5Config  # noqa: F401
from .convolution_flax import depthwise_conv, drop, dynamic_conv, lightweight_conv  # noqa: F401
from .generation_flax_convt5 import FlaxGenerationConfig, FlaxGenerationMixin  # noqa: F401
from .layers_flax_convt5 import (
    FlaxConvT5ClassificationHead,
    FlaxLinear,
    narrow,
    split_rng,
    widen,
)
from .masks_flax_convt5 import FlaxTokenMasks  # noqa: F401
from .outputs_flax_convt5 import (
    FlaxBaseModelOutput,
    FlaxSeq2SeqLMOutput,
    FlaxSeq2SeqModelOutput,
    FlaxSeq2SeqQuestionAnsweringModelOutput,
    FlaxTokenClassifierOutput,
)
from .presets_convt5 import PRESETS  # noqa: F401
from .sharding_flax_convt5 import SHARDING_RULES, parameter_sharding  # noqa: F401
from .stacks_flax_convt5 import FlaxConvT5PreTrainedModel, FlaxConvT5Stack
from .weights import tied_keys  # noqa: F401


class _FlaxConvT5EncoderDecoder(FlaxConvT5PreTrainedModel):
    """Both stacks and their embeddings; the models below add what comes after."""

    def _build(self, common, running):
        self._add_embeddings(self.config, common)
        self.encoder = FlaxConvT5Stack(self.config, "encoder", **common, **running)
        self.decoder = FlaxConvT5Stack(self.config, "decoder", **common, **running)

    def get_encoder(self) -> FlaxConvT5Stack:
        return self.encoder

    def get_decoder(self) -> FlaxConvT5Stack:
        return self.decoder

    def _encode_decode(
        self,
        input_ids,
        attention_mask,
        decoder_input_ids,
        decoder_attention_mask,
        encoder_outputs,
        past_key_values,
        inputs_embeds,
        decoder_inputs_embeds,
        segment_ids,
        decoder_segment_ids,
        output_attentions,
        output_hidden_states,
        dropout_rng,
    ) -> FlaxSeq2SeqModelOutput:
        if (segment_ids is None) != (decoder_segment_ids is None):
            raise ValueError(
                "segment_ids and decoder_segment_ids go together: pass both for packed rows, or "
                "neither."
            )
        encoder_rng, decoder_rng = split_rng(dropout_rng, 2)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                segment_ids=segment_ids,
                inputs_embeds=inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                tables=self._tables("encoder"),
                dropout_rng=encoder_rng,
            )
        elif not isinstance(encoder_outputs, FlaxBaseModelOutput):
            encoder_outputs = FlaxBaseModelOutput(*tuple(encoder_outputs)[:3])
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            segment_ids=decoder_segment_ids,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            encoder_segment_ids=segment_ids,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            tables=self._tables("decoder"),
            dropout_rng=decoder_rng,
        )
        return FlaxSeq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class FlaxConvT5Model(_FlaxConvT5EncoderDecoder):
    """Encoder and decoder without a head."""

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        encoder_outputs: FlaxBaseModelOutput | tuple | None = None,
        past_key_values: FlaxCache | None = None,
        inputs_embeds: jax.Array | None = None,
        decoder_inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        dropout_rng: jax.Array | None = None,
    ) -> FlaxSeq2SeqModelOutput:
        """T5's arguments, and segments for packed rows.

        Args:
            input_ids: (B, L) token ids, or `inputs_embeds` (B, L, D).
            attention_mask: (B, L), 0 for padding; what padding holds never reaches a token.
            decoder_input_ids: (B, M) token ids, or `decoder_inputs_embeds` (B, M, D).
            decoder_attention_mask: (B, M), 0 for padding; with a cache (B, its length).
            encoder_outputs: what `encoder` returned, to reuse it.
            past_key_values: what `init_cache` or an earlier call returned.
            segment_ids, decoder_segment_ids: (B, L) and (B, M) integers >= 1 naming the example
                of each token of a packed row, 0 for padding; nothing crosses from one to another.
            dropout_rng: a key of `jax.random`, in training.

        Raises:
            ValueError: for missing inputs and for shapes that do not fit.
        """
        return self._encode_decode(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            segment_ids,
            decoder_segment_ids,
            output_attentions,
            output_hidden_states,
            dropout_rng,
        )


class FlaxConvT5EncoderModel(FlaxConvT5PreTrainedModel):
    """The encoder alone."""

    def _build(self, common, running):
        self._add_embeddings(self.config, common)
        self.encoder = FlaxConvT5Stack(self.config, "encoder", **common, **running)

    def get_encoder(self) -> FlaxConvT5Stack:
        return self.encoder

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        dropout_rng: jax.Array | None = None,
    ) -> FlaxBaseModelOutput:
        """Encode (B, L) tokens into `last_hidden_state` (B, L, D); see `FlaxConvT5Model`."""
        return self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            tables=self._tables("encoder"),
            dropout_rng=dropout_rng,
        )


class FlaxConvT5ForConditionalGeneration(_FlaxConvT5EncoderDecoder, FlaxGenerationMixin):
    """Encoder and decoder with a language-model head."""

    def _build(self, common, running):
        super()._build(common, running)
        config = self.config
        self.lm_head = None
        if not config.tie_word_embeddings:
            lm_head = FlaxLinear(config.d_model, config.vocab_size, False, config, **common)
            self.lm_head = nnx.data(lm_head)
        self.generation_config = FlaxGenerationConfig.from_fields({}, config)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        encoder_outputs: FlaxBaseModelOutput | tuple | None = None,
        past_key_values: FlaxCache | None = None,
        inputs_embeds: jax.Array | None = None,
        decoder_inputs_embeds: jax.Array | None = None,
        labels: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        dropout_rng: jax.Array | None = None,
    ) -> FlaxSeq2SeqLMOutput:
        """`FlaxConvT5Model`'s arguments, and labels.

        Args:
            labels: (B, M) token ids; the loss is the softmax cross-entropy over the vocabulary,
                averaged over labels that are not -100. Decoder inputs are made from the labels
                unless given.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels, decoder_segment_ids)
        output = self._encode_decode(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            segment_ids,
            decoder_segment_ids,
            output_attentions,
            output_hidden_states,
            dropout_rng,
        )
        logits = self._logits(output.last_hidden_state)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels has shape {labels.shape}, expected {logits.shape[:2]}: one label for "
                    "each of the decoder's inputs."
                )
            loss = cross_entropy(logits, labels)
        return _with_logits(FlaxSeq2SeqLMOutput, output, loss=loss, logits=logits)

    def encode(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> FlaxBaseModelOutput:
        """The encoder's output for (B, L) tokens."""
        tables = self._tables("encoder")
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, tables=tables)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        encoder_hidden_states: jax.Array,
        encoder_attention_mask: jax.Array | None = None,
    ) -> FlaxCache:
        """An empty cache for at most `max_length` decoder tokens; see `decode`."""
        return self.decoder.init_cache(
            batch_size, max_length, encoder_hidden_states, encoder_attention_mask
        )

    def decode(
        self,
        decoder_input_ids: jax.Array,
        encoder_hidden_states: jax.Array,
        encoder_attention_mask: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        past_key_values: FlaxCache | None = None,
    ) -> FlaxSeq2SeqLMOutput:
        """Logits (B, T, V) for T decoder tokens, and the cache after them if one is passed."""
        output = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            tables=self._tables("decoder"),
        )
        logits = self._logits(output.last_hidden_state)
        return FlaxSeq2SeqLMOutput(logits=logits, past_key_values=output.past_key_values)

    def _logits(self, hidden_states):
        if self.config.scale_decoder_outputs:
            scaled = widen(hidden_states) * self.config.d_model**-0.5
            hidden_states = narrow(scaled, hidden_states.dtype)
        if self.lm_head is not None:
            return self.lm_head(hidden_states)
        return self._tables("decoder")[0].attend(hidden_states)


class FlaxConvT5ForSequenceClassification(_FlaxConvT5EncoderDecoder):
    """A label for each text, read off the decoder at its end."""

    def _build(self, common, running):
        super()._build(common, running)
        self.classification_head = FlaxConvT5ClassificationHead(self.config, **common)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        encoder_outputs: FlaxBaseModelOutput | tuple | None = None,
        inputs_embeds: jax.Array | None = None,
        decoder_inputs_embeds: jax.Array | None = None,
        labels: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        dropout_rng: jax.Array | None = None,
    ) -> FlaxSeq2SeqLMOutput:
        """`FlaxConvT5Model`'s arguments, and labels. Logits are (B, num_labels).

        The text goes through the encoder and, shifted right, through the decoder; the state at the
        last end-of-sequence token is classified. A packed row is classified by its last example.

        Args:
            labels: (B,) integers; (B,) or (B, num_labels) numbers for problem_type "regression"
                (squared error); (B, num_labels) zeros and ones, as floats, for
                "multi_label_classification" (a sigmoid for each label).

        Raises:
            NotImplementedError: for `inputs_embeds`, which do not tell where a text ends.
            ValueError: if a text has no end-of-sequence token (outside of `jit`; inside, its
                logits are NaN).
        """
        if input_ids is None:
            raise NotImplementedError(
                f"{type(self).__name__} needs input_ids: inputs_embeds do not tell where a text "
                "ends, and that is where it is classified."
            )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids, decoder_attention_mask = self._decoder_inputs_from_inputs(
                input_ids, attention_mask, segment_ids
            )
            decoder_segment_ids = segment_ids
        stack_rng, head_rng = split_rng(dropout_rng, 2)
        output = self._encode_decode(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            None,
            inputs_embeds,
            decoder_inputs_embeds,
            segment_ids,
            decoder_segment_ids,
            output_attentions,
            output_hidden_states,
            stack_rng,
        )
        sentence = self._at_the_end(output.last_hidden_state, input_ids)
        logits = self.classification_head(sentence, head_rng)
        loss = None if labels is None else self._loss(logits, labels)
        return _with_logits(FlaxSeq2SeqLMOutput, output, loss=loss, logits=logits)

    def _at_the_end(self, hidden_states, input_ids):
        """The states (B, D) at each row's last end-of-sequence token."""
        eos, shape = self.config.eos_token_id, hidden_states.shape
        if input_ids.shape != shape[:2]:
            raise ValueError(
                f"input_ids has shape {input_ids.shape}, but the decoder's inputs {shape[:2]}: "
                "both hold the same text. Leave the decoder's inputs out."
            )
        is_end = sum(input_ids == token for token in (eos if isinstance(eos, list) else [eos])) > 0
        last = jnp.where(is_end, jnp.arange(shape[1]), -1).max(-1)
        if not isinstance(last, jax.core.Tracer) and bool((last < 0).any()):
            raise ValueError(
                f"Rows {jnp.flatnonzero(last < 0).tolist()} of input_ids hold no end-of-sequence "
                f"token (eos_token_id={eos}), where a text is classified. T5's tokenizers append "
                "it; when you cut long texts, keep it."
            )
        states = jnp.take_along_axis(hidden_states, last[:, None, None], axis=1)[:, 0]
        return jnp.where((last < 0)[:, None], jnp.nan, states)

    def _loss(self, logits, labels):
        config = self.config
        problem = config.problem_type
        if problem is None:
            if config.num_labels == 1:
                problem = "regression"
            elif jnp.issubdtype(labels.dtype, jnp.floating):
                problem = "multi_label_classification"
            else:
                problem = "single_label_classification"
        if problem == "single_label_classification":
            return cross_entropy(logits, labels)
        if labels.size != logits.size:
            raise ValueError(
                f"labels has shape {labels.shape}, expected {logits.shape}: one number for each "
                f"text and label, as problem_type={problem!r} asks."
            )
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        labels = labels.reshape(logits.shape).astype(logits.dtype)
        if problem == "regression":
            return jnp.square(logits - labels).mean()
        # -log sigmoid(x) where the label is 1, -log sigmoid(-x) where it is 0
        return (jax.nn.softplus(logits) - labels * logits).mean()


class FlaxConvT5ForTokenClassification(FlaxConvT5PreTrainedModel):
    """A label for each token, read off the encoder."""

    def _build(self, common, running):
        self._add_embeddings(self.config, common)
        self.encoder = FlaxConvT5Stack(self.config, "encoder", **common, **running)
        self.classifier = FlaxLinear(
            self.config.d_model, self.config.num_labels, True, self.config, **common
        )

    def get_encoder(self) -> FlaxConvT5Stack:
        return self.encoder

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        labels: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        dropout_rng: jax.Array | None = None,
    ) -> FlaxTokenClassifierOutput:
        """`FlaxConvT5EncoderModel`'s arguments, and labels (B, L), -100 for none.

        Logits are (B, L, num_labels).
        """
        stack_rng, head_rng = split_rng(dropout_rng, 2)
        output = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            tables=self._tables("encoder"),
            dropout_rng=stack_rng,
        )
        states = drop(output.last_hidden_state, self.config.classifier_dropout, head_rng)
        logits = self.classifier(states)
        loss = None if labels is None else cross_entropy(logits, labels)
        return _with_logits(FlaxTokenClassifierOutput, output, loss=loss, logits=logits)


class FlaxConvT5ForQuestionAnswering(_FlaxConvT5EncoderDecoder):
    """Where an answer begins and ends in its text."""

    def _build(self, common, running):
        super()._build(common, running)
        self.qa_outputs = FlaxLinear(self.config.d_model, 2, True, self.config, **common)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        encoder_outputs: FlaxBaseModelOutput | tuple | None = None,
        start_positions: jax.Array | None = None,
        end_positions: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        decoder_inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        dropout_rng: jax.Array | None = None,
    ) -> FlaxSeq2SeqQuestionAnsweringModelOutput:
        """`FlaxConvT5Model`'s arguments, and the answer's place. Start and end logits are (B, L).

        Args:
            start_positions, end_positions: (B,) the tokens with which the answer begins and ends.
                A position behind the row, where a long text was cut, is left out of the loss.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError(
                    "The decoder's inputs are made from input_ids: pass them, or "
                    "decoder_input_ids, or decoder_inputs_embeds."
                )
            decoder_input_ids, decoder_attention_mask = self._decoder_inputs_from_inputs(
                input_ids, attention_mask, segment_ids
            )
            decoder_segment_ids = segment_ids
        output = self._encode_decode(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            None,
            inputs_embeds,
            decoder_inputs_embeds,
            segment_ids,
            decoder_segment_ids,
            output_attentions,
            output_hidden_states,
            dropout_rng,
        )
        logits = self.qa_outputs(output.last_hidden_state)
        start_logits, end_logits = logits[..., 0], logits[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            pairs = ((start_logits, start_positions), (end_logits, end_positions))
            loss = sum(_position_loss(*pair) for pair in pairs) / 2
        return _with_logits(
            FlaxSeq2SeqQuestionAnsweringModelOutput,
            output,
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
        )


def _with_logits(output_class, output, **fields):
    """An output of a head: its own fields, then what the stacks returned beside their states."""
    rest = {key: value for key, value in output.items() if key != "last_hidden_state"}
    return output_class(**fields, **rest)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy of logits (..., V) and labels (...), -100 ignored, in float32."""
    return _average(logits, labels, labels != -100)


def _position_loss(logits, positions):
    """Cross-entropy of logits (B, L) and positions (B,); positions >= L are left out."""
    positions = jnp.maximum(positions.reshape(-1), 0)
    return _average(logits, positions, positions < logits.shape[1])


def _average(logits, labels, counted):
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    places = jnp.where(counted, labels, 0)[..., None]
    chosen = jnp.take_along_axis(logits, places, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(counted, losses, 0).sum() / counted.sum()
