"""T5's span corruption, in NumPy only, so that every framework shares it.

Raffel et al. 2020 (arXiv 1910.10683, section 3.1.4), in the exact form of T5's
`random_spans_noise_mask` and `random_spans_helper`: a fixed share of a row's tokens is noise, in a
fixed number of spans whose lengths are uniformly random compositions. Inputs keep the rest, each
span replaced by one sentinel; targets hold the spans, each after its sentinel:

    raw      the quick brown fox jumps over
    inputs   the <extra_id_0> fox <extra_id_1> </s>
    targets  <extra_id_0> quick brown <extra_id_1> jumps over </s>

Because the counts depend on the raw length alone, rows of equal length give arrays without any
padding: 512 input tokens come from 568 raw ones and have 114 targets.

Shapes: B batch, R raw length, L inputs length, T targets length, S number of noise spans.
"""

import numpy as np

NOISE_DENSITY = 0.15
MEAN_NOISE_SPAN_LENGTH = 3.0


def noise_counts(
    raw_length: int,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tuple[int, int]:
    """How many tokens of a row are noise, and in how many spans.

    Args:
        raw_length: R, at least 2.
        noise_density: share of noise tokens, between 0 and 1.
        mean_noise_span_length: tokens a span on average, at least 1.

    Returns:
        (noise tokens, noise spans), both at least 1, leaving a token before every span.

    Raises:
        ValueError: for values outside these ranges.
    """
    if raw_length < 2:
        raise ValueError(
            f"raw_length (={raw_length}) must be at least 2: one token to hide, one to keep."
        )
    if not 0.0 < noise_density < 1.0:
        raise ValueError(f"noise_density (={noise_density}) must lie between 0 and 1; T5 has 0.15.")
    if not mean_noise_span_length >= 1.0:
        raise ValueError(
            f"mean_noise_span_length (={mean_noise_span_length}) must be at least 1 token; "
            "T5 has 3."
        )
    noise = min(max(round(raw_length * noise_density), 1), raw_length - 1)
    spans = max(round(noise / mean_noise_span_length), 1)
    return noise, min(spans, raw_length - noise)


def lengths(
    raw_length: int,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tuple[int, int]:
    """(L, T): the lengths of inputs and targets of a raw row, one end-of-sequence token each.

    Arguments and errors are those of `noise_counts`.
    """
    noise, spans = noise_counts(raw_length, noise_density, mean_noise_span_length)
    return raw_length - noise + spans + 1, noise + spans + 1


def raw_length_for(
    inputs_length: int,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tuple[int, int]:
    """The longest raw row whose inputs fit, and the length of its targets.

    T5's `random_spans_helper`: 512 inputs come from 568 raw tokens with 114 targets, 1,024 from
    1,137 with 229.

    Args:
        inputs_length: L, at least 3 (a kept token, a sentinel, the end of the sequence).
        noise_density, mean_noise_span_length: as in `noise_counts`.

    Returns:
        (R, T).

    Raises:
        ValueError: if inputs_length is too short, or as in `noise_counts`.
    """
    settings = (noise_density, mean_noise_span_length)
    if inputs_length < lengths(2, *settings)[0]:
        raise ValueError(
            f"inputs_length (={inputs_length}) must be at least 3: one token to keep, one "
            "sentinel and the end of the sequence."
        )
    raw_length = 2
    while lengths(raw_length + 1, *settings)[0] <= inputs_length:
        raw_length += 1
    return raw_length, lengths(raw_length, *settings)[1]


def random_lengths(rng: np.random.Generator, batch: int, total: int, parts: int) -> np.ndarray:
    """Random compositions of `total` into `parts` positive integers: (batch, parts), int64.

    Every composition is equally likely: `parts - 1` of the `total - 1` borders are drawn.
    """
    borders = np.broadcast_to(np.arange(total - 1) < parts - 1, (batch, total - 1))
    borders = rng.permuted(borders, axis=1)
    rows, columns = np.nonzero(borders)
    ends = np.full((batch, parts), total, dtype=np.int64)
    ends[:, :-1] = (columns + 1).reshape(batch, parts - 1)
    return np.diff(ends, axis=1, prepend=0)


def noise_mask(
    rng: np.random.Generator,
    batch: int,
    raw_length: int,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> np.ndarray:
    """True where a token is noise: (B, R), bool.

    Every row begins with kept tokens, alternates, and ends with noise, as in T5.
    Arguments and errors are those of `noise_counts`.
    """
    noise, spans = noise_counts(raw_length, noise_density, mean_noise_span_length)
    kept_lengths = random_lengths(rng, batch, raw_length - noise, spans)
    noise_lengths = random_lengths(rng, batch, noise, spans)
    starts = np.cumsum(np.stack([kept_lengths, noise_lengths], axis=2).reshape(batch, -1), axis=1)
    mask = np.zeros((batch, raw_length), dtype=np.int64)
    np.put_along_axis(mask, starts[:, :-1], 1, axis=1)
    return np.cumsum(mask, axis=1) % 2 == 1


def apply_noise_mask(
    tokens: np.ndarray, mask: np.ndarray, first_sentinel_id: int, eos_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of rows whose noise is known.

    Args:
        tokens: (B, R), integers.
        mask: (B, R), bool, as from `noise_mask`: equal counts of tokens and spans in every row,
            the first token kept and the last one noise.
        first_sentinel_id: id of `<extra_id_0>`; the following sentinels count down from it.
        eos_token_id: appended to inputs and targets.

    Returns:
        inputs (B, L) and targets (B, T), in the dtype of tokens.
    """
    return (
        _replace_spans(tokens, mask, first_sentinel_id, eos_token_id),
        _replace_spans(tokens, ~mask, first_sentinel_id, eos_token_id),
    )


def _replace_spans(tokens, mask, first_sentinel_id, eos_token_id):
    """Each True span becomes one sentinel: <extra_id_0>, then the ids below it."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    sentinels = first_sentinel_id + 1 - np.cumsum(starts, axis=1)
    values = np.where(starts, sentinels, tokens).astype(tokens.dtype)
    kept = values[starts | ~mask].reshape(len(tokens), -1)
    return np.pad(kept, ((0, 0), (0, 1)), constant_values=eos_token_id)


def span_corruption(
    tokens: np.ndarray,
    rng: np.random.Generator,
    first_sentinel_id: int,
    eos_token_id: int = 1,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
    num_sentinels: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt a batch of rows of equal length.

    Args:
        tokens: (B, R), integers; rows of running text without padding.
        rng: the only source of randomness: an equal generator gives an equal result.
        first_sentinel_id: id of `<extra_id_0>`, the highest sentinel; the others count down.
        eos_token_id: appended to inputs and targets.
        noise_density, mean_noise_span_length: as in `noise_counts`.
        num_sentinels: how many sentinels the vocabulary has.

    Returns:
        inputs (B, L) and targets (B, T), in the dtype of tokens, with (L, T) from `lengths`.

    Raises:
        ValueError: for tokens of a wrong shape or dtype, or a row with more spans than sentinels.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, expected integers of shape "
            "(batch, raw length): rows of equal length, cut with `raw_length_for`."
        )
    batch, raw_length = tokens.shape
    _, spans = noise_counts(raw_length, noise_density, mean_noise_span_length)
    if spans > num_sentinels:
        raise ValueError(
            f"A row of {raw_length} tokens has {spans} noise spans, but the vocabulary has "
            f"{num_sentinels} sentinels. Shorten the rows or raise mean_noise_span_length "
            f"(={mean_noise_span_length})."
        )
    mask = noise_mask(rng, batch, raw_length, noise_density, mean_noise_span_length)
    return apply_noise_mask(tokens, mask, first_sentinel_id, eos_token_id)
