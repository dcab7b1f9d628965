"""The language model's head: owns its weight and computes the loss inside its own forward.

Letters: N loss tokens, H width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from megaprior.kernels import linear_logprob, linear_weighted_cross_entropy


class LossHead(nn.Linear):
    """`nn.Linear(H, V, bias=False)` that also returns the loss, so that logits need never exist as a whole.

    The loss is computed inside `forward`, and not outside from `.weight`, so that a partitioned weight (ZeRO-3) is gathered
    and released by this module's own hooks. It adds no state: a Linear that transformers built, tied or loaded becomes one
    by `adopt`.
    """

    @classmethod
    def adopt(cls, linear: nn.Linear) -> LossHead:
        """Turn a Linear into a LossHead in place: the same object, parameters, ties and hooks."""
        assert linear.bias is None
        linear.__class__ = cls
        assert isinstance(linear, cls)
        return linear

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        token_weight: torch.Tensor | None = None,
        denominator: float | torch.Tensor | None = None,
        *,
        mode: Literal["loss", "logprob"] = "loss",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits, the weighted loss, or log-probabilities.

        Args:
            hidden: [N, H]; [..., H] when only logits are asked for.
            targets: int64 [N], -100 where there is none; None asks for logits [..., V].
            token_weight: float32 [N]; None is all ones.
            denominator: D of the global batch, at least 1; None is the number of targets here.
            mode: "loss" or "logprob".

        Returns:
            Without targets the logits [..., V]. With mode "loss" (loss, nll): loss = sum(token_weight * nll) / denominator,
            0-d, and nll float32 [N], natural log, detached. With mode "logprob" log p(target) float32 [N], detached.
        """
        if targets is None:
            return F.linear(hidden, self.weight)
        if mode == "logprob":
            return linear_logprob(hidden, self.weight, targets)
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):  # autocast does not look inside the fused loss
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        # Models send loss positions only: nothing to leave out is worth making the host wait for the device.
        return linear_weighted_cross_entropy(
            hidden, self.weight, targets, token_weight, denominator=denominator, compact=False
        )
