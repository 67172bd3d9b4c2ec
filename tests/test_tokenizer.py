"""Claim: the tokenizer adds nothing and loses nothing, from either kind of file and one token at a time.

The small byte-level tokenizers resemble the real ones: R1's role tokens and <think> with special=false, BOS
and EOS with special=true, and (as in the distills) a post-processor that prepends BOS. Everything is exact.
"""
import json
import random

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from chat import TOOLS, TextStream, Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
R1_ROLES = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
TEXTS = ["", "hello world", "  two  spaces \n\n", "深度求索 R1 说：你好", "🙂🧑‍🔬 e\u0301 \u00a0é", "a\ufffdb\ufffd",
         "<think>\nx</think>"]


def write_tokenizer(folder, tokens=R1_ROLES + TOOLS, bos=BOS, eos=EOS, prepend_bos=False, merges=(), **more):
    """A folder with a byte-level tokenizer.json: BOS and EOS (ids 0 and 1), then bytes, merges and
    `tokens`."""
    special = [token for token in (bos, eos) if token]
    vocab = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    if prepend_bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos, **more}))
    return folder


def write_sentencepiece(folder, **options):
    """A folder with a tokenizer.model of 300 pieces: <unk>, <s>, </s>, bytes, what ten sentences teach."""
    text = folder / "text.txt"
    text.write_text("\n".join(f"Number {i} says that the cat sat on the mat, {i} times." for i in range(10)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, minloglevel=2, **options)
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["json", "sentencepiece", "sentencepiece that keeps spaces"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "json":
        return Tokenizer(write_tokenizer(folder, merges=[("h", "e"), ("l", "l"), ("he", "ll")]))
    keep = {"remove_extra_whitespaces": False} if "keeps" in request.param else {}
    return Tokenizer(write_sentencepiece(folder, **keep))


def stream(tokenizer, ids):
    text = TextStream(tokenizer)
    return [text.feed(i) for i in ids] + [text.flush()]


def test_encoding_adds_no_bos_even_if_the_file_would(tmp_path):
    plain = Tokenizer(write_tokenizer(tmp_path)).encode("hi")
    assert Tokenizer(write_tokenizer(tmp_path, prepend_bos=True)).encode("hi") == plain
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("hi").ids == [0, *plain]


def test_special_tokens_in_the_text_become_ids_and_decode_drops_only_the_special_ones(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    ids = tokenizer.encode(f"{BOS}<｜User｜>hi<｜Assistant｜><think>\n</think>x{EOS}")
    assert ids[:2] == [0, tokenizer.token_id("<｜User｜>")] and ids[-1] == 1 and len(ids) == 10
    assert tokenizer.decode(ids) == "<｜User｜>hi<｜Assistant｜><think>\n</think>x"
    assert tokenizer.token_id("no such token") is None


def test_n_tokens_is_one_past_the_highest_id(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    assert tokenizer.n_tokens == 2 + 256 + 4 + 9 == tokenizer.token_id(TOOLS[-1]) + 1


def test_text_is_not_cut_by_training_settings_left_in_the_file(tmp_path):
    write_tokenizer(tmp_path)
    file = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    file.enable_truncation(max_length=4)
    file.enable_padding(length=8)
    file.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path).encode("ab")) == 2 and len(Tokenizer(tmp_path).encode("x" * 100)) == 100


def test_sentencepiece_ids_are_its_own_and_special_tokens_are_mapped(tmp_path):
    tokenizer = Tokenizer(write_sentencepiece(tmp_path))
    own = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in TEXTS + ["The cat sat on the mat."]:
        assert tokenizer.encode(text) == own.encode(text)
        assert tokenizer.decode(own.encode(text)) == own.decode(own.encode(text))
    ids = tokenizer.encode("<s>The cat</s><s>sat")
    assert ids == [1, *own.encode("The cat"), 2, 1, *own.encode("sat")]
    assert tokenizer.decode(ids) == own.decode(ids)
    assert tokenizer.token_id("no such piece") is None
    assert (tokenizer.stop_ids, tokenizer.n_tokens) == ({2}, 300)


def test_sentencepiece_with_added_tokens_is_refused_as_it_would_spell_them_out(tmp_path):
    added = write_sentencepiece(tmp_path) / "added_tokens.json"
    added.write_text('{"<s>": 1}')                  # which it has
    Tokenizer(tmp_path)
    added.write_text('{"<s>": 1, "<|im_start|>": 300}')
    with pytest.raises(ValueError, match="added_tokens.json adds '<|im_start|>'.*tokenizer.json is needed"):
        Tokenizer(tmp_path)


def test_a_stream_gives_the_text_of_decode(tokenizer):
    rng = random.Random(0)
    alphabet = "ab  \n.,é中文字🙂🧑‍🔬<think></think>"
    for text in TEXTS + ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(100)]:
        ids = tokenizer.encode(text)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_stream_gives_the_text_of_decode_for_tokens_no_text_has(tokenizer):
    """Special tokens in the middle, lone spaces in front, words without a space: what a sampler may pick."""
    rng = random.Random(1)
    usable = [i for i in range(tokenizer.n_tokens) if "\ufffd" not in tokenizer.decode([i])]
    for _ in range(200):
        ids = rng.choices(usable, k=40)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_broken_utf8_passes_through_a_byte_level_stream(tmp_path):
    tokenizer, rng = Tokenizer(write_tokenizer(tmp_path)), random.Random(2)
    for _ in range(200):
        ids = rng.choices(range(tokenizer.n_tokens), k=40)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    assert "".join(stream(tokenizer, tokenizer.encode("中")[:1] * 1000)) == "\ufffd" * 1000


@pytest.mark.parametrize("character", ["é", "中", "🙂"])
def test_a_character_is_held_back_until_its_last_byte(tokenizer, character):
    ids = tokenizer.encode("x" + character)[-len(character.encode()):]
    assert stream(tokenizer, ids) == [""] * (len(ids) - 1) + [character, ""]
    assert set(stream(tokenizer, ids[:-1])[-1]) == {"\ufffd"}


def test_the_cost_of_a_token_does_not_grow_with_the_stream(tokenizer, monkeypatch):
    decode, longest = tokenizer.decode, 0
    text, broken = tokenizer.encode("the cat 中 🙂 "), tokenizer.encode("x中")[-3:-2]
    special, blank = min(tokenizer.special_ids), tokenizer.token_id("Ġ") or tokenizer.token_id("▁")

    def spy(window):
        nonlocal longest
        longest = max(longest, len(window))
        return decode(window)
    monkeypatch.setattr(tokenizer, "decode", spy)
    stream(tokenizer, text * 100 + [special] * 100 + text[:1] * 200)
    assert longest <= 16
    stream(tokenizer, broken * 500)
    stream(tokenizer, [blank] * 500)
    assert longest <= 2 * TextStream.LONGEST


@pytest.mark.parametrize("value, expected", [(7, {1, 7}), ([1, 8], {1, 8}), (None, {1})])
def test_stop_ids_are_eos_and_what_generation_config_adds(tmp_path, value, expected):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert Tokenizer(tmp_path).stop_ids == expected
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer(tmp_path).stop_ids == {1}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))      # HuggingFace looks there
    assert Tokenizer(tmp_path).stop_ids == expected


