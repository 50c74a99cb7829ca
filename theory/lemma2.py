"""Lemma 2: Eq. 11 ends at r_ALIGN + c(x), and there alone iff its pairs connect.

Why (App. D.2). Each term of Eq. 11 is |d_w - d_l| for d = r-hat - r_ALIGN, one number an answer.
The loss is zero iff d agrees at both ends of every sampled pair. The paper shows that r_ALIGN + c
is *a* minimiser. Is it the only one? See the sampled pairs as edges of a graph whose nodes are the
answers: d is constant on each connected part, and free between parts. So r-hat = r_ALIGN + c(x)
follows iff the graph is connected, for which K - 1 pairs can do and fewer never; then log pi =
log pi_REF + r-hat / beta + const is pi*. Where it is not, one part may be lifted against another at
no loss, by another amount in each language: a minimum that contradicts itself. (One pair a
question, App. H, thus leaves K - 2 log-odds to what the network carries over between questions.)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, kl, margins, positive, rng, table, whole, worst
from theory.product_of_experts import objective


def loss_over(pairs: Tensor, logps: Tensor, ref_logps: Tensor, r: Tensor, beta: float) -> Tensor:
    """Eq. 11, the mean over the sampled pairs (E, 2) of answers: (..., K) each -> (...)."""
    return dco.dco_loss(*(x[..., pairs] for x in (logps, ref_logps, r)), beta).mean(-1)


def descend(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Subgradient descent on a table of logits from log-probs `start`, the step ever halved.

    A loss of absolute values is a polyhedron, and falls at no less than some slope toward its
    minimum; so steps that shrink by a fixed factor reach it to within the last of them.
    """
    logits, step = start.clone().requires_grad_(), 8.0
    while step > 1e-11:
        for _ in range(30):
            (slope,) = torch.autograd.grad(loss(logits.log_softmax(-1)).sum(), logits)
            logits.data -= step * slope
        step /= 2
    return logits.detach().log_softmax(-1)


def tree(g: torch.Generator, K: int) -> Tensor:
    """K - 1 pairs that connect K answers, drawn at random: (K - 1, 2)."""
    order = torch.randperm(K, generator=g).tolist()
    return torch.tensor([[order[k], order[whole(g, 0, k - 1)]] for k in range(1, K)])


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, K, beta = rng(seed), 5, 0.7
    ref, gamma = table(g, draws, 2, K), positive(g, 2, 2).fill_diagonal_(0)
    r, best = dco.align_reward(ref, gamma), dco.optimal_policy(ref, gamma, beta)
    start = table(g, draws, 2, K)
    for name, pairs in {
        "all pairs": torch.combinations(torch.arange(K)),
        f"K - 1 = {K - 1} pairs that connect": tree(g, K),
    }.items():
        found = descend(lambda logps: loss_over(pairs, logps, ref, r, beta) / beta, start)
        loss = loss_over(pairs, found, ref, r, beta)
        off = margins(dco.implicit_reward(found, ref, beta) - r).abs().max()
        yield Finding(
            f"{name}: descent from a random start ends at r-hat = r_ALIGN + c(x)",
            draws,
            worst(off, loss),
        )
        lost = objective(best, ref, r, beta) - objective(found, ref, r, beta)
        yield Finding(
            f"{name}: the policy found has the highest J of Eq. 7, as RL would",
            draws,
            worst(lost, kl(found, best)),
        )
    parts = torch.tensor([[0, 1], [2, 3], [3, 4]])  # nothing between {0, 1} and {2, 3, 4}
    lifted = best.clone()
    lifted[..., :2] -= (best[..., :1] - best[..., 2:3]) - torch.tensor([[1.0], [-1.0]])
    lifted = lifted.log_softmax(-1)
    odds = lifted[..., 0] - lifted[..., 2]  # answer 0 over answer 2: made +1 here and -1 there
    off = (odds - torch.tensor([1.0, -1.0])).abs().max()
    yield Finding(
        "pairs that do not connect: zero loss, and the languages contradict each other by a nat",
        draws,
        worst(off, loss_over(parts, lifted, ref, r, beta)),
    )
