"""Direct Consistency Optimization: its equations, and log pi(y|x), where the model is called.

Covers sections 3 and 4 and Apps. B, D and E of "Optimizing Language Models for Crosslingual
Knowledge Consistency". Equations are numbered as in the anonymous manuscript, which is close to
arXiv:2603.04678v1. Leaves out questions (data.py), measures (rankc.py) and the loop (train.py).

Axes: B questions, L languages, K candidate answers; candidate k is the same answer in every
language. A log-probability is in nats and *summed* over the answer's tokens.
"""

from array import array
from collections.abc import Sequence
from itertools import chain, count, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# --------------------------------------------------------------------------------------- the method
def align_reward(ref_logps: Tensor, gamma: Tensor) -> Tensor:
    """r_ALIGN, Eqs. 6 and 15: what the other languages' reference thinks of each answer.

    ref_logps: (..., L, K) nats; a candidate that is -inf in any language is missing, and stays so.
    gamma: (L, L), the weight of language j's reference in language i's reward. Returns (..., L, K).
    Raises ValueError for other axes, and for a diagonal that is not zero.
    """
    if ref_logps.ndim < 2 or gamma.shape != (ref_logps.shape[-2], ref_logps.shape[-2]):
        shapes = f"{tuple(ref_logps.shape)} and {tuple(gamma.shape)}"
        raise ValueError(f"ref_logps and gamma are {shapes}, not (..., L, K) and (L, L)")
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

    For two languages with the answers (y_w, y_l), logps and ref_logps are (2, 2), and the sum over
    languages is Eq. 11 as the paper prints it:

        r_hat = beta * (logps - ref_logps)
        margin_1, margin_2 = r_hat[:, 0] - r_hat[:, 1]
        ref_margin_1, ref_margin_2 = ref_logps[:, 0] - ref_logps[:, 1]
        term_1 = (margin_1 - gamma_1 * ref_margin_2).abs()
        term_2 = (margin_2 - gamma_2 * ref_margin_1).abs()
        loss = term_1 + term_2

    All arguments are (..., K) with K >= 2, in nats -> (...,). Candidates whose r_align is -inf are
    missing and in no pair; a row with fewer than two others is NaN. Zero iff r-hat equals r_ALIGN
    up to a constant (Lemma 2). Raises ValueError if K < 2.
    """
    K = logps.shape[-1]
    if K < 2:
        raise ValueError("Eq. 11 compares answers: it needs two or more")
    present = ~torch.isneginf(r_align)  # (..., K)
    residual = implicit_reward(logps, ref_logps, beta) - r_align  # (..., K)
    residual = residual.masked_fill(~present, 0.0)  # else the gradient of what is missing is NaN
    w, l = torch.triu_indices(K, K, offset=1, device=logps.device)  # noqa: E741, as in y_w, y_l
    gap = (residual[..., w] - residual[..., l]).abs()  # Eq. 11; log Z (Eq. 3), c(x) (Eq. 12) cancel
    pairs = present[..., w] & present[..., l]  # (..., K (K - 1) / 2)
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

    logps: (..., L, K) nats, -inf for a missing candidate -> (...,) index and (...,) bool. Ties go
    to the larger sum of log-probs over languages. (The original: see .github/departures.md.)
    """
    votes = F.one_hot(logps.argmax(-1), logps.shape[-1]).sum(-2)  # (..., K)
    leads = votes == votes.amax(-1, keepdim=True)
    total = logps.double().sum(-2)  # (..., K); in float32, rounding would depend on the order
    return total.masked_fill(~leads, -torch.inf).argmax(-1), leads.sum(-1) > 1


def is_consistent(gamma: Tensor, beta: float) -> bool:
    """Lemma 3 (Lemma 1 where L = 2): whether Gamma has rank one, and pi* ranks alike.

    gamma: (L, L). Entries must be positive (the paper's gamma in R+): a Gamma of rank one with
    negative entries reverses rankings. They may be off by a part in 100,000.
    """
    Gamma = gamma.double() / beta + torch.eye(len(gamma), dtype=torch.double)  # Eq. 17
    rank_one = Gamma[:, :1] * Gamma[:1, :]  # rank one with Gamma_ii = 1: Gamma_i1 Gamma_1j
    return bool((Gamma > 0).all()) and torch.allclose(Gamma, rank_one, rtol=1e-5, atol=0.0)


