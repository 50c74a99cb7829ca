"""Why it is so: the paper's claims, each checked exactly on toy distributions, one file a claim.

`python -m theory` checks all of them. A file opens with its claim, as `SOURCE: words`, and with the
reason it holds. Then each `@check` is a function whose docstring is a statement and whose code
computes both sides of it: first the claim, then what happens without its assumption.
A toy model is a table of log-probs (..., L, K), float64: L languages, K answers, every sum taken in
full. Policies, rewards and losses are those of dco.py: what is proved is what trains.
Leaves out networks: what one learns beside the table is measured, not proved.

A check is called by the arguments that it has:

    check(g)         one toy model, drawn from the generator g; called once for each draw
    check(g, draws)  so many toy models at once
    check()          a worked example, whose numbers the statement gives

It returns the gap between the two sides, a number or a tensor of them, and may add a text that
shows a draw in numbers. Where a side is a yes or no, the gap is 1 for an exception.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

CLAIMS = (
    "product_of_experts lemma1 lemma2 lemma3 random_pairs dpo_unbounded direction on_the_way "
    "rearrangement which_expert pooling rankc_chance exact_matching"
).split()
TOLERANCE = 1e-9  # two sides that are equal by the proof may differ by this, for rounding


class Finding(NamedTuple):
    """What a check found: its statement, and the gap of the draw that fits it worst."""

    statement: str
    draws: int
    gap: float
    shown: str = ""  # one draw, in numbers

    @property
    def holds(self) -> bool:
        return self.gap <= TOLERANCE  # False for NaN


CHECKS: dict[str, list[Callable]] = {name: [] for name in CLAIMS}  # filled as files are imported


def check(function: Callable) -> Callable:
    """Decorator: this function is a check of its file's claim."""
    CHECKS[function.__module__.removeprefix("theory.")].append(function)
    return function


def slow(function: Callable) -> Callable:
    """Decorator: a check that takes long is given a fifth of the draws."""
    function.slow = True
    return function


def run(function: Callable, draws: int, seed: int) -> Finding:
    """Call a check as the docstring above says."""
    statement = " ".join(inspect.getdoc(function).split())
    if hasattr(function, "slow"):
        draws = max(1, draws // 5)
    g = rng(seed)
    arguments = len(inspect.signature(function).parameters)
    if arguments == 0:
        draws = 1
        results = [function()]
    elif arguments == 1:
        results = [function(g) for _ in range(draws)]
    else:
        results = [function(g, draws)]
    gaps, shown = [], ""
    for result in results:
        gap, shown = result if isinstance(result, tuple) else (result, "")
        gaps.append(gap)
    return Finding(statement, draws, worst(*gaps), shown)


def worst(*gaps: float | Tensor) -> float:
    """The largest absolute value; NaN if any is NaN, which Python's max would pass over."""
    largest = [torch.as_tensor(gap, dtype=torch.double).abs().amax() for gap in gaps]
    return float(torch.stack(largest).amax())


def rng(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)
