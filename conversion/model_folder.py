"""Writes a ConvT5 model's folder: whole or not at all, and one weight at a time.

Everything is written into a folder beside the target, which takes the target's place at the end;
an error, a full disk or an interruption leaves the target as it was.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi
from transformers import GenerationConfig, T5TokenizerFast

import modeling_convt5
from modeling_convt5 import ConvT5Config

# Bytes of a number, and safetensors' name for it.
DTYPES = {"float32": (4, "F32"), "float16": (2, "F16"), "bfloat16": (2, "BF16")}
MAX_SHARD_BYTES = 5 * 10**9
_NOT_COPIED = ("__init__.py", "__main__.py")


class OutputError(ValueError):
    """A folder that cannot be written; the message says why and what to do."""


@dataclass(frozen=True)
class Weight:
    """One tensor to be written: `make` returns its values, in float32 or narrower."""

    key: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


@contextmanager
def new_folder(output: str | Path, overwrite: bool, inputs: list[Path]) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when the block ends without an error.

    Args:
        overwrite: whether a model in `output` may be replaced.
        inputs: files that are read meanwhile, which may not lie in `output`.

    Raises:
        OutputError: if `output` is not empty (without `overwrite`), holds something other than a
            model's files, or cannot be written.
    """
    output = Path(output).absolute()
    _check_target(output, overwrite, inputs)
    folder = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        yield folder
        _replace(output, folder)
    except OSError as error:
        raise OutputError(
            f"Writing {output} failed: {error}. Nothing was left behind: make room, or choose "
            "another --output."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_weights(folder: Path, weights: list[Weight], dtype: str) -> None:
    """Write safetensors: one file, or several with an index where they exceed `MAX_SHARD_BYTES`.

    Args:
        dtype: one of `DTYPES`.

    Raises:
        OutputError: if the disk has no room, or a weight does not fit into float16.
    """
    sizes = [_bytes(weight, dtype) for weight in weights]
    free = shutil.disk_usage(folder).free
    if free < sum(sizes):
        raise OutputError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, the weights need "
            f"{sum(sizes) / 1e9:.2f} GB. Make room, or choose another --output."
        )
    shards, held = [[]], 0
    for weight, size in zip(weights, sizes, strict=True):
        if shards[-1] and held + size > MAX_SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(weight)
        held += size
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, dtype)
    if len(shards) > 1:
        weight_map = {w.key: name for name, shard in zip(names, shards, strict=True) for w in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_configuration(folder: Path, config: ConvT5Config, dtype: str) -> None:
    """Write config.json, generation_config.json and the model's code."""
    config.architectures = ["ConvT5ForConditionalGeneration"]
    config.dtype = dtype
    for file in sorted(Path(modeling_convt5.__file__).parent.glob("*.py")):
        if file.name not in _NOT_COPIED:
            shutil.copy(file, folder)
    config.save_pretrained(folder)
    GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)


def write_tokenizer(folder: Path, tokenizer: Path) -> int:
    """Copy T5's SentencePiece model as spiece.model and save the tokenizer made from it.

    Returns:
        How many ids the tokenizer has, the 100 sentinels included.

    Raises:
        OutputError: if the file is not a SentencePiece model.
    """
    shutil.copyfile(tokenizer, folder / "spiece.model")
    try:
        made = T5TokenizerFast.from_pretrained(folder)
        made.save_pretrained(folder)
    except Exception as error:  # transformers, tokenizers and protobuf raise what they like
        raise OutputError(
            f"{tokenizer}: is not a SentencePiece model from which T5's tokenizer can be made "
            f"({error}). T5's own is called spiece.model or sentencepiece.model."
        ) from error
    return len(made)


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a finished folder; returns the repository's address."""
    api = HfApi()
    address = api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder)
    return str(address)


def _write_file(path, weights, dtype):
    """One file in safetensors' format (a header of JSON, then the bytes), weight by weight.

    safetensors' own writers want all tensors at once.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for weight in weights:
        end = offset + _bytes(weight, dtype)
        entry = {"dtype": DTYPES[dtype][1], "shape": weight.shape, "data_offsets": [offset, end]}
        header[weight.key], offset = entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            file.write(memoryview(_values(weight, dtype)).cast("B"))


def _bytes(weight, dtype):
    return math.prod(weight.shape) * DTYPES[dtype][0]


def _values(weight, dtype):
    """A weight's values in C order and little-endian; bfloat16 as the bits that it consists of."""
    values = np.ascontiguousarray(weight.make(), dtype="<f4")
    assert values.shape == weight.shape, (weight.key, values.shape)
    if dtype == "float32":
        return values
    if dtype == "bfloat16":
        return _bfloat16(values)
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if np.isinf(half).sum() > np.isinf(values).sum():
        raise OutputError(
            f"{weight.key} holds numbers beyond float16's 65,504. Use --dtype bfloat16."
        )
    return half


def _bfloat16(values):
    """The upper halves (uint16) of float32 values, rounded to the nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    quiet = (bits | 0x400000) & 0xFFFF0000  # NaN stays NaN: rounding may carry into the sign
    return (np.where(np.isnan(values), quiet, rounded) >> 16).astype("<u2")


def _check_target(output, overwrite, inputs):
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output}: is not a folder. Choose another --output.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"{output}: is not empty. Choose another --output, or pass --overwrite to replace what "
            "is in it."
        )
    inside = [str(path) for path in inputs if path.resolve().is_relative_to(output.resolve())]
    folders = sorted(path.name for path in output.iterdir() if path.is_dir())
    if inside or folders:
        what = f"{inside[0]}, which is read" if inside else f"the folder {folders[0]}"
        raise OutputError(
            f"{output}: holds {what}, so it is not replaced. Choose another --output."
        )


def _replace(output, folder):
    """Put the finished folder in the place of `output`, which is empty or may be overwritten."""
    if not output.exists():
        folder.rename(output)
        return
    old = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    output.rename(old)
    try:
        folder.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
