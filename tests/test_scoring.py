"""completion_logps: packed prefix trees against one plain forward an answer, family by family."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import dco
from conftest import tiny_llama

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "mistral": SMALL,
    "cohere": {**SMALL, "logit_scale": 1.0},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 64},
    "gpt2": {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4},
}
WINDOWED = {  # a window of 6, which the trees exceed; in all layers, or in one of two
    "mistral": {},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "ministral": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"logit_scale": 1.0, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 8, "use_sliding_window": True, "max_window_layers": 1},
    "gpt_oss": {"head_dim": 8},
}
EAGER_ONLY = ("gemma2", "gpt_oss")  # by transformers' own word


def tiny(family: str, attention: str, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, SMALL), **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for weight in model.parameters():  # far from uniform, so that a token in the wrong place shows
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def some_trees(seed: int, number: int = 8) -> list[data.Tree]:
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(100) for _ in range(rng.randint(low, high))]

    return [
        data.Tree(ids(1, 25), [ids(2, 5) for _ in range(rng.randint(2, 6))], rng.randint(0, 1))
        for _ in range(number)
    ]


def one_by_one(model, trees) -> list[list[torch.Tensor]]:
    """The plain way: prompt and answer alone, all logits, the answer's log-probs summed."""
    scores = []
    for prefix, branches, prompt_len in trees:
        scores.append([])
        for branch in branches:
            ids = torch.tensor([prefix + branch])
            logps = (
                model(input_ids=ids)
                .logits[0, :-1]
                .log_softmax(-1)
                .gather(1, ids[0, 1:, None])[:, 0]
            )
            scores[-1].append(logps[len(logps) - (len(branch) - prompt_len) :].sum())
    return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_trees_score_as_separate_forwards(family, attention):
    model, trees = tiny(family, attention), some_trees(1)
    with torch.no_grad():
        packed, apart = (
            dco.completion_logps(model, trees),
            dco.completion_logps(model, trees, packed=False),
        )
        plain = one_by_one(model, trees)
    assert packed.dtype == torch.float32 and packed.shape == (
        8,
        max(len(tree.branches) for tree in trees),
    )
    for t, row in enumerate(plain):
        torch.testing.assert_close(packed[t, : len(row)], torch.stack(row), rtol=1e-4, atol=1e-4)
        assert packed[t, len(row) :].isneginf().all()
    torch.testing.assert_close(apart, packed, rtol=1e-4, atol=1e-4)
    assert dco.packs_exactly(model, trees)


def test_a_model_that_refuses_the_mask_falls_back_to_separate_rows():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model, trees = (
        BloomForCausalLM(BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)).eval(),
        some_trees(2),
    )
    assert not dco.packs_exactly(model, trees)
    with torch.no_grad():
        apart, plain = dco.completion_logps(model, trees, packed=False), one_by_one(model, trees)
    for t, row in enumerate(plain):
        torch.testing.assert_close(apart[t, : len(row)], torch.stack(row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family, attention",
    [(f, a) for f in WINDOWED for a in ("sdpa", "eager") if a == "eager" or f not in EAGER_ONLY],
)
def test_packed_trees_are_exact_beyond_a_sliding_window(family, attention):
    model, trees = tiny(family, attention, sliding_window=6, **WINDOWED[family]), some_trees(1)
    with torch.no_grad():
        packed, plain = dco.completion_logps(model, trees), one_by_one(model, trees)
        wide = one_by_one(tiny(family, attention, sliding_window=64, **WINDOWED[family]), trees)
    apart = 0.0
    for t, row in enumerate(plain):
        torch.testing.assert_close(packed[t, : len(row)], torch.stack(row), rtol=1e-4, atol=1e-4)
        apart = max(apart, float((torch.stack(wide[t]) - torch.stack(row)).abs().max()))
    assert apart > 0.1  # the window counts, or this would show nothing
    assert dco.packs_exactly(model, trees)


def test_a_window_in_the_config_that_the_model_does_not_use_is_found_out():
    assert not dco.packs_exactly(tiny("llama", "sdpa", sliding_window=6), some_trees(1))
    assert dco.packs_exactly(tiny("llama", "sdpa", sliding_window=64), some_trees(1))


def test_a_model_that_ignores_the_mask_is_found_out():
    model, trees = tiny("llama", "sdpa"), some_trees(3)
    forward = model.forward
    model.forward = lambda attention_mask, **rest: forward(
        attention_mask=attention_mask if attention_mask.ndim == 2 else None, **rest
    )
    assert not dco.packs_exactly(model, trees)


@pytest.mark.parametrize("error", [KeyError, ValueError, TypeError, RuntimeError])
def test_a_model_that_cannot_take_the_mask_of_its_layers_falls_back(error):
    """As one that mixes windows with another kind of layer, which the masks do not name."""
    model, trees = tiny("gemma3_text", "sdpa", sliding_window=6), some_trees(3)
    forward = model.forward

    def only_two_dimensions(attention_mask, **rest):
        if not torch.is_tensor(attention_mask) or attention_mask.ndim == 4:
            raise error("chunked_attention")
        return forward(attention_mask=attention_mask, **rest)

    model.forward = only_two_dimensions
    assert not dco.packs_exactly(model, trees)


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_a_tree_scores_the_same_in_any_company(seed):
    """Whatever lies in the row: no token sees another question, or another answer of its own."""
    model, trees = tiny_llama(100), some_trees(seed, 6)
    with torch.no_grad():
        together = dco.completion_logps(model, trees)
        for t in range(6):
            alone = dco.completion_logps(model, trees[t : t + 1])
            torch.testing.assert_close(
                together[t : t + 1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4
            )


def test_gradients_are_those_of_separate_rows_with_and_without_checkpointing():
    trees, model = some_trees(4), tiny_llama(100)
    grads = {}
    for name, packed, checkpoint in (
        ("packed", True, False),
        ("apart", False, False),
        ("checkpointed", True, True),
    ):
        model.zero_grad()
        model.train(checkpoint)
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        scores = dco.completion_logps(model, trees, packed)
        scores[scores.isfinite()].square().sum().backward()
        grads[name] = [weight.grad for weight in model.parameters()]
        assert all(grad is not None for grad in grads[name])
    for name in ("apart", "checkpointed"):
        for a, b in zip(grads["packed"], grads[name]):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def test_letters_cost_the_bare_prompt():
    tree = data.Tree([5, 6, 7, 8], [[1], [2], [3], [4]])
    assert tree.tokens() == 4 and tree.tokens(packed=False) == 16
    model, fed = tiny_llama(100), []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        scores = dco.completion_logps(model, [tree])
        expected = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1].log_softmax(-1)[1:5]
    assert fed[0] == 4
    torch.testing.assert_close(scores[0], expected)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.sampled_from([32, 576, 4096]))
