"""Why it is so: the paper's claims, each checked exactly on toy distributions, one file a claim.

`python -m theory` checks all of them. A file opens with its claim, as `SOURCE: words`, and with the
reason it holds; its `check(draws, seed)` yields Findings: the claim, then what happens without its
assumption. A toy model is a table of log-probs (..., L, K), float64: L languages, K answers, every
sum taken in full. Policies, rewards and losses are those of dco.py: what is proved is what trains.
Leaves out networks: what one learns beside the table is measured, not proved.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

CLAIMS = (
    "product_of_experts lemma1 lemma2 lemma3 random_pairs dpo_unbounded direction on_the_way "
    "rearrangement which_expert pooling rankc_chance exact_matching"
).split()


class Finding(NamedTuple):
    """One statement and the draw that fits it worst; it holds if gap <= allowed."""

    words: str
    draws: int
    gap: float  # distance between what is said and what was found; 0 is exact
    allowed: float = 1e-9
    shown: str = ""  # one draw, worked in numbers


def rng(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def whole(g: Generator, low: int, high: int) -> int:
    """From low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def positive(g: Generator, *shape: int) -> Tensor:
    """Log-normal numbers, most between 1/4 and 4, float64."""
    return torch.randn(shape, generator=g, dtype=torch.double).mul(0.7).exp()


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


def worst(*gaps: float | Tensor) -> float:
    """The largest; NaN if any is NaN, which Python's max would pass over."""
    return float(
        torch.stack([torch.as_tensor(gap, dtype=torch.double).amax() for gap in gaps]).amax()
    )


def off(*differences: Tensor) -> float:
    """The largest by absolute value: how far what should be equal is apart."""
    return worst(*(difference.abs() for difference in differences))
