"""A checkpoint's weights as files: model.safetensors, or shards and their index. NumPy only.

Both frameworks keep a parameter under the same name in the same shape: the path of a parameter in
the Flax model, joined by dots, *is* its key in the PyTorch model. So there is nothing to translate
but the weights that PyTorch ties: a file may hold such a weight under any of its names.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def tied_keys(config) -> dict[str, str]:
    """The other names of shared weights and the name each is kept under: {other: kept}."""
    tied = {}
    for stack in ("encoder", "decoder"):
        if config.share_embeddings:
            tied[f"{stack}.embed_tokens.weight"] = "shared.weight"
        if config.share_position_embeddings:
            tied[f"{stack}.embed_positions.weight"] = "shared_positions.weight"
    if config.tie_word_embeddings:
        shared = config.share_embeddings
        tied["lm_head.weight"] = "shared.weight" if shared else "decoder.embed_tokens.weight"
    return tied


class WeightFiles:
    """The weights in a folder, read slice by slice.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.
        tied: the other names of shared weights, from `tied_keys`.

    Attributes:
        shapes, dtypes: {key: shape} and {key: safetensors' name of the dtype, such as "F32"}.
        bytes_read: what `read` has read so far.

    Raises:
        OSError: if files are missing or damaged, naming the file and what to do.
    """

    def __init__(self, folder: str | os.PathLike, tied: dict[str, str]):
        self.folder, self.bytes_read = Path(folder), 0
        self.shapes, self.dtypes, self._files, self._names = {}, {}, {}, {}
        for path, promised in self._paths().items():
            with _opened(path) as file:
                names = set(file.keys())
                for name in promised or ():
                    if name not in names:
                        raise OSError(
                            f"{self.folder / INDEX} says that {name} is in {path.name}, which "
                            "does not hold it. Get the folder again, or save it again."
                        )
                for name in sorted(names):
                    # An untied file may hold a weight twice; the name it is kept under goes first.
                    key = tied.get(name, name)
                    if key == name or key not in self.shapes:
                        part = file.get_slice(name)
                        self.shapes[key] = tuple(part.get_shape())
                        self.dtypes[key] = str(part.get_dtype())
                        self._files[key], self._names[key] = path, name

    def _paths(self) -> dict[Path, list[str] | None]:
        """The files, and what the index says each holds."""
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        if single.is_file():
            return {single: None}
        if not index.is_file():
            others = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = f" {others[0]} is a pickle, which ConvT5 never opens." if others else ""
            raise OSError(f"{self.folder} holds neither {WEIGHTS} nor {INDEX}.{hint}")
        try:
            places = json.loads(index.read_text())["weight_map"]
            files = {name: [] for name in dict.fromkeys(places.values())}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{index} is damaged: {error!r}. Get it again.") from error
        for key, name in places.items():
            files[name].append(key)
        for name in files:
            if Path(name).name != name or not (self.folder / name).is_file():
                raise OSError(
                    f"{index} names the shard {name!r}, which is not in the folder. Get all "
                    "shards, or save the model again."
                )
        return {self.folder / name: keys for name, keys in files.items()}

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A weight, or the part of it at `index`, in the dtype of the file."""
        with _opened(self._files[key]) as file:
            part = file.get_slice(self._names[key])
            array = part[index] if index and self.shapes[key] else part[...]
        self.bytes_read += array.nbytes
        return array


def _opened(path):
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path} cannot be read as safetensors ({error}): it is damaged, cut short or another "
            "kind of file. Get it again."
        ) from error


def write_weights(
    folder: str | os.PathLike,
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    max_shard_size: int | str,
) -> list[str]:
    """Write model.safetensors, or shards and their index, each under a temporary name first.

    Args:
        folder: exists; older weights in it are replaced.
        shapes: {key: (shape, dtype)} in the order of the model, by which shards are filled.
        read: returns the weight of a key; one shard is held in memory at a time.
        max_shard_size: bytes, or such as "5GB".

    Returns:
        The names of the files written.
    """
    folder = Path(folder)
    plan = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda entry: int(np.prod(entry[0], dtype=np.int64)) * entry[1].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    written = list(plan.filename_to_tensors)
    for name, keys in plan.filename_to_tensors.items():
        arrays = {key: np.ascontiguousarray(read(key)) for key in keys}
        _replace(folder / name, lambda path, a=arrays: save_file(a, path, {"format": "pt"}))
    if plan.is_sharded:
        total = sum(int(np.prod(shape, dtype=np.int64)) for shape, _ in shapes.values())
        metadata = {"total_parameters": total, **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        _replace(folder / INDEX, lambda path: path.write_text(text))
        written.append(INDEX)
    for old in folder.iterdir():
        if old.name not in written and (old.name == INDEX or _SHARD.fullmatch(old.name)):
            old.unlink()  # it would be read in place of, or beside, what was just written
    return written


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, then rename: a file is whole or not there."""
    temporary = path.with_name(path.name + ".incomplete")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def compare(
    expected: dict[str, tuple[int, ...]],
    files: WeightFiles,
    may_be_missing: Callable[[str], bool],
    may_be_left: Callable[[str], bool],
) -> list[str]:
    """The keys that the model has and the files have not, if all is well otherwise.

    Args:
        expected: {key: shape} of the model.
        may_be_missing: whether a key of the model may be missing in the files (a new head's).
        may_be_left: whether a key of the files may have no place in the model (another head's).

    Raises:
        ValueError: listing every missing, unexpected and wrongly shaped key, and wrong dtypes.
    """
    found = files.shapes
    missing = [key for key in expected if key not in found]
    faults = [f"  missing: {key} {expected[key]}" for key in missing if not may_be_missing(key)]
    for key, shape in found.items():
        if key not in expected:
            if not may_be_left(key):
                faults.append(f"  unexpected: {key} {shape}")
        elif shape != expected[key]:
            faults.append(f"  wrong shape: {key} is {shape}, the model's is {expected[key]}")
        elif files.dtypes[key] not in FLOATS:
            faults.append(f"  wrong dtype: {key} is {files.dtypes[key]}, expected {list(FLOATS)}")
    if faults:
        raise ValueError(
            f"The weights in {files.folder} are not those of this model. Its config.json and its "
            "weights must belong together:\n" + "\n".join(faults)
        )
    return missing


def matches(prefixes: Iterable[str]) -> Callable[[str], bool]:
    """Whether a key begins with one of `prefixes`."""
    prefixes = tuple(prefixes)
    return lambda key: key.startswith(prefixes)
