"""App. F: DPO's margins grow without bound, DCO's stop at their target.

Why. Let m be the margin of r-hat between the preferred answer and the other. DPO's loss (Eq. 4),
-log sigmoid(m), has the slope -sigmoid(-m): never zero, so no m is a minimum. A step of descent
adds h sigmoid(-m) to m, so at least h / 2 to e^m: after t steps m >= log(1 + h t / 2), beyond every
bound. DCO's loss, |m - target|, is zero at its target (Eq. 11), and ends there.
The converse is not in the paper: DPO is bounded once pairs are labelled both ways. If a share p of
the labels prefers the first of two, the slope is sigmoid(m) - p, and m = log p / (1 - p). With more
answers m is the Bradley-Terry reward's, and the policy is Eq. 2 of that reward (sec. 3: DPO ends
where a reward model and RL do). So what is unbounded is a *gold* label, never contradicted.
App. F's sigmoid(beta (r-hat - r-hat)) has a beta too many, for r-hat holds it (Eqs. 4, 13). Without
it, sigmoid of DCO's margin is sigmoid(gamma_1 log pi_REF,2(w) / pi_REF,2(l)) "exactly", as is said.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, positive, rng, table, to_odds
from theory.lemma1 import matrix
from theory.lemma2 import descend


def descent(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, step: float) -> Tensor:
    """Gradient descent from log-probs `start`, all of its policies: (..., K) -> (steps, ..., K)."""
    logits, path = start.clone().requires_grad_(), []
    for _ in range(steps):
        (slope,) = torch.autograd.grad(loss(logits.log_softmax(-1)).sum(), logits)
        logits.data -= step * slope
        path.append(logits.detach().log_softmax(-1))
    return torch.stack(path)


def margin(logps: Tensor, ref: Tensor, beta: float) -> Tensor:
    """Of r-hat, between two answers: (..., 2) -> (...)."""
    return to_odds(dco.implicit_reward(logps, ref, beta))


def labelled(p: Tensor, pairs: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of `loss` over pairs (E, 2) of which a share p (..., E) prefers the first."""
    return (p * loss(pairs) + (1 - p) * loss(pairs.flip(-1))).mean(-1)


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, beta, steps, step = rng(seed), 0.5, 2000, 0.5
    ref = table(g, draws, 2)
    dpo = margin(descent(lambda y: dco.dpo_loss(y, ref, beta), ref, steps, step), ref, beta)
    rate = 2 * beta**2 * step  # both logits move, and r-hat is beta times them
    bound = torch.log1p(rate * torch.arange(1, steps + 1)[:, None] / 2)
    stopped = int((dpo.diff(dim=0) <= 0).sum())
    mean = ", ".join(f"{dpo[t - 1].mean():.2f}" for t in (20, 200, 2000))
    yield Finding(
        "DPO's margin rises at every step, beyond log(1 + h t / 2): unbounded",
        draws,
        float((bound - dpo).clamp(min=0).max()) + stopped,
        shown=f"mean margin after 20, 200 and 2000 steps: {mean}",
    )
    ref = table(g, draws, 2, 2)
    r = dco.align_reward(ref, matrix(*positive(g, 2).tolist()))
    end = margin(descend(lambda y: dco.dco_loss(y, ref, r, beta) / beta, ref), ref, beta)
    yield Finding("DCO's margin ends at its target", draws, float((end - to_odds(r)).abs().max()))
    for K in (2, 3):
        ref, pairs = table(g, draws, K), torch.combinations(torch.arange(K))
        p = 0.2 + 0.6 * torch.rand(draws, len(pairs), generator=g, dtype=torch.double)
        policy = descent(
            lambda y: labelled(p, pairs, lambda o: dco.dpo_loss(y[..., o], ref[..., o], beta)),
            ref,
            1000,
            12.0,
        )[-1]
        reward = descent(
            lambda y: labelled(p, pairs, lambda o: dco.bradley_terry_loss(y[..., o])),
            ref,
            1000,
            3.0,
        )[-1]
        two_stages = (ref + reward / beta).log_softmax(-1)  # Eq. 2 of the reward of Eq. 14
        gap = (policy - two_stages).abs().max()
        if K == 2:
            gap = torch.maximum(gap, (margin(policy, ref, beta) - p.logit()[:, 0]).abs().max())
        yield Finding(
            f"{K} answers labelled both ways: bounded, and equal to reward model then RL"
            + (", m = log p / (1 - p)" if K == 2 else ""),
            draws,
            float(gap),
        )
    ref, gamma = table(g, draws, 2, 2), matrix(*positive(g, 2).tolist())
    matched = margin(dco.optimal_policy(ref, gamma, beta), ref, beta)[:, 0].sigmoid()
    exact = (gamma[0, 1] * to_odds(ref[:, 1])).sigmoid()
    yield Finding(
        "at DCO's minimum Bradley-Terry is sigmoid(gamma_1 x the other's log-odds)",
        draws,
        float((matched - exact).abs().max()),
    )
