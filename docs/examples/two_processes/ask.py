"""Requests through a router to two servers, which stay with the server that has their adapters; and a change at both servers."""

import os

from openai import OpenAI

from server.client import Client

KEY = os.environ["LORI_API_KEY"]
PROMPT = "Question: What is 2 + 3?\nAnswer:"

router = OpenAI(base_url="http://localhost:8000/v1", api_key=KEY)
one, two = (Client(url, api_key=KEY) for url in ("http://localhost:8001", "http://localhost:8002"))


def ask(*names: str) -> str:
    """Return the answer of a merge. The header's value is hashed to choose the server: it names the adapters, sorted."""
    reply = router.completions.create(
        model="+".join(names), prompt=PROMPT, temperature=0, extra_headers={"X-Session-ID": "+".join(sorted(names))}
    )
    return reply.choices[0].text


def num_requests(server: Client) -> int:
    """Return how many requests a server has had for its adapters. A merge counts for each of its adapters."""
    return sum(adapter.num_requests or 0 for adapter in server.adapters().adapters)


print("Publish an adapter at one server. The other one has the same store, and reads it there when it is told to.")
published = one.upload("sums", "server/adapters/math")
loaded = two.load("sums")
print(f"  sums@{published.version} at the first server, sums@{loaded.version} at the second")

print("\nFour requests for each set of adapters, through the router: all four reach the same server.")
for names in (["math"], ["safety"], ["intent"], ["math", "safety"], ["sums"]):
    before = [num_requests(server) for server in (one, two)]
    texts = {ask(*names) for _ in range(4)}
    answered = [(num_requests(server) - count) // len(names) for server, count in zip((one, two), before, strict=True)]
    print(f"  {'+'.join(names)}: {answered[0]} at the first server, {answered[1]} at the second, answers {texts}")
