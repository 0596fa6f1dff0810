"""How requests are framed, over a socket: each is answered once, or refused and its connection closed."""

import pytest

from tests.server.framing import CASES, WAYS, Case, ask, check
from tests.server.live import Live


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_request_is_answered_once_or_refused(live: Live, case: Case, way: str) -> None:
    check(case, ask(live.port, case, way))
