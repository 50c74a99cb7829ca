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

import torch
from torch import Generator, Tensor

import dco
from theory import check
from theory.toys import (
    contradiction,
    from_odds,
    margins,
    positive,
    random_int,
    table,
    to_odds,
    vector,
)

OPPOSED = vector(1, -1)  # log-odds of two languages that disagree


def matrix(gamma_1: float, gamma_2: float) -> Tensor:
    """gamma of Eq. 15 from the two gammas of Eq. 6."""
    return torch.tensor([[0, gamma_1], [gamma_2, 0]], dtype=torch.double)


def contradicting_reference(gamma_1: float, gamma_2: float, beta: float) -> Tensor:
    """A reference (2, 2) on which pi* has log-odds +1 in one language, -1 in the other."""
    Gamma = matrix(gamma_1, gamma_2) / beta + torch.eye(2)
    return from_odds(torch.linalg.solve(Gamma, OPPOSED))


def reference_and_gammas(g: Generator) -> tuple[Tensor, float, float, float]:
    """Any reference (2, K), and gamma_1, gamma_2, beta with gamma_1 gamma_2 = beta^2."""
    gamma_1, beta = positive(g, 2).tolist()
    return table(g, 2, random_int(g, 2, 8)), gamma_1, beta**2 / gamma_1, beta


@check
def the_two_languages_rank_alike(g: Generator) -> Tensor:
    """If gamma_1 gamma_2 = beta^2, pi* contradicts itself on no pair of answers."""
    ref, gamma_1, gamma_2, beta = reference_and_gammas(g)
    return contradiction(dco.optimal_policy(ref, matrix(gamma_1, gamma_2), beta))


@check
def one_languages_log_odds_are_a_multiple_of_the_others(g: Generator) -> Tensor:
    """pi*'s log-odds in language 2 are then gamma_2 / beta times those in language 1."""
    ref, gamma_1, gamma_2, beta = reference_and_gammas(g)
    first, second = margins(dco.optimal_policy(ref, matrix(gamma_1, gamma_2), beta))
    return second - gamma_2 / beta * first


@check
def another_product_contradicts_itself_somewhere(g: Generator) -> tuple[Tensor, str]:
    """Converse: if it is not beta^2, pi* says +1, -1 on the reference Gamma^-1 (1, -1)."""
    _, gamma_1, gamma_2, beta = reference_and_gammas(g)
    excess = 1 + float(positive(g))
    gamma_2 = gamma_2 * excess if random_int(g, 0, 1) else gamma_2 / excess
    ref = contradicting_reference(gamma_1, gamma_2, beta)
    policy = dco.optimal_policy(ref, matrix(gamma_1, gamma_2), beta)
    (a, b), (x, y) = to_odds(ref).tolist(), to_odds(policy).tolist()
    setting = f"gamma = ({gamma_1:.3f}, {gamma_2:.3f}), beta = {beta:.3f}"
    shown = f"{setting}: reference log-odds ({a:+.3f}, {b:+.3f}), pi* ({x:+.3f}, {y:+.3f})"
    return to_odds(policy) - OPPOSED, shown


@check
def negative_gammas_turn_one_ranking_upside_down(g: Generator) -> Tensor:
    """With negative gammas and that product, language 2 ranks upside down."""
    ref, gamma_1, gamma_2, beta = reference_and_gammas(g)
    first, second = margins(dco.optimal_policy(ref, matrix(-gamma_1, -gamma_2), beta))
    return second + gamma_2 / beta * first
