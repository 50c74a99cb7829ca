"""Sec. 6.5: calibrated experts gain by pooling; a vote, or a boast, can lose.

Why. Let the true answer y be drawn evenly, and each language see evidence e_i of its own, unrelated
given y, and report it honestly: pi_REF,i(y) = P(y | e_i). By Bayes P(y | e_1 .. e_N) is
proportional to prod_i P(y | e_i), which is pi* with equal trust (Eq. 10, gamma = beta). So its top
answer is right at least as often as that of any rule that sees less: one language, fewer languages,
or a vote (CALM, sec. 2), which forgets how sure each is and can lose by its weak voters.
Sec. 6.5 assumes honesty (wrong answers have high entropy). A language that overstates its log-odds
by a factor s_i breaks it: a weak one that is sure outvotes a strong one, and pi* is worse than
English alone. So do two languages that repeat the same evidence. Trust mends both: with w_i =
1 / s_i, or 1 / 2 for each of the two, the consensus is the posterior again. *Trust a language less
the more it overstates*; the column `optimum` of a run shows, before a step is taken, whether to.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

import dco
from theory import Finding, off, positive, rng, table, vector, worst


def world(likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """All evidence e that L languages may see: P(e, y) (E, K), and honest log P(y | e_i) (E, L, K).

    likelihood: (L, S, K), P(e_i | y) of each of S signals.
    """
    L, S, K = likelihood.shape
    seen = torch.tensor(list(product(range(S), repeat=L)))  # (E, L)
    told = likelihood[torch.arange(L), seen]  # (E, L, K)
    return told.prod(1) / K, told.log().log_softmax(-1)


def symmetric(shares: list[float], K: int) -> Tensor:
    """Languages that see the true answer with these shares, and else any other: (L, K, K)."""
    eye = torch.eye(K, dtype=torch.double)
    return torch.stack([a * eye + (1 - a) / (K - 1) * (1 - eye) for a in shares])


def pool(reports: Tensor, boast: Tensor | float = 1.0) -> Tensor:
    """log pi*, each language trusted by 1 / its boast, all alike by default: (E, L, K) -> same."""
    trust = torch.ones(reports.shape[1], dtype=torch.double) / boast
    return dco.optimal_policy(reports, dco.gamma_from_trust(trust, 1.0), 1.0)


def accuracy(joint: Tensor, *answers: Tensor) -> Tensor:
    """P(true) of each column of answers: P(e, y) (E, K), answers (E,) or (E, M) -> (sum of M,)."""
    return joint.gather(1, torch.column_stack(answers)).sum(0)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, bayes, short, mended = rng(seed), 0.0, 0.0, 0.0
    for _ in range(draws):
        joint, honest = world(table(g, 3, 4, 3).exp().transpose(1, 2))
        posterior, pooled = (joint / joint.sum(-1, keepdim=True)).log(), pool(honest)
        bayes = worst(bayes, off(pooled - posterior[:, None]))
        fewer, vote = pool(honest[:, :2])[:, 0].argmax(-1), dco.majority_vote(honest)[0]
        right = accuracy(joint, pooled[:, 0].argmax(-1), honest.argmax(-1), fewer, vote)
        short = worst(short, right[1:] - right[0])
        s = positive(g, 3)
        consensus = pool((honest * s[:, None]).log_softmax(-1), s)[:, 0] / s[0]
        mended = worst(mended, off(consensus.log_softmax(-1) - posterior))
    yield Finding("honest, unrelated experts: pi* is the Bayes posterior", draws, bayes)
    words = "right no less often than each language, than fewer, than their vote (gap: shortfall)"
    yield Finding(words, draws, short)
    yield Finding("languages that overstate: trust 1 / s_i restores the posterior", draws, mended)
    (joint, reports), boast = world(symmetric([0.9, 0.5], 3)), vector(1, 10)
    boasted = (reports * boast[:, None]).log_softmax(-1)
    policies = reports, pool(reports), pool(boasted), pool(boasted, boast)
    found = accuracy(joint, *(policy[:, 0].argmax(-1) for policy in policies))  # of language 1
    words = "right at 0.9 with one at 0.5: 0.9; if it boasts tenfold: 0.5; with trust 1 / 10: 0.9"
    yield Finding(words, 1, off(found - vector(0.9, 0.9, 0.5, 0.9)))
    joint, reports = world(symmetric([0.7, 0.6], 3))
    twice = reports[:, [0, 1, 1]]  # the weaker one's evidence, told in two languages
    policies = pool(reports), pool(twice), pool(twice, vector(1, 2, 2))
    found = accuracy(joint, *(policy[:, 0].argmax(-1) for policy in policies))
    words = "right at 0.7 with one at 0.6: 0.7; that one told twice: 0.6; with trust 1 / 2: 0.7"
    yield Finding(words, 1, off(found - vector(0.7, 0.6, 0.7)))
    joint, reports = world(symmetric([0.9, 0.4, 0.4], 4))
    found = accuracy(joint, dco.majority_vote(reports)[0], pool(reports)[:, 0].argmax(-1))
    lost, won = 0.9 * 3 * 0.2**2, 0.1 * 0.4**2  # both weak at one wrong answer, at the right
    words = "right at 0.9 with two right at 0.4, of 4 answers: their vote 0.808, pi* 0.9"
    yield Finding(words, 1, off(found - vector(0.9 - lost + won, 0.9)))
