"""The base model that an adapter names: whether it is the one that is given, and where its files are.

Shapes cannot show that an adapter was trained on another model of the same structure, so its own statement is all there
is.
"""

import logging
from pathlib import Path

from relora.files.hub import CODE_FILES, MODEL_FILES, hub_folder
from relora.messages import short_name
from relora.model.load import model_folder

_log = logging.getLogger(__name__)


def is_same_base(one: str | Path, other: str | Path) -> bool:
    """Tell whether two names of models can be those of one model.

    Two folders are compared as folders, and two hub ids as they stand. Where one is a folder and the other is not here,
    only the last parts of the names are compared, since a folder may have been moved or downloaded.
    """
    folders = [Path(name) for name in (one, other)]
    here = [folder.is_dir() for folder in folders]
    if all(here):
        return folders[0].samefile(folders[1])
    if not any(here) and all(len(folder.parts) == 2 for folder in folders):
        return str(one) == str(other)
    first, second = (folder.resolve().name for folder in folders)
    return first == second


def warn_of_another_base(adapter: str | Path, named: str | None, given: str | Path | None) -> None:
    """Warn if the adapter in the folder `adapter` names another base model than the one that is given."""
    if named is not None and given is not None and not is_same_base(named, given):
        _log.warning("warning: %s was trained on %s, not on %s", adapter, short_name(named, 160), given)


def base_folder(base: str | Path, revision: str | None, *, trust_remote_code: bool = False) -> Path:
    """Return the local folder of the base model that an adapter names, on the hub at the revision that it names.

    Raises:
        UserError: there is no such model.
    """
    if revision in (None, "", "main") or Path(base).exists():
        return model_folder(base, trust_remote_code=trust_remote_code)
    files = (*MODEL_FILES, *CODE_FILES) if trust_remote_code else MODEL_FILES
    return hub_folder(str(base), "model", files, revision=revision)
