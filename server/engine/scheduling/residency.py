"""What the scheduler asks of whoever keeps adapters resident. Contract only; neither files nor kernels."""

from typing import Literal, Protocol

from server.engine.request import Sequence

Residency = Literal["ready", "loading", "full"]


class ResidencyGate(Protocol):
    """Keeps the adapters of running sequences in their slots.

    Every sequence is asked about from the moment its turn comes, and again in every plan but where it `is_behind`, until it hears
    "ready".
    The gate holds something for a sequence whose last answer was "ready" or "loading", and nothing after "full".
    """

    def pin(self, sequence: Sequence) -> Residency:
        """Says whether a sequence's adapters (`request.residents`) are there. Returns at once.

        "ready": they are, and stay until `unpin`; the sequence runs now. "loading": they are being read; the sequence waits
        alone, others pass. "full": there is no room, for what is resident is held for others: nobody may pass, but those that
        heard "loading" before. So it must not be said while nothing is held for anybody.
        """
        ...

    def is_behind(self, sequence: Sequence) -> bool:
        """Whether `pin` would say "loading" now, and hold no more than it does: as many adapters are read as may be, and one of
        its own is not among them. Then it need not be asked."""
        ...

    def unpin(self, sequence: Sequence) -> None:
        """Lets go of what is held for a sequence.

        Called once after "ready", when the sequence ends or is preempted (then `pin` asks anew, later), and once after
        "loading", if the sequence is dropped before it hears anything else. Never after "full", and never twice.
        """
        ...
