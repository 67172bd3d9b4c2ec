"""Claim: the programs do what the README says, and meet bad input with one clear line and exit code 2.

Real processes, on small random checkpoints with R1's tokens. Outputs of different numbers of ranks are
compared byte for byte: greedy and seeded tokens in fp32 are the same tokens.
"""
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import tiny
from rank_worker import draw, start_program
from test_checkpoint_leftovers import edit
from test_tokenizer import BOS, R1_ROLES, write_tokenizer
from tokenizers import Tokenizer

import convert
import generate
from batch import Results

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same checkpoint twice: as HuggingFace's folder, and converted for 2 ranks."""
    root = tmp_path_factory.mktemp("cli")
    tiny.write(root / "hf", tiny.deepseek(vocab_size=264))
    write_tokenizer(root / "hf", R1_ROLES)
    tiny.write(root / "dense", tiny.qwen2(vocab_size=264))
    write_tokenizer(root / "dense", R1_ROLES)
    for name in ("hf", "dense"):
        convert.convert(convert.Checkpoint(root / name), root / f"{name} mp2", 2)
    (root / "prompts.jsonl").write_text(
        '{"prompt": "How much is 17 + 25?", "id": 7}\n'
        '{"messages": [{"role": "user", "content": "Hi"},'
        ' {"role": "assistant", "content": "<think>\\nx</think>\\n\\nHo"},'
        ' {"role": "user", "content": "你好"}]}\n'
        '{"prompt": "A line\u2028separator is no end of line"}\n')
    return root


def program(name: str, *args, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / name), *map(str, args)]


