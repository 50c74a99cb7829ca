"""App. C: exact matching is too strict; equal trust demands it all the same.

Why. Let one language's log-odds be c > 0 times the other's: Def. 1 holds, for each pair has one
sign. Yet hold language 1 by beta KL(pi || pi_REF,1) and pull it by penalty KL(pi || pi_REF,2): the
sum is (beta + penalty) KL(pi || mixed) + const, where mixed has the mean of their log-odds, so
weighted: the optimum moves a language that contradicts nothing. DCO lets temperatures differ: under
Lemma 3 log-odds in language i are w_j / w_i times those in j.
App. C's 0.8991 and 0.1283 for one Paris were measured (Gemma 3 12B): no computation gives them. If
German spreads the rest over 7 other answers or more, Paris is first in both and nothing needs to
move; an exact match takes English from 0.90 to 0.53.
App. C does not say what follows: with equal trust, the paper's gamma = beta = 1, that factor is 1,
and pi* is one and the same *distribution* in every language, the match that App. C argues against.
Languages differ in sharpness under pi* only if they differ in trust.
"""

import torch
from torch import Generator, Tensor

import dco
from theory import check, worst
from theory.lemma1 import matrix
from theory.toys import contradiction, kl, margins, positive, table, vector


def one_ranking_at_two_temperatures(g: Generator) -> Tensor:
    """A reference (2, 5): language 2's log-odds are c > 1.5 times language 1's."""
    logps, c = table(g, 5), 1.5 + positive(g)
    return torch.stack([logps, (c * logps).log_softmax(-1)])


def penalised(logps: Tensor, ref: Tensor, beta: float, penalty: float) -> Tensor:
    """Language 1's objective with exact matching in place of a reward: (..., K), (2, K)."""
    return -beta * kl(logps, ref[0]) - penalty * kl(logps, ref[1])


def matched(ref: Tensor, beta: float, penalty: float) -> Tensor:
    """The mean of both languages' log-odds, weighted so: (2, K) -> (K,)."""
    return ((beta * ref[0] + penalty * ref[1]) / (beta + penalty)).log_softmax(-1)


@check
def temperature_alone_contradicts_nothing(g: Generator) -> Tensor:
    """One ranking at two temperatures is consistent (Def. 1)."""
    return contradiction(one_ranking_at_two_temperatures(g))


@check
def exact_matching_moves_it_all_the_same(g: Generator) -> float:
    """Exact matching prefers the mean of the log-odds to it, by (beta + penalty) KL, above 0."""
    ref = one_ranking_at_two_temperatures(g)
    beta, penalty = positive(g, 2).tolist()
    best = matched(ref, beta, penalty)
    lead = penalised(best, ref, beta, penalty) - penalised(ref[0], ref, beta, penalty)
    return worst(lead - (beta + penalty) * kl(ref[0], best), not lead > 0)


def paris(others: int) -> Tensor:
    """App. C's two languages, where other answers share what is left alike: (2, 1 + others)."""
    p = vector(0.8991, 0.1283)[:, None]
    return torch.cat([p, (1 - p).expand(2, others) / others], -1).log()


@check
def app_cs_paris() -> float:
    """App. C's Paris beside 7 other answers, alike: consistent; exact matching moves it to 0.5338
    in both languages, pi* with equal trust to 0.9018. Beside 6 the reference contradicts itself."""
    match = float(matched(paris(7), 1.0, 1.0)[0].exp())
    pooled = dco.optimal_policy(paris(7), matrix(1.0, 1.0), 1.0)
    english, german = pooled[:, 0].exp().tolist()
    gaps = [round(match, 4) - 0.5338, round(english, 4) - 0.9018, round(german, 4) - 0.9018]
    return worst(*gaps, contradiction(paris(7)), not contradiction(paris(6)) > 0.1)


@check
def pi_star_lets_temperatures_differ(g: Generator) -> Tensor:
    """pi* lets them differ: log-odds in language 2 are w_1 / w_2 times those in 1."""
    w, beta = positive(g, 2), float(positive(g))
    policy = dco.optimal_policy(table(g, 2, 5), dco.gamma_from_trust(w, beta), beta)
    return margins(policy[1]) - w[0] / w[1] * margins(policy[0])


@check
def equal_trust_is_one_distribution(g: Generator) -> Tensor:
    """But with equal trust, gamma = beta = 1, it is one distribution in all of them."""
    equal = 1 - torch.eye(4, dtype=torch.double)
    policy = dco.optimal_policy(table(g, 4, 5), equal, 1.0)
    return policy - policy[0]
