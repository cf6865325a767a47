"""Attentive probe: a learned query attends to frozen tokens (V-JEPA, Bardes et al. 2024, section 4 and appendix)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa.evaluation.probe import SELECTION_SHARE, ClassProbe, ProbePrediction, ProbeTask, selection_split, top1
from jepa.evaluation.types import Evaluation, Features, Snapshot
from jepa.layers.attention import CrossAttention, CrossAttentionBlock, num_heads
from jepa.types import PositiveInt


class Setting(NamedTuple):
    lr: float
    weight_decay: float


SETTINGS = (Setting(3e-4, 0.01), Setting(1e-3, 0.01), Setting(3e-3, 0.01), Setting(1e-3, 0.3))


class AttentiveProbe(ClassProbe):
    """Starts from the same weights at each evaluation; reports nothing without tokens, as for raw pixels."""

    def __init__(self, *, epochs: PositiveInt, batch_size: PositiveInt, max_tokens: PositiveInt) -> None:
        self.epochs = epochs
        self.batch_size = batch_size
        self.needs_tokens = max_tokens
        settings = ", ".join(f"{setting.lr:g}/{setting.weight_decay:g}" for setting in SETTINGS)
        protocol = (
            f"attentive: a learned query, a cross-attention block and a linear layer on at most {max_tokens} tokens of "
            f"a sample (neighbours averaged), standardised by the training samples; {epochs} epochs of AdamW with a "
            f"cosine schedule, no augmentation; learning rate and weight decay of {settings} chosen on "
            f"{SELECTION_SHARE:.0%} of the training samples, then trained on all"
        )
        super().__init__(name="attentive", protocol=protocol)

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        return super().__call__(snapshot) if snapshot.train.tokens is not None else Evaluation()

    def predict(self, task: ProbeTask) -> ProbePrediction:
        fitted, selection = selection_split(task.train, task.seed)
        scores = [top1(self._fit(fitted, setting, task).predict(selection), selection.labels) for setting in SETTINGS]
        best = SETTINGS[scores.index(max(scores))]
        return ProbePrediction(self._fit(task.train, best, task).predict(task.val), best._asdict())

    def _fit(self, train: Features, setting: Setting, task: ProbeTask) -> AttentiveHead:
        """Pure in the seed; restores the global random state."""
        generator = torch.Generator().manual_seed(task.seed)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(task.seed)
            head = AttentiveHead(tokens=tokens_of(train), num_classes=task.num_classes).to(task.device)
            optimizer = torch.optim.AdamW(
                head.parameters(), lr=setting.lr, weight_decay=setting.weight_decay, fused=True
            )
            num_batches = math.ceil(len(train.labels) / self.batch_size)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.epochs * num_batches)
            for _ in range(self.epochs):
                for rows in torch.randperm(len(train.labels), generator=generator).chunk(num_batches):
                    tokens, labels = (part[rows].to(task.device) for part in (tokens_of(train), train.labels))
                    loss = F.cross_entropy(head(tokens), labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        return head


class AttentiveHead(nn.Module):
    """[b, J, D] of any float type -> [b, classes]; standardises by the tokens given to the constructor."""

    def __init__(self, *, tokens: Tensor, num_classes: int) -> None:
        super().__init__()
        width = tokens.shape[-1]
        self.mean, self.scale = map(nn.Buffer, token_statistics(tokens))
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.block = CrossAttentionBlock(width=width, num_heads=num_heads(width), mlp_ratio=4.0)
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = (tokens.float() - self.mean) * self.scale
        pooled = self.query + attend_once(self.block.attn, self.block.norm1(self.query), tokens)  # [b, 1, D]
        return self.classify(self.norm(pooled + self.block.mlp(self.block.norm2(pooled)))[:, 0])

    @torch.no_grad()
    def predict(self, features: Features) -> Tensor:
        """-> [n], the predicted class of each sample"""
        device = self.query.device
        return torch.cat([self(chunk.to(device)).argmax(1).cpu() for chunk in tokens_of(features).split(256)])


def attend_once(attention: CrossAttention, query: Tensor, context: Tensor) -> Tensor:
    """[1, 1, D], [b, J, D] -> [b, 1, D]: `attention(query, context)` of one query for all, without keys and values.

    Keys and values are linear in the context: the query is projected into its space and the result afterwards, at
    1 / head width of the cost. A bias of the keys adds the same to all scores.
    """
    heads = attention.num_heads
    key_weight, value_weight = attention.kv.weight.unflatten(0, (2, heads, -1))  # [h, d, D] each
    queries = attention.q(query)[0, 0].unflatten(0, (heads, -1))  # [h, d]
    directions = torch.einsum("hd,hde->he", queries, key_weight) * queries.shape[1] ** -0.5
    attended = (context @ directions.T).softmax(dim=1).mT @ context  # [b, h, D]
    values = torch.einsum("hde,bhe->bhd", value_weight, attended).flatten(1)
    bias = 0 if attention.kv.bias is None else attention.kv.bias[attention.kv.out_features // 2 :]
    return attention.proj(values + bias)[:, None]


def token_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[n, J, D] -> mean and 1 / deviation [D] over samples and tokens, in float64 without a copy of all tokens"""
    sums = torch.zeros(2, tokens.shape[2], dtype=torch.double)
    for chunk in tokens.split(256):
        values = chunk.double().flatten(0, 1)
        sums += torch.stack([values.sum(0), values.square().sum(0)])
    mean, second_moment = sums / (tokens.shape[0] * tokens.shape[1])
    deviation = (second_moment - mean.square()).clamp_min(0).sqrt().clamp_min(1e-6)
    return mean.float(), (1 / deviation).float()


def tokens_of(features: Features) -> Tensor:
    assert features.tokens is not None
    return features.tokens
