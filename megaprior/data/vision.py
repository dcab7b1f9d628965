"""How an image becomes the tokens of a row; each kind of model has a layout of its own.

    PatchSpec   U-LVLM   <vision> patch patch ... <vrow_sep> patch ... </vision>, more of them for a larger image
    TowerSpec   H-LVLM   a fixed square of pixels, one token for each patch of the vision tower, nothing between

Either way pixels travel as uint8 patches [P, D], row by row from the top left, each flattened as (height, width, channel).
Letters: P patches of an image, D = 3 * patch^2 values of a patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megaprior.data.images import patchify, target_size

if TYPE_CHECKING:
    from PIL import Image

Policy = Literal["square", "pad", "crop"]


class VisionSpec(ABC):
    """What the data room needs to know of a model that sees. Frozen and hashable: layouts are cached by it."""

    patch: int  # side of a patch, in pixels

    @property
    @abstractmethod
    def fewer_tokens(self) -> str:
        """What makes an image's tokens fewer, for messages."""

    @staticmethod
    def of(config: Any) -> VisionSpec | None:
        """As a model's configuration has it; None for a text-only model.

        A U-LVLM has `patch`, `limit` and `vision_roles` (role -> id); a model with a vision tower has `image_policy`.
        """
        if getattr(config, "vision_roles", None):
            roles = (config.vision_roles[role] for role in ("patch", "start", "row", "end"))
            return PatchSpec(config.patch, config.limit, *roles)
        if getattr(config, "image_policy", None):
            tower, mean = config.vision_config, config.image_mean
            fill = tuple(int(255 * value) for value in mean)
            # A two-tower model compares an image with its caption; the image takes no place beside it.
            image_id = getattr(config, "image_token_index", None)
            return TowerSpec(tower.image_size, tower.patch_size, config.image_policy, fill, image_id)
        return None

    @property
    def patch_values(self) -> int:
        """D, the uint8 values of one patch."""
        return 3 * self.patch**2

    def recorded(self) -> dict[str, Any]:
        """For a manifest: plain values as JSON gives them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def tokens(self, size: tuple[int, int]) -> int:
        """Tokens that an image of `size` = (width, height) takes in a row."""
        return len(self.layout(*self.grid(size))[0])

    @abstractmethod
    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(columns, rows) of patches of an image of `size` = (width, height) pixels."""

    @abstractmethod
    def layout(self, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids of an image's tokens, offset among them of each patch's token), int64 both and read-only."""

    @abstractmethod
    def patches(self, image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
        """uint8 [P, D] of an RGB image; `grid` is that of its size."""


@dataclass(frozen=True)
class PatchSpec(VisionSpec):
    """Raw patches: their side and the limit of the image's long side in pixels, and the ids of the four roles."""

    patch: int
    limit: int
    patch_id: int
    start_id: int
    row_id: int
    end_id: int

    @property
    def fewer_tokens(self) -> str:
        """See `VisionSpec`."""
        return f"lower the image limit of {self.limit} pixels"

    def tokens(self, size: tuple[int, int]) -> int:
        """columns * rows + (rows - 1) separators + 2."""
        columns, rows = self.grid(size)
        return columns * rows + rows + 1

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `target_size`."""
        width, height = target_size(*size, patch=self.patch, limit=self.limit)
        return width // self.patch, height // self.patch

    @lru_cache(maxsize=4096)  # noqa: B019 (specs are few, and equal ones are one key)
    def layout(self, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """<vision> row <vrow_sep> row ... </vision>."""
        body = np.full((rows, columns + 1), self.patch_id, dtype=np.int64)
        body[:, -1] = self.row_id
        ids = np.concatenate([[self.start_id], body.ravel()[:-1], [self.end_id]])
        return _sealed(ids, 1 + (np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)).ravel())

    def patches(self, image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
        """The image scaled to the grid."""
        return patchify(image, patch=self.patch, size=(grid[0] * self.patch, grid[1] * self.patch))


@dataclass(frozen=True)
class TowerSpec(VisionSpec):
    """What a vision tower sees: a square of `side` pixels, made by `policy`; see `square`.

    `fill` is the colour that `pad` pads with. `image_id` stands at every image token; the model puts features there, so that
    its embedding is never read. None leaves images out of the row.
    """

    side: int
    patch: int
    policy: Policy
    fill: tuple[int, ...]
    image_id: int | None

    @property
    def fewer_tokens(self) -> str:
        """See `VisionSpec`."""
        return f"take a tower that sees fewer than {(self.side // self.patch) ** 2} patches"

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The same for every image."""
        return self.side // self.patch, self.side // self.patch

    @lru_cache(maxsize=16)  # noqa: B019
    def layout(self, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """One token a patch and nothing else, or none."""
        count = 0 if self.image_id is None else columns * rows
        return _sealed(np.full(count, self.image_id or 0, dtype=np.int64), np.arange(count))

    def patches(self, image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
        """The square that the tower sees."""
        picture = square(image, side=self.side, policy=self.policy, fill=self.fill)
        return patchify(picture, patch=self.patch, size=(self.side, self.side))


def square(image: Image.Image, *, side: int, policy: Policy, fill: tuple[int, ...]) -> Image.Image:
    """An RGB image as `side` x `side` pixels, bit for bit as transformers' Pillow image processors make it.

    square: scaled to it, whatever its shape (CLIPImageProcessor with a fixed size).
    pad: put on a square of colour `fill`, then scaled; nothing is lost or distorted (LlavaImageProcessor with do_pad).
    crop: its shorter edge scaled to `side`, the middle cut out; the ends of the longer one are lost (CLIPImageProcessor).
    """
    from PIL import Image

    (width, height), bicubic = image.size, Image.Resampling.BICUBIC
    if policy == "pad" and width != height:
        longest = max(width, height)
        canvas = Image.new("RGB", (longest, longest), fill)
        canvas.paste(image, ((longest - width) // 2, (longest - height) // 2))
        image = canvas
    if policy == "crop" and width != height:
        short, long = min(width, height), max(width, height)
        long_to = int(side * long / short)
        scaled = (side, long_to) if width < height else (long_to, side)
        left, top = (scaled[0] - side) // 2, (scaled[1] - side) // 2
        image = image.resize(scaled, bicubic) if image.size != scaled else image
        return image.crop((left, top, left + side, top + side))
    return image.resize((side, side), bicubic) if image.size != (side, side) else image


def segment_length(spec: VisionSpec | None, size: tuple[int, int] | None, caption_tokens: int) -> int:
    """Tokens of a whole segment: BOS, the image (where there is one), and the caption with its closing EOS."""
    image = spec.tokens(size) if spec is not None and size is not None else 0
    return 1 + image + caption_tokens


def _sealed(ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids.flags.writeable = offsets.flags.writeable = False
    return ids, offsets
