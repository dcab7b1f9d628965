"""A process that holds one data set open through one library and reads samples of it when asked; see data_access.py.

    python data_reader.py '{"kind": "megatron", "what": "tokens", "paths": [...]}'

One JSON line in: {"indices": FILE.npy or null, "count": n}. One out: seconds, and where "digest" is asked for the digest
of everything read. Token rows must come as arrays and images as bytes; of each row one element is looked at.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Get = Callable[[int], Any]


def _located(parts: list[Any]) -> Get:
    """Sample i of data sets one after another."""
    if len(parts) == 1:
        return parts[0].__getitem__
    ends = np.cumsum([len(part) for part in parts]).tolist()
    starts = [0, *ends]

    def get(index: int) -> Any:
        at = bisect_right(ends, index)
        return parts[at][index - starts[at]]

    return get


def _shardset(paths: list[str], what: str) -> tuple[int, Get]:
    from megaprior.data.shards import ShardSet

    shards = ShardSet.open(paths[0])
    return len(shards), shards.tokens if what == "tokens" else shards.image


def _stream(paths: list[str], what: str) -> tuple[int, Get]:
    from megaprior.data.indexed import IndexedStream

    parts = [IndexedStream(path) for path in paths]
    get = _located(parts)
    return sum(map(len, parts)), get if what == "tokens" else lambda i: get(i).tobytes()


def _megatron(paths: list[str], what: str) -> tuple[int, Get]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    parts = [IndexedDataset(path) for path in paths]
    get = _located(parts)
    return sum(map(len, parts)), get if what == "tokens" else lambda i: get(i).tobytes()


def _litdata(paths: list[str], what: str) -> tuple[int, Get]:
    from litdata import StreamingDataset

    data = StreamingDataset(paths[0])
    # It gives images as views of its chunk, which the others have to copy out.
    return len(data), data.__getitem__ if what == "tokens" else lambda i: bytes(data[i])


def _webdataset(paths: list[str], what: str) -> Iterator[Any]:
    import webdataset

    for sample in webdataset.WebDataset(paths, shardshuffle=False):
        yield np.frombuffer(sample["tokens"], np.uint16) if what == "tokens" else sample["image"]


RANDOM = {"shardset": _shardset, "stream": _stream, "megatron": _megatron, "litdata": _litdata}


def consume(samples: Iterable[Any]) -> tuple[int, int]:
    """(samples, a sum over one element of each)."""
    count = seen = 0
    for sample in samples:
        count += 1
        seen += int(sample[-1])
    return count, seen


def digest(samples: Iterable[Any]) -> str:
    """Of lengths and content."""
    found = hashlib.sha256()
    for sample in samples:
        data = sample if isinstance(sample, bytes) else np.asarray(sample).astype("<u2").tobytes()
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()


def main(arguments: dict[str, Any]) -> None:
    """Answer questions until the input ends."""
    kind, what, paths = arguments["kind"], arguments["what"], arguments["paths"]
    count, get = RANDOM[kind](paths, what) if kind in RANDOM else (None, None)
    print(json.dumps({"samples": count}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        indices = np.load(question["indices"]).tolist() if question.get("indices") else None
        samples = map(get, indices) if get is not None else _webdataset(paths, what)
        if question.get("digest"):
            print(json.dumps({"digest": digest(samples)}), flush=True)
            continue
        cpu, wall = time.process_time(), time.perf_counter()
        done, _ = consume(samples)
        spent = {"amount": done, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        print(json.dumps(spent), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
