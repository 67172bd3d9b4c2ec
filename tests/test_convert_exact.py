"""Claim: what conversion writes is the source, bit for bit, and --verify would notice if it were not.

Conversion moves numbers and computes none, except for dequantisation, one fp32 product and one rounding (V3
section 3.3), so no comparison here has a tolerance.
"""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert import run

import kernel
from convert import Checkpoint, as_bytes, load_model, rank_file
from model import Runtime, Shard

# FP8 needs every cut on a block: 4 ranks of one 128-block each
WIDE = dict(intermediate_size=512, moe_intermediate_size=512, num_attention_heads=8, num_key_value_heads=8)
CONFIGS = {"r1": tiny.deepseek(**WIDE),
           "r1 fp8": tiny.deepseek(**WIDE),
           "no q-lora, tied": tiny.deepseek(q_lora_rank=None, tie_word_embeddings=True),
           "qwen2": tiny.qwen2(num_attention_heads=8, num_key_value_heads=4),
           "qwen2, tied": tiny.qwen2(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True),
           "llama": tiny.llama(num_attention_heads=8, num_key_value_heads=4),
           "llama, tied": tiny.llama(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)}


def write(path: Path, name: str, config=None) -> Path:
    tiny.write(path, config or CONFIGS[name])
    if "fp8" in name:
        tiny.quantise(path)
    return path


def loaded(folder: Path, rank: int, ranks: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor of one rank's model, as bytes."""
    model = load_model(Checkpoint(folder), Runtime(dtype=dtype, tp=Shard(rank, ranks)))
    return {name: as_bytes(t) for name, t in model.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_a_converted_folder_loads_as_the_huggingface_folder_does(name, tmp_path):
    source = write(tmp_path / "hf", name)
    tiny.split_file(source, 3)
    for ranks in (1, 2, 4):
        out = tmp_path / f"mp{ranks}"
        assert run(source, out, ranks, "--verify") == 0
        for rank in range(ranks):
            assert_equal(loaded(out, rank, ranks), loaded(source, rank, ranks))
    ours, theirs = (tiny.logits(tiny.load(folder), torch.arange(60).view(2, 30))
                    for folder in (tmp_path / "mp1", source))
    assert torch.equal(ours, theirs)


RAGGED = dict(intermediate_size=320, moe_intermediate_size=192, v_head_dim=96)


@pytest.mark.parametrize("changes", [{}, RAGGED], ids=["whole blocks", "ragged blocks"])
def test_bf16_conversion_dequantises_also_where_a_cut_falls_inside_a_block(changes, tmp_path, capsys):
    source = write(tmp_path / "hf", "fp8", tiny.deepseek(**changes))    # its experts cannot be cut in FP8
    stored = load_file(source / "model.safetensors")
    dequantised = {key: kernel.weight_dequant(stored[key], stored[key + "_scale_inv"], torch.bfloat16)
                   for key in stored if key + "_scale_inv" in stored}
    assert run(source, tmp_path / "fp8", 4) == 2
    assert "can be cut over 1" in capsys.readouterr().err
    for ranks in (1, 2, 4):
        out = tmp_path / f"bf16 mp{ranks}"
        assert run(source, out, ranks, "--dtype", "bf16", "--verify") == 0
        files = [load_file(out / rank_file(rank, ranks)) for rank in range(ranks)]

        def whole(name, axis, files=files):
            return torch.cat([file[name] for file in files], axis)
        for layer, first, last in ((0, "mlp", "ffn"), (1, "mlp.shared_experts", "ffn.shared")):
            for theirs, ours, axis in (("gate", "w1", 0), ("down", "w2", 1), ("up", "w3", 0)):
                expected = dequantised[f"model.layers.{layer}.{first}.{theirs}_proj.weight"]
                assert torch.equal(whole(f"layers.{layer}.{last}.{ours}.weight", axis), expected)
                experts = [f"model.layers.2.mlp.experts.{e}.{theirs}_proj.weight" for e in range(16)]
                assert torch.equal(whole(f"layers.2.ffn.experts.{ours}.weight", axis + 1),
                                   torch.stack([dequantised[key] for key in experts]))
        for theirs, ours, axis in (("q_b_proj", "wq_b", 0), ("kv_b_proj", "wkv_b", 0), ("o_proj", "wo", 1)):
            expected = dequantised[f"model.layers.1.self_attn.{theirs}.weight"]
            assert torch.equal(whole(f"layers.1.attn.{ours}.weight", axis), expected)
        kv_a = dequantised["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
        assert all(torch.equal(file["layers.1.attn.wkv_a.weight"], kv_a) for file in files)
        assert files[0]["layers.1.ffn.gate.bias"].dtype == torch.float32
        assert not any("scale" in name for name in files[0])
        assert Checkpoint(out).cfg == replace(Checkpoint(source).cfg, fp8=False)


def test_what_belongs_to_a_checkpoint_comes_along(tmp_path):
    source, out = write(tmp_path / "hf", "llama"), tmp_path / "out"
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
             "chat_template.jinja")
    for name in names:
        (source / name).write_text(f"contents of {name}")
    assert run(source, out, 2) == 0
    assert [(out / name).read_text() for name in names] == [f"contents of {name}" for name in names]
    assert Checkpoint(out).cfg == Checkpoint(source).cfg
    assert {path.name for path in out.iterdir()} == {
        *names, "config.json", "manifest.json", "model0-mp2.safetensors", "model1-mp2.safetensors"}


def test_rank_files_are_safetensors_files_with_aligned_tensors(tmp_path):
    # an FP8 tensor of 127 x 129 bytes would misalign whatever followed it, were that wider
    source = write(tmp_path / "hf", "fp8", tiny.deepseek(hidden_size=129, moe_intermediate_size=127))
    out = tmp_path / "out"
    assert run(source, out, 1) == 0
    data = (out / rank_file(0, 1)).read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8:8 + length])
    head.pop("__metadata__")
    widths = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    assert (8 + length) % 64 == 0 and {tensor["dtype"] for tensor in head.values()} == widths.keys()
    assert all(tensor["data_offsets"][0] % widths[tensor["dtype"]] == 0 for tensor in head.values())
    with safe_open(out / rank_file(0, 1), "pt") as f:
        assert set(f.keys()) == head.keys()
        assert all(f.get_tensor(key).data_ptr() % widths[head[key]["dtype"]] == 0 for key in head)


