"""Another number of layers: what a configuration lists for each layer follows, or one line names the list."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from relora.errors import UserError
from relora.model import open_model
from relora.model.shape import with_overrides

SHAPE = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
FULL, SLIDING = "full_attention", "sliding_attention"


def smollm3(**keys: Any) -> PreTrainedConfig:
    return transformers.SmolLM3Config(**SHAPE, num_hidden_layers=4, num_key_value_heads=1, pad_token_id=None, **keys)


def gpt_neo(layers: int) -> PreTrainedConfig:
    kinds = [[["global", "local"], layers // 2]]
    return transformers.GPTNeoConfig(
        vocab_size=96, hidden_size=16, num_layers=layers, num_heads=2, attention_types=kinds
    )


def gpt_oss(**keys: Any) -> PreTrainedConfig:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "num_key_value_heads": 1}
    return transformers.GptOssConfig(**SHAPE, num_hidden_layers=4, **experts, **keys)


@pytest.mark.parametrize(
    ("config", "layers", "key", "expected"),
    [
        (smollm3(no_rope_layer_interval=2), 6, "no_rope_layers", [1, 0, 1, 0, 1, 0]),
        (smollm3(), 6, "no_rope_layers", [1, 1, 1, 0, 1, 1]),
        (smollm3(no_rope_layers=[0, 1, 0, 1]), 7, "no_rope_layers", [0, 1, 0, 1, 0, 1, 0]),
        (smollm3(no_rope_layers=[0, 1, 1, 1]), 2, "no_rope_layers", [0, 1]),
        (gpt_oss(), 5, "layer_types", [SLIDING, FULL, SLIDING, FULL, SLIDING]),
        (gpt_oss(layer_types=[FULL, SLIDING] * 2), 6, "layer_types", [FULL, SLIDING] * 3),
        (gpt_neo(4), 6, "attention_layers", ["global", "local"] * 3),
        (gpt_neo(4), 3, "attention_layers", ["global", "local", "global"]),
        (gpt_neo(2), 3, "attention_layers", ["global", "local", "global"]),
    ],
)
def test_lists_with_an_entry_for_each_layer_follow(
    config: PreTrainedConfig, layers: int, key: str, expected: list[Any], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    model = open_model(tmp_path, from_scratch=True, overrides={"num_hidden_layers": layers})
    assert getattr(model.config, key) == expected
    assert torch.isfinite(model(input_ids=torch.arange(9)[None]).logits).all()


def test_numbers_of_layers_are_kept_as_far_as_there_are_layers() -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "mlp_only_layers": [0, 3]}
    config = transformers.Qwen2MoeConfig(**SHAPE, num_hidden_layers=4, num_key_value_heads=1, **experts)
    assert with_overrides(config, {"num_hidden_layers": 2}).mlp_only_layers == [0]
    assert with_overrides(config, {"num_hidden_layers": 9}).mlp_only_layers == [0, 3]


def test_a_list_that_only_happens_to_be_as_long_stays() -> None:
    config = transformers.Mamba2Config(num_hidden_layers=2, time_step_limit=[0.0, 5.0], eos_token_id=[0, 1])
    other = with_overrides(config, {"num_hidden_layers": 3})
    assert (list(other.time_step_limit), other.eos_token_id) == ([0.0, 5.0], [0, 1])


def test_a_list_without_a_pattern_is_named() -> None:
    config = gpt_oss(layer_types=[FULL, SLIDING, SLIDING, FULL])
    with pytest.raises(UserError, match="num_hidden_layers: `layer_types` of the configuration has an entry for each"):
        with_overrides(config, {"num_hidden_layers": 6})


def test_keys_of_an_encoder_are_not_taken_for_those_of_the_decoder() -> None:
    for key in ("num_hidden_layers", "num_attention_heads"):
        with pytest.raises(UserError, match=f"model.{key}: is of the encoder in a bart model"):
            with_overrides(transformers.BartConfig(), {key: 4})


def test_a_number_of_layers_that_the_architecture_does_not_take_is_refused(tmp_path: Path) -> None:
    transformers.xLSTMConfig(vocab_size=96, hidden_size=32, num_heads=2, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a xlstm model does not take the number of its layers from it"):
        open_model(tmp_path, from_scratch=True, overrides={"num_hidden_layers": 3})


def test_what_a_class_computes_from_its_own_names_follows() -> None:
    """Dbrx's experts have the width of the model, which its class gives them."""
    config = with_overrides(transformers.DbrxConfig(), {"hidden_size": 64, "num_attention_heads": 4})
    assert (config.d_model, config.ffn_config.hidden_size) == (64, 64)


@pytest.mark.parametrize("layers, shared", [(35, 15), (20, 9), (10, 4), (7, 2), (5, 0)])
def test_layers_that_use_the_keys_of_others_keep_their_share_of_the_depth(layers: int, shared: int) -> None:
    """Gemma 3n has 15 of 35; the others must be of both kinds, sliding and full, and every fifth one is full."""
    config = with_overrides(transformers.Gemma3nTextConfig(num_hidden_layers=35), {"num_hidden_layers": layers})
    assert config.num_kv_shared_layers == shared and len(config.kv_sharing_modes) == layers
