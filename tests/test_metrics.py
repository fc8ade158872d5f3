"""Metrics read where they say, compute what they are named for, and refuse what does not fit."""

from __future__ import annotations

import math

import pytest
import torch

from patching_demo.metrics import LogitDifference, LogProb, Probability, reads

BATCH, POS, VOCAB = 3, 5, 7


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(BATCH, POS, VOCAB, generator=torch.Generator().manual_seed(0))


ANSWERS = torch.tensor([[1, 2], [3, 0], [6, 5]])


def test_logit_difference_is_right_minus_wrong_at_each_examples_own_position(logits):
    places = [4, 2, 3]
    metric = LogitDifference(ANSWERS, places)
    by_hand = [
        (logits[i, p, right] - logits[i, p, wrong]).item()
        for i, (p, (right, wrong)) in enumerate(zip(places, ANSWERS.tolist(), strict=True))
    ]
    assert metric.per_example(logits).tolist() == pytest.approx(by_hand)
    assert metric(logits).item() == pytest.approx(sum(by_hand) / BATCH)
    assert metric(logits).ndim == 0


def test_log_probability_and_probability_average_over_positions(logits):
    answers = torch.tensor([[0, 1], [2, 3], [4, 5]])
    places = torch.tensor([[0, 4], [1, 2], [3, 3]])
    log_probs = logits.log_softmax(-1)
    each = torch.stack([log_probs[i, places[i], answers[i]] for i in range(BATCH)])
    assert torch.allclose(LogProb(answers, places).per_example(logits), each.mean(1))
    assert torch.allclose(Probability(answers, places).per_example(logits), each.exp().mean(1))


@pytest.mark.parametrize("kind", ["difference", "log-prob", "prob", "own", "normalised"])
def test_reading_then_computing_is_the_metric_and_takes_stacks_of_runs(logits, kind):
    metric = {
        "difference": lambda: LogitDifference(ANSWERS, 4),
        "log-prob": lambda: LogProb(ANSWERS[:, 0], [4, 3, 2]),
        "prob": lambda: Probability(ANSWERS[:, 0], [4, 3, 2]),
        "own": lambda: reads([[4], [3], [2]])(lambda x: x.square().sum((-1, -2))),
        "normalised": lambda: LogitDifference(ANSWERS, 4).normalised(2.0, -1.0),
    }[kind]()
    read = metric.read(logits)
    n_tokens = VOCAB if metric.tokens is None else metric.tokens.shape[1]
    assert read.shape == (BATCH, metric.positions.shape[1], n_tokens)
    assert torch.equal(metric.from_read(read), metric.per_example(logits))
    stack = torch.stack([read, 2 * read, -read]).reshape(3, 1, *read.shape)
    scored = metric.from_read(stack)
    assert scored.shape == (3, 1, BATCH)
    for i in range(3):
        assert torch.allclose(scored[i, 0], metric.from_read(stack[i, 0]))


def test_only_declared_logits_matter(logits):
    metric = LogitDifference(ANSWERS, [4, 2, 3])
    before = metric(logits)
    scrambled = torch.full_like(logits, float("nan"))
    for i, (place, tokens) in enumerate(zip([4, 2, 3], ANSWERS, strict=True)):
        scrambled[i, place, tokens] = logits[i, place, tokens]
    assert torch.equal(metric(scrambled), before)


def test_normalised_is_zero_and_one_at_the_baselines_and_linear_between():
    metric = LogitDifference([[0, 1]], 0)
    scaled = metric.normalised(clean=3.0, corrupted=-1.0)
    for difference, expected in ((3.0, 1.0), (-1.0, 0.0), (1.0, 0.5), (7.0, 2.0)):
        assert scaled(torch.tensor([[[difference, 0.0]]])).item() == pytest.approx(expected)
    assert scaled.units == "share of clean - corrupted"
    assert "normalised" in scaled.name


