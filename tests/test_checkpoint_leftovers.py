"""Claim: tensors may be left over only if they are known to play no part, and a line on stderr says so.

That is the multi-token prediction module, known by its layer's index (V3 section 2.2: it serves training),
and a second copy of a tied embedding. Old Llama files hold RoPE's frequencies, which the config implies; that
needs no line. Everything else is refused: test_checkpoint_errors.py. Names are compared, no numbers.
"""
import re

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import convert
from convert import Checkpoint, load_model
from model import Runtime


def edit(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def add_layer(hf, layer: int, mtp: bool) -> None:
    """A copy of the last layer as layer `layer`, with what the multi-token prediction module has on top."""
    prefix, dim = f"model.layers.{layer}.", 256

    def change(tensors):
        last = max(tensors, key=lambda key: int((re.findall(r"layers\.(\d+)", key) or [-1])[0])).split(".")[2]
        tensors |= {key.replace(f"model.layers.{last}.", prefix): tensor.clone()
                    for key, tensor in tensors.items() if key.startswith(f"model.layers.{last}.")}
        if mtp:
            shapes = {"eh_proj": (dim, 2 * dim), "enorm": (dim,), "hnorm": (dim,), "embed_tokens": (256, dim),
                      "shared_head.norm": (dim,), "shared_head.head": (256, dim)}
            tensors |= {f"{prefix}{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    edit(hf, change)


@pytest.mark.parametrize("n_layers", [2, 11])
@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
def test_the_mtp_module_is_known_by_its_index_and_left_out_with_a_line_that_says_so(
        n_layers, fp8, tmp_path, capsys):
    source, out = tmp_path / "hf", tmp_path / "out"
    tiny.write(source, tiny.deepseek(num_hidden_layers=n_layers, n_routed_experts=8))
    if fp8:
        tiny.quantise(source)
    add_layer(source, n_layers, mtp=True)           # 11 and 1 share their first digit, as R1's 61 and 6 do
    arguments = ["--hf-ckpt-path", str(source), "--save-path", str(out), "--verify"]
    assert convert.main(arguments) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 1 and f"left out layer {n_layers} (" in lines[0]
    layers = {key.split(".")[1] for key in load_file(out / "model0-mp1.safetensors") if "layers" in key}
    assert layers == {str(layer) for layer in range(n_layers)}


def test_rotary_buffers_of_old_llama_files_are_left_out_without_a_word(tmp_path):
    tiny.write(tmp_path, tiny.llama())
    edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    checkpoint = Checkpoint(tmp_path)
    assert load_model(checkpoint, Runtime()).cfg.n_layers == 3
    assert checkpoint.notes == []


def test_a_second_copy_of_a_tied_embedding_is_left_out_with_a_line_that_says_so(tmp_path):
    tiny.write(tmp_path, tiny.llama(tie_word_embeddings=True))
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    checkpoint = Checkpoint(tmp_path)
    load_model(checkpoint, Runtime())
    assert checkpoint.notes == ["left out lm_head.weight: the config ties it to the embedding"]


@pytest.mark.parametrize("change", [lambda head: head.narrow(0, 0, 100).clone(),
                                    lambda head: torch.cat([head[:-1], head[-1:] + 1])], ids=["shape", "row"])
def test_a_head_that_differs_from_the_embedding_to_which_it_is_tied_is_refused(change, tmp_path, capsys):
    """HuggingFace leaves the two untied then, so to drop either would be another model."""
    tiny.write(tmp_path / "hf", tiny.llama(tie_word_embeddings=True, vocab_size=5000))
    edit(tmp_path / "hf", lambda t: t.update({"lm_head.weight": change(t["model.embed_tokens.weight"])}))
    assert convert.main(["--hf-ckpt-path", str(tmp_path / "hf"), "--save-path", str(tmp_path / "out")]) == 2
    assert "lm_head.weight differs from model.embed_tokens.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_experts_that_there_are_none_of_need_no_tensors(tmp_path):
    """HuggingFace writes them with 0 rows, and does not miss them either."""
    tiny.write(tmp_path, tiny.deepseek(n_shared_experts=0))
    tokens = torch.arange(20)[None]
    expected = tiny.logits(tiny.load(tmp_path), tokens)
    size = len(load_file(tmp_path / "model.safetensors"))
    edit(tmp_path, lambda t: [t.pop(key) for key in list(t) if "shared_experts" in key])
    assert len(load_file(tmp_path / "model.safetensors")) < size
    assert torch.equal(tiny.logits(tiny.load(tmp_path), tokens), expected)


def test_one_file_is_read_before_an_index_as_in_huggingface(tmp_path):
    tiny.write(tmp_path, tiny.llama(), seed=1)
    one = (tmp_path / "model.safetensors").read_bytes()
    tiny.write(tmp_path, tiny.llama(), seed=2)
    tiny.split_file(tmp_path, 2)
    (tmp_path / "model.safetensors").write_bytes(one)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(tiny.load(tmp_path).embed.weight, theirs.model.embed_tokens.weight)
