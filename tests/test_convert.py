"""Claim: conversion is complete, exact, bounded in memory, and safe to interrupt.

Everything is compared bit for bit: conversion moves numbers and computes none, except for dequantisation,
which is one fp32 product and one rounding.
"""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert
import kernel
from convert import Checkpoint, load_model
from model import Runtime, Shard

ROOT = Path(__file__).parent.parent
# FP8 needs every cut on a block: 4 ranks of one 128-block each
WIDE = dict(intermediate_size=512, moe_intermediate_size=512, num_attention_heads=8, num_key_value_heads=8)
CONFIGS = {"r1": tiny.deepseek(**WIDE),
           "no q-lora, tied": tiny.deepseek(q_lora_rank=None, tie_word_embeddings=True),
           "qwen2": tiny.qwen2(num_attention_heads=8, num_key_value_heads=4),
           "llama, tied": tiny.llama(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)}


def run(source: Path, out: Path, ranks: int, *more: str) -> int:
    return convert.main(["--hf-ckpt-path", str(source), "--save-path", str(out), "--model-parallel",
                         str(ranks), *more])


def loaded(folder: Path, rank: int, ranks: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor of one rank's model, as bytes."""
    model = load_model(Checkpoint(folder), Runtime(dtype=dtype, tp=Shard(rank, ranks)))
    return {name: convert.as_bytes(t) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
def test_a_converted_folder_loads_as_the_huggingface_folder_does(config, fp8, tmp_path):
    if fp8 and config.model_type != "deepseek_v3":
        return      # the distills are not published in FP8
    source = tmp_path / "hf"
    tiny.write(source, config)
    if fp8:
        tiny.quantise(source)
    tiny.split_file(source, 3)
    for ranks in Checkpoint(source).cfg.legal_ranks():
        if ranks > 4:
            continue
        out = tmp_path / f"mp{ranks}"
        assert run(source, out, ranks, "--verify") == 0
        for rank in range(ranks):
            assert_equal(loaded(out, rank, ranks), loaded(source, rank, ranks))


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bf16_conversion_dequantises_also_where_a_cut_falls_inside_a_block(ranks, tmp_path):
    source, out = tmp_path / "hf", tmp_path / "bf16"
    tiny.write(source, tiny.deepseek())              # moe_intermediate_size 128: one block, so 4 ranks cut it
    tiny.quantise(source)
    assert run(source, out, ranks, "--dtype", "bf16", "--verify") == 0
    stored = load_file(source / "model.safetensors")
    key = "model.layers.1.mlp.experts.5.{}_proj.weight"
    for module, axis, name in (("gate", 0, "w1"), ("down", 1, "w2")):
        q, scale = stored[key.format(module)], stored[key.format(module) + "_scale_inv"]
        whole = kernel.weight_dequant(q, scale, torch.bfloat16)
        files = [load_file(out / convert.rank_file(rank, ranks)) for rank in range(ranks)]
        parts = [file[f"layers.1.ffn.experts.{name}.weight"][5] for file in files]
        assert torch.equal(torch.cat(parts, axis), whole)
        assert files[0]["layers.1.ffn.gate.bias"].dtype == torch.float32
        assert not any("scale" in name for name in files[0])


def test_what_belongs_to_a_checkpoint_comes_along(tmp_path):
    source, out = tmp_path / "hf", tmp_path / "out"
    tiny.write(source, tiny.llama())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (source / name).write_text(f"contents of {name}")
    assert run(source, out, 2) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_text() == f"contents of {name}"
    assert Checkpoint(out).cfg == Checkpoint(source).cfg
    assert sorted(path.name for path in out.iterdir() if "mp2" in path.name) == [
        "model0-mp2.safetensors", "model1-mp2.safetensors"]


def test_rank_files_are_safetensors_files_with_aligned_tensors(tmp_path):
    source, out = tmp_path / "hf", tmp_path / "out"
    tiny.write(source, tiny.deepseek(vocab_size=255))   # odd sizes would misalign what follows them
    tiny.quantise(source)
    assert run(source, out, 1) == 0
    file = out / "model0-mp1.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    head = json.loads(file.read_bytes()[8:8 + length])
    head.pop("__metadata__")
    widths = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    assert all(tensor["data_offsets"][0] % widths[tensor["dtype"]] == 0 for tensor in head.values())
    with safe_open(file, "pt") as f:
        assert set(f.keys()) == head.keys()


def test_the_mtp_layer_is_left_out_with_a_line_that_says_so(tmp_path, capsys):
    from test_model_vs_hf import add_mtp_layer
    source = tmp_path / "hf"
    tiny.write(source, tiny.deepseek(num_hidden_layers=2))
    add_mtp_layer(source, 2)
    assert run(source, tmp_path / "out", 2) == 0
    assert "left out layer 2" in capsys.readouterr().err
    assert not any("layers.2." in name for name in load_file(tmp_path / "out/model0-mp2.safetensors"))


def test_old_llama_buffers_are_left_out(tmp_path):
    tiny.write(tmp_path, tiny.llama())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert tiny.load(tmp_path).cfg.n_layers == 3


def test_tensors_that_need_no_change_stay_mapped_files(tmp_path):
    source, out = tmp_path / "hf", tmp_path / "out"
    tiny.write(source, tiny.deepseek(vocab_size=40_000))
    run(source, out, 1)
    for folder, name in ((source, "model.safetensors"), (out, "model0-mp1.safetensors")):
        model = load_model(Checkpoint(folder), Runtime(dtype=torch.float32))
        assert any(low <= model.embed.weight.data_ptr() < high for low, high in mappings(folder / name))


def mappings(file: Path) -> list[tuple[int, int]]:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux' /proc to see what is mapped")
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


# Memory and interruption


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 12 files and 493 MB whose largest tensor has 34 MB."""
    path = tmp_path_factory.mktemp("large")
    tiny.write(path, tiny.deepseek(hidden_size=512, moe_intermediate_size=1024, n_routed_experts=32,
                                   vocab_size=16_384, num_attention_heads=8, num_key_value_heads=8))
    tiny.split_file(path, 12)
    return path


def command(source: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "convert.py"), "--hf-ckpt-path", str(source), "--save-path", str(out),
            "--model-parallel", "4", *more]


def peak_memory(code: str) -> int:
    """The largest resident memory in bytes of a Python process that runs `code`, mapped files included."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux' /proc to measure peak memory")
    # VmHWM, not getrusage: the latter starts from the memory of the process that forked this one
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r}); import convert
{code}
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout) * 1024


