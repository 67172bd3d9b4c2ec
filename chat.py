"""Text to tokens and back: the tokenizer, R1's conversation format, and reasoning told apart from the answer.

A conversation is one flat string (BOS and EOS are <｜begin▁of▁sentence｜> and <｜end▁of▁sentence｜>, no spaces):

    BOS system text <｜User｜> question <｜Assistant｜> answer EOS <｜User｜> question <｜Assistant｜> <think> newline

System text, none by default, has no tag. Old answers stand without their reasoning. The prompt ends inside
an open <think>, so completions are `reasoning </think> answer EOS`, without the opening tag. Each marker is
one token; its bars are U+FF5C, its blanks U+2581. One that a user types is not escaped, as in R1's template.
"""
import json
import re
from collections.abc import Callable, Iterable
from datetime import date, datetime
from functools import partial
from pathlib import Path

import tokenizers

USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
TOOLS = [f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep",
                                         "outputs▁begin", "outputs▁end", "output▁begin", "output▁end")]
CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP, OUTPUTS_BEGIN, OUTPUTS_END, OUT_BEGIN, OUT_END = TOOLS


class Tokenizer:
    """Text <-> ids, and what a checkpoint's own files say about its tokens.

    Nothing is assumed from a base model: the distills kept the vocabularies of Qwen2.5 and Llama 3.1 but
    renamed tokens, so BOS is 151646 in one and 128000 in the other (R1: 0). FileNotFoundError if a folder has
    no tokenizer, ValueError naming a file that cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        self._json = self._pieces = None            # one of two libraries; sentencepiece is for older Llamas
        if (folder / "tokenizer.json").is_file():
            _read(folder / "tokenizer.json", self._open_json)
        elif (folder / "tokenizer.model").is_file():
            _read(folder / "tokenizer.model", self._open_sentencepiece)
        else:
            raise FileNotFoundError(f"{folder}: neither tokenizer.json nor tokenizer.model is here")
        _read(folder / "tokenizer_config.json", self._open_config)
        own = folder / "generation_config.json"     # without it, HuggingFace takes config.json's
        stop = _read(own if own.is_file() else folder / "config.json", _stop_ids)
        self.stop_ids = frozenset([*stop, self.eos and self.token_id(self.eos)]) - {None}
        path = folder / "chat_template.jinja"       # a file of its own since 2025
        if path.is_file():
            self.chat_template = _read(path, lambda path: path.read_text(encoding="utf-8"))

    def _open_json(self, path: Path) -> None:
        self._json = tokenizers.Tokenizer.from_file(str(path))
        self._json.no_truncation()                  # a file may keep training settings; prompts are never cut
        self._json.no_padding()
        self.n_tokens = max(self._json.get_vocab().values()) + 1    # R1: 128,815 of 129,280 logit rows
        self.special_ids = {i for i, t in self._json.get_added_tokens_decoder().items() if t.special}

    def _open_sentencepiece(self, path: Path) -> None:
        import sentencepiece
        self._pieces = pieces = sentencepiece.SentencePieceProcessor()
        pieces.Load(str(path))
        added = _json_object(path.with_name("added_tokens.json"))
        if lost := [token for token in added if self.token_id(token) is None]:
            raise ValueError(f"added_tokens.json adds {lost[0]!r}, for which tokenizer.json is needed")
        self.n_tokens = len(pieces)
        self.special_ids = {i for i in range(len(pieces)) if pieces.is_control(i) or pieces.is_unknown(i)}
        self._special = {pieces.id_to_piece(i): i for i in self.special_ids}

    def _open_config(self, path: Path) -> None:
        config = _json_object(path)
        self.bos, self.eos = self._named(config, "bos_token"), self._named(config, "eos_token")
        template = config.get("chat_template")
        if isinstance(template, list):              # several templates, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str | None):
            raise ValueError(f"chat_template is {template!r}; it must be a text, or a list of named ones")
        self.chat_template = template

    def _named(self, config: dict, key: str) -> str | None:
        token = config[key]["content"] if isinstance(config.get(key), dict) else config.get(key)
        if token is not None and (not isinstance(token, str) or self.token_id(token) is None):
            raise ValueError(f"{key} {token!r} is not a token")
        return token

    def token_id(self, token: str) -> int | None:
        """Id of a string that is one token, else None."""
        if self._json:
            return self._json.token_to_id(token)
        i = self._pieces.piece_to_id(token)         # what sentencepiece does not have, it calls unknown
        return i if self._pieces.id_to_piece(i) == token else None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Adds no BOS or EOS; a special token's string in the text becomes its id."""
        if self._json:                              # a distill's file would add BOS, R1's not: keep it off
            try:
                return self._json.encode(text, add_special_tokens=False).ids
            except Exception as error:              # it lacks the token for what it does not know, say
                raise ValueError(f"{self.folder}: the tokenizer refuses this text: {error}") from None
        ids = []                                    # sentencepiece never reads <s> as its token: cut it out
        for part in re.split(f"({'|'.join(map(re.escape, self._special))})", text):
            ids += [self._special[part]] if part in self._special else self._pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens. R1's files do not call <think> and <｜User｜> special: kept."""
        return (self._json or self._pieces).decode([i for i in ids if i not in self.special_ids])


