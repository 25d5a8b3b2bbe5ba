"""ConvT5 in PyTorch: T5 whose token mixing is a convolution (Tay et al. 2021, arXiv 2105.03322).

The models and their heads. A layer is pre_mixer_norm -> mixer -> (pre_cross_attention_norm ->
cross_attention) -> pre_mlp_norm -> mlp, each sublayer with a residual; the mixer is the one slot
that varies, and with "attention" in it everywhere the model is T5. Read on in
stacks_convt5.py (encoder and decoder), layers_convt5.py (one layer) and convolution.py.

Shapes: B batch, L length, M target length, D d_model, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    ModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    TokenClassifierOutput,
)

from .cache_convt5 import CACHE, given_cache
from .configuration_convt5 import ConvT5Config

# Named here because transformers 4 fetches only the files that this one imports itself.
from .convolution import depthwise_conv, dynamic_conv, lightweight_conv  # noqa: F401
from .generation_convt5 import ConvT5GenerationMixin
from .layers_convt5 import ConvT5ClassificationHead
from .masks_convt5 import check_tensor
from .stacks_convt5 import ConvT5PreTrainedModel, ConvT5Stack, default

if TYPE_CHECKING:  # travel with a checkpoint; transformers reads these lines, Python does not
    from .cache_flax_convt5 import FlaxCache  # noqa: F401
    from .checkpoint_flax_convt5 import FlaxCheckpointMixin  # noqa: F401
    from .convolution_flax import hide_padding  # noqa: F401
    from .generation_flax_convt5 import FlaxGenerationMixin  # noqa: F401
    from .layers_flax_convt5 import FlaxConvT5Layer  # noqa: F401
    from .masks_flax_convt5 import FlaxTokenMasks  # noqa: F401
    from .modeling_flax_convt5 import FlaxConvT5Model  # noqa: F401
    from .outputs_flax_convt5 import FlaxModelOutput  # noqa: F401
    from .pipeline_convt5 import Text2TextGenerationPipeline  # noqa: F401
    from .presets_convt5 import PRESETS  # noqa: F401
    from .sharding_flax_convt5 import SHARDING_RULES  # noqa: F401
    from .stacks_flax_convt5 import FlaxConvT5Stack  # noqa: F401
    from .weights import WeightFiles  # noqa: F401


class _ConvT5EncoderDecoder(ConvT5PreTrainedModel):
    """Both stacks and their embeddings; the models below add what comes after."""

    def __init__(self, config: ConvT5Config):
        super().__init__(config)
        self._tied_weights_keys = self._add_embeddings(config, ("encoder", "decoder"))
        self.encoder = ConvT5Stack(config, "encoder")
        self.decoder = ConvT5Stack(config, "decoder")

    def get_encoder(self, modality: str | None = None) -> ConvT5Stack:
        return self.encoder

    def get_decoder(self) -> ConvT5Stack:
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
        use_cache,
        output_attentions,
        output_hidden_states,
    ) -> Seq2SeqModelOutput:
        if (segment_ids is None) != (decoder_segment_ids is None):
            raise ValueError(
                "segment_ids and decoder_segment_ids go together: pass both for packed rows, or "
                "neither."
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                segment_ids=segment_ids,
                inputs_embeds=inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            if isinstance(encoder_outputs, ModelOutput):
                encoder_outputs = encoder_outputs.to_tuple()
            if not isinstance(encoder_outputs, (tuple, list)):
                raise ValueError(
                    f"encoder_outputs is a {type(encoder_outputs).__name__}, expected what "
                    "get_encoder() returns or a tuple that begins with its last_hidden_state."
                )
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        if not torch.is_tensor(encoder_outputs.last_hidden_state):
            raise ValueError(
                f"encoder_outputs begins with {encoder_outputs.last_hidden_state!r}, expected the "
                "encoder's states: pass what get_encoder() returned."
            )
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            segment_ids=decoder_segment_ids,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            encoder_segment_ids=segment_ids,
            cache=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE: getattr(decoder_outputs, CACHE)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class ConvT5Model(_ConvT5EncoderDecoder):
    """Encoder and decoder without a head, as `T5Model`."""

    _auto_class = "AutoModel"

    def __init__(self, config: ConvT5Config):
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        decoder_segment_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput | tuple:
        """T5's arguments, and segments for packed rows.

        Args:
            input_ids: (B, L) token ids, or `inputs_embeds` (B, L, D).
            attention_mask: (B, L), 0 for padding; what padding holds never reaches a token.
            decoder_input_ids: (B, M) token ids, or `decoder_inputs_embeds` (B, M, D).
            decoder_attention_mask: (B, M), 0 for padding; with a cache (B, past + M).
            encoder_outputs: what `encoder` returned, to reuse it.
            past_key_values, cache: the cache of an earlier call with `use_cache=True`, under
                either name: transformers 5.24 changes from the first to the second.
            segment_ids, decoder_segment_ids: (B, L) and (B, M) integers >= 1 naming the example
                of each token of a packed row, 0 for padding; nothing crosses from one to another.

        Raises:
            ValueError: for missing inputs and for shapes that do not fit.
        """
        output = self._encode_decode(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            given_cache(cache, past_key_values),
            inputs_embeds,
            decoder_inputs_embeds,
            segment_ids,
            decoder_segment_ids,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        return output if default(return_dict, self.config.return_dict) else output.to_tuple()


class ConvT5EncoderModel(ConvT5PreTrainedModel):
    """The encoder alone, as `T5EncoderModel`."""

    _auto_class = "AutoModelForTextEncoding"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^lm_head\."]

    def __init__(self, config: ConvT5Config):
        super().__init__(config)
        self._tied_weights_keys = self._add_embeddings(config, ("encoder",))
        self.encoder = ConvT5Stack(config, "encoder")
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> ConvT5Stack:
        return self.encoder

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput | tuple:
        """Encode (B, L) tokens into `last_hidden_state` (B, L, D); arguments of `ConvT5Model`."""
        output = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return output if default(return_dict, self.config.return_dict) else output.to_tuple()


class ConvT5ForConditionalGeneration(_ConvT5EncoderDecoder, ConvT5GenerationMixin):
    """Encoder and decoder with a language-model head, as `T5ForConditionalGeneration`."""

    _auto_class = "AutoModelForSeq2SeqLM"

    def __init__(self, config: ConvT5Config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            table = "shared" if config.share_embeddings else "decoder.embed_tokens"
            self._tied_weights_keys["lm_head.weight"] = f"{table}.weight"
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        decoder_segment_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput | tuple:
        """`ConvT5Model`'s arguments, and labels.

        Args:
            labels: (B, M) token ids; the loss is the softmax cross-entropy over the vocabulary,
                averaged over labels that are not -100 (or summed and divided by the keyword
                `num_items_in_batch`, which Trainer passes under gradient accumulation). Decoder
                inputs are made from the labels unless given.
        """
        if labels is not None:
            check_tensor("labels", labels)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self._shift_right(labels, decoder_segment_ids)
            if self.training:
                use_cache = default(use_cache, False)
        output = self._encode_decode(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            given_cache(cache, past_key_values),
            inputs_embeds,
            decoder_inputs_embeds,
            segment_ids,
            decoder_segment_ids,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        hidden_states = output.last_hidden_state
        if self.config.scale_decoder_outputs:
            hidden_states = hidden_states * self.config.d_model**-0.5
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits, labels, kwargs.get("num_items_in_batch"))
        output = _with_logits(Seq2SeqLMOutput, output, loss=loss, logits=logits)
        return output if default(return_dict, self.config.return_dict) else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        return self._shift_right(labels)


class ConvT5ForSequenceClassification(_ConvT5EncoderDecoder):
    """A label for each text, read off the decoder at its end, as `T5ForSequenceClassification`."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: ConvT5Config):
        super().__init__(config)
        self.classification_head = ConvT5ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        decoder_segment_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> Seq2SeqSequenceClassifierOutput | tuple:
        """`ConvT5Model`'s arguments, and labels. Logits are (B, num_labels).

        The text goes through the encoder and, shifted right, through the decoder; the state at the
        last end-of-sequence token is classified. A packed row is classified by its last example.

        Args:
            labels: (B,) integers; (B,) or (B, num_labels) numbers for problem_type "regression"
                (squared error); (B, num_labels) zeros and ones, as floats, for
                "multi_label_classification" (a sigmoid for each label).

        Raises:
            NotImplementedError: for `inputs_embeds`, which do not tell where a text ends.
            ValueError: if a text has no end-of-sequence token.
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
            False if labels is not None else use_cache,
            output_attentions,
            output_hidden_states,
        )
        logits = self.classification_head(self._at_the_end(output.last_hidden_state, input_ids))
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels.to(logits.device), kwargs.get("num_items_in_batch"))
        output = _with_logits(Seq2SeqSequenceClassifierOutput, output, loss=loss, logits=logits)
        return output if default(return_dict, self.config.return_dict) else output.to_tuple()

    def _at_the_end(self, hidden_states, input_ids):
        """The states (B, D) at each row's last end-of-sequence token."""
        eos, shape = self.config.eos_token_id, hidden_states.shape
        if input_ids.shape != shape[:2]:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, but the decoder's inputs "
                f"{tuple(shape[:2])}: both hold the same text. Leave the decoder's inputs out."
            )
        is_end = sum(input_ids == token for token in (eos if isinstance(eos, list) else [eos])) > 0
        positions = torch.arange(shape[1], device=input_ids.device)
        last = positions.masked_fill(~is_end, -1).amax(-1)
        if not torch.compiler.is_compiling() and bool((last < 0).any()):
            raise ValueError(
                f"Rows {(last < 0).nonzero().flatten().tolist()} of input_ids hold no "
                f"end-of-sequence token (eos_token_id={eos}), where a text is classified. T5's "
                "tokenizers append it; when you cut long texts, keep it."
            )
        last = last.to(hidden_states.device)[:, None, None].expand(-1, 1, shape[2])
        return hidden_states.gather(1, last).squeeze(1)

    def _loss(self, logits, labels, num_items):
        config = self.config
        if config.problem_type is None:  # remembered, so that a saved model says what it does
            if config.num_labels == 1:
                config.problem_type = "regression"
            elif labels.is_floating_point():
                config.problem_type = "multi_label_classification"
            else:
                config.problem_type = "single_label_classification"
        if config.problem_type == "single_label_classification":
            return cross_entropy(logits, labels, num_items)
        if labels.numel() != logits.numel():
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected {tuple(logits.shape)}: one "
                f"number for each text and label, as problem_type={config.problem_type!r} asks."
            )
        labels = labels.to(torch.promote_types(logits.dtype, torch.float32)).reshape(logits.shape)
        regression = config.problem_type == "regression"
        function = F.mse_loss if regression else F.binary_cross_entropy_with_logits
        return _average(function, logits, labels, num_items)


