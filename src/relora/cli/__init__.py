"""The command `relora`; each verb reads its options and makes one call of the library.

training   prepare, pretrain, finetune, compare
tuning     tune
planning   plan, config
models     export, evaluate, generate, chat, report
machine    doctor
adapters   `relora adapters VERB`
options    options that several verbs have
tables     what verbs print for people

A mistake of the user prints one line and ends with status 2. A run that stopped itself ends with 3, and a verb that was
ended by a signal with 128 + the signal's number. Verbs import what they need when they run, so that a misspelt key or
`--help` answers before torch is loaded.
"""

import errno
import os
import re
import sys
from typing import NoReturn

import typer

from relora.cli import adapters, machine, models, planning, training, tuning
from relora.errors import PeerFailed, ReloraError
from relora.messages import first_line

app = typer.Typer(
    help="Pretrain and fine-tune language models through low-rank updates.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(training.app)
app.add_typer(tuning.app)
app.add_typer(planning.app)
app.add_typer(models.app)
app.add_typer(machine.app)
app.add_typer(adapters.app, name="adapters")


def main() -> None:
    """Run the command of `sys.argv`; an error with a message for the user becomes one line on stderr and a status."""
    try:
        # where Ctrl-C ends a verb, typer returns the exit status instead of raising an exception
        if status := app(sys.argv[1:] or ["--help"], prog_name="relora", standalone_mode=False):
            sys.exit(status)
    except PeerFailed as error:  # another process of the run says why
        sys.exit(error.exit_status)
    except ReloraError as error:
        _fail(str(error), error.exit_status)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:  # `relora ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a path that is too long, or a disk that is full where no one else checks for it
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"{error.filename}: {error.strerror}", 2)
        _fail(f"{error.filename or 'disk'}: {error.strerror or error}; make room and run the same command again", 3)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's errors for wrong options have it
            raise
        _fail(f"{first_line(error.format_message())} (`relora --help` lists verbs, `relora VERB --help` options)", 2)


def _fail(message: str, status: int) -> NoReturn:
    """Print the message as one line on stderr and exit.

    Control characters in it are escaped and very long words are cut, so that no name from a file can move the cursor or
    fill the screen.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    line = re.sub(r"\S{200,}", lambda match: f"{match[0][:60]}...{match[0][-60:]}", line)
    print(f"relora: {line}", file=sys.stderr)
    sys.exit(status)
