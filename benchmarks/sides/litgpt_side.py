"""LitGPT's LoRA, with the loss of `litgpt finetune_lora`: head and cross-entropy in chunks of 128 positions.

Query, key and value are one layer there, [3·hidden, hidden], with factors of their own for each.
"""

from litgpt.lora import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch import Tensor

from sides.draws import draw_, next_tokens
from sides.shape import SEQUENCE, Place, Shape
from sides.side import ALPHA, Side, stepping

CHUNK = 128
PLACES = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
"""A layer of a LitGPT block -> the layers of a transformers block that it is made of."""


def litgpt(shape: Shape, rank: int, place: Place) -> Side:
    config = Config(
        name="llama",
        block_size=SEQUENCE,
        n_layer=shape.layers,
        n_embd=shape.hidden,
        n_head=shape.heads,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        padded_vocab_size=shape.vocabulary,
        norm_class_name="RMSNorm",
        norm_eps=1e-6,
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        rotary_percentage=1.0,
        bias=False,
        lora_r=rank,
        lora_alpha=ALPHA,
        **dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True),
    )
    model = GPT(config).to(place.device)
    draw_("model.embed_tokens.weight", model.transformer.wte.weight)
    draw_("lm_head.weight", model.lm_head.linear.weight)
    for index, block in enumerate(model.transformer.h):
        for name, parts in PLACES.items():
            layer = block.get_submodule(name)
            layer.linear.weight.requires_grad_(False)
            for kind, tensor in (("weight", layer.linear.weight), ("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
                    draw_(f"model.layers.{index}.{part}.{kind}", rows)

    def loss_of(ids: Tensor) -> Tensor:
        return chunked_cross_entropy(model(ids, lm_head_chunk_size=CHUNK), next_tokens(ids), CHUNK)

    return stepping(model.train(), loss_of, place)
