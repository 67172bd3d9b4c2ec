"""Claim: the chat is pleasant and safe: reasoning folded, commands obeyed, nothing lost, nothing hung.

The demo answers through a pseudo-terminal, as one process and as two ranks. What is typed and shown is also
tested without a model, by events that are written out.
"""
import io
import json
import os
import re
import signal
import subprocess
import termios
from datetime import date
from itertools import count

import pexpect
import pytest
from test_cli import program

import generate
from chat import BOXED, Chat, Tokenizer, file_prompt, search_prompt
from interactive import Conversation, Keyboard, Screen, last_columns

PROMPT = re.escape("\x1b[?2004h")           # a new line to be typed: the terminal is to mark pastes
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
LONG = "Mia has 23 boxes with 12 pencils in each, and 40 more pencils. How many pencils is that in all?"


@pytest.fixture(scope="module")
def demo():
    return Chat(Tokenizer(generate.DEMO))


def start(*more, ranks: int = 1, **env) -> pexpect.spawn:
    args = program("generate.py", "--interactive", "--seed", 1, "--dtype", "float32", *more, ranks=ranks)
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm", **env}
    child = pexpect.spawn(args[0], args[1:], encoding="utf-8", timeout=40, dimensions=(30, 100), env=env)
    child.expect(PROMPT)
    return child


def say(child: pexpect.spawn, line: str) -> str:
    """Type a line; all that appears until the next prompt."""
    child.send(line + "\r")
    child.expect(PROMPT)
    return child.before


def leave(child: pexpect.spawn, key: str = "/exit\r") -> None:
    child.send(key)
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0 and "Traceback" not in child.before


# Through a terminal


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_conversation_folds_its_reasoning_and_ctrl_c_stops_an_answer_on_all_ranks(ranks):
    child = start(ranks=ranks)
    shown = say(child, "What is 478 + 56?")
    assert re.search(r"thinking, \d+ tokens: .*478\+56", shown)
    assert re.search(r"\r\x1b\[K\x1b\[2mthought for \d+ tokens, \d+ s\r\n\r\n\x1b\[0m478 \+ 56 = .boxed.534",
                     shown)
    assert re.search(r"tokens/s; prompt: 17 of 17 tokens new", shown)
    child.send(LONG + "\r")
    child.expect("thinking, 1.* tokens")
    child.send(CTRL_C)
    child.expect(PROMPT)
    assert "(stopped)" in child.before and "does not count; /retry" in child.before
    assert "prompt: 1 of" in say(child, "/retry")               # the whole prompt is still in the cache
    child.send(CTRL_C)
    child.expect("/exit or Ctrl-D leaves")
    child.expect(PROMPT)
    assert re.search(r"prompt: (\d+) of (\d+) tokens new", say(child, "12 + 30?"))
    leave(child, CTRL_D)


def test_lines_are_edited_and_long_chinese_and_many_line_pastes_arrive_whole(tmp_path):
    child = start()
    assert "12+31" in say(child, "12 + 3?\x1b[D1")              # cursor left, then a 1
    assert "12+31" in say(child, UP)                            # the line before, from the history
    pasted = "你好，世界！" * 20 + "\n" + "x" * 200 + "\nend"
    say(child, f"\x1b[200~{pasted}\x1b[201~")
    say(child, f"/save {tmp_path / 'talk.json'}")
    leave(child)
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["12 + 31?", "12 + 31?", pasted]


def test_what_is_typed_during_an_answer_waits_for_the_next_prompt():
    child = start()
    child.send("What is 4711 * 8153?\r")
    child.expect("thinking, ")
    child.send("1 + 3\x7f2?")                                   # backspace
    child.expect(PROMPT)
    assert "1+2" in say(child, "")
    child.send("What is 4711 * 8153?\r")
    child.expect("thinking, ")
    child.send("/think on\r3 + 4?\r")                          # two lines: both are obeyed, once
    child.expect("reasoning will be shown")
    child.expect("</think>")
    child.expect(PROMPT)
    child.send("What is 4711 * 8153?\r")
    child.expect("<think>")
    child.send(f"{LONG}\r3 + 4?\r")
    child.expect("<think>")
    child.send(CTRL_C)                                          # the third line is dropped, too
    child.expect(r"\(stopped\)")
    child.expect(PROMPT)
    assert "folded" in say(child, "/think off") and "boxed" not in child.before
    leave(child)


