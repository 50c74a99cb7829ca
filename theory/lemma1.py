"""Lemma 1: for every reference two languages rank alike iff gamma_1 gamma_2 = beta^2.

Why (App. D.1). Let (a, b) be the log-odds of a pair of answers under the reference in the two
languages, and G_i = gamma_i / beta. By Eq. 9 its log-odds under pi* are

    (a + G_1 b, b + G_2 a),    in matrix form Gamma (a, b).

If G_1 G_2 = 1, the second is G_2 times the first; G_2 > 0, so both have one sign, for every pair of
answers, ties included. The converse is not in the paper: otherwise det Gamma = 1 - G_1 G_2 is not
zero, Gamma is invertible, and on the reference with log-odds Gamma^-1 (1, -1) pi* prefers the first
answer by a nat in one language and the second by a nat in the other. However near gamma_1 gamma_2
is to beta^2, such a reference exists; it only becomes more extreme.
The sign matters, too: with both gammas negative and the right product, G_2 < 0 turns one language's
ranking upside down. The paper has its gammas in R+.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, contradiction, from_odds, margins, off, positive, rng, table, whole

OPPOSED = torch.tensor([1.0, -1.0], dtype=torch.double)  # log-odds of two languages that disagree


def matrix(gamma_1: float, gamma_2: float) -> Tensor:
    """gamma of Eq. 15 from the two gammas of Eq. 6."""
    return torch.tensor([[0, gamma_1], [gamma_2, 0]], dtype=torch.double)


def contradicting_reference(gamma_1: float, gamma_2: float, beta: float) -> Tensor:
    """A reference (2, 2) on which pi* has log-odds +1 in one language, -1 in the other."""
    Gamma = matrix(gamma_1, gamma_2) / beta + torch.eye(2)
    return from_odds(torch.linalg.solve(Gamma, OPPOSED))


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, gaps = rng(seed), []
    for _ in range(draws):
        gamma_1, beta, more = (float(positive(g)) for _ in range(3))
        right, ref = beta**2 / gamma_1, table(g, 2, whole(g, 2, 8))
        best = dco.optimal_policy(ref, matrix(gamma_1, right), beta)
        line = margins(best[1]) - beta / gamma_1 * margins(best[0])
        gamma_2 = right * (1 + more) if whole(g, 0, 1) else right / (1 + more)
        bad = contradicting_reference(gamma_1, gamma_2, beta)
        said = margins(dco.optimal_policy(bad, matrix(gamma_1, gamma_2), beta))[:, 0, 1]  # log-odds
        upside = dco.optimal_policy(ref, matrix(-gamma_1, -right), beta)
        turned = margins(upside[1]) + beta / gamma_1 * margins(upside[0])
        gaps.append([off(x) for x in (contradiction(best), line, said - OPPOSED, turned)])
    alike, line, converse, turned = torch.tensor(gaps).amax(0).tolist()
    yield Finding("no pair of answers is contradicted (gap in nats of log-odds)", draws, alike)
    words = "pi*'s log-odds in language 2 are gamma_2 / beta times those in language 1"
    yield Finding(words, draws, line)
    words = (
        "converse: if gamma_1 gamma_2 is not beta^2, pi* says +1, -1 on a reference built for it"
    )
    (a, b), (x, y) = margins(bad)[:, 0, 1].tolist(), said.tolist()
    shown = (
        f"gamma = ({gamma_1:.3f}, {gamma_2:.3f}), beta = {beta:.3f}: reference log-odds "
        f"({a:+.3f}, {b:+.3f}), pi* ({x:+.3f}, {y:+.3f})"
    )
    yield Finding(words, draws, converse, shown=shown)
    words = "with negative gammas and that product, language 2 ranks upside down"
    yield Finding(words, draws, turned)
