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

import torch
from torch import Generator, Tensor

import dco
import rankc
from theory import check, slow, worst
from theory.toys import contradiction, from_odds, margins, path_of_descent, table, to_odds, vector


def pairwise_optimum(ref_logps: Tensor, gamma: Tensor, beta: float, halvings: int = 40) -> Tensor:
    """A minimum of Eq. 11 over all pairs of languages and of answers: (..., L, K) -> same.

    By subgradient descent, its step ever halved. A loss of absolute values falls at no less than
    some slope toward its minimum. So steps that shrink by a fixed factor reach it to within the
    last of them, if there are enough of each size; for these tables 8 are.
    """
    L = len(gamma)  # in L - 1 rounds each language meets each other one, one at a time
    rounds = [gamma * torch.eye(L).roll(shift, 1) for shift in range(1, L)]
    rewards = torch.stack([dco.align_reward(ref_logps, one_expert) for one_expert in rounds])

    def loss(logps: Tensor) -> Tensor:
        return dco.dco_loss(logps, ref_logps, rewards, beta).mean(0) / beta

    steps = [8 / 2**n for n in range(halvings) for _ in range(8)]
    return path_of_descent(loss, ref_logps, steps)[-1]


def mean_clc(logps: Tensor) -> float:
    """RankC, the mean over draws and over pairs of languages: (draws, L, K) -> float."""
    matrix = rankc.clc(logps)
    return float(matrix[~torch.eye(len(matrix), dtype=torch.bool)].mean())


def compare(ref: Tensor, halvings: int = 40) -> tuple[Tensor, Tensor]:
    """Joint and pairwise optimum with equal trust, gamma = beta = 1: (..., L, K) -> same, twice."""
    gamma = 1 - torch.eye(ref.shape[-2], dtype=torch.double)
    return dco.optimal_policy(ref, gamma, 1.0), pairwise_optimum(ref, gamma, 1.0, halvings)


@check
@slow
def for_two_languages_it_is_pi_star(g: Generator, draws: int) -> Tensor:
    """Two languages: the pairwise minimum is pi*."""
    joint, pairwise = compare(table(g, draws, 2, 6))
    return joint - pairwise


@check
def for_four_it_is_a_median_and_pi_star_a_sum() -> float:
    """Four languages at (9, -1, -1, -1): pi* has 6 in each, pairs (8, -2, -2, -2)."""
    joint, pairwise = compare(from_odds(vector(9, -1, -1, -1)))
    return worst(to_odds(joint) - 6, to_odds(pairwise) - vector(8, -2, -2, -2))


@check
def medians_of_each_pair_need_not_add_up() -> float:
    """Three answers, three experts: pair by pair medians cost 9; they do not add up: 12."""
    ref = torch.tensor([[0, 0, 0], [2, 0, 1], [-1, 0, -2], [-1, 0, 1]]).double().log_softmax(-1)
    w, l = torch.combinations(torch.arange(3)).T  # noqa: E741
    r_hat = margins(compare(ref)[1] - ref)[0, w, l]  # of language 1, each pair of answers
    experts = margins(ref)[1:, w, l]  # (3, 3): of the other languages
    medians = experts.median(0).values
    return worst((r_hat - experts).abs().sum() - 12, (medians - experts).abs().sum() - 9)


@check
def for_four_it_contradicts_itself(g: Generator, draws: int) -> tuple[float, str]:
    """Four languages: pi* contradicts itself nowhere, the pairwise minimum in 19 of 20 at least."""
    ref = table(g, 20 + draws // 5, 4, 6)
    joint, pairwise = compare(ref)
    consistent = int((contradiction(pairwise) < 1e-6).sum())
    clc = [mean_clc(logps) for logps in (ref, joint, pairwise)]
    shown = "mean CLC {:.2f} before, {:.2f} joint, {:.2f} pairwise".format(*clc)
    shown += f"; pairwise consistent in {consistent} of {len(ref)}"
    return worst(contradiction(joint), consistent > len(ref) / 20), shown