def test_memory_stays_under_the_largest_tensor_and_a_fixed_allowance(large, tmp_path):
    total = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    largest = max(t.nbytes for file in large.glob("*.safetensors") for t in load_file(file).values())
    assert largest > 30e6 and total > 12 * largest
    args = command(large, tmp_path / "out")[2:]
    used = peak_memory(f"assert convert.main({args}) == 0") - peak_memory("")
    assert 0 < used < largest + 32e6            # 32 MB for headers, plans and one rank's slice of a tensor


def test_a_killed_conversion_passes_for_nothing_and_goes_on_where_it_stopped(large, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    subprocess.run(command(large, undisturbed), check=True, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command(large, out), stderr=subprocess.DEVNULL)
    part = out / "model3-mp4.safetensors.part"
    while not (part.exists() and part.stat().st_size > 20e6):
        assert process.poll() is None, "the conversion ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / convert.MANIFEST).exists() and not list(out.glob("*.safetensors"))
    with pytest.raises(ValueError, match="unfinished conversion"):
        Checkpoint(out)
    written = part.stat().st_size
    resumed = subprocess.run(command(large, out, "--verify"), check=True, capture_output=True, text=True)
    assert " 0%" not in resumed.stderr.split("verify")[0]   # its bar starts where the first attempt stopped
    assert written > 20e6 and not list(out.glob("*.part"))
    for file in undisturbed.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_parts_of_another_source_are_not_continued(tmp_path):
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    for seed, source in enumerate((first, second)):
        tiny.write(source, tiny.llama(), seed=seed)
    assert run(first, out, 2) == 0
    for file in out.glob("*.safetensors"):              # as if it had been killed just before the end
        file.rename(file.with_name(file.name + ".part"))
    (out / convert.MANIFEST).unlink()
    assert run(second, out, 2, "--verify") == 0


def test_a_finished_conversion_is_not_repeated_and_not_overwritten_by_another(tmp_path, capsys):
    source, out = tmp_path / "hf", tmp_path / "out"
    tiny.write(source, tiny.llama())
    assert run(source, out, 2) == 0
    before = (out / "model0-mp2.safetensors").stat().st_mtime_ns
    assert run(source, out, 2) == 0
    assert (out / "model0-mp2.safetensors").stat().st_mtime_ns == before
    capsys.readouterr()
    assert run(source, out, 1) == 2
    assert "holds another conversion" in capsys.readouterr().err


@pytest.mark.parametrize("name, rank", [
    ("layers.0.attn.wq.weight", 0), ("layers.1.attn.wo.weight", 1), ("layers.2.ffn_norm.weight", 1),
    ("head.weight", 1), ("norm.weight", 0)])
def test_verify_notices_a_single_changed_byte(name, rank, tmp_path, capsys):
    source, out = tmp_path / "hf", tmp_path / "out"
    tiny.write(source, tiny.llama())
    assert run(source, out, 2, "--verify") == 0
    flip_byte(out / convert.rank_file(rank, 2), name)
    capsys.readouterr()
    assert run(source, out, 2, "--verify") == 2
    assert name in capsys.readouterr().err


def test_verify_notices_a_single_changed_byte_of_an_expert(tmp_path, capsys):
    source, out = tmp_path / "hf", tmp_path / "out"
    tiny.write(source, tiny.deepseek(**WIDE))
    tiny.quantise(source)
    assert run(source, out, 4, "--verify") == 0
    flip_byte(out / convert.rank_file(2, 4), "layers.2.ffn.experts.w2.weight")
    assert run(source, out, 4, "--verify") == 2
    assert "experts.15.down_proj.weight" in capsys.readouterr().err


def flip_byte(file: Path, name: str) -> None:
    """Change the last byte of one tensor."""
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    end = json.loads(data[8:8 + length])[name]["data_offsets"][1]
    data[8 + length + end - 1] ^= 1
    file.write_bytes(data)
