"""Write a stream of sequences: the two files of `megaprior.data.indexed`, which has their layout."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.data.hashing import BlockHasher
from megaprior.data.indexed import CODES, HEADER, MAGIC, suffixed
from megaprior.errors import DataError
from megaprior.files import atomic_file, block_digests, disk_full_explained

_LONGEST = 2**31 - 1
_WAITING_BYTES = 1 << 18


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
        self._take(data, size := length * self._itemsize)
        self._lengths.append(length)
        self._pointers.append(self._end)
        self._end += size
        return len(self._lengths) - 1

    def append_documents(self, data: Any, lengths: Sequence[int]) -> None:
        """`append` and `end_document` of several sequences whose elements lie one after the other in `data`."""
        ends = list(accumulate((length * self._itemsize for length in lengths), initial=self._end))
        self._take(data, ends[-1] - self._end)
        self._documents.extend(range(len(self._lengths) + 1, len(self._lengths) + len(lengths) + 1))
        self._lengths.extend(lengths)
        self._pointers.extend(ends[:-1])
        self._end = ends[-1]

    def _take(self, data: Any, size: int) -> None:
        if len(self._waiting) + size <= _WAITING_BYTES:
            self._waiting += memoryview(data)  # numpy would take += for its own
        else:
            self._write_waiting()
            self._write(data)

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
