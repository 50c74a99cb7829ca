"""Eqs. 7-10: pi* is the one maximiser: J(pi*) - J(pi) = beta KL(pi || pi*).

Why. J is Eq. 7. In one language, with Z = sum_y pi_REF(y) exp(r(y) / beta), the definition of pi*
(Eq. 8) says r = beta (log pi* - log pi_REF + log Z). Put that into J, for any policy pi:

    J(pi) = E_pi[r - beta log(pi / pi_REF)] = beta log Z - beta KL(pi || pi*).

The first term does not depend on pi; the second is zero at pi* and negative elsewhere (Gibbs). So
J(pi*) = beta log Z. The gradient vanishes nowhere else: that of KL(pi || pi*) in the logits of a
softmax is pi (log pi / pi* - KL), zero only where log pi / pi* is constant, that is, zero. With
r = sum_j gamma_ij log pi_REF,j (Eq. 15), exp(r / beta) is a product of experts (Eq. 10).
Nothing was asked of r: this is Eq. 2, for any reward. Where Eqs. 6 and 15 say "0 otherwise", pi* is
pi_REF but for Z: answers without reward keep their odds. Those with one have r < 0, and lose share.
Without beta > 0 the same identity makes pi* the worst policy there is.
"""

import torch
from torch import Generator, Tensor

import dco
from theory import check, worst
from theory.toys import kl, margins, positive, random_gamma, random_int, table


def written_out(ref: Tensor, gamma: Tensor) -> Tensor:
    """r of Eq. 15 by plain sums, with no code of dco.py: (..., L, K), (L, L) -> (..., L, K)."""
    reward = torch.zeros_like(ref)
    for i in range(len(gamma)):
        for j in range(len(gamma)):
            if j != i:
                reward[..., i, :] += gamma[i, j] * ref[..., j, :]
    return reward


def objective(logps: Tensor, ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    """J of Eq. 7 in each language, summed over all answers: (..., K) each -> (...), nats."""
    return (logps.exp() * reward).sum(-1) - beta * kl(logps, ref_logps)


def toy(g: Generator) -> tuple[Tensor, Tensor, Tensor, float]:
    """A reference, another policy, both (L, K), gamma (L, L) and beta."""
    L, K = random_int(g, 2, 5), random_int(g, 2, 8)
    return table(g, L, K), table(g, L, K), random_gamma(g, L), float(positive(g))


@check
def any_policy_falls_short_by_its_kl(g: Generator) -> Tensor:
    """J(pi*) - J(pi) = beta KL(pi || pi*) for any policy pi."""
    ref, pi, gamma, beta = toy(g)
    reward, best = written_out(ref, gamma), dco.optimal_policy(ref, gamma, beta)
    lead = objective(best, ref, reward, beta) - objective(pi, ref, reward, beta)
    return lead - beta * kl(pi, best)


@check
def ascent_ends_at_pi_star(g: Generator) -> Tensor:
    """Mirror ascent of J, p <- softmax(log p + 0.1 / beta dJ/dp), goes from any policy to pi*."""
    ref, logps, gamma, beta = toy(g)
    reward = written_out(ref, gamma)
    for _ in range(300):
        slope = reward - beta * (logps - ref) - beta  # dJ/dp, of Eq. 7
        logps = (logps + 0.1 / beta * slope).log_softmax(-1)
    return logps.exp() - dco.optimal_policy(ref, gamma, beta).exp()


@check
def any_reward_has_the_optimum_of_eq_2(g: Generator) -> float:
    """Eq. 2, any r: pi_REF exp(r / beta) / Z has J = beta log Z, a policy beta KL less."""
    ref, pi, _, beta = toy(g)
    reward = 5 * torch.randn(ref.shape, generator=g, dtype=torch.double)
    best = (ref + reward / beta).log_softmax(-1)
    log_Z = (ref + reward / beta).logsumexp(-1)
    shortfall = beta * log_Z - objective(pi, ref, reward, beta) - beta * kl(pi, best)
    return worst(objective(best, ref, reward, beta) - beta * log_Z, shortfall)


@check
def strings_without_reward_keep_their_odds(g: Generator) -> float:
    """ "0 otherwise": strings without reward keep their odds, and the answers' share falls."""
    world, _, gamma, beta = toy(g)
    world = torch.cat([world, table(g, len(world), 2)], -1).log_softmax(-1)  # 2 strings at the end
    reward = written_out(world, gamma)
    reward[:, -2:] = 0
    best = (world + reward / beta).log_softmax(-1)  # Eq. 2
    change = margins(best - world)[:, -2:, -2:]
    among_answers = best[:, :-2].log_softmax(-1) - dco.optimal_policy(world[:, :-2], gamma, beta)
    share, share_before = best[:, :-2].exp().sum(-1), world[:, :-2].exp().sum(-1)
    nowhere = dco.optimal_policy(world, 0 * gamma, beta) - world  # no reward at all: pi_REF
    return worst(change, among_answers, (share - share_before).clamp(min=0), nowhere)


@check
def with_a_negative_beta_pi_star_is_the_worst(g: Generator) -> Tensor:
    """Without beta > 0, pi* is the worst: J(pi*) - J(pi) = -|beta| KL(pi || pi*)."""
    ref, pi, gamma, beta = toy(g)
    reward = written_out(ref, gamma)
    least = (ref - reward / beta).log_softmax(-1)  # Eq. 8 at -beta, which dco.py refuses
    lead = objective(least, ref, reward, -beta) - objective(pi, ref, reward, -beta)
    return lead + beta * kl(pi, least)
