"""Which linear layers of a model can take a delta."""

from torch import nn
from transformers import PreTrainedModel


def module_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Returns (outputs, inputs) of every linear layer of `model` that can take a delta, by full name in model order.

    The output embeddings are not among them.
    """
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
