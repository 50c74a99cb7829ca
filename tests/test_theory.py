"""The paper's claims as properties, each failing, too, where its assumption is dropped.

The claims' own checks run on drawn seeds; beside them stand properties computed by hand, without
theory/'s tools. Domains: gamma, beta and trust between 1/20 and 20, log-odds within 30 nats.
"""

import inspect
import math
import statistics
from importlib import import_module
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dco
import theory.__main__
from theory import CHECKS, CLAIMS
from theory.lemma1 import contradicting_reference, matrix
from theory.lemma2 import loss_over
from theory.random_pairs import pairwise_optimum

positive = st.floats(0.05, 20)
odds = st.floats(-30, 30)
slow = settings(max_examples=25)


def numbers(of: st.SearchStrategy, *shape: int) -> st.SearchStrategy:
    """Nested lists of this shape, ties and extremes among them."""
    for size in reversed(shape):
        of = st.lists(of, min_size=size, max_size=size)
    return of


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.double)


def of_odds(*values: float) -> torch.Tensor:
    """A table of two answers with these log-odds, one a language: (L, 2)."""
    return tensor([[x, 0.0] for x in values]).log_softmax(-1)


def to_odds(logps: torch.Tensor) -> list[float]:
    return (logps[..., 0] - logps[..., 1]).tolist()


@pytest.mark.parametrize("name", CLAIMS)
@slow
@given(seed=st.integers(0, 2**32))
def test_every_claim_holds_on_other_draws(name, seed):
    import_module(f"theory.{name}")
    for check in CHECKS[name]:
        if inspect.signature(check).parameters:  # else it is a worked example, always the same
            finding = theory.run(check, draws=2, seed=seed)
            assert finding.holds, finding


# ------------------------------------------------------------------- by hand: where J is highest
def j_by_hand(p: list[float], ref: list[float], reward: list[float], beta: float) -> float:
    """Eq. 7 in one language, E[r] - beta KL: probabilities p, log-probs ref."""
    expected = sum(a * r for a, r in zip(p, reward))
    return expected - beta * sum(a * (math.log(a) - q) for a, q in zip(p, ref) if a > 0)


def reward_by_hand(ref: list[list[float]], gammas: list[float]) -> list[float]:
    """Eq. 15 in the first language, from its row of gammas."""
    return [sum(gamma * q for gamma, q in zip(gammas, column)) for column in zip(*ref)]


@given(numbers(odds, 3, 4), numbers(positive, 3, 3), positive, numbers(st.floats(0, 1), 4))
def test_no_policy_has_a_higher_j_than_pi_star(logits, gammas, beta, weights):
    assume(sum(weights) > 0.1)
    ref, gamma = tensor(logits).log_softmax(-1), tensor(gammas).fill_diagonal_(0)
    reward = reward_by_hand(ref.tolist(), gamma[0].tolist())
    best = dco.optimal_policy(ref, gamma, beta)[0].exp().tolist()
    policy = [w / sum(weights) for w in weights]
    J, J_best = (j_by_hand(p, ref[0].tolist(), reward, beta) for p in (policy, best))
    assert J <= J_best + 1e-12 * max(abs(r) for r in reward) + 1e-10


def test_another_gamma_is_not_the_best_and_a_negative_beta_makes_the_worst():
    ref, gamma = tensor([[1, 0, -1], [-2, 0, 1]]).log_softmax(-1), matrix(1.5, 0.5)
    reward = reward_by_hand(ref.tolist(), [0, 1.5])

    def j(policy: torch.Tensor, beta: float) -> float:
        return j_by_hand(policy[0].exp().tolist(), ref[0].tolist(), reward, beta)

    best = dco.optimal_policy(ref, gamma, 1.0)
    for wrong in (gamma.T, 1.1 * gamma, 0.9 * gamma):
        assert j(dco.optimal_policy(ref, wrong, 1.0), 1.0) < j(best, 1.0) - 1e-3
    worst = (ref - tensor(reward)).log_softmax(-1)  # Eq. 8 at beta = -1, which dco refuses
    for policy in (ref, best, tensor([[0, 0, 0]]).log_softmax(-1)):
        assert j(policy, -1.0) > j(worst, -1.0) + 0.1


# ------------------------------------------------------------------------- by hand: the lemmas
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


pairs_of_four = st.sets(st.sampled_from(list(combinations(range(4), 2))), min_size=1)


