"""The chat in a terminal: what is typed, and how an answer appears. Nothing here knows the model.

Rank 0 alone has a Conversation and a Screen; generate.py's `talk` hands its prompts to the other ranks.
"""
import io
import json
import os
import select
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from unicodedata import east_asian_width

from batch import read_prompts, write_file
from chat import BOXED, END_THINK, Chat, ReasoningParser, TextStream, advised, file_prompt, search_prompt
from convert import HARMLESS, harmless

try:
    import termios
except ImportError:                     # not on Windows
    termios = None

# ------------------------------------------------------------------------------------------------------------
# 1. Keyboard


class Keyboard:
    """Reads lines and, while an answer runs, Ctrl-C; keys after it wait for the next line.

    As a signal, Ctrl-C would reach torchrun, which ends the job: so as long as the chat lasts, it is a key
    like any other, and no key is shown by the terminal itself. Without a terminal, lines come from standard
    input.
    """

    def __init__(self, present: bool):
        self.present = present
        self.terminal = present and termios is not None and sys.stdin.isatty()
        self.session, self.stopped, self.typed, self.asking = None, False, b"", False

    def __enter__(self):
        if self.terminal:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):      # __exit__ before the end
                signal.signal(number, lambda number, _: sys.exit(128 + number))
            self.saved, keys = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
            keys[3] &= ~(termios.ICANON | termios.ECHO)
            keys[6][termios.VINTR] = os.fpathconf(sys.stdin.fileno(), "PC_VDISABLE")

            def take(*_) -> None:               # also after Ctrl-Z and `fg`, where the shell has set its own
                if not self.asking:             # else prompt_toolkit has them
                    with suppress(termios.error):       # after `bg` they are not ours to set; `fg` comes
                        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, keys)
            signal.signal(signal.SIGCONT, take)
            take()
        elif self.present:
            sys.stdin.reconfigure(errors="surrogateescape")     # a bad line is refused, not all that follow

    def __exit__(self, *_):
        if self.terminal:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.saved)

    def ctrl_c(self) -> bool:
        """Whether Ctrl-C was pressed since the last line."""
        while self.terminal and select.select([sys.stdin], [], [], 0)[0]:
            if not (keys := os.read(sys.stdin.fileno(), 4096)):
                break
            self.stopped |= b"\x03" in keys
            self.typed += keys
        return self.stopped

    def line(self) -> str:
        """Ask for a line. EOFError at the end of input; KeyboardInterrupt."""
        _, stopped, typed = self.typed.rpartition(b"\x03")
        self.typed, self.stopped = b"", False
        if not self.terminal:
            try:
                return input(">>> ").removesuffix("\r")     # which only Windows' Python takes off itself
            except OSError as error:                        # as under nohup: it would fail again, for ever
                raise EOFError from error
        from prompt_toolkit import PromptSession    # line editing, history, pastes of several lines, CJK
        from prompt_toolkit.input.typeahead import clear_typeahead, store_typeahead
        from prompt_toolkit.input.vt100_parser import Vt100Parser
        from prompt_toolkit.output import create_output
        if not self.session:
            self.session = PromptSession(output=None if sys.stdout.isatty() else create_output(sys.stderr))
        if stopped:             # what came before it may be there, if an earlier line was typed ahead, too
            clear_typeahead(self.session.input)
        keys = []
        Vt100Parser(keys.append).feed(typed.decode(errors="surrogateescape"))
        store_typeahead(self.session.input, keys)
        self.asking = True
        try:
            return self.session.prompt(">>> ")
        finally:
            self.asking = False


# ------------------------------------------------------------------------------------------------------------
# 2. Conversation

