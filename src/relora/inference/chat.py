"""A chat with a trained model, line by line: each line is a question or a command.

`Chat` handles single lines and knows nothing of terminals; `chat` reads lines until the input ends. Ctrl-C ends an
answer, whose text so far is kept; a second Ctrl-C in a row ends the chat.
"""

import contextlib
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
from relora.files.atomic import write_json
from relora.inference.conversation import Conversation, Turn
from relora.inference.decoding import Continuation, Sampling, check_stop, continue_prompt
from relora.inference.generate import Speed
from relora.inference.generation_settings import check_generation_settings
from relora.inference.growing_text import Write
from relora.inference.loading import LoadedModel, load_model_or_run
from relora.inference.rows import Heard
from relora.messages import short_repr
from relora.model.load import max_positions

Read = Callable[[], str | None]
"""Returns the next line of input, or None at its end. It may raise KeyboardInterrupt."""

COMMANDS = {
    "/reset": "forget what was said; the system prompt stays",
    "/system TEXT": "set the system prompt, or remove it where there is no TEXT",
    "/adapter NAME": "answer with this adapter, or with `base`; without NAME, list them",
    "/save FILE": "write the conversation to a new file, as `relora finetune` reads it",
    "/help": "show this",
    "/quit": "end",
}
"""Every command of a chat, with the text that /help shows for it."""


