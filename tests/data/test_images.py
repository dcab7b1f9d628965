"""Strange images: each is decoded right or refused with a reason, and a bomb costs nothing."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from megaprior.data.images import ImageError, check_image, decode_rgb, patchify, probe_size, target_size
from megaprior.errors import DataError, UsageError

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# ---------------------------------------------------------------- sizes and patches


@pytest.mark.parametrize(
    ("size", "patch", "limit", "expected"),
    [
        ((640, 480), 32, 1024, (640, 480)),
        ((641, 480), 32, 1024, (672, 512)),  # long' = 672, short' = c(503.2)
        ((1600, 1200), 32, 1024, (1024, 768)),
        ((1200, 1600), 32, 1024, (768, 1024)),
        ((1000, 1), 32, 1024, (1024, 32)),
        ((1, 5000), 32, 1024, (32, 1024)),
        ((1, 1), 32, 1024, (32, 32)),
        ((64, 64), 16, 64, (64, 64)),
        ((65, 64), 16, 64, (64, 64)),  # short' = c(63.01)
        ((3000, 1001), 32, 1024, (1024, 352)),  # short' = c(341.67)
    ],
)
def test_target_size(size: tuple[int, int], patch: int, limit: int, expected: tuple[int, int]) -> None:
    assert target_size(*size, patch=patch, limit=limit) == expected


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([8, 14, 16, 32]), st.integers(1, 40))
def test_target_size_is_the_formula(width: int, height: int, patch: int, patches: int) -> None:
    def c(x: Fraction | int) -> int:
        return ceil(Fraction(x, patch)) * patch

    limit = patch * patches
    long, short = max(width, height), min(width, height)
    long_to = min(limit, c(long))
    short_to = c(Fraction(short * long_to, long))
    assert sorted(target_size(width, height, patch=patch, limit=limit)) == sorted((long_to, short_to))
    turned = target_size(height, width, patch=patch, limit=limit)
    assert turned[::-1] == target_size(width, height, patch=patch, limit=limit)


def test_a_limit_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(UsageError, match="limit 1000 is not a multiple of patch 32; choose 992"):
        target_size(10, 10, patch=32, limit=1000)


def test_patches_go_row_by_row_and_hold_height_width_channel() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    patches = patchify(Image.fromarray(pixels), patch=2, size=(6, 4))
    assert (patches.shape, patches.dtype) == ((6, 12), np.uint8)
    assert patches[0].tolist() == [0, 1, 2, 3, 4, 5, 18, 19, 20, 21, 22, 23]
    assert patches[2].tolist() == pixels[0:2, 4:6].reshape(-1).tolist()
    assert patches[3].tolist() == pixels[2:4, 0:2].reshape(-1).tolist()


def test_an_image_of_another_size_is_resized_first() -> None:
    flat = Image.new("RGB", (50, 31), (10, 200, 30))
    patches = patchify(flat, patch=16, size=(48, 32))
    assert patches.shape == (6, 768)
    assert (patches.reshape(-1, 3) == (10, 200, 30)).all()


# ---------------------------------------------------------------- what is decoded


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP", "GIF", "BMP"])
def test_every_format_is_read_by_its_content(format: str) -> None:
    data = encoded(Image.fromarray(NOISE), format)
    with Image.open(io.BytesIO(data)) as expected:
        pixels = np.asarray(expected.convert("RGB"))
    assert probe_size(data) == check_image(data) == (30, 20)
    decoded = decode_rgb(data)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), pixels)


# What each EXIF orientation asks for, as an operation on rows and columns (Exif 2.32, tag 274).
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "WebP", "JPEG"])
def test_exif_rotation_is_applied_to_size_and_pixels(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WebP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    data = encoded(Image.fromarray(NOISE), format, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as plain:
        expected = TURNS[orientation](np.asarray(plain))
    assert probe_size(data) == (expected.shape[1], expected.shape[0])
    assert check_image(data) == probe_size(data)
    assert np.array_equal(np.asarray(decode_rgb(data)), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_spoil_the_picture() -> None:
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff")
    assert probe_size(data) == check_image(data) == (30, 20)


def test_the_size_is_known_without_the_pixels() -> None:
    data = encoded(Image.fromarray(np.tile(NOISE, (20, 20, 1))), "JPEG")
    assert probe_size(data[: len(data) // 2]) == (600, 400)


def test_transparent_pixels_lie_over_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]
    expected = [[200, 0, 0], [255, 255, 255], [204, 204, 204]]  # 255 * (1 - 51 / 255)
    for format, options in (("PNG", {}), ("WebP", {"lossless": True, "exact": True})):
        assert np.asarray(decode_rgb(encoded(Image.fromarray(rgba), format, **options)))[0].tolist() == expected
    grey = Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA")
    assert np.asarray(decode_rgb(encoded(grey, "PNG")))[0].tolist() == [[100] * 3, [255] * 3]


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    colours = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert np.asarray(decode_rgb(encoded(image, "PNG")))[0].tolist() == colours
    assert np.asarray(decode_rgb(encoded(image, "GIF")))[0].tolist() == colours
    for format in ("PNG", "GIF"):
        data = encoded(image, format, transparency=1)
        assert np.asarray(decode_rgb(data))[0].tolist() == [colours[0], [255, 255, 255], colours[2]]
    rgb = encoded(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), "PNG", transparency=(4, 5, 6))
    assert np.asarray(decode_rgb(rgb))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_sixteen_bits_keep_the_upper_eight() -> None:
    levels = np.array([[0, 255, 256, 32_768, 65_535]], np.uint16)
    data = encoded(Image.fromarray(levels), "PNG")
    assert data[24] == 16  # bits a sample
    assert np.asarray(decode_rgb(data))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    rows = b"\0" + struct.pack(">6H", 0, 256, 65_535, 32_768, 255, 512)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    colour = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.asarray(decode_rgb(colour))[0].tolist() == [[0, 1, 255], [128, 0, 2]]


def test_cmyk_and_grey_and_one_bit() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(np.asarray(decode_rgb(encoded(cmyk, "JPEG")))[0, 0].astype(int) - (255, 0, 0)).max() <= 3
    grey = Image.fromarray(np.full((8, 8), 77, np.uint8))
    assert (np.asarray(decode_rgb(encoded(grey, "JPEG"))) == 77).all()
    black_white = Image.fromarray(np.array([[False, True]]))
    assert np.asarray(decode_rgb(encoded(black_white, "PNG")))[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("format", ["GIF", "WebP", "PNG"])
def test_the_first_frame_stands_for_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if format == "WebP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as animation:
        assert animation.n_frames == 3
    assert check_image(data) == (9, 7)
    assert (np.asarray(decode_rgb(data)) == (250, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_lines_and_points_are_pictures(size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size, (1, 2, 3)), "PNG")
    assert probe_size(data) == check_image(data) == size
    target = target_size(*size, patch=32, limit=1024)
    assert patchify(decode_rgb(data), patch=32, size=target).shape == (target[0] * target[1] // 1024, 3072)


def test_real_photographs_are_read_as_pillow_reads_them(shared: Callable[[str], Path]) -> None:
    for path in sorted(shared("coco_cc_by").glob("images/*.jpg"))[:12]:
        data = path.read_bytes()
        with Image.open(path) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        assert probe_size(data) == expected.size
        assert np.array_equal(np.asarray(decode_rgb(data)), np.asarray(expected))
        for kept in (len(data) // 2, len(data) - len(data) // 20):
            with pytest.raises(ImageError, match="truncated"):
                check_image(data[:kept])


# ---------------------------------------------------------------- reduced decoding


def photograph(shared: Callable[[str], Path], columns: int, rows: int) -> Image.Image:
    """Real photographs side by side: their edges are as sharp as those of one large photograph."""
    paths = sorted(shared("coco_cc_by").glob("images/*.jpg"))
    picture = Image.new("RGB", (columns * 180, rows * 160))
    for number in range(columns * rows):
        with Image.open(paths[number % len(paths)]) as tile:
            picture.paste(tile.convert("RGB").crop((0, 0, 180, 160)), (number % columns * 180, number // columns * 160))
    return picture


@pytest.mark.parametrize(
    ("thumbnail", "scale"),
    [((60, 40), 8), ((61, 40), 4), ((120, 80), 4), ((180, 120), 2), ((240, 160), 2), ((241, 160), 1), ((1440, 960), 1)],
)
def test_a_thumbnail_is_decoded_from_fewer_frequencies(
    shared: Callable[[str], Path], thumbnail: tuple[int, int], scale: int
) -> None:
    data = encoded(photograph(shared, 8, 6), "JPEG", quality=90)
    full, reduced = decode_rgb(data), decode_rgb(data, thumbnail=thumbnail)
    assert (full.size, reduced.size) == ((1440, 960), (1440 // scale, 960 // scale))
    assert np.array_equal(np.asarray(decode_rgb(data, thumbnail=thumbnail)), np.asarray(reduced))
    one, two = (np.asarray(picture.resize(thumbnail, Image.Resampling.BICUBIC), int) for picture in (full, reduced))
    difference = np.abs(one - two)
    # Worst of 36 (photographs, subsampling, quality, progressive or not, scale): mean 0.736, 99.9% within 4, all within 8.
    assert difference.mean() < 0.8
    assert np.quantile(difference, 0.999) <= 4
    assert difference.max() <= 10
    assert (difference.max() > 0) == (scale > 1)


def test_a_thumbnail_is_of_the_turned_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (1600, 400)), "JPEG", exif=exif)
    assert decode_rgb(data, thumbnail=(33, 130)).size == (100, 400)  # 400 x 1600 upright, a quarter of it
    assert decode_rgb(data, thumbnail=(130, 33)).size == (400, 1600)


@pytest.mark.parametrize("format", ["PNG", "WebP", "GIF", "BMP"])
def test_only_jpeg_has_thumbnails(format: str) -> None:
    data = encoded(Image.fromarray(np.tile(NOISE, (8, 8, 1))), format)
    assert np.array_equal(np.asarray(decode_rgb(data, thumbnail=(2, 2))), np.asarray(decode_rgb(data)))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_a_thumbnail_is_rgb_whatever_the_mode(mode: str) -> None:
    colour = {"L": 77, "CMYK": (0, 255, 255, 0), "RGB": (10, 200, 30)}[mode]
    data = encoded(Image.new(mode, (640, 640), colour), "JPEG")
    small = decode_rgb(data, thumbnail=(20, 20))
    assert (small.mode, small.size) == ("RGB", (80, 80))
    assert decode_rgb(data, thumbnail=(27, 27)).size == (160, 160)  # 80 would be under three thumbnails
    assert np.asarray(small)[40, 40].tolist() == np.asarray(decode_rgb(data))[320, 320].tolist()


def test_checking_refuses_what_decoding_refuses(shared: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(3)
    verdicts = set()
    for progressive in (False, True):
        data = encoded(photograph(shared, 2, 2), "JPEG", progressive=progressive)
        assert check_image(data) == (360, 320)
        for _ in range(100):
            spoilt = np.frombuffer(data, np.uint8).copy()
            spoilt[rng.integers(2, len(spoilt), 4)] = rng.integers(0, 256, 4)
            raw = spoilt[: len(spoilt) if rng.random() < 0.5 else rng.integers(2, len(spoilt))].tobytes()
            found: list[object] = []
            for use in (check_image, lambda raw: decode_rgb(raw).size):
                try:
                    found.append(use(raw))
                except ImageError as error:
                    found.append(error.reason)
            assert found[0] == found[1]
            verdicts.add(found[0])
    assert {(360, 320), "truncated"} <= verdicts


# ---------------------------------------------------------------- what is refused

PHOTO = encoded(Image.fromarray(np.tile(NOISE, (8, 8, 1))), "JPEG")
REFUSED = {
    "empty": [b""],
    "html": [b"<!DOCTYPE html><html><body>404</body></html>", b"\n<html>", b"<?xml version='1.0'?><html/>"],
    "svg": [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<?xml version='1.0'?>\n<!-- x -->\n<svg width='1'/>"],
    "eps": [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", encoded(Image.new("RGB", (2, 2)), "EPS")],
    "tiff": [encoded(Image.new("RGB", (2, 2)), "TIFF"), b"MM\0*\0\0\0\x08"],
    "pdf": [b"%PDF-1.7\n"],
    "gzip": [b"\x1f\x8b\x08\0"],
    "git-lfs": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
    "json": [b'{"error": "not found"}'],
    "heif": [b"\0\0\0\x1cftypavif\0\0\0\0"],
    "unknown": [b"hello", bytes(100), b"\x7fELF"],
    "truncated": [PHOTO[: len(PHOTO) // 2], PHOTO[:-40], encoded(Image.fromarray(NOISE), "BMP")[:500]],
    "undecodable": [PHOTO[:3], b"\x89PNG\r\n\x1a\nrubbish", b"GIF89a", b"RIFF\x24\0\0\0WEBPVP8 " + bytes(24)],
}


@pytest.mark.parametrize(("reason", "data"), [(reason, data) for reason, cases in REFUSED.items() for data in cases])
def test_what_is_no_whole_picture_is_refused_with_a_reason(reason: str, data: bytes) -> None:
    with pytest.raises(ImageError, match=f"^{reason}: ") as refused:
        check_image(data)
    assert refused.value.reason == reason
    assert isinstance(refused.value, DataError)
    assert f"{len(data):,} bytes" in str(refused.value) or reason in ("empty", "undecodable")


def test_rubbish_raises_nothing_but_image_errors() -> None:
    """Every file of the formats above with bytes changed here and there."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(NOISE)
    reasons = set()
    for data in [encoded(image, format) for format in ("JPEG", "PNG", "WebP", "GIF", "BMP")]:
        for _ in range(40):
            spoilt = np.frombuffer(data, np.uint8).copy()
            spoilt[rng.integers(8, len(spoilt), 6)] = rng.integers(0, 256, 6)
            raw = spoilt[: rng.integers(9, len(spoilt) + 1)].tobytes()
            try:
                size = check_image(raw)
            except ImageError as error:
                reasons.add(error.reason)
            else:
                assert size == probe_size(raw)
    assert {"truncated", "undecodable"} <= reasons <= {"truncated", "undecodable", "bomb", "unknown"}


