"""How a step's results come from the device: together, so that it is waited for once."""

from collections.abc import Sequence as Items

import torch


def read_back(tensors: Items[torch.Tensor]) -> list[list[list[float]]]:
    """Returns the rows of each of these (P, N) tensors of one device; integers up to 2**53 are exact.

    It waits for the device once, and not at all where there is nothing in them.
    """
    parts = [tensor.reshape(-1).double() for tensor in tensors if tensor.numel()]
    numbers: list[float] = torch.cat(parts).tolist() if parts else []
    found, at = [], 0
    for tensor in tensors:
        num_rows, width = tensor.shape
        found.append([numbers[at + row * width : at + (row + 1) * width] for row in range(num_rows)])
        at += num_rows * width
    return found
