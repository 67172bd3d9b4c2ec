"""Claim: a checkpoint that does not fit is refused before any output and before any tensor is read.

One line on standard error that names the file or tensor, exit code 2, no traceback, no output folder. Every
tensor is used exactly once; the few that may be left over are known by name. Nothing is computed: no
tolerance.
"""
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_leftovers import add_layer, edit

import convert
from convert import Checkpoint, load_model
from model import Runtime, Shard


@pytest.fixture
def hf(tmp_path):
    path = tmp_path / "hf"
    tiny.write(path, tiny.deepseek())
    return path


@pytest.fixture(autouse=True)
def reads(monkeypatch):
    """Counts the tensors that are read."""
    read, original = [], Checkpoint.part
    monkeypatch.setattr(Checkpoint, "part", lambda self, *args: (read.append(args), original(self, *args))[1])
    return read


@pytest.fixture
def refused(capsys, reads):
    """Demands that conversion fails with one line that contains `words`, reads and writes nothing."""
    def check(hf, *words: str, ranks: int = 2, out=None, more=()) -> None:
        capsys.readouterr()
        reads.clear()
        arguments = ["--hf-ckpt-path", hf, "--save-path", out or hf.parent / "out", "--model-parallel", ranks]
        assert convert.main([*map(str, arguments), *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("convert.py: error: ") and error.count("\n") == 1, error
        assert all(word in error for word in words), error
        assert reads == [] and not (hf.parent / "out").exists()
    return check


DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
TENSOR_ERRORS = {
    "one too many": (lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)}),
                     "model.layers.0.extra.weight"),
    "one missing": (lambda t: t.pop(DOWN), DOWN),
    "wrong shape": (lambda t: t.update({DOWN: torch.ones(256, 64)}), "[256, 64]"),
    "another dtype": (lambda t: t.update({DOWN: torch.ones(256, 128, dtype=torch.int32)}), DOWN),
    "one expert in another dtype": (lambda t: t.update({DOWN: t[DOWN].bfloat16()}),
                                    "experts.15.down_proj.weight differ"),
    "fp8 without a quantization_config": (lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)}), DOWN),
    "more layers than the config says": (
        lambda t: t.update({key.replace("layers.2", "layers.3"): tensor.clone()
                            for key, tensor in t.items() if "layers.2" in key}),
        "model.layers.3."),
    "a layer 61 that is no mtp layer": (lambda t: t.update({"model.layers.61.enorm.weight": torch.ones(2)}),
                                        "model.layers.61.enorm.weight"),
}


@pytest.mark.parametrize("change, word", TENSOR_ERRORS.values(), ids=TENSOR_ERRORS.keys())
def test_tensors_that_do_not_fit_are_refused_by_name(change, word, hf, refused):
    edit(hf, change)
    refused(hf, word)


FP8_ERRORS = {
    "missing scale": (lambda t: t.pop(DOWN + "_scale_inv"), DOWN + "_scale_inv is missing"),
    "scale of another shape": (lambda t: t.update({DOWN + "_scale_inv": torch.ones(1, 1)}), "[1, 1]"),
    "scale of another dtype": (lambda t: t.update({DOWN + "_scale_inv": t[DOWN + "_scale_inv"].half()}),
                               "float16"),
    "one weight that is not fp8": (lambda t: t.update({DOWN: t[DOWN].bfloat16()}), ".down_proj.weight"),
    "scale without a weight": (lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(2)}),
                               "model.norm"),
}


@pytest.mark.parametrize("more", [(), ("--dtype", "bf16")], ids=["as stored", "bf16"])
@pytest.mark.parametrize("change, word", FP8_ERRORS.values(), ids=FP8_ERRORS.keys())
def test_fp8_weights_and_scales_that_do_not_fit_are_refused_by_name(change, word, more, hf, refused):
    tiny.quantise(hf)
    edit(hf, change)
    refused(hf, word, ranks=1, more=more)


def test_fp8_weights_without_a_word_in_the_config_are_refused(hf, refused):
    tiny.quantise(hf)
    tiny.edit_config(hf, quantization_config=...)
    refused(hf, "self_attn.q_a_proj.weight is stored as torch.float8_e4m3fn", ranks=1)


def test_fp8_weights_whose_rows_would_change_places_are_refused_unless_dequantised(tmp_path, refused):
    source, out = tmp_path / "hf", tmp_path / "bf16"
    tiny.write(source, tiny.llama())
    tiny.quantise(source)
    refused(source, "layers.0.self_attn.q_proj.weight is FP8", ranks=1)
    arguments = ["--hf-ckpt-path", source, "--save-path", out, "--dtype", "bf16", "--verify"]
    assert convert.main(list(map(str, arguments))) == 0


