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

import torch
from torch import Generator, Tensor

import dco
from theory import check, slow, worst
from theory.lemma1 import OPPOSED
from theory.product_of_experts import objective, toy, written_out
from theory.toys import kl, margins, positive, random_gamma, random_int, table


def loss_over(pairs: Tensor, logps: Tensor, ref_logps: Tensor, r: Tensor, beta: float) -> Tensor:
    """Eq. 11, the mean over the sampled pairs (E, 2) of answers: (..., K) each -> (...)."""
    return dco.dco_loss(logps[..., pairs], ref_logps[..., pairs], r[..., pairs], beta).mean(-1)


def minimise_loss_over(
    pairs: Tensor, start: Tensor, ref_logps: Tensor, r: Tensor, beta: float
) -> Tensor:
    """Log-probs (..., K) where subgradient descent on loss_over ends, from log-probs `start`.

    By Polyak's step, loss / |slope|^2: on a straight slope it leads to a loss of zero, the least
    there is. A convex sum of absolute values then falls by some factor every few steps.
    """
    logits = start.clone().requires_grad_()
    for _ in range(3000):
        loss = loss_over(pairs, logits.log_softmax(-1), ref_logps, r, beta)
        if loss.max() < 1e-12:
            break
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        step = loss.detach() / slope.square().sum(-1).clamp(min=1e-300)  # not 0 / 0 at the end
        logits.data -= step[..., None] * slope
    return logits.detach().log_softmax(-1)


@check
@slow
def descent_ends_at_the_reward_and_at_pi_star(g: Generator) -> float:
    """Over all pairs, or K - 1 that connect, descent ends at r_ALIGN + c(x), pi*, the highest J."""
    ref, start, gamma, beta = toy(g)
    r, best = written_out(ref, gamma), dco.optimal_policy(ref, gamma, beta)
    K = ref.shape[-1]
    order = torch.randperm(K, generator=g).tolist()
    tree = [[order[k], order[random_int(g, 0, k - 1)]] for k in range(1, K)]
    gaps = []
    for pairs in torch.combinations(torch.arange(K)), torch.tensor(tree):
        end = minimise_loss_over(pairs, start, ref, r, beta)
        lost = objective(best, ref, r, beta) - objective(end, ref, r, beta)
        gaps += [margins(beta * (end - ref) - r), end - best, lost]
    return worst(*gaps)


@check
def the_loss_of_many_answers_is_the_mean_over_their_pairs(g: Generator) -> Tensor:
    """Of more than two answers, Eq. 11 is the mean over all pairs, alike."""
    ref, logps, gamma, beta = toy(g)
    d = beta * (logps - ref) - written_out(ref, gamma)
    K = ref.shape[-1]
    terms = [(d[:, w] - d[:, l]).abs() for w in range(K) for l in range(w)]  # noqa: E741
    return dco.dco_loss(logps, ref, written_out(ref, gamma), beta) - sum(terms) / len(terms)


@check
def pairs_that_do_not_connect_leave_contradictions(g: Generator) -> float:
    """Pairs that do not connect: zero loss, and two languages contradict each other by a nat."""
    ref, gamma, beta = table(g, 2, 5), random_gamma(g, 2), float(positive(g))
    pairs = torch.tensor([[0, 1], [2, 3], [3, 4]])  # nothing between {0, 1} and {2, 3, 4}
    lifted = dco.optimal_policy(ref, gamma, beta)
    lifted[:, :2] -= lifted[:, :1] - lifted[:, 2:3] - OPPOSED[:, None]  # answer 0 over 2: +1, -1
    odds = margins(lifted.log_softmax(-1))[:, 0, 2]
    loss = loss_over(pairs, lifted.log_softmax(-1), ref, written_out(ref, gamma), beta)
    return worst(odds - OPPOSED, loss)


@check
def other_strings_may_take_the_probability(g: Generator) -> tuple[float, str]:
    """With a string that is no candidate: no loss at a total of 0.0004, J lower by beta KL."""
    world, _, gamma, beta = toy(g)
    world = torch.cat([world, table(g, len(world), 1)], -1).log_softmax(-1)  # it stands last
    candidates = world[:, :-1]
    total = torch.full((len(world), 1), 0.0004, dtype=torch.double)
    shares = dco.optimal_policy(candidates, gamma, beta)
    policy = torch.cat([shares + total.log(), (1 - total).log()], -1)
    r, best = written_out(world, gamma), dco.optimal_policy(world, gamma, beta)
    loss = dco.dco_loss(policy[:, :-1], candidates, r[:, :-1], beta)
    lost = objective(best, world, r, beta) - objective(policy, world, r, beta)
    total_of_best = best[0, :-1].exp().sum()
    shown = f"one language: total under pi* {total_of_best:.1e}, J lower by {lost[0]:.1e}"
    return worst(loss, lost - beta * kl(policy, best)), shown
