"""Eqs. 7-10: pi* is the one maximiser: J(pi*) - J(pi) = beta KL(pi || pi*).

Why. J is Eq. 7. In one language, with Z = sum_y pi_REF(y) exp(r(y) / beta), the definition of pi*
(Eq. 8) says r = beta (log pi* - log pi_REF + log Z). Put that into J, for any policy pi:

    J(pi) = E_pi[r - beta log(pi / pi_REF)] = beta log Z - beta KL(pi || pi*).

The first term knows nothing of pi; the second is zero at pi* and negative elsewhere (Gibbs). So
J(pi*) = beta log Z, and the gradient vanishes nowhere else: that of KL(pi || pi*) in the logits of
a softmax is pi (log pi / pi* - KL), zero only where log pi / pi* is constant, that is, zero. With
r = sum_j gamma_ij log pi_REF,j (Eq. 15), exp(r / beta) is a product of experts (Eq. 10).
Without beta > 0 the same identity makes pi* the worst policy there is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, kl, positive, rng, table, whole


def objective(logps: Tensor, ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    """J of Eq. 7 in each language, summed over all answers: (..., K) each -> (...), nats."""
    return (logps.exp() * reward).sum(-1) - beta * kl(logps, ref_logps)


def ascend(ref_logps: Tensor, reward: Tensor, beta: float, steps: int = 2000) -> Tensor:
    """Plain gradient ascent of J on a softmax over a table of logits, from pi_REF: (..., K)."""
    logits = ref_logps.clone().requires_grad_()
    for _ in range(steps):
        logps = logits.log_softmax(-1)
        (slope,) = torch.autograd.grad(objective(logps, ref_logps, reward, beta).sum(), logits)
        logits.data += 2 / beta * slope  # J curves by beta / 2 at most
    return logits.detach().log_softmax(-1)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, gaps = rng(seed), []
    for _ in range(draws):
        L, K, beta = whole(g, 2, 5), whole(g, 2, 8), float(positive(g))
        ref, pi = table(g, L, K), table(g, L, K)
        gamma = positive(g, L, L).fill_diagonal_(0)
        reward = torch.stack(
            [sum(gamma[i, j] * ref[j] for j in range(L) if j != i) for i in range(L)]
        )  # Eq. 15, sharing no code with dco
        best = dco.optimal_policy(ref, gamma, beta)
        J = objective(best, ref, reward, beta)
        log_Z = (ref + reward / beta).logsumexp(-1)
        turned = dco.optimal_policy(ref, gamma, -beta)  # the maximiser, were beta negative
        lost = objective(turned, ref, reward, -beta) - objective(pi, ref, reward, -beta)
        gaps.append(
            torch.stack(
                [
                    J - objective(pi, ref, reward, beta) - beta * kl(pi, best),
                    J - beta * log_Z,
                    lost + beta * kl(pi, turned),
                ]
            )
            .abs()
            .amax(-1)
        )
    identity, partition, worst = torch.stack(gaps).amax(0).tolist()
    yield Finding("J(pi*) - J(pi) = beta KL(pi || pi*) for any policy pi", draws, identity)
    yield Finding("J(pi*) = beta log Z", draws, partition)
    ref = torch.rand(draws, 3, 4, generator=g, dtype=torch.double).mul(2).log_softmax(-1)
    gamma = torch.rand(3, 3, generator=g, dtype=torch.double).div(2).fill_diagonal_(0)
    there = ascend(ref, dco.align_reward(ref, gamma), 1.0)
    yield Finding(
        "gradient ascent of J on a table of logits ends at pi* (gap in nats of KL)",
        draws,
        float(kl(there, dco.optimal_policy(ref, gamma, 1.0)).max()),
    )
    yield Finding(
        "without beta > 0, pi* is the worst: J(pi*) - J(pi) = -|beta| KL(pi || pi*)", draws, worst
    )
