"""Records of tokens: flat files that are read at any place, and rows cut from them.

A split is one stream of token ids, documents end to end, in files of 16-bit integers (32-bit for
vocabularies above 65,536) beside a file of the documents' ends; the manifest names them with their
checksums. Flat files rather than ArrayRecord, because the length of a row is not baked in: the same
records serve every `inputs_length`, packed or not, and a row is one slice of a memory map.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

MANIFEST = "manifest.json"


def is_prepared(folder: str | os.PathLike) -> bool:
    """Whether a folder holds records."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: str | os.PathLike) -> dict:
    """What `prepare` wrote about the records.

    Raises:
        ValueError: if it is missing or damaged.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        manifest["splits"]["train"], manifest["tokenizer_sha256"]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {MANIFEST}: write records with `python -m pretraining.prepare`."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): prepare the records again.") from error
    return manifest


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenStream:
    """All tokens of a split, as one array on disk.

    Args:
        folder: holds records.
        split: "train" or "validation".

    Raises:
        ValueError: if a file is missing or has not the size that the manifest says.
    """

    def __init__(self, folder: str | os.PathLike, split: str):
        self.folder, self.split = Path(folder), split
        self.arrays, self.ends, first = [], [], 0
        for part in read_manifest(folder)["splits"][split]:
            if part["tokens"] == 0:
                continue
            tokens, ends = part["files"]
            self.arrays.append(self._map(tokens, part["dtype"], part["tokens"]))
            self.ends.append((first, self._map(ends, "<i8", part["documents"])))
            first += part["tokens"]
        self.starts = np.cumsum([0, *(len(array) for array in self.arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop, int32; they may lie in several files."""
        parts, at = [], int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            first, last = int(self.starts[at]), int(self.starts[at + 1])
            parts.append(self.arrays[at][start - first : min(stop, last) - first])
            start, at = min(stop, last), at + 1
        return np.concatenate(parts).astype(np.int32)

    def document_ends(self) -> np.ndarray:
        """Where each document ends in the stream, int64."""
        return np.concatenate([first + ends for first, ends in self.ends] or [np.zeros(0, int)])

    def _map(self, name, dtype, count):
        path, size = self.folder / name, count * np.dtype(dtype).itemsize
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise ValueError(
                f"{path}: expected {size} bytes, found {found}. `python -m pretraining.prepare "
                f"--verify {self.folder}` checks all files; prepare the damaged source again."
            )
        return np.memmap(path, dtype, mode="r")


class JoinedRows:
    """T5's rows: documents end to end, cut every `raw_length` tokens. Only the last tokens of the
    split, fewer than a row, are left over."""

    def __init__(self, stream: TokenStream, raw_length: int):
        self.stream, self.raw_length = stream, raw_length

    def __len__(self) -> int:
        return len(self.stream) // self.raw_length

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(start, stop) of the examples of a row: here, one."""
        return [(row * self.raw_length, (row + 1) * self.raw_length)]


class PackedRows:
    """Rows of several examples, none of which crosses a document's end.

    Documents longer than a row are split evenly; the examples, in order, fill a row while both its
    inputs and its targets have space. Building the index takes about 3 microseconds a row.

    Args:
        stream: tokens and documents.
        raw_length, inputs_length, targets_length: of a row; the first fits the others exactly.
        counts: (inputs, targets) lengths, (raw_length + 1,) each, of an example by its raw length.
    """

    def __init__(
        self,
        stream: TokenStream,
        raw_length: int,
        inputs_length: int,
        targets_length: int,
        counts: tuple[np.ndarray, np.ndarray],
    ):
        self.stream = stream
        self.borders = _even_pieces(stream.document_ends(), raw_length)
        sizes = np.diff(self.borders)
        filled = [np.concatenate([[0], np.cumsum(count[sizes])]) for count in counts]
        firsts, at = [0], 0
        while at < len(sizes):
            at = min(
                int(np.searchsorted(sums, sums[at] + space, side="right")) - 1
                for sums, space in zip(filled, (inputs_length, targets_length), strict=True)
            )
            firsts.append(at)
        self.firsts = np.asarray(firsts)

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(start, stop) of the examples of a row."""
        borders = self.borders[self.firsts[row] : self.firsts[row + 1] + 1]
        return list(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True))


def _even_pieces(ends, longest):
    """The borders of documents, each split into as few and as equal parts as fit: int64, from 0."""
    starts = np.concatenate([[0], ends[:-1]])
    sizes = ends - starts
    parts = -(-sizes // longest)
    document = np.repeat(np.arange(len(ends)), parts)
    part = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
    stops = starts[document] + (part + 1) * sizes[document] // parts[document]
    return np.concatenate([[0], stops]).astype(np.int64)
