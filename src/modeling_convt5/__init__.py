"""ConvT5: a T5-like model family whose token mixing is a convolution.

Importing the package registers its classes with transformers' Auto classes, so that
`AutoModel.from_pretrained(folder)` needs no remote code. PyTorch is imported only where it is
installed.
"""

import importlib.util

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
