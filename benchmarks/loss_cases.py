"""The problems of benchmarks.loss: which are measured, in which order, and their tensors.

N rows, n of them with loss, V vocabulary, H width, S captions.

Inputs are random and resemble those of a real head. A weight row has norm about 1 and hidden ~ N(0, 1), so that logits
have a standard deviation of 1: the model hardly knows. Every second row of hidden is 4 times as large: there the model
is nearly sure. Targets are drawn from the model's own softmax, token weights by `token_weights` from random scores of
captions of 32 tokens. Nothing is zero: products of zeros run faster than those of data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaprior.kernels import token_weights

# What one row costs in products, in units of 2VH operations: logits, and twice as much for both gradients.
PRODUCTS = {"fused": 3, "forward": 1, "logprob": 1, "logits": 0}
TITLES = {
    "fused": "linear-fused loss, forward + backward",
    "forward": "linear-fused loss, forward only",
    "logits": "loss of given logits, forward + backward",
    "logprob": "log-probabilities of the targets, forward only",
}
IGNORED = -100
SHARP = 4.0
CAPTION = 32  # tokens
SHARES = (0.10, 0.05, 0.25, 0.50, 1.0)
CHUNK_ELEMENTS = 1 << 27  # of a chunk of logits: 1 GiB in float64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem.

    operation: a key of TITLES.  weights: "uniform" (every target counts 1) or "token".  share: of rows that carry loss.
    sweep: belongs to the sweep of shares.  leave_out: arms not tried here, to save time (parts of their names).
    """

    operation: str
    rows: int
    vocabulary: int
    dtype: torch.dtype
    hidden: int = 0
    weights: str = "uniform"
    share: float = 1.0
    sweep: bool = False
    leave_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Short and unique in a run."""
        width = f" H={self.hidden:,}" if self.hidden else ""
        parts = [f"{self.operation} N={self.rows:,}{width} V={self.vocabulary:,} {str(self.dtype)[6:]}"]
        if self.weights == "token":
            parts.append("token weights")
        if self.sweep:
            parts.append(f"{self.share:.0%} loss rows")
        return ", ".join(parts)

    @property
    def loss_rows(self) -> int:
        """n."""
        return int(_carries_loss(self.rows, self.share).sum())

    @property
    def operations(self) -> int:
        """Floating-point operations of the products that cannot be avoided: 6nVH with gradients, 2nVH without."""
        return 2 * PRODUCTS[self.operation] * self.loss_rows * self.vocabulary * self.hidden

    @property
    def floor_bytes(self) -> int:
        """Given logits: each read once, each gradient written once. 0 for the others."""
        return 2 * self.rows * self.vocabulary * self.dtype.itemsize if self.operation == "logits" else 0


@dataclass(kw_only=True)
class Problem:
    """The tensors of a case. Of the operation's inputs only those exist that it takes.

    hidden: (N, H).  weight: (V, H).  logits: (N, V); `restore` puts their values back, since arms may overwrite them.
    targets: (N,) int64.  token_weight: (N,) float32, 0 where ignored, or None.
    """

    case: Case
    targets: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None
    token_weight: Tensor | None = None
    _kept_logits: Tensor | None = field(default=None, repr=False)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the operation takes, in the order of the gradients."""
        return tuple(x for x in (self.hidden, self.weight, self.logits) if x is not None)

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """(hidden, weight) of a linear operation."""
        assert self.hidden is not None
        assert self.weight is not None
        return self.hidden, self.weight

    @property
    def given(self) -> Tensor:
        """The logits of operation "logits"."""
        assert self.logits is not None
        return self.logits

    @property
    def input_bytes(self) -> int:
        """Of all inputs together."""
        return sum(x.nbytes for x in self.inputs)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what an arm may have written into the logits."""
        if self.logits is not None and self._kept_logits is not None:
            self.logits.copy_(self._kept_logits)


def make_problem(case: Case, device: torch.device, seed: int) -> Problem:
    """Fresh random tensors of a case."""
    random = torch.Generator(device).manual_seed(seed)
    grad = case.operation in ("fused", "logits")
    carries = _carries_loss(case.rows, case.share).to(device)
    targets = torch.full((case.rows,), IGNORED, device=device)
    problem = Problem(case=case, targets=targets)
    if case.operation == "logits":
        logits = torch.empty(case.rows, case.vocabulary, dtype=case.dtype, device=device).normal_(generator=random)
        logits[1::2] *= SHARP
        problem.logits, problem._kept_logits = logits.requires_grad_(grad), logits.detach().clone()
    else:
        hidden = torch.empty(case.rows, case.hidden, dtype=case.dtype, device=device).normal_(generator=random)
        hidden[1::2] *= SHARP
        weight = torch.empty(case.vocabulary, case.hidden, dtype=case.dtype, device=device)
        weight.normal_(std=case.hidden**-0.5, generator=random)
        problem.hidden, problem.weight = hidden.requires_grad_(grad), weight.requires_grad_(grad)
    for rows in loss_row_chunks(carries, case.vocabulary):
        probabilities = logits_of(problem, rows).float().softmax(-1)
        targets[rows] = torch.multinomial(probabilities, 1, generator=random)[:, 0]
    if case.weights == "token":
        problem.token_weight = _token_weights(carries, random)
    return problem


@torch.no_grad()
def logits_of(problem: Problem, rows: Tensor) -> Tensor:
    """Logits of some rows, in the case's dtype."""
    if problem.case.operation == "logits":
        return problem.given[rows]
    hidden, weight = problem.head
    return hidden[rows] @ weight.t()


