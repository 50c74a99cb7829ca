"""Sec. 4.3: E[r] is largest where the policy ranks as the reward does.

Why. Take a policy's probabilities as given and ask only which answer gets which. If one answer has
more reward and less probability than another, exchanging their probabilities adds the product of
the two differences to E_pi[r] = sum_y pi(y) r(y). So the best order has no such pair left: it is
that of the reward, here of the other languages' reference.
What it does not say: that pi* is in that order. Eq. 7 also holds pi* to its own reference, and a
language's pi* is sorted like the *product* (Eq. 9), seldom like its reward. Consistency needs the
two products to agree, which is Lemma 1; reward alone would have each language copy the other.
"""

from itertools import permutations

import torch
from torch import Generator, Tensor

import dco
from theory import check
from theory.lemma1 import matrix
from theory.toys import from_odds, positive, random_int, table, to_odds, vector


def toy(g: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A reference (2, K), the reward in language 1 (K,), and a policy's probabilities (K,)."""
    ref, gamma_1 = table(g, 2, random_int(g, 3, 6)), float(positive(g))
    reward = dco.align_reward(ref, matrix(gamma_1, 1 / gamma_1))[0]
    return ref, reward, table(g, len(reward)).exp()


@check
def the_best_order_is_the_other_languages(g: Generator) -> bool:
    """Of all K! orders of a policy's probabilities, the other language's has most reward."""
    ref, reward, probs = toy(g)
    orders = torch.tensor(list(permutations(range(len(probs)))))  # (K!, K)
    best = probs[orders[(probs[orders] * reward).sum(-1).argmax()]]
    return best.argsort().tolist() != ref[1].argsort().tolist()


@check
def an_exchange_adds_the_product_of_the_differences(g: Generator) -> Tensor:
    """Exchanging two probabilities adds the product of the differences."""
    _, reward, probs = toy(g)
    k, j = torch.randperm(len(reward), generator=g)[:2].tolist()
    exchanged = probs.clone()
    exchanged[[k, j]] = probs[[j, k]]
    gain = ((exchanged - probs) * reward).sum()
    return gain - (probs[j] - probs[k]) * (reward[k] - reward[j])


@check
def yet_pi_star_is_not_in_that_order(g: Generator, draws: int) -> tuple[Tensor, str]:
    """Yet pi* itself is not in that order: log-odds 4 against the reward's -1 give it 3."""
    equal_trust = matrix(1.0, 1.0)
    ref = from_odds(vector(4, -1))  # language 2 disagrees, a bit
    odds = to_odds(dco.optimal_policy(ref, equal_trust, 1.0))
    refs = table(g, draws, 2, 4)
    policy = dco.optimal_policy(refs, equal_trust, 1.0)[:, 0]
    same = int((policy.argsort() == refs[:, 1].argsort()).all(-1).sum())
    shown = f"four answers at random: pi* is in its reward's order in {same} of {draws}"
    return odds - 3, shown