def test_rows_are_never_dearer_than_one_long_row_or_one_row_each(sizes, hidden_size):
    def cost(rows):
        widths = [
            sum(size for size, r in zip(sizes, rows) if r == row) for row in range(max(rows) + 1)
        ]
        return len(widths) * max(widths) * (6 * hidden_size + max(widths))

    rows = dco.assign_rows(sizes, hidden_size)
    assert len(rows) == len(sizes) and set(rows) == set(range(max(rows) + 1))
    assert cost(rows) <= min(cost([0] * len(sizes)), cost(list(range(len(sizes)))))


def test_log_probs_are_summed_in_float32_under_bfloat16_weights():
    """In bfloat16 a log-prob near -60 is known to 0.25 only; the sum over float32 loses nothing."""
    model = tiny_llama(100).to(torch.bfloat16)
    tree = data.Tree([1, 2, 3], [list(range(20)), list(range(20, 40))])
    with torch.no_grad():
        scores = dco.completion_logps(model, [tree])
        for k, branch in enumerate(tree.branches):
            ids = torch.tensor([tree.prefix + branch])
            logps = model(input_ids=ids).logits[0, 2:-1].float().log_softmax(-1)
            assert scores.dtype == torch.float32
            assert float(scores[0, k]) == pytest.approx(
                float(logps[range(20), branch].sum()), abs=0.3
            )
            assert float(scores[0, k]) != float(scores[0, k].bfloat16())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_autocast_keeps_the_mask(attention):
    """The mask's lowest float32 is no bfloat16: what is masked must stay so, and nothing be NaN."""
    model, trees = tiny("llama", attention), some_trees(5)
    with torch.no_grad():
        exact = dco.completion_logps(model, trees)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = dco.completion_logps(model, trees)
    assert rounded.dtype == torch.float32 and not rounded.isnan().any()
    there = exact.isfinite()
    assert (rounded - exact)[there].abs().mean() < 0.05 * exact[there].abs().mean()


def test_logits_are_computed_only_where_a_row_scores_something():
    """Letters after prompts of several lengths: a row each, one column of logits for all."""
    model, asked = tiny_llama(100), []
    trees = [data.Tree(list(range(1, n)), [[1], [2], [3], [4]]) for n in (90, 92, 95, 98)]
    assert dco.assign_rows([tree.tokens() for tree in trees], 32) == [3, 2, 1, 0]
    model.register_forward_pre_hook(
        lambda _, __, kwargs: asked.append(kwargs["logits_to_keep"]), with_kwargs=True
    )
    with torch.no_grad():
        dco.completion_logps(model, trees)
    assert len(asked[0]) == 1


def test_what_encode_returns_is_scored_as_a_table_of_questions_and_languages(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        auto.from_pretrained(world / "model") for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    langs = ["en", "es"]
    questions = data.load(f"jsonl:{world / 'q.jsonl'}", langs)
    rows = data.encode(tokenizer, questions, langs)
    table = dco.completion_logps(model, rows)  # (Q, L, K)
    assert table.shape == (len(questions), 2, 4)
    for q, row in enumerate(rows):
        (alone,) = one_by_one(model, row[1:])
        torch.testing.assert_close(table[q, 1, : questions[q].K], torch.stack(alone))
    with pytest.raises(ValueError, match="as data.encode returns"):
        dco.completion_logps(model, ["The capital of Peru is Lima"])


def test_a_model_that_does_not_take_packed_questions_is_scored_apart_with_a_warning(monkeypatch):
    model, trees = tiny("llama", "sdpa"), some_trees(1)
    monkeypatch.setattr(dco, "packs_exactly", lambda *_, **__: False)
    with pytest.warns(UserWarning, match="does not take packed"):
        scores = dco.completion_logps(model, trees)
    torch.testing.assert_close(scores, dco.completion_logps(model, trees, packed=False))
