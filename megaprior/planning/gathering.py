"""Which parameters ZeRO-3 holds whole at each moment of a micro-step.

DeepSpeed gathers a module's parameters before it runs, fetches those of the next modules ahead (`stage3_prefetch_bucket_size`
elements at a time) and lets go of them afterwards, unless they are small, or needed again within `stage3_max_reuse_distance`
elements of use: between its last layers' forward and their backward it keeps what fits into that distance, and of a small
model all. Its coordinator's rules are followed here module by module, as they are from the third micro-step of a run on,
when it has recorded the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

Module = tuple[str, ...]  # the parameters that a module itself owns, by name


@dataclass(frozen=True)
class Use:
    """One module at work: what it owns, and the moment that it belongs to."""

    module: Module
    moment: str


@dataclass(frozen=True)
class Gathers:
    """Of one micro-step, in elements.

    Attributes:
        peaks: most that is whole at each moment, flat buffers of gathers under way included, persistent parameters left out.
        fetched: what is gathered, by moment.
    """

    peaks: dict[str, int]
    fetched: dict[str, int]


@dataclass
class _State:
    whole: set[str]
    flying: dict[str, frozenset[str]]  # in flight -> the group that it travels in
    latest: dict[str, int]


def gathered(
    uses: Sequence[Use], sizes: dict[str, int], *, persistent: set[str], prefetch: int, reuse: int, most: int
) -> Gathers:
    """Follow one micro-step.

    Args:
        uses: modules in the order in which they run, forward and backward.
        sizes: elements of each parameter.
        persistent: parameters that are never let go.
        prefetch, reuse, most: DeepSpeed's stage3_prefetch_bucket_size, _max_reuse_distance and _max_live_parameters.
    """
    state = _State(set(persistent), {}, {})
    queue = deque((name, step) for step, use in enumerate(uses) for name in sorted(use.module))
    peaks: dict[str, int] = {}
    fetched: dict[str, int] = {}
    kept = sum(sizes[name] for name in persistent)

    def note(moment: str, extra: int = 0) -> None:
        live = sum(sizes[name] for name in state.whole) + sum(sizes[name] for name in state.flying) - kept + extra
        peaks[moment] = max(peaks.get(moment, 0), live)

    for step, use in enumerate(uses):
        wanted = frozenset(name for name in use.module if name not in state.whole and name not in state.flying)
        state.flying.update(dict.fromkeys(wanted, wanted))
        note(use.moment)
        for group in {state.flying[name] for name in use.module if name in state.flying}:
            # A group of several travels in one flat buffer, out of which each is copied.
            note(use.moment, sum(sizes[name] for name in group) if len(group) > 1 else 0)
            state.whole |= group
            for name in group:
                state.flying.pop(name, None)
        _pass(queue, use, step, state.latest)
        held = sum(sizes[name] for names in (state.whole, state.flying) for name in names) - kept
        ahead = _ahead(queue, state, sizes, limit=min(prefetch, most - held))
        state.flying.update(dict.fromkeys(ahead, ahead))
        fetched[use.moment] = fetched.get(use.moment, 0) + sum(sizes[name] for name in wanted | ahead)
        note(use.moment)
        for name in use.module:
            if (
                name not in persistent
                and state.latest.get(name, -1) <= step
                and not _again(uses, name, step, sizes, reuse)
            ):
                state.whole.discard(name)
    return Gathers(peaks, fetched)


def _pass(queue: deque[tuple[str, int]], use: Use, step: int, latest: dict[str, int]) -> None:
    """Take what is used now off the queue, so that it is not fetched later."""
    missing = {name for name in use.module if latest.get(name, -1) < step}
    while queue and missing:
        name, at = queue.popleft()
        latest[name] = at
        missing.discard(name)


def _ahead(queue: deque[tuple[str, int]], state: _State, sizes: dict[str, int], *, limit: int) -> frozenset[str]:
    """What is fetched for the next modules; what is there already is marked as wanted, which keeps it there."""
    found: set[str] = set()
    total = 0
    while queue and total < limit:
        name, at = queue.popleft()
        state.latest[name] = max(state.latest.get(name, -1), at)
        if name not in state.whole and name not in state.flying and name not in found:
            found.add(name)
            total += sizes[name]
    return frozenset(found)


def _again(uses: Sequence[Use], name: str, step: int, sizes: dict[str, int], reuse: int) -> bool:
    """Whether a parameter is used again within `reuse` elements of what runs next."""
    passed = 0
    for use in uses[step + 1 :]:
        if passed >= reuse:
            return False
        if name in use.module:
            return True
        passed += sum(sizes[other] for other in use.module)
    return False
