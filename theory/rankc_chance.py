"""App. I: RankC by chance is sum_j w_j j / N, and blind to accuracy.

Why. Of two unrelated rankings the second puts each of the first's top j among its own top j with
probability j / N, so E[P@j] = (j * j / N) / j = j / N, and the mean is linear in P@j. That is 0.63
for two answers, 0.38 for four, 0.16 for ten: print it beside every score. It rests on "unrelated":
where languages share a taste for some answers without knowing a thing, RankC is above it.
RankC is 1 iff the rankings are equal (each P@j must be 1, every w_j > 0), and renaming the answers
in both languages changes nothing, so it cannot know which is right: "independent of accuracy".
"""

from itertools import permutations
from math import exp

import torch
from torch import Generator, Tensor

import rankc
from theory import check, worst
from theory.toys import random_int, table


def consist(order_1: list[int], order_2: list[int]) -> float:
    """App. I as it is printed, in sets: two lists of answers, best first."""
    N = len(order_1)
    total = sum(exp(N - k) for k in range(1, N + 1))
    score = 0.0
    for j in range(1, N + 1):
        precision = len(set(order_1[:j]) & set(order_2[:j])) / j
        score += exp(N - j) / total * precision
    return score


def against_all_rankings(N: int) -> tuple[Tensor, Tensor]:
    """RankC of one ranking with all N!, (N!,), and whether that is the same ranking, (N!,)."""
    rankings = torch.tensor(list(permutations(range(N)))).double()  # as scores
    first = rankings[:1].expand_as(rankings)
    return rankc.rankc(first, rankings), (rankings == first).all(-1)


@check
def chance_is_the_mean_over_all_rankings() -> tuple[float, str]:
    """The mean over all N! rankings is sum_j w_j j / N, N = 2 .. 7."""
    gaps = [against_all_rankings(N)[0].mean() - rankc.chance(N) for N in range(2, 8)]
    levels = ", ".join(f"{rankc.chance(N):.3f} for {N}" for N in (2, 3, 4, 5, 10))
    return worst(*gaps), f"chance: {levels}"


@check
def rankc_is_1_for_equal_rankings_alone() -> float:
    """RankC is 1 for equal rankings and no others, N = 2 .. 7."""
    exceptions = []
    for N in range(2, 8):
        scores, is_same = against_all_rankings(N)
        exceptions.append((scores > 1 - 1e-12) != is_same)
    return worst(*exceptions)


@check
def rankc_is_app_i_in_sets(g: Generator) -> float:
    """rankc.rankc is App. I's definition in sets."""
    a, b = table(g, 2, random_int(g, 2, 10))
    best_first = [scores.argsort(descending=True).tolist() for scores in (a, b)]
    return float(rankc.rankc(a[None], b[None])) - consist(*best_first)


@check
def renaming_the_answers_changes_nothing(g: Generator) -> Tensor:
    """Renaming the answers alike in both languages changes nothing."""
    a, b = table(g, 2, random_int(g, 2, 10))
    p = torch.randperm(len(a), generator=g)
    return rankc.rankc(a[None], b[None]) - rankc.rankc(a[None, p], b[None, p])


@check
def a_shared_taste_is_above_chance(g: Generator, draws: int) -> tuple[bool, str]:
    """Not so where languages share a taste: RankC is above chance by 0.1 and more."""
    a, b = table(g, 2, 1000 + draws, 4)  # enough that the mean is known to 0.01
    taste = torch.tensor([6.0, 4.0, 2.0, 0.0])
    shared = float(rankc.rankc(a + taste, b + taste).mean())
    shown = f"chance {rankc.chance(4):.3f}, with a shared taste {shared:.3f}"
    return not shared > rankc.chance(4) + 0.1, shown
