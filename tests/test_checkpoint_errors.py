"""Claim: a checkpoint that does not fit is refused before any output and before any tensor is read.

One line on standard error that names the file or tensor, exit code 2, no traceback, an untouched output
folder.
"""
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import convert
from convert import Checkpoint, load_model
from model import Runtime, Shard


@pytest.fixture
def hf(tmp_path):
    path = tmp_path / "hf"
    tiny.write(path, tiny.deepseek())
    return path


def refused(hf, capsys, *words: str, ranks: int = 2, out=None) -> None:
    """Conversion must fail with one line that contains `words`, leaving nothing behind."""
    out = out or hf.parent / "out"
    capsys.readouterr()
    code = convert.main(["--hf-ckpt-path", str(hf), "--save-path", str(out), "--model-parallel", str(ranks)])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("convert.py: error: ") and error.count("\n") == 1
    for word in words:
        assert word in error, error
    assert not (hf.parent / "out").exists()


def edit(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
TENSOR_ERRORS = {
    "one too many": (lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)}),
                     "model.layers.0.extra.weight"),
    "one missing": (lambda t: t.pop(DOWN), DOWN),
    "wrong shape": (lambda t: t.update({DOWN: torch.ones(256, 64)}), "[256, 64]"),
    "another dtype": (lambda t: t.update({DOWN: torch.ones(256, 128, dtype=torch.int32)}), DOWN),
    "one expert in another dtype": (lambda t: t.update({DOWN: t[DOWN].bfloat16()}),
                                    "experts.*.down_proj.weight differ"),
    "fp8 without a quantization_config": (lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)}), DOWN),
    "more layers than the config says": (
        lambda t: t.update({key.replace("layers.2", "layers.3"): tensor.clone()
                            for key, tensor in t.items() if "layers.2" in key}),
        "model.layers.3."),
    "a layer 61 that is no mtp layer": (lambda t: t.update({"model.layers.61.enorm.weight": torch.ones(2)}),
                                        "model.layers.61.enorm.weight"),
}


@pytest.mark.parametrize("change, word", TENSOR_ERRORS.values(), ids=TENSOR_ERRORS.keys())
def test_tensors_that_do_not_fit_are_refused_by_name(change, word, hf, capsys):
    edit(hf, change)
    refused(hf, capsys, word)


FP8_ERRORS = {
    "missing scale": (lambda t: t.pop(DOWN + "_scale_inv"), DOWN + "_scale_inv is missing"),
    "scale of another shape": (lambda t: t.update({DOWN + "_scale_inv": torch.ones(1, 1)}), "[1, 1]"),
    "scale of another dtype": (lambda t: t.update({DOWN + "_scale_inv": t[DOWN + "_scale_inv"].half()}),
                               "float16"),
    "weight that is not fp8": (lambda t: t.update({DOWN: t[DOWN].bfloat16()}), "bfloat16"),
    "scale without a weight": (lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(2)}),
                               "model.norm"),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "bf16"])
@pytest.mark.parametrize("change, word", FP8_ERRORS.values(), ids=FP8_ERRORS.keys())
def test_fp8_weights_and_scales_that_do_not_fit_are_refused_by_name(change, word, dtype, hf):
    tiny.quantise(hf)
    edit(hf, change)
    if dtype and "bfloat16" in word:
        return      # a weight that is bf16 already needs no dequantisation
    with pytest.raises(ValueError) as error:
        convert.convert(Checkpoint(hf), hf.parent / "out", 1, dtype)
    assert word in str(error.value) and not (hf.parent / "out").exists()


def test_a_tensor_in_two_files_is_refused(hf, capsys):
    tiny.split_file(hf, 2)
    first, second = sorted(hf.glob("*.safetensors"))
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second)
    refused(hf, capsys, name, "is also in")


def test_files_that_are_missing_or_damaged_are_refused_by_name(hf, capsys):
    tiny.split_file(hf, 3)
    file = sorted(hf.glob("*.safetensors"))[1]
    data = file.read_bytes()
    for damaged in (data[:-1], data[:len(data) // 2], data[:5], b"",
                    b"\x10" + b"\x00" * 7 + b"no json here ..."):
        file.write_bytes(damaged)
        refused(hf, capsys, file.name, "cut short")
    file.unlink()
    refused(hf, capsys, file.name, "no such file")
    (hf / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refused(hf, capsys, "model.safetensors.index.json", "weight_map")
    (hf / "model.safetensors.index.json").write_text("{")
    refused(hf, capsys, "model.safetensors.index.json", "JSON")


def test_folders_that_are_no_checkpoint_are_refused(hf, capsys, tmp_path):
    refused(tmp_path / "nowhere", capsys, "nowhere", "no such folder")
    (hf / "model.safetensors").unlink()
    refused(hf, capsys, "model.safetensors")
    (hf / "config.json").write_text("{")
    refused(hf, capsys, "config.json", "not JSON")
    (hf / "config.json").unlink()
    refused(hf, capsys, "config.json", "no such file")


@pytest.mark.parametrize("ranks", [0, -1, 3, 8])
def test_illegal_numbers_of_ranks_are_refused_before_any_tensor_is_read(ranks, hf, capsys, monkeypatch):
    def read(*_):
        raise AssertionError("a tensor was read")
    monkeypatch.setattr(Checkpoint, "_read", read)
    refused(hf, capsys, "1, 2, 4" if ranks > 0 else "1 or more", ranks=ranks)
    with pytest.raises(ValueError, match="cannot be cut over 3 ranks; it can over 1, 2, 4"):
        load_model(Checkpoint(hf), Runtime(tp=Shard(0, 3)))


def test_outputs_that_cannot_be_written_are_refused(hf, capsys):
    refused(hf, capsys, "into another", out=hf)
    (hf.parent / "file").write_text("")
    refused(hf, capsys, "file", out=hf.parent / "file")


def test_converted_folders_are_not_mistaken(hf, capsys):
    out = hf.parent / "converted"
    assert convert.main(["--hf-ckpt-path", str(hf), "--save-path", str(out), "--model-parallel", "2"]) == 0
    refused(out, capsys, "HuggingFace folder")
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
