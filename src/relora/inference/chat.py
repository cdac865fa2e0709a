"""A conversation with a finished model, a line at a time: a question, or a command.

`Chat` does what a line says and knows nothing of terminals; `chat` reads lines until there are none. Ctrl-C ends an
answer, which is kept as far as it came, and a second one in a row ends the chat.
"""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from relora.adapters.attached import BASE
from relora.errors import UserError
from relora.files.atomic import write_durably
from relora.inference.conversation import Conversation, Turn
from relora.inference.decoding import Continuation, Sampling, Write, check_stop, continue_prompt
from relora.inference.generate import Speed
from relora.inference.loading import LoadedModel, load_model_or_run
from relora.messages import short_repr
from relora.model.load import max_positions

Read = Callable[[], str | None]
"""The next line; None at the end of the input. May raise KeyboardInterrupt."""

COMMANDS = {
    "/reset": "forget what was said; the system prompt stays",
    "/system TEXT": "set the system prompt, or remove it where there is no TEXT",
    "/adapter NAME": "answer with this adapter, or with `base`; without NAME, list them",
    "/save FILE": "write the conversation to a new file, as `relora finetune` reads it",
    "/help": "show this",
    "/quit": "end",
}


class Chat:
    """One conversation with one model.

    Args:
        write: gets answers in pieces as they come.
        tell: gets what is not an answer, a line at a time.
    """

    def __init__(
        self,
        finished: LoadedModel,
        sampling: Sampling,
        *,
        system: str | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        write: Write,
        tell: Write,
    ) -> None:
        check_stop(stop)
        self.conversation = Conversation(system or None)
        self.written: list[Continuation] = []
        self._finished, self._sampling, self._stop, self._seed = finished, sampling, stop, seed
        self._write, self._tell = write, tell

    def take(self, line: str, asked_to_end: Callable[[], bool] | None = None) -> bool:
        """Do what a line says; whether the chat goes on.

        Raises:
            UserError: a command that cannot be done, or a question that is too long. Nothing has changed.
        """
        words = line.split(maxsplit=1)
        if not words:
            return True
        command, rest = words[0], words[1].strip() if len(words) > 1 else ""
        if not re.fullmatch(r"/[a-z]+", command):  # `/etc/hosts` begins a question like any other word
            self._answer(line.strip(), asked_to_end)
        elif command == "/quit":
            return False
        elif command == "/reset":
            self.conversation.reset()
        elif command == "/system":
            self.conversation.system = rest or None
        elif command == "/adapter":
            self._adapter(rest)
        elif command == "/save":
            self._save(rest)
        elif command == "/help":
            for each, meaning in COMMANDS.items():
                self._tell(f"{each:15} {meaning}")
        else:
            raise UserError(f"{short_repr(command)}: no such command; there are {', '.join(COMMANDS)}")
        return True

    def _answer(self, question: str, asked_to_end: Callable[[], bool] | None) -> None:
        finished, conversation = self._finished, self.conversation
        positions, forgotten = max_positions(finished.model), conversation.forgotten
        ids = conversation.ask(
            question, finished.encode_chat, positions=positions, answer_tokens=self._sampling.max_new_tokens
        )
        if conversation.forgotten > forgotten:
            left = len(conversation.turns) - conversation.forgotten
            self._tell(f"(the model's {positions:,} positions are full: it hears only the last {left} turns from now)")
        room = self._sampling.max_new_tokens if positions is None else positions - len(ids)
        continuation = continue_prompt(
            finished.model,
            finished.tokenizer,
            ids,
            replace(self._sampling, max_new_tokens=min(self._sampling.max_new_tokens, room)),
            self._seed,
            self._write,
            echo=False,
            stop=self._stop,
            asked_to_end=asked_to_end,
        )
        self._write("\n")
        self.written.append(continuation)
        if answer := continuation.text.strip():  # a turn without one would teach the model to say nothing
            conversation.turns.append(Turn(question, answer))

    def _adapter(self, name: str) -> None:
        adapters = self._finished.adapters
        if name:
            adapters.use(name)
        self._tell(f"(adapters: {adapters})")

    def _save(self, name: str) -> None:
        messages = self.conversation.messages()
        if not name or not self.conversation.turns:
            raise UserError("/save: give a file, once there is something to save, e.g. `/save chat.jsonl`")
        file = Path(name).expanduser()
        try:
            if file.exists():
                raise UserError(f"{file}: is there already, and was left as it is; give another name")
            write_durably(file, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror}") from None
        self._tell(f"(written to {file})")


def chat(
    model_or_run: str | Path,
    sampling: Sampling | None = None,
    *,
    adapters: Sequence[str] = (),
    system: str | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
    read: Read | None = None,
    write: Write | None = None,
    tell: Write | None = None,
) -> Speed:
    """Talk with a model until the input ends; returns how fast it answered.

    Args:
        model_or_run: as for `generate`.
        adapters: folders or runs whose adapters can be switched to. The model's own, or else the first of these, is in
            use from the start; with `base` among them, none is.
        read: gives the lines; by default those of standard input, with a prompt on a terminal.
        write: gets answers in pieces; by default standard output.
        tell: gets all other lines; by default standard error.

    Raises:
        UserError: as for `generate`; a tokenizer without a chat template of a model that was not fine-tuned by ours.
        KeyboardInterrupt: a second Ctrl-C.
    """
    check_stop(stop)
    finished = load_model_or_run(
        model_or_run,
        adapters=[each for each in adapters if each != BASE],
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    finished.adapters.use(BASE if BASE in adapters else (*finished.adapters.names, BASE)[0])
    finished.encode_chat([{"role": "user", "content": "?"}])  # a model that has no words for a chat is told of at once
    tell = tell or _tell
    session = Chat(
        finished, sampling or Sampling(), system=system, stop=stop, seed=seed, write=write or _write, tell=tell
    )
    if finished.adapters.names:
        tell(f"(adapters: {finished.adapters})")
    _talk(session, read or _read, tell)
    return Speed.of(session.written)


def _talk(session: Chat, read: Read, tell: Write) -> None:
    """Hand lines to a chat until there are none; what is wrong with a line is told, and the next one is read."""
    interrupted = False
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            tell("(Ctrl-C once more, Ctrl-D or /quit ends the chat)")
            continue
        if line is None:
            return
        with _Interrupt() as interrupt:
            try:
                if not session.take(line, interrupt.asked):
                    return
            except UserError as error:
                tell(f"relora: {error}")
        interrupted = interrupt.asked()


class _Interrupt:
    """While entered, a first SIGINT is noted; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def asked(self) -> bool:
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


def _read() -> str | None:
    """A line of standard input; on a terminal with a prompt, and with the line editing that Python was built with."""
    try:
        if not sys.stdin.isatty():
            return sys.stdin.readline() or None
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # what `input` edits and recalls lines with, once it is there
        return input("> " if sys.stdout.isatty() else "")
    except EOFError:
        print()  # the next thing to be shown begins a line
        return None
    except KeyboardInterrupt:
        print()
        raise
    except UnicodeDecodeError:
        raise UserError("standard input: not UTF-8 text") from None


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
