"""The adapters beside one open base: each loaded once, any one of them in use, or none.

LoRA goes through `multi_adapter`, the prompts of LLaMA-Adapter through `llama_adapter`. Neither
changes the base, so what it writes without an adapter is what it wrote before the first was loaded. Prompts cannot lie
beside a model as factors do: they are put in when they are used and taken out after, a few MB read from their file
every time.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from relora.adapters.llama_adapter import KIND as PROMPTS
from relora.adapters.llama_adapter import load_prompts, remove_prompts
from relora.adapters.multi_adapter import Adapters
from relora.adapters.peft_format import CONFIG, read_config
from relora.errors import UserError
from relora.files.untrusted import no_address
from relora.messages import short_repr
from relora.runs.settings import is_run, read_run_settings

BASE = "base"
"""The name of the base itself among its adapters."""
KINDS = ("LORA", PROMPTS)
"""PEFT's names of what can be attached."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter in PEFT's format, as far as it is known before it is loaded."""

    name: str
    folder: Path
    kind: str
    base: str | None
    """The folder or hub id of the model that it belongs to, where it says so."""
    template: str | None
    """`data.template` of the run that trained it, where a run did."""


def find_adapter(place: str | Path) -> AdapterFolder:
    """The adapter in a folder, or that of a run folder; `UserError` where there is none, or one of an unknown kind."""
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
    return AdapterFolder(name, folder, kind, base if isinstance(base, str) and base else None, template)


class Attached:
    """The adapters of one model by name, and which is in use: at first none."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._low_rank = Adapters(model)
        self._known: dict[str, AdapterFolder] = {}
        self.in_use = BASE

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, in the order in which they came."""
        return tuple(self._known)

    def template(self, name: str) -> str | None:
        """Of the run that trained an adapter; None for the base."""
        return None if name == BASE else self._known[name].template

    def load(self, adapter: AdapterFolder) -> str:
        """Read an adapter; what is in use stays. Returns its name: the folder's or, where that is taken, the path.

        Raises:
            UserError: it is loaded already, or of another base. Nothing has changed.
        """
        if any(adapter.folder.samefile(other.folder) for other in self._known.values()):
            raise UserError(f"{adapter.folder}: this adapter is loaded already; give it once")
        name = adapter.name if adapter.name not in (BASE, *self._known) else str(adapter.folder)
        if adapter.kind == PROMPTS:
            in_use = self.in_use
            self.use(BASE)  # a model has room for the prompts of one
            try:
                load_prompts(self._model, adapter.folder)
                remove_prompts(self._model)
            finally:
                self.use(in_use)
        else:
            self._low_rank.load(name, adapter.folder)
        self._known[name] = adapter
        return name

    def use(self, name: str) -> None:
        """Let the model answer with an adapter, or as the base itself; `UserError` for a name that is not loaded."""
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
