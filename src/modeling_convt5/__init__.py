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
    from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

    from .cache_convt5 import ConvStateCache
    from .modeling_convt5 import (
        ConvT5EncoderModel,
        ConvT5ForConditionalGeneration,
        ConvT5Model,
        ConvT5PreTrainedModel,
    )

    __all__ += [
        "ConvStateCache",
        "ConvT5EncoderModel",
        "ConvT5ForConditionalGeneration",
        "ConvT5Model",
        "ConvT5PreTrainedModel",
    ]
    AutoModel.register(ConvT5Config, ConvT5Model, exist_ok=True)
    AutoModelForSeq2SeqLM.register(ConvT5Config, ConvT5ForConditionalGeneration, exist_ok=True)
    AutoModelForTextEncoding.register(ConvT5Config, ConvT5EncoderModel, exist_ok=True)
