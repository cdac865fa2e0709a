"""Adapters of the small pretrained model, and copies of it with a chat template, for several test files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.paths import DATA

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.llama_adapter import add_prompts, prompt_tensors, save_prompts
from relora.adapters.peft_format import write_adapter
from relora.model import open_model
from relora.seeding import keyed_generator

STORIES = DATA / "models" / "stories260K-llama-hf"
needs_data = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared test data is not here")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHAT_TEMPLATE

RUN = """output_dir: x
task: {task}
model: {{path: {base}}}
data: {{train: a.jsonl, sequence_length: 64, template: {template}}}
schedule: {{total_steps: 10}}
"""


def factors(seed: int, strength: float = 4.0) -> dict[str, Factors]:
    """An update of every query and value projection, of rank 4."""
    found = {}
    for layer in range(5):
        for name, out in (("q_proj", 64), ("v_proj", 32)):
            draw = keyed_generator(seed, name, layer)
            a, b = torch.randn(4, 64, generator=draw), torch.randn(out, 4, generator=draw)
            found[f"model.layers.{layer}.self_attn.{name}"] = Factors(0.1 * a, 0.1 * b, strength)
    return found


def lora(folder: Path, *, seed: int, base: str | None = str(STORIES)) -> Path:
    """A LoRA that changes what the model writes."""
    return write_adapter(Adapter(layers=factors(seed), base=base), folder)


def prompts(folder: Path, *, seed: int = 0) -> Path:
    """A LLaMA-Adapter that changes what the model writes."""
    model = open_model(STORIES)
    add_prompts(model, length=4, layers=5, seed=seed)
    with torch.no_grad():
        for name, tensor in prompt_tensors(model).items():
            if name.endswith("gate"):
                tensor.fill_(2.0)
    return save_prompts(model, folder, base=str(STORIES))


def with_template(folder: Path, template: str = CHAT_TEMPLATE) -> Path:
    """The small model, with a chat template."""
    shutil.copytree(STORIES, folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    return folder


def run_with_adapter(folder: Path, *, seed: int = 1, template: str = "alpaca", task: str = "instruct") -> Path:
    """A run folder as fine-tuning leaves it, with the files that are read here."""
    folder.mkdir()
    (folder / "config.yaml").write_text(RUN.format(base=STORIES, template=template, task=task))
    lora(folder / "adapter", seed=seed)
    return folder
