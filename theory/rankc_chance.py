"""App. I: RankC by chance is sum_j w_j j / N, and blind to accuracy.

Why. Of two unrelated rankings the second puts each of the first's top j among its own top j with
probability j / N, so E[P@j] = (j * j / N) / j = j / N, and the mean is linear in P@j. That is 0.63
for two answers, 0.38 for four, 0.16 for ten: print it beside every score. It rests on "unrelated":
where languages share a taste for some answers without knowing a thing, RankC is above it.
RankC is 1 iff the rankings are equal (each P@j must be 1, every w_j > 0), and renaming the answers
in both languages changes nothing, so it cannot know which is right: "independent of accuracy".
"""

from collections.abc import Iterator
from itertools import permutations
from math import exp

import torch

import rankc
from theory import Finding, rng, table, whole, worst


def consist(order_1: list[int], order_2: list[int]) -> float:
    """App. I as it is printed, in sets: two lists of answers, best first."""
    N = len(order_1)
    total = sum(exp(N - k) for k in range(1, N + 1))
    return sum(
        exp(N - j) / total * len({*order_1[:j]} & {*order_2[:j]}) / j for j in range(1, N + 1)
    )


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, gap, errors, orders = rng(seed), 0.0, 0, 0
    for N in range(2, 8):
        every = torch.tensor(list(permutations(range(N)))).double()  # all N! rankings, as scores
        first = every[:1].expand_as(every)
        scores, orders = rankc.rankc(first, every), orders + len(every)
        gap = worst(gap, abs(float(scores.mean()) - rankc.chance(N)))
        errors += int(((scores > 1 - 1e-12) != (first == every).all(-1)).sum())
    words = "the mean over all N! rankings is sum_j w_j j / N, N = 2 .. 7"
    told = ", ".join(f"{rankc.chance(N):.3f} for {N}" for N in (2, 3, 4, 5, 10))
    yield Finding(words, orders, gap, shown=f"chance: {told}")
    yield Finding("RankC is 1 for equal rankings and no others (gap: exceptions)", orders, errors)
    printed, renamed = 0.0, 0.0
    for _ in range(draws):
        N = whole(g, 2, 10)
        a, b = table(g, 2, N)
        score = float(rankc.rankc(a[None], b[None]))
        best_first = (x.argsort(descending=True).tolist() for x in (a, b))
        printed = worst(printed, abs(score - consist(*best_first)))
        p = torch.randperm(N, generator=g)
        renamed = worst(renamed, (score - rankc.rankc(a[None, p], b[None, p])).abs())
    yield Finding("rankc.rankc is App. I's definition in sets", draws, printed)
    yield Finding("renaming the answers alike in both languages changes nothing", draws, renamed)
    a, b, taste = table(g, 2000, 4), table(g, 2000, 4), torch.tensor([6.0, 4.0, 2.0, 0.0])
    shared = float(rankc.rankc(a + taste, b + taste).mean())
    words = "not so where languages share a taste: RankC is well above chance (gap: 0 or 1)"
    shown = f"chance {rankc.chance(4):.3f}, with a shared taste {shared:.3f}"
    yield Finding(words, 2000, float(shared < rankc.chance(4) + 0.1), shown=shown)