def gamma_from_trust(trust: Tensor, beta: float) -> Tensor:
    """The rank-one Gamma of Lemma 3, by a number w a language: gamma_ij = beta w_j / w_i.

    A unit diagonal leaves Gamma_ij = w_j / w_i, so pi*_i is proportional to exp((1/w_i) sum_j w_j
    log pi_REF,j): one consensus weighted by trust, each language at its own temperature. trust:
    (L,) positive -> (L, L). Raises ValueError for a trust that is not positive and finite.
    """
    if not (torch.isfinite(trust) & (trust > 0)).all():
        raise ValueError(f"trust must be positive and finite, not {trust.tolist()}")
    return beta * (trust / trust[:, None]).fill_diagonal_(0.0)


# -------------------------------------------------------------------------------------- log pi(y|x)
PROMPT = -1  # stands for the number of an answer where a token belongs to the prompt


def plain_logps(model: nn.Module, tree: Any) -> Tensor:
    """log pi(y|x) of a question's answers by definition, a forward pass an answer: (K,) nats.

    tree: a data.Tree, a prompt and its answers as token ids.
    """
    scores = []
    for branch in tree.branches:
        ids = torch.tensor([tree.prefix + branch], device=next(model.parameters()).device)
        n = len(branch) - tree.prompt_len  # tokens of the answer
        logits = model(input_ids=ids).logits[0, -n - 1 : -1]  # (n, vocabulary), each for the next
        logps = logits.float().log_softmax(-1).gather(-1, ids[0, -n:, None])  # (n, 1)
        scores.append(logps.sum())
    return torch.stack(scores)


def completion_logps(model: nn.Module, trees: Sequence) -> Tensor:
    """plain_logps of many trees in one forward pass: float32 (T, K), -inf where a tree has fewer.

    All stand one after another in a single row, a prompt once for all its answers, without padding:

        prompt 1 | answer 1a | answer 1b | prompt 2 | answer 2a | answer 2b | answer 2c

    By the mask a token sees its own prompt and its own answer alone; position ids begin again with
    each prompt. So to the model every answer stands right behind its prompt.
    """
    device = next(model.parameters()).device
    row, (column, target, slot) = pack(trees)  # (4, N); (S,) each
    # Logits are the largest tensor of a step: they are computed where one is needed, and once.
    needed, index = column.unique(return_inverse=True)  # (C,), (S,)
    tensors = (row, needed, index, target, slot)
    if device.type == "cuda":  # pinned: else the CPU waits for the GPU, instead of packing on
        tensors = [x.pin_memory() for x in tensors]
    row, needed, index, target, slot = (x.to(device, non_blocking=True) for x in tensors)
    token, position, tree, answer = row  # (N,) each

    same_tree = tree[:, None] == tree  # (N, N): query, key
    same_answer = (answer[:, None] == answer) | (answer == PROMPT)
    not_later = position[:, None] >= position
    mask = attention_mask(model, same_tree & same_answer & not_later, position)
    fed = {"input_ids": token[None], "position_ids": position[None], "attention_mask": mask}
    logits = model(**fed, logits_to_keep=needed, use_cache=False).logits[0]  # (C, vocabulary)
    logits = logits.float()  # summed in bfloat16, a log-prob would be off by up to a nat
    logps = logits[index, target] - logits.logsumexp(-1)[index]  # (S,) of each scored token

    T, K = len(trees), max(len(tree.branches) for tree in trees)
    answers = torch.full((T * K,), -torch.inf, device=device)
    answers.index_fill_(0, slot, 0.0)  # those that there are
    return answers.index_add(0, slot, logps).view(T, K)