def _read(path: Path, parse: Callable):
    try:
        return parse(path)
    except Exception as error:                      # the libraries' own errors name no file
        raise ValueError(f"{path}: cannot be read ({error})") from error


def _json_object(path: Path) -> dict:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _stop_ids(path: Path) -> list[int]:
    stop = _json_object(path).get("eos_token_id")
    stop = stop if isinstance(stop, list) else [stop] if stop is not None else []
    if not all(type(i) is int for i in stop):
        raise ValueError(f"eos_token_id is {stop}; it must be a token id or a list of them")
    return stop


class Chat:
    """The conversation format of one checkpoint.

    Most chat bugs live in templates: two BOS, no <think>, old reasoning fed back. So the format of R1 and its
    distills is written out. They differ around system messages and tools, and R1 alone has the tool tokens:
    style "r1" or "distill". A checkpoint without BOS, EOS and the markers above, or whose own template
    writes another format with them (V3.1), is rendered by its template, "jinja". Neither: ValueError.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, has = tokenizer, lambda tokens: all(tokenizer.token_id(t) is not None for t in tokens)
        known = has([USER, ASSISTANT, THINK]) and tokenizer.bos and tokenizer.eos
        self.style = "r1" if has(TOOLS) else "distill"
        self.template = _template(tokenizer) if (tokenizer.chat_template or "").strip() else None
        if self.template and not (known and self._is_ours()):
            self.style = "jinja"
        elif not known:
            absent = "" if (tokenizer.folder / "tokenizer_config.json").exists() else "; the folder has no " \
                     "tokenizer_config.json, which would name them"
            raise ValueError(f"{tokenizer.folder}: unknown conversation format: neither a chat template nor "
                             f"R1's tokens ({USER}, {ASSISTANT}, {THINK}, a bos_token, an eos_token){absent}")

    def _is_ours(self) -> bool:
        """Whether the template writes R1's format, with or (before February 2025) without the <think>."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ours, theirs = ([render(messages, True) for messages in (talk[:1], talk + talk[:1])]
                            for render in (self._r1, self._jinja))
        except ValueError:                          # it refuses them, so it has rules of its own
            return False
        return theirs in (ours, [text.removesuffix(f"{THINK}\n") for text in ours])

    def check(self, messages: list[dict]) -> None:
        """ValueError names a malformed message and its field."""
        for i, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            if role not in ("system", "user", "assistant", "tool"):
                raise ValueError(f"messages[{i}].role is {role!r}; known: system, user, assistant, tool")
            content = message.get("content")
            if not isinstance(content, str) and not (content is None and role == "assistant"
                                                     and message.get("tool_calls")):
                raise ValueError(f"messages[{i}].content is {content!r}; it must be a string (null only with "
                                 f"tool_calls)")
            try:
                (content or "").encode()
            except UnicodeEncodeError as error:     # half of a surrogate pair, or bytes that were not UTF-8
                raise ValueError(f"messages[{i}].content: not valid Unicode ({error})") from None

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The prompt as text. ValueError as `check`, or if a checkpoint's own template refuses."""
        self.check(messages)
        return (self._jinja if self.style == "jinja" else self._r1)(messages, add_generation_prompt)

    def encode(self, messages: list[dict]) -> list[int]:
        """Ids of the prompt for the next answer. R1: exactly one BOS, in front. Other templates: what they
        write (none in Qwen's ChatML, one a turn in Llama 2), but never two in front. Else ValueError."""
        return self.encode_raw(self.render(messages))

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a prompt that is in the model's own format. R1's BOS may be left out."""
        if self.style != "jinja" and not text.startswith(self.tokenizer.bos):
            text = self.tokenizer.bos + text
        ids = self.tokenizer.encode(text)
        if not ids:
            raise ValueError("the prompt is empty")
        bos = self.tokenizer.bos and self.tokenizer.token_id(self.tokenizer.bos)
        wrong = ids[:2] == [bos, bos] if self.style == "jinja" else ids.count(bos) != 1 or ids[0] != bos
        if wrong:
            raise ValueError(f"a prompt has one {self.tokenizer.bos}, in front; here are {ids.count(bos)}")
        return ids

    def thinks(self, prompt_text: str) -> bool:
        """Whether a rendered prompt ends with an open <think>, so that the completion begins as reasoning."""
        return prompt_text.rstrip().endswith(THINK)

    def _r1(self, messages: list[dict], add_generation_prompt: bool) -> str:
        r1, eos = self.style == "r1", self.tokenizer.eos
        # System text goes in front from wherever it stands. R1 joins several, the distills keep the last.
        system = [message["content"] for message in messages if message["role"] == "system"]
        text = self.tokenizer.bos + ("\n\n".join(system) if r1 else "".join(system[-1:]))
        # `called` and `returned` are never reset, so a second round of tools lacks its opening markers: odd,
        # but that is what the original templates write.
        called = returned = in_outputs = False      # in_outputs: the last message was a tool's
        for i, message in enumerate(messages):
            role, content = message["role"], message.get("content")
            if role == "user":
                text += USER + content              # verbatim, with no end marker
            elif role == "tool":
                text += OUTPUTS_BEGIN if not returned else "" if r1 else "\n"
                text += OUT_BEGIN + content + OUT_END
                returned = True
            elif role == "assistant" and (message.get("tool_calls") if r1 else content is None):
                text += self._calls(f"messages[{i}].tool_calls", content or "", message["tool_calls"], called)
                called = True
            elif role == "assistant" and in_outputs:
                text += OUTPUTS_END + content + eos     # the answer to tool outputs has no marker of its own
            elif role == "assistant":               # history keeps the answer, never the reasoning
                text += ASSISTANT + content.rpartition(END_THINK)[2] + eos
            in_outputs = role == "tool" or in_outputs and role == "system"
        if in_outputs:
            return text + OUTPUTS_END               # the model answers right here, without <think>
        # <think> is forced since February 2025: given the choice, the model sometimes skipped its reasoning.
        return text + ASSISTANT + THINK + "\n" if add_generation_prompt else text

    def _calls(self, where: str, content: str, calls: list[dict], called: bool) -> str:
        text, end = "", CALLS_END + self.tokenizer.eos
        if not isinstance(calls, list):
            raise ValueError(f"{where}: expected a list; it is {calls!r}")
        for call in calls:
            try:
                head = CALL_BEGIN + call["type"] + SEP + call["function"]["name"]
                body = "\n```json\n" + call["function"]["arguments"] + "\n```" + CALL_END
            except (KeyError, TypeError) as error:
                raise ValueError(f"{where}: type, function.name, function.arguments are strings") from error
            text += ("\n" if called else ASSISTANT + content + CALLS_BEGIN) + head + body
            if called and self.style == "distill":
                text += end                         # odd: a distill's template leaves its first call open
            called = True
        return text + end if self.style == "r1" else text

    def _jinja(self, messages: list[dict], add_generation_prompt: bool) -> str:
        tokens = {"bos_token": self.tokenizer.bos, "eos_token": self.tokenizer.eos}
        tokens = {name: token for name, token in tokens.items() if token}   # undefined prints "", None "None"
        try:
            return self.template.render(messages=messages, add_generation_prompt=add_generation_prompt,
                                        tools=None, documents=None, **tokens)
        except Exception as error:                  # whatever somebody else's code raises
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def _template(tokenizer: Tokenizer):
    """A checkpoint's own template with what HuggingFace gives to it. ValueError: it cannot be read."""
    import jinja2.ext
    import jinja2.sandbox                           # sandboxed: a template is somebody else's code

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    class Generation(jinja2.ext.Extension):         # {% generation %} marks answers for training
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                       extensions=[Generation, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)         # jinja2's own escapes HTML
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return env.from_string(tokenizer.chat_template)
    except Exception as error:
        raise ValueError(f"{tokenizer.folder}: the chat template cannot be read: {error}") from error


