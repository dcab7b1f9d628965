"""GPUs as their vendors describe them, and what of a description is reckoned with."""

from __future__ import annotations

from dataclasses import dataclass

GB, TB = 1e9, 1e12


@dataclass(frozen=True)
class Gpu:
    """Vendor's figures of one GPU.

    Attributes:
        memory: bytes.
        flops: dense bf16 with fp32 sums, per second (no structured sparsity).
        bandwidth: of its memory, bytes per second.
        link: to the GPUs of the same machine, bytes per second in one direction (NVLink figures count both).
        network: usual network adapter per GPU, bytes per second in one direction.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float

    @property
    def usable(self) -> float:
        """Bytes for tensors: 2.5 GiB are left for CUDA, NCCL and libraries, and 5% for what the allocator cannot use."""
        return 0.95 * (self.memory - 2.5 * 2**30)


# Vendors' "GB" of GPU memory are rather GiB (a "141 GB" H200 shows 139.8 GiB); 80 * 1e9 for the H100 would be too few.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 39.4 * 2**30, 312e12, 1.555 * TB, 300 * GB, 25 * GB),
        Gpu("a100", 79.2 * 2**30, 312e12, 2.039 * TB, 300 * GB, 25 * GB),
        Gpu("l40s", 44.4 * 2**30, 362e12, 0.864 * TB, 32 * GB, 25 * GB),
        Gpu("h100", 79.1 * 2**30, 989e12, 3.35 * TB, 450 * GB, 50 * GB),
        Gpu("h200", 139.8 * 2**30, 989e12, 4.8 * TB, 450 * GB, 50 * GB),
        Gpu("b200", 178.0 * 2**30, 2250e12, 7.7 * TB, 900 * GB, 50 * GB),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """What no table says; every one is printed with the plan and has a flag.

    Attributes:
        efficiency: share of `flops` that a full row reaches.
        overlap: share of arithmetic's time that communication can hide under.
        links: share of link and network bandwidth that large collectives reach.
        streams: share of memory bandwidth that reading weights and updating them reaches.
        per_node: GPUs of a machine.
        pcie: to the machine's memory, bytes per second and direction.
        host: bandwidth of a machine's memory, bytes per second.
    """

    efficiency: float = 0.45
    overlap: float = 0.8
    links: float = 0.75
    streams: float = 0.8
    per_node: int = 8
    network: float | None = None
    pcie: float = 50 * GB
    host: float = 300 * GB

    def describe(self, gpu: Gpu) -> list[str]:
        """One line each."""
        network = self.network or gpu.network
        return [
            f"vendor's figures of {gpu.name}: {gpu.flops / 1e12:,.0f} TFLOP/s dense bf16, {gpu.memory / 2**30:.1f} GiB, "
            f"{gpu.bandwidth / TB:.2f} TB/s, {gpu.link / GB:,.0f} GB/s to neighbours; network {network / GB:,.0f} GB/s a GPU",
            f"assumed: {self.efficiency:.0%} of peak arithmetic, {self.links:.0%} of links, {self.streams:.0%} of memory "
            f"bandwidth; communication hides under {self.overlap:.0%} of arithmetic; {self.per_node} GPUs a machine; "
            "no latency, no waiting for data",
        ]
