"""What the Flax models return: the fields of transformers' output classes, as pytrees.

A field that does not apply is None. `output.logits`, `output["logits"]` and `output[0]` (the first
field that is not None) all work.
"""

from typing import Any

try:  # in a `try`, or transformers would ask PyTorch's users to install JAX
    import jax
    from flax import struct
except ImportError as error:
    raise ImportError("ConvT5 in Flax needs JAX and Flax: pip install jax flax") from error

from .cache_flax_convt5 import FlaxCache


class FlaxModelOutput:
    """Access by name and by place, as transformers' `ModelOutput` gives."""

    def items(self) -> list[tuple[str, Any]]:
        """The fields that are not None, in order."""
        pairs = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return [(name, value) for name, value in pairs if value is not None]

    def keys(self) -> list[str]:
        return [name for name, _ in self.items()]

    def to_tuple(self) -> tuple:
        return tuple(value for _, value in self.items())

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]


@struct.dataclass
class FlaxBaseModelOutput(FlaxModelOutput):
    last_hidden_state: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class FlaxBaseModelOutputWithPastAndCrossAttentions(FlaxModelOutput):
    last_hidden_state: jax.Array | None = None
    past_key_values: FlaxCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class FlaxSeq2SeqModelOutput(FlaxModelOutput):
    last_hidden_state: jax.Array | None = None
    past_key_values: FlaxCache | None = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class FlaxSeq2SeqLMOutput(FlaxModelOutput):
    """Also what the sequence classifier returns, whose logits are (B, num_labels)."""

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    past_key_values: FlaxCache | None = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class FlaxTokenClassifierOutput(FlaxModelOutput):
    loss: jax.Array | None = None
    logits: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class FlaxSeq2SeqQuestionAnsweringModelOutput(FlaxModelOutput):
    loss: jax.Array | None = None
    start_logits: jax.Array | None = None
    end_logits: jax.Array | None = None
    past_key_values: FlaxCache | None = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class FlaxGenerateOutput(FlaxModelOutput):
    """Attributes:
    sequences: (B * num_return_sequences, length) token ids.
    sequences_scores: (B * num_return_sequences,) of a beam search: summed log-probabilities
        over the length to the power of the length penalty.
    """

    sequences: jax.Array | None = None
    sequences_scores: jax.Array | None = None
