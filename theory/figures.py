"""Three figures of what is easier seen than read; needs matplotlib (the [plot] extra).

contradictions.png: Lemma 1 in the plane of the two languages' log-odds; margins.png: App. F, DPO
against DCO by step; objectives.png: CLC of the joint and the pairwise optimum by N (Eq. 15).
"""

from pathlib import Path

import matplotlib
import torch

import dco
from theory import contradiction, from_odds, rng, table, to_odds
from theory.dpo_unbounded import descent, margin
from theory.lemma1 import matrix
from theory.random_pairs import compare, mean_clc

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BLUE, RED, GREY = "#2166ac", "#b2182b", "#d9d9d9"


def draw(folder: str, seed: int = 0) -> None:
    """Write the three figures into a folder, made if need be."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("contradictions", contradictions),
        ("margins", dpo_and_dco),
        ("objectives", objectives),
    ):
        figure(seed).savefig(out / f"{name}.png", dpi=150, bbox_inches="tight")
        print(f"wrote {out / name}.png", flush=True)
    plt.close("all")


def contradictions(seed: int) -> plt.Figure:
    """Where pi* contradicts itself, beta = 1, for three products gamma_1 gamma_2."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.9), sharey=True, layout="constrained")
    line = torch.linspace(-4, 4, 401, dtype=torch.double)
    a, b = torch.meshgrid(line, line, indexing="xy")  # log-odds in languages 1 and 2
    ref = from_odds(torch.stack([a, b], -1))  # (401, 401, 2, 2)
    for ax, (gamma_1, gamma_2) in zip(axes, [(0.5, 0.5), (0.5, 2.0), (2.0, 2.0)], strict=True):
        bad = contradiction(dco.optimal_policy(ref, matrix(gamma_1, gamma_2), 1.0)) > 1e-9
        ax.contourf(a, b, (a * b < 0).double(), levels=[0.5, 1.5], colors=[GREY])
        ax.contourf(a, b, bad.double(), levels=[0.5, 1.5], colors=[RED])
        ax.plot(line, -line / gamma_1, color=BLUE, label="pi* has no preference in language 1")
        ax.plot(line, -line * gamma_2, color="black", ls="--", label="... in language 2")
        ax.set(
            xlim=(-4, 4),
            ylim=(-4, 4),
            aspect="equal",
            xlabel="log-odds in language 1",
            title=f"$\\gamma_1\\gamma_2$ = {gamma_1} x {gamma_2} = {gamma_1 * gamma_2:g}"
            + (" = $\\beta^2$: consistent" if gamma_1 * gamma_2 == 1 else ""),
        )
    axes[0].set_ylabel("log-odds in language 2")
    fills = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (GREY, RED)]
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        fills + handles,
        ["the reference contradicts itself", "pi* does", *labels],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure


def dpo_and_dco(seed: int, steps: int = 2000) -> plt.Figure:
    """Margins of r-hat by step on six pairs of answers, beta = 1; DCO's with their targets."""
    ref = table(rng(seed), 6, 2, 2)
    r = dco.align_reward(ref, matrix(1.0, 1.0))
    dpo = margin(descent(lambda y: dco.dpo_loss(y, ref, 1.0), ref, steps, 0.2), ref, 1.0)[..., 0]
    to_target = margin(descent(lambda y: dco.dco_loss(y, ref, r, 1.0), ref, steps, 0.02), ref, 1.0)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    axes[0].plot(dpo, color=RED)
    axes[1].plot(to_target[..., 0], color=BLUE)
    for target in to_odds(r[:, 0]).tolist():
        axes[1].axhline(target, color="black", lw=0.7, ls=":")
    axes[0].set(title="DPO: all pairs alike, and no end to it", ylabel="margin of r-hat, nats")
    axes[1].set(title="DCO: each to its target (dotted), and no further")
    for ax in axes:
        ax.set(xscale="log", xlabel="step of gradient descent on a table", xlim=(1, steps))
        ax.grid(alpha=0.3)
    return figure


def objectives(seed: int, draws: int = 40) -> plt.Figure:
    """Mean CLC of reference, joint and pairwise optimum by N, six answers, equal trust."""
    g, numbers = rng(seed), list(range(2, 9))
    clc = torch.tensor([[mean_clc(logps) for logps in compare(N, 6, draws, g)] for N in numbers])
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for values, name, color in zip(
        clc.T, ("reference", "joint, Eq. 15", "random pairs"), ("black", BLUE, RED), strict=True
    ):
        ax.plot(numbers, values, marker="o", label=name, color=color)
    ax.set(
        xlabel="languages N",
        ylabel="CLC (mean RankC)",
        ylim=(0, 1.05),
        xticks=numbers,
        title=f"Minima of the two objectives, {draws} draws",
    )
    ax.grid(alpha=0.3)
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.92))  # between the curves, on no point
    return figure