def test_an_mtp_module_among_the_layers_or_with_a_layer_before_it_is_refused(hf, refused):
    add_layer(hf, 3, mtp=False)
    add_layer(hf, 4, mtp=True)
    refused(hf, "model.layers.3.")
    tiny.edit_config(hf, num_hidden_layers=5)
    refused(hf, "model.layers.4.", "is not part of this model", ranks=1)


def test_a_tensor_in_two_files_is_refused(hf, refused):
    tiny.split_file(hf, 2)
    first, second = sorted(hf.glob("*.safetensors"))
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second)
    refused(hf, name, "is also in")


def test_files_that_are_missing_or_damaged_are_refused_by_name(hf, refused):
    tiny.split_file(hf, 3)
    file = sorted(hf.glob("*.safetensors"))[1]
    data = file.read_bytes()
    for damaged in (data[:-1], data[:len(data) // 2], data[:5], b"",
                    b"\x10" + b"\x00" * 7 + b"no json here ..."):
        file.write_bytes(damaged)
        refused(hf, file.name, "cut short")
    file.unlink()
    refused(hf, file.name, "no such file")
    index = hf / "model.safetensors.index.json"
    for text, word in ((b"{", "JSON"), (b"", "JSON"), (b"\x80", "JSON"), (b"[]", "weight_map"),
                       (b'{"metadata": {}}', "weight_map"), (b'{"weight_map": []}', "weight_map"),
                       (b'{"weight_map": {"a": 1}}', "1: no such file"),
                       (b'{"weight_map": {}}', "model.embed_tokens.weight is missing")):
        index.write_bytes(text)
        refused(hf, word)


def test_folders_that_are_no_checkpoint_are_refused(hf, refused, tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    refused(hf / "config.json", "config.json: no such folder", out=tmp_path / "elsewhere")
    weights = (hf / "model.safetensors").rename(tmp_path / "weights")
    refused(hf, "neither", "model.safetensors")
    weights.rename(hf / "model.safetensors")
    for damage in ({"hidden_size": "wide"}, {"num_attention_heads": 0}, {"vocab_size": -1},
                   {"rope_parameters": "yarn"}, {"quantization_config": "fp8"}, {"num_hidden_layers": ...},
                   {"layer_types": 3}, {"first_k_dense_replace": -1}, {"intermediate_size": 1e5},
                   {"vocab_size": 10 ** 18}, {"tie_word_embeddings": None}):
        config = (hf / "config.json").read_text()
        tiny.edit_config(hf, **damage)
        refused(hf, "config.json", *damage)
        (hf / "config.json").write_text(config)
    for text in ("{", "", "[1]", "null"):
        (hf / "config.json").write_text(text)
        refused(hf, "config.json")
    (hf / "config.json").unlink()
    refused(hf, "config.json", "no such file")


@pytest.mark.parametrize("ranks", [0, -1, 3, 8])
def test_illegal_numbers_of_ranks_are_refused_before_any_file_is_opened(ranks, hf, refused, monkeypatch):
    def opened(*_):
        raise AssertionError("a weights file was opened")
    monkeypatch.setattr(convert, "safe_open", opened)
    refused(hf, f" {ranks}", "can be cut over 1, 2, 4", ranks=ranks)
    with pytest.raises(ValueError, match="cannot be cut over 3 ranks; it can over 1, 2, 4"):
        load_model(Checkpoint(hf), Runtime(tp=Shard(0, 3)))


def test_outputs_that_cannot_be_written_are_refused(hf, refused):
    before = {path: path.stat().st_mtime_ns for path in hf.iterdir()}
    (hf.parent / "link").symlink_to(hf)
    for same in (hf, hf / "..", hf.parent / "link"):
        refused(hf, "into another", out=same / hf.name if same.name == ".." else same)
    assert {path: path.stat().st_mtime_ns for path in hf.iterdir()} == before
    (hf.parent / "file").write_text("kept")
    refused(hf, "file: a file", out=hf.parent / "file")
    assert (hf.parent / "file").read_text() == "kept"
    other = hf.parent / "another model"
    other.mkdir()
    (other / "config.json").write_text("kept")
    refused(hf, "config.json: of another checkpoint", out=other)
    assert [file.read_text() for file in other.iterdir()] == ["kept"]


def test_converted_folders_are_not_mistaken(hf, refused):
    out = hf.parent / "converted"
    assert convert.main(["--hf-ckpt-path", str(hf), "--save-path", str(out), "--model-parallel", "2"]) == 0
    refused(out, "HuggingFace folder")
    with pytest.raises(ValueError, match="converted for 2 ranks, but this run has 1"):
        load_model(Checkpoint(out), Runtime())
    file = out / "model1-mp2.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    with pytest.raises(ValueError, match="model1-mp2.safetensors: .* bytes, but"):
        Checkpoint(out)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model1-mp2.safetensors"):
        Checkpoint(out)
    (out / convert.MANIFEST).write_text(json.dumps({"model_parallel": 2}))
    with pytest.raises(ValueError, match="manifest.json"):
        Checkpoint(out)
