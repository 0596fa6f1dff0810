"""Models of the shapes of larger ones, with random weights, for benchmarks at temperature 0.

    python -m tests.bench.random_model Llama-3.2-1B FOLDER
    python -m tests.bench.serve --model FOLDER

Shapes are those of the models' config.json on the hub. The tokenizer is the embedded model's. It has fewer tokens than the shape:
the rows of the others are zero, so that greedy answers do not contain them.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lori.embedded import embedded_model

SHARED = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.2-1B": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "vocab_size": 128256},
    ),
    "Qwen3-4B": (
        "qwen3",
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128, "vocab_size": 151936},
    ),
}
"""By name: the family, and what its config has beside `SHARED`."""


def write_model(name: str, folder: Path, changes: Mapping[str, int] | None = None) -> None:
    """Write a model of the shape `name` in bf16, with its tokenizer, into `folder`. `changes` replaces values of its config."""
    family, shape = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(family, max_position_embeddings=8192, **SHARED | shape | special | (changes or {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[len(tokenizer) :] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_model(arguments.name, arguments.folder)


if __name__ == "__main__":
    main()
