"""The loss doors of megaprior: importance weights, weighted cross entropy, log-probabilities.

Importing this package imports nothing, not even torch: a door's module is loaded when the door is first used.
(transformers probes for a top-level package of this name and may import the folder while doing so.)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .door import linear_logprob, linear_weighted_cross_entropy, weighted_cross_entropy
    from .weights import token_weights

__all__ = ["linear_logprob", "linear_weighted_cross_entropy", "token_weights", "weighted_cross_entropy"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".weights" if name == "token_weights" else ".door", __name__), name)