def test_names_of_bos_and_eos_may_be_text_objects_or_absent(tmp_path):
    write_tokenizer(tmp_path, bos_token={"content": BOS}, eos_token=None)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop_ids) == (BOS, None, frozenset())
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path).bos is None


def test_the_template_comes_from_its_own_file_first(tmp_path):
    write_tokenizer(tmp_path)
    assert Tokenizer(tmp_path).chat_template is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_tokenizer(tmp_path, chat_template=named)
    assert Tokenizer(tmp_path).chat_template == "D"
    write_tokenizer(tmp_path, chat_template="C")
    assert Tokenizer(tmp_path).chat_template == "C"
    (tmp_path / "chat_template.jinja").write_text("文")
    assert Tokenizer(tmp_path).chat_template == "文"


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}.*tokenizer.json.*tokenizer.model"):
        Tokenizer(str(tmp_path))


@pytest.mark.parametrize("name, text", [
    ("tokenizer.json", '{"a": 1}'), ("tokenizer.model", "not a model"), ("tokenizer_config.json", "{"),
    ("tokenizer_config.json", "[1]"), ("generation_config.json", "nonsense"),
    ("tokenizer_config.json", '{"eos_token": "<gone>"}')])
def test_a_malformed_file_is_named(tmp_path, name, text):
    if name.endswith("config.json"):
        write_tokenizer(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        Tokenizer(tmp_path)


def test_a_text_that_the_tokenizer_cannot_take_is_refused(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="gone")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"{tmp_path.name}: the tokenizer refuses this text"):
        Tokenizer(tmp_path).encode("b")


@pytest.mark.parametrize("name, text, says", [
    ("tokenizer_config.json", '{"bos_token": 5}', "bos_token 5 is not a token"),
    ("tokenizer_config.json", '{"chat_template": [{"x": 1}]}', "cannot be read"),
    ("generation_config.json", '{"eos_token_id": ["a", {}]}', "eos_token_id"),
    ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id")])
def test_settings_of_another_kind_are_refused_by_file(name, text, says, tmp_path):
    (write_tokenizer(tmp_path) / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.*{says}"):
        Tokenizer(tmp_path)
