"""Claim: what tools/plan.py says of a model before it is there is what the model takes when it is.

Weights and cache are compared with the bytes of loaded tensors, exactly; the activations' bound with the peak
of a process of its own that runs a prompt.
"""
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import products
from convert import load_config
from decode import Decoder
from model import Cache, Runtime, Shard

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import plan  # noqa: E402

R1 = ROOT / "config_671B.json"


@pytest.mark.parametrize("name", ["moe", "fp8", "fp8 as bf16", "dense", "tied"])
def test_weights_and_cache_are_those_of_the_loaded_model(name, tmp_path):
    config = {"dense": tiny.qwen2, "tied": tiny.llama}.get(name, tiny.deepseek)
    more = {"tied": dict(tie_word_embeddings=True), "fp8": dict(moe_intermediate_size=256),
            "fp8 as bf16": dict(moe_intermediate_size=256)}.get(name, {})
    tiny.write(tmp_path, config(**more))
    if "fp8" in name:
        tiny.quantise(tmp_path)
    for ranks in (1, 2):
        model = tiny.load(tmp_path, Shard(0, ranks), rows=3, max_seq_len=100, dtype=torch.bfloat16,
                          fp8="bf16" if name == "fp8 as bf16" else "dequant")
        p = plan.plan(load_config(tmp_path / "config.json"), model.rt)
        own = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}     # a tied head is there once
        gates = [t for name, t in model.state_dict().items() if name.endswith("gate.weight")]
        wider = sum(t.nbytes - 2 * t.numel() for t in gates)    # fp32 if the checkpoint's are; R1's are not
        assert p.weights == sum(own.values()) - wider and (wider > 0) == (name == "moe")
        cache = Cache.allocate(model.cfg, model.rt)
        assert p.cache == sum(buffer.nbytes for layer in cache.layers for buffer in layer)
        assert p.cache == 300 * p.cache_per_token


@pytest.mark.parametrize("slots", [100, 600])
@pytest.mark.parametrize("compile", [False, True])
def test_the_cache_of_a_decoder_is_planned(tmp_path, slots, compile):
    tiny.write(tmp_path, tiny.qwen2())
    model = tiny.load(tmp_path, rows=3, max_seq_len=slots, compile=compile)
    held = sum(buffer.nbytes for layer in Decoder(model).cache.layers for buffer in layer)
    assert plan.plan(model.cfg, model.rt).cache == held


def test_r1_takes_the_published_bytes_and_reads_what_37_billion_parameters_take():
    p = plan.plan(load_config(R1), Runtime(tp=Shard(0, 8), rows=1, max_seq_len=1))
    dequantised = 61 * (32768 * 512 // 8 - 256 * 4 * 4 // 8)        # wkv_b: a second byte, but no scales
    assert p.weights == 85_140_130_848 + dequantised and p.cache_per_token == 70_272
    one = plan.plan(load_config(R1), Runtime(rows=1, max_seq_len=1))
    assert 37e9 < one.step < 40e9                               # 36.6 B parameters: FP8, head and gate bf16
    many = plan.plan(load_config(R1), Runtime(rows=10_000, max_seq_len=1))
    assert many.step > 0.99 * (many.weights - 129280 * 7168 * 2)    # a large batch reads every expert


MEASURE = """
import sys, re
sys.path[:0] = [{root!r}]
import torch
import products
from convert import Checkpoint, load_model
from generate import Sampling, generate
from model import Runtime
torch.set_num_threads(1)
products.MULTIPLIES_BF16 = products.AMX = False
model = load_model(Checkpoint({path!r}), Runtime(max_seq_len=2048, prefill_chunk={chunk}, dtype={dtype}))
def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
next(generate(model, [[1] * 64], (), 1, Sampling(0)))
before = memory("VmRSS")
next(generate(model, [[1] * 2000], (), 1, Sampling(0)))
print(memory("VmHWM") - before)
"""


DENSE = tiny.qwen2(hidden_size=768, intermediate_size=3072, num_hidden_layers=2)
LATENT = tiny.deepseek(num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=128,
                       max_position_embeddings=8192)


@tiny.PROC
@pytest.mark.parametrize("config, chunk, dtype", [
    (DENSE, 1024, torch.float32), (LATENT, 2048, torch.bfloat16), (LATENT, 128, torch.float32),
    (LATENT, 128, torch.bfloat16), (LATENT, 96, torch.float32), (LATENT, 96, torch.bfloat16)],
    ids=["dense", "expanded bf16 in one chunk", "expanded", "expanded bf16", "absorbed", "absorbed bf16"])
def test_activations_are_near_the_bound(config, chunk, dtype, tmp_path, monkeypatch):
    """bf16 as on a CPU that multiplies in fp32, which takes copies."""
    monkeypatch.setattr(products, "MULTIPLIES_BF16", False)
    monkeypatch.setattr(products, "AMX", False)
    tiny.write(tmp_path, config)
    rt = Runtime(dtype=dtype, max_seq_len=2048, prefill_chunk=chunk)
    p = plan.plan(load_config(tmp_path / "config.json"), rt)
    script = MEASURE.format(root=str(ROOT), path=str(tmp_path), chunk=chunk, dtype=dtype)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}     # freed is given back
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=env)
    used = int(done.stdout) - p.cache                           # its pages are touched by the prompt, too
    assert 0.5 * p.activations < used < 1.3 * p.activations     # malloc and BLAS keep buffers of their own