def mappings(file: Path) -> list[tuple[int, int]]:
    """Where this process has mapped `file`."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


@tiny.PROC
@pytest.mark.parametrize("name, dtype", [("r1", torch.float32), ("r1 fp8", torch.bfloat16),
                                         ("qwen2", torch.float32)])
def test_tensors_that_need_no_cast_cut_or_copy_stay_mapped_files(name, dtype, tmp_path):
    source, out = write(tmp_path / "hf", name), tmp_path / "out"
    assert run(source, out, 1) == 0
    stacked_or_permuted, dequantised = {"experts", "wq", "wk"}, {"wkv_b"} if "fp8" in name else set()
    for file, copied in ((source / "model.safetensors", stacked_or_permuted), (out / rank_file(0, 1), set())):
        checkpoint, rt = Checkpoint(file.parent), Runtime(dtype=dtype)
        model = load_model(checkpoint, rt)
        places, total = mappings(file), 0
        for key, tensor in model.state_dict().items():
            if not (copied | dequantised) & set(key.split(".")):
                assert any(low <= tensor.data_ptr() < high for low, high in places), key
                total += tensor.nbytes
        assert total > 100_000
        assert checkpoint.mapped_bytes(rt) == (0 if "fp8" in name else total)


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    checkpoint, rt = Checkpoint(write(tmp_path, "qwen2")), Runtime(dtype=torch.float32)
    before = load_model(checkpoint, rt).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "n" * 400})
    after = load_model(checkpoint, rt).state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@tiny.PROC
def test_what_ranks_cut_by_columns_or_cast_does_not_stay_a_mapped_file(tmp_path):
    source = write(tmp_path / "hf", "qwen2")
    for rt in (Runtime(dtype=torch.float32, tp=Shard(1, 2)), Runtime(dtype=torch.bfloat16)):
        checkpoint = Checkpoint(source)
        model = load_model(checkpoint, rt)
        places = mappings(source / "model.safetensors")
        mapped = [t.nbytes for t in model.state_dict().values()
                  if any(low <= t.data_ptr() < high for low, high in places)]
        assert checkpoint.mapped_bytes(rt) == sum(mapped) and bool(mapped) == (rt.dtype == torch.float32)


FLIPPED = {     # checkpoint, tensor: rank that holds a wrong byte, what the error names
    ("llama", "embed.weight"): (1, "model.embed_tokens.weight"),                # cut by outputs
    ("llama", "layers.1.attn.wo.weight"): (1, "self_attn.o_proj.weight"),       # cut by inputs
    ("llama", "layers.0.attn.wq.weight"): (0, "self_attn.q_proj.weight"),       # cut and permuted
    ("qwen2", "layers.0.attn.wk.bias"): (1, "self_attn.k_proj.bias"),
    ("llama", "layers.2.ffn_norm.weight"): (1, "post_attention_layernorm.weight"),      # on every rank
    ("r1 fp8", "layers.1.ffn.gate.bias"): (1, "e_score_correction_bias"),
    ("r1 fp8", "layers.2.ffn.experts.w2.weight"): (1, "experts.15.down_proj.weight"),
    ("r1 fp8", "layers.2.ffn.experts.w1.scale"): (0, "experts.15.gate_proj.weight_scale_inv")}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The source and the folder for 2 ranks of the checkpoints in FLIPPED."""
    root = tmp_path_factory.mktemp("converted")
    for name in {name for name, _ in FLIPPED}:
        assert run(write(root / name, name), root / f"{name} mp2", 2, "--verify") == 0
    return root


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("checkpoint, name", FLIPPED)
def test_verify_notices_a_single_changed_byte_and_names_the_tensor(checkpoint, name, converted, capsys):
    rank, key = FLIPPED[checkpoint, name]
    file = converted / f"{checkpoint} mp2" / rank_file(rank, 2)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    last = 8 + length + json.loads(file.read_bytes()[8:8 + length])[name]["data_offsets"][1] - 1
    flip(file, last)
    assert run(converted / checkpoint, file.parent, 2, "--verify") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("convert.py: error: ") and key in error
    assert f"{file.name}: {name} does not equal " in error
    flip(file, last)
    assert run(converted / checkpoint, file.parent, 2, "--verify") == 0


def test_verify_notices_a_damaged_header(converted, capsys):
    file = converted / "llama mp2" / rank_file(1, 2)
    name = file.read_bytes().index(b"layers.1.attn.wo.weight") + len(b"layers.1.attn.w")
    for position, words in ((10, "damaged or cut short"), (name, "layers.1.attn.wo.weight is missing")):
        flip(file, position)
        assert run(converted / "llama", file.parent, 2, "--verify") == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
        flip(file, position)


def test_verify_notices_files_that_changed_places(converted, capsys):
    first, second = (converted / "qwen2 mp2" / rank_file(rank, 2) for rank in (0, 1))
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    assert run(converted / "qwen2", first.parent, 2, "--verify") == 2
    assert "does not equal model." in capsys.readouterr().err
    first.write_bytes(data[0])
    second.write_bytes(data[1])
