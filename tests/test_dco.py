"""The paper's equations: each against an independent computation, then its properties."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dco

numbers = st.floats(-30, 0)
positive = st.floats(0.05, 20)


def table(seed: int, *shape: int) -> torch.Tensor:
    """Log-probs, normalised over the last axis, float64."""
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        .mul(3)
        .log_softmax(-1)
    )


def eq_11(p, ref, gamma_1, gamma_2, beta):
    """Eq. 11 of one question in two languages from its eight log-probs, sharing no code."""
    (p1w, p1l), (p2w, p2l) = p
    (r1w, r1l), (r2w, r2l) = ref
    first = (beta * (p1w - r1w) - beta * (p1l - r1l)) - gamma_1 * (r2w - r2l)
    second = (beta * (p2w - r2w) - beta * (p2l - r2l)) - gamma_2 * (r1w - r1l)
    return abs(first) + abs(second)


@given(st.lists(numbers, min_size=8, max_size=8), positive, positive, positive)
def test_dco_loss_is_eq_11_computed_from_its_eight_log_probs(values, gamma_1, gamma_2, beta):
    p, ref = [values[:2], values[2:4]], [values[4:6], values[6:]]
    gamma = torch.tensor([[0, gamma_1], [gamma_2, 0]], dtype=torch.double)
    logps, ref_logps = torch.tensor(p, dtype=torch.double), torch.tensor(ref, dtype=torch.double)
    loss = dco.dco_loss(logps, ref_logps, dco.align_reward(ref_logps, gamma), beta).sum()
    assert float(loss) == pytest.approx(eq_11(p, ref, gamma_1, gamma_2, beta), abs=1e-9, rel=1e-9)


@given(st.lists(numbers, min_size=8, max_size=8), positive, positive, positive)
def test_the_code_in_its_docstring_is_eq_11_in_two_languages(values, gamma_1, gamma_2, beta):
    lines = inspect.getdoc(dco.dco_loss).splitlines()
    code = [line.strip() for line in lines if line.startswith("    ")]
    assert len(code) == 6
    logps, ref_logps = torch.tensor(values, dtype=torch.double).view(2, 2, 2)
    names = {"logps": logps, "ref_logps": ref_logps, "beta": beta}
    names |= {"gamma_1": gamma_1, "gamma_2": gamma_2}
    exec("\n".join(code), names)
    gamma = torch.tensor([[0, gamma_1], [gamma_2, 0]], dtype=torch.double)
    terms = dco.dco_loss(logps, ref_logps, dco.align_reward(ref_logps, gamma), beta)
    torch.testing.assert_close(terms, torch.stack([names["term_1"], names["term_2"]]))
    torch.testing.assert_close(terms.sum(), names["loss"])


def test_dco_loss_is_the_authors_release_at_beta_1():
    """Its training loss: |r1 - o2 / b| + |r2 - b o1|, r implicit margins, o the reference's."""
    logps, ref, b = table(0, 5, 2, 2), table(1, 5, 2, 2), 3.0
    r, o = (logps - ref)[..., 0] - (logps - ref)[..., 1], ref[..., 0] - ref[..., 1]
    theirs = (r[:, 0] - o[:, 1] / b).abs() + (r[:, 1] - b * o[:, 0]).abs()
    gamma = torch.tensor([[0, 1 / b], [b, 0]])
    torch.testing.assert_close(
        dco.dco_loss(logps, ref, dco.align_reward(ref, gamma), 1.0).sum(-1), theirs
    )


def test_more_than_two_answers_give_the_mean_over_their_pairs():
    logps, ref, r = table(0, 5), table(1, 5), table(2, 5)
    pairs = [
        dco.dco_loss(logps[[i, j]], ref[[i, j]], r[[i, j]], 0.7) for i in range(5) for j in range(i)
    ]
    torch.testing.assert_close(dco.dco_loss(logps, ref, r, 0.7), torch.stack(pairs).mean())


