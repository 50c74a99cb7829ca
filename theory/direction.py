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

from collections.abc import Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, kl, off, positive, rng, table, whole, worst
from theory.lemma1 import matrix


def moved(ref: Tensor, gamma: Tensor, beta: float) -> Tensor:
    """KL(pi*_i || pi_REF,i) of each language, nats: (..., L, K), (L, L) -> (..., L)."""
    return kl(dco.optimal_policy(ref, gamma, beta), ref)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, slope_gap, errors, same, nearer = rng(seed), 0.0, 0, 0.0, 0
    for _ in range(draws):
        L, beta = whole(g, 2, 5), float(positive(g))
        ref = (table(g, L, whole(g, 2, 8)) / 2).log_softmax(-1)
        gamma, w = positive(g, L, L).fill_diagonal_(0), positive(g, L)
        t = positive(g).requires_grad_()
        (slope,) = torch.autograd.grad(moved(ref, t * gamma, beta).sum(), t)
        s, t = dco.align_reward(ref, gamma) / beta, t.detach()
        p = dco.optimal_policy(ref, t * gamma, beta).exp()
        variance = (p * (s - (p * s).sum(-1, keepdim=True)) ** 2).sum(-1)
        slope_gap = worst(slope_gap, off(slope - t * variance.sum()))
        en, sw = zip(*(moved(ref[:2], matrix(x, 1 / x), 1.0).tolist() for x in (0.1, 1.0, 10.0)))
        errors += not (en[0] < en[1] < en[2] and sw[0] > sw[1] > sw[2])
        nearer += not (moved(ref, gamma, 2 * beta) <= moved(ref, gamma, beta) + 1e-12).all()
        at = [dco.optimal_policy(ref, dco.gamma_from_trust(w, b), b) for b in (beta, 10 * beta)]
        same = worst(same, off(at[0] - at[1]))
    yield Finding("d/dt KL(pi*_i || pi_REF,i) = t Var(s), never negative", draws, slope_gap)
    words = "English first, (0.1, 10) moves English least, (10, 0.1) most (gap: exceptions)"
    shown = (
        f"KL of English, of Swahili at (0.1, 10): {en[0]:.3f}, {sw[0]:.3f}; "
        f"at (10, 0.1): {en[2]:.3f}, {sw[2]:.3f}"
    )
    yield Finding(words, draws, errors, shown=shown)
    words = "with the gammas fixed, a larger beta keeps nearer (gap: exceptions)"
    yield Finding(words, draws, nearer)
    yield Finding("under Lemma 3 it does nothing: pi* is the same at beta and 10 beta", draws, same)