def loss_row_chunks(carries: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """Positions of the rows that carry loss, so many at a time that their logits stay small."""
    yield from carries.nonzero()[:, 0].split(max(1, CHUNK_ELEMENTS // vocabulary))


def _carries_loss(rows: int, share: float) -> Tensor:
    """(N,) bool on the CPU: runs of a caption's length at the end of stretches without loss, as in packed rows."""
    if share >= 1:
        return torch.ones(rows, dtype=torch.bool)
    run = min(CAPTION, max(1, int(rows * share / 4)))
    period = round(run / share)
    return torch.arange(rows) % period >= period - run


def _token_weights(carries: Tensor, random: torch.Generator) -> Tensor:
    """(N,) float32: Eqs. 3-4 over captions of random scores; 0 where there is no loss."""
    count = int(carries.sum())
    scores = torch.empty(count, device=carries.device).uniform_(generator=random).clamp_(min=1e-6).log_()
    ends = [*range(0, count, CAPTION), count]
    weights = torch.zeros(len(carries), device=carries.device)
    weights[carries] = token_weights(scores, torch.tensor(ends, dtype=torch.int32, device=carries.device))
    return weights


def plan(device: torch.device, *, quick: bool = False) -> list[Case]:
    """Cases in order of importance: what answers the four targets comes first, what a small budget drops comes last."""
    if quick:
        return _cpu_plan(rows=96, many=128, hidden=16, vocabulary=96, dtype=torch.float32)
    if device.type == "cpu":
        return _cpu_plan(rows=1024, many=2048, hidden=256, vocabulary=32_000, dtype=torch.float32)
    return _gpu_plan()


def _gpu_plan() -> list[Case]:
    def case(operation: str, rows: int, hidden: int, vocabulary: int, **more) -> Case:
        width = 0 if operation == "logits" else hidden
        return Case(operation=operation, rows=rows, hidden=width, vocabulary=vocabulary, dtype=torch.bfloat16, **more)

    large, small = 128_256, 32_000
    slow = (
        "torch.compile",
        "default",
        "bf16 dWeight",
        "compact=False",
    )  # variants that the headline shape has already shown
    whole = (*slow, "plain")  # 65,536 rows: what needs the whole logits
    sweep = [case("fused", 65_536, 4096, large, share=s, sweep=True, leave_out=whole) for s in SHARES]
    return [
        case("fused", 8192, 4096, large),
        case("logits", 8192, 4096, large),
        case("logprob", 8192, 4096, large),
        sweep[0],
        case("fused", 8192, 4096, large, weights="token"),
        sweep[-1],
        *sweep[1:-1],
        case("forward", 8192, 4096, large),
        case("fused", 2048, 4096, large, leave_out=slow),
        case("fused", 8192, 3072, large, leave_out=slow),
        case("fused", 8192, 4096, small, leave_out=slow),
        case("logits", 8192, 4096, large, weights="token", leave_out=slow),
        case("logits", 65_536, 4096, small, leave_out=slow),
        case("fused", 8192, 3072, small, leave_out=slow),
        case("fused", 2048, 3072, small, leave_out=slow),
        case("logprob", 65_536, 4096, large, leave_out=whole),
        case("fused", 65_536, 3072, large, leave_out=whole),
        case("logits", 2048, 4096, large, leave_out=slow),
    ]


def _cpu_plan(*, rows: int, many: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> list[Case]:
    same = ("'accurate'",)  # in float32 that is 'auto' once more

    def case(operation: str, rows: int, **more) -> Case:
        width = 0 if operation == "logits" else hidden
        more.setdefault("leave_out", same)
        return Case(operation=operation, rows=rows, hidden=width, vocabulary=vocabulary, dtype=dtype, **more)

    slow = ("chunked", "torch.compile")  # ten times slower, and slow to compile: the first case shows both
    sweep = [case("fused", rows // 2, share=s, sweep=True, leave_out=slow) for s in SHARES]
    return [
        case("fused", rows),
        *sweep,
        case("logits", rows),
        case("fused", rows, weights="token"),
        case("logprob", rows),
        case("forward", rows),
        case("fused", many),
    ]
