"""Toy models: tables of log-probs drawn at random, what is measured on them, and descent."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor


def random_int(g: Generator, low: int, high: int) -> int:
    """From low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def positive(g: Generator, *shape: int) -> Tensor:
    """Log-normal numbers, most between 1/4 and 4, float64."""
    return torch.randn(shape, generator=g, dtype=torch.double).mul(0.7).exp()


def random_gamma(g: Generator, L: int) -> Tensor:
    """Any positive gamma of Eq. 15, with no thought of consistency: (L, L)."""
    return positive(g, L, L).fill_diagonal_(0)


def table(g: Generator, *shape: int) -> Tensor:
    """Log-probs over the last axis, nats, float64: from nearly even to one answer at 0.99."""
    return torch.randn(shape, generator=g, dtype=torch.double).mul(2).log_softmax(-1)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.double)


def from_odds(odds: Tensor) -> Tensor:
    """Log-probs of two answers with these log-odds: (...) -> (..., 2)."""
    return torch.stack([odds, torch.zeros_like(odds)], -1).log_softmax(-1)


def to_odds(logps: Tensor) -> Tensor:
    """Log-odds of the first of two answers: (..., 2) -> (...)."""
    return logps[..., 0] - logps[..., 1]


def margins(x: Tensor) -> Tensor:
    """Of each answer over each other: (..., K) -> (..., K, K); of log-probs, the log-odds."""
    return x[..., :, None] - x[..., None, :]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of two tables of log-probs: (..., K) each -> (...)."""
    return (p.exp() * (p - q)).sum(-1)


def contradiction(logps: Tensor) -> Tensor:
    """By how many nats two languages contradict each other at worst: (..., L, K) -> (...).

    A pair of answers that one language prefers by a and another the other way round by b counts
    min(a, b). Zero iff Def. 1 holds (but for ties).
    """
    m = margins(logps)  # (..., L, K, K)
    return torch.minimum(m[..., :, None, :, :], -m[..., None, :, :, :]).amax((-1, -2, -3, -4))


def path_of_descent(
    loss: Callable[[Tensor], Tensor], start: Tensor, steps: Sequence[float]
) -> Tensor:
    """Gradient descent on a table of logits, by steps of these sizes: (..., K) -> (S + 1, ..., K).

    loss: (..., K) log-probs -> any shape, of which the sum is lowered. Returns log-probs.
    """
    path = [start]  # of logits
    for step in steps:
        logits = path[-1].detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(logits.log_softmax(-1)).sum(), logits)
        path.append(logits.detach() - step * slope)
    return torch.stack(path).log_softmax(-1)
