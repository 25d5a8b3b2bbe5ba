"""Span corruption for transformers' `Trainer`, made anew for every batch."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from .span_corruption import MEAN_NOISE_SPAN_LENGTH, NOISE_DENSITY, span_corruption


class SpanCorruptionCollator:
    """Turns rows of raw tokens into `input_ids` and `labels`.

    The noise follows from the seed and the batch's own tokens, so a batch is corrupted alike in
    any process and after any restart, while another epoch, which shuffles differently, gets other
    noise. The decoder's inputs are left to the model, which shifts the labels.

    Args:
        first_sentinel_id: id of `<extra_id_0>`.
        eos_token_id: appended to inputs and labels.
        seed: another seed gives other noise.
        noise_density, mean_noise_span_length, num_sentinels: as in `span_corruption`.
    """

    def __init__(
        self,
        first_sentinel_id: int,
        eos_token_id: int = 1,
        seed: int = 0,
        noise_density: float = NOISE_DENSITY,
        mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
        num_sentinels: int = 100,
    ):
        self.first_sentinel_id = first_sentinel_id
        self.eos_token_id = eos_token_id
        self.seed = seed
        self.noise_density = noise_density
        self.mean_noise_span_length = mean_noise_span_length
        self.num_sentinels = num_sentinels

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Corrupt features with "input_ids" of one common length R.

        Returns:
            input_ids (B, L) and labels (B, T), int64; `raw_length_for` relates R, L and T.

        Raises:
            ValueError: if the rows differ in length, or as in `span_corruption`.
        """
        sizes = {len(feature["input_ids"]) for feature in features}
        if len(sizes) != 1:
            raise ValueError(
                f"The rows of a batch have lengths {sorted(sizes)}, expected one length: join the "
                "texts and cut them with `raw_length_for`."
            )
        tokens = np.array([feature["input_ids"] for feature in features], dtype=np.int64)
        rng = np.random.default_rng([self.seed, zlib.crc32(tokens.tobytes())])
        inputs, targets = span_corruption(
            tokens,
            rng,
            self.first_sentinel_id,
            self.eos_token_id,
            self.noise_density,
            self.mean_noise_span_length,
            self.num_sentinels,
        )
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(targets)}
