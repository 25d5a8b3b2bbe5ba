"""ConvT5: a T5-like model family whose token mixing is a convolution.

Importing the package registers its classes with transformers' Auto classes, so that
`AutoModel.from_pretrained(folder)` needs no remote code. PyTorch is imported only where it is
installed, Flax only when one of its names is asked for.
"""

import importlib
import importlib.util
from typing import Any

from transformers import AutoConfig

from .configuration_convt5 import PRESETS, ConvT5Config

__version__ = "0.1.0"
__all__ = ["PRESETS", "ConvT5Config"]

AutoConfig.register("convt5", ConvT5Config, exist_ok=True)

if importlib.util.find_spec("torch") is not None:
    import transformers

    from . import modeling_convt5
    from .cache_convt5 import ConvStateCache, StaticConvStateCache
    from .configuration_convt5 import AUTO_MAP
    from .modeling_convt5 import (
        ConvT5EncoderModel,
        ConvT5ForConditionalGeneration,
        ConvT5ForQuestionAnswering,
        ConvT5ForSequenceClassification,
        ConvT5ForTokenClassification,
        ConvT5Model,
        ConvT5PreTrainedModel,
    )

    __all__ += [
        "ConvStateCache",
        "ConvT5EncoderModel",
        "ConvT5ForConditionalGeneration",
        "ConvT5ForQuestionAnswering",
        "ConvT5ForSequenceClassification",
        "ConvT5ForTokenClassification",
        "ConvT5Model",
        "ConvT5PreTrainedModel",
        "StaticConvStateCache",
    ]
    for _auto, _reference in AUTO_MAP.items():
        if _auto != "AutoConfig":
            _model = getattr(modeling_convt5, _reference.split(".")[1])
            getattr(transformers, _auto).register(ConvT5Config, _model, exist_ok=True)

_FLAX = {
    "FlaxConvT5EncoderModel": "modeling_flax_convt5",
    "FlaxConvT5ForConditionalGeneration": "modeling_flax_convt5",
    "FlaxConvT5ForQuestionAnswering": "modeling_flax_convt5",
    "FlaxConvT5ForSequenceClassification": "modeling_flax_convt5",
    "FlaxConvT5ForTokenClassification": "modeling_flax_convt5",
    "FlaxConvT5Model": "modeling_flax_convt5",
    "FlaxConvT5PreTrainedModel": "stacks_flax_convt5",
    "FlaxGenerationConfig": "generation_flax_convt5",
    "SHARDING_RULES": "sharding_flax_convt5",
}
__all__ += _FLAX


def __getattr__(name: str) -> Any:
    if name in _FLAX:
        return getattr(importlib.import_module(f".{_FLAX[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
