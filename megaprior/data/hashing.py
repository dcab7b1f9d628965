"""Digests of a file's blocks while it is written."""

from __future__ import annotations

from typing import Any

import xxhash

from megaprior.files import BLOCK_BYTES


class BlockHasher:
    """xxh3-128 of each 64 MiB block of what is written, without reading it again."""

    def __init__(self) -> None:
        self.bytes, self._done, self._hash = 0, [], xxhash.xxh3_128()

    def update(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: BLOCK_BYTES - self.bytes % BLOCK_BYTES]
            self._hash.update(part)
            self.bytes += len(part)
            view = view[len(part) :]
            if self.bytes % BLOCK_BYTES == 0:
                self._done.append(self._hash.hexdigest())
                self._hash = xxhash.xxh3_128()

    def blocks(self) -> list[str]:
        """Digests so far, the unfinished block included; the same as `files.block_digests` of the file."""
        return [*self._done, self._hash.hexdigest()] if self.bytes % BLOCK_BYTES else list(self._done)
