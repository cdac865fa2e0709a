"""Byte sizes and rates as people write and read them: `6GiB` <-> 6442450944, `1Gbit/s` -> 125000000."""

import math

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


def rate_in_bytes(text: str, option: str) -> float:
    """Read the rate of a link, such as `25GB/s` or `1Gbit/s`, and return it in bytes per second.

    Raises:
        UserError: the text is not a rate, or not a positive one.
    """
    amount, slash, second = text.strip().rpartition("/")
    bits = amount.lower().endswith("bit")
    try:
        if not slash or second != "s":
            raise ValueError
        return size_in_bytes(f"{amount[:-3]}B" if bits else amount) / (8 if bits else 1)
    except (ValueError, UserError):
        raise UserError(f"{option} {text}: give bytes or bits per second, e.g. 25GB/s or 1Gbit/s") from None


def format_bytes(size: int) -> str:
    """Format bytes for a person, in GiB or MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def counts(text: str, option: str) -> list[int]:
    """Read whole numbers above 0, separated by commas, such as `8,64,1024`; `UserError` on anything else."""
    numbers = positive_numbers(text, option)
    if any(number != int(number) for number in numbers):
        raise UserError(f"{option} {text}: give whole numbers, separated by commas")
    return [int(number) for number in numbers]


def positive_numbers(text: str, option: str) -> list[float]:
    """Read finite numbers above 0, separated by commas, such as `9.1,8.4`; `UserError` on anything else."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise UserError(f"{option} {text}: give numbers above 0, separated by commas")
    return numbers
