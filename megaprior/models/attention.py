"""One attention function for every model: causal, and block-diagonal inside a packed row.

It is registered with transformers under the name "megaprior" and reads a `Packing`, which says where the segments of the
row lie. Whatever costs index arithmetic is worked out once per forward there and shared by all layers. Without a `Packing`
(generation, padded batches) the call is transformers' own SDPA.

Backends, all of one meaning:
    flash     flash-attn, where installed (CUDA, bf16 or fp16)
    varlen    torch.nn.attention.varlen (CUDA, bf16 or fp16)
    segments  SDPA over segments grouped by similar length (any device and dtype; the CPU path)
    masked    SDPA over the whole row under a T x T mask (the oracle; quadratic in T)

Letters: T tokens of a row, S segments, L longest segment of a group, A query heads, K key/value heads, E head width.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F

from megaprior.errors import UsageError

Backend = Literal["auto", "segments", "masked", "varlen", "flash"]
ATTENTION = "megaprior"

# A segment joins the group of a longer one while padding it costs at most a fifth of its tokens, or 16 tokens.
_FILL = 0.8
_SLACK = 16


def register() -> None:
    """Make `attn_implementation="megaprior"` known to transformers; repeating it changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class Groups:
    """Segments of similar length side by side, for the `segments` backend.

    Attributes:
        shapes: (segments, L) of each group.
        gather: int64 [M] row position of every slot of all groups, M = sum of segments * L; holes repeat a segment's last token.
        restore: int64 [T] slot of every row position.
        holes: int64, the slots that only pad.
    """

    shapes: tuple[tuple[int, int], ...]
    gather: torch.Tensor
    restore: torch.Tensor
    holes: torch.Tensor


@dataclass(frozen=True)
class Packing:
    """Where the segments of one row lie, in the form its backend reads.

    Attributes:
        backend: the one that runs; never "auto".
        cu_seqlens: int32 [S+1] segment boundaries, from 0 to T.
        max_seqlen: tokens of the longest segment.
        groups: for `segments`.
        mask: bool [T, T], True where attention is allowed; for `masked`.
    """

    backend: Backend
    cu_seqlens: torch.Tensor
    max_seqlen: int
    groups: Groups | None = None
    mask: torch.Tensor | None = None


def make_packing(cu_seqlens: torch.Tensor, max_seqlen: int, *, backend: Backend, dtype: torch.dtype) -> Packing:
    """Prepare one row for every layer.

    Args:
        cu_seqlens: int32 [S+1] segment boundaries, from 0 to T, on the device of the model.
        max_seqlen: tokens of the longest segment.
        backend: as configured; "auto" takes flash, varlen or segments, the first that runs here.
        dtype: of the queries (the autocast dtype where autocast is on).

    Raises:
        UsageError: the backend cannot run on this device or dtype.
    """
    backend = _resolve(backend, cu_seqlens.device, dtype)
    if backend == "segments":
        return Packing(backend, cu_seqlens, max_seqlen, groups=_group(cu_seqlens))
    if backend == "masked":
        return Packing(backend, cu_seqlens, max_seqlen, mask=_block_mask(cu_seqlens))
    return Packing(backend, cu_seqlens, max_seqlen)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query [1, A, T, E], key and value [1, K, T, E] -> ([1, T, A, E], None).

    `attention_mask` and the further arguments count only without a packing.
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **arguments
        )
    if dropout:
        raise UsageError(f"attention_dropout is {dropout}; packed rows are trained without: set it to 0")
    # Under autocast the rotary embedding returns fp32 queries and keys beside bf16 values.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))  # [T, heads, E]
    return _BACKENDS[packing.backend](q, k, v, packing, scaling).unsqueeze(0), None


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scaling: float) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.mask, scale=scaling, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def _segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scaling: float) -> torch.Tensor:
    groups = packing.groups
    assert groups is not None
    none = groups.holes[:0]
    slots = [_Move.apply(x, groups.gather, groups.restore, none) for x in (q, k, v)]  # [M, heads, E]
    sizes = [count * length for count, length in groups.shapes]
    outputs = []
    for (count, length), *parts in zip(groups.shapes, *(x.split(sizes) for x in slots), strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in parts)  # [count, heads, L, E]
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _Move.apply(torch.cat(outputs), groups.restore, groups.gather, groups.holes)


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scaling: float) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = packing.cu_seqlens, packing.max_seqlen
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)
    assert isinstance(out, torch.Tensor)
    return out


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scaling: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    cu, longest = packing.cu_seqlens, packing.max_seqlen
    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, softmax_scale=scaling, causal=True)


_BACKENDS = {"masked": _masked, "segments": _segments, "varlen": _varlen, "flash": _flash}


class _Move(torch.autograd.Function):
    """y = x[index]; the gradient comes back as grad[inverse] with zeros at `holes`.

    Both directions are reads, so neither needs the scattered additions of index_select's own backward (which cost more
    than the attention of a short segment on CPU).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, holes: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse, holes)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        inverse, holes = ctx.saved_tensors
        return grad.index_select(0, inverse).index_fill_(0, holes, 0), None, None, None


def _resolve(backend: Backend, device: torch.device, dtype: torch.dtype) -> Backend:
    fused = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    flash = importlib.util.find_spec("flash_attn") is not None
    if backend == "auto":
        return ("flash" if flash else "varlen") if fused else "segments"
    if backend in ("flash", "varlen") and not fused:
        raise UsageError(
            f"model.attention={backend} needs CUDA and bf16 or fp16, this is {device.type} and {dtype}: use model.attention=auto"
        )
    if backend == "flash" and not flash:
        raise UsageError(
            "model.attention=flash needs the package flash-attn, which is not installed: use model.attention=auto"
        )
    return backend


def _group(cu_seqlens: torch.Tensor) -> Groups:
    bounds = cu_seqlens.tolist()
    device = cu_seqlens.device
    lengths = [end - start for start, end in pairwise(bounds)]
    by_length = sorted((s for s, length in enumerate(lengths) if length), key=lambda s: -lengths[s])
    members: list[list[int]] = []
    for segment in by_length:
        longest = lengths[members[-1][0]] if members else 0
        if members and lengths[segment] >= min(_FILL * longest, longest - _SLACK):
            members[-1].append(segment)
        else:
            members.append([segment])
    gather, holes = [], []
    for group in members:
        offset = torch.arange(lengths[group[0]])
        start = torch.tensor([bounds[s] for s in group])[:, None]
        last = torch.tensor([bounds[s + 1] - 1 for s in group])[:, None]
        gather.append(torch.minimum(start + offset, last).flatten())
        holes.append((start + offset > last).flatten())
    slots, hole = torch.cat(gather), torch.cat(holes)
    restore = torch.empty(bounds[-1], dtype=torch.int64)
    restore[slots[~hole]] = torch.arange(len(slots))[~hole]
    shapes = tuple((len(group), lengths[group[0]]) for group in members)
    return Groups(shapes, slots.to(device), restore.to(device), hole.nonzero()[:, 0].to(device))


def _block_mask(cu_seqlens: torch.Tensor) -> torch.Tensor:
    position = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)
    return (segment[:, None] == segment[None, :]) & (position[:, None] >= position[None, :])
