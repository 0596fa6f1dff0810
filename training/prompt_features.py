"""Features of prompts, computed by the base model in training: what the server's probe computes, see `lori.prompt_statistics`."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lori.base_model import BaseModel
from lori.gaussians import Array
from lori.prompt_statistics import ProbedPrompt, num_probe_layers, probed_prompt, project, projection_matrix
from lori.template import Message
from training.packing import ATTENTION, use_attention


class _FeaturesReadError(Exception):
    """The layers whose output is needed are done; the rest of the forward pass is left out."""


def prompt_features(base: BaseModel, prompts: Sequence[str | Sequence[Message]]) -> Array:
    """Return the features (P, F) of prompts. Raises `TemplateError` if the base's chat template refuses one."""
    probed = [probed_prompt(base.tokenizer, prompt) for prompt in prompts]
    projection = projection_matrix(base.model.config.get_text_config().hidden_size)
    norm = _norm(base.model.get_decoder())
    bar = tqdm(probed, unit="prompt", desc="features of prompts", disable=None)
    # The attention of training needs the positions of its examples in a batch.
    is_packed = base.model.config._attn_implementation == ATTENTION
    with use_attention(base.model, "sdpa") if is_packed else nullcontext():
        return np.stack([_features(base, norm, prompt, projection) for prompt in bar])


def _norm(decoder: Any) -> nn.Module:
    # The norm whose output the next layer's attention reads, or after the last layer the final one.
    layers, num_probed = decoder.layers, num_probe_layers(len(decoder.layers))
    norm: nn.Module = layers[num_probed].input_layernorm if num_probed < len(layers) else decoder.norm
    return norm


@torch.inference_mode()
def _features(base: BaseModel, norm: nn.Module, prompt: ProbedPrompt, projection: Array) -> Array:
    outputs: list[torch.Tensor] = []

    def read(_: nn.Module, __: Any, x: torch.Tensor) -> None:
        outputs.append(x[0])
        raise _FeaturesReadError

    handle = norm.register_forward_hook(read)
    try:
        base.model(input_ids=torch.tensor([prompt.ids], device=base.model.device), use_cache=False)
    except _FeaturesReadError:
        pass
    finally:
        handle.remove()
    [x] = outputs
    return project(x.double().cpu().numpy(), prompt, projection)
