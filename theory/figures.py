"""Three figures of what is easier seen than read; needs matplotlib (the [plot] extra).

contradictions.png: Lemma 1 in the plane of the two languages' log-odds; margins.png: App. F, DPO
against DCO by step; objectives.png: CLC of the joint and the pairwise optimum by N (Eq. 15).
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import dco
from theory import contradiction, from_odds, rng, table, to_odds
from theory.dpo_unbounded import descent, margin
from theory.lemma1 import matrix
from theory.random_pairs import compare, mean_clc

BLUE, RED, GREY = "#2166ac", "#b2182b", "#d9d9d9"


def draw(folder: str, seed: int = 0) -> None:
    """Write the three figures into a folder, made if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    figures = {"contradictions": contradictions, "margins": dpo_and_dco, "objectives": objectives}
    for name, figure in figures.items():
        path = Path(folder) / f"{name}.png"
        figure(seed).savefig(path, dpi=150, bbox_inches="tight")
        print(f"wrote {path}", flush=True)


def contradictions(seed: int) -> Figure:
    """Where pi* contradicts itself, beta = 1, for three products gamma_1 gamma_2."""
    figure = Figure(figsize=(12, 4.9), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    line = torch.linspace(-4, 4, 401, dtype=torch.double)
    a, b = torch.meshgrid(line, line, indexing="xy")  # log-odds in languages 1 and 2
    ref = from_odds(torch.stack([a, b], -1))  # (401, 401, 2, 2)
    for ax, (gamma_1, gamma_2) in zip(axes, [(0.5, 0.5), (0.5, 2.0), (2.0, 2.0)], strict=True):
        bad = contradiction(dco.optimal_policy(ref, matrix(gamma_1, gamma_2), 1.0)) > 1e-9
        ax.contourf(a, b, (a * b < 0).double(), levels=[0.5, 1.5], colors=[GREY])
        ax.contourf(a, b, bad.double(), levels=[0.5, 1.5], colors=[RED])
        ax.plot(line, -line / gamma_1, color=BLUE, label=r"$\pi^*$ is undecided in language 1")
        ax.plot(line, -line * gamma_2, color="black", ls="--", label="... in language 2")
        title = rf"$\gamma_1\gamma_2 = {gamma_1:g} \times {gamma_2:g} = {gamma_1 * gamma_2:g}$"
        title += r"$ = \beta^2$: consistent" if gamma_1 * gamma_2 == 1 else ""
        ax.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", title=title)
        ax.set_xlabel("reference log-odds in language 1")
    axes[0].set_ylabel("reference log-odds in language 2")
    grey = Patch(color=GREY, label="the reference contradicts itself")
    red = Patch(color=RED, label=r"$\pi^*$ contradicts itself")
    handles = [grey, red, *axes[0].lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def dpo_and_dco(seed: int, steps: int = 2000) -> Figure:
    """Margins of r-hat by step on six pairs of answers, beta = 1; DCO's with their targets."""
    ref = table(rng(seed), 6, 2, 2)
    r = dco.align_reward(ref, matrix(1.0, 1.0))
    dpo = descent(lambda y: dco.dpo_loss(y, ref, 1.0), ref, steps, 0.2)
    to_target = descent(lambda y: dco.dco_loss(y, ref, r, 1.0), ref, steps, 0.02)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(margin(dpo, ref, 1.0)[..., 0], color=RED)
    right.plot(margin(to_target, ref, 1.0)[..., 0], color=BLUE)
    right.hlines(to_odds(r[:, 0]), 1, steps, color="black", lw=0.7, ls=":")
    left.set(title="DPO: all six pairs alike, without bound", ylabel=r"margin of $\hat r$, nats")
    right.set(title="DCO: each pair to its target (dotted), and no further")
    for ax in (left, right):
        ax.set(xscale="log", xlabel="step of gradient descent on a table", xlim=(1, steps))
        ax.grid(alpha=0.3)
    return figure


def objectives(seed: int, draws: int = 40) -> Figure:
    """Mean CLC of reference, joint and pairwise optimum by N, six answers, equal trust."""
    g, numbers = rng(seed), range(2, 9)
    refs = [table(g, draws, N, 6) for N in numbers]
    clc = torch.tensor([[mean_clc(logps) for logps in (ref, *compare(ref))] for ref in refs])
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    names = {"reference": "black", "joint, Eq. 15": BLUE, "random pairs": RED}
    for values, (name, color) in zip(clc.T, names.items(), strict=True):
        ax.plot(numbers, values, marker="o", label=name, color=color)
    ax.set(xlabel="languages N", ylabel="CLC (mean RankC)", ylim=(0, 1.05), xticks=numbers)
    ax.set_title(f"Minima of the two objectives, {draws} draws")
    ax.grid(alpha=0.3)
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.92))  # between the curves, on no point
    return figure
