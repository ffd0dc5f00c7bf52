"""Small models with factories for them, as a file of the user would define them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Computed(nn.Module):
    """A function of one input."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Spotter(nn.Module):
    """Classifies short signals: (batch, 4, length) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 16, kernel_size=3, padding=1)
        layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(16, 3)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.conv(signal).transpose(1, 2)).mean(1))


class Scaled(nn.Module):
    """Two inputs of one length: (batch, length, 8) rows, weighted by (batch, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.dense(rows)) * weights[..., None]
        return hidden, hidden.sum(1)


class Pictures(nn.Module):
    """Classifies small pictures: (batch, 3, 8, 8) -> (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.dense = nn.Linear(12, 24)
        self.head = nn.Linear(24, 5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        seen = torch.relu(self.second(torch.relu(self.norm(self.first(picture)))))
        return self.head(torch.relu(self.dense(seen.mean((2, 3)))))


class Reader(nn.Module):
    """Attention alone: (batch, length, 16) -> (batch, length, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 6)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        read, _ = self.attn(signal, signal, signal, need_weights=False)
        return self.head(signal + read)


def pictures() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Pictures(), torch.randn(2, 3, 8, 8)


def reader() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Reader(), torch.randn(2, 7, 16)


class Wide(nn.Module):
    """Rows of 64 through two linear layers: (batch, length, 64) -> (batch, length, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(rows)))


class Sums(nn.Module):
    """Scores (batch, length, 3) of the sum of all unmasked tokens up to each one of (batch, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.dense = nn.Linear(4, 3, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.dense((self.table(input_ids) * attention_mask[..., None]).cumsum(1))}


class Worded(nn.Module):
    """Token ids and their mask: (batch, length) -> (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.dense = nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(self.dense(self.words(ids))) * mask[..., None]).sum(1)


def worded() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Worded(), {"ids": torch.tensor([[1, 2, 3, 4, 5], [5, 4, 7, 6, 0]]), "mask": torch.ones(2, 5).long()}


def spotter() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Spotter(), torch.randn(2, 4, 9)


def scaled() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Scaled(), {"rows": torch.randn(2, 5, 8), "weights": torch.rand(2, 5)}


def without_examples() -> nn.Module:
    return Scaled()


def single_row() -> tuple[nn.Module, torch.Tensor]:
    return Spotter(), torch.randn(1, 4, 9)


def no_rows() -> tuple[nn.Module, torch.Tensor]:
    return Spotter(), torch.randn(0, 4, 9)


def no_module() -> str:
    return "spotter"


def wrong_examples() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Spotter(), {"sound": torch.randn(2, 4, 9)}


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1)


def uncopied() -> Any:
    module = nn.Sequential(nn.Linear(4, 2))
    module[0].lock = threading.Lock()  # type: ignore[assignment]
    return module, torch.rand(2, 4)


def fixed_batch() -> tuple[nn.Module, torch.Tensor]:
    return FixedBatch(), torch.randn(2, 3)


def failing() -> nn.Module:
    raise ValueError("no weights at hand")


def quitting() -> None:
    raise SystemExit(0)


def wide() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Wide(), torch.randn(2, 5, 64)


def sums() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.arange(18).reshape(2, 9) % 11
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return Sums(), {"input_ids": ids, "attention_mask": mask}


class Stacked(nn.Module):
    """Two linear layers on (batch, length, 32), with an activation between them."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64, bias=bias), nn.Linear(64, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def stacked() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Stacked(bias=False), torch.randn(2, 5, 32)


def stacked_with_biases() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Stacked(bias=True), torch.randn(2, 5, 32)
