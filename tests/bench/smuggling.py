"""Request smuggling: checks that no client gets another client's answer while others send malformed requests.

Victims send requests with unique texts and compare the answers. Run it against a running server or cluster without keys:

    python -m tests.bench.smuggling http://127.0.0.1:8000 --seconds 600
"""

import argparse
import itertools
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx

from tests.server.framing import CASES, OFFERS, WAYS, Case, ask, head, sized

NUM_VICTIMS, NUM_ATTACKERS = 4, 3
PAUSE_S = 0.05
SILENCE_S = 0.3
"""Seconds of silence after which an attacker goes on, since a server does not answer a request that it takes for incomplete."""
SLOW = b'{"prompt": "Tell me a story", "max_tokens": 48, "ignore_eos": true}'
INNER = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + sized(SLOW)
SLOW_CASES = [
    Case(f"a slow request as body, {name}", head(offer) + sized(INNER), frozenset({400})) for name, offer in OFFERS.items()
]
"""Malformed requests whose bodies are slow requests. If a body were taken for a request, its answer would arrive when the proxy
has already given the connection to another client."""


class Soak:
    """Victims and attackers that run for a given time, and counts of the victims' answers."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url, self._end = httpx.URL(url), time.monotonic() + seconds
        self.answers: Counter[str] = Counter()
        self.num_attacks = 0

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._end

    def ask(self, number: int) -> None:
        """Send requests with unique texts on a kept connection, and compare the answers."""
        with httpx.Client(base_url=self._url, timeout=60) as client:
            for i in itertools.count():
                if self.is_over:
                    return
                text = f"victim {number} asks {i} of this"
                reply = client.post("/tokenize", json={"prompt": text, "return_token_strs": True, "add_special_tokens": False})
                is_own = reply.status_code == 200 and "".join(reply.json().get("token_strs", ())).replace("Ġ", " ") == text
                self.answers["own" if is_own else f"other: {reply.status_code} {reply.text[:200]}"] += 1
                time.sleep(PAUSE_S)

    def attack(self, index: int) -> None:
        """Send every malformed request in every way, repeatedly, with slow ones after each."""
        attacks = [
            attack for pair in itertools.product(CASES, WAYS) for attack in (pair, *((slow, "cut") for slow in SLOW_CASES))
        ]
        for case, way in itertools.cycle(attacks[index::NUM_ATTACKERS]):
            if self.is_over:
                return
            with suppress(OSError):
                ask(self._url.port or 80, case, way, limit_s=SILENCE_S)
            self.num_attacks += 1


def main() -> int:
    """Run victims and attackers and print the victims' answers. Returns 1 if a victim got a foreign answer, or there are none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    soak = Soak(arguments.url, arguments.seconds)
    with ThreadPoolExecutor(NUM_VICTIMS + NUM_ATTACKERS) as pool:
        running = [pool.submit(soak.ask, number) for number in range(NUM_VICTIMS)]
        running += [pool.submit(soak.attack, index) for index in range(NUM_ATTACKERS)]
    for task in running:
        task.result()
    foreign = soak.answers.total() - soak.answers["own"]
    print(f"{soak.num_attacks} unsound requests; {soak.answers.total()} answers to victims, {foreign} of them not their own")
    for answer, count in soak.answers.most_common():
        if answer != "own":
            print(f"{count:6} {answer}")
    return int(foreign > 0 or not soak.answers)


if __name__ == "__main__":
    sys.exit(main())
