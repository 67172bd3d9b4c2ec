"""Talk to a model."""
from collections import deque
from collections.abc import Iterator

from chat import Chat, ReasoningParser, TextStream, advised


def run_interactive(complete, max_seq_len: int, chat: Chat | None, ranks, boxed: bool) -> None:
    """Chat until /exit or end of file. Rank 0 (which has `chat`) talks; the others follow its prompts."""
    messages: list[dict] = []
    while True:
        prompt = ranks.share(read_turn(messages, chat, max_seq_len, boxed) if chat else None)
        if prompt is None:
            return
        answer = show(complete(prompt), chat, messages)
        messages.append({"role": "assistant", "content": answer})


def show(events: Iterator, chat: Chat | None, messages: list[dict]) -> str:
    """Rank 0 streams the completion and returns its answer; the others only take part in computing it."""
    if chat:
        return stream_answer(events, chat, messages)
    deque(events, maxlen=0)
    return ""


def read_turn(messages: list[dict], chat: Chat, max_seq_len: int, boxed: bool = False) -> list[int] | None:
    """Ask for the next message, append it, and return the whole conversation's ids; None to leave."""
    while True:
        try:
            line = input(">>> ").strip()
        except EOFError:
            print()
            return None
        except UnicodeDecodeError as error:
            print(f"(not UTF-8: {error})")
            continue
        if line == "/exit":
            return None
        if line == "/clear":
            messages.clear()
            print("(a new conversation)")
        elif line.startswith("/"):
            print(f"{line.split()[0]} is no command; there are /clear (new conversation) and /exit")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                prompt = chat.encode(advised(messages, boxed)[0])
            except ValueError as error:
                messages.pop()
                print(f"({error})")
                continue
            if len(prompt) < max_seq_len:
                return prompt
            messages.pop()
            print(f"({len(prompt)} tokens by now, and --max-seq-len is {max_seq_len}; /clear starts anew)")


def stream_answer(events: Iterator, chat: Chat, messages: list[dict]) -> str:
    """Print a completion as it comes; return its answer, without the reasoning, for the history."""
    thinking = chat.thinks(chat.render(messages))
    stream, parser, answer, reason = TextStream(chat.tokenizer), ReasoningParser(thinking), "", None
    if thinking:
        print("<think>", flush=True)                # it stands in the prompt: the model writes what follows
    for event in events:
        text = "".join(map(stream.feed, event.tokens)) + (stream.flush() if event.finish_reason else "")
        print(text, end="", flush=True)
        pieces = parser.feed(text) + (parser.flush() if event.finish_reason else [])
        answer += "".join(piece for kind, piece in pieces if kind == "answer")
        reason = event.finish_reason
    print("\n(stopped at the limit of tokens)" if reason == "length" else "", end="\n\n")
    return answer
