"""Reads TensorFlow's checkpoint format ("tensor bundle", V2) with NumPy alone.

A checkpoint is PREFIX.index and PREFIX.data-00000-of-0000N. The index is a table in LevelDB's
format (https://github.com/google/leveldb/blob/main/doc/table_format.md): blocks of sorted,
prefix-compressed keys, each with a checksum, and a footer that says where the index of the blocks
is. The key "" holds a BundleHeaderProto, every other key is a variable's name and holds a
BundleEntryProto (tensorflow/core/protobuf/tensor_bundle.proto). The data files are the tensors'
bytes.

Nothing in a file is trusted: sizes are checked before anything is allocated, and whatever is read
is checked against its CRC-32C. Errors name the file and the offset.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .crc32c import masked_crc32c

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48  # two block handles, padded to 40 bytes, and the magic number
_TRAILER = 5  # behind every block: its compression, one byte, and its checksum, four
# Numbers of tensorflow/core/framework/types.proto. NumPy has no bfloat16: it is the upper half of
# a float32, and read as one.
_DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    4: np.dtype("u1"),
    5: np.dtype("<i2"),
    6: np.dtype("i1"),
    9: np.dtype("<i8"),
    10: np.dtype("?"),
    14: np.dtype("<u2"),
    17: np.dtype("<u2"),
    19: np.dtype("<f2"),
    22: np.dtype("<u4"),
    23: np.dtype("<u8"),
}
_BFLOAT16 = 14
_STATE_FILE = "checkpoint"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file, the offset and the fix."""


@dataclass(frozen=True)
class Variable:
    """Where one tensor lies.

    Attributes:
        dtype: NumPy's name, or "bfloat16".
        shape: sizes, () for a scalar.
        shard: number of the data file.
        offset, size: bytes within it.
        checksum: masked CRC-32C of those bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


class Checkpoint:
    """One checkpoint, open for reading.

    Args:
        prefix: path without ".index"; see `find_checkpoint`.

    Attributes:
        variables: name -> `Variable`, in the file's order.
        files: the index and the data files.
        step: from the prefix's "-STEP", else from the variable "global_step", else None.

    Raises:
        CheckpointError: for missing, truncated or corrupt files.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        self.index_file = inside(self.prefix.parent, self.prefix.name + ".index")
        entries = dict(_read_table(self.index_file))
        header = entries.pop(b"", None)
        if header is None:
            raise CheckpointError(
                f"{self.index_file}: has no header entry, so it is not a TensorFlow checkpoint's "
                "index."
            )
        self._num_shards = _parse_header(self.index_file, header)
        self.variables = {}
        for key, value in entries.items():
            variable = _parse_entry(self.index_file, key, value)
            self.variables[variable.name] = variable
        self._data_files = self._check_data_files()
        self.files = [self.index_file, *self._data_files.values()]
        self.step = self._step()

    def read(self, name: str) -> np.ndarray:
        """The tensor, bfloat16 as float32 (exactly); its checksum is verified.

        Raises:
            CheckpointError: if the bytes do not match their checksum.
        """
        variable = self.variables[name]
        path = self._data_files[variable.shard]
        data = np.fromfile(path, np.uint8, variable.size, offset=variable.offset)
        if data.size != variable.size or masked_crc32c(data) != variable.checksum:
            raise CheckpointError(
                f"{path}: bytes {variable.offset} to {variable.offset + variable.size} "
                f"({name}) do not match their checksum. The file is damaged or was changed: copy "
                "it again from its source."
            )
        if variable.dtype == "bfloat16":
            data = (data.view("<u2").astype("<u4") << 16).view("<f4")
        return data.view(_item_type(variable)).reshape(variable.shape)

    def _check_data_files(self) -> dict[int, Path]:
        """The data files that hold something, by number; all that are missing are named at once."""
        needed: dict[int, Variable] = {}
        for variable in self.variables.values():
            if variable.shard >= self._num_shards:
                raise CheckpointError(
                    f"{self.index_file}: {variable.name!r} lies in data file {variable.shard}, but "
                    f"the checkpoint has {self._num_shards}. The index is damaged."
                )
            last = needed.get(variable.shard)
            if last is None or variable.offset + variable.size > last.offset + last.size:
                needed[variable.shard] = variable
        files, missing = {}, []
        for shard in sorted(needed):
            name = f"{self.prefix.name}.data-{shard:05d}-of-{self._num_shards:05d}"
            path = self.prefix.parent / name
            if path.is_file():
                files[shard] = inside(self.prefix.parent, name)
            else:
                missing.append(name)
        if missing:
            raise CheckpointError(
                f"{self.prefix.parent}: of {len(needed)} data files these are missing: "
                f"{_some(missing)}. Copy them next to {self.index_file.name}."
            )
        for shard, path in files.items():
            last, length = needed[shard], path.stat().st_size
            if last.offset + last.size > length:
                raise CheckpointError(
                    f"{path}: is cut off at byte {length}; {last.name!r} lies at bytes "
                    f"{last.offset} to {last.offset + last.size}. Copy the file again from its "
                    "source."
                )
        return files

    def _step(self) -> int | None:
        match = re.search(r"-(\d+)$", self.prefix.name)
        if match:
            return int(match.group(1))
        step = self.variables.get("global_step")
        if step is None or step.shape != () or not step.dtype.startswith("int"):
            return None
        return int(self.read("global_step"))


