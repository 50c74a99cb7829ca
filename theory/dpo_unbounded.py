"""App. F: DPO's margins grow without bound, DCO's stop at their target.

Why. Let m be the margin of r-hat between the preferred answer and the other, 0 at the start. DPO's
loss (Eq. 4), -log sigmoid(m), has the slope -sigmoid(-m): never zero, so no m is a minimum. A step
of descent adds h sigmoid(-m) to m, so at least h / 2 to e^m: after t steps m >= log(1 + h t / 2),
beyond every bound. DCO's loss, |m - target|, is zero at its target (Eq. 11), and ends there.
The converse is not in the paper: DPO is bounded once pairs are labelled both ways. If a share p of
the labels prefers the first of two, the slope is sigmoid(m) - p, and m = log p / (1 - p). With more
answers m is the Bradley-Terry reward's, and the policy is Eq. 2 of that reward (sec. 3: DPO ends
where a reward model and RL do). So what is unbounded is a *gold* label, never contradicted.
App. F's sigmoid(beta (r-hat - r-hat)) has a beta too many, for r-hat holds it (Eqs. 4, 13). Without
it, sigmoid of DCO's margin is sigmoid(gamma_1 log pi_REF,2(w) / pi_REF,2(l)); App. F lacks gamma_1.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, off, positive, rng, table, to_odds, worst
from theory.lemma1 import matrix
from theory.lemma2 import minimum
from theory.product_of_experts import descend


def descent(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, step: float) -> Tensor:
    """Gradient descent from log-probs `start`, all of its policies: (..., K) -> (steps, ..., K)."""
    path = [start]
    for _ in range(steps):
        path.append(descend(loss, path[-1], [step]))
    return torch.stack(path[1:])


def margin(logps: Tensor, ref: Tensor, beta: float) -> Tensor:
    """Of r-hat, between two answers: (..., 2) -> (...)."""
    return to_odds(dco.implicit_reward(logps, ref, beta))


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, beta, steps, step = rng(seed), 0.5, 2000, 0.5
    ref = table(g, draws, 2)
    dpo = margin(descent(lambda y: dco.dpo_loss(y, ref, beta), ref, steps, step), ref, beta)
    h = 2 * beta**2 * step  # both logits move, and r-hat is beta times them
    bound = torch.log1p(h * torch.arange(1, steps + 1)[:, None] / 2)
    stopped = int((dpo.diff(dim=0) <= 0).sum())
    means = ", ".join(f"{dpo[t - 1].mean():.2f}" for t in (20, 200, 2000))
    shown = f"mean margin after 20, 200 and 2000 steps: {means}"
    words = "DPO's margin rises at every step, beyond log(1 + h t / 2): unbounded"
    yield Finding(words, draws, worst(0.0, bound - dpo) + stopped, shown=shown)
    ref = table(g, draws, 2, 2)
    r = dco.align_reward(ref, matrix(*positive(g, 2).tolist()))
    end = margin(minimum(lambda y: dco.dco_loss(y, ref, r, beta) / beta, ref), ref, beta)
    yield Finding("DCO's margin ends at its target", draws, off(end - to_odds(r)))
    for K in (2, 3):
        ref, pairs = table(g, draws, K), torch.combinations(torch.arange(K))
        p = 0.2 + 0.6 * torch.rand(draws, len(pairs), generator=g, dtype=torch.double)
        both = torch.cat([pairs, pairs.flip(-1)])  # (2 E, 2): the preferred answer first
        share = torch.cat([p, 1 - p], -1) / len(pairs)  # (draws, 2 E), of all labels
        at = ref[..., both]  # (draws, 2 E, 2)
        policy = descend(lambda y: share * dco.dpo_loss(y[..., both], at, beta), ref, [12.0] * 1000)
        reward = descend(lambda y: share * dco.bradley_terry_loss(y[..., both]), ref, [3.0] * 1000)
        gap = off(policy - (ref + reward / beta).log_softmax(-1))  # Eq. 2 of the reward of Eq. 14
        words = f"{K} answers labelled both ways: bounded, and equal to reward model then RL"
        if K == 2:
            gap = worst(gap, off(margin(policy, ref, beta) - p.logit()[:, 0]))
            words += ", m = log p / (1 - p)"
        yield Finding(words, draws, gap)
    ref, gamma = table(g, draws, 2, 2), matrix(*positive(g, 2).tolist())
    matched = margin(dco.optimal_policy(ref, gamma, beta), ref, beta)[:, 0].sigmoid()
    exact = (gamma[0, 1] * to_odds(ref[:, 1])).sigmoid()
    words = "at DCO's minimum Bradley-Terry is sigmoid(gamma_1 x the other's log-odds)"
    yield Finding(words, draws, off(matched - exact))
