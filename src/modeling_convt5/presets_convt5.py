"""The named sizes of the family, as differences from `ConvT5Config`'s defaults.

{lightweight, dynamic, dilated, transformer} x {tiny, small, base, large} are the paper's block (Tay
et al. 2021), which the paper trains at base size only: the other sizes are ours. released-... are
the published checkpoints, whose sizes are inferred from parameter counts.
"""

from typing import Any

_SIZES = {
    "tiny": {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 512, "num_layers": 4},
    "small": {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6},
    "base": {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072, "num_layers": 12},
    "large": {"d_model": 1024, "d_kv": 64, "num_heads": 16, "d_ff": 4096, "num_layers": 24},
}
# (taps, dilation) of the twelve layers of the dilated model: receptive widths 4 4 7 7 15 15 15 15
# 31 31 31 31. The paper prints widths only, and eleven of them; the reading is ours.
DILATED_WINDOWS = [(4, 1)] * 2 + [(4, 2)] * 2 + [(8, 2)] * 4 + [(16, 2)] * 4
_FAMILIES = {
    "lightweight": "lightweight",
    "dynamic": "dynamic",
    "dilated": "lightweight",
    "transformer": "attention",
}
_RELEASED = {
    "encoder_kernel_size": 9,
    "decoder_kernel_size": 9,
    "filter_sharing": "strided",
    "mixer_bias": True,
    "pointwise": True,
    "position_embeddings": "learned",
    "d_kv": 128,
    "num_heads": 8,
}
_RELEASED_SIZES = {
    "lightweight-small": {"d_model": 512, "d_ff": 2048, "num_layers": 6},
    "lightweight-base": {"d_model": 1024, "d_ff": 4096, "num_layers": 6},
    "lightweight-large": {
        "d_model": 1024,
        "d_ff": 4096,
        "num_layers": 24,
        "d_kv": 64,
        "num_heads": 16,
    },
    "dynamic-base": {"d_model": 1024, "d_ff": 4096, "num_layers": 6},
    "dynamic-large": {
        "d_model": 1024,
        "d_ff": 4096,
        "num_layers": 24,
        "d_kv": 64,
        "num_heads": 16,
    },
}


def _presets() -> dict[str, dict[str, Any]]:
    presets = {}
    for family, mixer in _FAMILIES.items():
        for size, fields in _SIZES.items():
            mixers = {"encoder_mixers": mixer, "decoder_mixers": mixer}
            presets[f"{family}-{size}"] = {**fields, **mixers, "num_filters": 2}
    for name, fields in _RELEASED_SIZES.items():
        mixer = name.split("-")[0]
        mixers = {"encoder_mixers": mixer, "decoder_mixers": mixer}
        presets[f"released-{name}"] = {**_RELEASED, **fields, **mixers}
    return presets


PRESETS = _presets()
