"""The first stop signal is noted, the second one ends the process, and the handlers are restored afterwards."""

import signal
import subprocess
import sys

import pytest

from relora.train.signals import Signals

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_noted_and_the_second_has_its_default_action(number: signal.Signals) -> None:
    with Signals() as signals:
        assert signals.stop is None
        signal.raise_signal(number)
        assert signals.stop == number
        assert all(signal.getsignal(each) is signal.SIG_DFL for each in NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_handlers_are_restored(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    with Signals():
        assert [signal.getsignal(each) for each in NUMBERS] != before
    assert [signal.getsignal(each) for each in NUMBERS] == before
    with pytest.raises(ZeroDivisionError), Signals():
        signal.raise_signal(number)
        raise ZeroDivisionError
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_a_run_that_ends_by_itself_asks_for_nothing() -> None:
    with Signals() as signals:
        pass
    assert signals.stop is None


@pytest.mark.parametrize("second", NUMBERS)
def test_a_second_signal_ends_the_process(second: signal.Signals) -> None:
    """Also if the two signals differ: a user who presses Ctrl-C twice does not want to wait."""
    script = f"""
import signal
from relora.train.signals import Signals
with Signals() as signals:
    signal.raise_signal({NUMBERS[0].value})
    print("noted", signals.stop, flush=True)
    signal.raise_signal({second.value})
    print("still here")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == -second and ended.stdout == f"noted {NUMBERS[0].value}\n" and ended.stderr == ""
