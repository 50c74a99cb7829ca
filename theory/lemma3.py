"""Lemma 3: N languages rank alike iff Gamma_ij = w_j / w_i, w > 0.

Why (App. E). For a pair of answers with reference log-odds x, one a language, pi*'s are Gamma x
(Eq. 10). If Gamma has rank one and a unit diagonal, Gamma_ij = Gamma_i1 Gamma_1j = w_j / w_i for
w_j = Gamma_1j: pi*_i's log-odds are (1 / w_i) sum_j w_j x_j, so of one sign in all languages.
The rest is not in the paper. *Converse*: take two rows that are not proportional. They are linearly
independent, so Gamma_i x = 1, Gamma_j x = -1 has a solution, a reference on which pi* contradicts
itself. Two languages have one such pair of rows, and rank one is gamma_1 gamma_2 = beta^2: Lemma 1.
*Trust*: every positive rank-one Gamma with a unit diagonal is w_j / w_i for some w, unique up to a
factor, so of the paper's N^2 - N numbers N - 1 are free, and beta cancels.
Eq. 16 prints gamma_j for gamma_ij. Taken as printed, Gamma_ij = gamma_j / beta off the diagonal,
which for N >= 3 has rank one only if all are beta. Eq. 18 as printed has gamma_i2 for gamma_i1.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, contradiction, from_odds, positive, rng, table, to_odds, whole
from theory.lemma1 import matrix


def contradicting_reference(gamma: Tensor, beta: float, i: int, j: int) -> Tensor:
    """A reference (L, 2) on which pi* has log-odds +1 in language i and -1 in language j.

    gamma: (L, L), such that rows i and j of Gamma are not proportional.
    """
    Gamma = gamma / beta + torch.eye(len(gamma), dtype=torch.double)  # Eq. 17
    wanted = torch.tensor([1.0, -1.0], dtype=torch.double)
    odds = torch.linalg.pinv(Gamma[[i, j]]) @ wanted
    return from_odds(odds)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, gaps, misjudged, printed = rng(seed), [], 0, 0
    for _ in range(draws):
        L, beta = whole(g, 3, 6), float(positive(g))
        ref, w = table(g, L, whole(g, 2, 8)), positive(g, L)
        gamma = dco.gamma_from_trust(w, beta)
        best = dco.optimal_policy(ref, gamma, beta)
        consensus = ((w[:, None] * ref).sum(0) / w[:, None]).log_softmax(-1)
        u = positive(g, L)  # any rank-one Gamma with a unit diagonal, and the trust it is
        rank_one = beta * (u[:, None] / u).fill_diagonal_(0)
        w_of_it = torch.cat([torch.ones(1), rank_one[0, 1:] / beta])
        free = positive(g, L, L).fill_diagonal_(0)
        bad = contradicting_reference(free, beta, 0, 1)
        odds = to_odds(dco.optimal_policy(bad, free, beta))[:2]
        gaps.append(
            [
                float(x.abs().max())
                for x in (
                    contradiction(best),
                    best - consensus,
                    dco.gamma_from_trust(w_of_it, beta) - rank_one,
                    odds - torch.tensor([1.0, -1.0]),
                )
            ]
        )
        gamma_1, gamma_2 = positive(g, 2).tolist()
        misjudged += not dco.is_consistent(rank_one, beta) or dco.is_consistent(free, beta)
        misjudged += not dco.is_consistent(matrix(gamma_1, beta**2 / gamma_1), beta)
        misjudged += dco.is_consistent(matrix(gamma_1, gamma_2), beta)
        columns = positive(g, L).expand(L, L).clone().fill_diagonal_(0)  # Eq. 16, as printed
        printed += dco.is_consistent(columns, beta)
        printed += not dco.is_consistent(torch.full((L, L), beta).fill_diagonal_(0), beta)
    alike, pooled, onto, converse = torch.tensor(gaps).amax(0).tolist()
    yield Finding("no pair of answers is contradicted between any two languages", draws, alike)
    yield Finding(
        "converse: two rows not proportional, and the reference built for them makes pi* "
        "say +1 and -1",
        draws,
        converse,
    )
    yield Finding("trust: log pi*_i = (1 / w_i) sum_j w_j log pi_REF,j + const", draws, pooled)
    yield Finding("trust reaches every positive rank-one Gamma", draws, onto)
    yield Finding(
        "is_consistent tells these apart, and for N = 2 is Lemma 1 (gap: errors)", draws, misjudged
    )
    yield Finding(
        "Eq. 16 as printed, N >= 3: never of rank one, but for gamma_j = beta (gap: exceptions)",
        draws,
        printed,
    )
