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
All this holds pair by pair, so pairs may have speeds of their own, and descent of Eq. 11 over all
pairs, in small steps, is such a way: it pulls d_w and d_l (lemma2.py) together, faster the more
answers lie between them, and never apart. Over one pair alone it is not: its two answers pass by a
third, and what the languages agree on about that one may be lost, for as long as its pairs wait.
With three languages an agreement of two may be against the consensus. They turn at different times,
and in between they contradict each other: their RankC falls, now and then the mean over pairs, too.
"""

import torch
from torch import Generator, Tensor

import dco
import rankc
from theory import check, worst
from theory.lemma1 import matrix
from theory.lemma2 import minimise_loss_over
from theory.toys import from_odds, path_of_descent, positive, random_int, table, to_odds, vector


def part_way(ref_logps: Tensor, gamma: Tensor, t: Tensor) -> Tensor:
    """Log-probs, beta = 1, with language i at share t_i of its way: (L, K), (S, L) -> (S, L, K)."""
    return (ref_logps + t[..., None] * dco.align_reward(ref_logps, gamma)).log_softmax(-1)


def agreement(path: Tensor) -> Tensor:
    """RankC, the mean over pairs of languages, at each step: (S, L, K) -> (S,)."""
    pairs = torch.combinations(torch.arange(path.shape[1]))
    return torch.stack([rankc.rankc(path[:, i], path[:, j]) for i, j in pairs]).mean(0)


def fall(path: Tensor) -> Tensor:
    """By how much RankC falls, each step of the path: (S, L, K) -> (S - 1,)."""
    return (-agreement(path).diff()).clamp(min=0)


def toy(g: Generator, L: int) -> tuple[Tensor, Tensor]:
    """A reference (L, K) and a gamma of Lemma 3, any trust, beta = 1."""
    return table(g, L, random_int(g, 3, 8)), dco.gamma_from_trust(positive(g, L), 1.0)


@check
def two_languages_never_lose_on_a_straight_way(g: Generator) -> Tensor:
    """Two languages, any trust, any speeds: RankC never falls, question by question."""
    ref, gamma = toy(g, 2)
    speed = torch.rand(200, 2, generator=g, dtype=torch.double).cumsum(0)  # uneven, never back
    return fall(part_way(ref, gamma, speed / speed[-1]))


@check
def nor_along_descent_of_eq_11(g: Generator, draws: int) -> tuple[float, str]:
    """Nor along subgradient descent of Eq. 11 over all pairs of answers, if pi* tells all apart by
    more than a few steps; the last ones, to and fro, may exchange two that are nearer."""
    steps, falls = 150, []
    for K in (3, 5, 8):
        refs = table(g, draws // 3 + 1, 2, K)
        gammas = [dco.gamma_from_trust(positive(g, 2), 1.0) for _ in refs]
        rewards = torch.stack([dco.align_reward(*pair) for pair in zip(refs, gammas)])
        widest = rewards.amax(-1) - rewards.amin(-1)  # (draws, 2), of all pairs
        step = widest / steps * K / 2  # the widest pair, the last one there, needs so many
        path = path_of_descent(  # (151, draws, 2, K)
            lambda logps: step * dco.dco_loss(logps, refs, rewards, 1.0), refs, [1.0] * steps
        )
        nearest = (refs + rewards).sort(-1).values.diff().amin(-1)  # (draws, 2), under pi*
        distinct = (nearest > 4 * widest / steps).all(-1)
        falls += [fall(path[:, i]).amax() for i in range(len(refs)) if distinct[i]]
    return worst(0.0, *falls), f"such a pi* in {len(falls)} of {3 * len(refs)} draws"


@check
def a_single_pair_may_lose_an_agreement() -> float:
    """Trained on one pair of three answers, RankC may fall: here from 0.88 to 0.33."""
    ref = torch.tensor([[0, -0.5, -0.4], [0, -1, -7]]).double().log_softmax(-1)  # 0 is first
    r, pair = dco.align_reward(ref, matrix(1.0, 1.0)), torch.tensor([[1, 2]])
    end = minimise_loss_over(pair, ref, ref, r, 1.0)  # in language 1, answer 1 rises above 0
    before, after = agreement(torch.stack([ref, end])).tolist()
    return worst(round(before, 2) - 0.88, round(after, 2) - 0.33)


@check
def in_the_end_rankc_is_1(g: Generator) -> float:
    """Two or three languages: RankC is 1 in the end."""
    end = torch.ones(1, 1, dtype=torch.double)
    two, three = (agreement(part_way(*toy(g, L), end)) for L in (2, 3))
    return worst(1 - two, 1 - three)


@check
def more_languages_may_lose_an_agreement(g: Generator, draws: int) -> tuple[float, str]:
    """Four at log-odds (1, 2, 3, -30): 3 of 6 pairs agree, at t = 0.05 only 2, then 6."""
    odds, t = vector(1, 2, 3, -30), vector(0, 0.05, 1)[:, None]
    path = part_way(from_odds(odds), 1 - torch.eye(4, dtype=torch.double), t)  # equal trust
    on_the_way = (1 - t[1]) * odds + t[1] * odds.sum()
    disagreeing = rankc.rankc(vector(0, 1)[None], vector(1, 0)[None])  # of two answers
    share = vector(3, 2, 6) / 6  # of the pairs of languages
    gap = agreement(path) - (share + (1 - share) * disagreeing)
    even_steps = torch.arange(201).double()[:, None] / 200
    dips = sum(bool(fall(part_way(*toy(g, 3), even_steps)).any()) for _ in range(draws))
    shown = f"of three random languages the mean RankC falls in {dips} of {draws} draws"
    return worst(to_odds(path[1]) - on_the_way, gap), shown
