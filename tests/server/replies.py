"""Prompts for the tests' servers, and the errors that they reply."""

from typing import Any

import httpx

FOX = "The quick brown fox jumps over the lazy dog. "
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 times 7?"}]
FOR_EVER = 4000
"""Tokens with the prompt. They take a tiny model seconds, and half of the server's KV memory."""
USAGE = "vllm:kv_cache_usage_perc"


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a reply. Fail unless the reply has `status` and the shape of every error."""
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return error
