"""Remark 1: a larger gamma_i moves language i further (sec. 6.4: the reverse).

Why. pi*_i is pi_REF,i tilted by exp(t s), for s = sum_j gamma_ij log pi_REF,j / beta and t = 1.
Scaling language i's gammas scales t. For p_t = pi_REF e^(ts) / Z_t, the derivative of
KL(p_t || pi_REF) = t E_t[s] - log Z_t is t Var_t(s), positive unless s is constant. So a small
gamma_i keeps language i near its reference, as Remark 1 says. Sec. 6.4 then calls (10, 0.1), with
English first, "EN stable", and App. K advises to *raise* gamma_1 where the stable language changes
too much: by Eq. 6 both must be the other way round.
beta alone is said to control the overall deviation (sec. 4.2). It does while the gammas stay as
they are, but then only one beta is consistent. Under Lemma 3 gamma_ij = beta w_j / w_i: beta
cancels in pi* and scales Eq. 11 as a whole. How far to go is then decided by when one stops.
"""

import torch
from torch import Generator, Tensor

import dco
from theory import check
from theory.lemma1 import matrix
from theory.toys import kl, positive, random_gamma, random_int, table


def moved(ref: Tensor, gamma: Tensor, beta: float) -> Tensor:
    """KL(pi*_i || pi_REF,i) of each language, nats: (..., L, K), (L, L) -> (..., L)."""
    return kl(dco.optimal_policy(ref, gamma, beta), ref)


def toy(g: Generator) -> tuple[Tensor, float]:
    """A reference of two to five languages, (L, K), not too sure of itself, and beta."""
    ref = table(g, random_int(g, 2, 5), random_int(g, 2, 8))
    return (ref / 2).log_softmax(-1), float(positive(g))


@check
def the_slope_is_a_variance(g: Generator) -> Tensor:
    """With gammas t gamma_ij, d/dt KL(pi*_i || pi_REF,i) = t Var(s), never negative."""
    ref, beta = toy(g)
    gamma, t = random_gamma(g, len(ref)), positive(g).requires_grad_()
    (slope,) = torch.autograd.grad(moved(ref, t * gamma, beta).sum(), t)
    s = dco.align_reward(ref, gamma) / beta
    p = dco.optimal_policy(ref, t.detach() * gamma, beta).exp()
    mean = (p * s).sum(-1, keepdim=True)
    variance = (p * (s - mean) ** 2).sum(-1)  # (L,)
    return slope - t.detach() * variance.sum()


@check
def english_is_stable_at_a_small_gamma_1(g: Generator) -> tuple[bool, str]:
    """English first: (0.1, 10) moves English least and (10, 0.1) most; Swahili the reverse."""
    ref, _ = toy(g)
    low, even, high = (moved(ref[:2], matrix(x, 1 / x), 1.0).tolist() for x in (0.1, 1.0, 10.0))
    english_follows_gamma_1 = low[0] < even[0] < high[0]
    swahili_follows_gamma_2 = low[1] > even[1] > high[1]
    shown = f"KL of English, of Swahili at (0.1, 10): {low[0]:.3f}, {low[1]:.3f}; "
    shown += f"at (10, 0.1): {high[0]:.3f}, {high[1]:.3f}"
    return not (english_follows_gamma_1 and swahili_follows_gamma_2), shown


@check
def a_larger_beta_keeps_nearer(g: Generator) -> Tensor:
    """With the gammas fixed, twice the beta keeps every language nearer its reference."""
    ref, beta = toy(g)
    gamma = random_gamma(g, len(ref))
    return (moved(ref, gamma, 2 * beta) - moved(ref, gamma, beta)).clamp(min=0)


@check
def beta_does_nothing_under_lemma_3(g: Generator) -> Tensor:
    """Under Lemma 3 it does nothing: pi* is the same at beta and 10 beta."""
    ref, beta = toy(g)
    w = positive(g, len(ref))
    policy = dco.optimal_policy(ref, dco.gamma_from_trust(w, beta), beta)
    return policy - dco.optimal_policy(ref, dco.gamma_from_trust(w, 10 * beta), 10 * beta)