class TextStream:
    """Ids to text, one token at a time; together the pieces are the text of Tokenizer.decode.

    Byte-level BPE splits a Chinese character or an emoji over several tokens, and each alone prints U+FFFD.
    Decoding all tokens again at every step is right but quadratic (5e8 token decodes for 32k tokens), so only
    those held back are decoded, together with those released last: whether sentencepiece begins a word with
    a space depends on what stands before it.
    """
    LONGEST = 32                                    # tokens; only endless broken UTF-8 or blanks get there

    def __init__(self, tokenizer: Tokenizer):
        self.decode, self.special_ids = tokenizer.decode, tokenizer.special_ids
        self.context, self.held = [], []

    def feed(self, token: int) -> str:
        """The text that this token completes, "" in the middle of a character."""
        if token in self.special_ids:
            return ""
        self.held.append(token)
        broken = self.decode(self.context + self.held).endswith("\ufffd") and len(self.held) < self.LONGEST
        return "" if broken else self.flush()

    def flush(self) -> str:
        """What is held back; an incomplete character becomes U+FFFD."""
        text = self.decode(self.context + self.held)[len(self.decode(self.context)):]
        keep = self.held if self.decode(self.held) else self.context + self.held   # context must show
        self.context, self.held = keep[-self.LONGEST:], []
        return text