def find_checkpoint(path: str | Path) -> Path:
    """The prefix of the checkpoint that a user's path means.

    Args:
        path: a folder (the checkpoint that its file `checkpoint` names, else the one with the
            highest step), or a prefix as "folder/model.ckpt-1000" (or one of its files).

    Raises:
        CheckpointError: if there is none, or no way to choose.
    """
    path = Path(path)
    if not path.is_dir():
        name = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path.name)
        prefix = path.with_name(name)
        if not path.parent.is_dir() or not prefix.with_name(name + ".index").is_file():
            raise CheckpointError(
                f"{path}: there is no checkpoint of that name ({name}.index)."
                + _available(path.parent)
            )
        return prefix
    state = path / _STATE_FILE
    if state.is_file():
        return path / _named_by(state)
    names = [file.name.removesuffix(".index") for file in path.glob("*.index")]
    numbered = {int(n.rsplit("-", 1)[1]): n for n in names if re.search(r"-\d+$", n)}
    if numbered:
        return path / numbered[max(numbered)]
    if len(names) != 1:
        raise CheckpointError(
            f"{path}: holds {len(names)} checkpoints without a step in their names, expected one."
            + _available(path)
        )
    return path / names[0]


def _named_by(state: Path) -> str:
    """The name that a `checkpoint` file gives as the latest, which must lie in its own folder."""
    text = inside(state.parent, state.name).read_bytes().decode("utf-8", errors="replace")
    match = re.search(r'^\s*model_checkpoint_path:\s*"([^"\n]*)"', text, flags=re.MULTILINE)
    if not match:
        raise CheckpointError(
            f'{state}: has no line model_checkpoint_path: "...". Name the checkpoint itself: '
            f"--checkpoint {state.parent}/NAME-STEP." + _available(state.parent)
        )
    name = match.group(1)
    if Path(name).is_absolute() and Path(name).parent.resolve() == state.parent.resolve():
        name = Path(name).name  # TensorFlow's own way, where the folder has not moved since
    if not name or name in (".", "..") or re.search(r"[/\\:\x00]", name):
        raise CheckpointError(
            f"{state}: names {name!r}, expected a name in the same folder, without a path. Name "
            f"the checkpoint itself: --checkpoint {state.parent}/NAME-STEP."
            + _available(state.parent)
        )
    if not state.with_name(name + ".index").is_file():
        raise CheckpointError(
            f"{state}: names {name!r}, but there is no {name}.index." + _available(state.parent)
        )
    return name