def pack(trees: Sequence) -> tuple[Tensor, Tensor]:
    """The row of tokens that completion_logps feeds, (4, N), and what is scored in it, (3, S).

    A tree with prefix [11, 12] and the branches [21, 22] and [31, 32, 33] becomes

        token     11  12  21  31  32      scored   column   1   2   1   3   4
        position   0   1   2   2   3               target  21  22  31  32  33
        tree       0   0   0   0   0               slot     0   0   1   1   1
        answer    -1  -1   0   1   1

    where the logits of a column predict the target below it, and a slot is an answer's place in the
    result, tree * K + candidate. An answer's last token predicts nothing scored: it is not fed.
    """
    K = max(len(tree.branches) for tree in trees)
    row, scored = [], []
    for t, tree in enumerate(trees):
        depth = len(tree.prefix)
        row += zip(tree.prefix, range(depth), repeat(t), repeat(PROMPT))
        end_of_prefix = len(row) - 1
        for k, branch in enumerate(tree.branches):
            fed = branch[:-1]
            # The column that predicts each token of the branch: that of the token before it.
            predicting = [end_of_prefix, *range(len(row), len(row) + len(fed))]
            row += zip(fed, count(depth), repeat(t), repeat(k))
            scored += list(zip(predicting, branch, repeat(t * K + k)))[tree.prompt_len :]
    # By way of an array: from a list, torch.tensor takes eight times as long.
    row, scored = (array("q", chain.from_iterable(numbers)) for numbers in (row, scored))
    row, scored = (torch.frombuffer(numbers, dtype=torch.long) for numbers in (row, scored))
    return row.view(-1, 4).T, scored.view(-1, 3).T


def attention_mask(model: nn.Module, sees: Tensor, position: Tensor) -> Tensor | dict[str, Tensor]:
    """`sees`, (N, N) bool by query and key, as transformers models add it to attention scores.

    0 where a query sees a key, else the lowest number, (1, 1, N, N): a bool mask is read wrongly by
    `eager` attention. Layers with a sliding window see no further back than it, by position; a
    model that mixes kinds of layers (Gemma 2 and 3, Cohere 2) takes a mask for each kind.
    """
    config, dtype = model.config.get_text_config(), next(model.parameters()).dtype
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    lowest = torch.finfo(torch.bfloat16).min  # float32's would become -inf in bfloat16
    full = (~sees)[None, None].to(dtype) * lowest
    if not window or (layers and "sliding_attention" not in layers):
        return full
    near = sees & (position[:, None] - position < window)
    sliding = (~near)[None, None].to(dtype) * lowest
    return {"full_attention": full, "sliding_attention": sliding} if layers else sliding


@torch.no_grad()
def check_packing(model: nn.Module, tree: Any, dtype=torch.float32, company: Sequence = ()) -> None:
    """Raise ValueError unless the model scores trees packed, and in company, as plain_logps does.

    tree: the largest; company: some others, the smallest first. Of each the first and last answers
    are compared: so a window by place in the row shows, a state that goes on from text to text, and
    positions that depend on the longest.

    Scores may differ by a part in 1000, or by 4 times what they shift where each embedding is moved
    by the rounding of dtype, in which the model computes. To be called under scoring's autocast.
    """
    trees = [*company[1:], tree, *company[:1]]  # the smallest behind the largest
    ends = [x._replace(branches=[x.branches[0], x.branches[-1]]) for x in trees]

    def score() -> Tensor:
        return torch.cat([completion_logps(model, [x])[0] for x in ends])

    plain, alone = torch.cat([plain_logps(model, x) for x in ends]), score()
    rows = completion_logps(model, trees)  # (T, K)
    beside = [row[[0, len(x.branches) - 1]] for x, row in zip(trees, rows, strict=True)]

    def jitter(module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor:
        noise = torch.randn_like(embeddings, dtype=torch.float32)
        return (embeddings.float() * (1 + torch.finfo(dtype).eps / 4 * noise)).to(embeddings)

    hook = model.get_input_embeddings().register_forward_hook(jitter)
    shifts = torch.stack([score() - alone for _ in range(4)]).abs().view(4, -1, 2)
    hook.remove()
    rounding = shifts.amax((0, 2)).repeat_interleave(2).repeat(2)  # to each tree its own
    packed, plain = torch.cat([alone, *beside]), plain.repeat(2)
    off = (packed - plain).abs() / (1e-3 + 1e-3 * plain.abs()).maximum(4 * rounding)
    if not (off <= 1).all() and plain.isfinite().all():  # NaN: see train.score
        n = int(off.argmax())
        raise ValueError(
            f"an answer has {packed[n]:.5g} nats packed, {plain[n]:.5g} in a plain forward pass: "
            "packed texts see each other, or what is predicted is seen"
        )
