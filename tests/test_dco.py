"""The paper's equations: each against an independent computation, then its properties.

That the paper's claims follow from them is in test_theory.py; log pi(y|x) in test_scoring.py.
"""

import inspect
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dco

positive = st.floats(0.05, 20)  # of gamma, beta and trust


def tables(L, K, nats=st.floats(-50, 0)):
    """Log-probs of K answers in L languages, (L, K) float64, not normalised."""
    row = st.lists(nats, min_size=K, max_size=K)
    rows = st.lists(row, min_size=L, max_size=L)
    return rows.map(lambda rows: torch.tensor(rows, dtype=torch.double))


def weights(L):
    """A number of each language, (L,) float64."""
    return tables(1, L, positive).map(lambda table: table[0])


def gammas(L):
    """Gamma (L, L) float64, without rule but for its diagonal of 0."""
    return tables(L, L, positive).map(lambda table: table.fill_diagonal_(0))


def assert_close(actual, expected):
    """Equal but for the rounding of numbers up to a million: margins times gamma times beta."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-8)


# ----------------------------------------------------------------------------------------- Eq. 11
@given(tables(2, 2), tables(2, 2), positive, positive, positive)
def test_dco_loss_is_eq_11_computed_from_its_eight_log_probs(logps, ref, gamma_1, gamma_2, beta):
    (p1w, p1l), (p2w, p2l) = logps.tolist()
    (r1w, r1l), (r2w, r2l) = ref.tolist()
    first = abs((beta * (p1w - r1w) - beta * (p1l - r1l)) - gamma_1 * (r2w - r2l))
    second = abs((beta * (p2w - r2w) - beta * (p2l - r2l)) - gamma_2 * (r1w - r1l))
    gamma = torch.tensor([[0, gamma_1], [gamma_2, 0]], dtype=torch.double)
    loss = dco.dco_loss(logps, ref, dco.align_reward(ref, gamma), beta)
    assert loss.tolist() == pytest.approx([first, second], rel=1e-9, abs=1e-9)
    # The code in its docstring is the same.
    lines = inspect.getdoc(dco.dco_loss).splitlines()
    code = [line.strip() for line in lines if line.startswith("    ")]
    names = {"logps": logps, "ref_logps": ref, "beta": beta, "gamma_1": gamma_1, "gamma_2": gamma_2}
    exec("\n".join(code), names)
    assert names["loss"].item() == pytest.approx(first + second, rel=1e-9, abs=1e-9)


@given(tables(2, 2), tables(2, 2), positive)
def test_dco_loss_is_the_authors_release_at_beta_1(logps, ref, b):
    """Its training loss: |r1 - o2 / b| + |r2 - b o1|, r implicit margins, o the reference's."""
    r1, r2 = (logps - ref)[:, 0] - (logps - ref)[:, 1]
    o1, o2 = ref[:, 0] - ref[:, 1]
    released = (r1 - o2 / b).abs() + (r2 - b * o1).abs()
    gamma = torch.tensor([[0, 1 / b], [b, 0]], dtype=torch.double)
    assert_close(dco.dco_loss(logps, ref, dco.align_reward(ref, gamma), 1.0).sum(), released)


@given(tables(1, 5), tables(1, 5), tables(1, 5), positive)
def test_more_than_two_answers_give_the_mean_over_their_pairs(logps, ref, r, beta):
    pairs = []
    for pair in combinations(range(5), 2):
        pairs.append(dco.dco_loss(logps[:, pair], ref[:, pair], r[:, pair], beta))
    assert_close(dco.dco_loss(logps, ref, r, beta), torch.stack(pairs).mean(0))


@given(tables(2, 5), tables(2, 5), gammas(2), st.integers(2, 4))
def test_missing_candidates_are_in_no_pair_and_get_no_gradient(logps, ref, gamma, K):
    short = ref[:, :K].clone()
    loss = dco.dco_loss(logps[:, :K], short, dco.align_reward(short, gamma), 1.0)
    policy = dco.optimal_policy(short, gamma, 1.0)
    nothing = torch.full((2, 5 - K), -torch.inf, dtype=torch.double)
    ref = torch.cat([short, nothing], dim=1)
    logps[:, K:] = nothing
    logps.requires_grad_()
    padded_loss = dco.dco_loss(logps, ref, dco.align_reward(ref, gamma), 1.0)
    padded_loss.sum().backward()
    assert_close(padded_loss, loss)
    assert logps.grad.isfinite().all() and (logps.grad[:, K:] == 0).all()
    assert_close(dco.optimal_policy(ref, gamma, 1.0), torch.cat([policy, nothing], dim=1))


@given(tables(3, 4), weights(3), positive, st.floats(0.1, 10))
def test_the_loss_is_zero_at_the_optimal_policy_and_nowhere_beside_it(ref, trust, beta, nats):
    gamma = dco.gamma_from_trust(trust, beta)
    r_align = dco.align_reward(ref, gamma)
    best = dco.optimal_policy(ref, gamma, beta)
    zero = torch.zeros(3, dtype=torch.double)
    assert_close(dco.dco_loss(best, ref, r_align, beta), zero)
    best[1, 0] += nats  # now 3 of the 6 pairs of language 1 have a residual
    expected = torch.tensor([0, beta * nats * 3 / 6, 0], dtype=torch.double)
    assert_close(dco.dco_loss(best, ref, r_align, beta), expected)