def _available(folder: Path) -> str:
    names = sorted(file.name.removesuffix(".index") for file in folder.glob("*.index"))
    if not names:
        return f" {folder} holds no checkpoint (no .index file)."
    return f" {folder} holds: {_some(names)}."


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def inside(folder: Path, name: str) -> Path:
    """folder / name, which may not be a link that leads out of the folder."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file." + _available(folder))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{path}: is a link that leads out of its folder, to {path.resolve()}. Copy the file "
            "itself into the folder."
        )
    return path


def _read_table(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a LevelDB table."""
    data = path.read_bytes()
    footer = len(data) - _FOOTER
    if footer < 0 or int.from_bytes(data[-8:], "little") != _MAGIC:
        raise CheckpointError(
            f"{path}: at offset {max(len(data) - 8, 0)} the magic number that ends a checkpoint's "
            f"index is missing; the file has {len(data)} bytes. It is cut off, or not an index: "
            "copy it again from its source."
        )
    handles = _Parser(path, data, footer, footer + 40)
    meta_block, index_block = [(handles.varint(), handles.varint()) for _ in range(2)]
    for _ in _read_block(path, data, *meta_block):  # which TensorFlow leaves empty
        pass
    seen = set()
    for _, handle in _read_block(path, data, *index_block):
        position = _Parser(path, *handle)
        for key, (source, start, stop) in _read_block(
            path, data, position.varint(), position.varint()
        ):
            if key in seen:
                raise CheckpointError(f"{path}: at offset {start} the name {key!r} comes twice.")
            seen.add(key)
            yield key, source[start:stop]


def _read_block(path, data, offset, size):
    """Keys, and values as (bytes, start, stop), of the block at `offset`."""
    end = offset + size
    if end + _TRAILER > len(data) - _FOOTER or size < 4:
        raise CheckpointError(
            f"{path}: a block of {size} bytes at offset {offset} does not fit into the file's "
            f"{len(data)} bytes. The index is damaged: copy it again from its source."
        )
    checksum = int.from_bytes(data[end + 1 : end + _TRAILER], "little")
    if masked_crc32c(data[offset : end + 1]) != checksum:
        raise CheckpointError(
            f"{path}: the block at offsets {offset} to {end} does not match its checksum. The file "
            "is damaged or was changed: copy it again from its source."
        )
    if data[end] != 0:
        raise CheckpointError(
            f"{path}: the block at offset {offset} is compressed (type {data[end]}), which "
            "TensorFlow does not do to a checkpoint's index."
        )
    restarts = int.from_bytes(data[end - 4 : end], "little")
    if 4 * restarts + 4 > size:
        raise CheckpointError(f"{path}: the block at offset {offset} has {restarts} restarts.")
    parser = _Parser(path, data, offset, end - 4 - 4 * restarts)
    key = b""
    while not parser.at_end:
        at = parser.position
        shared, unshared, length = parser.varint(), parser.varint(), parser.varint()
        if shared > len(key):
            raise CheckpointError(
                f"{path}: at offset {at} a name shares {shared} bytes with one of {len(key)}."
            )
        key = key[:shared] + parser.take(unshared)
        start = parser.position
        parser.take(length)
        yield key, (data, start, start + length)


def _parse_header(path: Path, value: bytes) -> int:
    """The number of data files that a BundleHeaderProto states."""
    fields = dict(_Parser(path, value).fields())
    if fields.get(2, 0) != 0:
        raise CheckpointError(f"{path}: was written big-endian, expected little-endian.")
    shards = fields.get(1, 0)
    if not isinstance(shards, int) or not 1 <= shards < 2**31:
        raise CheckpointError(f"{path}: the header states {shards!r} data files.")
    return shards


