"""`llamita generate` and `llamita chat` as a user meets them: output, streams, pipes, one-line errors."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import run as run_here
from packed_models import pack
from tiny import make_checkpoint

from llamita.commands import chat

CLI = [sys.executable, "-m", "llamita.cli"]


def run(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [*CLI, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60)


def expect_error(result: subprocess.CompletedProcess[bytes], code: int, text: str) -> None:
    assert result.returncode == code, result.stderr
    message = result.stderr.decode()
    assert text in message
    assert message.count("\n") == 1
    assert "Traceback" not in message
    assert result.stdout == b""


GENERATE = ("generate", "embedded", "--max-tokens", "12", "--greedy", "--preset", "llama3.2")


def test_text_goes_to_stdout_and_the_rest_to_stderr() -> None:
    result = run(*GENERATE, "--prompt", "Once upon a time")
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().strip()
    assert "tok/s" in result.stderr.decode()
    assert "tok/s" not in result.stdout.decode()


def test_one_token_is_no_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(*GENERATE, "--prompt", "Once upon", "--max-tokens", "1") == 0
    assert ", 1 token at " in capsys.readouterr().err


def test_json_and_stdin_give_the_same_text() -> None:
    result = run(*GENERATE, "--prompt", "-", "--json", stdin=b"Once upon a time")
    values = json.loads(result.stdout)
    assert values["prompt"] == "Once upon a time"
    assert values["finish_reason"] == "length"
    assert len(values["token_ids"]) == values["timings"]["generated_tokens"] == 12
    streamed = run(*GENERATE, "--prompt", "Once upon a time")
    assert streamed.stdout.decode() == values["text"] + "\n"


def test_float_math_is_that_of_float_layers() -> None:
    result = run(*GENERATE, "--prompt", "Once upon a time", "--float-math", "bf16", "--scheme", "llama3.2")
    assert result.returncode == 0, result.stderr
    assert b"--float-math: f32; bf16 needs bf16 weights" in result.stderr
    expect_error(run(*GENERATE, "--prompt", "Once", "--float-math", "f16"), 2, "error: --float-math: expected one of")


def test_the_cache_can_be_int8_and_nothing_unknown() -> None:
    result = run(*GENERATE, "--prompt", "Once upon a time", "--kv-cache", "int8")
    assert result.returncode == 0, result.stderr
    for command in ((*GENERATE, "--prompt", "Once"), ("chat", "embedded")):
        expect_error(
            run(*command, "--kv-cache", "int4"), 2, "error: --kv-cache: expected one of f32, f16, int8, got 'int4'"
        )


def test_stop_and_seed_reach_the_engine() -> None:
    arguments = ("generate", "embedded", "--prompt", "Once upon a time", "--max-tokens", "40", "--json")
    free, again = (json.loads(run(*arguments, "--seed", "4").stdout) for _ in range(2))
    assert free["text"] == again["text"]
    word = free["text"].split()[3]
    stopped = json.loads(run(*arguments, "--seed", "4", "--stop", word, "--stop", "zzz", "--threads", "1").stdout)
    assert stopped["finish_reason"] == "stop"
    assert free["text"].startswith(stopped["text"])
    assert word not in stopped["text"]


def test_speculation_can_be_turned_off_and_changes_no_text() -> None:
    prompt = "The cat sat. The cat ran. The cat sat. The cat ran. The cat"
    arguments = (*GENERATE, "--max-tokens", "60", "--prompt", prompt, "--json")
    found = [json.loads(run(*arguments, *more).stdout) for more in (("--speculate", "0"), ())]
    assert found[0]["text"] == found[1]["text"]
    assert found[0]["timings"]["drafted_tokens"] == 0
    assert found[1]["timings"]["accepted_tokens"] <= found[1]["timings"]["drafted_tokens"] > 0


@pytest.mark.parametrize("command", [GENERATE, ("chat", "embedded")], ids=["generate", "chat"])
def test_drafts_from_files_reach_the_engine(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    given = [part for file in files for part in ("--draft-from", str(file))]
    files[0].write_text("Once upon a time")
    more = ("--prompt", "x") if command is GENERATE else ()
    assert run_here(*command, *more, *given) == 2
    assert capsys.readouterr().err == f"error: {files[1]}: cannot be read: No such file or directory\n"
    if command is GENERATE:
        files[1].write_text("there was a dog")
        assert run_here(*command, *more, *given) == 0


@pytest.mark.parametrize(
    ("arguments", "stdin", "text"),
    [
        (("--prompt", "-"), b"caf\xe9", "0xe9 at byte 3"),
        (("--prompt", "x " * 3000), b"", "; try a shorter one, or a larger context"),
        (("--prompt", "x", "--temperature", "-1"), b"", "temperature"),
        (("--prompt", "x", "--greedy", "--top-k", "3"), b"", "greedy"),
        (("--prompt", "x", "--stop", ""), b"", "stop"),
        (("--prompt", "x", "--max-tokens", "0"), b"", "--max-tokens: expected a whole number of at least 1, got 0"),
        (("--prompt", "x", "--speculate", "-1"), b"", "speculate"),
        (("--prompt", "x", "--preset", "nope"), b"", "error: --preset: expected one of arm, llama3.2, llamita, none"),
        (("--prompt", "x", "--context", "5000"), b"", "context"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: tuple[str, ...], stdin: bytes, text: str) -> None:
    expect_error(run("generate", "embedded", *arguments, stdin=stdin), 2, text)


def test_a_model_without_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    expect_error(run("generate", tmp_path, "--prompt", "x"), 2, "tokenizer.model alone")


def test_a_packed_model_without_tokenizer_gets_it_from_its_source(tmp_path: Path) -> None:
    out = pack(tmp_path, "arm")
    (out / "tokenizer.json").unlink()
    expected = "expected tokenizer.json, got none; try copying it from the source again"
    expect_error(run("generate", out, "--prompt", "x"), 2, expected)


def test_a_scheme_that_does_not_fit_names_one_that_does(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, hidden_size=192, num_attention_heads=6)
    result = run("generate", model, "--prompt", "a", "--scheme", "arm")
    expect_error(result, 2, "expected inputs in groups of 128, got 192; try scheme llama3.2, which has groups of 32")


def test_chat_answers_every_line_of_a_pipe() -> None:
    lines = b"Tell me a story.\n\n/system Be kind.\n/reset\n/nonsense\nOnce upon a time\n/exit\nnever asked\n"
    result = run("chat", "embedded", "--max-tokens", "8", "--greedy", "--json", stdin=lines)
    assert result.returncode == 0, result.stderr
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(replies) == 2
    assert all(len(reply["token_ids"]) == 8 for reply in replies)
    assert b"/exit ends" in result.stderr


def test_chat_remembers_until_reset() -> None:
    def prompt_tokens(lines: bytes, *arguments: str) -> list[int]:
        result = run("chat", "embedded", "--max-tokens", "4", "--greedy", "--json", *arguments, stdin=lines)
        return [json.loads(line)["timings"]["prompt_tokens"] for line in result.stdout.splitlines()]

    first, second, third = prompt_tokens(b"Hello\nHello\n/reset\nHello")
    assert first == third < second
    assert prompt_tokens(b"Hello\n", "--system", "Be kind.")[0] > first


def test_the_help_of_chat_says_that_a_system_message_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(chat.console, "note", notes.append)
    conversation = chat.Conversation("be brief")
    conversation.add("a", "b")
    assert chat._obey("/help", conversation)
    assert notes == [chat.HELP]
    assert "/system TEXT does so too and sets the system message (none without TEXT)" in chat.HELP
    assert "/system TEXT does so too and sets the system message (none without TEXT)" in (chat.command.__doc__ or "")
    assert chat._obey("/system", conversation)
    assert (conversation.system, conversation.turns) == (None, [])


def test_chat_does_not_compute_a_conversation_again() -> None:
    lines = b"Once upon a time there was a little dog.\nAnd then there was a cat.\n"
    result = run("chat", "embedded", "--max-tokens", "20", "--greedy", "--json", stdin=lines)
    first, second = (json.loads(line)["timings"] for line in result.stdout.splitlines())
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] >= first["prompt_tokens"]
    plain = run("chat", "embedded", "--max-tokens", "20", "--greedy", stdin=lines)
    assert f"({second['reused_tokens']} reused)" in plain.stderr.decode()


def test_chat_goes_on_after_a_context_that_is_full() -> None:
    """Turns until it is full, two more that are refused, and a new beginning; never a reply of a token."""
    lines = b"Tell me a story.\n" * 12 + b"/reset\nTell me a story.\n"
    options = ("--context", "80", "--max-tokens", "24", "--greedy", "--json", "--preset", "none")
    result = run("chat", "embedded", *options, stdin=lines)
    assert result.returncode == 0, result.stderr
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(replies) == 13
    answered = ["error" not in reply for reply in replies]
    assert answered[0]
    assert answered[-1]
    assert not answered[-2]
    assert all(len(reply["token_ids"]) >= 16 for reply in replies if reply.get("finish_reason") == "context")
    text = next(reply["error"] for reply in replies if "error" in reply)
    assert "within 80 tokens" in text
    assert "try /reset, which begins anew, or up to --context 2048" in text
    assert text in result.stderr.decode()


def test_a_base_model_does_not_chat(tmp_path: Path) -> None:
    expect_error(run("chat", make_checkpoint(tmp_path), stdin=b"Hi\n"), 2, "chat template")


class Terminal:
    """A chat in a terminal of its own, where Ctrl-C is a key.

    Args:
        sigint: what the chat inherits for it.
    """

    def __init__(self, *arguments: str, sigint: signal.Handlers) -> None:
        self._main, child = pty.openpty()

        def take_terminal() -> None:
            signal.signal(signal.SIGINT, sigint)
            os.login_tty(child)

        # Slow kernels, so that no reply ends before the key is pressed
        slow = {**os.environ, "LLAMITA_ISA": "scalar"}
        self.process = subprocess.Popen([*CLI, *arguments], env=slow, preexec_fn=take_terminal)
        os.close(child)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until the text has come, and forget what came before it."""
        end = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self._main], [], [], 0.2)[0]:
                self.seen += os.read(self._main, 4096).decode(errors="replace")
        self.seen = self.seen.split(text, 1)[1]


@pytest.mark.parametrize("sigint", [signal.SIG_DFL, signal.SIG_IGN])
def test_ctrl_c_stops_a_reply_and_not_the_chat(sigint: signal.Handlers) -> None:
    options = ("--max-tokens", "2000", "--temperature", "5", "--top-p", "1", "--seed", "1")
    terminal = Terminal("chat", "embedded", *options, sigint=sigint)
    terminal.wait_for("/exit ends")
    for words in (1, 10, 100):
        terminal.wait_for("> ")
        terminal.type("Once upon a time\r")
        terminal.wait_for("time")  # the terminal's echo
        for _ in range(words):
            terminal.wait_for(" ")  # between two words of the reply
        terminal.type("\x03")
        terminal.wait_for("\nstopped")
    terminal.wait_for("> ")
    terminal.type("/exit\r")
    assert terminal.process.wait(timeout=20) == 0
