"""What a run's config.yaml says to those who use its result.

Not the whole configuration: a result outlives the version that made it, and opening a model must not wait for the
classes of every setting to be built (0.1 s).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora.errors import UserError
from relora.files.untrusted import check_folder, read_yaml
from relora.messages import first_mistake


class _Section(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Model(_Section):
    path: str | None = None


class _Data(_Section):
    sequence_length: Annotated[int, Field(gt=0)] | None = None
    layout: str = "auto"
    template: Literal["auto", "alpaca", "chat", "plain"] | None = None


class RunSettings(_Section):
    """The part of a run's configuration that counts for its result."""

    task: Literal["instruct", "classification"] | None = None
    """None of pretraining."""
    model: _Model = _Model()
    data: _Data = _Data()

    @property
    def template(self) -> str | None:
        """By which prompts and responses were written; None where there were none."""
        return None if self.task != "instruct" or self.data.layout == "completion" else self.data.template


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / "config.yaml").is_file()


def read_run_settings(run: Path) -> RunSettings:
    """What config.yaml of a run folder says; `UserError` where it cannot be read."""
    check_folder(run)
    file = run / "config.yaml"
    try:
        tree = read_yaml(file)
        if not isinstance(tree, dict):
            raise UserError(f"{file}: must be a YAML mapping of keys to values")
        return RunSettings.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{file}: {first_mistake(error)}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
