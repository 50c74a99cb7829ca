"""Sec. 6.5: a sure expert decides, an unsure one does nothing.

Why. In Eq. 9 the other language enters by its log-odds, times gamma_1 / beta. An expert that is
even over the answers has none, and pi*_1 is pi_REF,1 unchanged. One at temperature T has 1 / T of
its log-odds: sharper is the same as a larger gamma, so KL(pi*_1 || pi_REF,1) only grows as T falls
(see direction.py for why), and as T goes to 0 the expert's answer is taken whatever language 1
thinks. The section says that "a low-entropy expert only contributes minimally"; it is the
high-entropy one, and the argument drawn from it (weak languages are unsure and so do little harm)
needs it that way round. It fails for a weak language that is sure: see pooling.py.
"""

from collections.abc import Iterator

import torch

import dco
import rankc
from theory import Finding, kl, positive, rng, table
from theory.lemma1 import matrix

TEMPERATURES = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]


def check(draws: int, seed: int) -> Iterator[Finding]:
    g = rng(seed)
    gamma = matrix(*positive(g, 2).tolist())
    ref = table(g, draws, 2, 5)
    even = ref.clone()
    even[:, 1] = torch.zeros(5, dtype=torch.double).log_softmax(-1)
    moved = (dco.optimal_policy(even, gamma, 1.0) - ref)[:, 0].abs().max()
    yield Finding("an even expert, of the highest entropy, changes nothing", draws, float(moved))
    entropy, distance = [], []
    for T in TEMPERATURES:
        tempered = torch.stack([ref[:, 0], (ref[:, 1] / T).log_softmax(-1)], 1)
        entropy.append(rankc.entropy(tempered[:, 1]))
        distance.append(kl(dco.optimal_policy(tempered, gamma, 1.0)[:, 0], ref[:, 0]))
    entropy, distance = torch.stack(entropy), torch.stack(distance)  # (T, draws)
    right = (entropy.diff(dim=0) <= 0) & (distance.diff(dim=0) >= 0)
    means = ", ".join(f"{h:.2f}: {d:.2f}" for h, d in zip(entropy.mean(1), distance.mean(1)))
    yield Finding(
        "the lower its entropy, the more it moves language 1 (gap: exceptions)",
        draws,
        int((~right).sum()),
        shown=f"mean entropy: mean KL(pi*_1 || pi_REF,1): {means}",
    )
    certain = torch.stack([ref[:, 0], (ref[:, 1] * 1e5).log_softmax(-1)], 1)
    policy = dco.optimal_policy(certain, gamma, 1.0)[:, 0]
    yield Finding(
        "a certain expert, of entropy 0, decides (gap: answers not its own)",
        draws,
        int((policy.argmax(-1) != ref[:, 1].argmax(-1)).sum()),
    )
