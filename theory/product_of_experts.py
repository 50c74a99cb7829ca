"""Eqs. 7-10: pi* is the one maximiser: J(pi*) - J(pi) = beta KL(pi || pi*).

Why. J is Eq. 7. In one language, with Z = sum_y pi_REF(y) exp(r(y) / beta), the definition of pi*
(Eq. 8) says r = beta (log pi* - log pi_REF + log Z). Put that into J, for any policy pi:

    J(pi) = E_pi[r - beta log(pi / pi_REF)] = beta log Z - beta KL(pi || pi*).

The first term does not depend on pi; the second is zero at pi* and negative elsewhere (Gibbs). So
J(pi*) = beta log Z. The gradient vanishes nowhere else: that of KL(pi || pi*) in the logits of a
softmax is pi (log pi / pi* - KL), zero only where log pi / pi* is constant, that is, zero. With
r = sum_j gamma_ij log pi_REF,j (Eq. 15), exp(r / beta) is a product of experts (Eq. 10).
Without beta > 0 the same identity makes pi* the worst policy there is.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, kl, off, positive, rng, table, whole, worst


def objective(logps: Tensor, ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    """J of Eq. 7 in each language, summed over all answers: (..., K) each -> (...), nats."""
    return (logps.exp() * reward).sum(-1) - beta * kl(logps, ref_logps)


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, steps: Iterable[float]) -> Tensor:
    """Log-probs (..., K) after gradient descent on a table of logits, by steps of these sizes.

    loss: (..., K) log-probs -> any shape, of which the sum is lowered.
    """
    logits = start.clone().requires_grad_()
    for step in steps:
        (slope,) = torch.autograd.grad(loss(logits.log_softmax(-1)).sum(), logits)
        logits.data -= step * slope
    return logits.detach().log_softmax(-1)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, gaps = rng(seed), []
    for _ in range(draws):
        L, K, beta = whole(g, 2, 5), whole(g, 2, 8), float(positive(g))
        ref, pi = table(g, L, K), table(g, L, K)
        gamma = positive(g, L, L).fill_diagonal_(0)
        reward = sum(gamma[:, j, None] * ref[j] for j in range(L))  # Eq. 15, no code of dco's
        best = dco.optimal_policy(ref, gamma, beta)
        J = objective(best, ref, reward, beta)
        lead = J - objective(pi, ref, reward, beta) - beta * kl(pi, best)
        log_Z = (ref + reward / beta).logsumexp(-1)
        turned = (ref - reward / beta).log_softmax(-1)  # the maximiser, were beta negative
        lost = objective(turned, ref, reward, -beta) - objective(pi, ref, reward, -beta)
        gaps.append([off(x) for x in (lead, J - beta * log_Z, lost + beta * kl(pi, turned))])
    lead, partition, lost = torch.tensor(gaps).amax(0).tolist()
    yield Finding("J(pi*) - J(pi) = beta KL(pi || pi*) for any policy pi", draws, lead)
    yield Finding("J(pi*) = beta log Z", draws, partition)
    ref = torch.rand(draws, 3, 4, generator=g, dtype=torch.double).mul(2).log_softmax(-1)
    gamma = torch.rand(3, 3, generator=g, dtype=torch.double).div(2).fill_diagonal_(0)
    reward, best = dco.align_reward(ref, gamma), dco.optimal_policy(ref, gamma, 1.0)
    steps = [2.0] * 2000  # near pi* J curves by beta / 2 at most: a step of 4 / beta would diverge
    found = descend(lambda logps: -objective(logps, ref, reward, 1.0), ref, steps)
    words = "gradient ascent of J on a table of logits ends at pi* (gap in nats of KL)"
    yield Finding(words, draws, worst(kl(found, best)))
    words = "without beta > 0, pi* is the worst: J(pi*) - J(pi) = -|beta| KL(pi || pi*)"
    yield Finding(words, draws, lost)
