"""Sec. 4.3: E[r] is largest where the policy ranks as the reward does.

Why. Take a policy's probabilities as given and ask only which answer gets which. If one answer has
more reward and less probability than another, exchanging their probabilities adds the product of
the two differences to E_pi[r] = sum_y pi(y) r(y). So the best order has no such pair left: it is
that of the reward, here of the other languages' reference.
What it does not say: that pi* is in that order. Eq. 7 also holds pi* to its own reference, and a
language's pi* is sorted like the *product* (Eq. 9), seldom like its reward. Consistency needs the
two products to agree, which is Lemma 1; reward alone would have each language copy the other.
"""

from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor

import dco
from theory import Finding, from_odds, off, positive, rng, table, to_odds, vector, whole, worst
from theory.lemma1 import matrix


def best_order(probs: Tensor, reward: Tensor) -> Tensor:
    """Of all K! ways to hand out probs (K,) to the answers, the one of the most reward: (K,)."""
    orders = torch.tensor(list(permutations(range(len(probs)))))
    return probs[orders[(probs[orders] * reward).sum(-1).argmax()]]


def check(draws: int, seed: int) -> Iterator[Finding]:
    g, out_of_order, gain, unsorted = rng(seed), 0, 0.0, 0
    for _ in range(draws):
        K, gamma_1 = whole(g, 3, 6), float(positive(g))
        ref = table(g, 2, K)
        gamma = matrix(gamma_1, 1 / gamma_1)
        reward = dco.align_reward(ref, gamma)[0]
        probs = table(g, K).exp()
        best = best_order(probs, reward)
        out_of_order += best.argsort().tolist() != ref[1].argsort().tolist()
        k, j = torch.randperm(K, generator=g)[:2].tolist()  # exchange two: the sum of the proof
        swapped = probs.clone()
        swapped[[k, j]] = probs[[j, k]]
        by_hand = (probs[j] - probs[k]) * (reward[k] - reward[j])
        gain = worst(gain, off(((swapped - probs) * reward).sum() - by_hand))
        policy = dco.optimal_policy(ref, gamma, 1.0)[0]
        unsorted += policy.argsort().tolist() != reward.argsort().tolist()
    words = "of all K! orders the best is the other language's (gap: exceptions)"
    yield Finding(words, draws, out_of_order)
    yield Finding("exchanging two probabilities adds the product of the differences", draws, gain)
    ref = from_odds(vector(4, -1))  # language 2 disagrees, a bit
    policy = to_odds(dco.optimal_policy(ref, matrix(1.0, 1.0), 1.0))
    words = "yet pi* itself is not: log-odds 4 against the reward's -1 give it 3"
    shown = f"at random, pi* is in its reward's order in {draws - unsorted} of {draws}"
    yield Finding(words, 1, off(policy - 3), shown=shown)
