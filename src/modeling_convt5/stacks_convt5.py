"""What every ConvT5 model is made of: the common base class and one stack of layers.

Shapes: B batch, L length, D d_model.
"""

import os
from json import JSONDecodeError

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
)

from .cache_convt5 import CACHE, ConvStateCache, check_cache, given_cache, new_cache
from .configuration_convt5 import ConvT5Config
from .convolution import hide_padding
from .layers_convt5 import (
    ConvT5Convolution,
    ConvT5Layer,
)
from .masks_convt5 import (
    TokenMasks,
    check_encoder_states,
    check_tensor,
    cross_attention_bias,
    self_attention_bias,
    sinusoids,
)

try:  # transformers 5: initialisation that never touches weights that were loaded
    from transformers import initialization as init
except ImportError:  # transformers 4
    from torch.nn import init


class ConvT5PreTrainedModel(PreTrainedModel):
    """Weight initialisation, saving and what transformers needs to know of the family."""

    config_class = ConvT5Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ConvT5Layer"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        use_safetensors: bool | None = True,
        **kwargs,
    ) -> "ConvT5PreTrainedModel":
        """As transformers', but pickled weights (pytorch_model.bin) must be asked for.

        Args:
            use_safetensors: None or False also reads pickles.

        Raises:
            OSError: if the weights are missing or damaged, naming the folder.
        """
        path = pretrained_model_name_or_path
        try:
            return super().from_pretrained(path, *args, use_safetensors=use_safetensors, **kwargs)
        except (SafetensorError, JSONDecodeError) as error:
            raise OSError(
                f"The weights of {path} cannot be read ({error}): a .safetensors file there, or "
                "its index, is cut short or holds something else. Copy or download it again."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As transformers', which saves nothing and only logs it if there is a file in the way."""
        if os.path.isfile(save_directory):
            raise ValueError(
                f"save_directory={os.fspath(save_directory)!r} is a file, expected a folder. "
                "Nothing was saved; choose another path."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]])
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]])
        return {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": mask}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # transformers 5 ties nothing when `tie_word_embeddings` is False, but that field is about
        # the logits: encoder and decoder share their token table either way, as in T5.
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys or {})

    def _tie_weights(self) -> None:  # transformers 4
        if hasattr(self, "_tie_or_clone_weights"):
            for target, source in (self._tied_weights_keys or {}).items():
                modules = [self.get_submodule(key.rsplit(".", 1)[0]) for key in (target, source)]
                self._tie_or_clone_weights(*modules)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """T5's initialisation; for the convolution Mesh-TensorFlow's: std = fan_in ** -0.5.

        Each parameter is initialised with the module that owns it, never by a parent:
        transformers 5 passes over modules without missing parameters of their own.
        """
        factor = self.config.initializer_factor
        if isinstance(module, nn.RMSNorm):
            init.constant_(module.weight, factor)
        elif isinstance(module, nn.Linear):
            fan_in = getattr(module, "fan_in", module.in_features)
            init.normal_(module.weight, mean=0.0, std=factor * fan_in**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            fan_in = getattr(module, "fan_in", 1)
            init.normal_(module.weight, mean=0.0, std=factor * fan_in**-0.5)
        elif isinstance(module, ConvT5Convolution):
            if module.mixer != "dynamic":
                init.normal_(module.filter, mean=0.0, std=factor * module.kernel_size**-0.5)
            if module.conv_bias is not None:
                init.zeros_(module.conv_bias)

    def _add_embeddings(self, config: ConvT5Config, stacks: tuple[str, ...]) -> dict[str, str]:
        """Create the tables that the stacks share; returns which stack weights are tied to them."""
        tied = {}
        if config.share_embeddings:
            self.shared = nn.Embedding(config.vocab_size, config.d_model)
            tied |= {f"{stack}.embed_tokens.weight": "shared.weight" for stack in stacks}
        if config.position_embeddings == "learned" and config.share_position_embeddings:
            self.shared_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
            source = "shared_positions.weight"
            tied |= {f"{stack}.embed_positions.weight": source for stack in stacks}
        return tied

    def get_input_embeddings(self) -> nn.Embedding:
        return self.shared if self.config.share_embeddings else self.encoder.embed_tokens

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        if self.config.share_embeddings:
            self.shared = new_embeddings
            if hasattr(self, "decoder"):
                self.decoder.embed_tokens = new_embeddings
        self.encoder.embed_tokens = new_embeddings

    def _resize_token_embeddings(
        self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True
    ) -> nn.Embedding:
        """As transformers'; with two token tables, both grow."""
        if new_num_tokens is not None and new_num_tokens < 1:
            raise ValueError(
                f"new_num_tokens={new_num_tokens} is not allowed: expected at least 1, such as "
                "len(tokenizer)."
            )
        if not self.config.share_embeddings and hasattr(self, "decoder"):
            table = self.decoder.embed_tokens
            resized = self._get_resized_embeddings(
                table, new_num_tokens, pad_to_multiple_of, mean_resizing
            )
            self.decoder.embed_tokens = resized.requires_grad_(table.weight.requires_grad)
        return super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def _decoder_inputs_from_inputs(self, input_ids, attention_mask, segment_ids):
        """What the heads that read a text twice give the decoder: ids (B, L) and their mask.

        The text shifted right, as in T5. Left padding stays hidden and the start token takes its
        last place, so that it changes nothing; right padding is behind every token anyway.
        """
        if segment_ids is not None or attention_mask is None:
            return self._shift_right(input_ids, segment_ids), None
        seen = (attention_mask != 0).long().cummax(-1).values
        return self._shift_right(input_ids, seen), seen

    def _shift_right(
        self, input_ids: torch.LongTensor, segment_ids: torch.LongTensor | None = None
    ) -> torch.LongTensor:
        """Decoder inputs (B, L) from labels (B, L): the start token, then all labels but the last.

        -100 becomes the pad token; every example packed in a row begins with the start token.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                f"decoder_start_token_id={start} and pad_token_id={pad}: both must be set in the "
                "configuration to make decoder inputs from labels. T5 uses 0 for both."
            )
        # Rolled, not cut and padded, whose lengths of L - 1 torch.export would not let be 1.
        begins = torch.arange(input_ids.shape[-1], device=input_ids.device) == 0
        if segment_ids is not None:
            begins = begins | (segment_ids != segment_ids.roll(1, -1))
        shifted = input_ids.roll(1, -1).masked_fill(begins, start)
        return shifted.masked_fill(shifted == -100, pad)


class ConvT5Stack(ConvT5PreTrainedModel):
    """The encoder or the decoder: embeddings, layers, final norm.

    Args:
        config: the model's configuration.
        stack: "encoder" or "decoder".
    """

    def __init__(self, config: ConvT5Config, stack: str):
        super().__init__(config)
        self.is_decoder = stack == "decoder"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = None
        if config.position_embeddings == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        specs = config.layer_specs(stack)
        self.layers = nn.ModuleList(ConvT5Layer(config, spec, i) for i, spec in enumerate(specs))
        self.relative_attention_bias = None
        if any(spec.mixer == "attention" for spec in specs):
            self.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )
            self.relative_attention_bias.fan_in = config.d_model
        self.encoder_summary = None
        if self.is_decoder and not config.has_cross_attention:
            self.encoder_summary = nn.Linear(config.d_model, config.d_model, bias=False)
        self.final_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.embed_tokens = new_embeddings

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_segment_ids: torch.LongTensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> BaseModelOutput | BaseModelOutputWithPastAndCrossAttentions | tuple:
        """Run the stack; `attention_mask` and `segment_ids` are (B, L), see `ConvT5Model`.

        Returns `hidden_states` as T5 does: the embeddings, every layer's output, and last the
        final norm's. `attentions` has one entry for each layer whose mixer is "attention".
        """
        output_attentions = default(output_attentions, self.config.output_attentions)
        output_hidden_states = default(output_hidden_states, self.config.output_hidden_states)
        return_dict = default(return_dict, self.config.return_dict)
        self._check_inputs(input_ids, inputs_embeds, attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self._embed_tokens(input_ids)
        if encoder_hidden_states is not None:
            check_encoder_states(
                encoder_hidden_states, encoder_attention_mask, encoder_segment_ids, inputs_embeds
            )
        use_cache = self.is_decoder and bool(default(use_cache, self.config.use_cache))
        past_key_values = given_cache(cache, past_key_values)
        past_key_values = self._prepare_cache(past_key_values, use_cache, segment_ids)
        if past_key_values is not None:
            check_cache(past_key_values, self.config, inputs_embeds, encoder_hidden_states)
        past, keys = 0, None
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
            keys = getattr(past_key_values.self_attention_cache, "key_length", None)
        masks = TokenMasks(inputs_embeds, attention_mask, segment_ids, past, keys)
        hidden_states = self._embed(inputs_embeds, masks)
        if self.encoder_summary is not None and encoder_hidden_states is not None:
            hidden_states = hidden_states + self._summarise(
                encoder_hidden_states, encoder_attention_mask, encoder_segment_ids, segment_ids
            )
        hidden_states = self.dropout(hidden_states)
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
        all_hidden_states, self_weights, cross_weights = [], [], []
        for layer in self.layers:
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states, *weights = layer(
                hidden_states,
                tokens,
                segment_ids,
                self_bias,
                encoder_hidden_states,
                cross_bias,
                past_key_values=past_key_values,
                output_attentions=output_attentions,
            )
            self_weights.append(weights[0])
            cross_weights.append(weights[1])
        hidden_states = self.dropout(self.final_norm(hidden_states))
        output = BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=_present(self_weights) if output_attentions else None,
        )
        if self.is_decoder:
            output = BaseModelOutputWithPastAndCrossAttentions(
                **output,
                **{CACHE: past_key_values},
                cross_attentions=_present(cross_weights) if output_attentions else None,
            )
        return output if return_dict else output.to_tuple()

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
            if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
                raise ValueError(
                    f"{prefix}input_ids has shape {tuple(input_ids.shape)} and dtype "
                    f"{input_ids.dtype}, expected torch.int64 or torch.int32 of shape (batch, "
                    "length)."
                )
            return
        shape, d_model = tuple(inputs_embeds.shape), self.config.d_model
        if len(shape) != 3 or shape[2] != d_model or not inputs_embeds.is_floating_point():
            raise ValueError(
                f"{prefix}inputs_embeds has shape {shape} and dtype {inputs_embeds.dtype}, "
                f"expected floating point of shape (batch, length, d_model = {d_model})."
            )

    def _embed_tokens(self, input_ids):
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:  # looked for only now: a check beforehand would slow a GPU down
            size = self.embed_tokens.weight.shape[0]
            wrong = input_ids[(input_ids < 0) | (input_ids >= size)]
            name = f"{'decoder_' if self.is_decoder else ''}input_ids"
            raise ValueError(
                f"{name} holds {int(wrong[0])}, expected 0 to {size - 1}, the tokens of the "
                "vocabulary. Use the model's own tokenizer, or make room for tokens that you added "
                "with resize_token_embeddings; -100 belongs in labels only."
            ) from error

    def _prepare_cache(self, past_key_values, use_cache, segment_ids):
        # `generate` of transformers 4 hands a given cache to the encoder as well.
        if not self.is_decoder or (self.gradient_checkpointing and self.training):
            return None
        if past_key_values is None:
            return new_cache(self.config) if use_cache and segment_ids is None else None
        if segment_ids is not None:
            raise ValueError(
                f"decoder_segment_ids cannot be combined with {CACHE}: packed rows are for "
                "training and scoring, decoding takes one example per row."
            )
        if not isinstance(past_key_values, EncoderDecoderCache):
            raise ValueError(
                f"{CACHE} is a {type(past_key_values).__name__}, expected what an earlier call "
                "returned, or EncoderDecoderCache(ConvStateCache(config), DynamicCache())."
            )
        cache = past_key_values.self_attention_cache
        found = [getattr(layer, "state_length", None) for layer in cache.layers]
        if found != [getattr(layer.mixer, "state_length", None) for layer in self.layers]:
            if cache.get_seq_length() > 0:
                raise ValueError(
                    f"{CACHE} was filled by another model: its layers are not those of this "
                    "decoder. Pass the cache that this model returned."
                )
            past_key_values.self_attention_cache = ConvStateCache(self.config)
        return past_key_values

    def _embed(self, inputs_embeds, masks):
        if self.config.scale_embeddings:
            inputs_embeds = inputs_embeds * self.config.d_model**0.5
        if self.config.position_embeddings is None:
            return inputs_embeds
        positions = masks.positions()
        # Padding repeats the position of its neighbour, so the length bounds every position. What
        # a static cache will hold is checked before generation.
        allowed = self.config.max_position_embeddings
        longest = 0 if torch.is_tensor(masks.past) else masks.past + masks.length
        if longest > allowed:
            raise ValueError(
                f"A row of {longest} tokens is longer than the position table "
                f"(max_position_embeddings={allowed}). Shorten the input, or use a model without "
                "position embeddings: convolutions need none."
            )
        if self.embed_positions is not None:
            return inputs_embeds + self.embed_positions(positions)
        return inputs_embeds + sinusoids(positions, self.config.d_model).to(inputs_embeds.dtype)

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
        weights = states.new_ones(states.shape[0], 1, states.shape[1], dtype=torch.float32)
        if encoder_segments is not None:
            weights = (segments[:, :, None] == encoder_segments[:, None, :]).float()
        for tokens in (encoder_mask, encoder_segments):
            if tokens is not None:
                weights = weights * (tokens != 0)[:, None, :]
        dtype = torch.promote_types(states.dtype, torch.float32)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        mean = weights.to(dtype) @ hide_padding(states, encoder_mask, encoder_segments).to(dtype)
        return self.encoder_summary(mean.to(states.dtype))


def default(value, default):
    return default if value is None else value


def _present(weights):
    return tuple(w for w in weights if w is not None)
