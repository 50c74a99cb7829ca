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

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, contradiction, from_odds, off, positive, rng, table, to_odds, whole
from theory.lemma1 import OPPOSED, matrix

MIXED = torch.tensor([1, -1, 2], dtype=torch.double)


def contradicting_reference(gamma: Tensor, beta: float, i: int, j: int) -> Tensor:
    """A reference (L, 2) on which pi* has log-odds +1 in language i and -1 in language j.

    gamma: (L, L), such that rows i and j of Gamma are not proportional.
    """
    Gamma = gamma / beta + torch.eye(len(gamma), dtype=torch.double)  # Eq. 17
    return from_odds(torch.linalg.pinv(Gamma[[i, j]]) @ OPPOSED)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, gaps, misjudged, printed = rng(seed), [], 0, 0
    for _ in range(draws):
        L, beta = whole(g, 3, 6), float(positive(g))
        ref, w = table(g, L, whole(g, 2, 8)), positive(g, L)
        best = dco.optimal_policy(ref, dco.gamma_from_trust(w, beta), beta)
        pooled = best - ((w[:, None] * ref).sum(0) / w[:, None]).log_softmax(-1)
        u = positive(g, L)  # any rank-one Gamma with a unit diagonal, and the trust it is
        rank_one = beta * (u[:, None] / u).fill_diagonal_(0)
        trust = torch.cat([torch.ones(1), rank_one[0, 1:] / beta])
        onto = dco.gamma_from_trust(trust, beta) - rank_one
        free = positive(g, L, L).fill_diagonal_(0)
        bad = contradicting_reference(free, beta, 0, 1)
        odds = to_odds(dco.optimal_policy(bad, free, beta))[:2]
        v = w.clone()
        v[: whole(g, 1, L - 1)] *= -1
        mixed, x = beta * (v / v[:, None]).fill_diagonal_(0), to_odds(table(g, L, 2))
        turned = to_odds(dco.optimal_policy(from_odds(x), mixed, beta)) - (v * x).sum() / v
        gaps.append([off(x) for x in (contradiction(best), pooled, onto, odds - OPPOSED, turned)])
        late = rank_one.clone()  # the first rows are proportional, the last is not
        late[-1, 0] *= 2
        gamma_1, gamma_2 = positive(g, 2).tolist()
        for gamma in rank_one, matrix(gamma_1, beta**2 / gamma_1):
            misjudged += not dco.is_consistent(gamma, beta)
        for gamma in free, mixed, late, matrix(gamma_1, gamma_2):
            misjudged += dco.is_consistent(gamma, beta)
        columns = positive(g, L).expand(L, L).clone().fill_diagonal_(0)  # Eq. 16, as printed
        printed += dco.is_consistent(columns, beta)
        printed += not dco.is_consistent(torch.full((L, L), beta).fill_diagonal_(0), beta)
    alike, pooled, onto, converse, turned = torch.tensor(gaps).amax(0).tolist()
    yield Finding("no pair of answers is contradicted between any two languages", draws, alike)
    words = "converse: two rows not proportional: pi* says +1, -1 on a reference built for them"
    yield Finding(words, draws, converse)
    mixed, ref = (MIXED / MIXED[:, None]).fill_diagonal_(0), from_odds(7 * (MIXED == 2).double())
    odds = to_odds(dco.optimal_policy(ref, mixed, 1.0))
    words = "rank one with w of both signs: s / w_i; w = (1, -1, 2) at (0, 0, 7): 14, -14, 7"
    yield Finding(words, draws, off(turned * MIXED, odds - 14 / MIXED))
    yield Finding("trust: log pi*_i = (1 / w_i) sum_j w_j log pi_REF,j + const", draws, pooled)
    yield Finding("trust reaches every positive rank-one Gamma", draws, onto)
    words = "is_consistent tells these apart, and for N = 2 is Lemma 1 (gap: errors)"
    yield Finding(words, draws, misjudged)
    words = "Eq. 16 as printed, N >= 3: never of rank one, but for gamma_j = beta (gap: exceptions)"
    yield Finding(words, draws, printed)
