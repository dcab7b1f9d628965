"""How fast a step was, and what share of the device's arithmetic the model used (MFU).

    TFLOP/s of a rank = model FLOPs of the global batch / ranks / seconds of the step / 1e12        see models/flops.py
    MFU               = that / the device's peak of dense bf16 products, whatever the run computes in

Recomputed activations are no model FLOPs. A step's seconds hold its wait for data, but no evaluation and no checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megaprior.models.flops import ModelShape, shape_of, train_flops

if TYPE_CHECKING:
    from megaprior.data.loader import StepBatch
    from megaprior.models.flops import Trained
    from megaprior.train.step import Totals

# Dense bf16 TFLOP/s with fp32 accumulation, as the vendor's data sheets say; the first name that the device's begins with.
PEAKS = (
    ("NVIDIA B200", 2250.0),
    ("NVIDIA GH200", 989.4),
    ("NVIDIA H200", 989.4),
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H100 NVL", 835.0),
    ("NVIDIA H100", 989.4),
    ("NVIDIA H800", 989.4),
    ("NVIDIA A100", 312.0),
    ("NVIDIA A800", 312.0),
    ("NVIDIA L40S", 362.0),
    ("NVIDIA L4", 121.0),
    ("NVIDIA A10G", 70.0),
    ("NVIDIA A10", 125.0),
    ("NVIDIA GeForce RTX 4090", 165.2),
)


def peak_of(name: str) -> float | None:
    """The peak of a device by its name as torch gives it, in TFLOP/s; None for one that is not listed."""
    return next((peak for prefix, peak in PEAKS if name.startswith(prefix)), None)


class Meter:
    """Counts what a step did."""

    def __init__(self, model: Any, *, world: int, peak_tflops: float | None) -> None:
        """`peak_tflops` None looks the GPU up by its name; where that is unknown, or without one, no MFU is given."""
        import torch

        if peak_tflops is None and torch.cuda.is_available():
            peak_tflops = peak_of(torch.cuda.get_device_name())
        self._peak, self._world = peak_tflops, world
        self._shape: ModelShape = shape_of(model.config)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._trained: Trained = "projector" if all("projector" in name for name in trained) else "all"

    def metrics(self, batch: StepBatch, totals: Totals, *, seconds: float, waited: float) -> dict[str, float]:
        """For a step's line in metrics.jsonl. Tokens are those of rows, an image's among them."""
        seen = self._shape.patches and totals.patches // self._shape.patches
        flops = train_flops(
            self._shape,
            segments=batch.segment_tokens,
            loss_tokens=sum(totals.tokens),
            images=seen,
            patches=0 if self._shape.patches else totals.patches,
            trained=self._trained,
        )
        tflops = flops.total / self._world / seconds / 1e12
        rates = {
            "tokens_per_s": float(batch.segment_tokens.sum()) / seconds,
            "loss_tokens_per_s": sum(totals.tokens) / seconds,
            "pairs_per_s": batch.pairs / seconds,
            "tflops_per_rank": tflops,
        }
        mfu = {"mfu": tflops / self._peak} if self._peak else {}
        return {"step_s": seconds, "data_wait_s": waited, "data_wait_share": waited / seconds, **rates, **mfu}
