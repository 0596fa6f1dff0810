"""Records functions as CUDA graphs."""

from collections.abc import Callable

import torch

NUM_WARM_UPS = 2
"""Runs before a recording: kernels are compiled and loaded, libraries take their memory."""


class CudaGraphs:
    """Graphs of one device that share their memory: each uses what the others left there, so what one computes in it is gone with
    the next. They run on the current stream, one by one. Once all are gone their memory is, and no more can be recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Runs `function` a few times, records it, and returns its replay. It must not wait for the device."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile, and what they ask of the device is none of this graph's.
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay
