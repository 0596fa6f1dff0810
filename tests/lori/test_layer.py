"""Linear layers of a model that can take a delta."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from lori.base_identity import module_shapes


def test_module_shapes_are_every_linear_layer_but_the_output_embeddings(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    shapes = module_shapes(model)
    layer = {
        "self_attn.q_proj": (64, 48), "self_attn.k_proj": (32, 48), "self_attn.v_proj": (32, 48), "self_attn.o_proj": (48, 64),
        "mlp.gate_proj": (80, 48), "mlp.up_proj": (80, 48), "mlp.down_proj": (48, 80),
    }  # fmt: skip
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert shapes == expected
    assert next(iter(shapes)) == "model.layers.0.self_attn.q_proj"
