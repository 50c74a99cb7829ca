"""Three figures of what is easier seen than read; needs matplotlib (the [plot] extra).

contradictions.png: Lemma 1 in the plane of the two languages' log-odds; margins.png: App. F, DPO
against DCO by step; objectives.png: CLC of the joint and the pairwise optimum by N (Eq. 15).
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import dco
from theory import rng
from theory.dpo_unbounded import margin
from theory.lemma1 import matrix
from theory.random_pairs import compare, mean_clc
from theory.toys import contradiction, from_odds, path_of_descent, table, to_odds

BLUE, RED, GREY = "#2166ac", "#b2182b", "#d9d9d9"
STEPS = 2000  # of descent, in margins.png
DRAWS = 40  # for each number of languages, in objectives.png


def draw(folder: str, seed: int = 0) -> None:
    """Write the three figures into a folder, made if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    figures = {
        "contradictions.png": contradictions(),
        "margins.png": dpo_and_dco(seed),
        "objectives.png": objectives(seed),
    }
    for name, figure in figures.items():
        path = Path(folder) / name
        figure.savefig(path, dpi=150, bbox_inches="tight")
        print(f"wrote {path}", flush=True)


def contradictions() -> Figure:
    """Where pi* contradicts itself, beta = 1, for three products gamma_1 gamma_2."""
    figure = Figure(figsize=(12, 4.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    line = torch.linspace(-4, 4, 401, dtype=torch.double)
    a, b = torch.meshgrid(line, line, indexing="xy")  # log-odds in languages 1 and 2
    ref = from_odds(torch.stack([a, b], -1))  # (401, 401, 2, 2)
    for panel, (gamma_1, gamma_2) in zip(panels, [(0.5, 0.5), (0.5, 2.0), (2.0, 2.0)], strict=True):
        policy = dco.optimal_policy(ref, matrix(gamma_1, gamma_2), 1.0)
        ref_contradicts = (contradiction(ref) > 1e-9).double()
        policy_contradicts = (contradiction(policy) > 1e-9).double()
        panel.contourf(a, b, ref_contradicts, levels=[0.5, 1.5], colors=[GREY])
        panel.contourf(a, b, policy_contradicts, levels=[0.5, 1.5], colors=[RED])
        panel.plot(line, -line / gamma_1, color=BLUE, label=r"$\pi^*$ is undecided in language 1")
        panel.plot(line, -line * gamma_2, color="black", ls="--", label="... in language 2")
        title = rf"$\gamma_1\gamma_2 = {gamma_1:g} \times {gamma_2:g} = {gamma_1 * gamma_2:g}$"
        if gamma_1 * gamma_2 == 1:
            title += r"$ = \beta^2$: consistent"
        panel.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", title=title)
        panel.set_xlabel("reference log-odds in language 1")
    panels[0].set_ylabel("reference log-odds in language 2")
    grey = Patch(color=GREY, label="the reference contradicts itself")
    red = Patch(color=RED, label=r"$\pi^*$ contradicts itself")
    handles = [grey, red, *panels[0].lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def dpo_and_dco(seed: int) -> Figure:
    """Margins of r-hat by step on six pairs of answers, beta = 1; DCO's with their targets."""
    ref = table(rng(seed), 6, 2, 2)
    r = dco.align_reward(ref, matrix(1.0, 1.0))
    by_dpo = path_of_descent(lambda logps: dco.dpo_loss(logps, ref, 1.0), ref, [0.2] * STEPS)
    by_dco = path_of_descent(lambda logps: dco.dco_loss(logps, ref, r, 1.0), ref, [0.02] * STEPS)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(margin(by_dpo, ref, 1.0)[..., 0], color=RED)
    right.plot(margin(by_dco, ref, 1.0)[..., 0], color=BLUE)
    right.hlines(to_odds(r[:, 0]), 1, STEPS, color="black", lw=0.7, ls=":")
    left.set(title="DPO: all six pairs alike, without bound", ylabel=r"margin of $\hat r$, nats")
    right.set(title="DCO: each pair to its target (dotted), and no further")
    for panel in (left, right):
        panel.set(xscale="log", xlabel="step of gradient descent on a table", xlim=(1, STEPS))
        panel.grid(alpha=0.3)
    return figure


def objectives(seed: int) -> Figure:
    """Mean CLC of reference, joint and pairwise optimum by N, six answers, equal trust."""
    g, numbers = rng(seed), range(2, 9)
    clc = {"reference": [], "joint, Eq. 15": [], "random pairs": []}
    for N in numbers:
        ref = table(g, DRAWS, N, 6)
        joint, pairwise = compare(ref, halvings=14)  # to 0.001 nats: enough for a rank
        for curve, logps in zip(clc.values(), (ref, joint, pairwise), strict=True):
            curve.append(mean_clc(logps))
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for (name, curve), color in zip(clc.items(), ("black", BLUE, RED), strict=True):
        panel.plot(numbers, curve, marker="o", label=name, color=color)
    panel.set(xlabel="languages N", ylabel="CLC (mean RankC)", ylim=(0, 1.05), xticks=numbers)
    panel.set_title(f"Minima of the two objectives, {DRAWS} draws")
    panel.grid(alpha=0.3)
    panel.legend(loc="upper right", bbox_to_anchor=(1, 0.92))  # between the curves, on no point
    return figure
