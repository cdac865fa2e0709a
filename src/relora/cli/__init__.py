"""The command `relora`: one verb, one call.

A user's mistake prints one line and exits with 2; a run that stopped itself exits with 3; a signal with 128 + its
number. Verbs import what they need when they run, so that a misspelt key or `--help` answers before torch is loaded.
"""

import errno
import os
import re
import sys
from typing import NoReturn

import typer

from relora.cli import adapters, models, training
from relora.errors import ReloraError
from relora.messages import first_line

app = typer.Typer(
    help="Pretrain and fine-tune language models through low-rank updates.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(training.app)
app.add_typer(models.app)
app.add_typer(adapters.app, name="adapters")


def main() -> None:
    """Entry point: errors that carry a message for the user become one line on stderr and an exit status."""
    try:
        # typer returns the status of a verb that was interrupted, where one would expect the exception
        if status := app(sys.argv[1:] or ["--help"], prog_name="relora", standalone_mode=False):
            sys.exit(status)
    except ReloraError as error:
        _fail(str(error), error.exit_status)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:  # `relora ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a path that cannot be, or a disk that fills up in the wrong moment
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"{error.filename}: {error.strerror}", 2)
        _fail(f"{error.filename or 'disk'}: {error.strerror or error}; make room and run the same command again", 3)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a wrong option has one
            raise
        _fail(f"{first_line(error.format_message())} (`relora --help` lists verbs, `relora VERB --help` options)", 2)


def _fail(message: str, status: int) -> NoReturn:
    # one line, in which a name can neither move the cursor nor fill the screen
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    line = re.sub(r"\S{200,}", lambda word: f"{word[0][:60]}...{word[0][-60:]}", line)
    print(f"relora: {line}", file=sys.stderr)
    sys.exit(status)
