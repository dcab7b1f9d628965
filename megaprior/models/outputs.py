"""What a model hands to an objective.

Letters: T tokens of a row, N loss tokens, P patches, H width, I images, E width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class States(ModelOutput):
    """Hidden states of one packed row and the positions an objective needs to read them.

    Attributes:
        hidden: [T, H] last hidden state, after the final norm.
        loss_index: int64 [N] position whose hidden state predicts loss token n.
        image_index: int64 [P] position of each image token; None for a text-only model.
        vision: features of a vision tower; None where the model has none.
        cls: [images, width] the tower's CLS features; None where the model has none.
    """

    hidden: torch.Tensor | None = None
    loss_index: torch.Tensor | None = None
    image_index: torch.Tensor | None = None
    vision: torch.Tensor | None = None
    cls: torch.Tensor | None = None


@dataclass
class PairStates(ModelOutput):
    """What a two-tower model says of the pairs of one row; pair i is image i and caption i.

    Attributes:
        images: [I, E] one embedding for each image, of length 1.
        captions: [I, E] one for each caption, likewise.
        scale: 0-d, the inverse temperature that their products are multiplied with.
    """

    images: torch.Tensor | None = None
    captions: torch.Tensor | None = None
    scale: torch.Tensor | None = None
