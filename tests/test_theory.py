"""The paper's claims as properties, each failing, too, where its assumption is dropped.

The claims' own checks run on drawn seeds; beside them stand properties computed by hand, without
theory/'s tools. Domains: gamma, beta and trust between 1/20 and 20, log-odds within 30 nats.
"""

import math
import re
import statistics
from importlib import import_module

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dco
import theory.__main__
from theory import CLAIMS, contradiction
from theory.dpo_unbounded import descent, margin
from theory.lemma1 import contradicting_reference, matrix
from theory.lemma2 import loss_over
from theory.lemma3 import contradicting_reference as contradict_rows
from theory.on_the_way import agreement, part_way
from theory.random_pairs import pairwise_optimum

seeds = st.integers(0, 2**32)
positive = st.floats(0.05, 20)
odds = st.floats(-30, 30)
few = settings(max_examples=max(2, settings().max_examples // 50))  # where one example is slow


def table(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.double).mul(2).log_softmax(-1)


def of_odds(*values: float) -> torch.Tensor:
    """A table of two answers with these log-odds, one a language: (L, 2)."""
    x = torch.tensor(values, dtype=torch.double)
    return torch.stack([x, torch.zeros_like(x)], -1).log_softmax(-1)


def to_odds(logps: torch.Tensor) -> list[float]:
    return (logps[..., 0] - logps[..., 1]).tolist()


@pytest.mark.parametrize("name", CLAIMS)
@few
@given(seed=seeds)
def test_every_claim_holds_on_other_draws(name, seed):
    for finding in import_module(f"theory.{name}").check(draws=20, seed=seed):
        assert finding.gap <= finding.allowed, finding


@given(odds, odds, positive, positive)
def test_lemma_1_any_two_log_odds_get_one_sign(a, b, gamma_1, beta):
    x, y = to_odds(dco.optimal_policy(of_odds(a, b), matrix(gamma_1, beta**2 / gamma_1), beta))
    assert x == pytest.approx(a + gamma_1 / beta * b, abs=1e-8)
    assert x * y > 0 or abs(x) < 1e-8 * (1 + gamma_1 / beta)


@given(positive, positive, positive)
def test_lemma_1_converse_any_other_product_contradicts_itself_somewhere(gamma_1, gamma_2, beta):
    assume(abs(math.log(gamma_1 * gamma_2 / beta**2)) > 0.05)
    a, b = to_odds(contradicting_reference(gamma_1, gamma_2, beta))
    assert a + gamma_1 / beta * b == pytest.approx(1, abs=1e-6)  # Eq. 9, by hand
    assert b + gamma_2 / beta * a == pytest.approx(-1, abs=1e-6)
    policy = dco.optimal_policy(of_odds(a, b), matrix(gamma_1, gamma_2), beta)
    assert to_odds(policy) == pytest.approx([1, -1], abs=1e-6)
    assert not dco.is_consistent(matrix(gamma_1, gamma_2), beta)


def components(K: int, edges: list[tuple[int, int]]) -> list[int]:
    part = list(range(K))
    for a, b in edges:
        part = [part[a] if p == part[b] else p for p in part]
    return part


@given(st.data(), st.integers(3, 6), seeds, positive)
def test_lemma_2_zero_loss_is_the_optimal_policy_iff_the_pairs_connect(data, K, seed, beta):
    pair = st.tuples(st.integers(0, K - 1), st.integers(0, K - 1)).filter(lambda p: p[0] != p[1])
    edges = data.draw(st.lists(pair, min_size=1, max_size=2 * K))
    part = components(K, edges)
    ref, gamma = table(seed, 2, K), matrix(1.3, 0.4)
    r, best = dco.align_reward(ref, gamma), dco.optimal_policy(ref, gamma, beta)

    def loss(logps):
        return float(loss_over(torch.tensor(edges), logps, ref, r, beta).max())

    assert loss(best) < 1e-9 * (1 + beta)
    lift = torch.tensor([1.0 if p == part[0] else 0.0 for p in part], dtype=torch.double)
    lifted = (best + lift).log_softmax(-1)  # a part's answers against the others
    assert loss(lifted) < 1e-9 * (1 + beta)
    moved = float((lifted - best).abs().max())
    assert moved < 1e-9 if len(set(part)) == 1 else moved > 1e-6
    a, b = edges[0]
    apart = best.clone()
    apart[:, a] += 1.0  # against what it is paired with, it cannot be lifted unseen
    assert loss(apart) > 0.1 * beta / len(edges)


@given(seeds, st.integers(2, 6), positive, positive)
def test_lemma_3_trust_is_free_of_its_scale_and_of_beta(seed, L, beta, scale):
    trust, ref = table(seed, L).exp() + 0.01, table(seed + 1, L, 5)
    gamma = dco.gamma_from_trust(trust, beta)
    torch.testing.assert_close(dco.gamma_from_trust(scale * trust, beta), gamma)
    policy = dco.optimal_policy(ref, gamma, beta)
    torch.testing.assert_close(
        policy, dco.optimal_policy(ref, dco.gamma_from_trust(trust, 1.0), 1.0)
    )
    assert contradiction(policy) < 1e-9


@given(seeds, st.integers(2, 6), positive)
def test_lemma_3_converse_two_rows_not_proportional_contradict_each_other(seed, L, beta):
    gamma = (table(seed, L, L).exp() + 0.1).fill_diagonal_(0)
    Gamma = gamma / beta + torch.eye(L)
    cosine = torch.nn.functional.cosine_similarity(Gamma[0], Gamma[-1], dim=0)
    assume(cosine < 0.999)
    ref = contradict_rows(gamma, beta, 0, L - 1)
    by_hand = (Gamma @ torch.tensor(to_odds(ref), dtype=torch.double)).tolist()  # Eq. 10
    found = to_odds(dco.optimal_policy(ref, gamma, beta))
    assert found == pytest.approx(by_hand, abs=1e-6)
    assert (found[0], found[-1]) == (pytest.approx(1, abs=1e-6), pytest.approx(-1, abs=1e-6))
    assert not dco.is_consistent(gamma, beta)


@few
@given(st.lists(odds, min_size=4, max_size=4, unique=True))
def test_random_pairs_regress_on_the_median_and_eq_15_on_the_sum(x):
    ref, gamma = of_odds(*x), torch.ones(4, 4, dtype=torch.double).fill_diagonal_(0)
    others = [x[:i] + x[i + 1 :] for i in range(4)]
    medians = [x[i] + statistics.median(others[i]) for i in range(4)]
    assert to_odds(pairwise_optimum(ref, gamma, 1.0)) == pytest.approx(medians, abs=1e-6)
    joint = to_odds(dco.optimal_policy(ref, gamma, 1.0))
    assert joint == pytest.approx([sum(x)] * 4, abs=1e-6)


@given(odds, st.floats(0.01, 10), positive)
def test_dpo_always_gains_by_a_larger_margin_and_dco_only_up_to_its_target(target, more, beta):
    ref = of_odds(0.0)
    at, beyond = of_odds(target / beta), of_odds((target + more) / beta)
    short = of_odds((target - more) / beta)
    assert dco.dpo_loss(beyond, ref, beta) < dco.dpo_loss(at, ref, beta)
    r = of_odds(target)
    for other in (beyond, short):
        loss = float(dco.dco_loss(other, ref, r, beta))
        assert loss == pytest.approx(more, abs=1e-6)
    assert float(dco.dco_loss(at, ref, r, beta)) < 1e-9 * (1 + abs(target))


def test_dpo_descends_as_its_scalar_recursion_says_and_is_bounded_by_mixed_labels():
    ref, beta, m = of_odds(0.7), 0.5, 0.0
    path = margin(
        descent(lambda y: dco.dpo_loss(y, ref, beta), ref, 300, 0.5), ref, beta
    )  # (300, 1)
    for value in path[:, 0].tolist():
        m += 0.5 * 2 * beta**2 / (1 + math.exp(m))
        assert value == pytest.approx(m, abs=1e-9)

    def mixed(y):  # three labels in four prefer the first answer
        return 0.75 * dco.dpo_loss(y, ref, beta) + 0.25 * dco.dpo_loss(
            y.flip(-1), ref.flip(-1), beta
        )

    end = margin(descent(mixed, ref, 1000, 4.0), ref, beta)[-1]
    assert float(end) == pytest.approx(math.log(3), abs=1e-9)


@given(seeds, st.floats(0.05, 10), st.floats(1.01, 3))
def test_remark_1_a_larger_gamma_moves_its_language_further(seed, gamma_1, factor):
    ref = table(seed, 2, 4)

    def moved(gamma):
        policy = dco.optimal_policy(ref, matrix(gamma, 1.0), 1.0)[0]
        return float((policy.exp() * (policy - ref[0])).sum())

    assert moved(gamma_1) <= moved(gamma_1 * factor) + 1e-12


@given(seeds, st.integers(3, 7), positive)
def test_two_languages_never_lose_an_agreement_on_the_way(seed, K, trust):
    ref = table(seed, 2, K)
    gamma = dco.gamma_from_trust(torch.tensor([trust, 1.0], dtype=torch.double), 1.0)
    speed = table(seed + 1, 50, 2).exp().cumsum(0)
    path = part_way(ref, gamma, speed / speed[-1])  # (50, 2, K)
    m = path[..., :, None] - path[..., None, :]  # (50, 2, K, K)
    agree = (m[:, 0] * m[:, 1]) > 1e-9
    assert (agree[:-1] <= ((m[:, 0] * m[:, 1]) > 0)[1:]).all()
    assert agreement(path).diff().min() > -1e-9


def test_more_languages_lose_agreement_on_the_way():
    """Log-odds (1, 2, 3, -30), equal trust: at share t, (1 - t) x_i - 24 t."""
    ref = of_odds(1.0, 2.0, 3.0, -30.0)
    gamma = dco.gamma_from_trust(torch.ones(4, dtype=torch.double), 1.0)
    path = part_way(ref, gamma, torch.tensor([[0.0], [0.05], [0.09], [1.0]], dtype=torch.double))
    assert to_odds(path[1]) == pytest.approx([-0.25, 0.7, 1.65, -29.7])
    agreeing = [sum(a * b > 0 for k, a in enumerate(x) for b in x[:k]) for x in map(to_odds, path)]
    assert agreeing == [3, 2, 3, 6]
    low = math.exp(0) / (math.exp(1) + math.exp(0))  # only P@2 is 1, and w_2 is this
    assert agreement(path).tolist() == pytest.approx([(n + (6 - n) * low) / 6 for n in agreeing])


@given(seeds, st.integers(2, 6))
def test_equal_trust_gives_one_distribution_and_unequal_trust_does_not(seed, K):
    ref = table(seed, 3, K)
    equal = dco.optimal_policy(ref, torch.ones(3, 3).fill_diagonal_(0).double(), 1.0)
    torch.testing.assert_close(equal[0], equal[1])
    trust = dco.gamma_from_trust(torch.tensor([1.0, 2.0, 1.0], dtype=torch.double), 1.0)
    unequal = dco.optimal_policy(ref, trust, 1.0)
    torch.testing.assert_close(unequal[0], unequal[2])
    assert contradiction(unequal) < 1e-9 and (unequal[0] - unequal[1]).abs().max() > 1e-9


def test_contradiction_is_the_nats_by_which_two_languages_disagree():
    assert float(contradiction(of_odds(3.0, 2.0))) == 0
    assert float(contradiction(of_odds(3.0, -2.0))) == pytest.approx(2)
    assert float(contradiction(of_odds(3.0, 1.0, -0.5))) == pytest.approx(0.5)


@given(seeds, positive)
def test_each_loss_has_the_gradient_of_its_differences_away_from_the_kink(seed, beta):
    logps, ref, r = (table(seed + k, 2, 4).requires_grad_(k == 0) for k in range(3))
    residual = (beta * (logps - ref) - r).detach()
    gaps = (residual[..., :, None] - residual[..., None, :]).abs() + torch.eye(4)
    assume(gaps.min() > 1e-3)
    assert torch.autograd.gradcheck(lambda x: dco.dco_loss(x, ref, r, beta), logps)
    assert torch.autograd.gradcheck(lambda x: dco.dpo_loss(x[..., :2], ref[..., :2], beta), logps)
    assert torch.autograd.gradcheck(lambda x: dco.bradley_terry_loss(x[..., :2]), logps)
    assert torch.autograd.gradcheck(dco.sft_loss, logps)


@given(odds, st.floats(0.01, 10), positive)
def test_the_subgradient_points_to_the_target_from_either_side(target, off, beta):
    """Eq. 11 in one margin: slope +beta above the target, -beta below it, within both at it."""
    ref, r = of_odds(0.0), of_odds(target)
    for side in (+1, -1, 0):
        logps = of_odds((target + side * off) / beta).requires_grad_()
        (slope,) = torch.autograd.grad(dco.dco_loss(logps, ref, r, beta).sum(), logps)
        wanted = [side * beta, -side * beta]
        if side:
            assert slope[0].tolist() == pytest.approx(wanted)
        assert slope.abs().max() <= beta * (1 + 1e-12)


# ------------------------------------------------------------------------------ python -m theory


def test_the_command_prints_a_line_a_claim_and_ends_with_0(capsys, monkeypatch):
    names = ["lemma1", "lemma3", "pooling", "rankc_chance"]  # all are checked above
    monkeypatch.setattr(theory.__main__, "CLAIMS", names)
    assert theory.__main__.main(["--draws", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [["PASS", name] for name in names]
    assert lines[-1].startswith("4 of 4 claims hold")


def test_one_claim_shows_its_proof_and_its_findings(capsys):
    assert theory.__main__.main(["lemma1", "--draws", "10"]) == 0
    shown = capsys.readouterr().out
    assert "det Gamma = 1 - G_1 G_2" in shown and shown.count("PASS  ") == 4 and "beta =" in shown


def test_a_claim_that_fails_is_named_and_the_status_is_1(capsys, monkeypatch):
    right = dco.optimal_policy
    monkeypatch.setattr(dco, "optimal_policy", lambda ref, gamma, beta: right(ref, -gamma, beta))
    assert theory.__main__.main(["lemma1", "--draws", "10"]) == 1
    assert "0 of 1 claims hold" in capsys.readouterr().out
    assert theory.__main__.main(["rankc_chance", "--draws", "10"]) == 0  # it has no policy


def test_a_gap_that_is_not_a_number_fails():
    assert math.isnan(theory.worst(0.0, torch.tensor([1.0, math.nan]), 2.0))
    assert theory.worst(0.0, torch.tensor([[1.0], [3.0]]), 2) == 3.0
    assert theory.__main__.verdict(theory.Finding("", 1, math.nan)) == "FAIL"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["lemma4"], "no claim lemma4; there are: product_of_experts, lemma1"),
        (["--draws", "0"], "--draws 0: at least 1"),
        (["lemma1", "--plot", "x"], "leave the claims out"),
        (["--plot", "x"], "needs matplotlib: pip install -e '.\\[plot\\]'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(theory.__main__, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        theory.__main__.main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_three_figures_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the figures need the [plot] extra")
    from theory import figures

    monkeypatch.setattr(figures.objectives, "__defaults__", (2,))
    monkeypatch.setattr(figures.dpo_and_dco, "__defaults__", (100,))
    assert theory.__main__.main(["--plot", str(tmp_path)]) == 0
    names = sorted(p.name for p in tmp_path.iterdir() if p.stat().st_size > 10_000)
    assert names == ["contradictions.png", "margins.png", "objectives.png"]
