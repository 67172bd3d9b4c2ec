"""Claim: generate() completes every prompt as a plain loop over HuggingFace's model would, whoever runs
beside it.

Greedy tokens in fp32 are compared one by one: the logits differ by 1e-6, and the two best tokens of these
models are never that close. Sampled tokens depend on (seed, prompt index) and on nothing else.
"""
import pytest
import tiny
import torch

from decode import Decoder
from generate import Event, Kept, Loop, Row, Sampling, ThinkBudget, generate

PROMPTS = [torch.randint(1, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist()
           for n in (5, 60, 1, 17, 33, 2, 44)]


@pytest.fixture(scope="module", params=[tiny.deepseek, tiny.qwen2], ids=["moe", "dense"])
def both(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    return path, tiny.write(path, request.param())


class Counting:
    """A model that counts its forward passes and the tokens in them."""

    def __init__(self, model):
        self.model, self.cfg, self.rt, self.shapes = model, model.cfg, model.rt, []

    def __call__(self, tokens, cache, last=None):
        self.shapes.append(tuple(tokens.shape))
        return self.model(tokens, cache, last)


def complete(model, prompts=PROMPTS, stop_ids=(), new=20, sampling=Sampling(temperature=0),
             **more) -> list[list[int]]:
    tokens = [[] for _ in prompts]
    finished = set()
    for event in generate(model, prompts, stop_ids, new, sampling, **more):
        assert event.prompt not in finished
        tokens[event.prompt] += event.tokens
        if event.finish_reason:
            finished.add(event.prompt)
    assert finished == set(range(len(prompts)))
    return tokens


def plain_loop(hf, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """Greedy decoding by running the whole sequence again for every token."""
    ids, logprobs = list(prompt), []
    for _ in range(new):
        with torch.no_grad():
            logits = hf(torch.tensor([ids])).logits[0, -1]
        ids.append(logits.argmax().item())
        logprobs.append(logits.log_softmax(-1)[ids[-1]].item())
    return ids[len(prompt):], logprobs


def test_greedy_tokens_and_their_log_probabilities_are_huggingfaces(both):
    path, hf = both
    expected = [plain_loop(hf, prompt, 20) for prompt in PROMPTS]
    model = tiny.load(path, rows=3)
    assert complete(model) == [tokens for tokens, _ in expected]
    logprobs = [[] for _ in PROMPTS]
    for event in generate(model, PROMPTS, (), 20, Sampling(temperature=0)):
        logprobs[event.prompt] += event.logprobs
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor([lp for _, lp in expected]), rtol=0,
                               atol=3e-5)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.9, seed=7)],
                         ids=["greedy", "sampled"])
def test_tokens_do_not_depend_on_batch_cache_or_chunks(both, sampling):
    path, _ = both
    expected = complete(tiny.load(path, rows=1), sampling=sampling)
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    for settings in ({"rows": 2}, {"rows": 7}, {"rows": 20}, {"rows": 3, "prefill_chunk": 8},
                     {"rows": 3, "max_seq_len": 90}):
        assert complete(tiny.load(path, **settings), sampling=sampling) == expected


def test_a_seed_repeats_and_another_seed_does_not(both):
    model = tiny.load(both[0], rows=3)
    first, again, other = (complete(model, sampling=Sampling(1.0, 1.0, seed)) for seed in (1, 1, 2))
    assert first == again and all(a != b for a, b in zip(first, other))
    same = complete(model, [PROMPTS[1]] * 3, sampling=Sampling(1.0, 1.0, 1))
    assert len({tuple(tokens) for tokens in same}) == 3         # each prompt index has a stream of its own