FAULTS = """
import resource, sys
sys.path[:0] = [{root!r}]
import memory, torch
memory.keep_freed()
for number in range(16):             # the first ones find their places
    if number == 6:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 22), torch.ones(2 ** 21)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of Linux's C library, glibc")
@pytest.mark.parametrize("environment, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "65536"}, False)])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(environment, kept):
    """Ten times 24 MB are 60,000 new pages of 4 kB, or none."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS.format(root=str(ROOT))], check=True,
                          capture_output=True, text=True, env={**clean, **environment})
    assert (int(done.stdout) < 1000) == kept


def run(capsys, *args, gib="80", gpus="8") -> tuple[int, str]:
    code = plan.main(["--config", str(R1), "--gpu-gib", gib, "--gpus", gpus, *args])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_report_says_what_fits_and_what_would(capsys):
    code, text = run(capsys, "--batch", "8", "--seq", "32768", gib="141")
    assert code == 0 and ": fits" in text and "1, 2, 4, 8, 16" in text
    rows = int(re.search(r"largest batch at this length: +(\d+)", text)[1])
    assert run(capsys, "--batch", str(rows), "--seq", "32768", gib="141")[0] == 0
    assert run(capsys, "--batch", str(rows + 1), "--seq", "32768", gib="141")[0] == 1
    code, text = run(capsys)                                        # the famous 8 x H100
    assert code == 1 and "DOES NOT FIT" in text and "longest context at this batch: none" in text
    assert run(capsys, gpus="16")[0] == 0                           # two nodes do
    step = plan.plan(load_config(R1), Runtime(tp=Shard(0, 8), rows=4, max_seq_len=1000)).step
    text = run(capsys, "--batch", "4", "--seq", "1000", "--bandwidth", "4800", gib="141")[1]
    assert f"{step / 4.8e9:.2f} ms" in text and f"{4 * 4.8e12 / step:,.1f} tokens/s" in text


def test_a_model_with_a_short_context_is_planned_at_its_full_length_and_nothing_need_be_reserved(capsys):
    code, text = run(capsys, "--config", str(ROOT / "demo/config.json"), "--reserve-gib", "0", gpus="1")
    assert code == 0 and "1 row of 2,048 tokens" in text


def test_dequantised_weights_and_folders_are_planned_too(capsys):
    code, text = run(capsys, "--fp8", "bf16", gpus="32")
    assert code == 0 and "weights          40.92 GiB" in text and "1, 2, 4, 8, 16, 32" in text
    code, text = run(capsys, "--config", str(ROOT / "demo"), gpus="1")
    assert code == 0 and "1 row of 2,048 tokens" in text


@pytest.mark.parametrize("args, word", [(["--seq", "999999"], "at most 163840"),
                                        (["--config", "no.json"], "no.json")])
def test_what_cannot_be_planned_is_refused(args, word, capsys):
    code, text = run(capsys, *args)
    assert code == 2 and word in text and text.count("\n") == 1
    code, text = run(capsys, gpus="3")
    assert code == 2 and "it can over 1, 2, 4, 8, 16" in text
