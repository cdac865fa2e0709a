"""Recognizing a run folder, and the part of its config.yaml that matters to those who use its result.

Only that part is read, not the whole configuration, for two reasons: a result outlives the version of relora that made
it, and opening a model must not wait until the classes of all settings are built (0.1 s).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora.errors import UserError
from relora.files.untrusted import check_folder, read_yaml
from relora.messages import first_mistake

CONFIG_FILE = "config.yaml"
"""Name of the file with the run's configuration, which is the first that a run writes into its folder."""


class _Section(BaseModel):
    """A section of config.yaml, of which only the declared keys are read."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Model(_Section):
    path: str | None = None


class _Data(_Section):
    sequence_length: Annotated[int, Field(gt=0)] | None = None
    layout: str = "auto"
    template: Literal["auto", "alpaca", "chat", "plain"] | None = None


class RunSettings(_Section):
    """The part of a run's configuration that matters to those who use its result."""

    task: Literal["instruct", "classification"] | None = None
    """The fine-tuning task; None for a pretraining run."""
    model: _Model = _Model()
    data: _Data = _Data()

    @property
    def template(self) -> str | None:
        """Name of the template by which prompts and responses were formatted; None if the run had no such pairs."""
        if self.task != "instruct" or self.data.layout == "completion":
            return None
        return self.data.template


def is_run(folder: str | Path) -> bool:
    """Return whether a folder is a run folder: whether config.yaml is in it."""
    return (Path(folder) / CONFIG_FILE).is_file()


def run_folder(folder: str | Path) -> Path:
    """Return the path of a run folder after checking that it is one.

    Raises:
        UserError: it has no config.yaml, or something in it that `check_folder` refuses.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise UserError(f"{folder}: not a run folder (no {CONFIG_FILE} in it)")
    check_folder(folder)
    return folder


def read_run_settings(run: str | Path) -> RunSettings:
    """Read the settings of a run from config.yaml in its folder.

    Raises:
        UserError: `run` is not a run folder, or config.yaml cannot be read or holds a wrong value.
    """
    file = run_folder(run) / CONFIG_FILE
    try:
        tree = read_yaml(file)
        if not isinstance(tree, dict):
            raise UserError(f"{file}: must be a YAML mapping of keys to values")
        return RunSettings.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{file}: {first_mistake(error)}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
