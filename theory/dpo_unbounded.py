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

import torch
from torch import Generator, Tensor

import dco
from theory import check, worst
from theory.lemma1 import matrix
from theory.lemma2 import minimise_loss_over
from theory.toys import path_of_descent, positive, table, to_odds, vector

BETA = 0.5


def margin(logps: Tensor, ref: Tensor, beta: float) -> Tensor:
    """Of r-hat, between two answers: (..., 2) -> (...)."""
    return to_odds(dco.implicit_reward(logps, ref, beta))


@check
def dpos_margin_grows_without_bound(g: Generator, draws: int) -> tuple[float, str]:
    """DPO's margin rises at every step of descent, beyond log(1 + h t / 2)."""
    ref, step = table(g, draws, 2), 0.5
    path = path_of_descent(lambda logps: dco.dpo_loss(logps, ref, BETA), ref, [step] * 300)
    m = margin(path, ref, BETA)  # (301, draws)
    h = 2 * BETA**2 * step  # both logits move, and r-hat is beta times them
    bound = torch.log1p(h * torch.arange(301) / 2)[:, None]
    means = ", ".join(f"{m[t].mean():.2f}" for t in (3, 30, 300))
    shown = f"mean margin after 3, 30 and 300 steps: {means}"
    return worst((bound - m).clamp(min=0), ~(m.diff(dim=0) > 0)), shown


@check
def dcos_margin_ends_at_its_target(g: Generator, draws: int) -> Tensor:
    """DCO's margin ends at its target, gamma_1 times the other language's log-odds."""
    ref = table(g, draws, 2, 2)
    gamma_1, gamma_2 = positive(g, 2).tolist()
    r = dco.align_reward(ref, matrix(gamma_1, gamma_2))
    end = minimise_loss_over(torch.tensor([[0, 1]]), ref, ref, r, BETA)
    return margin(end, ref, BETA) - vector(gamma_1, gamma_2) * to_odds(ref).flip(-1)


def labelled_both_ways(g: Generator, draws: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of K answers, labelled both ways: the reference, the share p of labels that prefers
    the first of each pair, where DPO ends, and Eq. 2 of the reward where Eq. 14 ends."""
    ref, pairs = table(g, draws, K), torch.combinations(torch.arange(K))
    p = 0.2 + 0.6 * torch.rand(draws, len(pairs), generator=g, dtype=torch.double)
    both = torch.cat([pairs, pairs.flip(-1)])  # (2 E, 2): the preferred answer first
    share = torch.cat([p, 1 - p], -1) / len(pairs)  # (draws, 2 E), of all labels

    def dpo(logps: Tensor) -> Tensor:
        return share * dco.dpo_loss(logps[..., both], ref[..., both], BETA)

    def reward_model(rewards: Tensor) -> Tensor:
        return share * dco.bradley_terry_loss(rewards[..., both])

    policy = path_of_descent(dpo, ref, [12.0] * 100)[-1]
    reward = path_of_descent(reward_model, ref, [3.0] * 100)[-1]
    return ref, p, policy, (ref + reward / BETA).log_softmax(-1)


@check
def contradicted_labels_bound_dpo(g: Generator, draws: int) -> float:
    """Two answers labelled both ways: m ends at log p / (1 - p), as reward model, then RL would."""
    ref, p, policy, by_rl = labelled_both_ways(g, draws, K=2)
    return worst(margin(policy, ref, BETA) - p.logit()[:, 0], policy - by_rl)


@check
def contradicted_labels_bound_dpo_of_three_answers(g: Generator, draws: int) -> Tensor:
    """Three answers: no closed form, but the same end as reward model, then RL."""
    _, _, policy, by_rl = labelled_both_ways(g, draws, K=3)
    return policy - by_rl


@check
def what_bradley_terry_says_at_dcos_end(g: Generator) -> Tensor:
    """At DCO's minimum Bradley-Terry is sigmoid(gamma_1 x the other's log-odds)."""
    ref = table(g, 2, 2)
    gamma_1, gamma_2 = positive(g, 2).tolist()
    policy = dco.optimal_policy(ref, matrix(gamma_1, gamma_2), BETA)
    return margin(policy, ref, BETA)[0].sigmoid() - (gamma_1 * to_odds(ref)[1]).sigmoid()