class ReasoningParser:
    """Splits a completion, in whatever pieces it arrives, into reasoning and answer.

    R1's prompt has opened <think> (`thinking`): all up to the first </think> is reasoning, the rest answer,
    and an opening tag that the model writes all the same is dropped. Without an open <think> all is answer,
    unless it begins with the tag. What may become a tag is held back; newlines before a part are dropped. A
    stream cannot tell whether a second </think> follows; R1's template and tools/grading.py, who have it all,
    read on from the last one.
    """

    def __init__(self, thinking: bool):
        self.part = "reasoning" if thinking else "answer"
        self.held = ""
        self.opening = self.blank = True            # <think> may still come; nothing of this part so far

    def feed(self, text: str) -> list[tuple[str, str]]:
        """Pieces ("reasoning" | "answer", text) that are certain now."""
        self.held += text
        if self.opening:
            start = self.held.lstrip()
            if start != THINK and THINK.startswith(start):
                return []
            if start.startswith(THINK):
                self.part, self.held = "reasoning", start[len(THINK):]
            self.opening = False
        if self.part == "answer":
            return self.flush()
        reasoning, tag, answer = self.held.partition(END_THINK)
        if not tag:
            possible = max(n for n in range(len(END_THINK)) if reasoning.endswith(END_THINK[:n]))
            return self._release(len(reasoning) - possible)
        pieces = self._release(len(reasoning))
        self.part, self.held, self.blank = "answer", answer, True
        return pieces + self.flush()

    def flush(self) -> list[tuple[str, str]]:
        """The end of the stream: what was held back was no tag."""
        return self._release(len(self.held))

    def _release(self, n: int) -> list[tuple[str, str]]:
        text, self.held = self.held[:n], self.held[n:]
        text = text.lstrip("\n") if self.blank else text
        self.blank = self.blank and not text
        return [(self.part, text)] if text else []


