"""The prompt probe: features of prompts, computed by the base's first layers alone (`lori.prompt_statistics`).

It has KV memory of its own, which holds the prompts of one pass and is written again by the next one. A prompt's features do not
depend on the prompts beside it. Shapes: T tokens of a pass, D width, F features.
"""

from collections.abc import Sequence as Items
from dataclasses import replace

import torch

from lori.device import to_device
from lori.gaussians import Array
from lori.prompt_statistics import MAX_PROBED_TOKENS, ProbedPrompt, num_probe_layers, project, projection_matrix
from server.engine.model.decoder import Decoder, ForwardContext, Span
from server.engine.model.runner import make_ops, on_device

MAX_TOKENS, MAX_PROMPTS = MAX_PROBED_TOKENS, 64
"""Tokens and prompts of one pass."""
BLOCK_SIZE = 16
NUM_BLOCKS = 2 * MAX_TOKENS // BLOCK_SIZE
"""Blocks of KV memory. Each prompt begins a block of its own, so that up to 15 tokens of each last block are unused."""


class PromptProbe:
    """The first layers of `decoder`, with their own KV memory."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, device: torch.device) -> None:
        num_layers = num_probe_layers(len(decoder.layers))
        self._norm = decoder.layers[num_layers].attention_norm if num_layers < len(decoder.layers) else decoder.norm
        self._decoder = replace(decoder, layers=decoder.layers[:num_layers])
        self._device = device
        self._ops = make_ops(self._decoder, NUM_BLOCKS, BLOCK_SIZE, dtype, device)
        self._projection = projection_matrix(len(self._norm.weight))

    @property
    def num_bytes(self) -> int:
        """Size of the KV memory, in bytes."""
        return self._ops.num_bytes

    @torch.inference_mode()
    def features(self, prompts: Items[ProbedPrompt]) -> list[Array]:
        """Return the features (F,) of at most `MAX_PROMPTS` prompts, which have at most `MAX_TOKENS` tokens together."""
        assert len(prompts) <= MAX_PROMPTS
        spans, row, block = [], 0, 0
        for prompt in prompts:
            num_blocks = -(-len(prompt.ids) // BLOCK_SIZE)
            spans.append(Span(row, len(prompt.ids), 0, range(block, block + num_blocks)))
            row, block = row + len(prompt.ids), block + num_blocks
        assert row <= MAX_TOKENS
        assert block <= NUM_BLOCKS
        ids = [i for prompt in prompts for i in prompt.ids]
        positions = [position for prompt in prompts for position in range(len(prompt.ids))]
        with on_device(self._device):
            stream = self._decoder.embed(self._upload(ids))
            context = ForwardContext(rotary=self._decoder.rotary(self._upload(positions)), step=self._ops.plan(spans))
            stream, added = self._ops.run(self._decoder.layers, stream, context)
            x = self._ops.norm(stream, added, self._norm)  # (T, D)
        rows = x.double().cpu().numpy()
        # Each prompt is projected by itself, so that the shapes, and so the rounding, are the same in any pass.
        return [
            project(rows[span.row : span.row + span.num_tokens], prompt, self._projection)
            for span, prompt in zip(spans, prompts, strict=True)
        ]

    def _upload(self, numbers: Items[int]) -> torch.Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64), self._device)
