"""What all text encoders share: empty and over-long prompts, masks, pooling."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.conditions.borrowed import Borrowed
from ditloom.contracts.condition import Condition
from ditloom.contracts.conditioner import Conditioner
from ditloom.contracts.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """ids [B, n] and mask [B, n] (True = a real token); `dropped` counts the tokens cut off each prompt."""

    ids: Tensor
    mask: Tensor
    dropped: tuple[int, ...]


class TextConditioner(Conditioner):
    """Prompts to token states [B, n, width], their mask and a pooled vector [B, d].

    None and the empty string are the same unconditional row: the encoder's own embedding of the empty prompt. A prompt
    longer than `max_tokens` (special tokens included) is cut, with one warning per call. The encoder is frozen and
    never saved with a model.
    """

    width: int
    max_tokens: int
    encoder: Borrowed

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Token ids padded to the longest prompt of the batch."""

    @abstractmethod
    def states(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Token states [B, n, width] and pooled vectors [B, d]."""

    @torch.no_grad()
    def encode(self, inputs: Sequence[str | int | None]) -> Condition:
        tokens = self.tokenize([_as_prompt(value) for value in inputs])
        self._warn_of_cuts(tokens.dropped)
        device = self.encoder.place.device
        tokens = Tokens(tokens.ids.to(device), tokens.mask.to(device), tokens.dropped)
        text, pooled = self.states(tokens)
        return Condition(text=text * tokens.mask[..., None], text_mask=tokens.mask, pooled=pooled)

    def fingerprint(self) -> str:
        """Changes with the settings and with the encoder's weights; keys the embedding cache."""
        return f"{type(self).__name__.lower()}-{self.max_tokens}-{self.encoder.fingerprint()}"

    def _warn_of_cuts(self, dropped: Sequence[int]) -> None:
        cut = [count for count in dropped if count]
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(dropped)} prompts were longer than the text encoder reads: the first "
                f"{self.max_tokens} tokens were kept and up to {max(cut)} dropped",
                stacklevel=3,
            )


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens: [B, n, d], [B, n] -> [B, d]."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def _as_prompt(value: str | int | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"this model takes text prompts, got {value!r}: pass a string, or None for no prompt")
    return value.strip()
