"""What a layer does beside its products on a GPU: as in torch, but tokens that decode attend in Triton.

Nothing here waits for the device. Shapes: T tokens of a step, B of them decode, L keys of a chunk, N blocks.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from lori.device import to_device
from server.engine.model import paged_attention
from server.engine.model.decoder import Heads
from server.engine.model.decoding_inputs import Decoding
from server.engine.model.spans import Span
from server.engine.model.torch_ops import ChunkKeys, Step, TorchOps


class GpuOps(TorchOps):
    """Has one block more than asked for, `spare_block`, which is no sequence's: a row that pads a step writes its key there."""

    def __init__(
        self, heads: Sequence[Heads], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(heads, num_blocks + 1, block_size, dtype, device)
        self.spare_block = num_blocks

    def plan(self, spans: Sequence[Span]) -> object:
        """Returns the step of `spans`, those of one token first, for `attend`."""
        num_decoding = next((i for i, span in enumerate(spans) if span.num_tokens > 1), len(spans))
        decoding, chunks = spans[:num_decoding], spans[num_decoding:]
        firsts = [*accumulate((len(span.blocks) for span in decoding), initial=0)]
        write = self._upload([self._place(span, i) for span in spans for i in range(span.num_tokens)]).long()
        return Step(
            write=write,
            num_decoding=num_decoding,
            decoding=Decoding(
                write=write[:num_decoding],
                starts=self._upload(firsts[:-1]),
                lengths=self._upload([span.position + 1 for span in decoding]),
                table=self._upload([block for span in decoding for block in span.blocks]),
            ),
            chunks=tuple(ChunkKeys(span.row, span.num_tokens, self._keys(span)) for span in chunks),
        )

    def step_of(self, decoding: Decoding) -> object:
        """See `ReplayableOps`."""
        return Step(write=decoding.write, num_decoding=len(decoding.write), decoding=decoding)

    def _decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decoding: object, heads: Heads
    ) -> torch.Tensor:
        assert isinstance(decoding, Decoding)
        return paged_attention.attend(query.contiguous(), keys, values, decoding, heads, self.block_size)

    def _keys(self, span: Span) -> torch.Tensor:
        # (L,) int64, where the tokens up to the span's last lie.
        num_keys = span.position + span.num_tokens
        blocks = self._upload(span.blocks[: -(-num_keys // self.block_size)]).long()
        places = blocks[:, None] * self.block_size + torch.arange(self.block_size, device=self._device)
        return places.flatten()[:num_keys]

    def _place(self, span: Span, token: int) -> int:
        block, within = divmod(span.position + token, self.block_size)
        return span.blocks[block] * self.block_size + within

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int32), self._device)
