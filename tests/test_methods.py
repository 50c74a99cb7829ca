"""What the paper compares DCO with (section 6.1), on tables: whom they train, where it ends."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import dco
import train

LANGS = ["en", "fr", "es", "sw", "de"]
coarse = st.sampled_from([-1.0, -2.0, -3.0])  # so that votes and sums tie


def tables(L=st.integers(3, 5), K=st.integers(2, 4), values=coarse):
    """(L, K) log-probs as lists."""
    return st.tuples(L, K).flatmap(
        lambda shape: st.lists(
            st.lists(values, min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        )
    )


def question(L: int, K: int, gold=0, id="q"):
    langs = LANGS[:L]
    return data.Question(
        id, "", gold, dict.fromkeys(langs, "x"), dict.fromkeys(langs, tuple("abcd"[:K]))
    )


def config(L: int, method: str, **more):
    return train.Config(**{"model": "m", "method": method, "langs": LANGS[:L], **more})


# ------------------------------------------------------------------------------------ the vote


def by_counting(rows: list[list[float]]) -> tuple[int, bool]:
    votes = Counter(row.index(max(row)) for row in rows)
    leaders = sorted(k for k in votes if votes[k] == max(votes.values()))
    return max(leaders, key=lambda k: (sum(row[k] for row in rows), -k)), len(leaders) > 1


@given(tables())
def test_the_majority_is_what_counting_says_with_ties_by_the_summed_log_probs(rows):
    winner, tied = dco.majority_vote(torch.tensor(rows))
    assert (int(winner), bool(tied)) == by_counting(rows)


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 6), st.randoms())
def test_the_order_of_languages_does_not_change_the_vote(seed, L, K, rng):
    """Also where sums differ by rounding alone: half of the languages mirror the others."""
    table = torch.randn(L, K, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    table = torch.cat([table, table.flip(-1)])
    found = {
        tuple(map(float, dco.majority_vote(table[rng.sample(range(2 * L), 2 * L)])))
        for _ in range(10)
    }
    assert len(found) == 1


def test_a_missing_candidate_wins_no_vote_and_other_questions_do_not_matter():
    inf = torch.inf
    split = [[-1.0, -2, -3], [-3.0, -1, -2], [-2.0, -2, -1]]  # a vote each
    table = torch.tensor([[[0.0, -1, -inf]] * 3, [[-5.0, -4, -1]] * 3, split])  # (B, L, K)
    winner, tied = dco.majority_vote(table)
    assert winner.tolist() == [0, 2, 1] and tied.tolist() == [False, False, True]


# ------------------------------------------------------------------------------------ the pairs


@given(tables())
def test_calm_trains_the_languages_whose_own_answer_is_not_the_majoritys(rows):
    L, K = len(rows), len(rows[0])
    winner, _ = by_counting(rows)
    chosen, used = train.select_candidates(question(L, K), torch.tensor(rows), 0, config(L, "calm"))
    own = [row.index(max(row)) for row in rows]
    assert used == [i for i in range(L) if own[i] != winner]
    assert all(chosen[i].tolist() == [winner, own[i]] for i in used)


@given(tables(), st.randoms(use_true_random=False))
def test_calm_gives_each_language_the_same_pair_in_whatever_order_they_stand(rows, rng):
    L, K = len(rows), len(rows[0])
    order = rng.sample(range(L), L)
    chosen, used = train.select_candidates(question(L, K), torch.tensor(rows), 0, config(L, "calm"))
    again, moved = train.select_candidates(
        question(L, K), torch.tensor([rows[i] for i in order]), 0, config(L, "calm")
    )
    pairs = {i: chosen[i].tolist() for i in used}
    assert {order[j]: again[j].tolist() for j in moved} == pairs


@given(st.integers(0, 3), st.integers(3, 5))
def test_a_unanimous_question_gives_no_pair_and_gold_is_not_looked_at(best, L):
    row = [-2.0] * 4
    row[best] = -1.0
    table = torch.tensor([row] * L)
    for gold in (0, 3, None):
        assert train.select_candidates(question(L, 4, gold), table, 0, config(L, "calm"))[1] == []
    other = torch.tensor([row] * (L - 1) + [row[1:] + row[:1]])
    assert train.select_candidates(question(L, 4), other, 0, config(L, "calm"))[1] == [L - 1]


@given(st.integers(2, 4), st.data(), st.integers(0, 50))
def test_dpo_prefers_gold_over_another_that_all_languages_share_and_sft_takes_gold(K, draw, seed):
    gold = draw.draw(st.integers(0, K - 1))
    table = torch.zeros(3, K)
    pairs, used = train.select_candidates(
        question(3, K, gold), table, 0, config(3, "dpo", seed=seed)
    )
    assert used == [0, 1, 2] and pairs.tolist() == [pairs[0].tolist()] * 3
    assert pairs[0, 0] == gold and 0 <= pairs[0, 1] < K and pairs[0, 1] != gold
    only, used = train.select_candidates(question(3, K, gold), table, 0, config(3, "sft"))
    assert used == [0, 1, 2] and only.tolist() == [[gold]] * 3


@given(st.integers(2, 4), st.integers(0, 50), st.integers(0, 6))
def test_dco_may_draw_exactly_as_dpo_does(K, seed, number):
    """Section 6.1: DPO, then DCO on the same instances."""
    table = torch.zeros(3, K)
    draws = [
        train.select_candidates(
            question(3, K, 1), table, number, config(3, method, seed=seed, **more)
        )
        for method, more in (("dpo", {}), ("dco", {"pairs": "gold"}))
    ]
    assert torch.equal(draws[0][0], draws[1][0]) and draws[0][1] == draws[1][1]
    pairwise = config(3, "dco", seed=seed, pairs="gold", objective="pairwise")
    chosen, trained = train.select_candidates(question(3, K, 1), table, number, pairwise)
    assert torch.equal(chosen, draws[0][0]) and len(trained) == 2


def test_the_other_answer_of_dpo_is_each_as_often():
    other = Counter(
        int(
            train.select_candidates(
                question(2, 4, 1, str(i)), torch.zeros(2, 4), 0, config(2, "dpo")
            )[0][0, 1]
        )
        for i in range(3000)
    )
    assert set(other) == {0, 2, 3} and all(abs(n - 1000) < 110 for n in other.values())


# ------------------------------------------------------------------------------------ where it ends


def descend(method: str, reference: torch.Tensor, golds: list, steps=4000, rate=0.2, **more):
    """Gradient descent on a policy that is a table, (Q, L, K), on the items that a run would take.

    Returns log pi and the pairs that were trained: (question, language, preferred, other).
    """
    Q, L, K = reference.shape
    settings = config(L, method, batch_questions=Q, **more)
    questions = [question(L, K, gold, str(q)) for q, gold in enumerate(golds)]
    trees = [[data.Tree([0], [[q, i, k] for k in range(K)]) for i in range(L)] for q in range(Q)]
    gamma = dco.gamma_from_trust(torch.ones(L, dtype=torch.double), settings.beta)
    (items,) = train.make_batches(questions, trees, reference, gamma, settings)
    rows = [(item.trees[i].branches, item.ref_logps[i], item.r_align[i]) for item in items
            for i in item.trained]  # fmt: skip
    policy = reference.clone().requires_grad_()
    for _ in range(steps):
        logps, loss = policy.log_softmax(-1), 0.0
        for branches, ref, r_align in rows:
            got = torch.stack([logps[q, i, k] for q, i, k in branches])
            loss = loss + train.language_loss(got, ref[: len(got)], r_align[: len(got)], settings)
        (gradient,) = torch.autograd.grad(loss, policy)
        policy.data -= rate * gradient
    pairs = [(b[0][0], b[0][1], b[0][2], b[-1][2]) for b, *_ in rows]
    return policy.detach().log_softmax(-1), pairs


@pytest.fixture(scope="module")
def reference():
    g = torch.Generator().manual_seed(5)
    return torch.randn(3, 6, 4, generator=g).transpose(0, 1).mul(2).log_softmax(-1)


def test_dpo_prefers_the_gold_answer_on_every_training_pair_at_convergence(reference):
    golds = [0, 1, 2, 3, 0, 1]
    logps, pairs = descend("dpo", reference, golds, steps=400, rate=3.0, beta=0.5)
    assert len(pairs) == 18
    for q, i, preferred, other in pairs:
        assert preferred == golds[q] and logps[q, i, preferred] > logps[q, i, other]
    assert any(reference[q, i, w] < reference[q, i, l] for q, i, w, l in pairs)  # noqa: E741


def test_sft_makes_the_gold_answer_the_likeliest_in_every_language(reference):
    golds = [0, 1, 2, 3, 0, 1]
    logps, _ = descend("sft", reference, golds, steps=300)
    assert (logps.argmax(-1).T == torch.tensor(golds)).all() and logps.amax(-1).min() > -0.2


def test_calm_brings_every_language_over_to_the_majority_and_leaves_the_others_alone(reference):
    logps, pairs = descend("calm", reference, [None] * 6, steps=400, rate=3.0, beta=0.5)
    own, touched = reference.argmax(-1), {(q, i) for q, i, *_ in pairs}
    for q in range(6):
        winner, _ = by_counting(reference[q].tolist())
        for i in range(3):
            if own[q, i] == winner:
                assert (q, i) not in touched
                torch.testing.assert_close(logps[q, i], reference[q, i])
            else:
                assert (q, i) in touched and logps[q, i, winner] > logps[q, i, own[q, i]]