# ------------------------------------------------------------------- the reward and what it aims at
@given(tables(3, 4), gammas(3), st.integers(0, 2))
def test_the_reward_of_eq_15_sums_the_other_languages_and_not_its_own(ref, gamma, missing):
    by_hand = torch.zeros(3, 4, dtype=torch.double)
    for i in range(3):
        for j in range(3):
            if j != i:
                by_hand[i] += gamma[i, j] * ref[j]
    assert_close(dco.align_reward(ref, gamma), by_hand)
    ref[missing, 2] = -torch.inf  # a candidate that one language lacks is missing in all
    by_hand[:, 2] = -torch.inf
    assert_close(dco.align_reward(ref, gamma), by_hand)


@given(tables(2, 4), st.floats(0.05, 4), st.floats(0.05, 4), st.floats(0.5, 4))
def test_the_optimal_policy_is_the_product_of_experts_of_eq_9(ref, gamma_1, gamma_2, beta):
    gamma = torch.tensor([[0, gamma_1], [gamma_2, 0]], dtype=torch.double)
    policy = dco.optimal_policy(ref, gamma, beta).exp()
    first, second = ref.exp().tolist()
    product_1 = [a * b ** (gamma_1 / beta) for a, b in zip(first, second)]
    product_2 = [b * a ** (gamma_2 / beta) for a, b in zip(first, second)]
    assert policy[0].tolist() == pytest.approx([p / sum(product_1) for p in product_1], rel=1e-9)
    assert policy[1].tolist() == pytest.approx([p / sum(product_2) for p in product_2], rel=1e-9)


@given(tables(3, 4), weights(3), positive)
def test_every_trust_gives_one_consensus_weighted_by_it(ref, trust, beta):
    """So all languages rank alike (Lemma 3): each divides the same numbers by its own trust."""
    gamma = dco.gamma_from_trust(trust, beta)
    assert dco.is_consistent(gamma, beta)
    consensus = trust[0] * ref[0] + trust[1] * ref[1] + trust[2] * ref[2]
    expected = (consensus / trust[:, None]).log_softmax(-1)
    assert_close(dco.optimal_policy(ref, gamma, beta), expected)


@pytest.mark.parametrize(
    "gamma, beta, expected",
    [
        ([[0, 0.1], [10, 0]], 1.0, True),  # Lemma 1: gamma_1 gamma_2 = beta^2
        ([[0, 0.2], [10, 0]], 1.0, False),
        ([[0, 4], [1, 0]], 2.0, True),
        ([[0, 4], [1, 0]], 1.0, False),
        ([[0, 1], [1 + 1e-6, 0]], 1.0, True),  # rounding
        ([[0, 1], [1 + 1e-4, 0]], 1.0, False),
        ([[0, -1], [-1, 0]], 1.0, False),  # of rank one, and reverses rankings
        ([[0, 1, 1], [1, 0, 1], [1, 1, 0]], 1.0, True),
        ([[0, 1, 1], [1, 0, 1], [1, 1, 0]], 2.0, False),
        ([[0, 1, 1], [1, 0, 1], [5, 1, 0]], 1.0, False),
    ],
    ids=str,
)
def test_consistency_needs_rank_one_with_positive_entries(gamma, beta, expected):
    assert dco.is_consistent(torch.tensor(gamma), beta) is expected


# ------------------------------------------------------------------------------- the other methods
@given(tables(1, 2), tables(1, 2), positive)
def test_dpo_is_bradley_terry_on_implicit_rewards(logps, ref, beta):
    (p_w, p_l), (r_w, r_l) = logps[0].tolist(), ref[0].tolist()
    margin = beta * ((p_w - r_w) - (p_l - r_l))
    by_hand = max(-margin, 0) + math.log1p(math.exp(-abs(margin)))  # log(1 + exp(-margin))
    assert dco.dpo_loss(logps, ref, beta).item() == pytest.approx(by_hand, rel=1e-9, abs=1e-12)
    rewards = torch.tensor([margin, 0.0], dtype=torch.double)
    assert dco.bradley_terry_loss(rewards).item() == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


def test_sft_is_the_negative_log_likelihood():
    assert dco.sft_loss(torch.tensor([-2.0, -0.5])).tolist() == [2.0, 0.5]


# ----------------------------------------------------------------------------------------- errors
two, three = torch.zeros(2), torch.zeros(2, 3)
one_on_the_diagonal = torch.tensor([[0.0, 1], [1, 1]])


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (dco.align_reward, (three, torch.zeros(3, 3)), "not .*L, K"),
        (dco.align_reward, (two, torch.zeros(2, 2)), "not .*L, K"),
        (dco.align_reward, (three, one_on_the_diagonal), "gamma_ii must be 0"),
        (dco.dco_loss, (two[:1], two[:1], two[:1], 1.0), "two or more"),
        (dco.optimal_policy, (three, torch.zeros(2, 2), 0.0), "beta must be positive"),
        (dco.optimal_policy, (three, torch.zeros(2, 2), torch.inf), "beta must be positive"),
        (dco.dpo_loss, (two, two, 0.0), "beta must be positive"),
        (dco.dpo_loss, (two, two, torch.inf), "beta must be positive"),
        (dco.gamma_from_trust, (torch.tensor([1.0, 0]), 1.0), "trust must be positive"),
        (dco.gamma_from_trust, (torch.tensor([1.0, torch.inf]), 1.0), "trust .* finite"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_arguments_that_cannot_be_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