def test_missing_candidates_are_in_no_pair_and_get_no_gradient():
    logps, ref, gamma = table(0, 2, 5), table(1, 2, 5), torch.tensor([[0, 2.0], [0.5, 0]])
    padded, gone = logps.clone(), ref.clone()
    padded[:, 3:], gone[:, 3:] = -torch.inf, -torch.inf
    padded.requires_grad_()
    loss = dco.dco_loss(padded, gone, dco.align_reward(gone, gamma), 1.0)
    short = ref[:, :3]
    torch.testing.assert_close(
        loss, dco.dco_loss(logps[:, :3], short, dco.align_reward(short, gamma), 1.0)
    )
    loss.sum().backward()
    assert padded.grad.isfinite().all() and (padded.grad[:, 3:] == 0).all()
    policy = dco.optimal_policy(gone, gamma, 1.0)
    torch.testing.assert_close(policy[:, :3], dco.optimal_policy(short, gamma, 1.0))
    assert policy[:, 3:].isneginf().all()


def test_a_row_with_fewer_than_two_candidates_is_nan_and_leaves_the_others():
    logps, ref, r = table(0, 3, 4), table(1, 3, 4), table(2, 3, 4)
    whole = dco.dco_loss(logps, ref, r, 1.0)
    r[1, 1:] = -torch.inf
    loss = dco.dco_loss(logps, ref, r, 1.0)
    assert loss[1].isnan() and torch.equal(loss[[0, 2]], whole[[0, 2]])


@given(st.integers(0, 10**6), positive, positive, positive)
def test_swapping_languages_swaps_the_gammas(seed, gamma_1, gamma_2, beta):
    logps, ref = table(seed, 2, 2), table(seed + 1, 2, 2)
    gamma = torch.tensor([[0, gamma_1], [gamma_2, 0]], dtype=torch.double)
    there = dco.dco_loss(logps, ref, dco.align_reward(ref, gamma), beta)
    back = dco.dco_loss(
        logps.flip(0), ref.flip(0), dco.align_reward(ref.flip(0), gamma.flip(0, 1)), beta
    )
    torch.testing.assert_close(there, back.flip(0))


@given(st.integers(0, 10**6), positive)
def test_swapping_the_answers_changes_nothing(seed, beta):
    logps, ref, r = table(seed, 3, 2), table(seed + 1, 3, 2), table(seed + 2, 3, 2)
    torch.testing.assert_close(
        dco.dco_loss(logps, ref, r, beta),
        dco.dco_loss(*(x.flip(-1) for x in (logps, ref, r)), beta),
    )


@given(st.integers(0, 10**6), numbers, numbers, positive)
def test_a_constant_of_the_prompt_cancels(seed, c, d, beta):
    """c(x) of Eq. 12 and log Z of Eq. 3: the loss sees differences only."""
    logps, ref, r = table(seed, 4), table(seed + 1, 4), table(seed + 2, 4)
    torch.testing.assert_close(
        dco.dco_loss(logps + c, ref, r + d, beta), dco.dco_loss(logps, ref, r, beta)
    )


@given(st.integers(0, 10**6), st.integers(2, 6), positive)
def test_the_loss_is_zero_at_the_optimal_policy_and_nowhere_beside_it(seed, K, beta):
    ref = table(seed, 3, K)
    gamma = dco.gamma_from_trust(torch.tensor([1.0, 2.0, 0.5], dtype=torch.double), beta)
    r = dco.align_reward(ref, gamma)
    best = dco.optimal_policy(ref, gamma, beta)
    assert dco.dco_loss(best, ref, r, beta).max() < 1e-9 * (1 + beta * 100)
    best[1, 0] += 0.1  # one residual is not zero
    loss = dco.dco_loss(best, ref, r, beta)
    assert (
        loss[1] == pytest.approx(beta * 0.1 * (K - 1) / (K * (K - 1) / 2), rel=1e-6)
        and loss[[0, 2]].max() < 1e-6
    )


@given(st.integers(0, 10**6), positive, positive)
def test_before_the_first_step_the_loss_is_its_closed_form_in_reference_margins(
    seed, gamma_1, gamma_2
):
    """Policy = reference: r-hat is 0, and Eq. 11 is gamma_1 |margin_2| + gamma_2 |margin_1|."""
    ref = table(seed, 2, 2)
    gamma = torch.tensor([[0, gamma_1], [gamma_2, 0]], dtype=torch.double)
    margin = (ref[:, 0] - ref[:, 1]).abs()
    loss = dco.dco_loss(ref, ref, dco.align_reward(ref, gamma), 1.0)
    torch.testing.assert_close(loss, torch.stack([gamma_1 * margin[1], gamma_2 * margin[0]]))


