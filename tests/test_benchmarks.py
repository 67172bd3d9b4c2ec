"""Claim: benchmarks/ run where there is no GPU, measure what they say, and notice a wrong product.

Nothing is timed here: figures of small shapes on a CPU mean nothing.
"""
import dataclasses
import json

import pytest
import tiny
import torch

from benchmarks import fp8_gemm, throughput
from convert import Checkpoint, load_config
from model import Gate, Runtime, Transformer


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_fp8_benchmark_runs_on_a_cpu_and_writes_both_tables(tmp_path, capsys):
    assert fp8_gemm.main(["--output", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "fp8_gemm_CPU.json").read_text())
    assert {row["who"] for row in facts["rows"]} >= {"bf16", "ours", "loop"}
    assert facts["versions"]["torch"] == torch.__version__ and facts["copy_bytes_per_second"] > 0
    products = [row for row in facts["rows"] if row["who"] == "ours" and row["what"] == "whole blocks"]
    for row, m in zip(products, (1, 16), strict=True):
        assert row["operations"] == 2 * m * 256 * 512 and row["seconds"] > 0
        assert row["bytes"] == 256 * 512 + m * 512 + 2 * m * 256            # e4m3 in, bf16 out
    text = (tmp_path / "fp8_gemm_CPU.md").read_text()
    assert text.count("\n| ") == 1 + len(facts["rows"]) and capsys.readouterr().out == text


