"""Batch runs: a file of prompts in, a file of completions out, safe against interruption at any moment.

Reading comes first and names the line that is wrong; results are appended to FILE.part as samples finish and
appear under their own name when all are there. Nothing here knows the model: events come from generate().
"""
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from chat import ASSISTANT, END_THINK, THINK, Chat, split_reasoning
from convert import writing

UMASK = os.umask(0)
os.umask(UMASK)                     # what files of this process get; it can only be read by setting it
KINDS = {"prompt": str, "messages": list, "raw": str}       # of which a line of JSON has one
SETTINGS = ("system", "tools", "functions", "temperature", "top_p", "seed", "stop", "max_tokens",
            "max_new_tokens", "max_completion_tokens")      # and none of these


def read_prompts(path: Path) -> list[dict]:
    """Records with `prompt`, `messages` or `raw` (a prompt in the model's own format), from JSON lines or a
    prompt a line. ValueError names the line.

    JSON lines are what a file named .jsonl or .json holds, or one whose first line begins with a brace.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")      # CR LF is read as LF
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8: {error}") from None
    if lines == [""]:
        raise ValueError(f"{path}: holds no prompt")
    is_json = path.suffix in (".jsonl", ".json") or lines[0].lstrip().startswith("{")
    return [read_record(line, is_json, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_record(line: str, is_json: bool, where: str) -> dict:
    if not line.strip():
        raise ValueError(f"{where}: empty; each line is one prompt")
    try:
        record = json.loads(line) if is_json else {"prompt": line}
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()    # could it be written again?
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid Unicode: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}; each line is an object of its own") from None
    kinds = [key for key in KINDS if key in record] if isinstance(record, dict) else []
    if len(kinds) != 1:
        raise ValueError(f"{where}: needs a JSON object with one of 'prompt', 'messages' and 'raw'; it "
                         f"has {' and '.join(map(repr, kinds)) or 'none'}")
    if unheard := [key for key in SETTINGS if record.get(key) not in (None, "", [])]:
        raise ValueError(f"{where}: {unheard[0]!r} would not be heeded: options hold for all lines, system "
                         f"text is one of the 'messages', and tools are not called")
    key, kind = kinds[0], KINDS[kinds[0]]
    if not isinstance(record[key], kind) or not record[key] or kind is str and not record[key].strip():
        raise ValueError(f"{where}: {key!r} is {record[key]!r}; it must be a {kind.__name__}, not empty")
    return record


def as_messages(record: dict) -> list[dict]:
    return record["messages"] if "messages" in record else [{"role": "user", "content": record["prompt"]}]


def thinks(record: dict, chat: Chat) -> bool:
    """Whether the completion begins inside of reasoning."""
    if "raw" in record:
        begun = record["raw"].rpartition(ASSISTANT)[2]
        return begun.rfind(THINK) > begun.rfind(END_THINK)
    return chat.thinks(chat.render(as_messages(record)))


# What has changed if one of the settings that are hashes has
HASHES = {"checkpoint": "another checkpoint, or another state of its files",
          "prompts": "other prompts: another --input-file, --boxed, --allow-system or chat template"}


class Results:
    """The lines of --output-file: appended to FILE.part as samples finish, in input order in FILE at the end.

    The first line of FILE.part says what is being made, so that --resume can tell whether it goes on with the
    same thing. Without a file, all lines go to standard output at the end.
    """

    def __init__(self, out: Path | None, settings: dict, resume: bool):
        self.out = out = Path(os.path.realpath(out)) if out and out.is_symlink() else out
        self.records, self.part = {}, out and out.with_name(out.name + ".part")
        part = self.part
        self.settings, self.resume = settings, resume
        if part is None or not part.exists():
            if resume and out.exists():
                raise ValueError(f"{out}: complete; there is nothing to resume. If another run made it: "
                                 f"without --resume it is replaced")
            return
        if not resume:
            raise ValueError(f"{part}: another run writes it, or was interrupted; then --resume goes on "
                             f"with it, or remove it")
        whole = part.read_bytes().rpartition(b"\n")[0]           # without a line that was cut short
        number = 1
        try:
            for number, line in enumerate(whole.split(b"\n"), 1):
                record = json.loads(line.decode("utf-8"))
                if number == 1:
                    self._compare(record)
                else:
                    i, sample, _, _ = (record[key] for key in ("index", "sample", "text", "finish_reason"))
                    if type(i) is not int or type(sample) is not int:
                        raise TypeError
                    self.records[i, sample] = record
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            raise ValueError(f"{part}, line {number}: not made by this program, or damaged; "
                             f"{'move the file away' if number == 1 else 'remove the line'}") from None

    def _compare(self, head: dict) -> None:
        """The settings that a resumed run was started with must be those of this one. TypeError, KeyError:
        they are no settings."""
        for key, now in self.settings.items():
            if key == "seed" and now is None:
                self.settings[key] = now = head[key]    # a new run draws one, a resumed one keeps it
            if now != head[key]:
                change = f"made with {key} {head[key]!r}, not {now!r}" if key not in HASHES else \
                         f"made with {HASHES[key]}"
                raise ValueError(f"{self.part}: {change}; --resume needs the same settings, or remove it")

    def open(self) -> None:
        """Start the file of parts, or cut off a last line that is incomplete. OSError: another run has
        started it meanwhile."""
        if self.part:
            if not self.resume and self.part.exists():
                raise FileExistsError(f"{self.part}: another run has begun to write it")
            lines = [json.dumps(self.settings),
                     *(json.dumps(record, ensure_ascii=False) for record in self.records.values())]
            write_file(self.part, "\n".join(lines) + "\n")

    def add(self, record: dict) -> None:
        self.records[record["index"], record["sample"]] = record
        if self.part:
            with writing(self.part), open(self.part, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        plain = self.out is None and not (sys.stdout.encoding or "utf").lower().startswith("utf")
        lines = [json.dumps(self.records[key], ensure_ascii=plain) for key in sorted(self.records)]
        if self.out is None:
            print("\n".join(lines), flush=True)         # if that fails, here
        else:
            write_file(self.out, "\n".join(lines) + "\n")
            self.part.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    with writing(path):
        new = tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="\n", dir=path.parent, delete=False)
        try:
            with new:
                new.write(text)
            os.chmod(new.name, 0o666 & ~UMASK)      # such files are made for their owner alone
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise


def run_batch(events: Iterator, total: int, chat: Chat | None, records: list[dict],
              results: Results | None) -> None:
    """Consume generate()'s events; rank 0 (which has `chat`) writes a line of JSON as a sample finishes."""
    tokens: dict[tuple[int, int], list[int]] = {}
    if chat:
        results.open()
    with tqdm(total=total, desc="generate", unit="sample", miniters=0, disable=chat is None) as bar:
        n_tokens, start = 0, time.monotonic()
        for event in events:
            tokens.setdefault((event.prompt, event.sample), []).extend(event.tokens)
            n_tokens += len(event.tokens)
            if event.finish_reason:
                ids = tokens.pop((event.prompt, event.sample))
                if chat:
                    results.add(describe(event, ids, records[event.prompt], chat))
            bar.set_postfix_str(f"{n_tokens / (time.monotonic() - start):.1f} tokens/s", refresh=False)
            bar.update(event.finish_reason is not None)
    if chat:
        results.finish()


def describe(event, tokens: list[int], given: dict, chat: Chat) -> dict:
    """A line of the output: the end of a completion and what it belongs to."""
    text = chat.tokenizer.decode(tokens)
    reasoning, answer = split_reasoning(text, thinks(given, chat))
    given = {key: given[key] for key in ("id", *KINDS) if key in given}
    return {"index": event.prompt, "sample": event.sample, **given, "text": text, "reasoning": reasoning,
            "answer": answer, "tokens": tokens, "finish_reason": event.finish_reason}