def split_reasoning(text: str, thinking: bool) -> tuple[str, str]:
    """(reasoning, answer) of a whole completion; `thinking` as in ReasoningParser."""
    parser = ReasoningParser(thinking)
    pieces = parser.feed(text) + parser.flush()
    reasoning, answer = ("".join(text for part, text in pieces if part == p) for p in ("reasoning", "answer"))
    return reasoning.strip(), answer


# ------------------------------------------------------------------------------------------------------------
# R1's advice (its README), and the prompts of DeepSeek's web site and app, byte for byte

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
FILE_TEMPLATE = (
    "[file name]: {file_name}\n"
    "[file content begin]\n"
    "{file_content}\n"
    "[file content end]\n"
    "{question}")

SEARCH_TEMPLATE_ZH = (
    "# 以下内容是基于用户发送的消息的搜索结果:\n"
    "{search_results}\n"
    "在我给你的搜索结果中，每个结果都是[webpage X begin]...[webpage X end]格式的，X代表每篇文章的数字索引。请在适当的情况下在句子末尾引用上下文。请按照引用编号[ci"
    "tation:X]的格式在答案中对应部分引用上下文。如果一句话源自多个上下文，请列出所有相关的引用编号，例如[citation:3][citation:5]，切记不要将引用集中在最后返回引用编号，"
    "而是在答案对应部分列出。\n"
    "在回答时，请注意以下几点：\n"
    "- 今天是{cur_date}。\n"
    "- 并非搜索结果的所有内容都与用户的问题密切相关，你需要结合问题，对搜索结果进行甄别、筛选。\n"
    "- 对于列举类的问题（如列举所有航班信息），尽量将答案控制在10个要点以内，并告诉用户可以查看搜索来源、获得完整信息。优先提供信息完整、最相关的列举项；如非必要，不要主动告诉用户搜索结果未提供的内容。\n"
    "- 对于创作类的问题（如写论文），请务必在正文的段落中引用对应的参考编号，例如[citation:3][citation:5]，不能只在文章末尾引用。你需要解读并概括用户的题目要求，选择合适的格式"
    "，充分利用搜索结果并抽取重要信息，生成符合用户要求、极具思想深度、富有创造力与专业性的答案。你的创作篇幅需要尽可能延长，对于每一个要点的论述要推测用户的意图，给出尽可能多角度的回答要点，且务必信息"
    "量大、论述详尽。\n"
    "- 如果回答很长，请尽量结构化、分段落总结。如果需要分点作答，尽量控制在5个点以内，并合并相关的内容。\n"
    "- 对于客观类的问答，如果问题的答案非常简短，可以适当补充一到两句相关信息，以丰富内容。\n"
    "- 你需要根据用户要求和回答内容选择合适、美观的回答格式，确保可读性强。\n"
    "- 你的回答应该综合多个相关网页来回答，不能重复引用一个网页。\n"
    "- 除非用户要求，否则你回答的语言需要和用户提问的语言保持一致。\n"
    "\n"
    "# 用户消息为：\n"
    "{question}")

