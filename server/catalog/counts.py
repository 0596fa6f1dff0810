"""What is counted by adapter, kept as lines of Prometheus's text: of ten thousand adapters they are told in milliseconds.

A label is the name of a registered adapter, never what a client sent.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

MAX_LISTED = 1000
"""Adapters up to which those that are not resident are listed too."""
REQUESTS = b"""\
# HELP lori:adapter_requests_total Admitted requests by adapter; one that names several counts for each.
# TYPE lori:adapter_requests_total counter
"""
TOKENS = b"""\
# HELP lori:adapter_tokens_total Tokens of ended requests by adapter; those of a request that names several count for each.
# TYPE lori:adapter_tokens_total counter
"""
RESIDENT = f"""\
# HELP lori:adapter_resident Whether the adapter is in the kernels' operands; of more than {MAX_LISTED} only those that are.
# TYPE lori:adapter_resident gauge
""".encode()


@dataclass(slots=True)
class _Count:
    label: str
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    requests: bytes = b""
    tokens: bytes = b""

    def write(self) -> None:
        self.requests = f"lori:adapter_requests_total{{{self.label}}} {self.num_requests}\n".encode()
        self.tokens = (
            f'lori:adapter_tokens_total{{{self.label},kind="prompt"}} {self.num_prompt_tokens}\n'
            f'lori:adapter_tokens_total{{{self.label},kind="generated"}} {self.num_generated_tokens}\n'
        ).encode()


class AdapterCounts:
    """Counts requests and tokens by adapter. For the event loop alone."""

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}
        self._changed: dict[str, _Count] = {}

    def admit(self, names: Iterable[str]) -> None:
        """Counts a request for these adapters."""
        for name in names:
            self._count(name).num_requests += 1

    def add_tokens(self, names: Iterable[str], num_prompt: int, num_generated: int) -> None:
        """Counts what a request for these adapters took and gave."""
        for name in names:
            count = self._count(name)
            count.num_prompt_tokens += num_prompt
            count.num_generated_tokens += num_generated

    def lines(self, registered: Collection[str], resident: Collection[str]) -> list[bytes]:
        """Returns all in Prometheus's format; only the lines that have changed are written again.

        Names that are registered no more are forgotten, also where they come again: to Prometheus that is a counter's new start.
        """
        for name in [name for name in self._counts if name not in registered]:
            del self._counts[name]
            self._changed.pop(name, None)
        for count in self._changed.values():
            count.write()
        self._changed.clear()
        counts = self._counts.values()
        names = registered if len(registered) <= MAX_LISTED else resident
        told = [f"lori:adapter_resident{{{label(name)}}} {int(name in resident)}\n".encode() for name in names]
        return [REQUESTS, *(of.requests for of in counts), TOKENS, *(of.tokens for of in counts), RESIDENT, *told]

    def _count(self, name: str) -> _Count:
        count = self._counts.get(name)
        if count is None:
            count = self._counts[name] = _Count(label(name))
        self._changed[name] = count
        return count


def label(name: str) -> str:
    """Returns the label of an adapter as Prometheus's text has it."""
    escaped = name.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'adapter="{escaped}"'
