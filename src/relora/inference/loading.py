"""Open a trained model from any path that leads to one, together with adapters for it.

    path                     what is opened
    model folder, hub id     that model
    RUN with model/          the model that pretraining or full fine-tuning wrote
    RUN with adapter/        the base model, with the run's adapter (LoRA, LLaMA-Adapter) in use
    adapter folder           the base model that the adapter names, with the adapter in use

A folder is an adapter if it has an adapter_config.json, and a run if it has a config.yaml.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from relora.adapters.attached import AdapterFolder, Attached, find_adapter
from relora.adapters.base_model import base_folder, warn_of_another_base
from relora.adapters.own_tokenizer import warn_of_other_ids
from relora.adapters.peft_format import CONFIG
from relora.data.tokenizer import load_tokenizer
from relora.device import choose_device
from relora.errors import UserError
from relora.inference.conversation import ChatPrompt, Message
from relora.model.attention import check_causal
from relora.model.finite import check_computes
from relora.model.load import dtype_named, max_positions, open_model
from relora.runs.settings import is_run, read_run_settings

DEFAULT_LENGTH = 1024
"""The longest sequence, in tokens, for a model whose training length is not known from a run."""


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device in eval mode, with its tokenizer and the adapters that were loaded for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    sequence_length: int
    """Tokens per sequence in training: the run's setting; for any other model its positions, 1024 at most."""
    adapters: Attached
    """The loaded adapters. If the path itself led to an adapter, that one is in use; otherwise none is."""
    template: str | None = None
    """`data.template` of the run that fine-tuned the whole model; None for any other model."""
    _prompts: dict[tuple[str | None, str | None], ChatPrompt] = field(default_factory=dict)
    """The chat prompts made so far, by template and by the adapter that brings a chat template of its own."""

    @property
    def start_token(self) -> int:
        """The token before the first token of a document: the tokenizer's BOS, or its EOS if it has no BOS."""
        bos: int | None = self.tokenizer.bos_token_id
        eos: int = self.tokenizer.eos_token_id  # every tokenizer that `load_tokenizer` opens has one
        return eos if bos is None else bos

    def encode(self, text: str) -> list[int]:
        """Return the start token and the token ids of `text`.

        Raises:
            UserError: the text is not valid Unicode, or the tokenizer gives an id that the model does not have.
        """
        _check_text(text)
        return self._checked(
            [self.start_token, *self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
        )

    def encode_chat(self, messages: Sequence[Message], adapter: str | None = None) -> list[int]:
        """Return the token ids of the prompt that the model answers with `adapter` (by default the one in use).

        The prompt is written with the template of the run that trained the adapter or the model, or with the chat
        template of the adapter's folder or else of the tokenizer.

        Args:
            messages: the conversation so far; the last message is the user's.

        Raises:
            UserError: there is no chat template, the template refuses the messages, or as for `encode`.
        """
        adapter = adapter or self.adapters.in_use
        template = self.adapters.template(adapter) or self.template
        key = template, adapter if self.adapters.chat_templates(adapter) else None
        if key not in self._prompts:
            self._prompts[key] = ChatPrompt(self.tokenizer_of(adapter), template)
        for message in messages:
            _check_text(message["content"])
        return self._checked(self._prompts[key].ids(messages))

    def tokenizer_of(self, adapter: str) -> PreTrainedTokenizerFast:
        """Return the tokenizer, with the chat templates that lie in the folder of an adapter if there are some."""
        templates = self.adapters.chat_templates(adapter)
        if not templates:
            return self.tokenizer
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = templates["default"] if templates.keys() == {"default"} else dict(templates)
        return tokenizer

    def _checked(self, ids: list[int]) -> list[int]:
        """Return `ids`; raise `UserError` if one of them has no row in the model's embedding."""
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
    """Open the model that a path leads to (see the module's table), and load adapters for it.

    Args:
        model_or_run: a run folder, a model folder, a hub id or an adapter folder. If it leads to an adapter, that
            adapter is in use.
        adapters: folders or runs whose adapters are loaded too, but are not in use.
        trust_remote_code: run code that comes with the model. What the run's own config.yaml says about it is ignored
            here, because the folder may come from somebody else.

    Raises:
        UserError: the run has no model yet, an adapter does not exist or belongs to another base, or `open_model`,
            `load_tokenizer` or `choose_device` refuses its part.
        NonFinite: what the model computes is not a number.
    """
    chosen_device, weights_dtype = choose_device(device), dtype_named(dtype)
    more_adapters = [find_adapter(each) for each in adapters]
    source = _resolve(model_or_run)
    folder = _base_folder(source, model_or_run, trust_remote_code)
    model = open_model(folder, dtype=weights_dtype, trust_remote_code=trust_remote_code).to(chosen_device).eval()
    length = source.sequence_length or min(max_positions(model) or DEFAULT_LENGTH, DEFAULT_LENGTH)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    attached = Attached(model)
    for each in (*more_adapters, *([source.adapter] if source.adapter else [])):
        warn_of_other_ids(each.folder, folder)
    if source.adapter is not None:
        attached.use(attached.load(source.adapter))
    for each in more_adapters:
        warn_of_another_base(each.folder, each.base, source.model)
        attached.load(each)
    check_causal(model, model_or_run)
    check_computes(model, str(model_or_run))
    return LoadedModel(model, tokenizer, length, attached, source.template)


@dataclass(frozen=True)
class _ModelSource:
    """The model, and possibly the adapter, that a path resolves to."""

    model: str | Path | None
    """Folder or hub id of the model, for an adapter of its base; None for an adapter that names no base."""
    adapter: AdapterFolder | None = None
    """The adapter to use with the model, if the path leads to one."""
    sequence_length: int | None = None
    """Tokens per sequence in training, for a run."""
    template: str | None = None
    """`data.template` of the run, if it fine-tuned the whole model."""


def _resolve(model_or_run: str | Path) -> _ModelSource:
    """Find out whether a path is a run, an adapter or a model, and what has to be opened."""
    path = Path(model_or_run)
    if is_run(path):
        return _resolve_run(path)
    if (path / CONFIG).is_file() and not (path / "config.json").exists():
        adapter = find_adapter(path)
        return _ModelSource(adapter.base, adapter)
    return _ModelSource(model_or_run)


def _resolve_run(run: Path) -> _ModelSource:
    """Find what a run's training wrote; raise `UserError` for a classifier or a run that has written no model yet."""
    settings = read_run_settings(run)
    length = settings.data.sequence_length
    if settings.task == "classification":
        raise UserError(f"{run}: its model tells classes of texts apart; it is no language model")
    if (run / "adapter").is_dir():
        adapter = find_adapter(run)
        return _ModelSource(adapter.base or settings.model.path, adapter, length)
    if (run / "model").is_dir():
        return _ModelSource(run / "model", None, length, settings.template)
    mend = f", or write one with `relora export {run}`" if settings.task is None else " with `relora finetune`"
    raise UserError(f"{run}: has no model yet; finish the run{mend}")


def _base_folder(source: _ModelSource, path: str | Path, trust_remote_code: bool) -> Path:
    """Return the local folder of the model; an error about an adapter's base also names the adapter at `path`."""
    both = f"give both: `relora generate MODEL --adapter {path}`"
    if source.model is None:
        raise UserError(f"{path}: does not say which model it belongs to (`base_model_name_or_path`); {both}")
    try:
        revision = source.adapter.revision if source.adapter is not None else None
        return base_folder(source.model, revision, trust_remote_code=trust_remote_code)
    except UserError as error:
        if source.adapter is None:
            raise
        raise UserError(f"{path}: its base cannot be opened: {error}; if it is elsewhere now, {both}") from None


def _check_text(text: str) -> None:
    """Raise `UserError` for text with lone surrogates, which Python makes of invalid bytes on a command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("prompt: holds bytes that are not UTF-8 text") from None
