"""A shard folder as its peers store it: litdata chunks, WebDataset tars; in a process of its own.

python -m benchmarks.data_convert '{"to": "litdata", "shards": DIR, "what": "images", "out": DIR}'
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

from megaprior.data.shards import ShardSet

CHUNK_BYTES = 64 << 20
PER_TAR = 10_000


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Write `out`; what the reader of that library is to open."""
    shards, out = ShardSet.open(request["shards"]), Path(request["out"])
    get = shards.tokens if request["what"] == "tokens" else shards.image
    out.mkdir(parents=True)
    if request["to"] == "litdata":
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(out), chunk_bytes=CHUNK_BYTES)
        for i in range(len(shards)):
            sample = get(i)
            writer[i] = sample if isinstance(sample, bytes) else sample.copy()
        writer.done()
        writer.merge()
        return {"paths": [str(out)]}
    paths = []
    suffix = "tokens" if request["what"] == "tokens" else "image"
    for number, start in enumerate(range(0, len(shards), PER_TAR)):
        paths.append(str(out / f"{number:05d}.tar"))
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(start, min(start + PER_TAR, len(shards))):
                data = bytes(get(i)) if suffix == "image" else get(i).tobytes()
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return {"paths": paths}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