def test_the_reward_of_eq_15_sums_the_other_languages_and_not_its_own():
    ref, gamma = table(0, 4, 3, 5), torch.rand(3, 3).fill_diagonal_(0)
    reward = dco.align_reward(ref, gamma)
    for i in range(3):
        by_hand = sum(float(gamma[i, j]) * ref[:, j] for j in range(3) if j != i)
        torch.testing.assert_close(reward[:, i], by_hand, rtol=1e-6, atol=1e-6)


def test_a_candidate_that_one_language_lacks_is_missing_in_all():
    ref, gamma = table(0, 4, 3, 5), torch.rand(3, 3).fill_diagonal_(0)
    whole = dco.align_reward(ref, gamma)
    ref[:, 1, 2] = -torch.inf
    reward = dco.align_reward(ref, gamma)
    assert reward[..., 2].isneginf().all()
    torch.testing.assert_close(reward[..., [0, 1, 3, 4]], whole[..., [0, 1, 3, 4]])


@given(st.integers(0, 10**6), positive, positive)
def test_the_optimal_policy_is_the_product_of_experts_of_eq_9(seed, gamma_1, beta):
    ref, gamma_2 = table(seed, 2, 4), 1.7
    policy = dco.optimal_policy(
        ref, torch.tensor([[0, gamma_1], [gamma_2, 0]], dtype=torch.double), beta
    ).exp()
    for i, gamma in enumerate((gamma_1, gamma_2)):
        product = [
            math.exp(ref[i, k]) * math.exp(ref[1 - i, k]) ** (gamma / beta) for k in range(4)
        ]
        assert policy[i].tolist() == pytest.approx([p / sum(product) for p in product])


@given(st.integers(0, 10**6), st.integers(2, 6), positive)
def test_every_trust_gives_a_consistent_gamma_and_a_policy_that_ranks_alike(seed, L, beta):
    trust = (
        torch.rand(L, generator=torch.Generator().manual_seed(seed), dtype=torch.double) * 10 + 0.1
    )
    gamma = dco.gamma_from_trust(trust, beta)
    assert dco.is_consistent(gamma, beta)
    ranking = dco.optimal_policy(table(seed, L, 6), gamma, beta).argsort(-1)
    assert (ranking == ranking[0]).all()  # Lemma 3
    consensus = (trust[:, None] * table(seed, L, 6)).sum(0) / trust[:, None]
    torch.testing.assert_close(
        dco.optimal_policy(table(seed, L, 6), gamma, beta), consensus.log_softmax(-1)
    )


def test_consistency_needs_rank_one_with_positive_entries():
    assert dco.is_consistent(
        torch.tensor([[0, 0.1], [10, 0]]), 1.0
    )  # Lemma 1: gamma_1 gamma_2 = beta^2
    assert not dco.is_consistent(torch.tensor([[0, 0.2], [10, 0]]), 1.0)
    assert dco.is_consistent(torch.tensor([[0, 4.0], [1.0, 0]]), 2.0)
    assert not dco.is_consistent(torch.tensor([[0, 4.0], [1.0, 0]]), 1.0)
    ones = torch.ones(3, 3).fill_diagonal_(0)
    assert dco.is_consistent(ones, 1.0) and not dco.is_consistent(ones, 2.0)
    assert not dco.is_consistent(torch.tensor([[0, 1, 1], [1, 0, 1], [5.0, 1, 0]]), 1.0)
    w = torch.tensor([1.0, -1, 2])
    assert not dco.is_consistent((w / w[:, None]).fill_diagonal_(0), 1.0)
    assert not dco.is_consistent(torch.tensor([[0, 1 + 1e-4], [1, 0]]), 1.0)
    assert dco.is_consistent(torch.tensor([[0, 1 + 1e-6], [1, 0]]), 1.0)
    assert dco.is_consistent(-ones[:2, :2], 1.0) is False  # rank one, and turns a ranking round
    ref = table(0, 2, 5)
    policy = dco.optimal_policy(ref, -ones[:2, :2].double(), 1.0)
    assert policy[0].argsort().tolist() == policy[1].argsort(descending=True).tolist()


