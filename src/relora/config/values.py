"""Types of the values that settings take, and the base class of all sections."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from relora.files.untrusted import no_address


def _no_bool(value: object) -> object:
    """Refuse a boolean: YAML reads `yes` and `on` as true, and Python would take true for 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def _is_text(value: str) -> str:
    """Refuse characters that YAML can spell in quotes, but that no file name or no UTF-8 file can hold."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must be text, without NUL characters and halves of surrogate pairs")
    return value


Number = BeforeValidator(_no_bool)
"""Mark of a numeric field: no boolean passes."""
PositiveInt = Annotated[int, Number, Field(gt=0, le=10**15)]
NonNegativeInt = Annotated[int, Number, Field(ge=0, le=10**15)]
Seed = Annotated[int, Number, Field(ge=0, lt=2**64)]
PositiveFloat = Annotated[float, Number, Field(gt=0, le=1e9)]
NonNegativeFloat = Annotated[float, Number, Field(ge=0, le=1e9)]
Share = Annotated[float, Number, Field(ge=0, lt=1)]
Ratio = Annotated[float, Number, Field(gt=0, le=1)]
Text = Annotated[str, AfterValidator(_is_text)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_is_text), AfterValidator(no_address)]
"""A path or a hub id, never a web address."""


class Settings(BaseModel):
    """Base class of a section: frozen, and strict about unknown keys; the string under a field documents it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