def bombs() -> dict[str, bytes]:
    """Small files that claim 400 million pixels or more; the PNG holds them."""
    side = 20_000
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(10 * (1 + side // 8))) for _ in range(side // 10)) + packer.flush()
    jpeg = bytearray(encoded(Image.new("L", (8, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    gif = bytearray(encoded(Image.new("L", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    canvas = (16_777_215).to_bytes(3, "little") + (255).to_bytes(3, "little")
    return {
        "png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""),
        "jpeg": bytes(jpeg),
        "gif": bytes(gif),
        "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
        "webp extended": b"RIFF\x2a\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + canvas + b"ANIM" + bytes(10),
        "webp lossless": b"RIFF\x2a\0\0\0WEBPVP8L\x0a\0\0\0\x2f\xff\xff\xff\x0f" + bytes(20),
        "webp lossy": b"RIFF\x2a\0\0\0WEBPVP8 \x0a\0\0\0\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(20),
    }


_BOUNDED = """
import json, sys
from pathlib import Path
from megaprior.data.images import ImageError, check_image, probe_size
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
# Not ru_maxrss, which begins with what the parent process held.
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
before, reasons = peak(), {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    for use in (probe_size, check_image):
        try:
            use(path.read_bytes())
        except ImageError as error:
            reasons.setdefault(path.name, []).append(error.reason)
print(json.dumps({"mib": peak() - before, "reasons": reasons}))
"""


def test_a_decompression_bomb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    files = bombs()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert len(data) < 1 << 20
    command = [sys.executable, "-W", "error", "-c", _BOUNDED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    told = json.loads(done.stdout)
    assert told["reasons"] == {name: ["bomb", "bomb"] for name in files}
    assert told["mib"] < 32
    assert done.stderr == ""


def test_a_large_picture_below_the_limit_is_read_without_a_warning() -> None:
    data = encoded(Image.new("1", (8192, 8192)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe_size(data) == (8192, 8192)
    with pytest.raises(ImageError, match="8192 x 8193 = 67,117,056 pixels, at most 67,108,864 are decoded"):
        probe_size(encoded(Image.new("1", (8192, 8193)), "PNG"))
