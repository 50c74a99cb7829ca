"""App. C: exact matching is too strict; equal trust demands it all the same.

Why. Let one language's log-odds be c > 0 times the other's: Def. 1 holds, for each pair has one
sign. Yet hold language 1 by beta KL(pi || pi_REF,1) and pull it by penalty KL(pi || pi_REF,2): the
sum is (beta + penalty) KL(pi || mixed) + const, where mixed has the mean of their log-odds, so
weighted: the optimum moves a language that contradicts nothing. DCO lets each keep its temperature:
under Lemma 3 log-odds in language i are w_j / w_i times those in j.
From which follows what App. C does not say. With equal trust, the paper's gamma = beta = 1, that
factor is 1, and pi* is one and the same *distribution* in every language: the match that App. C
argues against. Languages differ in sharpness under pi* only if they differ in trust.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, contradiction, kl, margins, positive, rng, table


def penalised(logps: Tensor, ref: Tensor, beta: float, penalty: float) -> Tensor:
    """Language 1's objective with exact matching in place of a reward: (..., K), (..., 2, K)."""
    return -beta * kl(logps, ref[..., 0, :]) - penalty * kl(logps, ref[..., 1, :])


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, beta, penalty = rng(seed), 0.5, 1.5
    one, c = table(g, draws, 5), 1.5 + positive(g, draws, 1)  # language 2 is the surer one
    ref = torch.stack([one, (c * one).log_softmax(-1)], 1)
    yield Finding(
        "one ranking at two temperatures is consistent (Def. 1)",
        draws,
        float(contradiction(ref).abs().max()),
    )
    mixed = ((beta * ref[:, 0] + penalty * ref[:, 1]) / (beta + penalty)).log_softmax(-1)
    best, rest = (penalised(x, ref, beta, penalty) for x in (mixed, ref[:, 0]))
    gap = best - rest - (beta + penalty) * kl(ref[:, 0], mixed)
    stayed = int((kl(mixed, ref[:, 0]) < 1e-6).sum())
    yield Finding(
        "exact matching prefers the mean of the log-odds to it, by (beta + penalty) KL",
        draws,
        float(gap.abs().max()) + stayed,
        shown=(f"moved for nothing: mean KL {kl(mixed, ref[:, 0]).mean():.3f} nats"),
    )
    w = positive(g, 2)
    policy = dco.optimal_policy(table(g, draws, 2, 5), dco.gamma_from_trust(w, beta), beta)
    scaled = margins(policy[:, 1]) - w[0] / w[1] * margins(policy[:, 0])
    yield Finding(
        "pi* lets them differ: log-odds in language 2 are w_1 / w_2 times those in 1",
        draws,
        float(scaled.abs().max()),
    )
    ones = torch.ones(4, 4, dtype=torch.double).fill_diagonal_(0)
    policy = dco.optimal_policy(table(g, draws, 4, 5), ones, 1.0)
    yield Finding(
        "but with equal trust, gamma = beta = 1, it is one distribution in all of them",
        draws,
        float((policy - policy[:, :1]).abs().max()),
    )
