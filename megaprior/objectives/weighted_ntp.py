"""Next-token prediction with one weight per token: PRIOR's loss, and with weights of one plain NTP.

    L = (1 / D) * sum over captions s, sum over tokens i of  g_{s,i} * ( -log p(t_i | image, t_<i) )

g is `batch.token_weight` and D is `batch.denominator`, both of the global batch; so rows simply add up, however the samples
were packed, accumulated or spread over ranks. What distinguishes PRIOR, NTP and the other weightings is g alone.

Letters: T tokens of a row, N loss tokens, H width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megaprior.data.samples import Batch
    from megaprior.models.outputs import States


class WeightedNTP:
    """The loss above, on the positions that carry loss and no others."""

    def __call__(self, model: Any, states: States, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, nll): 0-d, and float32 [N], natural log, detached, for every loss token whatever its weight."""
        assert states.hidden is not None
        hidden = states.hidden.index_select(0, batch.loss_index)  # [T, H] -> [N, H]
        return model.lm_head(hidden, batch.targets, batch.token_weight, batch.denominator)
