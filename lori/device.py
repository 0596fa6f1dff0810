"""Choice of the device by name, and copies of small tensors to a device without a synchronization."""

import logging
import re
from importlib.util import find_spec

import torch

from lori.errors import DeviceError

logger = logging.getLogger(__name__)
MIN_CAPABILITY = (8, 0)
"""Lowest compute capability of a GPU: the first that Triton supports and that computes in bf16."""
NAME = re.compile(r"auto|cpu|cuda(:\d+)?")


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`: "cpu", "cuda" (the first GPU), "cuda:N", or "auto".

    "auto" is the first GPU that can serve, else the CPU. Raises `DeviceError` if the device is missing or cannot serve.
    """
    if not NAME.fullmatch(name):
        raise DeviceError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device(name)
    if name == "auto":
        for index in range(_num_gpus()):
            if not (fault := _fault(index)):
                return torch.device("cuda", index)
            logger.warning("cuda:%d is not used: %s", index, fault)
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if fault := _fault(index):
        raise DeviceError(f"--device {name}: {fault}; pass --device cpu, or one that is there")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """Return the device's name for a log, with the GPU's model."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to `device` and return the copy, without waiting for work that runs there."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def copy_to_device(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a CPU tensor to `target`, without waiting for work on its device. The caller may change `source` right after."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


def _num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _fault(index: int) -> str | None:
    """Return the reason why this GPU cannot serve; None if it can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built for CPUs alone"
    if index >= _num_gpus():
        return f"torch sees {_num_gpus() or 'no'} GPU{'s' * (_num_gpus() > 1)}"
    if (capability := torch.cuda.get_device_capability(index)) < MIN_CAPABILITY:
        version, minimum = (".".join(map(str, number)) for number in (capability, MIN_CAPABILITY))
        return f"{torch.cuda.get_device_name(index)} is of compute capability {version}, expected {minimum} or more"
    if not find_spec("triton"):
        return "its kernels need triton: pip install '.[gpu]'"
    return None
