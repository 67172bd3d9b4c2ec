"""Claim: long prompts and answers work, up to the model's own limit, and what memory cannot hold is refused.

Logits past position 100,000 against HuggingFace's, answers of 32,768 tokens, measured memory of a prefill,
and refusals with numbers before any weight is read.

Tolerance of logits: 1e-5 of their scale, as in test_model_vs_hf.py, on the same frequencies. Our own YaRN
frequencies are rounded in another order than HuggingFace's: 5 of R1's 32 differ in the last bit of fp32, and
at position 163,840 that bit is an angle of up to 3e-4. Both are 1.7e-3 off the exact angle there.
"""
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_tokenizer import R1_ROLES, write_tokenizer
from transformers import DynamicCache

import generate
import memory
from convert import load_config
from generate import Sampling
from model import Cache, Runtime, Shard, Transformer, both_angles

ROOT = Path(__file__).parent.parent
YARN = {**tiny.YARN, "original_max_position_embeddings": 4096}                  # R1's: 4,096 to 163,840
LLAMA3 = {**tiny.LLAMA3, "original_max_position_embeddings": 8192}              # Llama 3.1's: to 131,072
SMALL = dict(rope_scaling=YARN, max_position_embeddings=163_840, num_hidden_layers=1, num_attention_heads=1,
             num_key_value_heads=1, hidden_size=64, intermediate_size=64, q_lora_rank=None, kv_lora_rank=32,
             qk_nope_head_dim=16, v_head_dim=16)