def test_in_two_languages_the_ratio_of_trust_is_gamma_1_over_beta():
    gamma = dco.gamma_from_trust(torch.tensor([10.0, 1.0]), 2.0)
    torch.testing.assert_close(gamma, torch.tensor([[0, 0.2], [20.0, 0]]))


@given(st.integers(0, 10**6))
def test_a_smaller_gamma_keeps_its_language_nearer_the_reference(seed):
    """Remark 1. By it (10, 0.1) with English first is not "EN stable" (section 6.4)."""
    ref = table(seed, 2, 5)

    def moved(gamma_1):  # KL(pi* || pi_REF) of each language under Lemma 1
        policy = dco.optimal_policy(
            ref, torch.tensor([[0, gamma_1], [1 / gamma_1, 0]]).double(), 1.0
        )
        return (policy.exp() * (policy - ref)).sum(-1)

    (en_stable, sw_moves), (both, either), (en_moves, sw_stable) = map(moved, (0.1, 1.0, 10.0))
    assert en_stable < both < en_moves and sw_stable < either < sw_moves


@given(st.integers(0, 10**6), positive)
def test_a_uniform_expert_changes_nothing_and_a_certain_one_decides(seed, gamma_1):
    """Section 6.5: a *low*-entropy expert contributes minimally? It is the high-entropy one."""
    ref, gamma = table(seed, 2, 4), torch.tensor([[0, gamma_1], [1.0, 0]]).double()
    ref[1] = -math.log(4)
    torch.testing.assert_close(dco.optimal_policy(ref, gamma, 1.0)[0], ref[0])
    ref[1] = torch.tensor([0.0, -1e4, -1e4, -1e4])
    assert dco.optimal_policy(ref, gamma, 1.0)[0].exp()[0] > 0.999999


@given(numbers, numbers, positive)
def test_dpo_is_bradley_terry_on_implicit_rewards(a, b, beta):
    logps, ref = (
        torch.tensor([a, b], dtype=torch.double),
        torch.tensor([b / 2, a / 3], dtype=torch.double),
    )
    margin = beta * ((a - b / 2) - (b - a / 3))
    by_hand = math.log1p(math.exp(-margin)) if margin > -30 else -margin
    assert float(dco.dpo_loss(logps, ref, beta)) == pytest.approx(by_hand, rel=1e-9, abs=1e-12)
    assert float(dco.bradley_terry_loss(torch.tensor([margin, 0.0]))) == pytest.approx(
        by_hand, rel=1e-4, abs=1e-6
    )


def test_sft_is_the_negative_log_likelihood():
    assert dco.sft_loss(torch.tensor([-2.0, -0.5])).tolist() == [2.0, 0.5]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dco.align_reward(torch.zeros(2, 3), torch.zeros(3, 3)), "not .*L, K"),
        (lambda: dco.align_reward(torch.zeros(2, 3), torch.eye(2)), "gamma_ii must be 0"),
        (lambda: dco.align_reward(torch.zeros(2, 3), torch.tensor([[0, 1], [1, 1.0]])), "gamma_ii"),
        (lambda: dco.dco_loss(*[torch.zeros(3, 1)] * 3, 1.0), "two or more"),
        (lambda: dco.align_reward(torch.zeros(3), torch.zeros(3, 3)), "not .*L, K"),
        (lambda: dco.optimal_policy(torch.zeros(2, 3), torch.zeros(2, 2), 0.0), "beta must be"),
        (lambda: dco.dpo_loss(*[torch.zeros(2)] * 2, -1.0), "beta must be positive"),
        (lambda: dco.gamma_from_trust(torch.tensor([1.0, 0.0]), 1.0), "positive"),
        (lambda: dco.gamma_from_trust(torch.tensor([1.0, -1.0]), 1.0), "positive"),
        (lambda: dco.gamma_from_trust(torch.tensor([1.0, torch.inf]), 1.0), "finite"),
    ],
)
def test_arguments_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
