"""Eq. 15: random pairs of languages do not minimise it.

Why. Eq. 11 is written for two languages. For N = 12 the authors' release draws a random pair of
them for each instance, so language i meets one expert j at a time, and its expected loss is

    sum_j sum_(w, l) |r-hat_w - r-hat_l - gamma_ij log pi_REF,j(w) / pi_REF,j(l)|:

least absolute deviations. Of two answers the minimum is at a *median* of the experts' log-odds,
where Eq. 15 asks for their *sum*; for two languages these are equal. Of more answers it is a joint
fit of all pairs, for medians of each pair need not add up. No Gamma describes either, and for more
than two languages the policy contradicts itself. With reference log-odds (9, -1, -1, -1), gamma =
beta = 1, the sum is 6: pi* prefers the first answer everywhere. By medians the first language has
9 - 1 and the others -1 - 1. (The minimum need not be unique; descent's is taken. Squared deviations
would regress on the mean, which is Eq. 15 once gamma is multiplied by N - 1.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
import rankc
from theory import Finding, contradiction, from_odds, margins, off, rng, table, to_odds, vector
from theory.lemma2 import minimum


def pairwise_optimum(ref_logps: Tensor, gamma: Tensor, beta: float) -> Tensor:
    """A minimum of Eq. 11 over all pairs of languages and of answers: (..., L, K) -> same."""
    L = len(gamma)  # in L - 1 rounds each language meets each other one, one at a time
    rounds = [gamma * torch.eye(L).roll(shift, 1) for shift in range(1, L)]
    rewards = [dco.align_reward(ref_logps, one_expert) for one_expert in rounds]

    def loss(logps: Tensor) -> Tensor:
        return sum(dco.dco_loss(logps, ref_logps, r, beta) for r in rewards) / (beta * (L - 1))

    return minimum(loss, ref_logps)


def mean_clc(logps: Tensor) -> float:
    """RankC, the mean over draws and over pairs of languages: (draws, L, K) -> float."""
    matrix = rankc.clc(logps)
    return float(matrix[~torch.eye(len(matrix), dtype=torch.bool)].mean())


def compare(ref: Tensor) -> tuple[Tensor, Tensor]:
    """Joint and pairwise optimum with equal trust, gamma = beta = 1: (..., L, K) -> same, twice."""
    gamma = 1 - torch.eye(ref.shape[-2], dtype=torch.double)
    return dco.optimal_policy(ref, gamma, 1.0), pairwise_optimum(ref, gamma, 1.0)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, draws = rng(seed), max(1, draws // 5)
    joint, pairwise = compare(table(g, draws, 2, 6))
    yield Finding("two languages: the pairwise minimum is pi*", draws, off(joint - pairwise))
    found = torch.stack(compare(from_odds(vector(9, -1, -1, -1))))  # (2, 4, 2)
    gap = off(to_odds(found) - torch.stack([vector(6, 6, 6, 6), vector(8, -2, -2, -2)]))
    words = "four languages at (9, -1, -1, -1): pi* has 6 in each, pairs (8, -2, -2, -2)"
    yield Finding(words, 1, gap)
    ref = torch.tensor([[0, 0, 0], [2, 0, 1], [-1, 0, -2], [-1, 0, 1]]).double().log_softmax(-1)
    r_hat = margins(compare(ref)[1] - ref)[0, [0, 1, 0], [1, 2, 2]]  # of language 1, each pair
    experts = margins(ref)[1:, [0, 1, 0], [1, 2, 2]]  # (3, 3): of the others
    cost = [(x - experts).abs().sum() for x in (r_hat, experts.median(0)[0])]
    words = "three answers, three experts: pair by pair medians cost 9; they do not add up: 12"
    yield Finding(words, 1, off(torch.stack(cost) - vector(12, 9)))
    ref = table(g, draws, 4, 6)
    joint, pairwise = compare(ref)
    words = "four languages: pi* contradicts itself nowhere"
    yield Finding(words, draws, off(contradiction(joint)))
    consistent = int((contradiction(pairwise) < 1e-6).sum())
    shown = (
        f"mean CLC {mean_clc(ref):.2f} before, {mean_clc(joint):.2f} joint, "
        f"{mean_clc(pairwise):.2f} pairwise; consistent in {consistent} of {draws}"
    )
    words = "four languages: the pairwise minimum is consistent in no draw (gap: share)"
    yield Finding(words, draws, consistent / draws, 0.05, shown)
