"""Devices, as the three numbers of a roofline, and what the running one is called."""

from __future__ import annotations

import difflib
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from vtc.values import shown


@dataclass(frozen=True)
class Device:
    """What a roofline needs to know.

    Attributes:
        name: for people, with its article.
        flops: peak of dense bfloat16 products, FLOP/s.
        bandwidth: of its memory, bytes/s.
        memory: bytes.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float

    @property
    def ridge(self) -> float:
        """Tokens below which reading bfloat16 weights takes longer than multiplying with them."""
        return self.flops / self.bandwidth

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so many FLOPs and bytes."""
        return max(flops / self.flops, moved / self.bandwidth)


# NVIDIA's data sheets, dense figures: A100 80GB SXM, H100 SXM, H200 SXM, GeForce RTX 4090 (fp32 accumulation).
# "cpu" is no product but arithmetic: 8 cores of 4 GHz with two 8-wide fused multiply-adds a cycle (AVX2; bfloat16 is
# computed as float32 there), two channels of DDR5-5600, 64 GB.
DEVICES = {
    "a100": Device("an A100", 312e12, 2.039e12, 80e9),
    "h100": Device("an H100", 989e12, 3.35e12, 80e9),
    "h200": Device("an H200", 989e12, 4.8e12, 141e9),
    "4090": Device("an RTX 4090", 165.2e12, 1.008e12, 24e9),
    "cpu": Device("an 8-core CPU", 8 * 4e9 * 32, 2 * 8 * 5.6e9, 64e9),
}


def device_of(device: str | Device) -> Device:
    """The device of that name, in any case.

    Raises:
        ValueError: there is none.
    """
    if isinstance(device, Device):
        return device
    if (found := DEVICES.get(str(device).lower())) is not None:
        return found
    near = difflib.get_close_matches(str(device).lower(), DEVICES, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown device {shown(device)}; known: {', '.join(DEVICES)}{hint}")


def device_name(device: torch.device) -> str:
    """The card's name; of a CPU its model and the threads in use, which decide about the times."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"cpu: {name}, {threads} thread" + "s" * (threads > 1)
