"""Where an adapter is, and what it takes there. Plain values."""

from dataclasses import dataclass
from typing import Literal

Tier = Literal["disk", "loaded", "resident"]


class NoRoomError(Exception):
    """So much would be kept resident that too little is left for others."""


@dataclass(frozen=True, slots=True)
class Place:
    """What an adapter takes in each tier, in bytes; 0 where it is not there."""

    bytes_loaded: int = 0
    bytes_resident: int = 0

    @property
    def tier(self) -> Tier:
        """The highest in which it is."""
        return "resident" if self.bytes_resident else "loaded" if self.bytes_loaded else "disk"
