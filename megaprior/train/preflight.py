"""Before step 1: forward and backward of the longest rows that can be, so that what does not fit is found now and not in an
hour. Nothing of it stays: no gradient, no random state, no line in the metrics.

Which row takes most memory depends on the model, so each extreme is tried: as many images as a row holds, and as many loss
tokens. One comes twice: gradients of earlier rows are then there, as in a step.

Letters: T tokens of a row.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megaprior.data.samples import Batch, Segment, assemble
from megaprior.errors import UsageError
from megaprior.telemetry import say

if TYPE_CHECKING:
    from megaprior.data.loader import Loader
    from megaprior.data.vision import VisionSpec
    from megaprior.train.engine import Engine
    from megaprior.train.settings import RunConfig

_LARGEST = 1 << 14  # pixels of an image's side, beyond every limit of a model
_MOMENTS = 2  # of AdamW, fp32 each
_FULL = ("allocate memory", "out of memory", "bad_alloc")  # how torch and oneDNN say it on CPU


def wants_preflight(cfg: RunConfig) -> bool:
    """`cfg.preflight`, by default on a GPU and under ZeRO-3, where a failure costs most."""
    return cfg.preflight if cfg.preflight is not None else torch.cuda.is_available() or cfg.engine == "zero3"


def preflight(engine: Engine, loader: Loader, *, cfg: RunConfig, bos_id: int, fresh: bool) -> None:
    """Run the longest rows through the engine and drop what they leave. Collective; all ranks run the same rows.

    Args:
        fresh: the optimizer has made no step yet: the plain engine's moments are not there, and their room is set aside.

    Raises:
        UsageError: a row does not fit into memory, on this rank; names the row, the bytes, and what to change.
    """
    found = longest_rows(loader, bos_id=bos_id)
    model: Any = engine.module.model
    device, shown = model.device, ""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), ExitStack() as stack:
        stack.callback(engine.discard)
        try:
            room = _MOMENTS * sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
            held = torch.empty(room if fresh and engine.name == "local" else 0, dtype=torch.float32, device=device)
            for number, row in enumerate([*found, found[0]]):
                shown = _words(row)
                engine.accumulate(row, torch.zeros(len(row.targets), dtype=torch.int64), last=number == len(found))
            engine.sums()  # waits for the device
            del held
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            said = str(error) or type(error).__name__
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(w in said for w in _FULL):
                raise
            raise UsageError(
                f"preflight: {shown or 'the optimizer'} does not fit into the memory of rank {engine.place.rank} "
                f"({_asked(said)}); nothing was trained. {_knobs(cfg)}"
            ) from error
    used = f"; peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
    say(f"preflight: the longest rows fit ({'; '.join(map(_words, found))}){used}")


def longest_rows(loader: Loader, *, bos_id: int) -> list[Batch]:
    """One or two rows of T = data.max_tokens: the most images, and the most loss tokens, that these sources can give."""
    corpus, capacity = loader.corpus, loader.cfg.max_tokens
    shown = [corpus.has_image(source) for source in range(len(corpus.sets))]
    shortest = max(1, min(int(np.min(shards.token_counts)) for shards in corpus.sets if len(shards)))
    rows = []
    if any(shown):
        assert corpus.spec is not None
        rows.append(_most_images(corpus.spec, capacity, shortest, most=loader.cfg.batch_size, bos_id=bos_id))
    beside_rows = corpus.spec is not None and not corpus.spec.tokens((_LARGEST, _LARGEST))  # CLIP: no tokens, no head
    if not all(shown):
        rows.append([Segment(-1, *_caption(capacity - 1, bos_id))])
    elif not beside_rows:
        assert corpus.spec is not None
        smallest = corpus.spec.grid((1, 1))
        room = capacity - 1 - len(corpus.spec.layout(*smallest)[0])
        rows.append([_with_image(corpus.spec, smallest, room, bos_id)])
    pad_to = loader.cfg.pad_to
    return [
        assemble(
            segments,
            bos_id=bos_id,
            spec=corpus.spec,
            denominator=sum(len(segment.token_weight) for segment in segments),
            max_tokens=capacity,
            pad_to=pad_to,
        )
        for segments in rows
    ]


def _most_images(spec: VisionSpec, capacity: int, shortest: int, *, most: int, bos_id: int) -> list[Segment]:
    """The largest image that fits as often as it fits, at most `most` times; the last caption fills the row."""
    side = _LARGEST
    while 1 + spec.tokens((side, side)) + shortest > capacity and side > 1:
        side //= 2
    grid = spec.grid((side, side))
    each = 1 + spec.tokens((side, side)) + shortest
    count = max(1, min(most, capacity // each))
    lengths = [shortest] * (count - 1) + [max(shortest, capacity - each * count + shortest)]
    return [_with_image(spec, grid, length, bos_id) for length in lengths]


def _with_image(spec: VisionSpec, grid: tuple[int, int], caption: int, bos_id: int) -> Segment:
    patches = np.zeros((grid[0] * grid[1], spec.patch_values), dtype=np.uint8)
    return Segment(-1, *_caption(caption, bos_id), grid=grid, patches=patches)


def _caption(tokens: int, bos_id: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(tokens, bos_id), np.ones(tokens, dtype=np.float32)


def _words(row: Batch) -> str:
    images = int((torch.diff(row.loss_cu) > 0).sum()) if len(row.patches) else 0
    return f"a row of {len(row.input_ids):,} tokens, {len(row.targets):,} of them in the loss, {images:,} images"


def _asked(said: str) -> str:
    """The part of an allocator's message that has the numbers."""
    found = re.search(r"[Tt]ried to allocate ([\d.,]+ \w+)", said)
    total = re.search(r"total capacity of ([\d.,]+ \w+)", said)
    asked = f"asked for {found[1]} more" if found else said.splitlines()[0][:160]
    return f"{asked}, the device has {total[1]}" if total else asked


def _knobs(cfg: RunConfig) -> str:
    knobs = [f"lower data.max_tokens ({cfg.data.max_tokens:,})"]
    if cfg.activation_checkpointing != "full":
        knobs.append("set activation_checkpointing=full")
    if cfg.engine == "zero3":
        knobs.append("take more ranks, or zero.zero_optimization.offload_optimizer.device=cpu")
    else:
        knobs.append("spread the model over several devices with engine=zero3")
    return f"{', '.join(knobs[:-1])}, or {knobs[-1]}"
