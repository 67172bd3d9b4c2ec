"""Claim: benchmarks/ run where there is no GPU, measure what they say, and notice a wrong product.

Nothing is timed here: figures of small shapes on a CPU mean nothing.
"""
import json

import pytest
import torch

from benchmarks import fp8_gemm


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
