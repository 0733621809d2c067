"""Scaled dot-product attention for backbones and the transformer decoder, with a faster path for CPUs in bfloat16."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "m2f_attention"
"""Name of `backbone_attention` among transformers' implementations of attention."""

MOST_SCORES = 2**24
"""Number of attention scores up to which they are kept: 32 MB for each layer in bfloat16."""


def exporting() -> bool:
    """Whether torch.export traces the model. `torch.compiler.is_exporting` is true under torch.compile before 2.13."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(D)) v of (B, H, Q, D), (B, H, S, D) twice, and a mask (B, 1, Q, S), true where allowed.

    Returns (B, H, Q, D). By torch's fused kernel; in 16 bits on a CPU by separate products, because the backward pass
    of torch's kernel takes 2 to 10 times as long there. Their scores and weights are rounded to 16 bits.
    """
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # rotary positions are float32
        query, key, value = (one.to(torch.get_autocast_dtype("cpu")) for one in (query, key, value))
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    if query.device.type != "cpu" or query.dtype.itemsize != 2 or scores > MOST_SCORES:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):  # otherwise the softmax is computed on a copy in float32
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:  # added: masked_fill is slow where it broadcasts
            logits = logits + torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        output: Tensor = logits.softmax(-1) @ value
        return output


def backbone_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention of transformers' backbones: (B, H, S, D) three times -> (B, S, H, D).

    `dot_product_attention` where a backbone asks for the same function, otherwise transformers' own.
    """
    plain = attention_mask is None and not settings.get("dropout") and not settings.get("is_causal")
    if plain and key.shape[1] == query.shape[1] and settings.get("scaling") in (None, query.shape[-1] ** -0.5):
        return dot_product_attention(query, key, value).transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if exporting():  # a trace lacks `contiguous` there, and torch's decomposition for ONNX needs it
        output = output.clone(memory_format=torch.contiguous_format)
    return output, None


AttentionInterface.register(NAME, backbone_attention)