def test_finished_rows_are_refilled_and_idle_rows_cost_nothing(both):
    path, _ = both
    model = Counting(tiny.load(path, rows=3))
    alone = complete(tiny.load(path, rows=1), new=40)
    stops = {tokens[n] for tokens, n in zip(alone, (3, 30, 5, 9, 25, 2, 12))}   # unequal lengths
    expected = [tokens[:next((i for i, t in enumerate(tokens) if t in stops), 40)] for tokens in alone]
    assert complete(model, stop_ids=stops, new=40) == expected
    decode = [rows for rows, n_new in model.shapes if n_new == 1 and rows > 1] + [
        1 for rows, n_new in model.shapes if (rows, n_new) == (1, 1)]
    assert max(decode) == 3
    steps = sum(len(tokens) for tokens in expected)
    # every row of every pass produces a token of some completion or its end: nothing idles, nothing is padded
    assert sum(decode) - 1 <= steps <= sum(decode) + len(PROMPTS)


def samples(model, wanted, **more) -> dict[tuple[int, int], list[int]]:
    tokens = {pair: [] for pair in wanted}
    for event in generate(model, PROMPTS, (), 12, Sampling(1.0, 1.0, 5), wanted=wanted, **more):
        tokens[event.prompt, event.sample] += event.tokens
    return tokens


def test_a_samples_tokens_depend_on_seed_prompt_and_sample_alone(both):
    path, _ = both
    wanted = [(prompt, sample) for prompt in (0, 1, 3) for sample in range(4)]
    alone = {pair: samples(tiny.load(path, rows=1), [pair])[pair] for pair in wanted}
    assert len(set(map(tuple, alone.values()))) == len(wanted)
    for rows in (1, 2, 5, 20):
        assert samples(tiny.load(path, rows=rows), wanted) == alone
    assert samples(tiny.load(path, rows=3), wanted[::-1]) == alone
    mixed = sorted(wanted, key=lambda pair: pair[1])            # neighbours never share a prompt
    assert samples(tiny.load(path, rows=3), mixed) == alone


def test_a_prompt_is_prefilled_once_for_all_its_samples(both):
    for rows in (1, 2, 5, 20):
        model = Counting(tiny.load(both[0], rows=rows))
        samples(model, [(prompt, sample) for prompt in (1, 4) for sample in range(6)])
        assert [n_new for _, n_new in model.shapes if n_new > 1] == [60, 33]


def test_the_end_token_ends_a_completion_and_is_not_part_of_it(both):
    model = tiny.load(both[0], rows=2)
    free = complete(model, new=20)
    stop = free[1][4]
    events = [event for event in generate(model, [PROMPTS[1]], {stop}, 20, Sampling(temperature=0))]
    first = free[1].index(stop)
    assert [event.tokens for event in events] == [(token,) for token in free[1][:first]] + [()]
    assert [event.finish_reason for event in events] == [None] * first + ["stop"]
    assert events[-1] == Event(0, 0, (), (), "stop")


def test_length_ends_a_completion_at_max_new_tokens_and_at_the_end_of_the_cache(both):
    path, _ = both
    *_, last = generate(tiny.load(path), [PROMPTS[0]], (), 7, Sampling(temperature=0))
    assert last.finish_reason == "length"
    long = complete(tiny.load(path), [PROMPTS[0]], new=20)[0]
    short = tiny.load(path, max_seq_len=5 + 9)
    assert complete(short, [PROMPTS[0]], new=20)[0] == long[:9]
    assert complete(short, [PROMPTS[0]], new=9)[0] == long[:9]


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn(both):
    tokens = complete(tiny.load(both[0], rows=7), new=40, sampling=Sampling(2.0, 1.0, 3), n_tokens=50)
    assert max(map(max, tokens)) < 50


@pytest.mark.parametrize("prompts", [[[1], []], [[1], [1] * 256]], ids=["empty", "too long"])
def test_a_prompt_that_does_not_fit_is_refused_before_any_work(both, prompts):
    model = Counting(tiny.load(both[0]))
    with pytest.raises(ValueError, match="prompt 1 has (0|256) tokens; 1 to 255 fit"):
        next(generate(model, prompts, (), 5))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        next(generate(model, [[1]], (), 0))
    assert not model.shapes


# Reasoning that is closed, loops that are stopped, turns that share their beginning


