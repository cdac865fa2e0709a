"""Byte sizes as people write and read them: `6GiB` <-> 6442450944."""

from relora.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str, option: str = "--fit") -> int:
    """Read the value of an option, such as `6GiB`, `800MB` or a plain number of bytes.

    Raises:
        UserError: the text is not a size, or not a positive one.
    """
    number = text.strip().rstrip("BGIKMbgikm ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"{option} {text}: give a size, e.g. 6GiB or 800MB")
    return size


def format_bytes(size: int) -> str:
    """Format bytes for a person, in GiB or MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
