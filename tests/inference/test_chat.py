"""A chat handles lines one by one: questions, commands, mistakes, Ctrl-C, the end of the input."""

import io
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.adapters.adapted import NO_SYSTEM, STORIES, lora, needs_data, prompts, run_with_adapter, with_template

from relora.errors import UserError
from relora.inference.chat import COMMANDS, Chat, chat
from relora.inference.conversation import Turn
from relora.inference.decoding import Sampling
from relora.inference.loading import load_model_or_run

pytestmark = needs_data
SHORT = Sampling(max_new_tokens=12, do_sample=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the small pretrained model, with a chat template."""
    return with_template(tmp_path_factory.mktemp("chat") / "model")


class RecordedChat:
    """A chat that records its answers and everything else that it tells."""

    def __init__(self, model: Path, *, adapters: Iterable[Path] = (), sampling: Sampling = SHORT, **settings) -> None:
        self.answers: list[str] = []
        self.told: list[str] = []
        loaded = load_model_or_run(model, adapters=[str(each) for each in adapters], device="cpu")
        self.chat = Chat(loaded, sampling, write=self.answers.append, tell=self.told.append, **settings)

    def take(self, *lines: str) -> str:
        """Handle the lines and return the answers to them, joined."""
        self.answers.clear()
        for line in lines:
            assert self.chat.handle(line)
        return "".join(self.answers)


def run(model: Path, lines: Iterable[str], **settings) -> tuple[list[str], list[str]]:
    """Run a whole chat on these lines; return the pieces of its answers and the lines that it told."""
    answers, told = [], []
    waiting = iter(lines)
    settings = {"sampling": SHORT, "device": "cpu"} | settings
    chat(model, read=lambda: next(waiting, None), write=answers.append, tell=told.append, **settings)
    return answers, told


def test_the_model_is_given_the_history(model: Path) -> None:
    recorded = RecordedChat(model, sampling=Sampling(max_new_tokens=40, do_sample=False))
    first = recorded.take("Who is Lily?")
    second = recorded.take("Who is Lily?")
    assert first.endswith("\n") and second != first  # the second prompt contains the first turn
    assert recorded.chat.conversation.turns == [Turn("Who is Lily?", text.strip()) for text in (first, second)]
    assert recorded.take("/reset", "Who is Lily?") == first


def test_an_answer_is_what_transformers_generates_after_the_chat_template(model: Path) -> None:
    recorded = RecordedChat(model, system="Be kind.")
    answer = recorded.take("Hello")
    loaded = load_model_or_run(model, device="cpu")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    ids = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    whole = loaded.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    decoded = loaded.tokenizer.decode(whole, skip_special_tokens=True)
    assert f"system: Be kind.\nuser: Hello\nassistant:{answer}" == decoded + "\n"


def test_system(model: Path) -> None:
    recorded = RecordedChat(model)
    plain = recorded.take("Hello")
    assert recorded.take("/reset", "/system  Be  kind. ", "Hello") != plain
    assert recorded.chat.conversation.system == "Be  kind."
    assert recorded.take("/reset", "/system", "Hello") == plain


def test_adapters_answer_in_turn(model: Path, tmp_path: Path) -> None:
    places = [lora(tmp_path / "red", seed=1), prompts(tmp_path / "blue")]
    recorded = RecordedChat(model, adapters=places)
    answers = [recorded.take("/reset", f"/adapter {name}", "Hello") for name in ("base", "red", "blue", "base")]
    assert answers[0] == answers[3]
    assert len(set(answers)) == 3
    assert recorded.told == [
        "(adapters: base (in use), red, blue)",
        "(adapters: base, red (in use), blue)",
        "(adapters: base, red, blue (in use))",
        "(adapters: base (in use), red, blue)",
    ]
    recorded.take("/adapter")
    assert recorded.told[-1] == recorded.told[-2]
    with pytest.raises(UserError, match="'green': not loaded; there are base, red, blue"):
        recorded.chat.handle("/adapter green")


def test_what_was_heard_changes_no_answer(model: Path, tmp_path: Path) -> None:
    """Keys and values kept between turns, thrown away by another adapter, are those of a prompt read anew."""
    lines = ["Hello", "And Tom?", "/adapter red", "Why?", "/adapter base", "Why?", "/system Be kind.", "Hello"]
    place = lora(tmp_path / "red", seed=1)
    keeping, reading_anew = (RecordedChat(model, adapters=[place]) for _ in range(2))
    for line in lines:
        reading_anew.chat._heard.forget()
        assert keeping.take(line) == reading_anew.take(line)
    assert len(keeping.chat.conversation.turns) == 5
    assert keeping.chat._heard._ids  # the model is of the form whose keys and values are kept


def test_save_writes_what_fine_tuning_reads(model: Path, tmp_path: Path) -> None:
    recorded = RecordedChat(model, system="Be kind.")
    with pytest.raises(UserError, match="/save: give a file"):
        recorded.chat.handle(f"/save {tmp_path / 'empty.jsonl'}")
    recorded.take("Hello", f"/save {tmp_path / 'chat.jsonl'}")
    (line,) = (tmp_path / "chat.jsonl").read_text().splitlines()
    messages = json.loads(line)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[2]["content"] == recorded.chat.conversation.turns[0].answer
    with pytest.raises(UserError, match="is there already, and was left as it is"):
        recorded.chat.handle(f"/save {tmp_path / 'chat.jsonl'}")
    with pytest.raises(UserError, match="cannot be written: No such file"):
        recorded.chat.handle(f"/save {tmp_path / 'nowhere' / 'chat.jsonl'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl"]


def test_empty_lines_help_and_unknown_commands_are_not_questions(model: Path) -> None:
    recorded = RecordedChat(model)
    assert recorded.take("", "   ", "/help") == ""
    assert len(recorded.told) == len(COMMANDS)
    with pytest.raises(UserError, match=r"'/rest': no such command; there are /reset, /system TEXT"):
        recorded.chat.handle("/rest")
    assert recorded.take("/etc/hosts is a file") != ""  # a path begins a question
    assert recorded.chat.handle("/quit") is False


def test_stop_strings_end_answers(model: Path) -> None:
    plain = RecordedChat(model).take("Hello")
    stop = plain[5:8]
    assert RecordedChat(model, stop=[stop]).take("Hello") == plain[: plain.index(stop)] + "\n"
    with pytest.raises(UserError, match="stop string is empty"):
        RecordedChat(model, stop=[""])


def test_the_context_fills_up_from_the_oldest_turn(model: Path) -> None:
    recorded = RecordedChat(model, sampling=Sampling(max_new_tokens=2, do_sample=False), system="Be kind.")
    for number in range(12):
        recorded.take(f"Tell me story {number} of Lily." + " and Tom" * 20)
    assert any("positions are full: it hears only the last" in line for line in recorded.told)
    assert 0 < recorded.chat.conversation.omitted_turns < 12
    assert len(recorded.chat.conversation.turns) == 12
    with pytest.raises(UserError, match="of the model's 512 positions, which leaves no room"):
        recorded.chat.handle("Lily " * 600)
    assert len(recorded.chat.conversation.turns) == 12


def test_a_chat_goes_on_after_a_mistake_and_ends_with_the_input(model: Path) -> None:
    answers, told = run(model, ["/nothing", "Hello", "/system ", "/save", "Hello"])
    assert "".join(answers).count("\n") >= 2
    assert [line.split(":")[0] for line in told] == ["relora", "relora"]
    answers, told = run(model, ["/quit", "Hello"])
    assert (answers, told) == ([], [])


def test_a_refused_system_prompt_is_told_and_can_be_removed(tmp_path: Path) -> None:
    answers, told = run(with_template(tmp_path / "model", NO_SYSTEM), ["Hello", "/system", "Hello"], system="Be kind.")
    assert told == ["relora: the chat template refuses this conversation: no system here"]
    assert answers


def test_the_first_adapter_is_in_use_from_the_start(tmp_path: Path) -> None:
    run_folder = run_with_adapter(tmp_path / "tuned")
    answers, told = run(run_folder, ["Hello"])
    assert told == ["(adapters: base, tuned (in use))"]
    beside, told = run(STORIES, ["Hello"], adapters=[str(run_folder)])
    assert told == ["(adapters: base, tuned (in use))"]
    assert "".join(beside) == "".join(answers) != "\n"
    _, told = run(with_template(tmp_path / "model"), ["Hello"], adapters=[str(run_folder), "base"])
    assert told == ["(adapters: base (in use), tuned)"]


def test_without_a_template_the_error_names_generate() -> None:
    with pytest.raises(UserError, match=r"no chat template.*`relora generate`"):
        run(STORIES, ["Hello"])


def interrupting(answers: list[str], times: int):
    """Return a `write` that records its text and sends SIGINT `times` times with the first piece of an answer."""

    def write(text: str) -> None:
        answers.append(text)
        if len(answers) == 1:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return write


def test_ctrl_c_ends_the_answer_and_not_the_chat(model: Path) -> None:
    long = Sampling(max_new_tokens=80, do_sample=False)
    plain = RecordedChat(model, sampling=long).take("Hello")
    handler = signal.getsignal(signal.SIGINT)
    answers: list[str] = []
    lines = iter(["Hello", "/reset", "Hello"])
    speed = chat(
        model, long, device="cpu", read=lambda: next(lines, None), write=interrupting(answers, 1), tell=answers.append
    )
    first, second = "".join(answers).split("\n", 1)[0], "".join(answers)
    assert plain.startswith(first) and len(first) < len(plain) / 2
    assert second.endswith(plain)  # the next answer is complete
    assert speed.tokens > 80
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_the_chat(model: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    answers: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        chat(model, device="cpu", read=lambda: "Hello", write=interrupting(answers, 2), tell=answers.append)
    assert signal.getsignal(signal.SIGINT) is handler

    def interrupted() -> str:
        raise KeyboardInterrupt

    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # at the prompt: the first Ctrl-C is answered with a hint
        chat(model, device="cpu", read=interrupted, write=answers.append, tell=told.append)
    assert told == ["(Ctrl-C once more, Ctrl-D or /quit ends the chat)"]


def test_a_line_between_two_ctrl_c_resets_the_count(model: Path) -> None:
    steps = iter([KeyboardInterrupt, "/help", KeyboardInterrupt, None])

    def read() -> str | None:
        step = next(steps)
        if step is KeyboardInterrupt:
            raise KeyboardInterrupt
        return step

    told: list[str] = []
    chat(model, device="cpu", read=read, write=told.append, tell=told.append)
    assert sum("once more" in line for line in told) == 2


def test_each_line_of_a_pipe_is_a_turn(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n/system Be kind.\nHello\n/wrong"))
    speed = chat(model, SHORT, device="cpu")
    out, err = capfd.readouterr()
    assert out == RecordedChat(model).take("Hello", "/system Be kind.", "Hello")
    assert err.startswith("relora: '/wrong': no such command") and err.count("\n") == 1
    assert speed.tokens == 24
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="standard input: not UTF-8 text"):
        chat(model, SHORT, device="cpu")
