"""App. K: on the way to pi* CLC never falls for two languages; for more it may.

Why. "DCO is capable of improving CLC under any direction parameter setups": at pi* by Lemma 3, but
one epoch stops long before pi*. Part of the way, language i has log pi_REF,i + t_i r_i / beta, each
at its own speed, 0 <= t_i <= 1. Under Lemma 1 a pair of answers with reference log-odds (a, b) then
has (a + t_1 G b, b + t_2 a / G). If a and b have one sign, so have these: what the languages agree
on is never lost. If not, language 1 turns at t_1 G |b| = |a| and language 2 at t_2 |a| / G = |b|;
both together would need t_1 t_2 > 1. So each exchange of neighbours in a ranking puts two answers
into the order of the other language. Say x falls from place j and y rises to it. P@j (App. I) gains
[y in the other's top j] - [x in it] >= 0, for the other ranks y above x; no other P@ changes. So
RankC never falls, question by question. (Our own; a network's way is not as straight as a table's.)
With three languages an agreement of two may be against the consensus. They turn at different times,
and in between they contradict each other: their RankC falls, now and then the mean over pairs, too.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
import rankc
from theory import Finding, from_odds, off, positive, rng, table, to_odds, vector, whole, worst


def part_way(ref_logps: Tensor, gamma: Tensor, t: Tensor) -> Tensor:
    """Log-probs, beta = 1, with language i at share t_i of its way: (L, K), (S, L) -> (S, L, K)."""
    return (ref_logps + t[..., None] * dco.align_reward(ref_logps, gamma)).log_softmax(-1)


def agreement(path: Tensor) -> Tensor:
    """RankC, the mean over pairs of languages, at each step: (S, L, K) -> (S,)."""
    pairs = torch.combinations(torch.arange(path.shape[1]))
    return torch.stack([rankc.rankc(path[:, i], path[:, j]) for i, j in pairs]).mean(0)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, fell, apart, dips = rng(seed), 0.0, 0.0, 0
    for _ in range(draws):
        K = whole(g, 3, 8)
        ref, gamma = table(g, 2, K), dco.gamma_from_trust(positive(g, 2), 1.0)
        speed = torch.rand(200, 2, generator=g, dtype=torch.double).cumsum(0)  # uneven, never back
        clc = agreement(part_way(ref, gamma, speed / speed[-1]))
        fell, apart = worst(fell, -clc.diff()), worst(apart, 1 - clc[-1])
        ref, gamma = table(g, 3, K), dco.gamma_from_trust(positive(g, 3), 1.0)
        clc = agreement(part_way(ref, gamma, torch.arange(201).double()[:, None] / 200))
        dips += bool(clc.diff().min() < -1e-9)
        apart = worst(apart, 1 - clc[-1])
    words = "two languages, any trust, any speeds: RankC never falls, question by question"
    yield Finding(words, draws, fell)
    yield Finding("two or three languages: RankC is 1 in the end", draws, apart)
    odds, t = vector(1, 2, 3, -30), vector(0, 0.05, 1)[:, None]  # three agree; the sum is -24
    path = part_way(from_odds(odds), 1 - torch.eye(4, dtype=torch.double), t)  # equal trust
    low = rankc.chance(2) * 2 - 1  # RankC of two answers in opposite order
    agreeing = vector(3, 2, 6)  # of 6 pairs
    at_t = to_odds(path[1]) - (0.95 * odds - 0.05 * 24)
    gap = off(at_t, agreement(path) - low - agreeing / 6 * (1 - low))
    words = "four at log-odds (1, 2, 3, -30): 3 of 6 pairs agree, at t = 0.05 only 2, then 6"
    shown = f"of three random languages the mean RankC falls in {dips} of {draws} draws"
    yield Finding(words, 1, gap, shown=shown)