def far_logits(model: Transformer, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [1, s, vocab] of tokens [1, s] rotated as at `positions` [1, s], in neighbouring cache slots.

    The model's own step gives both: the mask at the slots, and the angles at the positions.
    """
    cache = Cache.allocate(model.cfg, model.rt).view(slice(0, 1), tokens.shape[1])
    step = model.step

    def jump(n_new: int, lengths: torch.Tensor, slots: int):
        start = int(lengths)
        turned = [step(1, positions[0, i, None], slots) for i in range(start, start + n_new)]
        return replace(step(n_new, lengths, slots),
                       **{part: torch.cat([getattr(s, part) for s in turned], dim=1)
                          for part in ("cos", "sin")})

    model.step = jump
    logits = torch.cat([model(piece, cache) for piece in tokens.split([32, 40, 1, 1, 22], dim=1)], dim=1)
    model.step = step
    return logits


@pytest.mark.parametrize("config", [
    tiny.deepseek(rope_scaling=YARN, max_position_embeddings=163_840),
    tiny.llama(rope_scaling=LLAMA3, max_position_embeddings=131_072)], ids=["r1", "llama"])
def test_logits_at_the_models_last_positions_equal_huggingface(config, tmp_path):
    # 32 tokens at the start and 64 at the very end, which look back over the gap, through three layers.
    theirs, last = tiny.write(tmp_path, config), config.max_position_embeddings
    tokens = torch.randint(0, 256, (1, 96), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(32), torch.arange(last - 64, last)])[None]
    seen = torch.ones_like(tokens)          # without it, HuggingFace may take a gap for a second sequence
    with torch.no_grad():
        expected = theirs(tokens, position_ids=positions, attention_mask=seen).logits
        near = theirs(tokens).logits
    model = tiny.load(tmp_path)
    assert (near - expected).abs().max() > expected.std()               # where they stand matters
    assert (far_logits(model, tokens, positions) - expected).abs().max() <= 2e-3 * expected.std()
    model.rope_freqs = both_angles(theirs.model.rotary_emb.inv_freq)
    assert (far_logits(model, tokens, positions) - expected).abs().max() <= 1e-5 * expected.std()


def test_102_440_tokens_in_view_give_huggingfaces_logits(tmp_path, monkeypatch):
    # One layer, so that what is cached does not depend on what was attended to: both sides fill their cache
    # without attending over all of it, and attend from the last 40 tokens. Token by token, torch's product
    # of a vector and a matrix adds 102,440 numbers one after the other, which leaves 1e-4 in fp32.
    n, config = 102_440, tiny.deepseek(**SMALL)
    theirs = tiny.write(tmp_path, config)
    tokens = torch.randint(0, 256, (1, n), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        rows, positions = tokens[0, :-40].view(-1, 512), torch.arange(n - 40).view(-1, 512)
        pieces = DynamicCache(config=config)
        theirs(rows, position_ids=positions, attention_mask=torch.ones_like(rows), past_key_values=pieces,
               logits_to_keep=1)
        past = DynamicCache(config=config)
        past.update(*(t.transpose(0, 1).flatten(1, 2)[None]
                      for t in (pieces.layers[0].keys, pieces.layers[0].values)), 0)
        expected = theirs(tokens[:, -40:], past_key_values=past, position_ids=torch.arange(n - 40, n)[None],
                          attention_mask=torch.ones(1, n, dtype=torch.int64)).logits
    model = tiny.load(tmp_path, rows=1, max_seq_len=n)
    model.rope_freqs = both_angles(theirs.model.rotary_emb.inv_freq)
    cache, attention = Cache.allocate(model.cfg, model.rt), model.layers[0].attn
    with monkeypatch.context() as patch:
        tiny.evaluate(model, "expanded")
        patch.setattr(attention, "_expanded", lambda q, *_: torch.zeros(*q.shape[:3], attention.v))
        generate.prefill(model, tokens[0, :-40].tolist(), cache, 0)
    assert cache.lengths.tolist() == [n - 40]
    for order, split, tolerance in (("expanded", [40], 1e-5), ("absorbed", [40], 1e-5),
                                    ("absorbed", [1] * 40, 2e-4)):
        cache.lengths[0] = n - 40
        tiny.evaluate(model, order)
        ours = torch.cat([model(piece, cache) for piece in tokens[:, -40:].split(split, dim=1)], dim=1)
        assert (ours - expected).abs().max() <= tolerance * expected.std()


def test_an_answer_of_32_768_tokens(tmp_path):
    # The log-probabilities that decoding met at the end are those of one prefill over prompt and answer. The
    # cache is narrow, because it is read 32,768 times.
    tiny.write(tmp_path, tiny.deepseek(**{**SMALL, "kv_lora_rank": 16, "qk_rope_head_dim": 16}))
    model = tiny.load(tmp_path, rows=1, max_seq_len=40_960, prefill_chunk=1024)
    events = list(generate.generate(model, [[1, 2, 3]], (), 32_768, Sampling(1.0, 1.0, seed=1)))
    answer = [token for event in events for token in event.tokens]
    assert len(answer) == 32_768 and events[-1].finish_reason == "length"
    cache = Cache.allocate(model.cfg, model.rt)
    generate.prefill(model, [1, 2, 3, *answer[:-101]], cache, 0)
    logits = model(torch.tensor([answer[-101:-1]]), cache.view(slice(0, 1), 32_770))[0]
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(answer[-100:])[:, None])[:, 0]
    met = torch.tensor([event.logprobs[0] for event in events[-100:]])
    assert (logprobs - met).abs().max() <= 1e-3


# Memory

MEASURE = """
import re, sys
from dataclasses import replace
sys.path[:0] = [{root!r}]
import torch
from convert import Checkpoint, load_model
from generate import Sampling, generate
from model import Runtime
torch.set_num_threads(1)
model = load_model(Checkpoint({path!r}), Runtime(dtype=torch.float32))
def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def run(length, chunk):
    model.rt = replace(model.rt, max_seq_len=length + 1, prefill_chunk=chunk)
    next(generate(model, [[1] * length], (), 1, Sampling(0)))
    return memory("VmHWM")          # of the process's life, so each run must take more than those before it
run(64, 64)
before = memory("VmRSS")
for sizes in [(1000, 256), (2000, 256), (4000, 256), (2000, 4000), (4000, 4000)]:
    print(run(*sizes) - before)
"""


@tiny.PROC
@pytest.mark.parametrize("config", [tiny.qwen2(num_hidden_layers=2, num_attention_heads=12, hidden_size=192),
                                    tiny.deepseek(num_hidden_layers=2, max_position_embeddings=8192)],
                         ids=["dense", "mla"])
def test_memory_is_linear_in_the_prompt_in_chunks_and_several_times_as_much_without(config, tmp_path):
    tiny.write(tmp_path, config)
    script = MEASURE.format(root=str(ROOT), path=str(tmp_path))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}     # freed is given back
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=env)
    c1, c2, c4, whole2, whole4 = map(int, done.stdout.split())
    assert c4 - c2 < 3 * (c2 - c1) and c4 < 2.5 * c2                # growth of a line: 2; of a square: 4
    assert whole4 > 3 * c4                                          # the mask alone is a square
    cfg = load_config(tmp_path / "config.json")
    p = memory.plan(cfg, Runtime(dtype=torch.float32, max_seq_len=4001, prefill_chunk=256))
    assert c4 < 1.3 * (p.activations + p.cache)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "r1"
    tiny.write(path, tiny.deepseek(vocab_size=264, rope_scaling=YARN, max_position_embeddings=163_840))
    write_tokenizer(path, R1_ROLES)
    (path / "prompts.txt").write_text("one\ntwo\nthree\nfour\n")
    return path


class Loading(Exception):
    """Weights would have been read."""


@pytest.fixture
def start(folder, monkeypatch, capsys):
    """generate.py with so many MiB free: the exit code, or Loading with the Runtime; and its words."""
    def load(checkpoint, rt):
        raise Loading(rt)

    def start(mib: float, *args):
        monkeypatch.setattr(memory, "free", lambda device: mib * 2 ** 20)
        monkeypatch.setattr(generate, "load_model", load)
        try:
            result = generate.main(["--ckpt-path", str(folder), "--prefill-chunk", "64", *map(str, args)])
        except Loading as stopped:
            result = stopped.args[0]
        return result, capsys.readouterr().err
    return start


def test_what_does_not_fit_is_refused_before_weights_are_read_and_what_is_advised_fits(start, folder):
    args = ["--input-file", folder / "prompts.txt", "--max-seq-len", 50_000, "--batch-size", 4]
    code, error = start(300, *args)
    assert code == 2 and error.startswith("generate.py: error: 4 x 50000 tokens need ")
    assert error.count("\n") == 1
    total, *parts, free = map(float, re.findall(r"\d+\.\d+", error))
    assert free == round(300 / 1024, 2) and abs(total - sum(parts)) < 0.02 and total > free
    length, rows = map(int, re.search(r"fits: --max-seq-len (\d+) or --batch-size (\d+)\n", error).groups())
    assert start(300, *args, "--batch-size", rows)[0].rows == rows
    assert start(300, *args, "--batch-size", rows + 1)[0] == 2
    assert start(300, *args, "--max-seq-len", length)[0].max_seq_len == length
    assert start(300, *args, "--max-seq-len", length + 1)[0] == 2
    code, error = start(1, *args)
    assert code == 2 and "what fits: nothing" in error
    (folder / "long.txt").write_text("a" * 20_000)              # whose length no advice may fall short of
    for mib in range(40, 200, 20):
        code, error = start(mib, "--input-file", folder / "long.txt", "--max-seq-len", 50_000,
                            "--batch-size", 1)
        if advice := re.search(r"--max-seq-len (\d+)", error.partition("what fits")[2]):
            assert int(advice[1]) > 20_000
    assert "or --prefill-chunk 256\n" in start(900, *args, "--batch-size", 1, "--prefill-chunk", 2048)[1]


def test_what_the_user_left_open_is_made_to_fit(start, folder):
    rt, error = start(300, "--input-file", folder / "prompts.txt", "--max-seq-len", 50_000)
    assert 1 <= rt.rows < 4 and f"memory holds {rt.rows} completions at a time, not 4" in error
    rt, error = start(100, "--interactive")
    assert 2048 <= rt.max_seq_len < 40_960
    assert f"memory holds a conversation of {rt.max_seq_len} tokens, not 40960" in error
    assert start(100, "--interactive", "--max-seq-len", 40_960)[0] == 2
    assert start(15, "--interactive")[0] == 2                       # not even a short one
    assert start(1e6, "--interactive", "--prefill-chunk", 77)[0].prefill_chunk == 77


def test_fp8_weights_are_converted_once_if_that_leaves_half_of_the_memory(start, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tiny.quantise(tmp_path)
    args = ["--ckpt-path", tmp_path, "--prompt", "hi", "--device", "cpu"]
    rt, _ = start(1e6, *args)
    mib = memory.plan(load_config(tmp_path / "config.json"), rt).total / 2 ** 20
    assert rt.fp8 == "bf16" and start(2 * mib + 1, *args)[0] == rt
    assert start(2 * mib - 1, *args)[0] == replace(rt, fp8="dequant")
    for told, mode in ((["--fp8", "dequant"], "dequant"), (["--fp8", "gemm"], "gemm"),
                       (["--compile"], "dequant")):
        assert start(1e6, *args, *told)[0].fp8 == mode


def test_weights_that_stay_a_mapped_file_need_no_memory_of_their_own(start, tmp_path):
    tiny.write(tmp_path, tiny.qwen2(vocab_size=264, hidden_size=768, intermediate_size=3072))     # 111 MiB
    write_tokenizer(tmp_path, R1_ROLES)
    rt, error = start(60, "--ckpt-path", tmp_path, "--prompt", "hi", "--max-new-tokens", 100)
    assert rt.rows == 1 and "read from disk again for each token" in error
    code, error = start(50, "--ckpt-path", tmp_path, "--prompt", "hi", "--max-new-tokens", 100,
                        "--dtype", "bfloat16")
    assert code == 2 and "weights 0.0" in error                     # converted, so in memory


def test_r1_fits_on_8_gpus_of_141_gib_and_16_of_80_but_not_on_8(capsys):
    cfg, open_args = load_config(ROOT / "config_671B.json"), SimpleNamespace(
        interactive=True, max_seq_len=None, batch_size=None)
    for ranks, gib, length in ((8, 139, 40_960), (16, 78, 40_960), (8, 78, None), (8, 82, 2048)):
        rt = Runtime(torch.device("cuda"), fp8="gemm", tp=Shard(0, ranks), max_seq_len=40_960)
        if length:
            fitted = generate.fit(open_args, cfg, rt, gib * 2 ** 30).max_seq_len
            assert fitted == length or length < fitted < 40_960
        else:
            with pytest.raises(ValueError, match=r"1 x 40960 tokens need 8\d\.\d+ GiB .* 78.00 GiB are free; "
                                                 "what fits: nothing, on so few ranks"):
                generate.fit(open_args, cfg, rt, gib * 2 ** 30)


@pytest.mark.parametrize("groups, expected", [
    ({}, 900), ({"memory.max": "max\n", "memory.current": 0}, 900),
    ({"memory.max": 600, "memory.current": 300}, 310),              # 10 of the 300 are pages of files
    ({"memory.max": 5000, "memory.current": 300}, 900),
    ({"memory/memory.limit_in_bytes": 600, "memory/memory.usage_in_bytes": 100}, 510)])
def test_free_memory_is_the_systems_or_the_containers_shared_by_its_ranks(groups, expected, tmp_path,
                                                                          monkeypatch):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       5 kB\nMemAvailable:   921600 kB\n")
    for name, value in groups.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value * 2 ** 20}\n" if isinstance(value, int) else value)
        (path.parent / "memory.stat").write_text(f"anon 7\nactive_file {4 * 2 ** 20}\n"
                                                 f"inactive_file {6 * 2 ** 20}\n")
    cpu = torch.device("cpu")
    assert memory.free(cpu, tmp_path) == expected * 2 ** 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.free(cpu, tmp_path) == expected * 2 ** 20 / 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 5, "SC_PAGE_SIZE": 16_384}.get)
    assert memory.free(cpu, tmp_path / "elsewhere") == 5 * 16_384   # macOS: all there is
    monkeypatch.delattr(os, "sysconf")
    assert memory.free(cpu, tmp_path / "elsewhere") > 2 ** 60       # unknown: nothing is refused
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 10))
    assert memory.free(torch.device("cuda", 0), tmp_path) == 5
