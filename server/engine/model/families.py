"""Conversion of a transformers model to a `Decoder`: the role of each module in each model family. Unknown models are refused."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lori.errors import ModelError
from lori.pool import AdapterPool
from lori.projection import Projection, Quantization, project
from server.engine.model.decoder import Decoder, Heads, Layer, Norm, Rotary

GEMMA = ("gemma2", "gemma3_text")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *GEMMA)
"""The supported values of `model_type`."""
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
DYNAMIC_ROPE = ("dynamic", "longrope")
"""RoPE types that depend on the current length of a sequence. They would invalidate cached keys."""


def check_family(model: PreTrainedModel) -> None:
    """Raise `ModelError` with the reasons if `model` is not supported."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise ModelError(f"models of type {config.model_type!r} are not served, expected one of {', '.join(FAMILIES)}")
    faults = []
    activation = _activation_name(config)
    if activation not in ACTIVATIONS:
        faults.append(f"activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    ropes = config.rope_parameters
    for rope in ropes.values() if all(isinstance(value, dict) for value in ropes.values()) else [ropes]:
        if rope.get("rope_type") in DYNAMIC_ROPE:
            faults.append(f"rope type {rope['rope_type']!r}, expected one that does not depend on a sequence's length")
    if getattr(config, "use_bidirectional_attention", False):
        faults.append("attention to later tokens")
    if faults:
        raise ModelError(f"this {config.model_type} model is not served: {'; '.join(faults)}")


def read_decoder(model: PreTrainedModel, pool: AdapterPool, quantization: Quantization | None = None) -> Decoder:
    """Return the decoder of a `model` that passes `check_family`. Takes the layers' weights out of `model`, one layer at a time.

    Quantizes the layers' weights if asked to, but not the embeddings and the output layer. Raises `ModelError` if a weight cannot
    be quantized.
    """
    config: Any = model.config
    body: Any = model.model
    layers = []
    for number in range(len(body.layers)):
        layers.append(_layer(body.layers[number], f"model.layers.{number}", config, number, pool, quantization))
        body.layers[number] = nn.Identity()  # the layer's weights are in the products now
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return Decoder(
        embed=body.embed_tokens,
        rotary=_make_rotary(body.rotary_emb, config),
        layers=layers,
        norm=_norm(body.norm, config),
        head=project([head]),
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
    )


def head_size(model: PreTrainedModel) -> int:
    """Return the size of an attention head."""
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _layer(layer: Any, name: str, config: Any, number: int, pool: AdapterPool, quantization: Quantization | None) -> Layer:
    is_gemma = config.model_type in GEMMA

    def product(owner: str, *names: str) -> Projection:
        full = [f"{name}.{owner}.{child}" for child in names]
        linears = [getattr(getattr(layer, owner), child) for child in names]
        return project(linears, pool.blocks(full), pool.operands_of(full), quantization)

    return Layer(
        attention_norm=_norm(layer.input_layernorm, config),
        qkv=product("self_attn", "q_proj", "k_proj", "v_proj"),
        heads=_heads(layer.self_attn, config, number),
        rope=_rope_name(config, number),
        output=product("self_attn", "o_proj"),
        attention_output_norm=_norm(layer.post_attention_layernorm, config) if is_gemma else None,
        mlp_norm=_norm(layer.pre_feedforward_layernorm if is_gemma else layer.post_attention_layernorm, config),
        gate_up=product("mlp", "gate_proj", "up_proj"),
        num_inner=layer.mlp.gate_proj.out_features,
        activation=ACTIVATIONS[_activation_name(config)],
        down=product("mlp", "down_proj"),
        mlp_output_norm=_norm(layer.post_feedforward_layernorm, config) if is_gemma else None,
    )


def _heads(attention: Any, config: Any, number: int) -> Heads:
    types = _layer_types(config)
    has_window = config.model_type == "mistral" or (bool(types) and types[number] == "sliding_attention")
    return Heads(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=attention.head_dim,
        scale=attention.scaling,
        window=(getattr(config, "sliding_window", None) or 0) if has_window else 0,
        softcap=(config.attn_logit_softcapping or 0.0) if config.model_type == "gemma2" else 0.0,
        query_norm=_norm(attention.q_norm, config) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm, config) if hasattr(attention, "k_norm") else None,
    )


def _norm(norm: Any, config: Any) -> Norm:
    weight = norm.weight.detach().float()
    is_gemma = config.model_type in GEMMA  # Gemma stores weight - 1
    return Norm(weight=1.0 + weight if is_gemma else weight.clone(), epsilon=config.rms_norm_eps)


def _make_rotary(embedding: nn.Module, config: Any) -> Callable[[torch.Tensor], Mapping[str, Rotary]]:
    names = sorted({_rope_name(config, number) for number in range(config.num_hidden_layers)})

    def compute(positions: torch.Tensor) -> Mapping[str, Rotary]:
        like = torch.empty(0, device=positions.device)  # fp32, whatever the model's dtype is
        tables = {}
        for name in names:
            cosine, sine = embedding(like, positions[None], name) if name else embedding(like, positions[None])
            tables[name] = (cosine[0].contiguous(), sine[0].contiguous())
        return tables

    return compute


def _rope_name(config: Any, number: int) -> str:
    # Only Gemma 3 has RoPE tables by layer type.
    return _layer_types(config)[number] if config.model_type == "gemma3_text" else ""


def _layer_types(config: Any) -> Sequence[str]:
    return getattr(config, "layer_types", None) or ()


def _activation_name(config: Any) -> str:
    return str(config.hidden_activation if config.model_type in GEMMA else config.hidden_act)
