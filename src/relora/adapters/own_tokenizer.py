"""The tokenizer files that may lie in an adapter's folder, as trainers save them there, beside those of its base.

A chat template of the adapter's own is used when the model is asked with the adapter. Ids are always those of the
base's tokenizer, since several adapters share one model; a warning says where the adapter's would differ.
"""

import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

from relora.errors import UserError
from relora.files.untrusted import CONFIG_BYTES, MB, TOKENIZER_BYTES, check_folder, read_json, regular_file
from relora.messages import first_line, short_repr

_log = logging.getLogger(__name__)

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SHOWN = 4


def chat_templates(folder: Path) -> dict[str, str]:
    """Read the chat templates in a folder by their names; the one that is used by itself is `default`.

    Raises:
        UserError: a file is no text, too large, or a link out of the folder.
    """
    check_folder(folder)
    files = {path.stem: path for path in sorted((folder / CHAT_TEMPLATE_DIR).glob("*.jinja"))}
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        files["default"] = folder / CHAT_TEMPLATE_FILE
    if files:
        return {name: _text(file) for name, file in files.items()}
    settings = read_json(folder / _SETTINGS, CONFIG_BYTES[_SETTINGS]) if (folder / _SETTINGS).is_file() else {}
    named: Any = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(named, str):
        return {"default": named}
    entries = [entry for entry in named if isinstance(entry, dict)] if isinstance(named, list) else []
    return {str(entry.get("name")): str(entry.get("template")) for entry in entries}


def warn_of_other_ids(adapter: Path, base: Path) -> None:
    """Warn if the tokenizer in an adapter's folder gives a text other ids than that in its base's folder.

    Raises:
        UserError: a tokenizer.json cannot be read.
    """
    if not all((folder / _TOKENIZER).is_file() for folder in (adapter, base)):
        return
    theirs, ours = (vocabulary(folder) for folder in (adapter, base))
    if theirs == ours:
        return
    more = [token for token in theirs if token not in ours]
    names = ", ".join([*map(short_repr, more[:_SHOWN]), *(["..."] if len(more) > _SHOWN else [])])
    what = f"has tokens that {base}'s has not ({names})"
    _log.warning(
        "warning: %s: its tokenizer %s; %s's is used, in which text may have other ids than in training",
        *(adapter, what if more else f"gives other ids than {base}'s", base),
    )


def warn_of_what_stays_behind(adapter: Path, base: Path) -> None:
    """Warn of what of the tokenizer in an adapter's folder does not go into the merged model.

    Raises:
        UserError: a file of it cannot be read.
    """
    own = chat_templates(adapter)
    if own and own != chat_templates(base):
        _log.warning(
            "warning: %s: its chat template is another than %s's, which goes into the merged model; put its %s there "
            "if the adapter was trained with it",
            *(adapter, base, CHAT_TEMPLATE_FILE if (adapter / CHAT_TEMPLATE_FILE).is_file() else _SETTINGS),
        )
    warn_of_other_ids(adapter, base)


def vocabulary(folder: Path) -> dict[str, int]:
    """Return the ids of all tokens of the tokenizer.json in a folder; none if it has no such file.

    Raises:
        UserError: it cannot be read.
    """
    file = folder / _TOKENIZER
    if not file.is_file():
        return {}
    try:
        found: dict[str, int] = Tokenizer.from_file(str(regular_file(file, TOKENIZER_BYTES))).get_vocab(True)
    except UserError:
        raise
    except Exception as error:  # the library has no class of its own
        raise UserError(f"{file}: not a tokenizer: {first_line(str(error))}") from None
    return found


def _text(file: Path) -> str:
    try:
        return regular_file(file, MB).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
