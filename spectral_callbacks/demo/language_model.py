"""A small GPT."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from spectral_callbacks.demo.text import NUM_TOKENS

_INIT_STD = 0.02  # of every matrix, as in GPT-2
_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.1
_MLP_RATIO = 4


class LanguageModel(pl.LightningModule):
    """A decoder-only transformer that predicts the next token; logs `train/loss` and `val/loss`, in nats a token.

    Pre-norm blocks, learned positions, GELU, initialisation as in GPT-2. `final_norm` is the last layer before the
    scores; its output, (n, T, width), is the representation whose geometry is studied. Trained by AdamW with betas
    (0.9, 0.95) and weight decay 0.1, the learning rate growing linearly over `warmup_steps` and constant from there on.

    Args:
        width: Length of a representation, d.
        num_layers: Blocks of attention and a two-layer perceptron.
        num_heads: Heads of attention; they share the width.
        context: The longest sequence, T.
        num_tokens: Size of the vocabulary.
        lr: Learning rate after the warm-up.
        warmup_steps: Steps of the warm-up; 0 for none.

    Raises:
        ValueError: If a number is out of its range, or the heads do not divide the width.

    Example:
        >>> model = LanguageModel(width=16, num_layers=1, num_heads=2, context=8)
        >>> model(torch.zeros(3, 8, dtype=torch.int64)).shape
        torch.Size([3, 8, 256])
    """

    def __init__(
        self,
        width: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        context: int = 64,
        num_tokens: int = NUM_TOKENS,
        lr: float = 1e-3,
        warmup_steps: int = 100,
    ) -> None:
        super().__init__()
        sizes = (("width", width), ("num_layers", num_layers), ("num_heads", num_heads), ("context", context))
        for name, value in (*sizes, ("num_tokens", num_tokens), ("lr", lr)):
            if value <= 0:
                raise ValueError(f"{name}={value!r} must be positive.")
        if width % num_heads:
            raise ValueError(f"width={width!r} must be a multiple of num_heads={num_heads!r}: the heads share it.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps!r} must not be negative; 0 is no warm-up.")
        self.save_hyperparameters()
        self.context = context
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.tokens = nn.Embedding(num_tokens, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, num_heads) for _ in range(num_layers)))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_a_branch = name.endswith("exit.weight")
                nn.init.normal_(parameter, std=_INIT_STD / (math.sqrt(2 * num_layers) if ends_a_branch else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of the token behind each, (n, T) int64 -> (n, T, num_tokens)."""
        if tokens.shape[1] > self.context:
            raise ValueError(f"tokens has sequences of {tokens.shape[1]}, and context={self.context} is the longest.")
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.blocks(self.tokens(tokens) + self.positions(positions))
        return self.head(self.final_norm(hidden))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean negative log-likelihood of a batch."""
        return self._evaluate(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss of a batch."""
        self._evaluate(batch, "val")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW, and the warm-up by steps."""
        decayed = [p for p in self.parameters() if p.ndim == 2]
        spared = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": spared, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=_BETAS)
        warmup = torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1 / (self.warmup_steps + 1), total_iters=self.warmup_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        inputs, targets = batch
        loss = F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())
        self.log(f"{stage}/loss", loss, batch_size=len(inputs))
        return loss


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, num_heads))
        self.mlp = _Mlp(width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(hidden)
        return hidden + self.mlp(hidden)


class Attention(nn.Module):
    """Self-attention of several heads; every token looks at itself and those before it.

    Args:
        width: Length of a representation.
        num_heads: Heads; each has its share of the width.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.entrance = nn.Linear(width, 3 * width)
        self.exit = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the tokens have seen, (n, T, d) -> (n, T, d)."""
        query, key, value = self.entrance(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.exit(seen.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.entrance = nn.Linear(width, _MLP_RATIO * width)
        self.exit = nn.Linear(_MLP_RATIO * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.exit(F.gelu(self.entrance(self.norm(hidden))))
