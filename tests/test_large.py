"""What large models need: the same training in every division over processes, in bfloat16, too."""

import json
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import data
import dco
import test_scoring
import train as program
from conftest import assert_same, tiny_llama, train, weights

SMALL = {**test_scoring.SMALL, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
TEXT = {**SMALL, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
FAMILIES = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "head_dim": 8, "tie_word_embeddings": True},
    "cohere": {**SMALL, "logit_scale": 0.5, "pad_token_id": 0},
    "llama": SMALL,
    "mistral": SMALL,
}
FEW = ("--train_questions", 3, "--test_questions", 2)


def saved(world, folder, family):
    """A tiny model of a family, with the world's tokenizer; bfloat16, as they are published."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    settings = {**FAMILIES[family], "vocab_size": len(tokenizer)}
    if family == "gemma3":
        settings = {**FAMILIES[family], "text_config": {**TEXT, "vocab_size": len(tokenizer)}}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(out, name="answers"):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_update_of_every_family_is_the_same_however_it_is_divided(world, tmp_path, family):
    """One process, two, two that share the weights; saved, loaded and scored again."""
    model = saved(world, tmp_path / "model", family)
    more = ("--model", model, *FEW, "--save_every", 1)
    train(world, tmp_path / "one", *more)
    before = weights(model)
    towers = {name for name in before if "vision_tower" in name or "projector" in name}  # frozen
    assert bool(towers) == (family == "gemma3")
    for name, how in (("two", ()), ("sharded", ("--shard",))):
        train(world, tmp_path / name, *more, *how, processes=2)
        assert_same(tmp_path / name, tmp_path / "one")
        after = weights(tmp_path / name)
        assert after.keys() == before.keys()
        for part, weight in after.items():
            assert torch.equal(before[part].float(), weight) == (part in towers), part
            assert part in towers or weight.dtype == torch.float32
    how = ("--model", tmp_path / "one", "--eval_only", *FEW)
    train(world, tmp_path / "again", *how, "--shard", processes=2 * (family == "llama"))
    trained = [line for line in lines(tmp_path / "one") if line["split"] == "test"]
    for ours, theirs in zip(lines(tmp_path / "again"), trained, strict=True):
        for lang, scores in theirs["trained"].items():
            assert ours["base"][lang] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_bfloat16_trains_as_float32_does_sharded_and_checkpointed_too(world, tmp_path, family):
    """The README's command for GPUs, on CPUs. What moves is float32; what is computed is not."""
    more = ("--model", saved(world, tmp_path / "model", family), *FEW, "--epochs", 3)
    sharded = ("--shard", "--gradient_checkpointing")
    train(world, tmp_path / "exact", *more)
    train(world, tmp_path / "rounded", *more, "--dtype", "bfloat16")
    train(world, tmp_path / "sharded", *more, "--dtype", "bfloat16", *sharded, processes=2)
    for name, other, near in (
        ("rounded", "exact", 0.06),
        ("sharded", "exact", 0.06),
        ("sharded", "rounded", 0.02),
    ):
        ours, theirs = tmp_path / name, tmp_path / other
        moves = moved(tmp_path / "model", ours), moved(tmp_path / "model", theirs)
        assert torch.cosine_similarity(*moves, dim=0) > 0.99
        for line, wanted in zip(lines(ours, "log"), lines(theirs, "log"), strict=True):
            for key in ("loss", "grad_norm"):
                assert line[key] == pytest.approx(wanted[key], rel=near), (name, key)
        gaps = []
        for line, wanted in zip(lines(ours), lines(theirs), strict=True):
            for stage in ("base", "trained"):
                for lang, scores in wanted[stage].items():
                    gaps += [abs(a - b) for a, b in zip(line[stage][lang], scores, strict=True)]
        assert 1e-4 < max(gaps) < 0.3


def moved(before, after):
    """By how much each weight has moved, as one vector."""
    start, end = weights(before), weights(after)
    return torch.cat([(end[name].float() - start[name].float()).flatten() for name in sorted(end)])


def test_a_model_without_layers_is_refused_by_name():
    model, config = tiny_llama(100, num_hidden_layers=0), program.Config(device="cpu", shard=True)
    with pytest.raises(data.InputError, match="--shard: LlamaForCausalLM has no decoder layers"):
        program.place(model, config)


class Copies(TorchDispatchMode):
    """Counts the elements of live bfloat16 copies of weights."""

    def __init__(self, model):
        super().__init__()
        self.shapes = {w.shape for w in model.parameters() if w.ndim == 2}
        self.live = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16:
                if x.ndim == 2 and {x.shape, x.T.shape} & self.shapes:
                    self.live.add(x)
        return out

    def count(self):
        return sum(x.numel() for x in self.live if x.untyped_storage().nbytes())


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_no_bfloat16_copy_of_the_weights_outlives_its_layer(process_group, shard, cached):
    """After a checkpointed forward pass; with autocast's cache, all of them do."""
    model = tiny_llama(100, num_hidden_layers=8)
    copies = Copies(model)  # knows the shapes before the weights are shards
    total = sum(w.numel() for name, w in model.named_parameters() if "layers" in name)
    how = {"dtype": "float32" if cached else "bfloat16", "gradient_checkpointing": True}
    config = program.Config(device="cpu", shard=shard, **how)
    program.place(model, config)
    mixed = torch.autocast("cpu", torch.bfloat16) if cached else program.autocast(config)
    with copies, mixed:
        loss = dco.completion_logps(model, test_scoring.some_trees(1)).clamp(min=-99).sum()
        assert copies.count() >= 0.9 * total if cached else copies.count() <= total / 8
    loss.backward()


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_letters_do_not_tie_in_bfloat16(family):
    """Soft-capped and scaled logits, too; in bfloat16 some of the four are one number."""
    changes = {"gemma2": {"head_dim": 8, "final_logit_softcapping": 30.0}}
    model = test_scoring.tiny(family, **changes.get(family, {}))
    head, seen = model.get_output_embeddings(), []
    letters = [data.Tree([1, 2, 3, 4], [[10], [11], [12], [13]])]
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        dco.completion_logps(model, letters)
        hook.remove()
        h = seen[0][0, 0]
        for k in range(4):  # logits near 20; one weight of each is larger by its rounding
            head.weight[10 + k] = (h * 20 / (h @ h)).bfloat16()
            head.weight[10 + k, k] *= 1 + 2**-7

        def scores(dtype):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                return set(dco.completion_logps(model, letters)[0].tolist())

        assert len(scores("float32")) == 4 and len(scores("bfloat16")) < 4
        program.place(model, program.Config(device="cpu"))
        assert len(scores("float32")) == 4 and len(scores("bfloat16")) == 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_the_trace_counts_a_share_of_the_states_and_what_a_step_adds(monkeypatch, tied, world):
    monkeypatch.setitem(bench.SIZES, "tiny", ("llama", 4, 4, 2, 64, 128, 500, tied))
    weights = sum(weight.numel() for weight in bench.random_model("tiny", "meta").parameters())
    how = {"dtype": "bfloat16", "gradient_checkpointing": True, "shard": world > 1}
    config = program.with_defaults(program.Config(model="m", device="cpu", **how))
    states, forward, backward = bench.trace("tiny", world, config, test_scoring.some_trees(1, 4))
    share = 4 * weights / world  # bytes of a process
    assert states == pytest.approx(3 * share, rel=1e-3)  # weights and AdamW's two moments
    assert states < forward < backward and 4 * share < backward < 6 * share  # gradients, too
