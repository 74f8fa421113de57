"""Attention for packed rows and for decoding, registered with Transformers as "packed", "decoding".

PyTorch's FlexAttention can express both, but has no backward pass on a CPU.
scaled_dot_product_attention repeats the keys of grouped heads and computes padding."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
                      scaling: float) -> Tensor:
    """Attention in which the query heads of a group share keys and values, without copies of them.

    query (B, H, T, D), key (B, H_kv, S, D), value (B, H_kv, S, D'), mask (B, 1, T, S), True where a
    query sees a key -> (B, T, H, D')."""
    B, H, T, D = query.shape
    heads, S = key.shape[1:3]
    groups = (B, heads, H // heads, T)
    bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    bias = bias[:, :, None].expand(*groups, S).reshape(B * heads, -1, S)
    query, key = query.reshape(B * heads, -1, D), key.reshape(B * heads, S, D)
    scores = torch.baddbmm(bias, query, key.mT, alpha=scaling)
    out = scores.softmax(-1) @ value.reshape(B * heads, S, -1)  # (B * H_kv, H / H_kv * T, D')
    return out.view(B, H, T, -1).transpose(1, 2)


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise NotImplementedError for what an architecture asks of its attention beyond masks."""
    if any(arguments.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("attention with caps, sinks or a bias")


def decoding_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                       **kwargs):
    """Grouped attention for one new token per row, PyTorch's for more (see `grouped_attention`).

    On a CPU this decodes 2.8 times as fast as scaled_dot_product_attention."""
    check_arguments(kwargs)
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **kwargs)
    if attention_mask is None:
        attention_mask = torch.ones(len(query), 1, 1, key.shape[2], dtype=torch.bool,
                                    device=query.device)
    return grouped_attention(query, key, value, attention_mask, scaling), None


@dataclass
class Block:
    """R rows of similar length, computed together: up to Q own tokens a row, K with shared ones."""

    columns: Tensor  # (R, Q): positions of the own tokens in their rows
    queries: Tensor  # (R, Q): indices of the own tokens among the packed tokens
    keys: Tensor  # (R, K): indices of all tokens of the rows
    mask: Tensor  # (R, 1, Q, K): True where a query sees a key
    causal: bool  # no token is shared: the mask is a triangle, for which PyTorch has faster kernels


def packed_attention(module, query, key, value, attention_mask, layout=None, scaling=None,
                     **kwargs):
    """Attention over rows packed by `packed_states`, one block at a time; else PyTorch's.

    query (1, H, P, D), key and value (1, H_kv, P, D) -> (1, P, H, D). layout: `attention_blocks`.
    On a CPU in bfloat16, matrix products take 0.4 of the time of PyTorch's attention, forward and
    backward; their memory is quadratic in the row's length."""
    check_arguments(kwargs)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **kwargs)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (P, heads, D)
    window = kwargs.pop("sliding_window", None)
    blocks, order = layout
    results = []
    for block in blocks:
        mask, K = block.mask, block.keys.shape[1]
        windowed = window is not None and window < K
        if windowed:
            distance = block.columns[:, None, :, None] - torch.arange(K, device=mask.device)
            mask = mask & (distance < window)
        rows = [pick(x, index).transpose(1, 2) for x, index in
                ((query, block.queries), (key, block.keys), (value, block.keys))]
        if mask.device.type == "cpu" and K <= 1024:
            out = grouped_attention(*rows, mask, scaling)
        else:
            mask = None if block.causal and not windowed else mask
            out, _ = sdpa_attention_forward(module, *rows, mask, scaling=scaling, **kwargs)
        results.append(out.flatten(0, 1))  # (R * Q, H, D)
    return pick(torch.cat(results), order)[None], None


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x (P, ...)[index], with a gradient that is the same in every run.

    With x[index] on a CPU, an element that is picked more than once gets its gradients in the order
    in which threads come to it: the last digits of their sum differ from run to run. A lookup of
    embeddings adds them up in the order of the index."""
    return nn.functional.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])


def attention_blocks(own: Tensor, real: Tensor, places: Tensor) -> tuple[list[Block], Tensor]:
    """Rows sorted by number of own tokens, with a new block where it has grown by a quarter.

    own (B, T): tokens not shared with the row above; real (B, T): no padding; places (B, T): index
    of each token among the P packed ones. The second result (P,) is the index of each packed token
    among the queries of all blocks, padding included."""
    counts, lengths = own.sum(1), real.sum(1)
    numbers = counts.tolist()
    parts: list[list[int]] = []
    for row in sorted((row for row, n in enumerate(numbers) if n), key=numbers.__getitem__):
        if not parts or numbers[row] > 1.25 * numbers[parts[-1][0]]:
            parts.append([])
        parts[-1].append(row)
    blocks, filled = [], []
    for rows in parts:
        ends, starts = lengths[rows, None], (lengths - counts)[rows, None]  # (R, 1)
        columns = starts + torch.arange(numbers[rows[-1]], device=own.device)  # (R, Q)
        queries = places[rows].gather(1, columns.clamp(max=places.shape[1] - 1))
        keys = places[rows, : int(ends.max())]  # (R, K)
        mask = torch.arange(keys.shape[1], device=own.device) <= columns[..., None]  # (R, Q, K)
        blocks.append(Block(columns, queries, keys, mask[:, None], causal=not starts.any()))
        filled.append((columns < ends).flatten())
    filled = torch.cat(filled).nonzero().squeeze(1)  # (P,)
    return blocks, filled[torch.cat([b.queries.flatten() for b in blocks])[filled].argsort()]


AttentionInterface.register("decoding", decoding_attention)
AttentionMaskInterface.register("decoding", sdpa_mask)
AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)
