"""Devices that a run can be planned for without having them."""

import re
from typing import NamedTuple

from posttrain.errors import ConfigError


class Device(NamedTuple):
    """Of the maker's data sheet."""

    memory: float  # GiB
    tflops: float  # in bf16 by tensor or matrix cores, dense (half of what is given "with sparsity")


# NVIDIA's and AMD's data sheets; of l4, a10g and l40s error correction takes a sixteenth of the memory
DEVICES = {
    "a100-40gb": Device(40, 312),
    "a100": Device(80, 312),
    "h100-pcie": Device(80, 756),
    "h100": Device(80, 989),
    "h200": Device(141, 989),
    "b200": Device(180, 2250),
    "l4": Device(22.5, 121),
    "a10g": Device(22.5, 70),
    "l40s": Device(45, 362),
    "rtx4090": Device(24, 165),
    "mi300x": Device(192, 1307),
}


def bytes_of(written: str) -> int:
    """Of 80GiB, or of 80GB, which is less.

    Raises:
        ConfigError: it is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?G(i?)B", written)
    if not found or not float(found[1]):
        raise ConfigError(f"plan.memory={written} must be a size such as 80GiB or 80GB")
    return int(float(found[1]) * (2**30 if found[2] else 10**9))
