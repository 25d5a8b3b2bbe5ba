"""CRC-32C (Castagnoli; RFC 3720, section 12.1) of large arrays, in NumPy.

TensorFlow stores this checksum for every tensor and every block of its tables. A loop over bytes
would take minutes for gigabytes. A CRC is linear over GF(2), so the words of a buffer may be summed
(xor) in any order, once each is advanced past the bytes that follow it. Advancing a 32-bit state by
a fixed number of zero bytes is a 32 x 32 bit matrix, applied here through two tables of 2^16.
"""

from functools import cache

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reflected
_LANES = 2**14  # words that advance together; 64 KB stay in the processor's cache


def crc32c(data: bytes | np.ndarray) -> int:
    """The CRC-32C of bytes, or of a C-contiguous array's bytes, as an unsigned 32-bit number."""
    data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1)
    data = data.view(np.uint8)
    # The words begin after the bytes that do not fill one; those are few enough for a loop.
    odd = data.size % 4
    state = 0xFFFFFFFF
    for byte in data[:odd].tolist():
        state = int(_BYTE_TABLE[(state ^ byte) & 0xFF]) ^ (state >> 8)
    words = data[odd:].view("<u4")
    if words.size:
        state = _advance_words(words, state)
    return state ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | np.ndarray) -> int:
    """The CRC as TensorFlow and LevelDB store it: rotated, plus a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _advance_words(words: np.ndarray, state: int) -> int:
    """The state after reading little-endian words (n,), n >= 1, from `state` on.

    The words are rows of `lanes` columns. Each column is summed on its own, advancing past a whole
    row each time; the columns are then joined, the left half advanced past the right half.
    """
    lanes = min(_LANES, 1 << (words.size - 1).bit_length())
    head = words.size % lanes or lanes
    sums = np.zeros(lanes, np.uint32)  # zeros before the first word leave a zero state as it is
    sums[lanes - head :] = words[:head]
    sums[lanes - head] ^= np.uint32(state)
    for start in range(head, words.size, lanes):
        sums = _advance(sums, 4 * lanes)
        sums ^= words[start : start + lanes]
    while sums.size > 1:
        half = sums.size // 2
        sums = _advance(sums[:half], 4 * half) ^ sums[half:]
    return int(_advance(sums, 4)[0])


def _advance(states: np.ndarray, count: int) -> np.ndarray:
    """Each state (n,) of uint32 after `count` zero bytes."""
    low, high = _tables(count)
    return low.take(states & np.uint32(0xFFFF)) ^ high.take(states >> np.uint32(16))


@cache
def _tables(count: int) -> tuple[np.ndarray, np.ndarray]:
    """What each lower and each upper half of a state becomes after `count` (2^n) zero bytes.

    Each is the xor of some of the matrix's columns, the images of the single bits.
    """
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if count == 1:
        columns = _BYTE_TABLE[bits & 0xFF] ^ (bits >> 8)
    else:
        columns = _advance(_advance(bits, count // 2), count // 2)
    tables = []
    for part in (columns[:16], columns[16:]):
        table = np.zeros(1, np.uint32)
        for column in part:
            table = np.concatenate([table, table ^ column])
        tables.append(table)
    return tables[0], tables[1]


def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ (np.uint32(_POLYNOMIAL) * (table & 1))
    return table


_BYTE_TABLE = _byte_table()
