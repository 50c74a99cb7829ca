"""Sec. 6.5: calibrated experts gain by pooling; a vote, or overconfidence, can lose.

Why. Let the true answer y be drawn evenly, and each language see evidence e_i of its own, unrelated
given y, and report it honestly: pi_REF,i(y) = P(y | e_i). By Bayes P(y | e_1 .. e_N) is
proportional to prod_i P(y | e_i), which is pi* with equal trust (Eq. 10, gamma = beta). So its top
answer is right at least as often as that of any rule that sees less: one language, fewer languages,
or a vote (CALM, sec. 2), which forgets how sure each is and can lose by its weak voters.
Sec. 6.5 assumes honesty (wrong answers have high entropy). A language that overstates its log-odds
by a factor s_i breaks it: a weak one that is sure outvotes a strong one, and pi* is worse than
English alone. So do two languages that repeat the same evidence. Trust mends both: with w_i =
1 / s_i, or 1 / 2 for each of the two, the consensus is the posterior again. *Trust a language less
the more it overstates*; the column `pi*` of a run shows, before a step is taken, whether to.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import dco
from theory import check
from theory.toys import positive, table, vector


def world(likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """All evidence e that L languages may see: P(e, y) (E, K), and honest log P(y | e_i) (E, L, K).

    likelihood: (L, S, K), P(e_i | y) of each of S signals.
    """
    L, S, K = likelihood.shape
    evidence = torch.tensor(list(product(range(S), repeat=L)))  # (E, L)
    of_evidence = likelihood[torch.arange(L), evidence]  # (E, L, K), P(e_i | y)
    return of_evidence.prod(1) / K, of_evidence.log().log_softmax(-1)


def random_world(g: Generator) -> tuple[Tensor, Tensor]:
    """Three languages that see one of four signals each, three answers."""
    return world(table(g, 3, 3, 4).exp().transpose(1, 2))


def seeing(shares: list[float], K: int) -> tuple[Tensor, Tensor]:
    """The world of languages that see the true answer with these shares, and else any other."""
    eye = torch.eye(K, dtype=torch.double)
    return world(torch.stack([p * eye + (1 - p) / (K - 1) * (1 - eye) for p in shares]))


def pool(reports: Tensor, *trust: float) -> Tensor:
    """The first language's log pi* at this trust: (E, L, K) -> (E, K)."""
    return dco.optimal_policy(reports, dco.gamma_from_trust(vector(*trust), 1.0), 1.0)[:, 0]


def right(joint: Tensor, *policies: Tensor) -> Tensor:
    """How often the top answer of each policy (E, K) is true: P(e, y) (E, K) -> (n,)."""
    answers = torch.stack([policy.argmax(-1) for policy in policies], 1)  # (E, n)
    return joint.gather(1, answers).sum(0)


@check
def honest_experts_pool_into_the_posterior(g: Generator) -> Tensor:
    """Honest, unrelated experts: pi* with equal trust is the Bayes posterior."""
    joint, honest = random_world(g)
    return pool(honest, 1, 1, 1) - (joint / joint.sum(-1, keepdim=True)).log()


@check
def no_rule_that_sees_less_is_right_more_often(g: Generator) -> Tensor:
    """It is right no less often than each language, than two of them, than their vote."""
    joint, honest = random_world(g)
    vote = F.one_hot(dco.majority_vote(honest)[0], 3)
    rules = [*honest.unbind(1), pool(honest[:, :2], 1, 1), vote]
    return (right(joint, *rules) - right(joint, pool(honest, 1, 1, 1))).clamp(min=0)


@check
def trust_mends_overconfidence(g: Generator) -> Tensor:
    """Languages that overstate by s_i: trust 1 / s_i restores the posterior."""
    joint, honest = random_world(g)
    s = positive(g, 3)
    reports = (honest * s[:, None]).log_softmax(-1)
    consensus = (pool(reports, *(1 / s).tolist()) / s[0]).log_softmax(-1)
    return consensus - (joint / joint.sum(-1, keepdim=True)).log()


@check
def one_overconfident_language() -> Tensor:
    """Right at 0.9 with one at 0.5: 0.9; if it overstates tenfold: 0.5; with trust 1 / 10: 0.9."""
    joint, honest = seeing([0.9, 0.5], K=3)
    reports = (honest * vector(1, 10)[:, None]).log_softmax(-1)
    policies = [pool(honest, 1, 1), pool(reports, 1, 1), pool(reports, 1, 0.1)]
    return right(joint, *policies) - vector(0.9, 0.5, 0.9)


@check
def one_evidence_in_two_languages() -> Tensor:
    """Right at 0.7 with one at 0.6: 0.7; that one reported twice: 0.6; with trust 1 / 2: 0.7."""
    joint, honest = seeing([0.7, 0.6], K=3)
    twice = honest[:, [0, 1, 1]]
    policies = [pool(honest, 1, 1), pool(twice, 1, 1, 1), pool(twice, 1, 0.5, 0.5)]
    return right(joint, *policies) - vector(0.7, 0.6, 0.7)


@check
def a_vote_loses_by_its_weak_voters() -> Tensor:
    """Right at 0.9 with two right at 0.4, of 4 answers: their vote 0.808, pi* 0.9."""
    joint, honest = seeing([0.9, 0.4, 0.4], K=4)
    vote = F.one_hot(dco.majority_vote(honest)[0], 4)
    lost, won = 0.9 * 3 * 0.2**2, 0.1 * 0.4**2  # both weak at one wrong answer, at the right
    return right(joint, vote, pool(honest, 1, 1, 1)) - vector(0.9 - lost + won, 0.9)
