"""Lemma 3: N languages rank alike for every reference iff Gamma_ij = w_j / w_i, w > 0.

Why (App. E). For a pair of answers with reference log-odds x, one a language, pi*'s are Gamma x
(Eq. 10). If Gamma has rank one and a unit diagonal, Gamma_ij = Gamma_i1 Gamma_1j = w_j / w_i for
w_j = Gamma_1j: pi*_i's log-odds are (1 / w_i) sum_j w_j x_j, so of one sign in all languages.
The rest is not in the paper. *Converse*: take two rows that are not proportional. They are linearly
independent, so Gamma_i x = 1, Gamma_j x = -1 has a solution, a reference on which pi* contradicts
itself. Two languages have one such pair of rows, and rank one is gamma_1 gamma_2 = beta^2: Lemma 1.
If all rows are proportional and w has both signs, pi*_i's log-odds are s / w_i for s = sum_j w_j
x_j: languages of unlike sign rank upside down wherever s is not 0. (The paper's gammas are in R+.)
*Trust*: every positive rank-one Gamma with a unit diagonal is w_j / w_i for some w, unique up to a
factor, so of the paper's N^2 - N numbers N - 1 are free, and beta cancels.
Eq. 16 prints gamma_j for gamma_ij. Taken as printed, Gamma_ij = gamma_j / beta off the diagonal,
which for N >= 3 has rank one only if all are beta. Eq. 18 as printed has gamma_i2 for gamma_i1.
"""

import torch
from torch import Generator, Tensor

import dco
from theory import check
from theory.lemma1 import OPPOSED, matrix
from theory.toys import contradiction, from_odds, positive, random_gamma, random_int, table, to_odds


def contradicting_reference(gamma: Tensor, beta: float, i: int, j: int) -> Tensor:
    """A reference (L, 2) on which pi* has log-odds +1 in language i and -1 in language j.

    gamma: (L, L), such that rows i and j of Gamma are not proportional.
    """
    Gamma = gamma / beta + torch.eye(len(gamma), dtype=torch.double)  # Eq. 17
    return from_odds(torch.linalg.pinv(Gamma[[i, j]]) @ OPPOSED)


def rank_one(w: Tensor, beta: float) -> Tensor:
    """gamma with Gamma_ij = w_j / w_i, by hand; w may have both signs: (L,) -> (L, L)."""
    return beta * (w[None, :] / w[:, None]).fill_diagonal_(0)


def toy(g: Generator) -> tuple[Tensor, Tensor, float]:
    """A reference (L, K) of three to six languages, their trust w (L,), and beta."""
    L = random_int(g, 3, 6)
    return table(g, L, random_int(g, 2, 8)), positive(g, L), float(positive(g))


@check
def all_languages_rank_alike(g: Generator) -> Tensor:
    """If Gamma_ij = w_j / w_i, no two languages contradict each other on a pair of answers."""
    ref, w, beta = toy(g)
    return contradiction(dco.optimal_policy(ref, rank_one(w, beta), beta))


@check
def rows_that_are_not_proportional_contradict_somewhere(g: Generator) -> Tensor:
    """Converse: two rows not proportional: pi* says +1, -1 on a reference built for them."""
    ref, _, beta = toy(g)
    gamma = random_gamma(g, len(ref))
    policy = dco.optimal_policy(contradicting_reference(gamma, beta, 0, 1), gamma, beta)
    return to_odds(policy)[:2] - OPPOSED


@check
def trust_of_both_signs_ranks_upside_down(g: Generator) -> Tensor:
    """Rank one with w of both signs: log-odds s / w_i, for s = sum_j w_j x_j."""
    ref, w, beta = toy(g)
    w[: random_int(g, 1, len(w) - 1)] *= -1
    x = to_odds(ref)
    policy = dco.optimal_policy(from_odds(x), rank_one(w, beta), beta)
    return to_odds(policy) - (w * x).sum() / w


@check
def trust_weighs_one_consensus(g: Generator) -> Tensor:
    """Trust: log pi*_i = (1 / w_i) sum_j w_j log pi_REF,j + const."""
    ref, w, beta = toy(g)
    consensus = (w[:, None] * ref).sum(0)  # (K,)
    pooled = (consensus / w[:, None]).log_softmax(-1)
    return dco.optimal_policy(ref, dco.gamma_from_trust(w, beta), beta) - pooled


@check
def trust_reaches_every_positive_rank_one(g: Generator) -> Tensor:
    """Each positive rank-one Gamma with a unit diagonal is that of the trust in its first row."""
    _, u, beta = toy(g)
    gamma = rank_one(1 / u, beta)
    trust = torch.cat([torch.ones(1), gamma[0, 1:] / beta])
    return dco.gamma_from_trust(trust, beta) - gamma


@check
def is_consistent_tells_them_apart(g: Generator) -> bool:
    """dco.is_consistent is True for these alone, and for N = 2 is Lemma 1."""
    _, w, beta = toy(g)
    gamma_1, excess = positive(g, 2).tolist()
    gamma_2 = beta**2 / gamma_1
    last_row_off = rank_one(w, beta)
    last_row_off[-1, 0] *= 2  # the first rows are still proportional
    one_negative = rank_one(torch.cat([-w[:1], w[1:]]), beta)
    other_product = matrix(gamma_1, gamma_2 * (1 + excess))
    right = [rank_one(w, beta), matrix(gamma_1, gamma_2)]
    wrong = [random_gamma(g, len(w)), last_row_off, one_negative, other_product]
    judged = [dco.is_consistent(gamma, beta) for gamma in right + wrong]
    return judged != [True, True, False, False, False, False]


@check
def eq_16_as_printed_is_not_of_rank_one(g: Generator) -> bool:
    """Eq. 16 as printed, gamma_j for gamma_ij, N >= 3: of rank one only if all are beta."""
    _, gamma_j, beta = toy(g)
    printed = gamma_j.expand(len(gamma_j), -1).clone().fill_diagonal_(0)
    all_beta = torch.full_like(printed, beta).fill_diagonal_(0)
    return dco.is_consistent(printed, beta) or not dco.is_consistent(all_beta, beta)
