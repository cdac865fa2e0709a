"""The adapters attached to one open base model: any one of them is in use at a time, or none.

LoRA adapters go through `multi_adapter`, the prompts of LLaMA-Adapter through `llama_adapter`. Neither changes the
weights of the base, so without an adapter the model generates what it generated before the first one was loaded. The
factors of LoRA adapters stay in memory. A model has room for the prompts of one LLaMA-Adapter only: they are put into
the model when that adapter is selected and removed afterwards; the price is to read a few MB each time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from relora.adapters.llama_adapter import KIND as PROMPTS
from relora.adapters.llama_adapter import load_prompts, remove_prompts
from relora.adapters.multi_adapter import Adapters
from relora.adapters.own_tokenizer import chat_templates
from relora.adapters.peft_format import CONFIG, read_config
from relora.errors import UserError
from relora.files.untrusted import no_address
from relora.messages import short_repr
from relora.runs.settings import is_run, read_run_settings

BASE = "base"
"""Name that stands for the base model without an adapter."""
KINDS = ("LORA", PROMPTS)
"""PEFT's names (`peft_type`) of the kinds of adapters that can be attached."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter folder in PEFT's format and what its configuration says; its tensors are not loaded."""

    name: str
    """Name of the folder that the user gave (of a run: the run folder)."""
    folder: Path
    """Folder that holds the adapter's files."""
    kind: str
    """One of `KINDS`."""
    base: str | None
    """Folder or hub id of the base model, as the adapter names it; None if it names none."""
    revision: str | None
    """Revision of the base on the hub; None for its main branch."""
    template: str | None
    """`data.template` of the run that trained the adapter; None if the folder is not a run."""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """Chat templates that lie in the folder, by their names."""


def find_adapter(place: str | Path) -> AdapterFolder:
    """Find the adapter in an adapter folder or a run folder, without loading its tensors.

    Raises:
        UserError: there is no adapter, its kind is not one of `KINDS`, or `place` is an address on the web.
    """
    try:
        folder, template = Path(no_address(str(place))), None
    except ValueError as error:
        raise UserError(f"adapter: {error}") from None
    name = folder.resolve().name
    if is_run(folder):
        template = read_run_settings(folder).template
        folder = folder / "adapter"
    settings = read_config(folder)
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if kind not in KINDS:
        raise UserError(f"{folder / CONFIG}: `peft_type` is {short_repr(kind)}; known are {' and '.join(KINDS)}")
    base, revision = (value if isinstance(value, str) and value else None for value in (base, settings.get("revision")))
    return AdapterFolder(name, folder, kind, base, revision, template, chat_templates(folder))


class Attached:
    """The adapters of one model by name, and the name of the one in use, which at first is the base."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._low_rank = Adapters(model)
        self._known: dict[str, AdapterFolder] = {}
        self.in_use = BASE

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order of loading; the base is not among them."""
        return tuple(self._known)

    def template(self, name: str) -> str | None:
        """Return `data.template` of the run that trained the adapter `name`; None for the base."""
        return None if name == BASE else self._known[name].template

    def chat_templates(self, name: str) -> Mapping[str, str]:
        """Return the chat templates that lie in the folder of the adapter `name`; none for the base."""
        return {} if name == BASE else self._known[name].chat_templates

    def load(self, adapter: AdapterFolder) -> str:
        """Load an adapter, check that it fits the model, and leave in use the one that was in use.

        Returns:
            The name to `use` it by: the folder's name or, if another adapter has that name, the folder's path.

        Raises:
            UserError: the adapter is loaded already, or was made for another base. Nothing has changed.
        """
        if any(adapter.folder.samefile(other.folder) for other in self._known.values()):
            raise UserError(f"{adapter.folder}: this adapter is loaded already; give it once")
        name = adapter.name if adapter.name not in (BASE, *self._known) else str(adapter.folder)
        if adapter.kind == PROMPTS:
            in_use = self.in_use
            self.use(BASE)  # a model has room for the prompts of one adapter
            try:
                load_prompts(self._model, adapter.folder)  # only to check them; `use` loads them again
                remove_prompts(self._model)
            finally:
                self.use(in_use)
        else:
            self._low_rank.load(name, adapter.folder)
        self._known[name] = adapter
        return name

    def use(self, name: str) -> None:
        """Select the adapter that the model computes with, or `BASE` for none.

        Raises:
            UserError: no adapter of this name is loaded.
        """
        if name not in (BASE, *self._known):
            raise UserError(f"adapter {short_repr(name)}: not loaded; there are {', '.join((BASE, *self._known))}")
        if name == self.in_use:
            return
        if self._has_prompts(self.in_use):
            remove_prompts(self._model)
        self._low_rank.use(None)
        self.in_use = BASE
        if self._has_prompts(name):
            load_prompts(self._model, self._known[name].folder)
        elif name != BASE:
            self._low_rank.use(name)
        self.in_use = name

    def _has_prompts(self, name: str) -> bool:
        return name != BASE and self._known[name].kind == PROMPTS

    def __str__(self) -> str:
        return ", ".join(f"{name} (in use)" if name == self.in_use else name for name in (BASE, *self._known))
