"""Example replies of the API's description, by the name of the route."""

from typing import Any

VERSION = "2296fef96b2b"
TIMINGS = {"queue_s": 0.0004, "prefill_s": 0.031, "decode_s": 0.058, "time_to_first_token_s": 0.0314, "total_s": 0.0894}
ADAPTERS = [{"name": "intent", "version": VERSION, "weight": 1.0, "policy": False}]
LORI = {"adapter": ADAPTERS, "merge": {"method": "linear"}, "seed": 407701335, "timings": TIMINGS}
USAGE = {"prompt_tokens": 13, "completion_tokens": 3, "total_tokens": 16}
CREATED = 1767225600
BASE: dict[str, Any] = {
    "id": "SmolLM2-135M-Instruct",
    "object": "model",
    "created": CREATED,
    "owned_by": "lori-server",
    "root": "SmolLM2-135M-Instruct",
    "parent": None,
    "max_model_len": 8192,
}
MODEL = BASE | {"id": "intent", "root": f"intent@{VERSION}", "parent": BASE["id"]}
ADAPTER: dict[str, Any] = {
    "name": "intent",
    "version": VERSION,
    "rank": 32,
    "alpha": 64.0,
    "sparsity": 0.9,
    "density": 0.1,
    "templates": ["chat", "plain"],
    "merge_weights": {"safety": [1.0, 1.0]},
    "has_prompt_statistics": True,
    "metrics": {"exact": 0.848},
    "bytes_on_disk": 1340000,
    "bytes_loaded": 1340000,
    "bytes_resident": 2100000,
    "tier": "resident",
    "is_pinned": False,
    "num_using": 0,
    "last_used": CREATED + 0.5,
    "num_requests": 12,
}
MODULE: dict[str, Any] = {
    "module": "model.layers.0.self_attn.q_proj",
    "num_rows": 576,
    "num_entries": 18432,
    "num_kept": 1843,
    "density": 0.1,
    "empty_rows": 0.03,
    "max_abs": 0.021,
    "norm_b": 0.31,
    "norm_delta": 1.7,
}
DETAIL = ADAPTER | {
    "versions": [VERSION],
    "aliases": ["bank"],
    "card": "# intent\n\nNames a bank customer's intent.",
    "targets": ["q_proj"],
    "basis": "seeded, stream 0",
    "modules": [MODULE],
    "total": MODULE | {"module": "all"},
}
MERGE = {
    "name": "bank-safe",
    "adapters": [
        {"name": "intent", "version": VERSION, "weight": 0.9},
        {"name": "safety", "version": "77041cc00657", "weight": 0.7},
    ],
    "about": "by hand",
    "missing": [],
}
WITHDRAWN = {"name": "intent", "versions": [VERSION], "num_using": 0}
REPLIES: dict[str, Any] = {
    "generate": {
        "id": "gen-53ad4e5b230e22f6",
        "text": " card arrival",
        "adapter": ADAPTERS,
        "merge": {"method": "linear"},
        "template": None,
        "finish_reason": "stop",
        "usage": USAGE | {"cached_tokens": 0},
        "timings": TIMINGS,
        "seed": 407701335,
        "logprobs": None,
        "choices": None,
    },
    "completions": {
        "id": "cmpl-gen-53ad4e5b230e22f6",
        "object": "text_completion",
        "created": CREATED,
        "model": "intent",
        "choices": [{"index": 0, "text": " card arrival", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE | {"prompt_tokens_details": {"cached_tokens": 0}},
        "lori": LORI,
    },
    "chat_completions": {
        "id": "chatcmpl-gen-53ad4e5b230e22f6",
        "object": "chat.completion",
        "created": CREATED,
        "model": "intent",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "card arrival"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE | {"prompt_tokens_details": {"cached_tokens": 0}},
        "lori": LORI,
    },
    "models": {"object": "list", "data": [BASE, MODEL]},
    "model": MODEL,
    "tokenize": {"count": 4, "max_model_len": 8192, "tokens": [504, 2365, 6354, 16438], "token_strs": None},
    "detokenize": {"prompt": "The quick brown fox"},
    "list_adapters": {"base_model": BASE["id"], "adapters": [ADAPTER], "default_merge": "auto", "next": None},
    "show_adapter": DETAIL,
    "compare": {
        "names": ["math", "safety"],
        "cosine": [[1.0, 0.02], [0.02, 1.0]],
        "overlap": [[1.0, 0.31], [0.31, 1.0]],
        "sign_conflict": [[0.0, 0.49], [0.49, 0.0]],
        "chance_overlap": [[0.1, 0.1], [0.1, 0.1]],
        "auto_weight": [[1.0, 0.0], [0.0, 1.0]],
    },
    "publish": ADAPTER,
    **dict.fromkeys(("show_merge", "publish_merge", "delete_merge"), MERGE),
    "delete": WITHDRAWN,
    "unload": WITHDRAWN,
    **dict.fromkeys(("set_alias", "load", "pin", "unpin"), ADAPTER),
    "load_lora_adapter": "Success: LoRA adapter 'intent' added successfully.",
    "unload_lora_adapter": "Success: LoRA adapter 'intent' removed successfully.",
    "health": {"status": "ok"},
    "ping": {"status": "ok"},
    "version": {"version": "0.1.0"},
    "ready": {"status": "ready"},
}
