"""Generation settings of a model: its end tokens are used, and what has no effect is said."""

import logging

from relora.errors import UserError
from relora.inference.decoding import end_token_ids
from relora.inference.loading import LoadedModel
from relora.messages import short_repr

_log = logging.getLogger(__name__)

_OF_OPTIONS = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "max_length")
"""Settings that the options of `relora generate` and `chat` stand for."""
_WITHOUT_EFFECT = ("transformers_version", "_from_model_config", "use_cache", "return_dict_in_generate")
"""Settings that do not change which tokens are chosen; nor do special tokens' ids and kinds of output."""


def check_generation_settings(loaded: LoadedModel, *, continues: bool = False) -> None:
    """Warn of generation settings that have no effect here, and of end tokens that the model cannot write.

    Args:
        continues: prompts are continued as plain text, so warn if the tokenizer begins a text otherwise.

    Raises:
        UserError: an end token is no id.
    """
    if continues:
        _warn_of_another_start(loaded)
    settings = loaded.model.generation_config
    ends = end_token_ids(loaded.model, loaded.tokenizer)
    rows = loaded.model.get_input_embeddings().num_embeddings
    for end in ends:
        if not isinstance(end, int) or isinstance(end, bool):
            raise UserError(
                f"generation_config.json: `eos_token_id` has {short_repr(end)}, which is not the id of a token"
            )
    beyond = [end for end in ends if not 0 <= end < rows]
    if beyond:
        which = "no text ends by itself" if len(beyond) == len(ends) else "no text ends there"
        ids = ", ".join(map(str, beyond))
        _log.warning("warning: end token %s is none of the model's %s ids, so %s; give --stop", ids, f"{rows:,}", which)
    unused = [
        key
        for key, value in settings.to_diff_dict().items()
        if value not in (None, False)
        and key not in (*_OF_OPTIONS, *_WITHOUT_EFFECT)
        and not key.startswith("output_")
        and (not key.endswith("_token_id") or key.startswith("forced_"))
    ]
    if unused:
        _log.warning("warning: generation_config.json: no effect here: %s", ", ".join(sorted(unused)))


def _warn_of_another_start(loaded: LoadedModel) -> None:
    """Warn if the tokenizer begins a text otherwise than prompts to be continued begin here: with one start token."""
    plain: list[int] = loaded.tokenizer("a", add_special_tokens=False).input_ids
    ids: list[int] = loaded.tokenizer("a").input_ids
    front: list[int] = next((ids[:at] for at in range(len(ids)) if ids[at : at + len(plain)] == plain), [])
    if front and front != [loaded.start_token]:
        tokens = [
            " ".join(map(str, loaded.tokenizer.convert_ids_to_tokens(some))) for some in (front, [loaded.start_token])
        ]
        _log.warning("warning: the tokenizer begins a text with %s, prompts begin with %s here", *tokens)
