"""Time of transformers' `generate` for a batch, with PEFT's mixed batches if there are adapters.

A program for `tests.bench.serve_targets`: `python -m tests.bench.serve_batches DTYPE THREADS MODEL [ADAPTER …]` reads one batch a
line, JSON {"prompts", "adapters", "num_tokens"}, and writes {"seconds", "num_prompt", "num_tokens"}. Without ADAPTERs there is no
PEFT.
"""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def load(dtype: torch.dtype, folder: str, adapters: list[str]) -> Any:
    """Return the model, wrapped by PEFT if there are adapters. An adapter has the name of its folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if not adapters:
        return model.eval()
    # A late import: PEFT takes seconds to import, and plain `generate` does not need it.
    from peft import PeftModel  # noqa: PLC0415

    first, *others = map(Path, adapters)
    adapted = PeftModel.from_pretrained(model, str(first), adapter_name=key(first.name))
    for other in others:
        adapted.load_adapter(str(other), adapter_name=key(other.name))
    return adapted.eval().to(dtype)


def key(name: str) -> str:
    """Return PEFT's name for the adapter `name`. PEFT uses it as a module name, which must not have a dot."""
    return name.replace(".", "_")


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, batch: dict[str, Any]) -> dict[str, Any]:
    """Generate answers for a batch. Return the seconds from text to text, and the numbers of tokens."""
    names = [key(adapters[0]) if adapters else "__base__" for adapters in batch["adapters"]]
    mixed = {"adapter_names": names} if any(name != "__base__" for name in names) else {}
    started = time.perf_counter()
    inputs = tokenizer(batch["prompts"], return_tensors="pt", padding=True)
    with torch.inference_mode():
        ids = model.generate(
            **inputs, **mixed, max_new_tokens=batch["num_tokens"], min_new_tokens=batch["num_tokens"], do_sample=False
        )
    num_padded = inputs["input_ids"].shape[1]
    tokenizer.batch_decode(ids[:, num_padded:])
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "num_prompt": inputs["attention_mask"].sum(1).tolist(),
        "num_tokens": ids.shape[1] - num_padded,
    }


def main() -> None:
    """Answer batches until the end of standard input."""
    warnings.simplefilter("ignore")
    dtype, num_threads, folder, *adapters = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load(getattr(torch, dtype), folder, adapters)
    for line in sys.stdin:
        print(json.dumps(answer(model, tokenizer, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
