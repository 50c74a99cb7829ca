"""Eq. 15: random pairs of languages do not minimise it.

Why. Eq. 11 is written for two languages. For N = 12 the authors' release draws a random pair of
them for each instance, so language i meets one expert j at a time, and its expected loss is

    sum_j sum_(w, l) |r-hat_w - r-hat_l - gamma_ij log pi_REF,j(w) / pi_REF,j(l)|:

least absolute deviations, whose minimum is at a *median* of the experts, where Eq. 15 asks for
their *sum*. For two languages the two are one. For more, no Gamma describes the median, and its
policy contradicts itself. With reference log-odds (9, -1, -1, -1), gamma = beta = 1, the sum is 6:
pi* prefers the first answer everywhere. By medians the first language has 9 - 1 and the others
-1 - 1. (The minimum need not be unique; descent's is taken. Squared deviations would regress on the
mean, which is Eq. 15 once gamma is multiplied by N - 1.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
import rankc
from theory import Finding, contradiction, from_odds, rng, table, to_odds
from theory.lemma2 import descend


def pairwise_optimum(ref_logps: Tensor, gamma: Tensor, beta: float) -> Tensor:
    """A minimum of Eq. 11 over all pairs of languages and of answers: (..., L, K) -> same."""
    L, rewards = len(gamma), []
    for shift in range(1, L):  # each language meets each other one, one at a time
        i, j = torch.arange(L), (torch.arange(L) + shift) % L
        one_expert = torch.zeros_like(gamma).index_put((i, j), gamma[i, j])
        rewards.append(dco.align_reward(ref_logps, one_expert))
    return descend(
        lambda logps: (
            sum(dco.dco_loss(logps, ref_logps, r, beta) for r in rewards) / (beta * (L - 1))
        ),
        ref_logps,
    )


def mean_clc(logps: Tensor) -> float:
    """RankC, the mean over draws and over pairs of languages: (draws, L, K) -> float."""
    matrix = rankc.clc(logps.transpose(0, 1))
    return float(matrix[~torch.eye(len(matrix), dtype=torch.bool)].mean())


def compare(N: int, K: int, draws: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Reference, joint and pairwise optimum with equal trust, gamma = beta = 1: (draws, N, K)."""
    ref, gamma = table(g, draws, N, K), dco.gamma_from_trust(torch.ones(N, dtype=torch.double), 1.0)
    return ref, dco.optimal_policy(ref, gamma, 1.0), pairwise_optimum(ref, gamma, 1.0)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, draws = rng(seed), max(1, draws // 5)
    ref, joint, pairwise = compare(2, 6, draws, g)
    yield Finding(
        "two languages: the pairwise minimum is pi*", draws, float((joint - pairwise).abs().max())
    )
    ref = from_odds(torch.tensor([9.0, -1.0, -1.0, -1.0], dtype=torch.double))
    gamma = torch.ones(4, 4, dtype=torch.double).fill_diagonal_(0)
    found = map(to_odds, (dco.optimal_policy(ref, gamma, 1.0), pairwise_optimum(ref, gamma, 1.0)))
    by_hand = torch.tensor([[6.0] * 4, [8.0, -2.0, -2.0, -2.0]], dtype=torch.double)
    yield Finding(
        "four languages at (9, -1, -1, -1): pi* has 6 in each, pairs (8, -2, -2, -2)",
        1,
        float((torch.stack(list(found)) - by_hand).abs().max()),
    )
    ref, joint, pairwise = compare(4, 6, draws, g)
    yield Finding(
        "four languages: pi* contradicts itself nowhere", draws, float(contradiction(joint).max())
    )
    consistent = int((contradiction(pairwise) < 1e-6).sum())
    yield Finding(
        "four languages: the pairwise minimum is consistent in no draw (gap: share)",
        draws,
        consistent / draws,
        0.05,
        shown=(
            f"mean CLC {mean_clc(ref):.2f} before, {mean_clc(joint):.2f} joint, "
            f"{mean_clc(pairwise):.2f} pairwise; consistent in {consistent} of {draws}"
        ),
    )
