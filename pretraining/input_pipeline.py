"""Batches of corrupted rows in an order that any process can take up at any batch.

The order is grain's shuffle of the rows, another one each epoch, and the noise of a row follows
from the seed and the row's place in that order. Both are properties of the run, not of the number
of hosts: each host makes just the rows of the global batch that its own devices hold. So the whole
state of the pipeline is the number of the next batch.

Shapes: B rows on this host, L inputs length (of joined rows one less where no raw length gives it),
T targets length.
"""

from collections.abc import Iterator

import grain
import numpy as np

from .records import JoinedRows, PackedRows, TokenStream
from .settings import Settings
from .span_corruption import apply_noise_mask, lengths, noise_mask, span_corruption
from .tokens import TokenizerFile

# Keeps the noise of the two splits apart.
_NOISE = {"train": 0, "validation": 1}
_THREADS = 4  # NumPy releases the interpreter in part only: more threads would only wait


class Batches:
    """The rows of a split, corrupted, in batches.

    Args:
        settings: of the run.
        tokenizer: the one that the records were written with.
        records: their folder.
        split: "train", shuffled and without end, or "validation", in order.
        places: which rows of each global batch this process makes, sorted.

    Raises:
        ValueError: if there are no rows, or not enough sentinels.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: TokenizerFile,
        records: str,
        split: str,
        places: np.ndarray,
    ):
        self.settings, self.tokenizer, self.split, self.places = settings, tokenizer, split, places
        if settings.num_spans > tokenizer.num_sentinels:
            raise ValueError(
                f"Settings.inputs_length={settings.inputs_length} has {settings.num_spans} noise "
                f"spans a row, but the tokenizer {tokenizer.num_sentinels} sentinels. Shorten the "
                "rows or raise mean_noise_span_length."
            )
        self.stream = TokenStream(records, split)
        self.rows = self._cut(self.stream)
        if len(self.rows) == 0:
            raise ValueError(
                f"The {split} split of {records} has {len(self.stream):,} tokens, less than one "
                f"row of {settings.raw_length}. "
                + (
                    "Give more text or shorten inputs_length."
                    if split == "train"
                    else "Add a validation file and prepare again, or set eval_every=0."
                )
            )

    def __len__(self) -> int:
        """Whole batches in one pass, at least 1: a shorter split is repeated to fill one."""
        return max(1, len(self.rows) // self.settings.batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """A grain iterator, with `get_state` and `set_state`; for the training split, endless.

        Yields dictionaries of int32 arrays: input_ids (B, L), labels (B, T) with -100 for padding,
        packed rows' segment_ids (B, L) and decoder_segment_ids (B, T), and rows (B,).
        """
        settings = self.settings
        order = grain.MapDataset.range(len(self.rows)).seed(settings.seed)
        if self.split == "train":
            order = order.shuffle()
        order = order.repeat().map_with_index(lambda position, row: (position, row))
        batches = order.batch(settings.batch_size).map(self.make)
        if self.split != "train":
            batches = batches[: min(settings.eval_batches, len(self))]
        threads = min(_THREADS, settings.prefetch)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=settings.prefetch)
        return iter(batches.to_iter_dataset(options))

    def make(self, batch: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        """This host's part of a batch, from the places in the order and the rows of all of it."""
        positions, rows = (np.asarray(part)[self.places] for part in batch)
        noise = [
            np.random.default_rng([self.settings.seed, _NOISE[self.split], int(position)])
            for position in positions
        ]
        corrupt = self._packed if self.settings.packing else self._joined
        return {**corrupt(rows.tolist(), noise), "rows": rows.astype(np.int32)}

    def _cut(self, stream):
        settings = self.settings
        if not settings.packing:
            return JoinedRows(stream, settings.raw_length)
        counts = np.zeros((2, settings.raw_length + 1), np.int64)
        for size in range(2, settings.raw_length + 1):
            counts[:, size] = lengths(size, settings.noise_density, settings.mean_noise_span_length)
        return PackedRows(
            stream, settings.raw_length, settings.inputs_length, settings.targets_length, counts
        )

    def _joined(self, rows, noise):
        tokens = np.stack([self.stream.read(*self.rows.pieces(row)[0]) for row in rows])
        length, density, mean = tokens.shape[1], *self._noise()
        mask = np.concatenate([noise_mask(rng, 1, length, density, mean) for rng in noise])
        inputs, labels = apply_noise_mask(tokens, mask, *self._special())
        return {"input_ids": inputs, "labels": labels}

    def _packed(self, rows, noise):
        settings, count = self.settings, len(rows)
        inputs_shape = (count, settings.inputs_length)
        targets_shape = (count, settings.targets_length)
        batch = {
            "input_ids": np.full(inputs_shape, self.tokenizer.pad_token_id, np.int32),
            "labels": np.full(targets_shape, -100, np.int32),
            "segment_ids": np.zeros(inputs_shape, np.int32),
            "decoder_segment_ids": np.zeros(targets_shape, np.int32),
        }
        for at, (row, rng) in enumerate(zip(rows, noise, strict=True)):
            used = np.zeros(2, int)
            for segment, piece in enumerate(self.rows.pieces(row), 1):
                tokens = self.stream.read(*piece)[None]
                pair = span_corruption(
                    tokens, rng, *self._special(), *self._noise(), self.tokenizer.num_sentinels
                )
                ends = used + [part.shape[1] for part in pair]
                for part, names, start, end in zip(
                    pair,
                    (("input_ids", "segment_ids"), ("labels", "decoder_segment_ids")),
                    used,
                    ends,
                    strict=True,
                ):
                    batch[names[0]][at, start:end] = part[0]
                    batch[names[1]][at, start:end] = segment
                used = ends
        return batch

    def _special(self):
        return self.tokenizer.first_sentinel_id, self.tokenizer.eos_token_id

    def _noise(self):
        return self.settings.noise_density, self.settings.mean_noise_span_length
