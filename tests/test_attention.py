"""Claim: however the tokens get there, the model computes one function.

Absorbed or expanded attention (V2 section 2.1.2), in one piece, in chunks or token by token, alone or beside
rows at other positions, in a short cache or a long one: the logits are the same. Tolerance as in
test_model_vs_hf.py: 1e-5 of the logit scale in fp32, since only the order of summation differs.
"""
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import kernel
import products
from attention import attend, attend_fused, attend_latents, attend_runs
from convert import load_config
from model import MLA, Cache, Runtime

ROOT = Path(__file__).parent.parent
TOKENS = torch.randint(0, 256, (3, 120), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=["absorbed mla", "expanded mla", "gqa"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny.write(path, tiny.llama() if request.param == "gqa" else tiny.deepseek())
    made = tiny.load(path, rows=4)
    if made.cfg.mla:
        tiny.evaluate(made, request.param.removesuffix(" mla"))
    return made


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1e-5 * b.std().clamp(min=1)


def test_absorbed_equals_expanded(tmp_path):
    tiny.write(tmp_path, tiny.deepseek(kv_lora_rank=512))
    model = tiny.load(tmp_path)
    outputs = []
    for order in ("expanded", "absorbed"):
        tiny.evaluate(model, order)
        outputs.append(tiny.logits(model, TOKENS[:2], [100, 1, 19]))
    assert not torch.equal(*outputs)        # two orders of evaluation, not one under two names
    assert_same(*outputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2 ** -8)])