def test_normalising_refuses_a_scale_that_does_not_exist():
    metric = LogitDifference([[0, 1]], 0)
    with pytest.raises(ValueError, match="both 2.0"):
        metric.normalised(2.0, 2.0)
    for clean, corrupted in ((3.0000001, 3.0), (1e-7, -1e-7), (4000.0, 4000.01)):
        with pytest.raises(ValueError, match=f"{clean} and {corrupted}, as good as equal"):
            metric.normalised(clean, corrupted)
    # Small probabilities are no rounding.
    assert Probability([1], 0).normalised(2e-9, 1e-9).clean == 2e-9
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="clean baseline of 'logit difference'"):
            metric.normalised(bad, 0.0)
        with pytest.raises(ValueError, match="corrupted baseline"):
            metric.normalised(0.0, bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_single_precision(logits, dtype):
    half = logits.to(dtype)
    for metric in (LogitDifference(ANSWERS, 4), LogProb(ANSWERS[:, 0], 4)):
        value = metric(half)
        assert value.dtype == torch.float32
        assert torch.equal(value, metric(half.float()))


def test_double_precision_stays_double(logits):
    assert LogProb(ANSWERS[:, 0], 4)(logits.double()).dtype == torch.float64


def test_gradients_flow(logits):
    logits = logits.requires_grad_()
    LogProb(ANSWERS[:, 0], 4)(logits).backward()
    assert logits.grad[:, 4].abs().sum() > 0
    assert logits.grad[:, :4].abs().sum() == 0


def test_index_tensors_are_the_metrics_own():
    answers = ANSWERS.clone()
    metric = LogitDifference(answers, 4)
    answers.zero_()
    assert torch.equal(metric.tokens, ANSWERS)


@pytest.mark.parametrize(
    ("logits_shape", "message"),
    [
        ((BATCH, VOCAB), r"\[batch, pos, d_vocab\]"),
        ((BATCH + 1, POS, VOCAB), "batch of 3"),
        ((BATCH, 4, VOCAB), "position 4"),
        ((BATCH, POS, 6), "token 6"),
    ],
)
@pytest.mark.parametrize("make", [LogitDifference, lambda a, p: LogProb(a[:, 0], p)])
def test_logits_that_do_not_fit_are_refused_by_name(logits_shape, message, make):
    metric = make(ANSWERS, 4)
    with pytest.raises(ValueError, match=message) as refusal:
        metric(torch.zeros(logits_shape))
    assert metric.name in str(refusal.value)


def test_logits_must_be_a_tensor():
    with pytest.raises(TypeError, match="got list"):
        LogitDifference(ANSWERS, 4)([[0.0]])


@pytest.mark.parametrize(
    ("answers", "positions", "error", "message"),
    [
        (ANSWERS, -1, ValueError, "last of n positions is n - 1"),
        (ANSWERS, [1, 2], ValueError, "2 examples, answers for 3"),
        (ANSWERS, 1.0, TypeError, "positions must be whole numbers"),
        (ANSWERS, [[[1]], [[2]], [[3]]], ValueError, r"\[batch, n_positions\]"),
        (ANSWERS.float(), 1, TypeError, "answer_tokens must be whole numbers"),
        (ANSWERS > 2, 1, TypeError, "bool"),
        (-ANSWERS, 1, ValueError, "-6"),
        (ANSWERS[:, :1], 1, ValueError, r"\[batch, 2\]"),
        (torch.zeros(0, 2, dtype=torch.int64), 1, ValueError, "empty"),
    ],
)
def test_logit_difference_refuses_bad_indices(answers, positions, error, message):
    with pytest.raises(error, match=message):
        LogitDifference(answers, positions)


def test_one_answer_for_each_position():
    with pytest.raises(ValueError, match="one answer is needed for each position"):
        LogProb(ANSWERS, 4)
    with pytest.raises(ValueError, match=r"\[batch\] or \[batch, n_positions\]"):
        Probability(ANSWERS[None], 4)


def test_own_function_gets_only_its_positions(logits):
    seen = []

    @reads([[1], [2], [0]], name="mine", units="things")
    def ignored(part):
        seen.append(part)
        return part.sum((-1, -2))

    ignored(logits)
    assert torch.equal(seen[0][:, 0], torch.stack([logits[0, 1], logits[1, 2], logits[2, 0]]))
    assert (ignored.name, ignored.units) == ("mine", "things")
    assert ignored.positions.tolist() == [[1], [2], [0]]


@pytest.mark.parametrize("value", [2.5, 3, torch.tensor(2.5), torch.tensor([2.5])])
def test_own_function_may_return_one_number_for_the_batch(logits, value):
    metric = reads([0, 0, 0])(lambda part: value)
    assert metric(logits).item() == float(value)
    with pytest.raises(ValueError, match="drop the mean"):
        metric.per_example(logits)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("no", TypeError, "returned str"),
        (None, TypeError, "returned NoneType"),
        (torch.zeros(2, 2), ValueError, r"shape \(2, 2\)"),
        (torch.zeros(2), ValueError, r"shape \(2,\)"),
    ],
)
def test_own_function_must_return_numbers(logits, value, error, message):
    metric = reads([0, 0, 0], name="odd one")(lambda part: value)
    with pytest.raises(error, match=message) as refusal:
        metric(logits)
    assert "odd one" in str(refusal.value)


def test_metrics_say_what_they_are():
    metric = LogitDifference(ANSWERS, 4)
    assert "logit difference" in repr(metric) and "logits" in repr(metric)
    assert "per example" in repr(metric.per_example)
