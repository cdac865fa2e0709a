"""Small models of several families."""

import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
SMALL = {**TINY, "intermediate_size": 24}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=96),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
}
IDS = torch.arange(12).view(2, 6)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight
