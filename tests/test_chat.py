"""Claim: a prompt is byte for byte what the checkpoint's own template writes; reasoning and answer never mix.

The expected strings were rendered once from the templates of DeepSeek-R1 and of its distills (the version
that forces <think>). Other templates are compared with transformers. Everything is exact: no tolerance.
"""
import hashlib
import random
from datetime import date
from itertools import combinations

import pytest
from test_tokenizer import BOS, EOS, R1_ROLES, write_tokenizer
from transformers import PreTrainedTokenizerFast

from chat import (BOXED, FILE_TEMPLATE, SEARCH_TEMPLATE_EN, SEARCH_TEMPLATE_ZH, Chat, ReasoningParser,
                  Tokenizer, advised, file_prompt, search_prompt, split_reasoning)

CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
ONE_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
CALLED = BOS + "<｜User｜>w?<｜Assistant｜><｜tool▁calls▁begin｜>" + ONE_CALL
CALLS_END = "<｜tool▁calls▁end｜>" + EOS
OUTPUT = "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>r1<｜tool▁output▁end｜>"
ANSWERED = "<｜tool▁outputs▁end｜>done" + EOS + "<｜User｜>thx<｜Assistant｜><think>\n"
UNCUT = ANSWERED.replace("done", "x</think>done")


def talk(*turns):
    """[("U", "Hi"), ...] as messages; content None makes one tool call, an int that many."""
    roles = {"S": "system", "U": "user", "A": "assistant", "T": "tool"}
    return [{"role": roles[role], "content": None, "tool_calls": [CALL] * (content or 1)}
            if content is None or isinstance(content, int) else {"role": roles[role], "content": content}
            for role, content in turns]


W, A, R, T = ("U", "w?"), ("A", None), ("T", "r1"), ("U", "thx")
CASES = [   # messages, generation prompt, distill's text, R1's text if another
    ([("U", "Hi")], True, "{B}<｜User｜>Hi<｜Assistant｜><think>\n"),
    ([("U", "Hi")], False, "{B}<｜User｜>Hi"),
    ([("S", "Be brief."), ("U", "Hi")], True, "{B}Be brief.<｜User｜>Hi<｜Assistant｜><think>\n"),
    ([("U", "Hi"), ("A", "Hello!"), ("U", "Bye")], True,
     "{B}<｜User｜>Hi<｜Assistant｜>Hello!{E}<｜User｜>Bye<｜Assistant｜><think>\n"),
    ([("U", "1+1?"), ("A", "<think>\nadd\n</think>\n\n2"), ("U", "2+2?")], True,
     "{B}<｜User｜>1+1?<｜Assistant｜>\n\n2{E}<｜User｜>2+2?<｜Assistant｜><think>\n"),
    ([("U", "q"), ("A", "a</think>b</think>c")], False, "{B}<｜User｜>q<｜Assistant｜>c{E}"),
    ([("U", "Hi"), ("S", "Late.")], True, "{B}Late.<｜User｜>Hi<｜Assistant｜><think>\n"),
    ([("S", "A."), ("S", "B."), ("U", "Hi")], True, "{B}B.<｜User｜>Hi<｜Assistant｜><think>\n",
     "{B}A.\n\nB.<｜User｜>Hi<｜Assistant｜><think>\n"),
    ([("U", "Hi"), ("A", "Yo")], True, "{B}<｜User｜>Hi<｜Assistant｜>Yo{E}<｜Assistant｜><think>\n"),
    ([("U", "  a\n\nb  ")], True, "{B}<｜User｜>  a\n\nb  <｜Assistant｜><think>\n"),
    ([("U", "q"), ("A", "<think>\nabc")], False, "{B}<｜User｜>q<｜Assistant｜><think>\nabc{E}"),
    ([W, A, R, ("A", "done"), T], True, CALLED + OUTPUT + ANSWERED, CALLED + CALLS_END + OUTPUT + ANSWERED),
    ([], True, "{B}<｜Assistant｜><think>\n"),
    ([W, ("A", 2)], False, CALLED + "\n" + ONE_CALL + CALLS_END),
    ([W, A, R, R, ("S", "Be brief.")], True,
     CALLED.replace(BOS, BOS + "Be brief.") + OUTPUT + "\n" + OUTPUT[22:] + "<｜tool▁outputs▁end｜>",
     CALLED.replace(BOS, BOS + "Be brief.") + CALLS_END + OUTPUT + OUTPUT[22:] + "<｜tool▁outputs▁end｜>"),
    ([W, A, R, A, R, ("A", "x</think>done"), T], True,
     CALLED + OUTPUT + "\n" + ONE_CALL + CALLS_END + "\n" + OUTPUT[22:] + UNCUT,
     CALLED + CALLS_END + OUTPUT + "\n" + ONE_CALL + CALLS_END + OUTPUT[22:] + UNCUT),
]
CHATML = ("{% for message in messages %}\n    {% if loop.first and message.role != 'system' %}\n"
          "{{ bos_token }}<|im_start|>system\nBe helpful<|im_end|>\n    {% endif %}\n"
          "{{ '<|im_start|>' + message['role'] + '\n' + (message | tojson) + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if tools is not none %}tools{% endif %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA2 = ("{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
          "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
          "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
          "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
          "{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}")


@pytest.fixture(params=["r1", "distill"])
def chat(request, tmp_path):
    tokens = {} if request.param == "r1" else {"tokens": R1_ROLES}
    return Chat(Tokenizer(write_tokenizer(tmp_path, prepend_bos=request.param == "distill", **tokens)))


@pytest.mark.parametrize("case", CASES, ids=range(1, len(CASES) + 1))
def test_r1_and_its_distills_write_what_their_own_templates_write(chat, case):
    turns, prompt, *expected = case
    expected = expected[-1] if chat.style == "r1" else expected[0]
    assert chat.render(talk(*turns), prompt) == expected.replace("{B}", BOS).replace("{E}", EOS)


def test_the_tool_tokens_tell_r1_from_a_distill(chat, request):
    assert chat.style == request.node.callspec.params["chat"]


def test_the_ids_of_a_first_prompt_are_one_token_per_marker(chat):
    user, assistant, think, _ = map(chat.tokenizer.token_id, R1_ROLES)
    newline, h, i = chat.tokenizer.encode("\nhi")
    assert chat.encode(talk(("U", "hi"))) == [0, user, h, i, assistant, think, newline]


def test_r1_prompts_have_one_bos_and_refuse_a_second(chat):
    for turns, *_ in CASES:
        ids = chat.encode(talk(*turns))
        assert ids[0] == 0 and ids.count(0) == 1
    with pytest.raises(ValueError, match="one " + BOS):
        chat.encode(talk(("U", f"say {BOS}")))


def test_a_prompt_thinks_if_it_ends_with_the_open_tag(chat):
    assert chat.thinks(chat.render(talk(("U", "Hi"))))
    assert not chat.thinks(chat.render(talk(("U", "Hi"), ("A", "<think>\nabc")), add_generation_prompt=False))
    assert not chat.thinks(chat.render(talk(W, A, R)))


@pytest.mark.parametrize("messages, named", [
    (["Hi"], r"messages\[0\]"), ([{"content": "Hi"}], r"messages\[0\].*role"),
    (talk(("U", "Hi")) + [{"role": "bot", "content": ""}], r"messages\[1\].*role"),
    ([{"role": "user"}], r"messages\[0\].content"),
    ([{"role": "user", "content": None}], r"messages\[0\].content"),
    ([{"role": "assistant", "content": None}], r"messages\[0\].content"),
    ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], r"messages\[0\].content"),
    ([{"role": "user", "content": None, "tool_calls": [CALL]}], r"messages\[0\].content"),
    ([{"role": "assistant", "content": None, "tool_calls": [{"type": "f"}]}], r"messages\[0\].tool_calls"),
    ([{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}],
     r"messages\[0\].tool_calls")])
def test_a_malformed_message_is_named(chat, messages, named):
    with pytest.raises(ValueError, match=named):
        chat.render(messages)


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["ChatML", "Llama 2"])
@pytest.mark.parametrize("bos", ["<s>", None])
def test_any_other_template_renders_as_in_transformers(tmp_path, template, bos):
    if template is LLAMA2 and bos is None:
        bos = "<begin>"
    write_tokenizer(tmp_path, tokens=["<|im_start|>"], bos=bos, eos="</s>", prepend_bos=bool(bos))
    (tmp_path / "chat_template.jinja").write_text(template)
    chat = Chat(Tokenizer(tmp_path))
    names = {"bos_token": bos} if bos else {}
    names["tokenizer_file"] = str(tmp_path / "tokenizer.json")
    reference = PreTrainedTokenizerFast(eos_token="</s>", chat_template=template, **names)
    for messages in talk(("U", "Hi é & <b>")), talk(("U", " a "), ("A", "b"), ("U", "c")):
        for prompt in (True, False):
            expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert chat.render(messages, prompt) == expected
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert chat.encode(messages) == expected
    assert chat.style == "jinja" and not chat.thinks(chat.render(talk(("U", "<think>"), ("A", "x"))))