def _parse_entry(path: Path, key: bytes, value: bytes) -> Variable:
    """A BundleEntryProto: 1 dtype, 2 shape, 3 shard, 4 offset, 5 size, 6 checksum, 7 slices."""
    try:
        name = key.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: the name {key!r} is not UTF-8.") from error
    fields = {1: 0, 2: b"", 3: 0, 4: 0, 5: 0, 6: 0}
    for number, field in _Parser(path, value).fields():
        if number == 7:
            raise CheckpointError(
                f"{path}: {name!r} is stored in slices (a partitioned variable), which this reader "
                "does not join. Mesh-TensorFlow stores its variables whole."
            )
        fields[number] = field
    if not all(isinstance(fields[n], bytes if n == 2 else int) for n in range(1, 7)):
        raise CheckpointError(f"{path}: the entry of {name!r} is damaged.")
    if fields[1] not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name!r} has TensorFlow's dtype number {fields[1]}, expected numbers: one of "
            f"{sorted(_DTYPES)}."
        )
    dtype = _DTYPES[fields[1]]
    shape = _parse_shape(path, name, fields[2])
    count = 1
    for dim in shape:
        count *= dim
    if count * dtype.itemsize != fields[5]:
        raise CheckpointError(
            f"{path}: {name!r} has {fields[5]} bytes, but its shape {shape} and dtype make "
            f"{count * dtype.itemsize}. The index is damaged."
        )
    return Variable(
        name=name,
        dtype="bfloat16" if fields[1] == _BFLOAT16 else dtype.name,
        shape=shape,
        shard=fields[3],
        offset=fields[4],
        size=fields[5],
        checksum=fields[6],
    )


def _parse_shape(path: Path, name: str, value: bytes) -> tuple[int, ...]:
    """A TensorShapeProto: 2 dim {1 size}, 3 unknown rank."""
    shape = []
    for number, field in _Parser(path, value).fields():
        if number == 2 and isinstance(field, bytes):
            shape.append(dict(_Parser(path, field).fields()).get(1, 0))
    if not all(isinstance(size, int) and size < 2**63 for size in shape) or len(shape) > 8:
        raise CheckpointError(f"{path}: {name!r} has the shape {shape}. The index is damaged.")
    return tuple(shape)


def _item_type(variable: Variable) -> str:
    return "<f4" if variable.dtype == "bfloat16" else variable.dtype


class _Parser:
    """Varints, stretches of bytes and protocol-buffer fields of data[start:stop]."""

    def __init__(self, path: Path, data: bytes, start: int = 0, stop: int | None = None):
        self.path, self.data, self.position = path, data, start
        self.stop = len(data) if stop is None else stop

    @property
    def at_end(self) -> bool:
        return self.position >= self.stop

    def varint(self) -> int:
        value, at = 0, self.position
        for shift in range(0, 70, 7):
            if self.at_end:
                break
            byte = self.data[self.position]
            self.position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise CheckpointError(f"{self.path}: at offset {at} a number does not end.")

    def take(self, count: int) -> bytes:
        at = self.position
        if at + count > self.stop:
            raise CheckpointError(
                f"{self.path}: at offset {at}, {count} bytes are announced and "
                f"{self.stop - at} are left."
            )
        self.position += count
        return self.data[at : at + count]

    def fields(self) -> Iterator[tuple[int, int | bytes]]:
        """Field numbers and values: numbers for varints and fixed widths, bytes for the rest."""
        while not self.at_end:
            at = self.position
            tag = self.varint()
            kind = tag & 7
            if kind == 0:
                yield tag >> 3, self.varint()
            elif kind == 2:
                yield tag >> 3, self.take(self.varint())
            elif kind in (1, 5):
                yield tag >> 3, int.from_bytes(self.take(8 if kind == 1 else 4), "little")
            else:
                raise CheckpointError(f"{self.path}: at offset {at} a field of kind {kind}.")
