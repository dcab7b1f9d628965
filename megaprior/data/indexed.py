"""One stream of sequences on disk: Megatron-core's IndexedDataset, version 1, byte for byte.

`<prefix>.bin` holds the sequences one after another; `<prefix>.idx` says where each begins. All little-endian:

    0   9s  "MMIDIDX\\0\\0"        18  u64  N sequences            34       N x i32  lengths, in elements
    9   u64 version = 1            26  u64  D = documents + 1      34+4N    N x i64  pointers, in bytes
    17  u8  dtype code                                             34+12N   D x i64  document indices, 0 .. N

Letters: N sequences, D document boundaries.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.errors import DataError
from megaprior.files import appearance

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
_length_at, _pointer_at = struct.Struct("<i").unpack_from, struct.Struct("<q").unpack_from
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODES = {np.dtype(text): code for code, text in DTYPES.items()}
_UINT16_VOCABULARY = 65_500


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id surely fits (vocabulary < 65,500, as Megatron decides), else int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


def suffixed(prefix: Path, suffix: str) -> Path:
    """`prefix` + `suffix`; Path.with_suffix would eat the stream's name."""
    return prefix.with_name(prefix.name + suffix)


class IndexedStream:
    """Read a stream. Opening looks at sizes and the 34-byte header only; the files are mapped at first use.

    Sizes are checked before anything is mapped: touching a mapped file beyond its end is SIGBUS, which nothing can catch.

    Args:
        expect: the stream's entry in its manifest; without it the index alone says how long the .bin must be.

    Raises:
        DataError: a file is missing, foreign, of another version or dtype, shorter or longer than it must be.
    """

    def __init__(self, prefix: Path | str, *, expect: dict[str, Any] | None = None) -> None:
        self.prefix = Path(prefix)
        self.bin, self.idx = suffixed(self.prefix, ".bin"), suffixed(self.prefix, ".idx")
        for path, entry in ((self.bin, "bin"), (self.idx, "idx")):
            if not path.is_file():
                raise DataError(f"{path}: missing; copy it again or rebuild the shard")
            if expect is not None:
                _check_size(path, expect[entry]["bytes"], "the manifest")
        self.dtype, self._count, self._boundaries = _read_header(self.idx)
        _check_size(self.idx, HEADER.size + 12 * self._count + 8 * self._boundaries, "its header")
        self._index: mmap.mmap | None = None
        self._data: mmap.mmap | None = None
        self._pointers_at = HEADER.size + 4 * self._count
        self._bytes, self._itemsize = self.bin.stat().st_size, self.dtype.itemsize
        if expect is None:
            ends = self.pointers + self.lengths.astype(np.int64) * self.dtype.itemsize
            _check_size(self.bin, int(ends.max(initial=0)), "its index")
        elif (self.dtype.name, self._count) != (expect["dtype"], expect["sequences"]):
            raise DataError(
                f"{self.idx}: {self._count:,} sequences of {self.dtype.name}, the manifest says {expect['sequences']:,} "
                f"of {expect['dtype']}; rebuild the shard"
            )

    def __len__(self) -> int:
        return self._count

    def _mapped_index(self) -> mmap.mmap:
        index = self._index  # a local: another thread may close the stream meanwhile
        if index is None:
            index = self._index = _map(self.idx, HEADER.size + 12 * self._count + 8 * self._boundaries)
        return index

    def _section(self, dtype: str, count: int, offset: int) -> np.ndarray:
        return np.frombuffer(self._mapped_index(), dtype, count, offset)

    @property
    def lengths(self) -> np.ndarray:
        """int32 [N], in elements; a read-only view of the mapped index."""
        return self._section("<i4", self._count, HEADER.size)

    @property
    def pointers(self) -> np.ndarray:
        """int64 [N], in bytes from the start of the .bin; equal pointers share their bytes."""
        return self._section("<i8", self._count, self._pointers_at)

    @property
    def documents(self) -> np.ndarray:
        """int64 [D], the first sequence of each document, then N."""
        return self._section("<i8", self._boundaries, HEADER.size + 12 * self._count)

    def __getitem__(self, index: int) -> np.ndarray:
        """Sequence `index` as a read-only view, in the stream's dtype.

        Raises:
            IndexError: index is outside [0, N).
            DataError: the index points outside the .bin: it was changed after it was written.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"{self.prefix}: sequence {index} of {self._count}")
        table = self._index or self._mapped_index()
        (length,) = _length_at(table, HEADER.size + 4 * index)  # half the time of a numpy scalar
        (pointer,) = _pointer_at(table, self._pointers_at + 8 * index)
        if length < 0 or pointer < 0 or pointer + length * self._itemsize > self._bytes:
            raise DataError(
                f"{self.idx}: sequence {index} claims {length:,} elements at byte {pointer:,} of {self._bytes:,}; "
                "run `megaprior-data verify` and rebuild the shard"
            )
        data = self._data  # a local, as in _mapped_index
        return np.frombuffer(data, self.dtype, length, pointer) if data and length else self._view(length, pointer)

    def flat(self) -> np.ndarray:
        """The whole .bin as one read-only view: right for streams without aliases, whose sequences touch."""
        return self._view(self._bytes // self.dtype.itemsize, 0)

    def _view(self, length: int, pointer: int) -> np.ndarray:
        if length == 0:
            return np.empty(0, self.dtype)  # an empty file cannot be mapped
        data = self._data
        if data is None:
            data = self._data = _map(self.bin, self._bytes)
        return np.frombuffer(data, self.dtype, length, pointer)

    def close(self) -> None:
        """Drop the mappings; views that are still held keep theirs, and the next access maps again."""
        self._index = self._data = None


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """(dtype, N, D) of an .idx, or a DataError that says what the file looks like instead."""
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{path}: not a Megatron index{appearance(path)}; copy it again or rebuild the shard")
    _, version, code, count, boundaries = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise DataError(
            f"{path}: version {version}, dtype code {code}; this program reads version 1, codes 1 to 8; rebuild it"
        )
    return np.dtype(DTYPES[code]), count, boundaries


def _check_size(path: Path, expected: int, source: str) -> None:
    found = path.stat().st_size
    if found != expected:
        raise DataError(
            f"{path}: {found:,} bytes, {source} says {expected:,}{appearance(path)}; copy it again or rebuild the shard"
        )


def _map(path: Path, expected: int) -> mmap.mmap:
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != expected:
            raise DataError(f"{path}: {found:,} bytes, {expected:,} when it was opened; it was replaced, open it again")
        return mmap.mmap(file.fileno(), expected, access=mmap.ACCESS_READ)
