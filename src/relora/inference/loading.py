"""A model that is there to be used, and the adapters beside it.

    model folder, hub id     that model
    RUN with model/          what pretraining and full fine-tuning leave: that model
    RUN with adapter/        what LoRA and LLaMA-Adapter leave: the base, with the adapter in use
    adapter folder           the base that it names, with the adapter in use

An adapter is told by its adapter_config.json, a run by its config.yaml.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from relora.adapters.attached import AdapterFolder, Attached, find_adapter
from relora.adapters.peft_format import CONFIG
from relora.data.tokenizer import load_tokenizer
from relora.device import choose_device
from relora.errors import UserError
from relora.inference.conversation import ChatPrompt, Message
from relora.messages import short_name
from relora.model.load import dtype_named, max_positions, model_folder, open_model
from relora.runs.settings import is_run, read_run_settings

_log = logging.getLogger(__name__)

DEFAULT_LENGTH = 1024
"""Tokens a model is scored on at once where neither a run nor the model says how long it was trained."""


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    sequence_length: int
    """Tokens per sequence in training: of a run its setting, of any other model its positions, 1024 at most."""
    adapters: Attached
    """Those that were opened with the model; its own is in use, where it has one."""
    template: str | None = None
    """`data.template` of the run that fine-tuned the model as a whole."""
    _prompts: dict[str | None, ChatPrompt] = field(default_factory=dict)

    @property
    def start_token(self) -> int:
        """What comes before the first token of a document: the tokenizer's BOS, else the EOS of the one before."""
        bos: int | None = self.tokenizer.bos_token_id
        eos: int = self.tokenizer.eos_token_id  # every tokenizer that `load_tokenizer` opens has one
        return eos if bos is None else bos

    def encode(self, text: str) -> list[int]:
        """The start token and the ids of `text`; `UserError` where the tokenizer gives an id that the model has not."""
        _check_text(text)
        return self._checked(
            [self.start_token, *self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
        )

    def encode_chat(self, messages: Sequence[Message], adapter: str | None = None) -> list[int]:
        """The prompt after which `adapter` (by default the one in use) answers the last of `messages`.

        Raises:
            UserError: no chat template, one that refuses the messages, or as for `encode`.
        """
        template = self.adapters.template(adapter or self.adapters.in_use) or self.template
        if template not in self._prompts:
            self._prompts[template] = ChatPrompt(self.tokenizer, template)
        for message in messages:
            _check_text(message["content"])
        return self._checked(self._prompts[template].ids(messages))

    def _checked(self, ids: list[int]) -> list[int]:
        rows = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= rows:
            raise UserError(
                f"the tokenizer gives id {max(ids)} but the model has {rows} ids; they do not belong together"
            )
        return ids


def load_model_or_run(
    model_or_run: str | Path,
    *,
    adapters: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Open the model of a run, a model folder, a hub id or an adapter's base, and adapters beside it.

    The model's own adapter, where it has one, is in use; `adapters` (folders or runs) are loaded and wait.
    `trust_remote_code` runs code that comes with the model. What the run's own config.yaml says of it does not count
    here: the folder may be somebody else's.

    Raises:
        UserError: a run that has no model yet, an adapter that is none or of another base, or what `open_model`,
            `load_tokenizer` and `choose_device` refuse.
    """
    place, weights_dtype = choose_device(device), dtype_named(dtype)
    beside = [find_adapter(each) for each in adapters]
    found = _find(model_or_run)
    folder = _base_folder(found, model_or_run, trust_remote_code)
    model = open_model(folder, dtype=weights_dtype, trust_remote_code=trust_remote_code).to(place).eval()
    length = found.sequence_length or min(max_positions(model) or DEFAULT_LENGTH, DEFAULT_LENGTH)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    attached = Attached(model)
    if found.adapter is not None:
        attached.use(attached.load(found.adapter))
    for each in beside:
        _warn_of_another_base(each, found.model)
        attached.load(each)
    return LoadedModel(model, tokenizer, length, attached, found.template)


@dataclass(frozen=True)
class _Found:
    """What stands at a place."""

    model: str | Path | None
    """A folder or hub id; None for an adapter that names no base."""
    adapter: AdapterFolder | None = None
    sequence_length: int | None = None
    template: str | None = None


def _find(model_or_run: str | Path) -> _Found:
    place = Path(model_or_run)
    if is_run(place):
        return _find_in_run(place)
    if (place / CONFIG).is_file() and not (place / "config.json").exists():
        adapter = find_adapter(place)
        return _Found(adapter.base, adapter)
    return _Found(model_or_run)


def _find_in_run(run: Path) -> _Found:
    settings = read_run_settings(run)
    length = settings.data.sequence_length
    if settings.task == "classification":
        raise UserError(f"{run}: its model tells classes of texts apart; it is no language model")
    if (run / "adapter").is_dir():
        adapter = find_adapter(run)
        return _Found(adapter.base or settings.model.path, adapter, length)
    if (run / "model").is_dir():
        return _Found(run / "model", None, length, settings.template)
    raise UserError(f"{run}: has no model yet; finish the run, or write one with `relora export {run}`")


def _base_folder(found: _Found, place: str | Path, trust_remote_code: bool) -> Path:
    """The local folder of the model; what is wrong with an adapter's base is said with the adapter's name."""
    both = f"give both: `relora generate MODEL --adapter {place}`"
    if found.model is None:
        raise UserError(f"{place}: does not say which model it belongs to (`base_model_name_or_path`); {both}")
    try:
        return model_folder(found.model, trust_remote_code=trust_remote_code)
    except UserError as error:
        if found.adapter is None:
            raise
        raise UserError(f"{place}: its base cannot be opened: {error}; if it is elsewhere now, {both}") from None


def _warn_of_another_base(adapter: AdapterFolder, model: str | Path | None) -> None:
    """An adapter that fits may still be another model's of the same shape, which nothing but its word can tell."""
    if adapter.base is None or model is None:
        return
    named, given = Path(adapter.base), Path(model)
    both_here = named.exists() and given.exists()
    if not (named.samefile(given) if both_here else named.name == given.resolve().name):
        _log.warning("warning: %s was trained on %s, not on %s", adapter.folder, short_name(adapter.base, 160), model)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # what Python makes of other bytes on a command line
        raise UserError("prompt: holds bytes that are not UTF-8 text") from None
