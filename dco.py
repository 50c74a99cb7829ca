"""Direct Consistency Optimization: its equations, and log pi(y|x), where the model is called.

Covers sections 3 and 4 and Apps. B, D and E of "Optimizing Language Models for Crosslingual
Knowledge Consistency" (the anonymous manuscript, close to arXiv:2603.04678v1, whose numbers these
are). Leaves out questions (data.py), how a model is judged (rankc.py) and the loop (train.py).

Axes: B questions, L languages, K candidate answers; candidate k is the same answer in every
language. A log-probability is in nats and *summed* over the answer's tokens.
"""

import heapq
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# --------------------------------------------------------------------------------------- the method
def align_reward(ref_logps: Tensor, gamma: Tensor) -> Tensor:
    """r_ALIGN, Eqs. 6 and 15: what the other languages' reference thinks of each answer.

    ref_logps: (..., L, K) nats; a candidate that is -inf in any language is missing, and stays so.
    gamma: (L, L), how much language j's reference counts in language i's reward. Returns (..., L,
    K). Raises ValueError if gamma has another shape or a diagonal that is not zero.
    """
    if ref_logps.ndim < 2:
        raise ValueError(f"ref_logps is {tuple(ref_logps.shape)}, not (..., languages, candidates)")
    languages = ref_logps.shape[-2]
    if gamma.shape != (languages, languages):
        raise ValueError(f"gamma is {tuple(gamma.shape)}, but ref_logps has {languages} languages")
    if gamma.diagonal().any():
        raise ValueError("gamma_ii must be 0: a language is no expert in its own reward (App. E)")
    reward = gamma.to(ref_logps) @ ref_logps  # Eq. 15; 0 * -inf is NaN where one is missing
    return reward.masked_fill(torch.isneginf(ref_logps).any(-2, keepdim=True), -torch.inf)


def optimal_policy(ref_logps: Tensor, gamma: Tensor, beta: float) -> Tensor:
    """log pi*, Eqs. 8 to 10 and 16: the product of experts, normalised over the candidates.

    ref_logps: (..., L, K) nats, gamma: (L, L) -> (..., L, K) nats. Errors as align_reward,
    and ValueError for a beta that is not positive and finite.
    """
    if not 0 < beta < torch.inf:
        raise ValueError(f"beta must be positive and finite, not {beta}")
    return F.log_softmax(ref_logps + align_reward(ref_logps, gamma) / beta, dim=-1)  # Eqs. 8, 10