class Never(Counting):
    """A model that draws ids from 250 on only when it is made to."""

    def __call__(self, tokens, cache, last=None):
        logits = super().__call__(tokens, cache, last)
        return logits.where(torch.arange(logits.shape[-1]) < 250, -torch.inf)


def test_a_think_budget_closes_the_reasoning_and_nothing_else(both):
    prompts = [[*prompt, 254, 10] for prompt in PROMPTS]            # each has opened its reasoning
    sampling = Sampling(1.0, 1.0, 2)
    free = complete(Never(tiny.load(both[0], rows=3)), prompts, sampling=sampling)
    for budget in (0, 1, 7, 17, 20, 99):
        think = ThinkBudget(budget, opening=254, closing=250, ending=(11, 250, 12))
        for rows in (1, 3):
            held = complete(Never(tiny.load(both[0], rows=rows)), prompts, sampling=sampling, think=think)
            for tokens, expected in zip(held, free, strict=True):
                assert tokens[:budget] == expected[:budget]
                assert tuple(tokens[budget:budget + 3]) == (11, 250, 12)[:max(20 - budget, 0)]
                assert len(tokens) == 20 and tokens.count(250) == (budget < 19)
        think = ThinkBudget(budget, opening=255, closing=250, ending=(11, 250, 12))
        assert complete(Never(tiny.load(both[0])), prompts, sampling=sampling, think=think) == free


def test_reasoning_that_ended_or_begins_by_itself_is_counted_right(both):
    model = tiny.load(both[0])
    for seed in range(20):
        sampling = Sampling(2.0, 1.0, seed)
        free = complete(model, PROMPTS[:1], sampling=sampling)[0]
        if len(set(free[:9])) == 9:
            break
    think = ThinkBudget(3, opening=free[2], closing=free[4], ending=(1, 2, 3))
    assert complete(model, PROMPTS[:1], sampling=sampling, think=think)[0][:9] == free[:9]  # one token long
    think = ThinkBudget(3, opening=free[2], closing=250, ending=(1, 250, 3))
    assert complete(model, PROMPTS[:1], sampling=sampling, think=think)[0][:9] == [*free[:6], 1, 250, 3]


@pytest.mark.parametrize("end, opened", [((7, 9), True), ((9, 7), True), ((7, 8), False), ((7, 1, 1), False)])
def test_a_prompt_has_opened_the_reasoning_or_closed_it_again(end, opened):
    row = Row(0, 0, 3, 100, None, ThinkBudget(5, opening=7, closing=8, ending=(8,)))
    row.begin([1, 2, *end])
    assert (row.thought is not None) == opened


def test_the_log_probability_of_a_forced_token_is_the_models_own(both):
    path, hf = both
    think = ThinkBudget(2, opening=PROMPTS[0][-1], closing=200, ending=(100, 200))
    events = list(generate(tiny.load(path), PROMPTS[:1], (), 4, Sampling(temperature=0), think=think))
    tokens = [token for event in events for token in event.tokens]
    assert tokens[2:] == [100, 200]
    with torch.no_grad():
        expected = hf(torch.tensor([PROMPTS[0] + tokens])).logits[0, -5:-1].log_softmax(-1)
    logprobs = torch.tensor([event.logprobs[0] for event in events])
    torch.testing.assert_close(logprobs, expected.gather(1, torch.tensor(tokens)[:, None])[:, 0], rtol=0,
                               atol=3e-5)


@pytest.mark.parametrize("period, first", [(1, 256), (2, 256), (64, 256), (65, 260), (300, 1200),
                                           (1024, 4096), (1025, None)])
def test_a_loop_is_noticed_after_four_rounds_and_256_tokens(period, first):
    numbers = torch.randint(10 ** 9, (2000,), generator=torch.Generator().manual_seed(period)).tolist()
    start, round_ = numbers[:500], numbers[500:500 + period]
    loop = Loop()
    assert not any(map(loop.feed, start))
    found = next((n for n in range(6000) if loop.feed(round_[n % period])), None)
    assert found == (first and first - 1)
    varied, often = Loop(), (first or 5000) - 1         # one other token in so many: no loop
    assert not any(varied.feed(round_[n % period] if n % often else -n) for n in range(6000))


