"""Lemma 2: Eq. 11 ends at r_ALIGN + c(x), and there alone iff its pairs connect.

Why (App. D.2). Each term of Eq. 11 is |d_w - d_l| for d = r-hat - r_ALIGN, one number an answer.
The loss is zero iff d agrees at both ends of every sampled pair. The paper shows that r_ALIGN + c
is *a* minimiser, not that it is the only one. See the sampled pairs as edges of a graph whose nodes
are the answers: d is constant on each connected part, and free between parts. So r-hat = r_ALIGN +
c(x) follows iff the graph is connected, which takes at least K - 1 pairs; then log pi = log pi_REF
+ r-hat / beta + const is pi*. Where it is not, one part may be lifted against another at no loss,
by another amount in each language: a minimum that contradicts itself. (One pair a question, App. H,
thus leaves K - 2 log-odds to what the network carries over between questions.)
Also, Eq. 7 ranges over all strings, Eq. 11 over the candidates in D. If there are others, Eq. 11
fixes how the candidates share their total probability and leaves the total free: it is zero, too,
where nearly all has gone to other strings, and pi is not pi*. So a run logs that total.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, kl, margins, off, positive, rng, table, whole, worst
from theory.lemma1 import OPPOSED
from theory.product_of_experts import descend, objective


def loss_over(pairs: Tensor, logps: Tensor, ref_logps: Tensor, r: Tensor, beta: float) -> Tensor:
    """Eq. 11, the mean over the sampled pairs (E, 2) of answers: (..., K) each -> (...)."""
    return dco.dco_loss(*(x[..., pairs] for x in (logps, ref_logps, r)), beta).mean(-1)


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where subgradient descent from log-probs `start` ends, its step ever halved: (..., K).

    A loss of absolute values falls at no less than some slope toward its minimum. So steps that
    shrink by a fixed factor reach it to within the last of them, if that factor is near enough to 1
    for the slope and the start; 30 steps of a size before it is halved are enough for these tables.
    """
    return descend(loss, start, [8 / 2**n for n in range(40) for _ in range(30)])


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, K, beta = rng(seed), 5, 0.7
    ref, gamma = table(g, draws, 2, K), positive(g, 2, 2).fill_diagonal_(0)
    r, best = dco.align_reward(ref, gamma), dco.optimal_policy(ref, gamma, beta)
    start, order = table(g, draws, 2, K), torch.randperm(K, generator=g).tolist()
    every = torch.combinations(torch.arange(K))  # (K (K - 1) / 2, 2)
    tree = torch.tensor([[order[k], order[whole(g, 0, k - 1)]] for k in range(1, K)])  # (K - 1, 2)
    for name, pairs in ("all pairs", every), (f"K - 1 = {K - 1} pairs that connect", tree):
        found = minimum(lambda logps: loss_over(pairs, logps, ref, r, beta) / beta, start)
        apart = margins(dco.implicit_reward(found, ref, beta) - r)
        gap = off(apart, loss_over(pairs, found, ref, r, beta))
        words = f"{name}: descent from a random start ends at r-hat = r_ALIGN + c(x)"
        yield Finding(words, draws, gap)
        lost = objective(best, ref, r, beta) - objective(found, ref, r, beta)
        words = f"{name}: the policy found has the highest J of Eq. 7, as RL would"
        yield Finding(words, draws, worst(lost, kl(found, best)))
    d = dco.implicit_reward(start, ref, beta) - r  # a random policy's
    by_hand = sum((d[..., a] - d[..., b]).abs() for a, b in every.tolist()) / len(every)
    gap = off(dco.dco_loss(start, ref, r, beta) - by_hand)
    yield Finding("of more than two answers, Eq. 11 is the mean over all pairs, alike", draws, gap)
    parts = torch.tensor([[0, 1], [2, 3], [3, 4]])  # nothing between {0, 1} and {2, 3, 4}
    lifted = best.clone()
    lifted[..., :2] -= best[..., :1] - best[..., 2:3] - OPPOSED[:, None]
    lifted = lifted.log_softmax(-1)
    odds = lifted[..., 0] - lifted[..., 2]  # answer 0 over answer 2: made +1 here and -1 there
    gap = off(odds - OPPOSED, loss_over(parts, lifted, ref, r, beta))
    words = "pairs that do not connect: zero loss, and the languages contradict each other by a nat"
    yield Finding(words, draws, gap)
    world, mass = table(g, draws, 2, K + 1), 4e-4  # the last string is no candidate
    ref, r = world[..., :K], dco.align_reward(world, gamma)
    inside = dco.optimal_policy(ref, gamma, beta) + math.log(mass)  # logs of what is left for them
    policy = torch.cat([inside, torch.full_like(inside[..., :1], math.log1p(-mass))], -1)
    best = dco.optimal_policy(world, gamma, beta)
    lost = objective(best, world, r, beta) - objective(policy, world, r, beta)
    gap = off(dco.dco_loss(inside, ref, r[..., :K], beta), lost - beta * kl(policy, best))
    gap += int((lost <= 0).sum())
    words = "with a string that is no candidate: zero loss at a total of 0.0004, and J is lower"
    total = best[..., :K].exp().sum(-1)
    shown = f"total under pi* {total.mean():.2f}; J lower by {lost.mean():.2f}"
    yield Finding(words, draws, gap, shown=shown)