@pytest.mark.parametrize("heads, groups, d, v", [(6, 2, 64, 64), (3, 3, 48, 32), (2, 2, 32, 48)])
@pytest.mark.parametrize("s, t", [(1, 400), (2, 70), (300, 300), (600, 750)])
def test_attention_is_its_formula(s, t, heads, groups, d, v, dtype, tolerance, monkeypatch):
    """In float64. Rows stand at t - s and, if there is room, 20 tokens before that. In bf16 weights and
    result are rounded (2^-9 each), scores are not: they reach 20 here, where rounding would put weights 6 %
    off."""
    generator = torch.Generator().manual_seed(0)
    q, k, values = (torch.randn(2, n, size, generator=generator).to(dtype).unflatten(2, (heads_of, -1))
                    for n, size, heads_of in ((s, heads * d, heads), (t, groups * d, groups),
                                              (t, groups * v, groups)))
    starts = torch.tensor([t - s, max(0, t - s - 20)])
    hidden = torch.arange(t) > (starts[:, None] + torch.arange(s))[..., None]               # [b, s, t]
    bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None]
    positions, scale = starts[:, None] + torch.arange(s), 4 * d ** -0.5
    k64, v64 = (x.double().repeat_interleave(heads // groups, 2) for x in (k, values))
    scores = scale * torch.einsum("bshd,bthd->bhst", q.double(), k64) + bias
    exact = torch.einsum("bhst,bthv->bshv", scores.softmax(-1), v64)
    ways = []
    for multiplies_bf16 in (True, False):           # CPUs of both kinds
        monkeypatch.setattr(products, "MULTIPLIES_BF16", multiplies_bf16)
        ways.append(attend(q, k, values, bias.to(dtype), positions, scale))
    if s > 1:
        ways.append(attend_fused(q.unflatten(2, (groups, -1)), k, values, bias.to(dtype), scale))
    for result in ways:
        assert result.shape == exact.shape and result.dtype == dtype
        assert (result - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("s", [1, 30])
def test_attention_among_latents_is_its_formula(s, monkeypatch):
    """In float64: 5 heads with the same keys of 96 + 32 numbers, of which 96 are the values. fp32 sums."""
    generator, scale = torch.Generator().manual_seed(0), 0.2
    q, keys = (torch.randn(2, *shape, 128, generator=generator) for shape in ((s, 5), (200,)))
    positions = torch.tensor([[150], [170]]) + torch.arange(s)
    bias = torch.zeros(2, s, 200).masked_fill(torch.arange(200) > positions[..., None], -torch.inf)[:, None]
    scores = scale * torch.einsum("bshd,btd->bhst", q.double(), keys.double()) + bias
    exact = torch.einsum("bhst,btc->bshc", scores.softmax(-1), keys[..., :96].double())
    for kind in ("cpu", "sm_80"):
        monkeypatch.setattr(kernel, "device_kind", lambda device: kind)
        result = attend_latents(q, keys, 96, bias, positions, scale)
        assert result.shape == exact.shape and (result - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("threads", [1, 2, 6, 100])
@pytest.mark.parametrize("rows, heads, groups, d, v", [(1, 5, 1, 128, 96), (2, 6, 2, 64, 64)])
def test_attention_in_runs_is_its_formula(rows, heads, groups, d, v, threads, monkeypatch):
    """In float64, as latents and as heads in a cache; at first a query sees a key, and most runs see none."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    q, k, values = (torch.randn(rows, n, size, generator=generator).unflatten(2, (heads_of, -1))
                    for n, size, heads_of in ((1, heads * d, heads), (320, groups * d, groups),
                                              (320, groups * v, groups)))
    k, values = k[:, :256], k[:, :256, :, :v] if v < d else values[:, :256]
    k64, v64 = (x.double().repeat_interleave(heads // groups, 2) for x in (k, values))
    for position in (0, 40, 255):
        positions = torch.tensor([position, 100])[:rows, None, None, None]
        bias = torch.zeros(rows, 1, 1, 256).masked_fill(torch.arange(256) > positions, -torch.inf)
        scores = 0.2 * torch.einsum("bshd,bthd->bhst", q.double(), k64) + bias
        exact = torch.einsum("bhst,bthv->bshv", scores.softmax(-1), v64)
        result = attend_runs(q, k, values, bias, 0.2)
        assert result.shape == exact.shape and (result - exact).norm() <= 1e-6 * exact.norm()


def test_chunks_and_single_tokens_equal_one_pass(model):
    whole = tiny.logits(model, TOKENS)
    assert_same(tiny.logits(model, TOKENS, [1] * 120), whole)
    assert_same(tiny.logits(model, TOKENS, [7, 50, 1, 62]), whole)


def test_a_narrower_view_hands_fewer_slots_to_the_model(model):
    view = Cache.allocate(model.cfg, model.rt).view(slice(1, 3), 17)
    assert all(buffer.shape[:2] == (2, 17) for layer in view.layers for buffer in layer)


def test_only_the_last_logits_are_computed_on_request(model):
    cache = Cache.allocate(model.cfg, model.rt).view(slice(0, 3), 120)
    assert_same(model(TOKENS, cache, last=2), tiny.logits(model, TOKENS)[:, -2:])


def test_rows_at_different_positions_step_together_as_each_would_alone(model):
    cache = Cache.allocate(model.cfg, model.rt)
    starts = [90, 3, 41]
    for row, start in enumerate(starts):
        model(TOKENS[row:row + 1, :start], cache.view(slice(row, row + 1), start))
    assert cache.lengths.tolist() == [90, 3, 41, 0]
    new = torch.stack([TOKENS[row, start:start + 5] for row, start in enumerate(starts)])
    together = torch.cat([model(new[:, i:i + 1], cache.view(slice(0, 3), 91 + i)) for i in range(5)], dim=1)
    for row, start in enumerate(starts):
        alone = tiny.logits(model, TOKENS[row:row + 1, :start + 5])[0, start:]
        assert_same(together[row], alone)


def test_a_copied_row_goes_on_like_its_source_and_leaves_it_alone(model):
    cache = Cache.allocate(model.cfg, model.rt)
    model(TOKENS[:1, :60], cache.view(slice(2, 3), 60))
    cache.copy_row(2, 0, 60)
    cache.copy_row(2, 1, 33)                    # cloned up to an earlier token
    new = torch.stack([TOKENS[0, 60:64], TOKENS[0, 33:37], TOKENS[1, :4]])
    together = model(new, cache.view(slice(0, 3), 64))
    assert_same(together[0], tiny.logits(model, TOKENS[:1, :64])[0, 60:])
    assert_same(together[1], tiny.logits(model, TOKENS[:1, :37])[0, 33:])
    other = torch.cat([TOKENS[:1, :60], TOKENS[1:2, :4]], dim=1)
    assert_same(together[2], tiny.logits(model, other)[0, 60:])


def test_what_lies_behind_the_end_of_a_row_changes_nothing(model):
    outputs = []
    for garbage, slots in ((0.0, 120), (0.0, 256), (1e4, 120), (1e4, 256)):
        cache = Cache.allocate(model.cfg, model.rt)
        for layer in cache.layers:
            for buffer in layer:
                buffer.fill_(garbage)
        outputs.append(model(TOKENS, cache.view(slice(0, 3), slots)))
    for output in outputs[1:]:
        assert_same(output, outputs[0])


def test_two_tokens_at_once_can_be_taken_back(model):
    # The shape of a speculative step: run a drafted token along, reject it, go on with another.
    cache = Cache.allocate(model.cfg, model.rt).view(slice(0, 3), 100)
    model(TOKENS[:, :50], cache)
    drafted = torch.cat([TOKENS[:, 50:51], TOKENS[:, 90:91]], dim=1)
    assert_same(model(drafted, cache)[:, :1], tiny.logits(model, TOKENS)[:, 50:51])
    cache.lengths -= 1
    assert_same(model(TOKENS[:, 51:60], cache), tiny.logits(model, TOKENS)[:, 51:60])


@pytest.mark.parametrize("name, n_bytes", [
    ("config_671B.json", 70_272), ("configs/distill_qwen_1.5b.json", 28_672),
    ("configs/distill_qwen_7b.json", 57_344),
    ("configs/distill_qwen_14b.json", 196_608), ("configs/distill_qwen_32b.json", 262_144),
    ("configs/distill_llama_8b.json", 131_072), ("configs/distill_llama_70b.json", 327_680)])
def test_cache_bytes_per_token_are_those_of_the_paper(name, n_bytes):
    cfg = load_config(ROOT / name)
    assert Cache.allocate(cfg, Runtime(max_seq_len=2)).bytes_per_token() == n_bytes


def test_tokens_and_cache_have_as_many_rows(tmp_path):
    tiny.write(tmp_path, tiny.qwen2())                          # which would broadcast them
    model = tiny.load(tmp_path)
    with pytest.raises(ValueError, match=r"tokens have 1 rows, and the cache 2: pass cache.view\(slice\(0, 1"):
        model(TOKENS[:1], Cache.allocate(model.cfg, model.rt))


@pytest.mark.parametrize("settings", [dict(device="cpu"), dict(dtype=torch.float64), dict(fp8="auto")])
def test_a_runtime_of_unknown_kind_is_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*; accepted: "):
        Runtime(**settings)


@tiny.PROC
def test_the_cache_of_a_long_run_takes_no_memory_before_it_is_used():
    cfg = load_config(ROOT / "configs/distill_llama_70b.json")
    before = resident()
    cache = Cache.allocate(cfg, Runtime(max_seq_len=32_768))                    # 10.7 GB
    assert cache.bytes_per_token() * 32_768 > 10e9
    assert resident() - before < 100e6


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("s", [1, 2, 40, 128, 129, 170, 171, 2048])
@pytest.mark.parametrize("t", [1, 2, 40, 128, 170, 512, 2048, 40_000, 10 ** 6])
def test_r1_evaluates_latent_attention_in_the_cheaper_order(s, t):
    """By the products of its two orders, each matrix with its sizes; a single query is always absorbed."""
    rank, nope, rope, value = 512, 128, 64, 128
    keys_and_values = t * rank * (nope + value) + s * t * (nope + rope) + s * t * value
    among_latents = s * nope * rank + s * t * (rank + rope) + s * t * rank + s * rank * value
    absorbs = MLA(replace(load_config(ROOT / "config_671B.json"), n_layers=1), Runtime()).absorbs
    assert absorbs(s, t) == (s == 1 or among_latents <= keys_and_values)
    assert absorbs(170, 10 ** 6) and not absorbs(171, 10 ** 6)