ROLES = ("{{ bos_token }}{% for m in messages %}"
         "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
         "{% else %}{{ '<｜Assistant｜>OLDER' + m.content + eos_token }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<｜Assistant｜>OPEN' }}{% endif %}")


@pytest.mark.parametrize("older, opening, style", [
    ("", "<think>\\n", "r1"), ("", "", "r1"),             # of February 2025, and of January
    ("</think>", "</think>", "jinja"), ("", "</think>", "jinja"),      # V3.1, in parts
    ("</think>", "<think>\\n", "jinja")])
def test_a_template_that_writes_another_format_with_r1s_tokens_is_obeyed(tmp_path, older, opening, style):
    template = ROLES.replace("OLDER", older).replace("OPEN", opening)
    chat = Chat(Tokenizer(write_tokenizer(tmp_path, chat_template=template)))
    messages = talk(("U", "1"), ("A", "2"), ("U", "3"))
    assert chat.style == style
    if style == "jinja":
        reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=BOS,
                                            eos_token=EOS, chat_template=template)
        assert chat.render(messages) == reference.apply_chat_template(messages, tokenize=False,
                                                                      add_generation_prompt=True)


def test_a_template_with_rules_of_its_own_is_obeyed_though_r1s_tokens_are_there(tmp_path):
    template = ("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
                "{{ bos_token }}{{ messages[1].content }}")
    chat = Chat(Tokenizer(write_tokenizer(tmp_path, chat_template=template)))
    assert chat.style == "jinja" and chat.render(talk(("S", "a"), ("U", "b"))) == BOS + "b"
    with pytest.raises(ValueError, match="system first"):
        chat.render(talk(("U", "b")))


def test_marks_for_training_are_no_part_of_the_text(tmp_path):
    template = ("{% for m in messages %}\n{% generation %}\n{{ m.content }}\n{% endgeneration %}\n."
                "{% endfor %}")
    write_tokenizer(tmp_path, tokens=[], chat_template=template)
    file = str(tmp_path / "tokenizer.json")
    reference = PreTrainedTokenizerFast(tokenizer_file=file, chat_template=template)
    messages = talk(("U", "a"), ("A", "b"))
    theirs = reference.apply_chat_template(messages, tokenize=False)
    assert Chat(Tokenizer(tmp_path)).render(messages) == theirs


def test_a_template_that_thinks_is_noticed_and_one_with_two_bos_refused(tmp_path):
    write_tokenizer(tmp_path, tokens=[], chat_template="{{ bos_token }}{{ messages[0].content }}<think>\n")
    chat = Chat(Tokenizer(tmp_path))
    assert chat.thinks(chat.render(talk(("U", "Hi")))) and chat.encode(talk(("U", "Hi"))).count(0) == 1
    with pytest.raises(ValueError, match="one " + BOS):
        chat.encode(talk(("U", BOS)))


@pytest.mark.parametrize("template, says", [
    (LLAMA2, "roles must alternate"), ("{% if %}", "cannot be read"), (" \n", "neither a chat template"),
    (3, "must be a text"), ("{{ messages[0].gone.x }}", "gone"),
    ("{{ messages.append(1) }}", "safe"), ("{{ 1 + messages[0].content }}", "operand"),
    ("{{ 1 // 0 }}", "division"), ("{% for _ in range(10 ** 9) %}{% endfor %}", "too big")])
def test_a_template_that_refuses_says_why(tmp_path, template, says):
    write_tokenizer(tmp_path, tokens=[], chat_template=template)
    with pytest.raises(ValueError, match=says):
        Chat(Tokenizer(tmp_path)).render(talk(("A", "Hi")))


def test_without_role_tokens_and_template_there_is_no_format(tmp_path):
    with pytest.raises(ValueError, match="neither a chat template nor R1's tokens"):
        Chat(Tokenizer(write_tokenizer(tmp_path, tokens=[])))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="the folder has no tokenizer_config.json"):
        Chat(Tokenizer(tmp_path))