COMMANDS = {
    "/help": "this list",
    "/clear": "start a new conversation",
    "/retry": "ask the last question once more",
    "/think on|off": "show reasoning in full, or fold it to a line",
    "/file PATH": "put a text file in front of the next question",
    "/search FILE.json": "put web pages in front of it: a list of texts, or of objects with 'content' and, "
                         "if you like, 'title' and 'url'",
    "/save FILE": "write the conversation as JSON, in the layout of --input-file",
    "/load FILE": "go on with a conversation that was saved",
    "/exit": "leave"}


class Conversation:
    """The messages so far, and the commands that act on them."""

    def __init__(self, chat: Chat, max_seq_len: int, boxed: bool, allow_system: bool = False):
        self.chat, self.max_seq_len, self.boxed, self.allow_system = chat, max_seq_len, boxed, allow_system
        self.messages: list[dict] = []
        self.last, self.answered = None, False          # the last question, as it was sent
        self.replaced: list[dict] = []  # question and answer that /retry has taken back
        self.attached = None            # makes the official prompt of the next question
        self.saved: set[Path] = set()   # what may be overwritten

    def read(self, keyboard: Keyboard, screen: "Screen") -> list[int] | None:
        """Ask until there is something to answer; the whole conversation's ids, or None to leave."""
        while True:
            try:
                line = keyboard.line()
                if line.rstrip() == "/exit":
                    return None
                prompt = self.command(line, screen) if line.startswith("/") else self.send(line)
                if prompt:
                    return prompt
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                if not keyboard.terminal:
                    raise
                print("(/exit or Ctrl-D leaves)")
            except (ValueError, OSError) as error:
                print(f"({harmless(error)})")

    def send(self, question: str) -> list[int] | None:
        """Ask what was typed; the ids to be answered, None if it is blank."""
        if not question.strip():
            return None
        attached, self.attached = self.attached, None
        question = attached(question) if attached else question
        try:
            return self.ask(question + "\n" + BOXED if self.boxed else question, self.messages)
        except ValueError as error:
            raise ValueError(f"{error}{'; what was attached is put away' * bool(attached)}") from None

    def ask(self, question: str, past: list[dict]) -> list[int]:
        """Put a question after `past`. ValueError, and all stays as it is, if it has no room or no sense."""
        messages = [*past, {"role": "user", "content": question}]
        prompt = self.chat.encode(messages)
        if len(prompt) >= self.max_seq_len:
            raise ValueError(f"{len(prompt)} tokens by now, and --max-seq-len is {self.max_seq_len}"
                             f"{'; /clear starts anew' * bool(past)}")
        self.messages, self.last, self.answered, self.replaced = messages, question, False, []
        return prompt

    def thinks(self) -> bool:
        """Whether the answer begins inside of <think>."""
        return self.chat.thinks(self.chat.render(self.messages))

    def add(self, reasoning: str, answer: str) -> None:
        """The answer to what was sent. Without one, the question is taken back: R1 knows no empty turns."""
        self.answered = bool(answer.rpartition(END_THINK)[2].strip())       # what the template keeps of it
        if self.answered:
            self.messages.append({"role": "assistant", "content": answer, "reasoning": reasoning.strip()})
        else:
            self.messages[-1:], self.answered = self.replaced, bool(self.replaced)
            print("(no answer, so the one before stays)" if self.answered else
                  "(no answer, so the question does not count; /retry asks it again)")

    def command(self, line: str, screen: "Screen") -> list[int] | None:
        """Obey one; ids if it asks for an answer. ValueError or OSError says what is wrong with it."""
        name, argument = [*line.rstrip().split(maxsplit=1), ""][:2]
        usage = next((usage for usage in COMMANDS if usage.split()[0] == name), None)
        if usage is None:
            raise ValueError(f"{name} is no command; /help lists them, a blank in front sends it as text")
        if bool(argument) != (" " in usage) or usage == "/think on|off" and argument not in ("on", "off"):
            raise ValueError(f"usage: {usage}")
        path = Path(os.path.expanduser(argument.strip("'\"")))
        match name:
            case "/help":
                print("\n".join(f"  {usage:<18} {what}" for usage, what in COMMANDS.items()))
                print("  Ctrl-C             stop an answer")
            case "/clear":
                self.messages, self.last, self.answered, self.attached = [], None, False, None
                print("(a new conversation)")
            case "/retry":
                if self.last is None:
                    raise ValueError("there is no question yet")
                old = self.messages[-2:] if self.answered else []
                prompt = self.ask(self.last, self.messages[:len(self.messages) - len(old)])
                self.replaced = old                     # which come back if the new answer is stopped
                return prompt
            case "/think":
                screen.full = argument == "on"
                print(f"(reasoning will be {'shown' if screen.full else 'folded'})")
            case "/file":
                self.attach_file(path)
            case "/search":
                self.attach_pages(path)
            case "/save":
                self.save(Path(os.path.realpath(path)))
            case "/load":
                self.load(Path(os.path.realpath(path)))

    def save(self, path: Path) -> None:
        if not self.messages:
            raise ValueError("there is nothing to save yet")
        if path.exists() and path not in self.saved:
            raise ValueError(f"{path} is there already; it would be lost")
        write_file(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        self.saved.add(path)
        print(f"({len(self.messages)} messages in {harmless(path)})")

    def load(self, path: Path) -> None:
        first, *others = read_prompts(path)
        messages = first.get("messages", [])
        self.chat.check(messages)
        if others or [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
            raise ValueError(f"{path}: not a single conversation that ends with a question and its answer")
        messages, _ = advised(messages, allow_system=self.allow_system or self.chat.style == "jinja")
        self.chat.encode([*messages, messages[-2]])         # ValueError, if no question could follow
        self.messages, self.last, self.answered, self.replaced = messages, messages[-2]["content"], True, []
        self.saved.add(path)
        print(f"({len(messages)} messages from {harmless(path)})")

    def attach_file(self, path: Path) -> None:
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text file in UTF-8: {error}") from None
        self.attach(lambda question: file_prompt(path.name, content, question),
                    f"{path.name}, {len(content):,} characters; now ask about it")

    def attach_pages(self, path: Path) -> None:
        try:
            results = json.loads(path.read_text(encoding="utf-8-sig"))
            pages = [page if isinstance(page, str) else
                     "\n".join([*(page[key] for key in ("title", "url") if page.get(key)), page["content"]])
                     for page in results]
            "".join(pages).encode()             # half of a surrogate pair is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            results = pages = None
        if not (pages and isinstance(results, list)):
            raise ValueError(f"{path}: not a JSON list of texts, or of objects with a text 'content'")
        self.attach(lambda question: search_prompt(pages, question, date.today()),
                    f"{len(pages)} web pages; now ask about them")

    def attach(self, prompt: Callable[[str], str], what: str) -> None:
        print(f"({harmless(what)}{'; what was attached before is put away' * bool(self.attached)})")
        self.attached = prompt


# ------------------------------------------------------------------------------------------------------------
# 3. Screen

class Screen:
    """Shows completions as they come.

    On a terminal, reasoning is dimmed and runs by on one line, which in the end says how long it took; with
    `full` all of it stays. Elsewhere everything is written out, plainly.
    """

    def __init__(self, chat: Chat, full: bool):
        self.tokenizer = chat.tokenizer
        if isinstance(sys.stdout, io.TextIOWrapper):            # not in a notebook
            sys.stdout.reconfigure(errors="backslashreplace")   # for what the terminal's encoding lacks
        self.terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.terminal and not os.environ.get("NO_COLOR")
        self.full = full or not self.terminal

    def show(self, events: Iterator, thinking: bool, n_prompt: int, n_kept: int = 0) -> tuple[str, str]:
        """Show generate()'s events of one completion as they come; reasoning and answer. `thinking`: the
        prompt has opened <think>."""
        stream, parser = TextStream(self.tokenizer), ReasoningParser(thinking)
        self.reasoning, self.answer, self.in_reasoning = "", "", False
        self.n_tokens = self.n_thought = 0
        self.start, first, reason = time.monotonic(), None, None
        if thinking:
            self.open_reasoning()
        for event in events:
            first = first or time.monotonic()
            self.n_tokens, reason = self.n_tokens + len(event.tokens), event.finish_reason
            text = "".join(map(stream.feed, event.tokens)) + (stream.flush() if reason else "")
            for part, piece in parser.feed(text) + (parser.flush() if reason else []):
                (self.add_reasoning if part == "reasoning" else self.add_answer)(piece)
            self.n_thought += len(event.tokens) * (parser.part == "reasoning")
            if self.in_reasoning and parser.part == "answer":
                self.close_reasoning()
        if self.in_reasoning:
            self.close_reasoning(finished=False)
        seconds = time.monotonic() - (first or self.start)
        self.write("\n" if self.answer and not self.answer.endswith("\n") else "")
        why = {"length": "stopped at the limit of tokens", "repetition": "stopped: it repeats itself",
               None: "stopped"}
        self.write(f"({why[reason]})\n" if reason in why else "", file=sys.stderr)
        rate = f", {(self.n_tokens - 1) / seconds:.1f} tokens/s" if self.n_tokens > 1 and seconds else ""
        wait = f", {first - self.start:.1f} s" if first else ""
        self.write(f"{self.n_tokens} tokens{rate}; prompt: {n_prompt - n_kept} of {n_prompt} tokens new{wait}"
                   "\n\n", dim=True, file=sys.stderr)
        return self.reasoning, self.answer

    def open_reasoning(self) -> None:
        self.in_reasoning = True
        self.write("<think>\n" if self.full else "thinking" if self.terminal else "", dim=True)

    def add_reasoning(self, text: str) -> None:
        if not self.in_reasoning:               # the model itself has written the tag
            self.open_reasoning()
        self.reasoning += text
        if self.full:
            self.write(text, dim=True)
        elif self.terminal:
            head = f"thinking, {self.n_thought} tokens: "
            tail = " ".join(self.reasoning[-400:].split())
            columns = shutil.get_terminal_size().columns - 1
            self.erase_line()
            self.write(head[:columns] + last_columns(tail, columns - len(head)), dim=True)

    def close_reasoning(self, finished: bool = True) -> None:
        """</think> is written only if the model has `finished`: what reads a pipe goes by it."""
        self.in_reasoning = False
        if self.full:
            tag = "</think>\n\n" if finished else ""
            self.write(("" if self.reasoning[-1:] in ("", "\n") else "\n") + tag, dim=True)
        else:
            self.erase_line()
            self.write(f"thought for {self.n_thought} tokens, {time.monotonic() - self.start:.0f} s\n\n",
                       dim=True)

    def add_answer(self, text: str) -> None:
        if self.in_reasoning:
            self.close_reasoning()
        self.answer += text
        self.write(text)

    def erase_line(self) -> None:
        print("\r\x1b[K" if self.terminal else "", end="")

    def write(self, text: str, dim: bool = False, file=None) -> None:
        file = file or sys.stdout
        if file.isatty():
            text = text.translate(HARMLESS)
        if dim and text and self.colour and file.isatty():
            text = f"\x1b[2m{text}\x1b[0m"
        print(text, end="", flush=True, file=file)


def last_columns(text: str, columns: int) -> str:
    """The end of a text that takes at most so many columns; Chinese characters take two."""
    start = len(text)
    while start and (columns := columns - (2 if east_asian_width(text[start - 1]) in "WF" else 1)) >= 0:
        start -= 1
    return text[start:]


def show(events: Iterator, screen: Screen | None, thinking: bool, *lengths: int) -> tuple[str, str]:
    """Rank 0 (which has a screen) shows a completion; the other ranks only take part in computing it."""
    if screen:
        return screen.show(events, thinking, *lengths)
    deque(events, maxlen=0)
    return "", ""