def refuse(*_):
    raise termios.error(4, "Interrupted system call")


def test_keys_are_taken_again_when_a_stopped_chat_goes_on(monkeypatch):
    """After Ctrl-Z and `fg` in an answer, where the shell has given the terminal its own mode."""
    master, slave = os.openpty()
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCONT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with open(slave, encoding="utf-8") as terminal, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", terminal)
            theirs = termios.tcgetattr(terminal)
            keyboard = Keyboard(True)
            with keyboard:
                ours = termios.tcgetattr(terminal)
                assert ours != theirs
                for asking, mode in ((False, ours), (True, theirs)):
                    keyboard.asking = asking
                    termios.tcsetattr(terminal, termios.TCSADRAIN, theirs)
                    os.kill(os.getpid(), signal.SIGCONT)
                    assert termios.tcgetattr(terminal) == mode
                keyboard.asking = False
                with monkeypatch.context() as background:           # after `bg`
                    background.setattr(termios, "tcsetattr", refuse)
                    os.kill(os.getpid(), signal.SIGCONT)
            assert termios.tcgetattr(terminal) == theirs
    finally:
        os.close(master)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_outside_of_an_answer_ends_no_rank_and_adds_no_question(ranks, tmp_path):
    (tmp_path / "long.txt").write_text("12 + 30 is a question. " * 100_000)
    child = start(ranks=ranks)
    say(child, f"/file {tmp_path / 'long.txt'}")
    child.send("what?\r")
    for _ in range(30):                         # while it is made into tokens, refused, and at the prompt
        child.send(CTRL_C)
    child.expect("tokens by now")
    while child.expect(["/exit or Ctrl-D leaves", pexpect.TIMEOUT], timeout=2) == 0:
        pass
    child.send("/clear\r")
    child.expect("a new conversation")
    child.send("12 + 30?\r")
    child.expect("prompt: 13 of 13")
    child.expect(PROMPT)
    leave(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_killed_answer_leaves_the_terminal_as_it_was(number):
    child = start()
    before = termios.tcgetattr(child.child_fd)
    child.send("What is 4711 * 8153?\r")
    child.expect("thinking, ")
    child.kill(number)
    child.expect(pexpect.EOF)
    child.wait()
    lflag, keys = 3, 6
    after = termios.tcgetattr(child.child_fd)
    assert after[lflag] & termios.ECHO and after[lflag] & termios.ICANON
    assert after[keys][termios.VINTR] == CTRL_C.encode() and before[keys][termios.VINTR] == b"\x00"
    assert child.exitstatus == 128 + number


def test_reasoning_is_kept_in_full_if_asked_and_colour_can_be_refused():
    child = start("--show-reasoning")
    assert "\x1b[2m<think>\r\n" in say(child, "12 + 30?")
    assert "folded" in say(child, "/think off")
    assert "thought for" in say(child, "12 + 30?")
    assert "shown" in say(child, "/think on")
    shown = say(child, "12 + 30?")
    assert "</think>\r\n\r\n" in shown and "thought for" not in shown
    leave(child)
    child = start(NO_COLOR="1")
    shown = say(child, "12 + 30?")
    assert "thought for" in shown and "\x1b[2m" not in shown
    leave(child)


def test_a_pipe_gets_plain_text_and_ctrl_d_and_bad_bytes_end_nothing():
    done = subprocess.run(program("generate.py", "--interactive", "--temperature", 0), timeout=120,
                          input=b"caf\xe9\n12 + 30?\r\n/think off\n12 + 30?\n", capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    out = done.stdout.decode()
    assert done.returncode == 0 and "Traceback" not in done.stderr.decode() and "\x1b" not in out
    assert "\x1b" not in done.stderr.decode()
    assert "messages[0].content: not valid Unicode" in out
    assert re.search(r"<think>\n.*12\+30.*\n</think>\n\n12 \+ 30 = .boxed.42.\n", out, re.DOTALL)
    assert re.search(r"will be folded.\n>>> thought for \d+ tokens, \d+ s\n\n12 \+ 30 = .boxed.42.\n", out)
    assert b"13 of 13 tokens new" in done.stderr                # no CR among them


def test_input_that_cannot_be_read_ends_the_chat():
    with open(os.devnull, "w") as unreadable:                   # as nohup has it
        done = subprocess.run(program("generate.py", "--interactive"), stdin=unreadable, timeout=120,
                              capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(">>>") == 1


# Without a model


class Typed:
    """A keyboard that types these lines."""
    terminal = False

    def __init__(self, *lines):
        self.lines = list(lines)

    def line(self):
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def events(chat, text, reason="stop"):
    ids = chat.tokenizer.encode(text)
    return iter([*(generate.Event(0, 0, (i,), (0.0,), None) for i in ids),
                 generate.Event(0, 0, (), (), reason)])


def asked(conversation, *lines, screen=None) -> str | None:
    ids = conversation.read(Typed(*lines), screen)
    return ids and conversation.chat.tokenizer.decode(ids)


def test_text_is_on_the_screen_before_the_next_token_is_computed(demo, capsys):
    def slow():
        for event in events(demo, "so</think>ok 1 + 2"):
            yield event
            seen.append(capsys.readouterr().out)

    seen = []
    assert Screen(demo, full=True).show(slow(), True, 5) == ("so", "ok 1 + 2")
    shown = [demo.tokenizer.decode([i]) for i in demo.tokenizer.encode("so")]
    assert seen[:len(shown)] == ["<think>\n" + shown[0], *shown[1:]]
    assert "".join(seen) == "<think>\nso\n</think>\n\nok 1 + 2"


@pytest.mark.parametrize("text, thinking, shown, parts", [
    ("I think\n</think>\n\n42", True, "<think>\nI think\n</think>\n\n42\n", ("I think\n", "42")),
    ("</think>\n\n42\n", True, "<think>\n</think>\n\n42\n", ("", "42\n")),
    ("<think>\nhm</think>42", False, "<think>\nhm\n</think>\n\n42\n", ("hm", "42")),
    ("42", False, "42\n", ("", "42")),
    ("I thi", True, "<think>\nI thi\n", ("I thi", ""))])
def test_a_pipe_shows_reasoning_between_its_tags(text, thinking, shown, parts, demo, capsys):
    assert Screen(demo, full=False).show(events(demo, text), thinking, 5) == parts
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("reason, note", [("length", "(stopped at the limit of tokens)"),
                                          ("repetition", "(stopped: it repeats itself)")])
def test_an_answer_says_why_it_ended_early(reason, note, demo, capsys):
    Screen(demo, full=True).show(events(demo, "1, 2, 3", reason), False, 5)
    out, err = capsys.readouterr()
    assert out == "1, 2, 3\n" and err.startswith(f"{note}\n")


def test_control_characters_of_a_model_or_a_name_do_not_reach_the_terminal(demo, capsys, monkeypatch,
                                                                           tmp_path):
    screen = Screen(demo, full=True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)          # even one that knows no escape sequences
    screen.write("\x1b[2Jgone\x07 \x9b1m\r好\n\t")
    assert capsys.readouterr().out == "\ufffd[2Jgone\ufffd \ufffd1m\ufffd好\n\t"
    asked(Conversation(demo, 2048, False), "/load \x1b[2J")
    (tmp_path / "\x1b[2J").write_text("text")
    asked(Conversation(demo, 2048, False), f"/file {tmp_path}/\x1b[2J")
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("columns, shown", [(0, ""), (1, "b"), (2, "b"), (3, "好b"), (9, "a好b")])
def test_the_end_of_a_text_in_columns(columns, shown):
    assert last_columns("a好b", columns) == shown


@pytest.mark.parametrize("columns", [5, 20, 80])
def test_the_folded_line_never_wraps(columns, demo, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen(demo, full=False)
    screen.terminal, screen.full = True, False
    screen.show(events(demo, "好 1 + 2 好 " * 20 + "</think>3"), True, 5)
    first, *lines = capsys.readouterr().out.split("\r\x1b[K")
    assert first == "thinking" and len(lines) > 100
    for line in lines[:-1]:
        assert len(line) + line.count("好") < columns
    assert re.fullmatch(r"thought for 280 tokens, 0 s\n\n3\n", lines[-1])


def test_history_holds_answers_and_no_reasoning_and_retry_takes_the_answer_back(demo, tmp_path):
    conversation = Conversation(demo, 2048, boxed=False)
    assert asked(conversation, "/retry", "", "Hi") == "<｜User｜>Hi<｜Assistant｜><think>\n"
    conversation.add("so", "Ho")
    history = "<｜User｜>Hi<｜Assistant｜>Ho"
    assert asked(conversation, "Bye") == f"{history}<｜User｜>Bye<｜Assistant｜><think>\n"
    conversation.add("thinking when it was stopped", "")
    assert asked(conversation, "/retry") == f"{history}<｜User｜>Bye<｜Assistant｜><think>\n"
    conversation.add("", "Tschüss")
    assert asked(conversation, "/retry") == f"{history}<｜User｜>Bye<｜Assistant｜><think>\n"
    conversation.add("stopped again", "")
    assert [m["content"] for m in conversation.messages] == ["Hi", "Ho", "Bye", "Tschüss"]
    assert asked(conversation, "/retry") == f"{history}<｜User｜>Bye<｜Assistant｜><think>\n"
    conversation.add("", "more</think>\n")      # of which the template would keep nothing
    assert [m["content"] for m in conversation.messages] == ["Hi", "Ho", "Bye", "Tschüss"]
    assert asked(conversation, "/retry") == f"{history}<｜User｜>Bye<｜Assistant｜><think>\n"
    conversation.add("", "Ciao")
    assert [m["content"] for m in conversation.messages] == ["Hi", "Ho", "Bye", "Ciao"]
    (tmp_path / "a.txt").write_text("1 + 2")
    asked(conversation, f"/file {tmp_path / 'a.txt'}")
    assert asked(conversation, "/retry") == f"{history}<｜User｜>Bye<｜Assistant｜><think>\n"
    conversation.add("", "Ade")
    conversation.max_seq_len = 5               # no room: all stays as it was
    assert asked(conversation, "/retry", "/retry") is None
    assert [m["content"] for m in conversation.messages] == ["Hi", "Ho", "Bye", "Ade"]
    conversation.max_seq_len = 100_000
    assert asked(conversation, "And?").startswith(f"{history}<｜User｜>Bye<｜Assistant｜>Ade<｜User｜>[file name]")
    assert asked(conversation, "/clear", "Hi") == "<｜User｜>Hi<｜Assistant｜><think>\n"
    assert asked(conversation, "/exit", "Hi") is None and asked(conversation) is None


def test_a_question_without_room_or_with_a_forged_start_is_not_kept(demo, capsys):
    conversation = Conversation(demo, 100, boxed=True)
    prompt = asked(conversation, "好" * 100, "a <｜begin▁of▁sentence｜>", "half \ud83d", "so?")
    assert prompt.endswith("within \\boxed{}.<｜Assistant｜><think>\n")
    out = capsys.readouterr().out
    assert "tokens by now, and --max-seq-len is 100" in out and "a prompt has one" in out
    assert "not valid Unicode" in out
    assert [message["content"] for message in conversation.messages] == ["so?\n" + BOXED]


def test_files_and_web_pages_make_the_official_prompts(demo, tmp_path, capsys):
    (tmp_path / "my notes.txt").write_text("\ufeffHälfte\n", encoding="utf-8")
    (tmp_path / "pages.json").write_text(json.dumps(
        ["one", {"title": "Two", "url": "http://two", "content": "zwei", "rank": 2},
         {"title": None, "content": "drei"}]))
    for name, command, question in (("my notes.txt", "/file", "What is it?"),
                                    ("pages.json", "/search", "Who?"), ("pages.json", "/search", "谁？")):
        conversation = Conversation(demo, 100_000, boxed=False)
        asked(conversation, f"{command} '{tmp_path / name}'", question)
        official = (file_prompt(name, "Hälfte\n", question) if command == "/file" else
                    search_prompt(["one", "Two\nhttp://two\nzwei", "drei"], question, date.today()))
        assert conversation.messages == [{"role": "user", "content": official}]
        conversation.add("", "Well.")
        asked(conversation, "And now?")
        assert conversation.messages[-1]["content"] == "And now?"           # one question only
    assert "put away" not in capsys.readouterr().out
    conversation = Conversation(demo, 100_000, boxed=False)
    asked(conversation, f"/file {tmp_path / 'pages.json'}", f"/search {tmp_path / 'pages.json'}", "谁？")
    assert conversation.messages == [{"role": "user", "content": official}]
    assert capsys.readouterr().out.count("what was attached before is put away") == 1
    (tmp_path / "long.txt").write_text("好" * 100)
    conversation = Conversation(demo, 100, boxed=False)
    assert asked(conversation, f"/file {tmp_path / 'long.txt'}", "Why?", "So?").startswith("<｜User｜>So?")
    out = capsys.readouterr().out
    assert "--max-seq-len is 100; what was attached is put away" in out and "/clear" not in out


def test_commands_that_cannot_be_obeyed_say_why_and_the_chat_goes_on(demo, tmp_path, capsys):
    conversation = Conversation(demo, 2048, boxed=False)
    (tmp_path / "data.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "loop").symlink_to("loop")
    for text in ("{", "{}", "[]", '{"a": 1}', '[{"title": "no content"}]', "[3]", '[{"content": 3}]',
                 '[{"content": "\\ud83d"}]', "[" * 100_000):
        (tmp_path / "bad.json").write_text(text)
        assert asked(conversation, f"/search {tmp_path / 'bad.json'}") is None
        assert "bad.json: not a JSON list" in capsys.readouterr().out
    for line, words in ((f"/file {tmp_path / 'data.bin'}", "data.bin: not a text file in UTF-8"),
                        ("/file /nowhere/x", "No such file"), ("/file", "usage: /file PATH"),
                        (f"/file {tmp_path}", "Is a directory"), ("/search", "usage: /search FILE.json"),
                        ("/think maybe", "usage: /think on|off"),
                        ("/file ~nosuchuser/x", "No such file"), ("/save x", "nothing to save"),
                        (f"/load {tmp_path / 'loop'}", "symbolic links"),
                        ("/clear all", "usage: /clear"), ("/frobnicate now", "/frobnicate is no command")):
        assert asked(conversation, line) is None
        assert words in capsys.readouterr().out
    for line in (" /etc is what?", " /exit"):
        assert asked(Conversation(demo, 2048, False), line).startswith(f"<｜User｜>{line}<｜Assistant｜>")
    asked(conversation, "/think  off", screen=Screen(demo, False))
    assert "folded" in capsys.readouterr().out
    asked(conversation, "/help")
    out = capsys.readouterr().out
    assert all(f"  {usage}" in out for usage in ("/clear", "/retry", "/think on|off", "/file PATH", "/save",
                                                 "/search FILE.json", "/exit", "Ctrl-C"))


def test_a_saved_conversation_is_a_prompt_file_and_is_never_half_there(demo, tmp_path, monkeypatch, capsys):
    conversation = Conversation(demo, 2048, boxed=False)
    asked(conversation, "Hi")
    conversation.add("so\n", "Ho 你好")
    path = tmp_path / "talk.json"
    asked(conversation, f"/save {path}")
    record, = generate.read_prompts(path)
    assert record["messages"] == [{"role": "user", "content": "Hi"},
                                  {"role": "assistant", "content": "Ho 你好", "reasoning": "so"}]
    before = path.read_bytes()
    (tmp_path / "mine.py").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    asked(conversation, f"/save {tmp_path / 'mine.py'}", f"/save {tmp_path / 'pipe'}", "/save /dev/null")
    assert capsys.readouterr().out.count("is there already; it would be lost") == 3
    (tmp_path / "mine.py").unlink(), (tmp_path / "pipe").unlink()
    asked(conversation, f"/save {path}")                # this one may be written again
    assert "(2 messages in" in capsys.readouterr().out

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    asked(conversation, f"/save {path}")
    assert "No space left" in capsys.readouterr().out and path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_conversation_goes_on_where_it_was(demo, tmp_path, capsys):
    old, path = Conversation(demo, 2048, boxed=False), tmp_path / "talk"
    asked(old, "Hi")
    old.add("so", "Ho")
    asked(old, f"/save {path}")
    new = Conversation(demo, 2048, boxed=False)
    assert asked(new, f"/load {path}", "Bye") == "<｜User｜>Hi<｜Assistant｜>Ho<｜User｜>Bye<｜Assistant｜><think>\n"
    new.add("", "Ade")
    asked(new, f"/save {path}")                         # it holds what was there, and more
    assert asked(new, "/clear", f"/load {path}", "/retry").endswith("Ho<｜User｜>Bye<｜Assistant｜><think>\n")
    assert [message["content"] for message in new.messages] == ["Hi", "Ho", "Bye"]
    capsys.readouterr()
    talk = path.read_text()
    for text, words in ((talk + talk, "not a single conversation"), ('{"prompt": "Hi"}', "not a single"),
                        ('{"messages": [{"role": "user", "content": "Hi"}]}', "not a single conversation"),
                        ('{"messages": [3]}', "messages[0].role"), ("{", "line 1: not JSON"),
                        ("Hi", "not a single conversation")):
        path.write_text(text)
        assert asked(new, f"/load {path}") is None and words in capsys.readouterr().out
    assert len(new.messages) == 3
    old = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
           {"role": "assistant", "content": "Ho"}]
    path.write_text(json.dumps({"messages": old}))
    assert asked(new, f"/load {path}", "Bye").startswith("<｜User｜>Be brief.\n\nHi<｜Assistant｜>Ho")
    keeps = Conversation(demo, 2048, boxed=False, allow_system=True)
    assert asked(keeps, f"/load {path}", "Bye").startswith("Be brief.<｜User｜>Hi<｜Assistant｜>Ho")
    path.write_text(json.dumps({"messages": [*old, old[1], dict(old[2], content="<｜begin▁of▁sentence｜>")]}))
    assert asked(keeps, f"/load {path}") is None and "begin" in capsys.readouterr().out
    assert keeps.messages[-1]["content"] == "Bye"


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    (tmp_path / "prompts.txt").write_text("12 + 30?\n1 + 2?")
    for what, reader in ((["--prompt", "12"], "head -c 1"), (["--input-file", tmp_path / "prompts.txt"], "true")):
        args = " ".join(program("generate.py", *what, "--seed", 1, "--max-new-tokens", 9))
        command = f"unset PYTHONUNBUFFERED; set -o pipefail; {args} | {reader}"
        done = subprocess.run(["bash", "-c", command], capture_output=True)
        assert done.returncode in (0, 141) and b"rror" not in done.stderr and b"Trace" not in done.stderr


def test_every_answer_is_a_sample_of_its_own(demo, monkeypatch):
    """/retry would repeat itself word for word if it were drawn from the same random numbers."""
    wanted, attempts = [], count()
    job = generate.Job(generate.Sampling(), frozenset(), 512, 10, generate.Runtime())
    monkeypatch.setattr(generate.Job, "run", lambda self, model, prompts, which, **more: (
        wanted.append((prompts, which)), events(demo, f"</think>{next(attempts)}"))[1])
    monkeypatch.setattr(generate.Cache, "allocate", lambda *_: None)
    monkeypatch.setattr(Keyboard, "line", Typed("1 + 2?", "/retry", "/retry", "3?").line)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    model = type("Model", (), {"cfg": None, "rt": generate.Runtime()})
    generate.talk(model, job, generate.Ranks(generate.Shard(), None), Conversation(demo, 100, False),
                  Screen(demo, True))
    assert [which for _, which in wanted] == [[(0, 0)], [(0, 1)], [(0, 2)], [(0, 3)]]
    assert wanted[0][0] == wanted[1][0] == wanted[2][0] != wanted[3][0]
