"""Which tokens of a sequence are a feature map's: a vision transformer has class or detection tokens beside them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .tracing import is_tracing


@dataclass(frozen=True)
class MapTokens:
    """The cells of a feature map in a sequence of N tokens: all but those in front of the map and behind it.

    ENACT clusters only the map's tokens. The others, such as class and detection tokens, stay keys of their own.

    Args:
        before: tokens in front of the map, at least 0.
        after: tokens behind the map, at least 0.
        size: height and width of the map, tokens; calls with another number of tokens are then errors. None: any size.

    Raises:
        ValueError: a number is not whole or is negative, or the size is not two positive whole numbers.
    """

    before: int = 0
    after: int = 0
    size: tuple[int, int] | None = None

    def __post_init__(self):
        if not all(isinstance(number, int) and number >= 0 for number in (self.before, self.after)):
            raise ValueError(f"before and after must be at least 0 tokens, got {self.before!r} and {self.after!r}")
        if self.size is None:
            return
        if isinstance(self.size, list):
            object.__setattr__(self, "size", tuple(self.size))  # from JSON
        sides = self.size if isinstance(self.size, tuple) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise ValueError(f"size must be the map's height and width, both at least 1 token, got {self.size!r}")

    @property
    def all(self) -> bool:
        """Whether all tokens are the map's."""
        return not self.before and not self.after

    def check(self, num_tokens: int) -> None:
        """Raise ValueError if a sequence of so many tokens cannot have this map."""
        beside = self.before + self.after
        if is_tracing() or num_tokens > beside and self.size is None:
            return
        if self.size is None:
            raise ValueError(f"{self} leaves no token of the map: the sequence has {num_tokens}")
        if num_tokens != beside + self.size[0] * self.size[1]:
            expected = f"{self.before} + {self.size[0]} * {self.size[1]} + {self.after}"
            raise ValueError(f"{self} means {expected} tokens, but the sequence has {num_tokens}")

    def of_map(self, tokens: Tensor) -> Tensor:
        """Return the map's part of tokens (batch, N, ...): a view (batch, N - before - after, ...)."""
        return tokens if self.all else tokens[:, self.before : tokens.shape[1] - self.after]

    def rejoin(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        """Put the tokens beside the map around the map's clusters.

        Args:
            tokens: (batch, N, ...).
            pooled: (batch, M, ...).

        Returns:
            (batch, before + M + after, ...).
        """
        if self.all:
            return pooled
        return torch.cat((tokens[:, : self.before], pooled, tokens[:, tokens.shape[1] - self.after :]), dim=1)
