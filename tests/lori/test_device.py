"""Devices by name. The GPUs are faked, so no test needs one."""

import pytest
import torch

from lori.base_model import default_dtype, resolve_dtype
from lori.device import copy_to_device, device_name, resolve_device, to_device
from lori.errors import DeviceError, LoriError

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], has_triton: bool = True) -> None:
    """Fake GPUs of these capabilities for torch."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr("lori.device.find_spec", lambda _: object() if has_triton else None)


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert resolve_device("auto") == resolve_device("cpu") == CPU


def test_with_a_gpu_auto_is_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), (9, 0))
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu") == CPU
    assert device_name(resolve_device("cuda:1")) == "cuda:1 (Some GPU)"
    assert device_name(CPU) == "cpu"


def test_auto_passes_over_gpus_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 5), (8, 0))
    assert resolve_device("auto") == torch.device("cuda", 1)
    pretend(monkeypatch, (7, 5))
    assert resolve_device("auto") == CPU
    pretend(monkeypatch, (9, 0), has_triton=False)
    assert resolve_device("auto") == CPU


@pytest.mark.parametrize(
    ("name", "capabilities", "message"),
    [
        ("gpu", [(9, 0)], "--device gpu: expected auto, cpu, cuda or cuda:N"),
        ("cuda:-1", [(9, 0)], "--device cuda:-1: expected auto, cpu, cuda or cuda:N"),
        ("cuda", [], "--device cuda: torch sees no GPU; pass --device cpu"),
        ("cuda:1", [(9, 0)], "--device cuda:1: torch sees 1 GPU; pass --device cpu, or one that is there"),
        ("cuda:2", [(9, 0)] * 2, "--device cuda:2: torch sees 2 GPUs; "),
        ("cuda", [(7, 5)], r"--device cuda: Some GPU is of compute capability 7.5, expected 8.0 or more; pass --device cpu"),
    ],
)
def test_an_unavailable_device_is_refused(
    name: str, capabilities: list[tuple[int, int]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, *capabilities)
    with pytest.raises(DeviceError, match=message):
        resolve_device(name)
    assert issubclass(DeviceError, LoriError)


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), has_triton=False)
    with pytest.raises(DeviceError, match=r"its kernels need triton: pip install '\.\[gpu\]'"):
        resolve_device("cuda")


def test_a_cpu_build_of_torch_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(DeviceError, match=r"this torch \(.+\) is built for CPUs alone; pass --device cpu"):
        resolve_device("cuda")


def test_every_gpu_that_serves_computes_in_bf16() -> None:
    assert default_dtype(torch.device("cuda", 0)) is torch.bfloat16
    assert resolve_dtype("auto", torch.device("cuda", 0)) is torch.bfloat16
    assert resolve_dtype("float32", torch.device("cuda", 0)) is torch.float32


def test_copies_to_the_cpu_are_complete_on_return() -> None:
    tensor, target = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    assert to_device(tensor, CPU).tolist() == [0, 1, 2]
    copy_to_device(tensor, target)
    tensor += 1
    assert target.tolist() == [0, 1, 2]