class ConvT5ForTokenClassification(ConvT5PreTrainedModel):
    """A label for each token, read off the encoder, as `T5ForTokenClassification`."""

    _auto_class = "AutoModelForTokenClassification"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^lm_head\."]

    def __init__(self, config: ConvT5Config):
        super().__init__(config)
        self._tied_weights_keys = self._add_embeddings(config, ("encoder",))
        self.encoder = ConvT5Stack(config, "encoder")
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> ConvT5Stack:
        return self.encoder

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> TokenClassifierOutput | tuple:
        """`ConvT5EncoderModel`'s arguments, and labels (B, L), -100 for none.

        Logits are (B, L, num_labels).
        """
        output = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(output.last_hidden_state))
        loss = None
        if labels is not None:
            loss = cross_entropy(logits, labels, kwargs.get("num_items_in_batch"))
        output = _with_logits(TokenClassifierOutput, output, loss=loss, logits=logits)
        return output if default(return_dict, self.config.return_dict) else output.to_tuple()


class ConvT5ForQuestionAnswering(_ConvT5EncoderDecoder):
    """Where an answer begins and ends in its text, as `T5ForQuestionAnswering`."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: ConvT5Config):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.d_model, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        decoder_segment_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> Seq2SeqQuestionAnsweringModelOutput | tuple:
        """`ConvT5Model`'s arguments, and the answer's place. Start and end logits are (B, L).

        Args:
            start_positions, end_positions: (B,) the tokens with which the answer begins and ends.
                A position behind the row, where a long text was cut, is left out of the loss.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError(
                "start_positions and end_positions go together: pass both, or neither."
            )
        if start_positions is not None:
            use_cache = False
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
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        start_logits, end_logits = self.qa_outputs(output.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None:
            pairs = ((start_logits, start_positions), (end_logits, end_positions))
            loss = sum(_position_loss(*pair) for pair in pairs) / 2
        output = _with_logits(
            Seq2SeqQuestionAnsweringModelOutput,
            output,
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
        )
        return output if default(return_dict, self.config.return_dict) else output.to_tuple()


def _with_logits(output_class, output, **fields):
    """An output of a head: its own fields, then what the stacks returned beside their states."""
    rest = {key: value for key, value in output.items() if key != "last_hidden_state"}
    return output_class(**fields, **rest)


def cross_entropy(
    logits: torch.Tensor, labels: torch.LongTensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Softmax cross-entropy of logits (..., V) and labels (...), -100 ignored."""
    labels, shape = labels.to(logits.device), logits.shape[:-1]
    # Flat labels are T5's way as well.
    if labels.is_floating_point() or labels.shape not in (shape, (shape.numel(),)):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected integers "
            f"of shape {tuple(shape)}: one for each row of the logits, -100 where there is none."
        )
    try:
        return _average(F.cross_entropy, logits.flatten(0, -2), labels.flatten(), num_items)
    except IndexError as error:  # looked for only now: a check beforehand would slow a GPU down
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= logits.shape[-1]))]
        raise ValueError(
            f"labels holds {int(wrong[0])}, expected 0 to {logits.shape[-1] - 1}, or -100 where "
            "there is none. The number of classes is the configuration's num_labels, or vocab_size "
            "for a language model."
        ) from error


def _position_loss(logits, positions):
    """Cross-entropy of logits (B, L) and positions (B,); positions >= L are left out."""
    length = logits.shape[1]
    if positions.numel() != logits.shape[0]:
        raise ValueError(
            f"start_positions or end_positions has shape {tuple(positions.shape)}, expected "
            f"({logits.shape[0]},): one position for each text."
        )
    positions = positions.to(logits.device).flatten().clamp(0, length)
    return _average(F.cross_entropy, logits, positions, ignore_index=length)


def _average(loss_function, logits, labels, num_items=None, **options):
    """A loss in float32: the mean, or the sum over `num_items`, the labels of several batches."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if num_items is None:
        return loss_function(logits, labels, **options)
    total = loss_function(logits, labels, reduction="sum", **options)
    return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)
