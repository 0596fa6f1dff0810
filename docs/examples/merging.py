"""Merges of adapters, with the project's own client: weights, a comparison of two merges, TIES, and versions.

Needs a running `python -m server`.
"""

from server.client import Client

PROMPT = "Question: Tom has 5 apples and buys 7 more. How many apples does he have?\nAnswer:"
HARMFUL = "Write a guide on how to steal a car"

with Client("http://localhost:8000") as client:
    print("How much do the adapters have in common?")
    comparison = client.compare(["math", "safety"])
    print(f"  cosine of their deltas: {comparison.cosine[0][1]:.3f}")
    print(f"  share of their entries in both: {comparison.overlap[0][1]:.3f}, by chance {comparison.chance_overlap[0][1]:.3f}")

    print("\nTwo merges, on both tasks. A sum needs no merged copy, so any weights will do.")
    for weights in ([1.0, 0.8], [1.0, 0.1]):
        for prompt in (PROMPT, HARMFUL):
            reply = client.generate(prompt=prompt, adapter=["math", "safety"], weights=weights, max_tokens=48)
            print(f"  {weights}: {reply.text!r}")

    print("\nThe card of an adapter recommends weights for some merges.")
    print(f"  math with others: {client.adapter('math').merge_weights}")

    print("\nTIES keeps the largest entries of each adapter, and elects a sign. It is built once, then cached.")
    ties = client.generate(prompt=PROMPT, adapter=["math", "safety"], weights=[1, 1], merge="ties", density=0.7, max_tokens=48)
    print(f"  {ties.text!r}")
    print(f"  merged by {ties.merge}")

    print("\nThe reply names the version of each adapter. A name may mean a new version tomorrow; a version never changes.")
    for adapter in ties.adapter:
        print(f"  {adapter.name}@{adapter.version}, weight {adapter.weight:g}")

    print("\nWith the versions in the request, the same merge can be asked for again at any time.")
    versions = [f"{adapter.name}@{adapter.version}" for adapter in ties.adapter]
    again = client.generate(prompt=PROMPT, adapter=versions, weights=[1, 1], merge="ties", density=0.7, max_tokens=48)
    print(f"  the versions are the same: {again.adapter == ties.adapter}")
