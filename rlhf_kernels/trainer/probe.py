"""Proof, on the model in hand, that the passes of training and sampling are right."""

import torch
from torch import nn

from .config import UserError
from .data import Batch
from .forward import causal_lm, lm_head


def check_head(policy: nn.Module) -> None:
    """Requires that `lm_head` gives the model's own logits, whatever its architecture does."""
    ids = torch.arange(4, device=policy.device)[None] % policy.config.get_text_config().vocab_size
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 1:] >= 0)
    with torch.no_grad():
        head = lm_head(policy, batch)
        logits = nn.functional.linear(head.hidden, head.weight, head.bias).float() * head.scale
        if head.softcap:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        theirs = causal_lm(policy)(input_ids=ids).logits[:, :-1].float()
    tolerance = 1e-3 if head.hidden.dtype is torch.float32 else 0.1
    if not torch.allclose(logits, theirs, atol=tolerance, rtol=tolerance):
        name = type(causal_lm(policy)).__name__
        raise UserError(f"model: {name} does more between hidden states and logits than its head")
