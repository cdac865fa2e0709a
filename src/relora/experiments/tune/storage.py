"""Where a study is kept: an SQLite file in its folder, a database server, or a journal file on a shared disk.

Whatever the storage, workers agree by locks of the kernel on files in the study's folder (`relora.files.locks`), so the
folder has to be one that all of them share; trials go on from checkpoints in it, too. A lock ends with its process, so
a dead worker is seen at once, also by storages that know no heartbeat. Storages keep the record, nothing else.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relora.errors import RunStopped, UserError
from relora.files.locks import FileLock
from relora.messages import first_line

DATABASE = "study.db"
JOURNAL = "journal:"
WAIT_SECONDS = 100
"""Time for which SQLite waits while another process writes."""


def import_optuna() -> Any:
    """Import optuna, which is optional, with its messages turned down.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("tune: needs optuna; install it with pip install 'relora[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_storage(location: str | None, folder: Path) -> Any:
    """Open a storage of optuna, creating its tables or its file where they are missing.

    Args:
        location: URL of a database, `journal:FILE`, or None for an SQLite file in the study's folder.
        folder: the study's folder, which is there.

    Raises:
        UserError: the database cannot be reached or its driver is missing; the file cannot be written.
    """
    optuna = import_optuna()
    if location is not None and location.startswith(JOURNAL):
        return _journal(optuna, Path(location.removeprefix(JOURNAL)))
    url = f"sqlite:///{(folder / DATABASE).absolute()}" if location is None else _with_driver(location)
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        arguments["connect_args"] = {"timeout": WAIT_SECONDS}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
    except ImportError as error:
        name = getattr(error.__cause__ or error, "name", None) or "the one of this database"
        raise UserError(f"--storage {without_password(url)}: needs a driver; pip install {name}") from None
    except Exception as error:  # SQLAlchemy's and optuna's errors have no common class
        reason = first_line(str(getattr(error, "orig", None) or error))
        raise UserError(f"--storage {without_password(url)}: cannot be used: {reason}") from None


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn the error of a database that is lost during a search into one line.

    Raises:
        RunStopped: the storage failed; what it held is there when it is back.
    """
    optuna = import_optuna()
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        reason = first_line(str(getattr(error.__cause__, "orig", None) or error.__cause__ or error))
        raise RunStopped(f"--storage: lost ({reason}); when it is back, the same command continues") from None


def without_password(url: str) -> str:
    """Return the URL of a database without the password in it, for messages."""
    return re.sub(r"(://[^:/@]*):[^/]*@", r"\1:***@", url)


def _journal(optuna: Any, file: Path) -> Any:
    """Open a journal file; its lock is the kernel's, since one that is a file would outlive a worker that is killed."""
    if not file.parent.is_dir():
        raise UserError(f"--storage {JOURNAL}{file}: there is no folder {file.parent}; make it, or give another file")
    journal = optuna.storages.journal
    lock = FileLock(file.with_name(f"{file.name}.lock"))
    try:
        return optuna.storages.JournalStorage(journal.JournalFileBackend(str(file), lock_obj=lock))
    except (OSError, ValueError) as error:  # ValueError: lines that are no JSON
        reason = getattr(error, "strerror", None) or first_line(str(error))
        raise UserError(f"--storage {JOURNAL}{file}: cannot be used: {reason}") from None


def _with_driver(url: str) -> str:
    """Return the URL of a PostgreSQL database with the driver that is maintained, if it names none."""
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
