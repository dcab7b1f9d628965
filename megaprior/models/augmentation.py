"""What contrastive training does to images and captions, on the device and drawn anew in every step.

Letters: I images and captions, L tokens of the longest caption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

_MOST_STRETCH = math.log(4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """What training does to pairs, drawn from torch's generator, which every step seeds."""

    smallest_crop: float = 1.0
    flip: bool = False
    drop_words: float = 0.0

    def captions(self, ids: torch.Tensor, *, hidden_id: int, end_id: int) -> torch.Tensor:
        """int64 [I, L] -> the same with `drop_words` of the tokens replaced by `hidden_id`, never the end, where CLIP reads."""
        if not self.drop_words:
            return ids
        hide = (torch.rand(ids.shape, device=ids.device) < self.drop_words) & (ids != end_id)
        return ids.masked_fill(hide, hidden_id)

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[I, 3, side, side] -> the same shape: for each image a rectangle of `smallest_crop` to 1 of its area, stretched to a
        square (sides at most 4 : 3), in every other one mirrored."""
        if not len(pixels) or (self.smallest_crop == 1 and not self.flip):
            return pixels
        count, device = len(pixels), pixels.device
        area, stretch, x, y, mirror = torch.rand(5, count, device=device)
        area = self.smallest_crop + (1 - self.smallest_crop) * area
        ratio = torch.exp((2 * stretch - 1) * _MOST_STRETCH) if self.smallest_crop < 1 else torch.ones_like(stretch)
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        sign = torch.where(mirror < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(mirror)
        zero = torch.zeros_like(width)
        across = torch.stack((sign * width, zero, (2 * x - 1) * (1 - width)), dim=1)
        down = torch.stack((zero, height, (2 * y - 1) * (1 - height)), dim=1)
        grid = nn.functional.affine_grid(torch.stack((across, down), dim=1), list(pixels.shape), align_corners=False)
        return nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