@given(pairs_of_four, numbers(odds, 2, 4), positive)
def test_lemma_2_zero_loss_is_the_optimal_policy_iff_the_pairs_connect(pairs, logits, beta):
    ref, gamma = tensor(logits).log_softmax(-1), matrix(1.3, 0.4)
    r, best = dco.align_reward(ref, gamma), dco.optimal_policy(ref, gamma, beta)
    connected = {0}  # answers that some chain of pairs connects to the first one
    for _ in range(3):
        for pair in pairs:
            if connected & set(pair):
                connected.update(pair)

    def loss_if_raised(answers: list[int]) -> float:
        """The loss at pi*, but for these answers' log-odds against the others, a nat higher."""
        policy = best.clone()
        policy[:, answers] += 1
        return float(loss_over(torch.tensor(list(pairs)), policy, ref, r, beta).max())

    assert loss_if_raised([]) < 1e-9 * (1 + beta)
    assert loss_if_raised(list(connected)) < 1e-9 * (1 + beta)  # no change if these are all
    for a, b in pairs:
        assert loss_if_raised([a]) > 0.9 * beta / len(pairs)
    if len(connected) == 4:
        for some in ([0], [0, 1], [1, 2], [0, 2]):
            assert loss_if_raised(some) > 0.9 * beta / len(pairs)


# ---------------------------------------------------------- by hand: other losses, and the way
@slow
@given(numbers(odds, 4))
def test_random_pairs_regress_on_the_median_and_eq_15_on_the_sum(x):
    ref, equal_trust = of_odds(*x), torch.ones(4, 4, dtype=torch.double).fill_diagonal_(0)
    others = [x[:i] + x[i + 1 :] for i in range(4)]
    medians = [x[i] + statistics.median(others[i]) for i in range(4)]
    pairwise = pairwise_optimum(ref, equal_trust, 1.0, halvings=25)
    assert to_odds(pairwise) == pytest.approx(medians, abs=1e-5)
    joint = dco.optimal_policy(ref, equal_trust, 1.0)
    assert to_odds(joint) == pytest.approx([sum(x)] * 4, abs=1e-6)


@given(numbers(odds, 3, 4), positive)
def test_the_slope_of_eq_11_counts_the_answers_on_either_side(rows, beta):
    logps, ref, r = tensor(rows)
    logps.requires_grad_()
    (slope,) = torch.autograd.grad(dco.dco_loss(logps, ref, r, beta), logps)
    d = [beta * (x - q) - reward for x, q, reward in zip(*rows)]  # r-hat - r_ALIGN
    above_or_below = [sum((a > b) - (a < b) for b in d) for a in d]  # 0 at a tie
    assert slope.tolist() == pytest.approx([beta * n / 6 for n in above_or_below])  # 6 pairs


# ------------------------------------------------------------------------------ python -m theory
def test_the_command_prints_a_line_a_claim_and_ends_with_0(capsys):
    assert theory.__main__.main(["--draws", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [["PASS", name] for name in CLAIMS]
    assert lines[-1].startswith("13 of 13 claims hold")


def test_one_claim_shows_its_proof_and_its_findings(capsys):
    assert theory.__main__.main(["lemma1", "--draws", "10"]) == 0
    shown = capsys.readouterr().out
    assert "det Gamma = 1 - G_1 G_2" in shown and shown.count("PASS  ") == 4 and "beta =" in shown


@pytest.mark.parametrize("factor", [-1, math.nan])
def test_a_claim_that_fails_or_is_not_a_number_is_named(factor, capsys, monkeypatch):
    right = dco.optimal_policy
    monkeypatch.setattr(dco, "optimal_policy", lambda *arguments: factor * right(*arguments))
    monkeypatch.setattr(theory.__main__, "CLAIMS", ["lemma1", "rankc_chance"])
    assert theory.__main__.main(["--draws", "10"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("FAIL lemma1") and lines[2].startswith("PASS rankc_chance")
    assert lines[3].startswith("1 of 2 claims hold") and lines[4] == "these do not: lemma1"


def test_the_three_figures_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the figures need the [plot] extra")
    from theory import figures

    monkeypatch.setattr(figures, "DRAWS", 2)
    monkeypatch.setattr(figures, "STEPS", 100)
    assert theory.__main__.main(["--plot", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir() if path.stat().st_size > 10_000)
    assert names == ["contradictions.png", "margins.png", "objectives.png"]
