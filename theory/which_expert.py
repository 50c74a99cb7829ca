"""Sec. 6.5: a sure expert decides, an unsure one does nothing.

Why. In Eq. 9 the other language enters by its log-odds, times gamma_1 / beta. An expert that is
even over the answers has none, and pi*_1 is pi_REF,1 unchanged. One at temperature T has 1 / T of
its log-odds: sharper is the same as a larger gamma, so KL(pi*_1 || pi_REF,1) only grows as T falls
(see direction.py for why), and as T goes to 0 the expert's answer is taken whatever language 1
thinks. The section says that "a low-entropy expert only contributes minimally"; it is the
high-entropy one. The argument drawn from it (weak languages are unsure and so do little harm) needs
that reading, and fails for a weak language that is sure: see pooling.py.
"""

from collections.abc import Iterator

import torch

import dco
import rankc
from theory import Finding, kl, off, positive, rng, table
from theory.lemma1 import matrix

TEMPERATURES = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]


def check(draws: int, seed: int) -> Iterator[Finding]:
    g = rng(seed)
    gamma = matrix(*positive(g, 2).tolist())
    ref = table(g, draws, 2, 5)
    even = ref.clone()
    even[:, 1] = torch.zeros(5, dtype=torch.double).log_softmax(-1)
    gap = off((dco.optimal_policy(even, gamma, 1.0) - ref)[:, 0])
    yield Finding("an even expert, of the highest entropy, changes nothing", draws, gap)
    entropy, distance = [], []
    for T in TEMPERATURES:
        tempered = torch.stack([ref[:, 0], (ref[:, 1] / T).log_softmax(-1)], 1)
        entropy.append(rankc.entropy(tempered[:, 1]))
        distance.append(kl(dco.optimal_policy(tempered, gamma, 1.0)[:, 0], ref[:, 0]))
    entropy, distance = torch.stack(entropy), torch.stack(distance)  # (T, draws)
    right = (entropy.diff(dim=0) < 0) & (distance.diff(dim=0) >= 0)  # false for NaN
    means = ", ".join(f"{h:.2f}: {d:.2f}" for h, d in zip(entropy.mean(1), distance.mean(1)))
    words = "the lower its entropy, the more it moves language 1 (gap: exceptions)"
    shown = f"mean entropy: mean KL(pi*_1 || pi_REF,1): {means}"
    yield Finding(words, draws, int((~right).sum()), shown=shown)
    certain = torch.stack([ref[:, 0], (ref[:, 1] * 1e5).log_softmax(-1)], 1)
    policy = dco.optimal_policy(certain, gamma, 1.0)[:, 0]
    errors = int((policy.argmax(-1) != ref[:, 1].argmax(-1)).sum())
    words = "a certain expert, of entropy 0, decides (gap: answers not its own)"
    yield Finding(words, draws, errors)
