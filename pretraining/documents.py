"""Raw text, document by document, from files or the Hub; what cannot be read is counted by name.

JSON lines (C4's own files, .json.gz) and parquet have a column "text"; in plain text a line is a
document. A folder's files go to the split in their names, or in those of the folders that they are
in: "validation", "valid" or "dev" are held out, "test" is left alone, all others are for training.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COLUMN = "text"
# C4's longest documents have about a million characters: what is longer is no page of text.
MAX_CHARACTERS = 10_000_000
_JSON = re.compile(r"\.(json|jsonl)(\.gz)?$")
_TEXT = re.compile(r"\.(txt|tokens)(\.gz)?$")
_PARQUET = re.compile(r"\.parquet$")
_HELD_OUT = re.compile(r"(^|[^a-z])(validation|valid|dev)([^a-z]|$)")
_TEST = re.compile(r"(^|[^a-z])test([^a-z]|$)")


@dataclass(frozen=True)
class Source:
    """One file, or one shard of a data set on the Hub.

    Attributes:
        name: how it is called in the records and the counts.
        split: "train" or "validation".
        path: of the file, or "owner/name" or "owner/name/configuration" on the Hub.
        shard: of the Hub's data set; None for a file.
    """

    name: str
    split: str
    path: str
    shard: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the file, by which a change is noticed; 0 on the Hub."""
        return 0 if self.shard is not None else Path(self.path).stat().st_size


def find_sources(data: str) -> list[Source]:
    """The sources of a file, a folder, or `hf://owner/name[/configuration]`, in a fixed order.

    Raises:
        ValueError: if there is nothing to train on.
    """
    if data.startswith("hf://"):
        return _hub_sources(data)
    path = Path(data)
    if not path.exists():
        raise ValueError(
            f"data_dir={data!r}: there is no such file or folder. Pass prepared records, a folder "
            "of .json.gz, .jsonl, .parquet or .txt files, or hf://owner/name/configuration."
        )
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [file for file in files if any(kind.search(file.name) for kind in _KINDS)]
    sources = []
    for file in files:
        relative = file.name if path.is_file() else file.relative_to(path).as_posix()
        name = relative.lower()
        if _TEST.search(name) and len(files) > 1:
            continue
        split = "validation" if _HELD_OUT.search(name) and len(files) > 1 else "train"
        sources.append(Source(relative, split, str(file)))
    if not any(source.split == "train" for source in sources):
        raise ValueError(
            f"data_dir={data!r} holds no text to train on: expected .json.gz, .jsonl, .json, "
            ".parquet or .txt files whose names do not say test or validation."
        )
    return sources


def read(source: Source, skipped: Counter) -> Iterator[str]:
    """The texts of a source; `skipped` counts, by reason, what is left out.

    A damaged file is read up to its fault.
    """
    try:
        for text in _texts(source, skipped):
            if not isinstance(text, str):
                skipped[f"no text in the column {COLUMN!r}"] += 1
            elif not text.strip():
                skipped["empty document"] += 1
            elif len(text) > MAX_CHARACTERS:
                skipped[f"document of more than {MAX_CHARACTERS:,} characters"] += 1
            elif not _is_unicode(text):
                skipped["document with half a character (a lone surrogate)"] += 1
            else:
                yield text
    except (OSError, EOFError, zlib.error) as error:
        if source.shard is not None or isinstance(error, FileNotFoundError):
            raise  # the network failed, not the text: a rerun goes on with this source
        skipped[f"damaged file, read up to its fault: {error}"] += 1


def _is_unicode(text):
    """JSON can hold half of a pair of surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(source, skipped):
    if source.shard is not None:
        stream = _hub_stream(source.path, source.split)
        yield from (row.get(COLUMN) for row in stream.shard(stream.num_shards, source.shard))
    elif _PARQUET.search(source.path):
        for value in _parquet(source.path):
            try:
                yield value.decode("utf-8") if isinstance(value, bytes) else value
            except UnicodeDecodeError:
                skipped["document that is not UTF-8"] += 1
    else:
        if source.size == 0:
            skipped["file of no bytes"] += 1
            return
        opened = gzip.open if source.path.endswith(".gz") else open
        is_json = _JSON.search(source.path)
        with opened(source.path, "rb") as file:
            for line in file:
                try:
                    text = line.decode("utf-8")
                    yield json.loads(text).get(COLUMN) if is_json else text.rstrip("\r\n")
                except UnicodeDecodeError:
                    skipped["line that is not UTF-8"] += 1
                except (ValueError, AttributeError, RecursionError):
                    skipped["line that is not a JSON object"] += 1


def _parquet(path):
    """The values of the column: text as bytes, which need not be UTF-8."""
    import pyarrow
    import pyarrow.lib
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if COLUMN not in file.schema_arrow.names:
            raise OSError(f"it has no column {COLUMN!r}")
        for batch in file.iter_batches(columns=[COLUMN]):
            column = batch.column(0)
            if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                column = column.cast(pyarrow.large_binary())
            yield from column.to_pylist()
    except pyarrow.lib.ArrowException as error:
        raise OSError(str(error)) from error


def _hub_sources(data):
    path = data.removeprefix("hf://")
    if not 1 <= path.count("/") <= 2:
        raise ValueError(f"data_dir={data!r}: expected hf://owner/name or hf://owner/name/config.")
    sources = []
    for split in ("train", "validation"):
        try:
            stream = _hub_stream(path, split)
        except ValueError:
            if split == "train":
                raise
            continue  # not every data set has one: a share of the training text is held out then
        for shard in range(stream.num_shards):
            sources.append(Source(f"{path}/{split}-{shard:05}", split, path, shard))
    return sources


def _hub_stream(path, split):
    from datasets import load_dataset

    owner, name, *configuration = path.split("/")
    return load_dataset(f"{owner}/{name}", *configuration, split=split, streaming=True)


_KINDS = (_JSON, _TEXT, _PARQUET)