def implicit_reward(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """r-hat, Eq. 3 without the beta log Z that is the same for every answer; any shape."""
    if not 0 < beta < torch.inf:
        raise ValueError(f"beta must be positive and finite, not {beta}")
    return beta * (logps - ref_logps)


def dco_loss(logps: Tensor, ref_logps: Tensor, r_align: Tensor, beta: float) -> Tensor:
    """Eq. 11, one language's term: |margin of r-hat - margin of r_ALIGN|, mean over pairs.

    All arguments (..., K) with K >= 2, in nats -> (...,). Candidates whose r_align is -inf are
    missing and in no pair. Zero iff r-hat equals r_ALIGN up to a constant (Lemma 2). Raises
    ValueError if K < 2.
    """
    if logps.shape[-1] < 2:
        raise ValueError("Eq. 11 compares answers: it needs two or more")
    present = ~torch.isneginf(r_align)  # (..., K)
    residual = implicit_reward(logps, ref_logps, beta) - r_align  # (..., K)
    residual = residual.masked_fill(~present, 0.0)
    w, l = torch.triu_indices(*[logps.shape[-1]] * 2, offset=1, device=logps.device)  # noqa: E741
    gap = (residual[..., w] - residual[..., l]).abs()  # Eq. 11; log Z (Eq. 3), c(x) (Eq. 12) cancel
    pairs = present[..., w] & present[..., l]  # (..., K (K - 1) / 2)
    if pairs.device.type == "cpu" and not pairs.any(-1).all():  # a GPU would have to be waited for
        raise ValueError("Eq. 11 compares answers: a row has fewer than two")
    return (gap * pairs).sum(-1) / pairs.sum(-1)


def bradley_terry_loss(rewards: Tensor) -> Tensor:
    """Eqs. 13, 14: -log sigmoid(r(x, y_w) - r(x, y_l)); (..., 2), preferred first -> (...,)."""
    return -F.logsigmoid(rewards[..., 0] - rewards[..., 1])


def dpo_loss(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Eq. 4: Bradley-Terry on implicit rewards; (..., 2) both, preferred answer first -> (...,)."""
    return bradley_terry_loss(implicit_reward(logps, ref_logps, beta))


def sft_loss(logps: Tensor) -> Tensor:
    """L^ML of section 3: the negative log-likelihood of the gold answer; any shape."""
    return -logps


def majority_vote(logps: Tensor) -> tuple[Tensor, Tensor]:
    """CALM's target (section 6.1): the answer most languages rank first, and whether votes tied.

    Ties go to the answer of the larger log-prob summed over languages; their order does not matter.
    logps: (..., L, K) nats, -inf for a missing candidate -> (...,) index and (...,) bool. The
    original samples and translates chains of thought, and breaks ties by order of appearance.
    """
    votes = F.one_hot(logps.argmax(-1), logps.shape[-1]).sum(-2)  # (..., K)
    leads = votes == votes.amax(-1, keepdim=True)
    total = logps.double().sum(-2)  # (..., K); in float32, rounding would depend on the order
    return total.masked_fill(~leads, -torch.inf).argmax(-1), leads.sum(-1) > 1


def is_consistent(gamma: Tensor, beta: float) -> bool:
    """Lemma 3 (Lemma 1 where L = 2): whether Gamma has rank one, and pi* ranks alike.

    gamma: (L, L), off-diagonal entries positive (the paper's gamma in R+): a rank-one Gamma with
    negative entries turns rankings round, so those give False. Entries may be off by a part in
    100,000.
    """
    Gamma = gamma.double() / beta + torch.eye(len(gamma), dtype=torch.double)  # Eq. 17
    rank_one = Gamma[:, :1] * Gamma[:1, :]  # rank one with Gamma_ii = 1: Gamma_i1 Gamma_1j
    return bool((Gamma > 0).all()) and torch.allclose(Gamma, rank_one, rtol=1e-5, atol=0.0)


def gamma_from_trust(trust: Tensor, beta: float) -> Tensor:
    """The rank-one Gamma of Lemma 3 in its N free numbers: gamma_ij = beta w_j / w_i.

    A unit diagonal leaves Gamma_ij = w_j / w_i, so pi*_i is proportional to exp((1/w_i) sum_j w_j
    log pi_REF,j): one consensus weighted by trust, each language at its own temperature. trust:
    (L,) positive -> (L, L). Raises ValueError for a trust that is not positive and finite.
    """
    if not (torch.isfinite(trust) & (trust > 0)).all():
        raise ValueError(f"trust must be positive and finite, not {trust.tolist()}")
    return beta * (trust / trust[:, None]).fill_diagonal_(0.0)


# -------------------------------------------------------------------------------------- log pi(y|x)
class Pack(NamedTuple):
    """Trees as the rows of one forward pass, and where in its logits each answer is scored.

    R rows of C columns; S scored tokens; T trees of up to K answers.
    """

    token: Tensor  # (R, C) token ids
    position: Tensor  # (R, C) depth of a token in its tree: its position id
    segment: Tensor  # (R, C) the prefix or the answer that a token belongs to; -1 for padding
    prefix: Tensor  # (R, C) the segment that is its tree's prefix
    logit_cols: Tensor  # the columns whose logits are needed
    row: Tensor  # (S,) with `logit_index`: where the logits lie that predict the scored token
    logit_index: Tensor  # (S,) index into `logit_cols`
    target: Tensor  # (S,) the token scored
    answer_index: Tensor  # (S,) the answer it belongs to: tree K + candidate
    shape: tuple[int, int]  # T, K


def completion_logps(
    model: nn.Module, trees: Sequence | Pack, packed: bool | None = None
) -> Tensor:
    """log pi(y|x) of every answer of every tree, for training, reference and evaluation alike.

    trees: as `pack` takes them, or packed already. Returns float32 (T, K), nats; a tree with fewer
    than K answers ends in -inf. Of what data.encode returns, rows of trees, (Q, L, K). From then on
    the model's logits are float32. `packed=False`: each answer with its prompt is a row of its own;
    None: so where the model does not take packed ones, with a warning.
    """
    if not isinstance(trees, Pack) and not hasattr(trees[0], "branches"):
        flat = [tree for row in trees for tree in row]
        if not all(hasattr(tree, "branches") for tree in flat):
            wanted = "data.Trees, or rows of them, as data.encode returns"
            raise ValueError(f"trees: wanted are {wanted}")
        return completion_logps(model, flat, packed).view(len(trees), len(trees[0]), -1)
    if packed is None:
        kind = next(model.parameters()).device.type  # under autocast, rounding is coarser
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        packed = isinstance(trees, Pack) or packs_exactly(model, trees[:2], dtype=dtype)
        if not packed:
            warnings.warn("this model does not take packed questions; it is slower", stacklevel=2)
    config = model.config.get_text_config()
    weight = next(model.parameters())
    if not isinstance(trees, Pack):
        mesh = getattr(weight, "device_mesh", None)  # sharded, it may lie elsewhere (--offload)
        device = torch.device(mesh.device_type) if mesh else weight.device
        trees = pack(trees, config.hidden_size, packed, device)
    token, position, segment, prefix, *where, (T, K) = trees
    mask = (segment >= 0).long()
    if packed:  # a token sees its own segment and its tree's prefix, no deeper than itself
        above = position[:, None, :] <= position[:, :, None]  # (R, C, C): query, key
        own, shared = (segment[:, None, :] == x[:, :, None] for x in (segment, prefix))
        mask = attention_masks(config, above & (own | shared), position, weight.dtype)
    logit_cols, row, logit_index, target, answer_index = where
    fed = {"input_ids": token, "attention_mask": mask, "position_ids": position}
    head = model.get_output_embeddings()
    head.forward = MethodType(float32_logits, head)
    logits = model(**fed, logits_to_keep=logit_cols, use_cache=False).logits  # (R, kept, vocab)
    log_sum = torch.stack([each.float().logsumexp(-1) for each in logits])  # row by row: less room
    logps = logits[row, logit_index, target].float() - log_sum[row, logit_index]  # (S,)
    answers = torch.full((T * K,), -torch.inf, device=token.device)
    answers[answer_index] = 0.0
    return answers.index_add(0, answer_index, logps).view(T, K)


def float32_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """What a model's head computes, in float32 whatever the rest computes in.

    In bfloat16 logits near 20 are 0.125 apart: the letters of a multiple-choice question tie.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return F.linear(hidden.float(), head.weight.float(), bias)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Values on the device, without waiting for what a GPU is doing."""
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)


def pack(
    trees: Sequence, hidden_size: int, packed: bool = True, device: Any = torch.device("cpu")
) -> Pack:
    """Trees as rows: (prefix, branches, prompt_len) each, as data.Tree has them.

    A row holds whole trees; a token attends to its ancestors alone. An answer's last token is never
    fed: nothing needs its prediction.
    """
    K = max(len(tree.branches) for tree in trees)
    units = [(tree, list(enumerate(tree.branches, t * K))) for t, tree in enumerate(trees)]
    if not packed:
        units = [(tree, [answer]) for tree, answers in units for answer in answers]
    # of each token: token, position, segment, prefix; of each scored one: parent, target, answer
    tokens, scored, sizes = [], [], []
    for tree, answers in units:
        root, n = len(tokens), len(tree.prefix)  # a segment is named by its first token's number
        tokens += [(token, at, root, root) for at, token in enumerate(tree.prefix)]
        for answer, branch in answers:
            start = len(tokens)
            parents = [root + n - 1, *range(start, start + len(branch) - 1)]
            scored += [*zip(parents, branch, repeat(answer))][tree.prompt_len :]
            tokens += [(token, at, start, root) for at, token in enumerate(branch[:-1], n)]
        sizes.append(len(tokens) - root)
    token, position, segment, prefix = torch.tensor(tokens).T  # (N,) each
    parent, target, answer_index = torch.tensor(scored).T  # (S,) each; `parent` predicts `target`

    # A model computes logits for the same columns of every row. Under an explicit mask the order
    # within a row is free, so the tokens that predict something come first.
    rows = torch.tensor(assign_rows(sizes, hidden_size) if packed else range(len(units)))
    row = rows.repeat_interleave(torch.tensor(sizes))
    later = torch.ones_like(token).index_fill(0, parent, 0) * packed
    rank = (2 * row + later).argsort(stable=True).argsort()
    length = row.bincount()  # tokens in each row
    column = rank - (length.cumsum(0) - length)[row]
    logit_cols, logit_index = column[parent].unique(return_inverse=True)

    def grid(values: Tensor, fill: int) -> Tensor:  # (N,) -> (R, C)
        out = torch.full((len(length), int(length.max())), fill)
        return out.index_put_((row, column), values)

    parts = [*map(grid, (token, position, segment, prefix), (0, 0, -1, -1))]
    parts += [logit_cols, row[parent], logit_index, target, answer_index]
    sent = send(torch.cat([part.flatten() for part in parts]), device)  # all in one copy
    sent = sent.split([part.numel() for part in parts])
    views = (flat.view(part.shape) for flat, part in zip(sent, parts, strict=True))
    return Pack(*views, (len(trees), K))


def attention_masks(
    config: Any, sees: Tensor, position: Tensor, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What `sees`, (rows, query, key), allows: 0 or the lowest number, added to attention scores.

    A bool mask would fail under `eager`. Layers with a sliding window see no further back than it;
    where a model mixes kinds of layers (Gemma 2 and 3, Cohere2) it takes a mask for each kind.
    """
    lowest = torch.finfo(torch.bfloat16).min  # float32's own would be infinite in bfloat16
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    full = (~sees)[:, None].to(dtype) * lowest
    if not window or kinds and "sliding_attention" not in kinds:
        return full
    near = sees & (position[:, :, None] - position[:, None, :] < window)
    near = (~near)[:, None].to(dtype) * lowest
    return {"full_attention": full, "sliding_attention": near} if kinds else near


def assign_rows(sizes: Sequence[int], hidden_size: int) -> list[int]:
    """The row of each tree, such that all cost least: a token W in attention, 6 d in the rest.

    One long row multiplies every token with every other; many rows pad. (24 d^2 flops in a layer's
    matrices, 4 d W in attention.) Trees go from the longest to the emptiest row.
    """
    longest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    best, cheapest = [], float("inf")
    for R in range(1, len(sizes) + 1):
        heap, rows = [(0, r) for r in range(R)], [0] * len(sizes)
        for i in longest_first:
            filled, rows[i] = heap[0]
            heapq.heapreplace(heap, (filled + sizes[i], rows[i]))
        width = max(heap)[0]
        cost = R * width * (6 * hidden_size + width)
        if cost < cheapest:
            best, cheapest = rows, cost
        if width == sizes[longest_first[0]]:  # more rows would only pad more
            break
    return best


@torch.no_grad()
def packs_exactly(
    model: nn.Module,
    trees: Sequence,
    mixed: AbstractContextManager = nullcontext(),
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether packed trees score as separate rows do; false where the model refuses the mask.

    dtype: what the model computes in, its weights' by default; `mixed`: the autocast it trains in,
    under which the mask must be taken, too. Scores may differ by a part in 1000 or, in bfloat16, by
    4 times what those of separate rows do once each embedding is moved by its rounding: models that
    ignored the mask differed by 10 times and more, others by 1.8 at most.
    """
    dtype = dtype or next(model.parameters()).dtype

    def jitter(_, __, out: Tensor) -> Tensor:
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return (out.float() * (1 + torch.finfo(dtype).eps / 4 * noise.to(out.device))).to(out)

    try:
        packed = completion_logps(model, trees, True)
        with mixed:
            completion_logps(model, trees, True)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError):  # of masks like these
        return False
    apart = completion_logps(model, trees, packed=False)
    hook = model.get_input_embeddings().register_forward_hook(jitter)
    moved = completion_logps(model, trees, packed=False)
    hook.remove()
    packed, apart, moved = (x[apart.isfinite()] for x in (packed, apart, moved))
    noise = max((moved - apart).abs().tolist(), default=0.0)
    bound = (1e-3 + 1e-3 * apart.abs()).clamp(min=4 * noise)
    return bool(((packed - apart).abs() <= bound).all())
