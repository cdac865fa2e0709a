"""A folder with several adapters, good and bad."""

import json
from pathlib import Path

from tests.adapters.test_merge import adapter_folder
from tests.adapters.test_save_load import in_peft

from relora.adapters.peft_format import TENSORS


def fill_shelf(folder: Path) -> Path:
    """Write three good adapters, one of another kind, one that is damaged, and one in a hidden folder, half written."""
    adapter_folder("llama", folder / "french", rank_pattern={r".*\.0\..*": 2})
    adapter_folder("llama", folder / "more" / "law", dora=True, target_modules=("q_proj", "v_proj"))
    adapter_folder("gpt2", folder / "more" / "stable", rslora=True)
    in_peft("llama").save_pretrained(folder / "theirs")
    config = folder / "theirs" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "ADAPTION_PROMPT"}))
    broken = adapter_folder("llama", folder / "zz")
    (broken / TENSORS).write_bytes((broken / TENSORS).read_bytes()[:-3])
    adapter_folder("llama", folder / ".hidden.partial")
    return folder
