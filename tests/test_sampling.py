"""Claim: a token is drawn from exactly the nucleus distribution, by one uniform number, row by row.

The distribution is checked with a chi-square test on 40,000 draws with a fixed seed: a correct sampler fails
it at the 99.9 % quantile once in a thousand seeds, and the seed is one that passes.
"""
import numpy as np
import pytest
import torch

import generate
from generate import Sampling, sample

ALMOST_ONE = 1 - 2 ** -53


def draw(probs: list[float], uniforms: list[float], **settings) -> list[int]:
    logits = torch.tensor(probs).log().expand(len(uniforms), -1)
    return sample(logits, Sampling(**settings), torch.tensor(uniforms, dtype=torch.float64)).tolist()


def reachable(probs: list[float], **settings) -> set[int]:
    return set(draw(probs, [*np.linspace(0, 1, 2001)[:-1], ALMOST_ONE], **settings))


def test_temperature_0_is_the_most_likely_token_of_each_row_whatever_the_uniform():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    for uniform in (0.0, 0.5, ALMOST_ONE):
        uniforms = torch.full((50,), uniform, dtype=torch.float64)
        assert torch.equal(sample(logits, Sampling(temperature=0), uniforms), logits.argmax(-1))


def test_top_p_keeps_the_token_that_crosses_the_line():
    probs = [0.1, 0.2, 0.3, 0.4]
    assert reachable(probs, temperature=1, top_p=0.6) == {2, 3}
    assert reachable(probs, temperature=1, top_p=0.39) == {3}
    assert reachable(probs, temperature=1, top_p=0.75) == {1, 2, 3}
    assert reachable(probs, temperature=1, top_p=1.0) == {0, 1, 2, 3}
    assert reachable(probs, temperature=1, top_p=1e-9) == {3}


def test_the_ends_of_the_uniform_interval_stay_inside_the_nucleus():
    probs = torch.softmax(torch.randn(5000, generator=torch.Generator().manual_seed(1)), -1)
    ranked, order = probs.sort(descending=True)
    nucleus = set(order[:int((ranked.cumsum(0) < 0.9).sum()) + 1].tolist())
    assert set(draw(probs.tolist(), [0.0, ALMOST_ONE], temperature=1, top_p=0.9)) <= nucleus
    assert draw([0.5, 0.0, 0.5], [ALMOST_ONE], temperature=1, top_p=1.0) == [2]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.95), (1.0, 0.7), (1.5, 0.8)])
def test_draws_follow_the_renormalised_nucleus(temperature, top_p):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(2)).double() * 2
    probs = (logits / temperature).softmax(-1)
    ranked, order = probs.sort(descending=True)
    kept = order[ranked.cumsum(0) - ranked < top_p]             # the definition, in float64
    expected = torch.zeros(12, dtype=torch.float64)
    expected[kept] = probs[kept] / probs[kept].sum()
    n = 40_000
    uniforms = torch.from_numpy(np.random.default_rng(3).random(n))
    drawn = sample(logits.float().expand(n, -1), Sampling(temperature, top_p), uniforms)
    counts = torch.bincount(drawn, minlength=12).double()
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - n * expected)[kept] ** 2 / (n * expected[kept])).sum().item()
    quantiles = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88,
                 10: 29.59,
                 11: 31.26}                                     # chi-square, 99.9 %, by degrees of freedom
    assert len(kept) > 1 and chi_square < quantiles[len(kept) - 1]


def test_a_row_is_drawn_as_it_would_be_alone():
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(4)) * 3
    uniforms = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    together = sample(logits, Sampling(), uniforms)
    alone = [sample(logits[i:i + 1], Sampling(), uniforms[i:i + 1]).item() for i in range(20)]
    assert together.tolist() == alone and len(set(alone)) > 5


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.95, 0.999999, 1.0])
def test_leaving_out_what_cannot_be_in_the_nucleus_changes_no_draw(top_p, monkeypatch):
    """Sharp, flat and tied rows, whose nuclei have one to 1,500 ids."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(40, 1500, generator=generator) * torch.logspace(-2, 2, 40)[:, None]
    logits[::3] = logits[::3].round()
    uniforms = torch.rand(40, dtype=torch.float64, generator=generator)
    fewer = sample(logits, Sampling(1.0, top_p), uniforms)
    monkeypatch.setattr(generate, "candidates", lambda probs, top_p: torch.arange(1500).expand_as(probs))
    assert torch.equal(fewer, sample(logits, Sampling(1.0, top_p), uniforms))


@pytest.mark.parametrize("settings, word", [
    ({"temperature": -0.1}, "temperature is -0.1"), ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0.0}, "top-p is 0.0"), ({"top_p": 1.01}, "top-p is 1.01"),
    ({"top_p": float("nan")}, "top-p is nan")])
def test_settings_that_make_no_sense_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**settings)
