"""Hooks of schemathesis, which loads this module by SCHEMATHESIS_HOOKS: changes of its requests, and checks of the replies."""

import json
import os
import re
import zlib
from typing import Any

import schemathesis

NAMES = ("math", "safety", "intent")
MODELS = ("tiny", *NAMES, "math+safety", "math:0.7+safety:-0.3")
ALIAS = "-alias"
"""The suffix of adapter names that the fuzzed requests create and delete."""
MERGEABLE = json.loads(os.environ["FUZZED_MERGE"])
"""The base's digest, and references of the server's adapters, which named merges need."""
NUM_TOKENS = 257
MAX_TOKENS = 8
CONTENT = re.compile(
    "|".join(
        (
            # Fields that exclude each other. JSON Schema could express that, at the cost of a readable schema.
            "'density' is for",
            "'merge_seed' is for",
            "'weights' (is for|needs)",
            "'template' is for",
            "'stream_options' is for",
            "'top_logprobs' needs",
            "'best_of' is",
            "found both",
            "is beside the (model|weights)",
            "ignore_eos: cannot stand beside",
            "max_tokens: is 0 without echo",
            # Values that would be right for another model, tokenizer, template or store.
            "exceeds the context",
            "and the context holds",
            "expected 0 to",
            "is empty",
            "the chat template refuses",
            "no common template",
            "the base has no background",
            "needs adapters on one basis",
            "without adapters, which it would merge",
            "has [0-9]+ (numbers|names)",
            "twice",
            "has the weight",
            "has [0-9]+ weights for",
            "names [0-9]+ adapters",
            "no --hub|start it with --hub",
            "is no adapter's name|has the version",
            "expected the name of an adapter in the server's store",
            "has already been loaded",
            "needs to be provided|must be provided",
            "expected false: no adapter here",
            "it is of another base|weight times the largest block weight|decimal places",
            "reference: there is no .*@",
            # An integer of JSON Schema that does not fit in 64 bits.
            "valid integer, found -?[0-9.]+e",
            # The values with which schemathesis tests a length do not match the pattern.
            "^(hub_id|revision): String should match pattern",
            # JSON Schema describes a schema, a regular expression or a grammar only as a string.
            "that an answer could follow",
            "surrogate pair",
            # JSON Schema describes a form's files only as bytes.
            "^(config|weights|card|name|body)",
            "adapter_config",
        )
    )
)


@schemathesis.hook
def before_call(_: schemathesis.HookContext, case: schemathesis.Case, __: dict[str, Any]) -> None:
    """Change most requests that fit the schema so that this server can answer them soon. Otherwise most name unknown adapters."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    body, is_unchanged = case.body, _hash((case.body, case.query, case.path_parameters)) % 4 == 0
    if isinstance(body, dict) and body.get("timeout_s"):
        body["timeout_s"] = max(60, body["timeout_s"])  # a 504 is right if the client's own timeout is too short
    if case.method == "DELETE" and case.path_parameters.get("name") in NAMES:
        case.path_parameters["name"] += ALIAS  # or no adapter would be left soon
    if is_unchanged:
        return
    if case.path.startswith("/merges"):
        if isinstance(body, dict):
            _make_publishable(body)
        return
    if case.path.endswith("/alias"):
        case.path_parameters["name"] = _pick(NAMES, case.path_parameters["name"]) + ALIAS
    elif case.path_parameters.get("name") and case.method != "DELETE" and not case.path.endswith("/unload"):
        case.path_parameters["name"] = _pick(NAMES, case.path_parameters["name"])
    if case.query.get("names"):
        case.query["names"] = ",".join(NAMES[: 1 + _hash(case.query["names"]) % len(NAMES)])
    if isinstance(body, dict) and "lora_name" not in body:
        _make_answerable(body)


def _make_publishable(merge: dict[str, Any]) -> None:
    merge["base_digest"] = MERGEABLE["base_digest"]
    pairs = zip(merge["adapters"], MERGEABLE["references"], strict=False)
    merge["adapters"] = [adapter | {"reference": reference} for adapter, reference in pairs]


def _make_answerable(body: dict[str, Any]) -> None:
    if body.get("model") is not None:
        body["model"] = _pick(MODELS, body["model"])
    for field in ("adapter", "adapters"):
        if isinstance(body.get(field), str):
            body[field] = _pick(NAMES, body[field])
        elif body.get(field):
            named = zip(body[field], NAMES, strict=False)
            body[field] = [item | {"name": name} if isinstance(item, dict) else name for item, name in named]
    for field in ("max_tokens", "max_completion_tokens", "min_tokens"):
        if body.get(field):
            body[field] = body[field] % MAX_TOKENS + 1
    for field in ("prompt", "tokens"):
        if field in body:
            body[field] = _tokens(body[field])
    for field in _unfit(body):
        body.pop(field, None)


def _unfit(body: dict[str, Any]) -> set[str]:
    # Fields for which the body would be refused because of its other fields.
    merge = body.get("merge")
    unfit = {"logit_bias", "weights", "best_of", "grammar" if body.get("ignore_eos") else "ignore_eos"}
    unfit |= {"density"} if merge == "linear" else set()
    unfit |= {"merge_seed"} if merge not in ("dare_linear", "dare_ties") else set()
    unfit |= set() if body.get("adapter") or body.get("adapters") else {"merge", "density", "merge_seed"}
    unfit |= set() if body.get("stream") else {"stream_options"}
    unfit |= set() if body.get("logprobs") else {"top_logprobs"}
    return unfit | ({"template"} if "prompt" in body else set())


def _tokens(value: Any) -> Any:
    if isinstance(value, list):
        return [_tokens(item) for item in value]
    return int(value) % NUM_TOKENS if isinstance(value, int | float) else value


def _pick(names: tuple[str, ...], value: object) -> str:
    return names[_hash(value) % len(names)]


def _hash(value: object) -> int:
    return zlib.crc32(repr(value).encode("utf-8", "backslashreplace"))


@schemathesis.check
def a_request_that_fits_the_schema_is_refused_only_for_its_content(
    _: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Check that a 400 to a request that fits the schema has a reason that no schema can express."""
    if response.status_code == 400 and case.meta is not None and case.meta.generation.mode.is_positive:
        message = response.json()["error"]["message"]
        assert CONTENT.search(message), f"a reason that the schema should express: {message}"


@schemathesis.check
def every_refusal_has_the_shape_of_errors(
    _: schemathesis.CheckContext, response: schemathesis.Response, __: schemathesis.Case
) -> None:
    """Check that every refusal has the same shape."""
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["code"] == response.status_code
        assert error["message"]
        assert isinstance(error["type"], str)
