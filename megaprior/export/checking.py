"""Is an export the model that was trained? Every tensor by digest, and the logits of one fixed row.

Letters: T tokens of the row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megaprior.data.samples import Segment, assemble
from megaprior.data.vision import VisionSpec
from megaprior.errors import DataError
from megaprior.export.foreign import Foreign
from megaprior.models.fingerprint import tensor_digest
from megaprior.models.hlvlm import HLVLM
from megaprior.models.lm import TextLM
from megaprior.tokenizer import Tokenizer

TOLERANCE = 1e-4  # of a logit, in fp32 and relative to the largest one where that is above 1
PROBE = "A small red square to the left of two blue circles, 1234, naïve café"
_SIZE = (150, 100)  # of the probe image: neither square nor whole patches, so that scaling is part of the comparison


def tensor_digests(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """Name -> (shape, dtype, xxh3-128 of the bytes) of every entry of the state dict; tied ones under each name."""
    return {
        name: (tuple(tensor.shape), str(tensor.dtype), tensor_digest(tensor))
        for name, tensor in model.state_dict().items()
    }


def compare_tensors(before: Mapping[str, tuple[Any, ...]], after: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Refuse an export that does not hold exactly what was to be saved.

    Raises:
        DataError: names the first tensor that is missing, new or different.
    """
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            raise DataError(
                f"{where}: tensor {name} was {before.get(name, 'absent')} before saving and is {after.get(name, 'absent')} after "
                "reloading; nothing was written"
            )


def probe_image() -> Any:
    """A picture of smooth colours with an edge in it, the same everywhere."""
    from PIL import Image

    x, y = np.meshgrid(np.arange(_SIZE[0]), np.arange(_SIZE[1]))
    channels = [x * 255 // _SIZE[0], y * 255 // _SIZE[1], np.where(x > 2 * y, 220, 30)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@torch.inference_mode()
def our_logits(ours: TextLM | HLVLM, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids int64 [T], logits float32 [T, V]) of the probe row, through the trainer's own rooms."""
    spec = VisionSpec.of(ours.config)
    tokens = np.array(tokenizer.encode(PROBE))
    segment = Segment(0, tokens, np.ones(len(tokens), np.float32))
    if spec is not None:
        grid = spec.grid(_SIZE)
        segment = Segment(0, tokens, segment.token_weight, grid=grid, patches=spec.patches(probe_image(), grid))
    batch = assemble([segment], bos_id=tokenizer.bos_id, spec=spec, denominator=1, max_tokens=1 << 20, pad_to=1)
    states = ours.states(**batch.inputs)
    assert states.hidden is not None
    logits = ours.lm_head(states.hidden)
    assert isinstance(logits, torch.Tensor)
    return batch.input_ids, logits.float()


@torch.inference_mode()
def their_logits(foreign: Foreign) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the exported class, fed by the exported processor."""
    inputs = foreign.inputs(None if foreign.kind == "text" else probe_image(), PROBE)
    return inputs["input_ids"][0], foreign.model(**inputs).logits[0].float()


def compare_logits(
    ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor], where: str
) -> float:
    """The worst difference of a logit over max(1, largest logit); of V columns where the export has appended some.

    Raises:
        DataError: other tokens, or logits that differ by more than `TOLERANCE`.
    """
    (ids, logits), (other_ids, other) = ours, theirs
    known = ids < logits.shape[1]  # an image token beyond the vocabulary has another id there
    if len(ids) != len(other_ids) or not torch.equal(ids[known], other_ids[known]):
        raise DataError(
            f"{where}: its processor makes {len(other_ids)} tokens of the probe, other ones than our {len(ids)}"
        )
    scale = max(1.0, float(logits.abs().max()))
    worst = float((logits - other[:, : logits.shape[1]]).abs().max()) / scale
    if not worst <= TOLERANCE:
        raise DataError(
            f"{where}: logits differ from the trainer's by {worst:.2g} of {scale:.3g}, allowed is {TOLERANCE:g}; nothing was "
            "written"
        )
    return worst