SEARCH_TEMPLATE_EN = (
    "# The following contents are the search results related to the user's message:\n"
    "{search_results}\n"
    "In the search results I provide to you, each result is formatted as [webpage X begin]...[webpage "
    "X end], where X represents the numerical index of each article. Please cite the context at the "
    "end of the relevant sentence when appropriate. Use the citation format [citation:X] in the "
    "corresponding part of your answer. If a sentence is derived from multiple contexts, list all "
    "relevant citation numbers, such as [citation:3][citation:5]. Be sure not to cluster all citations "
    "at the end; instead, include them in the corresponding parts of the answer.\n"
    "When responding, please keep the following points in mind:\n"
    "- Today is {cur_date}.\n"
    "- Not all content in the search results is closely related to the user's question. You need to "
    "evaluate and filter the search results based on the question.\n"
    "- For listing-type questions (e.g., listing all flight information), try to limit the answer to "
    "10 key points and inform the user that they can refer to the search sources for complete "
    "information. Prioritize providing the most complete and relevant items in the list. Avoid "
    "mentioning content not provided in the search results unless necessary.\n"
    "- For creative tasks (e.g., writing an essay), ensure that references are cited within the body "
    "of the text, such as [citation:3][citation:5], rather than only at the end of the text. You need "
    "to interpret and summarize the user's requirements, choose an appropriate format, fully utilize "
    "the search results, extract key information, and generate an answer that is insightful, creative, "
    "and professional. Extend the length of your response as much as possible, addressing each point "
    "in detail and from multiple perspectives, ensuring the content is rich and thorough.\n"
    "- If the response is lengthy, structure it well and summarize it in paragraphs. If a "
    "point-by-point format is needed, try to limit it to 5 points and merge related content.\n"
    "- For objective Q&A, if the answer is very brief, you may add one or two related sentences to "
    "enrich the content.\n"
    "- Choose an appropriate and visually appealing format for your response based on the user's "
    "requirements and the content of the answer, ensuring strong readability.\n"
    "- Your answer should synthesize information from multiple relevant webpages and avoid repeatedly "
    "citing the same webpage.\n"
    "- Unless the user requests otherwise, your response should be in the same language as the user's "
    "question.\n"
    "\n"
    "# The user's message is:\n"
    "{question}")


def advised(messages: list[dict], boxed: bool = False, allow_system: bool = False) -> tuple[list[dict], bool]:
    """Messages as R1's README advises them, and whether a system message was folded: (messages, folded).

    R1 was not made for system prompts, and wants all instructions in the user's turn: so system text goes in
    front of the first one, unless `allow_system`. `boxed` adds the directive for mathematics to the last one.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    system = [m["content"] for m in messages if m["role"] == "system" and m["content"]]
    folded = bool(system and users) and not allow_system
    turns = [dict(message) for message in messages]
    if boxed and users:
        turns[users[-1]]["content"] += "\n" + BOXED
    if folded:
        turns[users[0]]["content"] = "\n\n".join([*system, turns[users[0]]["content"]])
        turns = [message for message in turns if message["role"] != "system"]
    return turns, folded


def file_prompt(name: str, content: str, question: str) -> str:
    """A question about an uploaded file."""
    return FILE_TEMPLATE.format(file_name=name, file_content=content, question=question)


def search_prompt(pages: list[str], question: str, today: date) -> str:
    """A question with the texts of web pages to answer it from, cited as [citation:1] and so on.

    In Chinese if the question has a Chinese character (Japanese ones count).
    """
    results = "\n".join(f"[webpage {i} begin]{page}[webpage {i} end]" for i, page in enumerate(pages, 1))
    chinese = any("\u4e00" <= letter <= "\u9fff" for letter in question)
    day = f"{today.year}年{today.month}月{today.day}日" if chinese else f"{today:%B} {today.day}, {today.year}"
    template = SEARCH_TEMPLATE_ZH if chinese else SEARCH_TEMPLATE_EN
    return template.format(search_results=results, cur_date=day, question=question)