def test_an_fp8_benchmark_that_has_no_place_or_no_tokens_does_not_begin(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for args, words in ((["--output", str(tmp_path / "file")], "file: File exists"),
                        (["--tokens", "0"], "is 0")):
        with pytest.raises(SystemExit) as stop:
            fp8_gemm.main(args)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_wrong_product_is_not_timed(monkeypatch):
    right = fp8_gemm.forced
    monkeypatch.setattr(fp8_gemm, "forced", lambda choice, *operands: right(choice, *operands) * (
        1 if choice == "torch" else 1.01))
    with pytest.raises(AssertionError, match="256 x 512, 1 tokens: ours is off by 1.0%"):
        fp8_gemm.measure_products(fp8_gemm.SMALL, (1,), torch.device("cpu"))


def test_goals_are_judged_by_their_worst_case():
    def row(what, tokens, who, seconds, n=4096, k=1024):
        return dict(what=what, tokens=tokens, who=who, seconds=seconds, n=n, k=k, bytes=n * k)

    rows = [row("a", 16, "ours", 4096 * 1024 / 0.8), row("b", 1, "ours", 4096 * 1024 / 0.6),
            row("small", 1, "ours", 1e9, n=8), row("a", 4096, "ours", 1.0), row("a", 4096, "bf16", 1.5),
            row("experts", 1, "ours", 4096 * 1024 / 0.7), row("experts", 1, "loop", 4096 * 1024 / 0.7 * 4)]
    few, bf16, one, loop = fp8_gemm.goals(rows, copy=1.0)
    assert "0.60 at worst, 0.70 in the middle, missed" in few
    assert "1.50 at worst" in bf16 and "reached" in bf16
    assert "0.70 at worst" in one and "reached" in one and "4.00 at worst" in loop and "missed" in loop


@tiny.PROC
@pytest.mark.parametrize("config", [tiny.qwen2, tiny.deepseek])
def test_the_throughput_benchmark_measures_all_tasks_and_writes_table_numbers_and_plot(config, tmp_path,
                                                                                      monkeypatch, capsys):
    tiny.write(tmp_path / "hf_0.5b", config(max_position_embeddings=4096))
    monkeypatch.setattr(throughput, "PROMPTS", (16,))
    monkeypatch.setattr(throughput, "DECODE", ((8, 1), (8, 3), (20, 1), (40, 1)))
    monkeypatch.setattr(throughput, "LONG", 40)
    limits = {"bandwidth": 1e10, "gemm": 1e12, "gemm fp32": 1e12}
    monkeypatch.setattr(throughput, "limits", lambda device: limits)
    before = set((tmp_path / "hf_0.5b").iterdir())
    assert throughput.main(["--ckpt-path", str(tmp_path / "hf_0.5b"), "--who", "ours", "transformers",
                            "--rounds", "1", "--new-tokens", "3", "--longest", "16",
                            "--output", str(tmp_path / "out")]) == 0
    assert set((tmp_path / "hf_0.5b").iterdir()) == before
    path, = (tmp_path / "out").glob("throughput_hf_0.5b_*.json")
    facts = json.loads(path.read_text())
    assert [(r["task"], r["tokens"], r["rows"], r["who"]) for r in facts["rows"]] == [
        (*task, who) for task in (("prefill", 16, 1), ("decode", 8, 1), ("decode", 8, 3))
        for who in ("ours", "transformers")]
    for row in facts["rows"]:
        done = 16 if row["task"] == "prefill" else 3 * row["rows"]
        assert row["rate"] == pytest.approx(done / row["runs"][0]) and row["of_limit"] > 0
    assert set(facts["loads"]) == {"ours", "transformers"}
    assert all(load["seconds"] > 0 and load["bytes"] > 0 for load in facts["loads"].values())
    gates = 2 * 2 * 16 * 256 * (config is tiny.deepseek)        # of 2 layers, which stay in fp32
    assert facts["loads"]["ours"]["held"] == facts["weights"] + gates
    text = path.with_suffix(".md").read_text()
    assert text == capsys.readouterr().out and text.count("\n| ") == 2 + 6 + 2
    assert facts["new_tokens"] == 3 and facts["transformers"] and facts["cpu"] in text
    assert all(load["first_token"] > load["seconds"] for load in facts["loads"].values())
    args = ["--ckpt-path", str(tmp_path / "hf_0.5b"), "--output", str(tmp_path / "out")]
    before = path.read_bytes()                              # what is there is somebody's evidence
    assert throughput.main(args) == 2 and "is there already" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(throughput, "STATUS", tmp_path / "missing")             # as on macOS
    assert throughput.main([*args, "--name", "mac", "--who", "ours", "--rounds", "1", "--new-tokens", "1",
                            "--longest", "16"]) == 0
    facts = json.loads((tmp_path / "out/mac.json").read_text())
    assert len(facts["rows"]) == 3 and facts["loads"] == {}


@pytest.mark.parametrize("config", ["qwen_0.5b", "moe_0.5b"])
def test_the_limits_count_each_active_weight_once(config):
    cfg = load_config(throughput.ROOT / f"configs/{config}.json")
    model = Transformer(cfg, Runtime())
    active = 0
    for name, p in model.named_parameters():
        if p.ndim > 1 and "embed" not in name and "head" not in name:
            chosen = cfg.moe.n_activated_experts / cfg.moe.n_routed_experts if p.ndim == 3 else 1
            active += p.numel() * chosen
    head = cfg.vocab_size * cfg.dim
    pairs = cfg.n_layers * cfg.n_heads * (64 + 32 + 64 if cfg.mla else 128)     # (d + r) + v, or 2 d
    n = 2000
    assert throughput.multiplications(cfg, n) == 2 * (n * active + head + pairs * n * n // 2)
    # a decode step at this bandwidth takes 1 s for reading all active bytes and the cache
    step = throughput.memory.plan(cfg, Runtime(max_seq_len=n + 64)).step
    assert throughput.share(cfg, n, 1, 128, "ours", 128.0, {"bandwidth": [step]}) == pytest.approx(1)


def test_random_weights_have_the_shapes_of_the_config(tmp_path):
    for name in ("qwen_0.5b", "moe_0.5b"):
        cfg = load_config(throughput.ROOT / f"configs/{name}.json")
        cfg = dataclasses.replace(cfg, n_layers=2, vocab_size=64)
        throughput.write_random(cfg, tmp_path / name)
        assert Checkpoint(tmp_path / name).cfg == dataclasses.replace(cfg, dtype="bfloat16")


def test_rows_choose_experts_of_their_own(tmp_path, monkeypatch):
    """Equal rows would read a row's experts, where the limit counts what rows of different tokens read."""
    tiny.write(tmp_path, tiny.deepseek(n_routed_experts=32, n_group=1, topk_group=1))
    ours, chosen, original = throughput.Ours(tmp_path, "cpu"), [], Gate.forward

    def forward(gate, x):
        weights, experts = original(gate, x)
        chosen.append(len(experts.unique()))
        return weights, experts
    monkeypatch.setattr(Gate, "forward", forward)
    ours.run(8, 6, 3)
    assert len(chosen) == 2 * (6 + 3) and min(chosen[-6:]) > 4


def test_prompts_differ_and_repeat_themselves():
    first, second = throughput.prompts(100, 2)
    assert first != second and throughput.prompts(100, 2) == [first, second] and len(first) == 100


def test_what_cannot_be_measured_is_one_clear_line_before_any_work(tmp_path, monkeypatch, capsys):
    tiny.write(tmp_path / "hf", tiny.deepseek())
    tiny.write(tmp_path / "few", tiny.qwen2(vocab_size=7))
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(throughput, "measure", None)
    known = ["--ckpt-path", str(tmp_path / "hf"), "--output", str(tmp_path / "out")]
    monkeypatch.setenv("CXX", "no-such-compiler")
    for args, words in ((["--config", "nowhere.json"], "nowhere.json"),
                        ([*known, "--who", "llama.cpp"], "--who llama.cpp: cannot run"),
                        ([*known, "--who", "ours compiled"], "--who ours compiled: cannot run"),
                        ([*known[:-1], str(tmp_path / "file")], "File exists"),
                        (["--ckpt-path", str(tmp_path / "few"), *known[2:]], "vocab_size is 7")):
        assert throughput.main(args) == 2
        error = capsys.readouterr().err
        assert error.startswith("throughput.py: error: ") and words in error and error.count("\n") == 1
    for args, words in (([*known, "--device", "cuda"], "no GPU"),
                        ([*known, "--rounds", "0"], "--rounds is 0")):
        with pytest.raises(SystemExit):
            throughput.main(args)
        assert words in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_nothing_is_measured_twice_and_nobody_is_asked_for_what_he_cannot():
    takes_part = throughput.takes_part
    assert takes_part("ours compiled", 8000, 1, 128) and not takes_part("transformers", 8000, 1, 128)
    assert takes_part("ours compiled", 128, 8, 128) and not takes_part("ours compiled", 512, 1, 0)
    assert takes_part("ours compiled fp8", 128, 1, 128) and not takes_part("ours compiled fp8", 128, 8, 128)
    assert takes_part("ours converted", 512, 1, 0) and not takes_part("ours converted", 128, 1, 128)
    assert takes_part("llama.cpp", 512, 1, 0) and not takes_part("llama.cpp", 128, 8, 128)
    assert all(takes_part(who, 2000, 8, 128) for who in ("ours", "transformers", "transformers fp32"))
