"""The image that a record holds or names: bytes, base64, or a file in the image folder; never an address to fetch."""

from __future__ import annotations

import base64
import binascii
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.samples import Unfit, json_type

MAX_IMAGE_BYTES = 256 << 20
DEFAULT_COLUMN = "image"
# Where there is no column "image": Hugging Face's lists, img2dataset's parquet, Hugging Face's image folders.
_OTHER_COLUMNS = ("images", "jpg", "jpeg", "png", "webp", "file_name", "image_path")
# How base64 of a JPEG, PNG, WebP or GIF begins; no file name begins so.
_BASE64 = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")
_LINKS = ("http://", "https://")


def image_column(columns: Iterable[str], options: BuildOptions) -> str:
    """The column that holds a record's image."""
    there = set(columns)
    if options.image_column in there or options.image_column != DEFAULT_COLUMN:
        return options.image_column
    return next((name for name in _OTHER_COLUMNS if name in there), DEFAULT_COLUMN)


def is_link(value: Any) -> bool:
    """Whether the value is an address on the web, or a list that begins with one."""
    value = value[0] if isinstance(value, list) and value else value
    return isinstance(value, str) and value.lstrip().lower().startswith(_LINKS)


def file_name(value: Any) -> str | None:
    """The file that an image value names; None when the image itself is in the record, or nothing is."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else None
    return value if isinstance(value, str) and not _is_inline(value) else None


def image_bytes(value: Any, folder: Path | None) -> bytes:
    """The encoded image of one value of the image column.

    bytes; a Hugging Face struct {bytes, path}; a data URL or base64; a name relative to `folder`; a list of one of these.

    Raises:
        Unfit: none of these, more than one image, or a file that is not there or leads out of the folder.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise Unfit(f"{'more than one' if value else 'no'} image: a list of {len(value)}; a sample has one")
        value = value[0]
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and _is_inline(value):
        value = from_base64(value)
    if isinstance(value, bytes):
        if len(value) > MAX_IMAGE_BYTES:
            raise Unfit(f"image too large: {len(value):,} bytes, at most {MAX_IMAGE_BYTES:,}")
        return value
    if isinstance(value, str) and value:
        return _read_file(folder, value)
    raise Unfit(f"no image name: {json_type(value) if value != '' else 'an empty string'}")


def from_base64(text: str) -> bytes:
    """The bytes of a data URL ("data:image/jpeg;base64,...") or of bare base64; line ends inside are skipped.

    Raises:
        Unfit: a web address, another kind of data URL, or no base64.
    """
    if is_link(text):
        raise Unfit("image is a URL: nothing is ever downloaded; put the image itself there, as base64")
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise Unfit(f"image is no base64: a data URL beginning {head[:40]!r}")
    try:
        return base64.b64decode("".join(text.split()).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise Unfit(f"image is no base64: {str(error)[:80]} (it begins {text[:20]!r})") from None


def _is_inline(value: str) -> bool:
    return value[:5].lower() == "data:" or (len(value) > 40 and value.startswith(_BASE64))


def _read_file(folder: Path | None, name: str) -> bytes:
    if is_link(name):
        raise Unfit("image is a URL: nothing is ever downloaded; fetch the images with img2dataset first")
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        raise Unfit(f"unsafe image name: {name[:200]!r} leads out of the image folder")
    if folder is None:
        raise Unfit(
            f"no image folder: {name[:200]!r} is a file's name and the first record named none; add --images DIR"
        )
    path = folder / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise Unfit(f"no image: {name} is not a file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise Unfit(f"image too large: {status.st_size:,} bytes, at most {MAX_IMAGE_BYTES:,}")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, UnicodeEncodeError):
        raise Unfit(f"no image: {name[:200]!r} is not in the image folder") from None
    except PermissionError:
        raise Unfit(f"no image: {name!r} may not be read") from None
    except OSError as error:  # a name longer than the file system holds, a loop of links
        raise Unfit(f"no image: {name[:80]!r} cannot be opened ({error.strerror})") from None
