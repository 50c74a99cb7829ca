"""Sec. 6.5: calibrated experts gain by pooling; a vote, or a boast, can lose.

Why. Let the true answer y be drawn evenly, each language see evidence e_i of its own, unrelated
given y, and report it honestly: pi_REF,i(y) = P(y | e_i). By Bayes P(y | e_1 .. e_N) is
proportional to prod_i P(y | e_i), which is pi* with equal trust (Eq. 10, gamma = beta). Its top
answer is therefore right at least as often as that of any rule that sees less: one language, fewer
of them, or a vote (CALM, sec. 2), which forgets how sure each is and can lose by its weak voters.
Honesty is what sec. 6.5 assumes (wrong answers have high entropy). A language that overstates its
log-odds by a factor s_i breaks it: a weak one that is sure outvotes a strong one, and pi* is worse
than English alone. So do two languages that repeat the same evidence. Trust mends the first: with
w_i = 1 / s_i the consensus is the posterior again, so *trust a language less the more it
overstates*; the row `optimum` of a run shows, before a step is taken, whether it should be.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

import dco
from theory import Finding, positive, rng, table, worst


def world(likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """All evidence e that L languages may see: P(e, y) (E, K), and honest log P(y | e_i) (E, L, K).

    likelihood: (L, S, K), P(e_i | y) of each of S signals.
    """
    L, S, K = likelihood.shape
    seen = torch.tensor(list(product(range(S), repeat=L)))  # (E, L)
    told = likelihood[torch.arange(L), seen]  # (E, L, K)
    return told.prod(1) / K, told.log().log_softmax(-1)


def accuracy(joint: Tensor, scores: Tensor) -> Tensor:
    """P(the top answer is true), over all evidence: (E, K), (E, ..., K) -> (...,)."""
    top = scores.argmax(-1, keepdim=True)
    joint = joint.view(len(joint), *[1] * (scores.dim() - 2), -1).expand_as(scores)
    return joint.gather(-1, top)[..., 0].sum(0)


def pool(reports: Tensor, trust: Tensor | None = None) -> Tensor:
    """log pi*, by default of equal trust: (E, L, K) -> (E, L, K)."""
    trust = torch.ones(reports.shape[-2], dtype=torch.double) if trust is None else trust
    return dco.optimal_policy(reports, dco.gamma_from_trust(trust, 1.0), 1.0)


def vote(reports: Tensor) -> Tensor:
    """CALM's target, as scores that it leads: (E, L, K) -> (E, K)."""
    return torch.nn.functional.one_hot(dco.majority_vote(reports)[0], reports.shape[-1])


def symmetric(shares: list[float], K: int) -> Tensor:
    """Languages that see the true answer with these shares, and else any other: (L, K, K)."""
    eye = torch.eye(K, dtype=torch.double)
    return torch.stack([a * eye + (1 - a) / (K - 1) * (1 - eye) for a in shares])


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, posterior_gap, short, mended = rng(seed), 0.0, 0.0, 0.0
    for _ in range(draws):
        joint, honest = world(table(g, 3, 4, 3).exp().transpose(1, 2))
        posterior = (joint / joint.sum(-1, keepdim=True)).log()
        pooled = pool(honest)
        posterior_gap = worst(posterior_gap, (pooled - posterior[:, None]).abs())
        others = torch.cat(
            [
                accuracy(joint, honest),
                accuracy(joint, pool(honest[:, :2])),
                accuracy(joint, vote(honest))[None],
            ]
        )
        short = worst(short, others - accuracy(joint, pooled)[0])
        s = positive(g, 3)
        reports = (honest * s[:, None]).log_softmax(-1)
        consensus = pool(reports, 1 / s)[:, 0] / s[0]
        mended = worst(mended, (consensus.log_softmax(-1) - posterior).abs())
    yield Finding("honest, unrelated experts: pi* is the Bayes posterior", draws, posterior_gap)
    yield Finding(
        "so it is right no less often than each language, than fewer, than their vote "
        "(gap: shortfall)",
        draws,
        short,
    )
    yield Finding("languages that overstate: trust 1 / s_i restores the posterior", draws, mended)
    joint, reports = world(symmetric([0.9, 0.5], 3))
    boast = torch.tensor([1.0, 10.0], dtype=torch.double)
    boasted = (reports * boast[:, None]).log_softmax(-1)
    found = torch.stack(
        [
            accuracy(joint, x)[0]
            for x in (reports, pool(reports), pool(boasted), pool(boasted, 1 / boast))
        ]
    )
    by_hand = torch.tensor([0.9, 0.9, 0.5, 0.9], dtype=torch.double)
    yield Finding(
        "right at 0.9 with one right at 0.5: 0.9; if it overstates tenfold, 0.5; with "
        "trust 1 / 10, 0.9",
        1,
        float((found - by_hand).abs().max()),
    )
    joint, reports = world(symmetric([0.9, 0.4, 0.4], 4))
    found = torch.stack([accuracy(joint, vote(reports)), accuracy(joint, pool(reports))[0]])
    lost, won = 0.9 * 3 * 0.2**2, 0.1 * 0.4**2  # both weak at one wrong answer, at the right
    by_hand = torch.tensor([0.9 - lost + won, 0.9], dtype=torch.double)
    yield Finding(
        "right at 0.9 with two right at 0.4, of 4 answers: their vote 0.808, pi* 0.9",
        1,
        float((found - by_hand).abs().max()),
    )
