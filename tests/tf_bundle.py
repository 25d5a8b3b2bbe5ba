"""Writes TensorFlow's checkpoint format, for tests of its reader: small, plain and independent.

bfloat16 tensors are given as float32 arrays whose numbers bfloat16 holds exactly.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

MAGIC = 0xDB4775248B80FB57
NUMBERS = {
    "float32": 1,
    "float64": 2,
    "int32": 3,
    "uint8": 4,
    "int16": 5,
    "int8": 6,
    "int64": 9,
    "bool": 10,
    "bfloat16": 14,
    "uint16": 17,
    "float16": 19,
    "uint32": 22,
    "uint64": 23,
}


def crc32c(data: bytes) -> int:
    """The definition: the polynomial's remainder, one byte after another."""
    state = 0xFFFFFFFF
    for byte in data:
        state = REMAINDERS[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def remainder(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


REMAINDERS = [remainder(byte) for byte in range(256)]


def write_bundle(
    prefix: Path,
    variables: dict[str, np.ndarray | Callable[[], np.ndarray]],
    bfloat16: tuple[str, ...] = (),
    shards: int = 2,
    block_entries: int = 7,
    checksum: Callable[[bytes], int] = crc32c,
) -> None:
    """Write PREFIX.index and its data files.

    Args:
        variables: arrays, or functions that make them, by name.
        bfloat16: names of the float32 arrays to store as bfloat16.
        shards: number of data files, filled in turn.
        block_entries: entries of a block of the index.
        checksum: CRC-32C; the default suits small files.
    """
    entries, offsets = {b"": field(1, shards) + field(3, field(1, 1))}, [0] * shards
    names = [f"{prefix.name}.data-{i:05d}-of-{shards:05d}" for i in range(shards)]
    files = [prefix.with_name(name).open("wb") for name in names]
    for i, (name, value) in enumerate(variables.items()):
        value = np.asarray(value() if callable(value) else value)
        kind = "bfloat16" if name in bfloat16 else value.dtype.name
        data = np.ascontiguousarray(value)
        if kind == "bfloat16":
            data = (data.view(np.uint32) >> 16).astype(np.uint16)
        data = data.tobytes()
        shape = b"".join(field(2, field(1, size)) for size in value.shape)
        shard = i % shards
        entries[name.encode()] = entry(
            NUMBERS[kind], shape, shard, offsets[shard], len(data), masked(checksum(data))
        )
        files[shard].write(data)
        offsets[shard] += len(data)
    for file in files:
        file.close()
    prefix.with_name(prefix.name + ".index").write_bytes(table(entries, block_entries))


def entry(dtype: int, shape: bytes, shard: int, offset: int, size: int, checksum: int) -> bytes:
    """A BundleEntryProto."""
    fields = field(1, dtype) + field(2, shape) + field(3, shard) + field(4, offset) + field(5, size)
    return fields + bytes([6 << 3 | 5]) + checksum.to_bytes(4, "little")


def table(entries: dict[bytes, bytes], block_entries: int = 7) -> bytes:
    """LevelDB's table of sorted keys."""
    keys, data, handles = sorted(entries), b"", {}
    for start in range(0, len(keys), block_entries):
        chunk = keys[start : start + block_entries]
        text = block({key: entries[key] for key in chunk})
        handles[chunk[-1]] = varint(len(data)) + varint(len(text))
        data += text + trailer(text)
    footer = b""
    for text in (block({}), block(handles)):
        footer += varint(len(data)) + varint(len(text))
        data += text + trailer(text)
    return data + footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def block(entries: dict[bytes, bytes], interval: int = 3) -> bytes:
    """Prefix-compressed entries, whole keys every few of them, and where those are."""
    text, restarts, previous = b"", [], b""
    for i, (key, value) in enumerate(entries.items()):
        shared = 0
        if i % interval == 0:
            restarts.append(len(text))
        else:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        text += varint(shared) + varint(len(key) - shared) + varint(len(value))
        text += key[shared:] + value
        previous = key
    restarts = restarts or [0]
    return text + b"".join(n.to_bytes(4, "little") for n in [*restarts, len(restarts)])


def trailer(text: bytes, compression: int = 0) -> bytes:
    """What follows a block: how it is compressed, and the checksum of both."""
    kind = bytes([compression])
    return kind + masked(crc32c(text + kind)).to_bytes(4, "little")


def masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def field(number: int, value: int | bytes) -> bytes:
    """A protocol-buffer field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    parts = []
    while True:
        parts.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(parts)
