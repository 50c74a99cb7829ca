"""App. C: exact matching is too strict; equal trust demands it all the same.

Why. Let one language's log-odds be c > 0 times the other's: Def. 1 holds, for each pair has one
sign. Yet hold language 1 by beta KL(pi || pi_REF,1) and pull it by penalty KL(pi || pi_REF,2): the
sum is (beta + penalty) KL(pi || mixed) + const, where mixed has the mean of their log-odds, so
weighted: the optimum moves a language that contradicts nothing. DCO lets temperatures differ: under
Lemma 3 log-odds in language i are w_j / w_i times those in j.
App. C does not say what follows: with equal trust, the paper's gamma = beta = 1, that factor is 1,
and pi* is one and the same *distribution* in every language, the match that App. C argues against.
Languages differ in sharpness under pi* only if they differ in trust.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, contradiction, kl, margins, off, positive, rng, table


def penalised(logps: Tensor, ref: Tensor, beta: float, penalty: float) -> Tensor:
    """Language 1's objective with exact matching in place of a reward: (..., K), (..., 2, K)."""
    return -beta * kl(logps, ref[..., 0, :]) - penalty * kl(logps, ref[..., 1, :])


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, beta, penalty = rng(seed), 0.5, 1.5
    one, c = table(g, draws, 5), 1.5 + positive(g, draws, 1)  # language 2 is the surer one
    ref = torch.stack([one, (c * one).log_softmax(-1)], 1)
    words = "one ranking at two temperatures is consistent (Def. 1)"
    yield Finding(words, draws, off(contradiction(ref)))
    mixed = ((beta * ref[:, 0] + penalty * ref[:, 1]) / (beta + penalty)).log_softmax(-1)
    best, rest = (penalised(x, ref, beta, penalty) for x in (mixed, ref[:, 0]))
    gap = off(best - rest - (beta + penalty) * kl(ref[:, 0], mixed))
    moved = kl(mixed, ref[:, 0])
    words = "exact matching prefers the mean of the log-odds to it, by (beta + penalty) KL"
    shown = f"moved for nothing: mean KL {moved.mean():.3f} nats"
    yield Finding(words, draws, gap + int((moved < 1e-6).sum()), shown=shown)
    w = positive(g, 2)
    policy = dco.optimal_policy(table(g, draws, 2, 5), dco.gamma_from_trust(w, beta), beta)
    gap = off(margins(policy[:, 1]) - w[0] / w[1] * margins(policy[:, 0]))
    words = "pi* lets them differ: log-odds in language 2 are w_1 / w_2 times those in 1"
    yield Finding(words, draws, gap)
    equal = 1 - torch.eye(4, dtype=torch.double)
    policy = dco.optimal_policy(table(g, draws, 4, 5), equal, 1.0)
    words = "but with equal trust, gamma = beta = 1, it is one distribution in all of them"
    yield Finding(words, draws, off(policy - policy[:, :1]))
