"""Sampling: the distributions are transformers', and chance depends on seed and position alone."""

import math

import pytest
import torch

from palimpsest.generate.sampling import Sampling, choose_tokens, probabilities, uniform

torch.manual_seed(0)
LOGITS = torch.randn(6, 50) * 3


def peer(logits, seen_ids, sampling):
    """The same settings through transformers' own processors."""
    from transformers.generation import logits_process as lp

    processors = [lp.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.repetition_penalty != 1:
        processors.insert(0, lp.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.top_k:
        processors.append(lp.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(lp.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(lp.MinPLogitsWarper(sampling.min_p))
    return lp.LogitsProcessorList(processors)(seen_ids, logits.clone()).softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.3),
        Sampling(2.0, top_k=7),
        Sampling(1.0, top_p=0.8),
        Sampling(1.5, min_p=0.2),
        Sampling(1.0, repetition_penalty=1.7),
        Sampling(1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=0.8),
    ],
    ids=repr,
)
def test_distribution_is_that_of_transformers(sampling):
    seen_ids = torch.randint(0, 50, (6, 9))
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter(1, seen_ids, True)
    expected = peer(LOGITS, seen_ids, sampling)
    torch.testing.assert_close(probabilities(LOGITS, sampling, seen), expected, atol=1e-6, rtol=1e-5)
    assert (expected == 0).any() == (sampling.top_k is not None or sampling.top_p < 1 or sampling.min_p > 0)


def test_tokens_are_drawn_from_the_distribution():
    sampling, n = Sampling(1.0, top_k=5), 20_000
    logits = LOGITS[:1].expand(n, -1)
    tokens = choose_tokens(logits, sampling, seeds=[3] * n, positions=range(n))
    expected = probabilities(LOGITS[:1], sampling)[0]
    found = torch.bincount(tokens, minlength=50) / n
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / n)  # four standard deviations of a fair coin


def test_draws_of_neighbouring_seeds_and_positions_are_unrelated():
    table = torch.tensor([[uniform(seed, position) for position in range(300)] for seed in range(300)])
    assert table.min() > 0
    assert table.max() < 1
    assert abs(table.mean() - 0.5) < 4 * math.sqrt(1 / 12 / table.numel())
    for along in (table[1:], table[:-1]), (table[:, 1:], table[:, :-1]):
        a, b = (x.flatten() - 0.5 for x in along)
        assert abs((a * b).mean() * 12) < 4 / math.sqrt(a.numel())  # correlation of independent draws


def test_a_batch_draws_what_its_sequences_draw_alone():
    sampling, seeds, positions = Sampling(1.0), [5, 5, 6, 7, 8, 9], [0, 1, 2, 3, 40, 500]
    together = choose_tokens(LOGITS, sampling, seeds=seeds, positions=positions)
    for row in range(6):
        alone = choose_tokens(
            LOGITS[row : row + 1], sampling, seeds=seeds[row : row + 1], positions=positions[row : row + 1]
        )
        assert alone == together[row]


def test_greedy_takes_the_likeliest_and_the_penalty_applies():
    assert choose_tokens(LOGITS, Sampling(), seeds=[0] * 6, positions=[0] * 6).equal(LOGITS.argmax(-1))
    logits, seen = torch.tensor([[2.0, 1.5, -1.0]]), torch.tensor([[True, False, False]])
    assert choose_tokens(logits, Sampling(repetition_penalty=2.0), seeds=[0], positions=[0], seen=seen) == 1


def test_extreme_settings_stay_finite():
    for sampling in (
        Sampling(1e-30),
        Sampling(1e30),
        Sampling(1.0, top_p=1e-9),
        Sampling(1.0, min_p=1.0),
        Sampling(1.0, 999),
    ):
        probs = probabilities(LOGITS * 1e6, sampling)
        torch.testing.assert_close(probs.sum(-1), torch.ones(6))
    assert probabilities(LOGITS, Sampling(1.0, top_p=1e-9)).argmax(-1).equal(LOGITS.argmax(-1))


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("temperature", -0.1, "a number >= 0"),
        ("temperature", math.nan, "a number >= 0"),
        ("temperature", math.inf, "a number >= 0"),
        ("top_k", 0, "a whole number >= 1"),
        ("top_k", 2.5, "a whole number >= 1"),
        ("top_p", 0.0, "in \\(0, 1\\]"),
        ("top_p", 1.1, "in \\(0, 1\\]"),
        ("min_p", -0.1, "in \\[0, 1\\]"),
        ("repetition_penalty", 0.0, "a number > 0"),
    ],
)
def test_values_out_of_range_are_refused(setting, value, expected):
    with pytest.raises(ValueError, match=f"{setting} is {value!r}; it must be {expected}"):
        Sampling(**{setting: value})


def test_a_penalty_without_seen_tokens_is_refused():
    with pytest.raises(ValueError, match="seen is missing"):
        probabilities(LOGITS, Sampling(1.0, repetition_penalty=1.2))


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-46, 5e-324])
@pytest.mark.parametrize("rest", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_temperature_that_fp32_does_not_know_is_nearly_greedy(temperature, rest):
    logits = torch.tensor([[0.0, 3.0, 1.0, -4.0], [2.0, -1.0, 1.999, -5.0]])
    sampling = Sampling(temperature=temperature, **rest)
    assert probabilities(logits, sampling).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert choose_tokens(logits, sampling, seeds=[1, 2], positions=[3, 4]).tolist() == [1, 0]
