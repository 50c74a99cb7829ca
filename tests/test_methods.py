"""What the paper compares DCO with (section 6.1), on tables: who is trained towards what."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import dco
import train

LANGS = ["en", "fr", "es", "sw", "de"]


def tables(L, K, nats):
    """Log-probs of K answers in L languages, as lists."""
    row = st.lists(nats, min_size=K, max_size=K)
    return st.lists(row, min_size=L, max_size=L)


coarse = st.sampled_from([-1.0, -2.0, -3.0])  # so that votes and sums tie
shapes = st.tuples(st.integers(3, 5), st.integers(2, 4))
coarse_tables = shapes.flatmap(lambda shape: tables(*shape, coarse))


def settings(L, method, **changes):
    config = train.Config(model="m", method=method, langs=LANGS[:L], **changes)
    return train.with_defaults(config)


def example(table, config, gold=0, id="q", n=0):
    """The n-th draw from a question whose reference is `table`, (L, K); tokens name its answers."""
    L, K = len(table), int(table[0].isfinite().sum())
    answers = dict.fromkeys(LANGS[:L], tuple("abcd"[:K]))
    question = data.Question(id, "", gold, dict.fromkeys(LANGS[:L], "x"), answers)
    trees = [data.Tree([0], [[k] for k in range(K)])] * L
    return train.make_example(question, trees, table, n, config)


def candidates_of(example):
    """What each language is trained on, {language: its candidates}."""
    candidates = {}
    for i in example.learns.nonzero()[:, 0].tolist():
        candidates[i] = [k for [k] in example.trees[i].branches]
    return candidates


# ------------------------------------------------------------------------------------ the vote
def by_counting(rows: list[list[float]]) -> tuple[int, bool]:
    """The answer of most rows, ties by the larger sum, then the first; and whether it tied."""
    votes = Counter(row.index(max(row)) for row in rows)
    leaders = sorted(k for k in votes if votes[k] == max(votes.values()))
    sums = [sum(row[k] for row in rows) for k in leaders]
    return leaders[sums.index(max(sums))], len(leaders) > 1


@given(coarse_tables)
def test_the_majority_is_what_counting_says_with_ties_by_the_summed_log_probs(rows):
    winner, tied = dco.majority_vote(torch.tensor(rows))
    assert (int(winner), bool(tied)) == by_counting(rows)


# 24 bits each: a sum of six is rounded in float32, and exact in float64.
nats_of_24_bits = st.integers(1 - 2**24, 0).map(lambda n: n / 2**20)


@given(tables(3, 3, nats_of_24_bits), st.permutations(range(6)))
def test_the_order_of_languages_does_not_change_the_vote(rows, order):
    """Where half of the languages mirror the others, sums of answers differ by rounding alone."""
    table = torch.tensor(rows + [row[::-1] for row in rows])
    assert dco.majority_vote(table[order]) == dco.majority_vote(table)


def test_a_missing_candidate_wins_no_vote_and_other_questions_do_not_matter():
    missing = [[0.0, -1, -torch.inf]] * 3
    agreed = [[-5.0, -4, -1]] * 3
    one_vote_each = [[-1.0, -2, -3], [-3.0, -1, -2], [-2.0, -2, -1]]
    winner, tied = dco.majority_vote(torch.tensor([missing, agreed, one_vote_each]))
    assert winner.tolist() == [0, 2, 1] and tied.tolist() == [False, False, True]


# ------------------------------------------------------------------------------------ the pairs
@given(coarse_tables, st.sampled_from([0, 1, None]))
def test_calm_trains_the_languages_whose_own_answer_is_not_the_majoritys(rows, gold):
    winner, _ = by_counting(rows)
    own = [row.index(max(row)) for row in rows]
    expected = {i: [winner, k] for i, k in enumerate(own) if k != winner}
    made = example(torch.tensor(rows), settings(len(rows), "calm"), gold=gold)
    assert candidates_of(made) == expected


@pytest.mark.parametrize("gold", range(3))
def test_dpo_prefers_gold_over_another_that_all_languages_share_and_sft_takes_gold(gold):
    table, others = torch.zeros(2, 3), Counter()
    for n in range(300):
        _, other = candidates_of(example(table, settings(2, "dpo"), gold, n=n))[0]
        others[other] += 1
        for config in (settings(2, "dpo"), settings(2, "dco", pairs="gold")):
            # Section 6.1: DPO, then DCO on the same instances.
            made = example(table, config, gold, n=n)
            assert candidates_of(made) == {0: [gold, other], 1: [gold, other]}
    assert set(others) == {0, 1, 2} - {gold} and min(others.values()) > 110
    assert candidates_of(example(table, settings(2, "sft"), gold)) == {0: [gold], 1: [gold]}


@pytest.mark.parametrize("asked", [0, 2, 3])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_dco_draws_as_many_candidates_as_asked_or_all_with_their_reference(asked, K):
    """What is not drawn, and what only other questions have, is missing: in no pair of Eq. 11."""
    table = torch.arange(15.0).view(3, 5)
    table[:, K:] = -torch.inf
    made = example(table, settings(3, "dco", candidates=asked))
    drawn = candidates_of(made)[0]
    assert len(drawn) == len(set(drawn)) == min(asked or K, K)
    assert candidates_of(made) == {0: drawn, 1: drawn, 2: drawn}
    expected = torch.full((3, 5), -torch.inf)
    expected[:, : len(drawn)] = table[:, drawn]
    assert torch.equal(made.ref_logps, expected)