def run(name: str, *args, ranks: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(program(name, *args, ranks=ranks), capture_output=True, text=True, timeout=300)


def batch(folders: Path, ckpt: str, out: str, *more, ranks: int = 1) -> bytes:
    args = ["--ckpt-path", folders / ckpt, "--input-file", folders / "prompts.jsonl",
            "--output-file", folders / out, "--max-new-tokens", 24, "--dtype", "float32", *more]
    if ranks == 1:
        assert generate.main([*map(str, args)]) == 0
    else:
        start_program(ranks, generate.main, [*map(str, args)])
    return (folders / out).read_bytes()


def test_a_batch_comes_back_in_order_with_all_fields(folders):
    lines = batch(folders, "hf", "out.jsonl", "--temperature", 0).decode().split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    given = [json.loads(line) for line in (folders / "prompts.jsonl").read_text().split("\n")[:-1]]
    for index, (record, source) in enumerate(zip(records, given, strict=True)):
        kind = "prompt" if "prompt" in source else "messages"
        assert list(record) == ["index", "sample", *["id"] * ("id" in source), kind, "text", "reasoning",
                                "answer", "tokens", "finish_reason"]
        assert record.get("id") == source.get("id")
        assert record["index"] == index and record["sample"] == 0 and record[kind] == source[kind]
        assert record["finish_reason"] in ("stop", "length") and 0 < len(record["tokens"]) <= 24
        tokenizer = Tokenizer.from_file(str(folders / "hf/tokenizer.json"))
        assert record["text"] == tokenizer.decode(record["tokens"])
        assert max(record["tokens"]) < 262                      # rows 262 and 263 of the model are padding


@pytest.mark.parametrize("name", ["hf", "dense"])
def test_two_ranks_and_converted_folders_write_the_same_bytes(name, folders):
    greedy = batch(folders, name, "1.jsonl", "--temperature", 0)
    assert batch(folders, name, "2.jsonl", "--temperature", 0, ranks=2) == greedy
    assert batch(folders, f"{name} mp2", "3.jsonl", "--temperature", 0, ranks=2) == greedy
    seeded = batch(folders, name, "4.jsonl", "--seed", 5, "--batch-size", 1)
    assert seeded != greedy
    assert batch(folders, f"{name} mp2", "5.jsonl", "--seed", 5, ranks=2) == seeded


def test_ranks_with_different_seeds_produce_one_stream(folders, tmp_path):
    # A rank that drew for itself would run other tokens than rank 0, and the sums over both would be
    # nonsense.
    start_program(2, partial(draw, folders / "hf", tmp_path), [])
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    alone = generate.generate(tiny.load(folders / "hf"), [[1, 2, 3], [4]], (), 30,
                              generate.Sampling(1.0, 1.0, 5))
    assert first == [[event.prompt, list(event.tokens)] for event in alone]


def test_plain_text_has_a_prompt_a_line_and_goes_to_standard_output(folders, capsys):
    (folders / "prompts.txt").write_text("one\ntwo\n")
    assert generate.main(["--ckpt-path", str(folders / "dense"), "--input-file", str(folders / "prompts.txt"),
                          "--max-new-tokens", "3"]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["one", "two"]


def test_a_raw_prompt_is_what_the_model_reads_with_one_bos_in_front(folders, tmp_path, capsys):
    texts = ["<｜User｜>1 + 1?<｜Assistant｜><think>\nIt is",
             f"{BOS}In <think> </think> tags. User: 1 + 1? Assistant: <think>",
             "<｜User｜>What is <think>?<｜Assistant｜>"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"raw": text}) + "\n" for text in texts) + "\n\n")
    args = ["--ckpt-path", folders / "hf", "--input-file", tmp_path / "p.jsonl", "--max-new-tokens", 4,
            "--temperature", 0]
    prompts, original = [], generate.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "generate", lambda model, given, *more: (
            prompts.extend(given), original(model, given, *more))[1])
        assert generate.main([*map(str, args), "--output-file", str(tmp_path / "out.jsonl"), "--boxed"]) == 0
    tokenizer = Tokenizer.from_file(str(folders / "hf/tokenizer.json"))
    for ids, text in zip(prompts, texts, strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == BOS + text.removeprefix(BOS)
    records = list(map(json.loads, (tmp_path / "out.jsonl").read_text().split("\n")[:-1]))
    assert [record["raw"] for record in records] == texts
    assert [bool(record["reasoning"]) for record in records] == [True, True, False]
    assert [bool(record["answer"]) for record in records] == [False, False, True]
    refused(capsys, folders, *args, "--think-budget", 9, word="line 1: --think-budget counts")


def test_no_memory_while_tokens_come_is_one_line(folders, capsys, monkeypatch):
    monkeypatch.setattr(generate, "prefill", lambda *_: generate.torch.empty(2 ** 60))
    assert generate.main(["--ckpt-path", str(folders / "hf"), "--prompt", "1 + 1?"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("generate.py: error: rank 0 ran out of memory: ") and "--batch-size" in error
    monkeypatch.setattr(generate, "load_model", lambda *_: generate.torch.empty(2 ** 60))
    assert generate.main(["--ckpt-path", str(folders / "hf"), "--prompt", "1 + 1?"]) == 2
    assert "allocate memory" in capsys.readouterr().err.splitlines()[-1]


def test_the_readmes_python_runs_as_it_stands(monkeypatch, capsys):
    code = (ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(ROOT)
    exec(code, names := {})
    assert capsys.readouterr().out.strip() == code.rpartition("# ")[2].strip() == names["answer"] != ""
    first = names["logits"][0, -1, :names["chat"].tokenizer.n_tokens].argmax()
    assert names["text"].startswith(names["chat"].tokenizer.decode([first]))
    assert list(names["logits"].shape) == [1, len(names["prompt"]), names["model"].cfg.vocab_size]


def test_convert_and_help_run_as_programs(folders, tmp_path):
    done = run("convert.py", "--hf-ckpt-path", folders / "hf", "--save-path", tmp_path / "out",
               "--model-parallel", 2, "--verify")
    assert done.returncode == 0 and "tensors, all equal" in done.stderr
    for name in ("generate.py", "convert.py"):
        command = [sys.executable, "-X", "importtime", ROOT / name, "--help"]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode == 0 and b"torch._dynamo" not in done.stderr         # it takes seconds


def test_samples_are_written_as_they_finish_and_a_killed_run_goes_on(folders, tmp_path, capsys):
    args = ["--ckpt-path", folders / "hf", "--input-file", folders / "prompts.jsonl", "--max-new-tokens", 40,
            "--dtype", "float32", "--num-samples", 5, "--batch-size", 2, "--seed", 4]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"

    def main(*more) -> tuple[int, str]:
        code = generate.main([*map(str, args), "--output-file", *map(str, more)])
        return code, capsys.readouterr().err
    assert main(whole)[0] == 0
    records = [json.loads(line) for line in whole.read_text().split("\n")[:-1]]
    assert [(r["index"], r["sample"]) for r in records] == [(i, s) for i in range(3) for s in range(5)]
    assert len({r["text"] for r in records[:5]}) == 5
    command = program("generate.py", *args, "--output-file", out)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as job:
        while not part.exists() or part.read_text().count("\n") < 4:       # its settings, and three samples
            assert job.poll() is None
            time.sleep(0.001)
        job.kill()
    half = part.read_bytes() + '{"index": 2, "prompt": "你'.encode()[:-1]               # cut in a character
    part.write_bytes(half)
    assert not out.exists()
    for more, word in (([], "--resume goes on with it"),
                       (["--resume", "--top-p", "0.9"], "made with top_p 0.95")):
        code, error = main(out, *more)
        assert code == 2 and word in error and part.exists()
    args = args[:-2]                                                            # the seed is kept
    assert run("generate.py", *args, "--output-file", out, "--resume").returncode == 0
    assert out.read_bytes() == whole.read_bytes() and not part.exists()
    code, error = main(out, "--resume")
    assert code == 2 and "complete; there is nothing to resume" in error
    for junk in (b"[1]", b"hello\n", b'{}\n{"a": 1}\n', b"{}\n", b"\xff\n"):
        part.write_bytes(junk)
        code, error = main(out, "--resume")
        assert code == 2 and "part, line 1: not made by this program" in error
    head, first, *rest = half.split(b"\n")
    for junk in (b"{}", b"7", first[:-2], b"\xff", b'{"index": 2, "sample": 4}', b"[" * 100_000,
                 first.replace(b'"sample": ', b'"sample": 0.')):
        part.write_bytes(b"\n".join([head, first, junk, *rest]))
        code, error = main(out, "--resume")
        assert code == 2 and "part, line 3: " in error and "remove the line" in error
    part.write_bytes(half)
    late = Results(tmp_path / "late.jsonl", {}, resume=False)     # while it loads, another run begins
    Results(tmp_path / "late.jsonl", {}, resume=False).open()
    with pytest.raises(OSError, match="late.jsonl.part: another run has begun to write it"):
        late.open()
    code, error = main(out, "--resume", "--boxed")
    assert code == 2 and "made with other prompts: another --input-file, --boxed" in error


def test_r1s_advice_is_given_and_followed(folders, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "system", "content": "Be brief."},'
                                      ' {"role": "user", "content": "1 + 1?"}]}\n')
    args = ["--ckpt-path", str(folders / "hf"), "--input-file", str(tmp_path / "p.jsonl"),
            "--max-new-tokens", "1"]
    prompts, original = [], generate.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "generate", lambda model, given, *more: (
            prompts.append(given[0]), original(model, given, *more))[1])
        for more in ([], ["--allow-system"], ["--boxed", "--temperature", "1"]):
            assert generate.main([*args, *more]) == 0
    tokenizer = Tokenizer.from_file(str(folders / "hf/tokenizer.json"))
    plain, allowed, boxed = map(tokenizer.decode, prompts)
    assert plain == "<｜User｜>Be brief.\n\n1 + 1?<｜Assistant｜><think>\n"
    assert allowed == "Be brief.<｜User｜>1 + 1?<｜Assistant｜><think>\n"
    assert boxed.endswith("final answer within \\boxed{}.<｜Assistant｜><think>\n")
    error = capsys.readouterr().err
    assert error.count("moved into the user's turn") == 2 and error.count("advises 0.5 to 0.7") == 1


def test_a_conversation_that_ends_with_an_answer_is_remarked_on(folders, tmp_path, capsys):
    (tmp_path / "p.json").write_text('{"messages": [{"role": "user", "content": "1 + 1?"},'
                                     ' {"role": "assistant", "content": "2"}]}')
    assert generate.main(["--ckpt-path", str(folders / "hf"), "--input-file", str(tmp_path / "p.json"),
                          "--max-new-tokens", "1"]) == 0
    assert "p.json, line 1: the last message is an answer already" in capsys.readouterr().err


def test_a_think_budget_and_loops_are_followed_in_files_and_written_down(folders, tmp_path):
    (tmp_path / "p.txt").write_text("47 * 36\n12 + 30?\n")
    args = ["--input-file", tmp_path / "p.txt", "--temperature", 0, "--dtype", "float32"]
    free, held = tmp_path / "free.jsonl", tmp_path / "held.jsonl"
    assert run("generate.py", *args, "--output-file", free).returncode == 0
    assert run("generate.py", *args, "--output-file", held, "--think-budget", 20).returncode == 0
    for line, long in zip(held.read_text().splitlines(), free.read_text().splitlines(), strict=True):
        record, long = json.loads(line), json.loads(long)
        assert record["tokens"][:20] == long["tokens"][:20] and record["finish_reason"] == "stop"
        assert long["text"].startswith(record["reasoning"]) and record["text"].count("</think>") == 1
        assert record["reasoning"] != long["reasoning"] and record["answer"]


def test_a_think_budget_needs_a_model_with_think_tokens():
    class Plain:
        def token_id(self, token):
            return None

    with pytest.raises(ValueError, match="--think-budget: the tokenizer in DIR has no <think> and </think>"):
        args = generate.parse_args(["--prompt", "a", "--ckpt-path", "DIR", "--think-budget", "9"])
        generate.think_budget(args, Plain())
    with pytest.raises(SystemExit):
        generate.parse_args(["--prompt", "a", "--think-budget", "-1"])


def test_loops_end_answers_to_people_but_not_those_that_are_measured(folders):
    for mode, stops in ((["--interactive"], True), (["--prompt", "a"], True), (["--input-file", "a"], False),
                        (["--interactive", "--no-stop-loops"], False),
                        (["--input-file", "a", "--stop-loops"], True)):
        assert generate.parse_args(mode).stop_loops is stops


# Bad input


def refused(capsys, folders: Path, *args, word: str, code: int = 2) -> None:
    """One line on standard error with `word` in it, exit code 2, and no output file."""
    out = folders / "refused.jsonl"
    capsys.readouterr()
    assert generate.main([str(arg) for arg in (*args, "--output-file", out)]) == code
    error = capsys.readouterr().err
    assert error.startswith("generate.py: error: ") and error.count("\n") == 1, error
    assert word in error, error
    assert not out.exists() and not list(folders.glob("*.part"))


def test_an_error_is_one_line_whatever_names_it_quotes(capsys):
    for program in (generate, convert):
        place = "--ckpt-path" if program is generate else "--hf-ckpt-path"
        more = ["--prompt", "a"] if program is generate else ["--save-path", "x"]
        assert program.main([place, "no\n\x1b[2Jwhere", *more]) == 2
        error = capsys.readouterr().err
        assert "error: no \ufffd[2Jwhere" in error and error.count("\n") == 1
    with pytest.raises(SystemExit, match="^2$"):
        generate.main(["\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err


PROMPT_FILES = {
    "empty line": (b'{"prompt": "a"}\n\n{"prompt": "b"}\n', "line 2: empty"),
    "malformed line": (b'{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
    "no object": (b'{"prompt": "a"}\n["prompt"]\n', "line 2: needs a JSON object"),
    "neither field": (b'{"text": "a"}\n', "line 1: needs"),
    "both fields": (b'{"prompt": "a", "messages": []}', "line 1: needs"),
    "a setting": (b'{"prompt": "a", "temperature": 0, "stop": null}', "line 1: 'temperature' would not be"),
    "empty prompt": (b'{"prompt": ""}\n', "line 1: 'prompt' is ''"),
    "blank prompt": (b'{"prompt": " "}\n', "line 1: 'prompt' is ' '"),
    "over several lines": (b'[\n{"prompt": "a"}\n]\n', "each line is an object of its own"),
    "half a character": (b'{"prompt": "\\ud83d"}\n', "line 1: not valid Unicode"),
    "half a name": (b'{"messages": [{"role": "user", "content": "a", "name": "\\ud83d"}]}', "line 1: not"),
    "endless nesting": (b"[" * 100_000, "line 1: not JSON"),
    "number": (b'{"prompt": 3}\n', "line 1: 'prompt' is 3"),
    "no number": (b'{"prompt": "a", "id": NaN}\n', "line 1: not JSON"),
    "no messages": (b'{"messages": []}\n', "line 1: 'messages' is []"),
    "bad role": (b'{"messages": [{"role": "king", "content": "a"}]}\n', "line 1: messages[0]"),
    "nothing": (b"", "holds no prompt"), "binary": (b'{"prompt": "\xff\xfe"}\n', "UTF-8"),
    "too long": (b'{"prompt": "a"}\n{"prompt": "' + b"a" * 300 + b'"}\n', "line 2: the prompt has 30")}


def test_a_prompt_longer_than_the_models_context_is_refused_by_that(folders, capsys):
    (folders / "long.txt").write_text("a" * 5000)
    refused(capsys, folders, "--ckpt-path", folders / "hf", "--input-file", folders / "long.txt",
            word="with the model's context of 2560 at most 2559 fit")


@pytest.mark.parametrize("content, word", PROMPT_FILES.values(), ids=PROMPT_FILES.keys())
def test_prompt_files_are_refused_by_line(content, word, folders, capsys):
    (folders / "bad.jsonl").write_bytes(content)
    refused(capsys, folders, "--ckpt-path", folders / "hf", "--input-file", folders / "bad.jsonl",
            "--max-seq-len", 200, word=word)


@pytest.mark.parametrize("args, word", [
    (["--temperature", "-1"], "temperature is -1"), (["--temperature", "nan"], "temperature is nan"),
    (["--temperature", "inf"], "temperature is inf"), (["--temperature", "1e-40"], "temperature is 1e-40"),
    (["--seed", "-1"], "seed is -1"), (["--output-file", "."], "--output-file .: a folder"),
    (["--top-p", "0"], "top-p is 0"), (["--top-p", "2"], "top-p is 2"),
    (["--device", "cuda"], "--device cuda"),
    (["--max-seq-len", "9999"], "at most 2560"), (["--input-file", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--ckpt-path", "nowhere"], "nowhere: no such folder"), (["--config", "nowhere.json"], "nowhere.json"),
    (["--output-file", "/nowhere/out.jsonl"], "no folder /nowhere")])
def test_settings_that_do_not_fit_are_refused(args, word, folders, capsys):
    if "cuda" in args and generate.torch.cuda.is_available():
        return
    capsys.readouterr()
    assert generate.main(["--ckpt-path", str(folders / "hf"), "--input-file", str(folders / "prompts.jsonl"),
                          *args]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("generate.py: error: ") and captured.err.count("\n") == 1
    assert not captured.out
    assert word in captured.err


@pytest.mark.parametrize("flag", ["--max-new-tokens", "--max-seq-len", "--batch-size"])
def test_sizes_must_be_positive(flag, folders, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--ckpt-path", str(folders / "hf"), "--interactive", flag, "0"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{flag} is 0" in error and error.count("\n") == 1


@pytest.mark.parametrize("args, word", [
    (["--prompt", "a", "--output-file", "x"], "--output-file goes with --input-file"),
    (["--prompt", "a", "--num-samples", "2"], "--num-samples goes with --input-file"),
    (["--input-file", "x", "--resume"], "--resume goes with --output-file"),
    (["--prompt", " "], "--prompt is empty"), (["--prompt", "a", "--think-budget", "-1"], "--think-budget is"),
    (["--input-file", "x", "--num-samples", str(2 ** 20 + 1)], "at most 2 ** 20"), ([], "is required")])
def test_options_that_do_not_go_together_are_refused(args, word, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        generate.main(args)
    error = capsys.readouterr().err
    assert ": error: " in error and word in error and error.count("\n") == 1


def test_an_output_file_is_never_the_input_and_never_half_there(folders, tmp_path, capsys, monkeypatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("hi\n")
    args = ["--ckpt-path", str(folders / "dense"), "--input-file", str(prompts), "--max-new-tokens", "2"]
    assert generate.main([*args, "--output-file", str(prompts)]) == 2
    assert "the same as --input-file" in capsys.readouterr().err and prompts.read_text() == "hi\n"

    def full_disk(new, target):
        assert os.path.exists(new) and not target.exists()
        if target == out:
            raise OSError(28, "No space left on device")
        return replace(new, target)

    replace = os.replace
    monkeypatch.setattr(generate.os, "replace", full_disk)
    assert generate.main([*args, "--output-file", str(out)]) == 2
    assert f"{out}: cannot be written: No space left on device" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out.jsonl.part", prompts]     # --resume goes on with it


def test_a_link_stays_one_and_its_file_is_written(folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("hi\n")
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere/real.jsonl"
    (tmp_path / "out.jsonl").symlink_to(real)
    assert generate.main(["--ckpt-path", str(folders / "dense"), "--max-new-tokens", "2", "--input-file",
                          str(tmp_path / "prompts.txt"), "--output-file", str(tmp_path / "out.jsonl")]) == 0
    assert (tmp_path / "out.jsonl").is_symlink() and real.read_text().count("\n") == 1


@pytest.mark.parametrize("args", [["--prompt", "hi"], ["--input-file", "prompts.jsonl"], ["--interactive"]])
def test_streams_that_were_closed_before_the_start_are_empty(args, folders, monkeypatch):
    monkeypatch.chdir(folders)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert generate.main([*args, "--ckpt-path", "hf", "--max-new-tokens", "3"]) == 0


def test_answers_reach_an_output_that_has_no_such_characters(folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("你好 😀\n")
    for args in (["--input-file", tmp_path / "prompts.txt"], ["--prompt", "你好"], ["--interactive"]):
        done = subprocess.run(program("generate.py", "--ckpt-path", folders / "dense", "--seed", 1,
                                      "--max-new-tokens", 24, *args), capture_output=True,
                              input=b"/\xff\nhi\n", env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0 and done.stdout.isascii(), done.stderr
        if args[0] == "--input-file":
            assert json.loads(done.stdout)["prompt"] == "你好 😀"


def damage(name: str, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


CHECKPOINTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "unknown model_type": (lambda f: tiny.edit_config(f, model_type="mamba"), "unknown model_type 'mamba'"),
    "key missing": (lambda f: tiny.edit_config(f, rms_norm_eps=...), "missing key 'rms_norm_eps'"),
    "unknown key": (lambda f: tiny.edit_config(f, surprise=1), "unknown key 'surprise'"),
    "truncated": (damage("model.safetensors", lambda data: data[:-10]),
                  "model.safetensors: damaged or cut short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "broken tokenizer": (damage("tokenizer.json", lambda data: data[:99]), "tokenizer.json"),
    "tokenizer of another model": (lambda f: tiny.write(f, tiny.qwen2(vocab_size=200)), "the tokenizer"),
    "no chat format": (lambda f: (f / "tokenizer_config.json").unlink(), "conversation format"),
    "unfinished conversion": (lambda f: (f / "model0-mp2.safetensors.part").write_bytes(b""),
                              "unfinished conversion")}


@pytest.mark.parametrize("change, word", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpoints_that_do_not_fit_are_refused(change, word, tmp_path, capsys):
    folder = tmp_path / "hf"
    tiny.write(folder, tiny.qwen2(vocab_size=264))
    write_tokenizer(folder, R1_ROLES)
    change(folder)
    (tmp_path / "prompts.txt").write_text("hi\n")
    refused(capsys, tmp_path, "--ckpt-path", folder, "--input-file", tmp_path / "prompts.txt", word=word)


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_a_model_that_computes_nan_is_an_error_and_no_text(temperature, tmp_path, capsys):
    tiny.write(tmp_path, tiny.qwen2(vocab_size=264))
    write_tokenizer(tmp_path, R1_ROLES)
    edit(tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    (tmp_path / "prompts.txt").write_text("hi\n")
    assert generate.main(["--ckpt-path", str(tmp_path), "--input-file", str(tmp_path / "prompts.txt"),
                          "--temperature", str(temperature)]) == 2
    captured = capsys.readouterr()
    assert "the model's logits are not numbers" in captured.err and captured.out == ""


def test_numbers_of_ranks_that_do_not_fit_are_refused(folders, capsys):
    refused(capsys, folders, "--ckpt-path", folders / "hf mp2", "--input-file", folders / "prompts.jsonl",
            word="converted for 2 ranks, but this run has 1")
    done = run("generate.py", "--ckpt-path", folders / "dense", "--input-file", folders / "prompts.jsonl",
               ranks=3)
    assert done.returncode != 0 and done.stderr.count("generate.py: error:") == 1
    assert "[rank" not in done.stderr           # torchrun reports the exit codes, the ranks nothing more
    assert "generate.py: error: this model cannot be cut over 3 ranks; it can over 1, 2" in done.stderr
