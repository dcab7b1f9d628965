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
from array import array
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data.hashing import BlockHasher
from megaprior.errors import DataError
from megaprior.files import appearance, atomic_file, block_digests, disk_full_explained

__all__ = ["BlockHasher", "IndexedStream", "IndexedWriter", "suffixed", "token_dtype"]

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
_length_at, _pointer_at = struct.Struct("<i").unpack_from, struct.Struct("<q").unpack_from
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODES = {np.dtype(text): code for code, text in DTYPES.items()}
_UINT16_VOCABULARY = 65_500
_LONGEST = 2**31 - 1
_WAITING_BYTES = 1 << 18


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id surely fits (vocabulary < 65,500, as Megatron decides), else int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


def suffixed(prefix: Path, suffix: str) -> Path:
    """`prefix` + `suffix`; Path.with_suffix would eat the stream's name."""
    return prefix.with_name(prefix.name + suffix)


class IndexedWriter:
    """Write a stream sequence by sequence; the two files appear under their names in `finish`, .bin first.

    Memory: 12 bytes a sequence, and up to 256 KiB that wait: a hash and a write for each short sequence would cost more
    than all else. Used as a context manager it aborts unless `finish` was called.
    """

    def __init__(self, prefix: Path | str, dtype: Any) -> None:
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise DataError(
                f"{prefix}: dtype {self.dtype} has no code in this format; use one of {sorted(map(str, CODES))}"
            )
        self._lengths, self._pointers, self._documents = array("i"), array("q"), array("q", [0])
        self._itemsize, self._hasher = self.dtype.itemsize, BlockHasher()
        self._waiting, self._end = bytearray(), 0  # neither hashed nor written yet; where the next sequence begins
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_file(suffixed(self.prefix, ".bin")))

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        """int32 [sequences so far], in elements."""
        return np.array(self._lengths, np.int32)

    @property
    def document_count(self) -> int:
        """Documents ended so far."""
        return len(self._documents) - 1

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def add(self, sequence: Any, *, alias: int | None = None) -> int:
        """Append a 1-D sequence (or bytes, for u8) and return its index; with `alias`, share that earlier one's bytes.

        Raises:
            DataError: a value does not fit the stream's dtype, the sequence is not 1-D, or the disk is full.
        """
        if alias is not None:
            self._lengths.append(self._lengths[alias])
            self._pointers.append(self._pointers[alias])
            return len(self) - 1
        if type(sequence) is bytes and self._itemsize == 1 and len(sequence) <= _LONGEST:
            return self.append(sequence, len(sequence))
        data = np.ascontiguousarray(self._cast(sequence))
        return self.append(data.data, data.size)

    def append(self, data: Any, length: int) -> int:
        """`add` of what is known to fit: `length` elements, whose buffer is what goes to disk; raises for a full disk."""
        size = length * self._itemsize
        if len(self._waiting) + size <= _WAITING_BYTES:
            self._waiting += memoryview(data)  # numpy would take += for its own
        else:
            self._write_waiting()
            self._write(data)
        self._lengths.append(length)
        self._pointers.append(self._end)
        self._end += size
        return len(self._lengths) - 1

    def _write_waiting(self) -> None:
        self._write(self._waiting)
        self._waiting = bytearray()

    def _write(self, data: Any) -> None:
        with disk_full_explained(self.prefix, memoryview(data).nbytes):
            self._file.write(data)
        self._hasher.update(data)

    def _cast(self, sequence: Any) -> np.ndarray:
        if isinstance(sequence, bytes | bytearray | memoryview):
            sequence = np.frombuffer(sequence, np.uint8)
        data = np.asarray(sequence)
        where = f"{self.prefix} sequence {len(self)}"
        if data.ndim != 1 or data.size > _LONGEST:
            raise DataError(f"{where}: shape {data.shape}, expected one dimension of at most {_LONGEST:,}")
        if data.size and data.dtype.kind not in ("iu" if self.dtype.kind in "iu" else "iuf"):
            raise DataError(f"{where}: {data.dtype} values in a stream of {self.dtype.name}")
        if data.size and data.dtype != self.dtype and self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            if data.min() < limits.min or data.max() > limits.max:
                raise DataError(f"{where}: values {data.min()} to {data.max()} do not fit {self.dtype.name}")
        return data.astype(self.dtype, copy=False)

    def end_document(self) -> None:
        """The sequences added since the last call form one document."""
        self._documents.append(len(self._lengths))

    def finish(self) -> dict[str, Any]:
        """Commit both files and return the stream's entry in a manifest."""
        if self._documents[-1] != len(self):
            self.end_document()
        self._write_waiting()
        self._stack.close()
        index = suffixed(self.prefix, ".idx")
        with atomic_file(index) as file:
            file.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], len(self), len(self._documents)))
            for values, dtype in ((self._lengths, "<i4"), (self._pointers, "<i8"), (self._documents, "<i8")):
                file.write(np.asarray(values).astype(dtype, copy=False).data)
        return {
            "dtype": self.dtype.name,
            "sequences": len(self),
            "bin": {"bytes": self._hasher.bytes, "blocks": self._hasher.blocks()},
            "idx": {"bytes": index.stat().st_size, "blocks": block_digests(index)},
        }

    def abort(self) -> None:
        """Remove the temporary file; nothing appears. Harmless after `finish`."""

        class Aborted(Exception):
            pass

        with suppress(Aborted, DataError), self._stack:  # a full disk may refuse even the flush of what is thrown away
            raise Aborted


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
