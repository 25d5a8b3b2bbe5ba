"""What `generate` is told of a model whose decoder keeps convolution states."""

import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from .cache_convt5 import CACHE, new_cache, new_static_cache
from .masks_convt5 import check_tensor

# transformers 5 can take back tokens that were read into a state, and has caches to compile.
ROLLS_BACK = hasattr(Cache, "activate_past_recording")


class ConvT5GenerationMixin(GenerationMixin):
    """transformers' `generate` with this family's caches.

    Everything that `generate` does for T5 it does here. What cannot be supported is refused before
    the encoder runs.
    """

    # transformers 4 refuses assisted decoding for models that it cannot roll back.
    _is_stateful = not ROLLS_BACK

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        """Raise a ValueError for what this model has no way to do."""
        beams = generation_config.num_beams
        if beams is not None and beams < 1:
            raise ValueError(f"num_beams={beams} is not allowed: expected at least 1, no search.")
        implementation = generation_config.cache_implementation
        if implementation not in ((None, "dynamic", "static") if ROLLS_BACK else (None, "dynamic")):
            raise ValueError(
                f"cache_implementation={implementation!r} is not supported: a convolution's state "
                "is small and of constant size. Leave it out, or use 'static' (transformers 5) to "
                "compile decoding into one graph."
            )
        if generation_mode == GenerationMode.ASSISTED_GENERATION and implementation == "static":
            raise ValueError(
                "cache_implementation='static' cannot be combined with assisted decoding or prompt "
                "lookup, which take tokens back: a static cache is overwritten in place. Leave it "
                "out."
            )
        if getattr(generation_config, "assistant_early_exit", None) is not None:
            raise ValueError(
                f"assistant_early_exit={generation_config.assistant_early_exit} is not supported: "
                "no layer but the last is trained to predict tokens. Pass assistant_model or "
                "prompt_lookup_num_tokens."
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} is not supported: "
                "transformers cuts the encoder's mask instead of the decoder's tokens. Call the "
                f"model on one chunk after the other with use_cache=True and pass the {CACHE} that "
                "the last one returned to generate."
            )
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                f"guidance_scale={generation_config.guidance_scale} is not supported: transformers "
                "guides by a second pass over the prompt alone, which an encoder-decoder lacks. "
                "Leave it out."
            )
        super()._validate_generation_mode(
            generation_mode, generation_config, generation_mode_kwargs
        )

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and `generate_batch` with it, which begins here."""
        raise ValueError(
            "generate_batch (continuous batching) is not supported: its pages hold keys and "
            "values of attention, and it runs no encoder. Call generate on a padded batch."
        )

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size, model_input_name, model_kwargs, *args, **kwargs
    ):
        """As transformers', for decoder inputs that fit the texts."""
        ids = model_kwargs.get("decoder_input_ids")
        check_tensor("decoder_input_ids", ids)
        if ids is not None and (ids.dim() != 2 or ids.shape[0] != batch_size or ids.shape[1] == 0):
            raise ValueError(
                f"decoder_input_ids has shape {tuple(ids.shape)}, expected (batch, length) = "
                f"({batch_size}, at least 1): the beginning of an output for each text."
            )
        return super()._prepare_decoder_input_ids_for_generation(
            batch_size, model_input_name, model_kwargs, *args, **kwargs
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Give `generate` a cache whose layers are those of the decoder."""
        config, allowed = self.config, self.config.max_position_embeddings
        if config.position_embeddings == "learned" and max_cache_length > allowed:
            raise ValueError(
                f"Generating up to {max_cache_length + 1} tokens needs more positions than the "
                f"table has (max_position_embeddings={allowed}). Lower max_new_tokens."
            )
        given = model_kwargs.get(CACHE)
        if given is not None:
            room = getattr(getattr(given, "self_attention_cache", None), "key_length", None)
            if room is not None and max_cache_length > room:
                raise ValueError(
                    f"Generating up to {max_cache_length + 1} tokens needs more room than the "
                    f"static {CACHE} has ({room} tokens). Lower max_new_tokens, or make the cache "
                    f"with max_cache_len={max_cache_length} in the first call."
                )
        if given is not None or not generation_config.use_cache:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if generation_config.cache_implementation == "static":
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            encoder_length = model_kwargs["encoder_outputs"][0].shape[1]
            model_kwargs[CACHE] = new_static_cache(config, length, encoder_length)
        else:
            model_kwargs[CACHE] = new_cache(config)
            if getattr(generation_config, "is_assistant", False):
                model_kwargs[CACHE].activate_past_recording()

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        """As transformers', and what a returned cache has read already is not read again."""
        cache = kwargs.get(CACHE)
        if cache is not None and next_sequence_length is None and ROLLS_BACK:
            past = int(cache.get_seq_length())
            if past >= input_ids.shape[1]:
                raise ValueError(
                    f"decoder_input_ids holds {input_ids.shape[1]} tokens, but {CACHE} has read "
                    f"{past}: pass the whole sequence, with at least one token more."
                )
            next_sequence_length = input_ids.shape[1] - past
        if next_sequence_length is not None:
            kwargs["next_sequence_length"] = next_sequence_length
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def create_masks_for_generate(self, attention_mask, **kwargs):
        """A decoder mask (B, past + L) at the size of a static cache, so that no shape changes."""
        if attention_mask is None:
            return None
        keys = kwargs[CACHE].self_attention_cache.key_length
        return F.pad(attention_mask, (0, keys - attention_mask.shape[1]), value=1)