SPLITS = [  # completion, thinking, reasoning, answer, finished
    ("add\n</think>\n\n2", True, "add", "2", True),                     # opening tag absent, as R1 writes
    ("<think>\nadd</think>\n2", True, "add", "2", True),                # repeated though the prompt had it
    (" \n<think>\n\nadd </think>\n2\n", False, "add", "2\n", True),     # present
    ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>", True),
    ("<think>\nnever </thin", False, "never </thin", "", False),        # never closed
    ("never <closed", True, "never <closed", "", False),
    ("a<think>b</think>c", True, "a<think>b", "c", True),
    ("</think>\n\n", True, "", "", True), ("\n<th", True, "<th", "", False), ("", True, "", "", False),
    ("\n\n 2 < 3 </think>", False, "", " 2 < 3 </think>", True), ("  ", False, "", "  ", True),
    ("<thin ice", False, "", "<thin ice", True), ("a <<</think></think>b", True, "a <<", "</think>b", True),
]


@pytest.mark.parametrize("text, thinking, reasoning, answer, finished", SPLITS)
def test_reasoning_and_answer_are_the_same_under_any_split(text, thinking, reasoning, answer, finished):
    assert split_reasoning(text, thinking) == (reasoning, answer)
    rng, n = random.Random(0), len(text)
    cuts = [c for k in (1, 2) for c in combinations(range(n + 1), k)] + [range(n)]
    cuts += [sorted(rng.choices(range(n + 1), k=5)) for _ in range(50)]
    for cut in cuts:
        parser, parts = ReasoningParser(thinking), {"reasoning": "", "answer": ""}
        pieces = [piece for a, b in zip([0, *cut], [*cut, n]) for piece in parser.feed(text[a:b])]
        for part, piece in pieces + parser.flush():
            parts[part] += piece
            assert piece and (part == "answer" or not parts["answer"])      # no empty piece, no way back
        assert (parts["reasoning"].strip(), parts["answer"]) == (reasoning, answer)
        assert (parser.part == "answer") == finished
        assert not parts["reasoning"].startswith("\n")


def test_only_what_may_be_a_tag_is_held_back():
    parser = ReasoningParser(thinking=True)
    assert parser.feed("so ") == [("reasoning", "so ")]
    assert parser.feed("1 </") == [("reasoning", "1 ")] and parser.feed("2") == [("reasoning", "</2")]
    assert parser.feed(" </think>\n") == [("reasoning", " ")] and parser.feed("\nx") == [("answer", "x")]
    assert ReasoningParser(thinking=False).feed("2") == [("answer", "2")]


@pytest.mark.parametrize("template, length, digest", [
    (FILE_TEMPLATE, 90, "45e718c209246a85"), (SEARCH_TEMPLATE_ZH, 852, "26520ec2010163d6"),
    (SEARCH_TEMPLATE_EN, 2517, "0626f1984a3ff4d9")], ids=["file", "search zh", "search en"])
def test_the_official_prompts_are_deepseeks_byte_for_byte(template, length, digest):
    assert len(template) == length
    assert hashlib.sha256(template.encode()).hexdigest()[:16] == digest     # of the texts in R1's README


def test_official_prompts_take_files_and_web_pages_as_they_are():
    assert file_prompt("a{b}.txt", "x {y}\n", "Why?") == (
        "[file name]: a{b}.txt\n[file content begin]\nx {y}\n\n[file content end]\nWhy?")
    today = date(2025, 2, 6)
    english = search_prompt(["one", "two"], "Who?", today)
    assert "\n[webpage 1 begin]one[webpage 1 end]\n[webpage 2 begin]two[webpage 2 end]\nIn the" in english
    assert "- Today is February 6, 2025.\n" in english and english.endswith("user's message is:\nWho?")
    chinese = search_prompt(["one"], "谁?", today)
    assert "- 今天是2025年2月6日。\n" in chinese and chinese.endswith("用户消息为：\n谁?")


def test_system_text_moves_into_the_first_user_turn_and_the_directive_to_the_last():
    s, u, a, v = ({"role": role, "content": text} for role, text in
                  (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")))
    assert advised([u, a, v]) == ([u, a, v], False)
    assert advised([s, u, a, s, v]) == ([{**u, "content": "S\n\nS\n\nU"}, a, v], True)
    assert advised([s, u], allow_system=True) == ([s, u], False)
    assert advised([u, a, v], boxed=True) == ([u, a, {**v, "content": "V\n" + BOXED}], False)
    assert u["content"] == "U" and "\\boxed{}." in BOXED
    assert advised([s]) == ([s], False) and advised([{**s, "content": ""}, u])[0][-1] == u
