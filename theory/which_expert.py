"""Sec. 6.5: a sure expert decides, an unsure one does nothing.

Why. In Eq. 9 the other language enters by its log-odds, times gamma_1 / beta. An expert that is
even over the answers has none, and pi*_1 is pi_REF,1 unchanged. One at temperature T has 1 / T of
its log-odds: sharper is the same as a larger gamma, so KL(pi*_1 || pi_REF,1) only grows as T falls
(see direction.py for why), and as T goes to 0 the expert's answer is taken whatever language 1
thinks. The section says that "a low-entropy expert only contributes minimally"; it is the
high-entropy one. The argument drawn from it (weak languages are unsure and so do little harm) needs
that reading, and fails for a weak language that is sure: see pooling.py.
"""

import torch
from torch import Generator, Tensor

import dco
import rankc
from theory import check
from theory.lemma1 import matrix
from theory.toys import from_odds, kl, positive, table, vector

TEMPERATURES = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]


def with_expert(ref: Tensor, logits: Tensor, gamma_1: float) -> Tensor:
    """Language 1's pi*, beta = 1, where language 2, its expert, has these logits: (..., K)."""
    both = torch.stack([ref, logits.log_softmax(-1)], -2)
    return dco.optimal_policy(both, matrix(gamma_1, 1.0), 1.0)[..., 0, :]


@check
def an_even_expert_changes_nothing(g: Generator) -> Tensor:
    """An even expert, of the highest entropy, changes nothing."""
    ref = table(g, 5)
    return with_expert(ref, torch.zeros_like(ref), float(positive(g))) - ref


@check
def a_surer_expert_moves_language_1_more(g: Generator, draws: int) -> tuple[Tensor, str]:
    """The lower its entropy, the more it moves language 1."""
    ref, expert, gamma_1 = table(g, draws, 5), table(g, draws, 5), float(positive(g))
    entropy, distance = [], []
    for T in TEMPERATURES:
        entropy.append(rankc.entropy(expert / T))
        distance.append(kl(with_expert(ref, expert / T, gamma_1), ref))
    entropy, distance = torch.stack(entropy), torch.stack(distance)  # (T, draws)
    as_said = (entropy.diff(dim=0) < 0) & (distance.diff(dim=0) >= 0)  # False for NaN
    means = zip(entropy.mean(1).tolist(), distance.mean(1).tolist(), strict=True)
    shown = "mean entropy: mean KL(pi*_1 || pi_REF,1): "
    return ~as_said, shown + ", ".join(f"{nats:.2f}: {moved:.2f}" for nats, moved in means)


@check
def a_certain_expert_decides(g: Generator) -> bool:
    """A certain expert, of entropy 0, decides."""
    ref, expert = table(g, 5), table(g, 5)
    return bool(with_expert(ref, 1e5 * expert, float(positive(g))).argmax() != expert.argmax())


@check
def a_surer_expert_of_the_same_mind_may_move_it_less() -> bool:
    """Not so of two experts that differ: at log-odds 4, one at -2 moves it more than one at 4."""
    ref = from_odds(vector(4))
    of_the_same_mind = kl(with_expert(ref, from_odds(vector(4)), 1.0), ref)
    against_it = kl(with_expert(ref, from_odds(vector(-2)), 1.0), ref)
    return not bool(of_the_same_mind < against_it)
