"""App. F, sec. 3: DPO's margins grow without bound, DCO's stop at their target.

Why. Let m be the margin of r-hat between the preferred answer and the other. DPO's loss (Eq. 4),
-log sigmoid(m), has the slope -sigmoid(-m): never zero, so no m is a minimum, and descent goes on,
as log t. DCO's, |m - target|, is zero at its target (Eq. 11).
The converse is not in the paper: DPO is bounded once a pair is labelled both ways. If a share p of
labels prefers the first answer, the slope is sigmoid(m) - p and m = log p / (1 - p), in closed form;
with more answers, that of the Bradley-Terry reward, and the policy is Eq. 2 of that reward (sec. 3:
reward model and RL, or DPO, end alike). So what is unbounded is a *gold* label, never contradicted.
App. F's sigmoid(beta (r-hat - r-hat)) has one beta too many, as r-hat holds it (Eqs. 4, 13); without
it, sigmoid of DCO's margin is sigmoid(gamma_1 log pi_REF,2(w) / pi_REF,2(l)), "exactly" as is said.
"""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dco
from theory import Finding, margins, positive, rng, table
from theory.lemma1 import matrix


def descent(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, step: float) -> Tensor:
    """Gradient descent from log-probs `start`, all of its policies: (..., K) -> (steps, ..., K)."""
    logits, path = start.clone().requires_grad_(), []
    for _ in range(steps):
        (slope,) = torch.autograd.grad(loss(logits.log_softmax(-1)).sum(), logits)
        logits.data -= step * slope
        path.append(logits.detach().log_softmax(-1))
    return torch.stack(path)


def race(ref: Tensor, beta: float, steps: int, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """r-hat's margins of DPO and DCO by step, (steps, Q, 2), and DCO's target; ref (Q, 2, 2)."""
    r = dco.align_reward(ref, matrix(beta, beta))
    losses = (lambda logps: dco.dpo_loss(logps, ref, beta),
              lambda logps: dco.dco_loss(logps, ref, r, beta))
    dpo, to_target = (dco.implicit_reward(descent(loss, ref, steps, step), ref, beta).diff(dim=-1)
                      .neg()[..., 0] for loss in losses)
    return dpo, to_target, r[..., 0] - r[..., 1]


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, beta, steps, step = rng(seed), 0.5, 4000, 0.05
    ref = table(g, draws, 2, 2)
    dpo, to_target, target = race(ref, beta, steps, step)
    times = torch.arange(1, steps + 1) * step
    flow = 2 * beta**2 * times[:, None, None]  # of dm/dt = 2 beta^2 sigmoid(-m): m + e^m - 1 = this
    yield Finding("DPO's margin rises at every step, along m + e^m - 1 = 2 beta^2 t, unbounded",
                  draws, float(((dpo + dpo.exp() - 1 - flow) / flow).abs().max()) +
                  float((dpo.diff(dim=0) <= 0).sum()), 0.02)
    yield Finding("DCO's margin stays within a step of its target", draws,
                  float((to_target[-1] - target).abs().max()), 2 * step * beta**2)