def test_a_completion_in_a_loop_ends_if_asked_to(both):
    class Stuck(Counting):
        def __call__(self, tokens, cache, last=None):
            logits = super().__call__(tokens, cache, last)
            return torch.where(torch.arange(logits.shape[-1]) == 7, 1e4, logits)

    model = Stuck(tiny.load(both[0], max_seq_len=400))
    *_, last = events = list(generate(model, [[1, 2, 3]], (), 300, stop_loops=True))
    assert last.finish_reason == "repetition" and sum(len(event.tokens) for event in events) == 256
    *_, last = events = list(generate(model, [[1, 2, 3]], (), 300))
    assert last.finish_reason == "length" and sum(len(event.tokens) for event in events) == 300


def test_the_next_turn_runs_only_what_follows_the_common_prefix(both):
    path, _ = both
    turns = [PROMPTS[1], PROMPTS[1] + PROMPTS[3], PROMPTS[1][:30] + PROMPTS[4], PROMPTS[1][:30] + PROMPTS[4],
             PROMPTS[1][:20], PROMPTS[0]]
    model = Counting(tiny.load(path, rows=1, prefill_chunk=16))
    kept, held = Kept(Decoder(model)), []
    for turn in turns:
        model.shapes.clear()
        shared = kept.shared(turn)
        tokens = complete(model, [turn], new=8, kept=kept)[0]
        assert tokens == complete(tiny.load(path), [turn], new=8)[0]        # as without a past
        assert sum(n_new for _, n_new in model.shapes) == len(turn) - shared + 7
        assert kept.tokens == turn + tokens[:-1]
        common = next((i for i, (a, b) in enumerate(zip(turn, held)) if a != b), min(len(turn), len(held)))
        assert shared == min(common, len(turn) - 1)
        held = kept.tokens[:]
    answer = complete(tiny.load(path), [PROMPTS[1]], new=8)[0]
    list(generate(model, [PROMPTS[1]], (), 8, Sampling(temperature=0), kept=kept))
    model.shapes.clear()
    list(generate(model, [PROMPTS[1] + answer + [3, 4]], (), 1, kept=kept))
    assert model.shapes == [(1, 3)]         # the last token of an answer was drawn, but never run
    list(generate(model, [PROMPTS[1]], (), 8, Sampling(), wanted=[(0, 0), (0, 1)], kept=kept))
    turn = [*kept.tokens, 3]                # follows the second sample, which began in the first one's place
    assert complete(model, [turn], new=8, kept=kept) == complete(tiny.load(path), [turn], new=8)
    with pytest.raises(ValueError, match="`kept` must be of this model"):
        complete(tiny.load(path, rows=1, prefill_chunk=16), [turn], kept=kept)
    model = tiny.load(path, rows=2)
    with pytest.raises(ValueError, match="`kept` must be of .* one row"):       # rows have pasts of their own
        complete(model, [turn], kept=Kept(Decoder(model)))


def test_a_cancelled_call_stops_before_the_next_pass_and_leaves_a_cache_to_go_on_with(both):
    path, _ = both
    expected = complete(tiny.load(path), [PROMPTS[1]], new=8)[0]
    for passes in range(9):
        model = Counting(tiny.load(path, rows=1, prefill_chunk=16))         # 60 tokens: 4 passes
        kept = Kept(Decoder(model))
        events = list(generate(model, [PROMPTS[1]], (), 8, Sampling(temperature=0), kept=kept,
                               cancelled=lambda: len(model.shapes) >= passes))
        assert len(model.shapes) == passes
        assert [event.tokens[0] for event in events] == expected[:max(passes - 4, 0)]
        again = generate(model, [PROMPTS[1]], (), 8, Sampling(temperature=0), kept=kept)
        assert [event.tokens[0] for event in again] == expected
        assert sum(n for _, n in model.shapes) <= 60 + 7 + 1 + max(passes - 4, 0)       # nothing ran twice
