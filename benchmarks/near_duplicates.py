"""How often copies of a photograph are found to look alike, and how often different photographs are.

    python -m benchmarks.near_duplicates photos/*.tar --copied 600

Reads WebDataset tars, hashes every photograph as `megaprior-data split` does, compares all pairs, and makes copies of some as the
web makes them. Writes a table to standard output.
"""

from __future__ import annotations

import argparse
import io
import random
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from megaprior.data_tools.sets.nearness import FINE_MARGIN, near_labels, picture_hashes

BITS = (4, 6, 8)


def copies(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """What happens to pictures on their way through the web."""
    width, height = image.size
    smooth = Image.Resampling.BICUBIC
    yield "JPEG quality 40", _encoded(image, quality=40)
    yield "JPEG quality 15", _encoded(image, quality=15)
    yield "WebP quality 50", _encoded(image, "WEBP", 50)
    yield "half the size", _encoded(image.resize((width // 2, height // 2), Image.Resampling.LANCZOS))
    yield "1.7 times the size", _encoded(image.resize((int(width * 1.7), int(height * 1.7)), smooth))
    yield "long side 256, quality 90", _encoded(_longest(image, 256), quality=90)
    yield "long side 96, quality 60", _encoded(_longest(image, 96), quality=60)
    yield "squeezed to 256 x 256", _encoded(image.resize((256, 256), smooth))
    yield "25% brighter", _encoded(ImageEnhance.Brightness(image).enhance(1.25))
    yield "25% darker", _encoded(ImageEnhance.Brightness(image).enhance(0.75))
    yield "30% more contrast", _encoded(ImageEnhance.Contrast(image).enhance(1.3))
    yield "grey", _encoded(image.convert("L"))
    for percent in (2, 5):
        x, y = width * percent // 200, height * percent // 200
        yield f"{percent}% cropped", _encoded(image.crop((x, y, width - x, height - y)))


def _encoded(image: Image.Image, format: str = "JPEG", quality: int = 85) -> bytes:
    file = io.BytesIO()
    image.save(file, format, quality=quality)
    return file.getvalue()


def _longest(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", type=Path, nargs="+", metavar="TAR")
    parser.add_argument("--copied", type=int, default=600, metavar="N", help="photographs that are copied")
    options = parser.parse_args()
    photos = list(_photos(options.tars))
    start = time.process_time()
    found = [picture_hashes(photo) for photo in photos]
    took = (time.process_time() - start) / len(photos)
    hashes = np.array([pair for pair in found if pair is not None], np.uint64)
    pairs = len(hashes) * (len(hashes) - 1) // 2
    print(
        f"# Pictures that look alike\n\n`python -m benchmarks.near_duplicates ... --copied {options.copied}` on "
        f"{len(photos):,} photographs; hashing takes {took * 1000:.2f} ms of one core each.\n"
    )
    print("| | " + " | ".join(f"D = {bits}" for bits in BITS) + " |\n|---" + "|---" * len(BITS) + "|")
    joined = [len(hashes) - len(np.unique(near_labels(hashes[:, 0], hashes[:, 1], bits))) for bits in BITS]
    print(f"| different photographs joined, of {pairs:,} pairs | " + " | ".join(map(str, joined)) + " |")
    rates: dict[str, list[list[int]]] = {}
    places = [place for place, pair in enumerate(found) if pair is not None]
    for place in random.Random(1).sample(places, min(options.copied, len(places))):
        for name, copy in copies(Image.open(io.BytesIO(photos[place])).convert("RGB")):
            rates.setdefault(name, []).append(_apart(found[place], picture_hashes(copy)))
    for name, rows in rates.items():
        coarse, fine = np.array(rows).T
        shares = [((coarse <= bits) & (fine <= bits + FINE_MARGIN)).mean() for bits in BITS]
        print(f"| {name}, found | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return 0


def _photos(tars: list[Path]) -> Iterator[bytes]:
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith((".jpg", ".png", ".webp")) else None
                if file is not None:
                    yield file.read()


def _apart(one: tuple[int, int] | None, other: tuple[int, int] | None) -> list[int]:
    if one is None or other is None:
        return [64, 64]
    return [(a ^ b).bit_count() for a, b in zip(one, other, strict=True)]


if __name__ == "__main__":
    raise SystemExit(main())
