"""Lemma 1: two languages rank alike iff gamma_1 gamma_2 = beta^2.

Why (App. D.1). Let (a, b) be the log-odds of a pair of answers under the reference in the two
languages, and G_i = gamma_i / beta. By Eq. 9 its log-odds under pi* are

    (a + G_1 b, b + G_2 a),    in matrix form Gamma (a, b).

If G_1 G_2 = 1, the second is G_2 times the first; G_2 > 0, so both have one sign, for every pair of
answers, ties included. The converse is not in the paper: otherwise det Gamma = 1 - G_1 G_2 is not
zero, Gamma is invertible, and the reference with log-odds Gamma^-1 (1, -1) is one on which pi*
prefers the first answer by a nat in one language and the second by a nat in the other. However
near gamma_1 gamma_2 is to beta^2, such a reference exists; it only becomes more extreme.
The sign matters, too: with both gammas negative and the right product, G_2 < 0 turns one language's
ranking upside down. The paper has its gammas in R+.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, contradiction, from_odds, margins, positive, rng, table, to_odds, whole


def matrix(gamma_1: float, gamma_2: float) -> Tensor:
    """gamma of Eq. 15 from the two gammas of Eq. 6."""
    return torch.tensor([[0, gamma_1], [gamma_2, 0]], dtype=torch.double)


def contradicting_reference(gamma_1: float, gamma_2: float, beta: float) -> Tensor:
    """A reference (2, 2) on which pi* has log-odds +1 in one language, -1 in the other."""
    Gamma = matrix(gamma_1, gamma_2) / beta + torch.eye(2)
    odds = torch.linalg.solve(Gamma, torch.tensor([1.0, -1.0], dtype=torch.double))
    return from_odds(odds)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, gaps = rng(seed), []
    wanted = torch.tensor([1.0, -1.0], dtype=torch.double)
    for _ in range(draws):
        gamma_1, beta, off = (float(positive(g)) for _ in range(3))
        ref = table(g, 2, whole(g, 2, 8))
        best = dco.optimal_policy(ref, matrix(gamma_1, beta**2 / gamma_1), beta)
        line = margins(best[1]) - beta / gamma_1 * margins(best[0])
        gamma_2 = beta**2 / gamma_1 * (1 + off)  # or the other way round, beside beta^2 / gamma_1
        gamma_2 = gamma_2 if whole(g, 0, 1) else beta**4 / gamma_1**2 / gamma_2
        bad = contradicting_reference(gamma_1, gamma_2, beta)
        odds = to_odds(dco.optimal_policy(bad, matrix(gamma_1, gamma_2), beta))
        upside = dco.optimal_policy(ref, matrix(-gamma_1, -(beta**2) / gamma_1), beta)
        turned = margins(upside[1]) + beta / gamma_1 * margins(upside[0])
        gaps.append(
            [float(x.abs().max()) for x in (contradiction(best), line, odds - wanted, turned)]
        )
    alike, line, converse, turned = torch.tensor(gaps).amax(0).tolist()
    a, b = to_odds(bad).tolist()
    yield Finding("no pair of answers is contradicted (gap in nats of log-odds)", draws, alike)
    yield Finding(
        "pi*'s log-odds in language 2 are gamma_2 / beta times those in language 1", draws, line
    )
    yield Finding(
        "converse: where gamma_1 gamma_2 is not beta^2, the reference built for it makes "
        "pi* say +1 and -1",
        draws,
        converse,
        shown=(
            f"gamma = ({gamma_1:.3f}, {gamma_2:.3f}), beta = {beta:.3f}: reference "
            f"log-odds ({a:+.3f}, {b:+.3f}), pi* ({odds[0]:+.3f}, {odds[1]:+.3f})"
        ),
    )
    yield Finding(
        "with negative gammas and that product, language 2 ranks upside down", draws, turned
    )