class Chat:
    """One conversation with one model.

    Args:
        sampling: settings for the answers; `max_new_tokens` limits each of them.
        system: the system prompt.
        stop: strings that end an answer.
        seed: key of the random draws.
        write: receives the answers, in pieces as they are generated.
        tell: receives everything that is not an answer, line by line.
    """

    def __init__(
        self,
        loaded: LoadedModel,
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
        self.answers: list[Continuation] = []
        """All answers so far, including those that `/reset` removed from the conversation."""
        self._loaded, self._sampling, self._stop, self._seed = loaded, sampling, stop, seed
        self._write, self._tell = write, tell
        self._heard = Heard()

    def handle(self, line: str, asked_to_end: Callable[[], bool] | None = None) -> bool:
        """Answer a question or carry out a command; return whether the chat goes on.

        Args:
            asked_to_end: called after every token of an answer; the answer ends as soon as it returns true.

        Raises:
            UserError: the command cannot be carried out, or the question is too long. Nothing has changed.
        """
        words = line.split(maxsplit=1)
        if not words:
            return True
        command, argument = words[0], words[1].strip() if len(words) > 1 else ""
        if not re.fullmatch(r"/[a-z]+", command):  # a path such as /etc/hosts may begin a question
            self._answer(line.strip(), asked_to_end)
        elif command == "/quit":
            return False
        elif command == "/reset":
            self.conversation.reset()
        elif command == "/system":
            self.conversation.system = argument or None
        elif command == "/adapter":
            self._use_adapter(argument)
        elif command == "/save":
            self._save(argument)
        elif command == "/help":
            for name, meaning in COMMANDS.items():
                self._tell(f"{name:15} {meaning}")
        else:
            raise UserError(f"{short_repr(command)}: no such command; there are {', '.join(COMMANDS)}")
        return True

    def _answer(self, question: str, asked_to_end: Callable[[], bool] | None) -> None:
        """Generate the answer to a question and add both to the conversation."""
        loaded, conversation = self._loaded, self.conversation
        positions, omitted_before = max_positions(loaded.model), conversation.omitted_turns
        ids = conversation.ask(
            question, loaded.encode_chat, positions=positions, answer_tokens=self._sampling.max_new_tokens
        )
        if conversation.omitted_turns > omitted_before:
            left = len(conversation.turns) - conversation.omitted_turns
            self._tell(f"(the model's {positions:,} positions are full: it hears only the last {left} turns from now)")
        room = self._sampling.max_new_tokens if positions is None else positions - len(ids)
        continuation = continue_prompt(
            loaded.model,
            loaded.tokenizer,
            ids,
            replace(self._sampling, max_new_tokens=min(self._sampling.max_new_tokens, room)),
            self._seed,
            self._write,
            echo=False,
            stop=self._stop,
            asked_to_end=asked_to_end,
            heard=self._heard,
        )
        self._write("\n")
        self.answers.append(continuation)
        if answer := continuation.text.strip():  # an empty answer in the history would be an example to follow
            conversation.turns.append(Turn(question, answer))

    def _use_adapter(self, name: str) -> None:
        """Switch to the adapter `name`, if a name is given, and list all adapters."""
        adapters = self._loaded.adapters
        if name:
            adapters.use(name)
            self._heard.forget()  # keys and values of other weights
        self._tell(f"(adapters: {adapters})")

    def _save(self, name: str) -> None:
        """Write the conversation to a new file, as one line of JSON in the format of fine-tuning data."""
        messages = self.conversation.messages()
        if not name or not self.conversation.turns:
            raise UserError("/save: give a file, once there is something to save, e.g. `/save chat.jsonl`")
        file = Path(name).expanduser()
        try:
            if file.exists():
                raise UserError(f"{file}: is there already, and was left as it is; give another name")
            write_json(file, {"messages": messages}, indent=None, ensure_ascii=False)
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
    """Chat with a model until the input ends; return the speed of its answers.

    Args:
        model_or_run: a run folder, a model folder, a hub id or an adapter's folder, as for `generate`.
        adapters: folders or runs whose adapters the user can switch to. At the start the model's own adapter is in use,
            or else the first of these; if `base` is among them, none is.
        system: the system prompt.
        stop: strings that end an answer.
        read: returns the next line; by default from standard input, with a prompt on a terminal.
        write: receives the answers in pieces; by default standard output.
        tell: receives all other lines; by default standard error.

    Raises:
        UserError: as for `generate`; the tokenizer has no chat template and no run of ours fine-tuned the model.
        KeyboardInterrupt: Ctrl-C was pressed twice in a row.
    """
    check_stop(stop)
    loaded = load_model_or_run(
        model_or_run,
        adapters=[each for each in adapters if each != BASE],
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    check_generation_settings(loaded)
    names = loaded.adapters.names
    loaded.adapters.use(BASE if BASE in adapters or not names else names[0])
    loaded.encode_chat([{"role": "user", "content": "?"}])  # refuses a model without a chat template before any input
    tell = tell or _tell
    session = Chat(
        loaded, sampling or Sampling(), system=system, stop=stop, seed=seed, write=write or _write, tell=tell
    )
    if names:
        tell(f"(adapters: {loaded.adapters})")
    _handle_lines(session, read or _read, tell)
    return Speed.of(session.answers)


def _handle_lines(session: Chat, read: Read, tell: Write) -> None:
    """Pass lines to a chat until the input or the chat ends; a line that fails is reported and the next one is read."""
    was_interrupted = False
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            if was_interrupted:
                raise
            was_interrupted = True
            tell("(Ctrl-C once more, Ctrl-D or /quit ends the chat)")
            continue
        if line is None:
            return
        with _Interrupt() as interrupt:
            try:
                if not session.handle(line, interrupt.received):
                    return
            except UserError as error:
                tell(f"relora: {error}")
        was_interrupted = interrupt.received()


class _Interrupt:
    """Context in which the first SIGINT is only recorded and the second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def received(self) -> bool:
        """Whether there was a SIGINT since the context was entered."""
        return self._received

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = True


def _read() -> str | None:
    """Read a line of standard input; on a terminal with a prompt, and with line editing where Python has readline."""
    try:
        if not sys.stdin.isatty():
            return sys.stdin.readline() or None
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # once imported, `input` edits and recalls lines with it
        return input("> " if sys.stdout.isatty() else "")
    except EOFError:
        print()  # so that the next output begins on a new line
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
