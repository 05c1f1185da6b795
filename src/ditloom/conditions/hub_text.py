"""Any text encoder of the transformers library: T5, CLIP, BERT and their kin, by local folder or hub name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ditloom.conditions.borrowed import Borrowed
from ditloom.conditions.text import TextConditioner, Tokens, masked_mean
from ditloom.contracts.errors import MissingExtra, UserError
from ditloom.contracts.registry import register

TEXT_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "siglip": "SiglipTextModel",
    "siglip_text_model": "SiglipTextModel",
}
"""Model types whose text half has a class of its own; every other type is loaded by `AutoModel`."""


@register("hub-text", extra="hub")
class HubText(TextConditioner):
    """Prompts to the states of layer `layer` (-1: the last, after its final norm) and a pooled vector.

    `source` is a folder or a hub name, with `subfolder` and `tokenizer_subfolder` for pipelines that keep them apart.
    `pooled` is the encoder's own pooled output where it has one (CLIP: the end-of-text token), else the mean over
    tokens. `pad_to_max` pads every prompt to `max_tokens` and attends the padding, as SD3 and FLUX do with T5.
    """

    def __init__(
        self,
        source: str,
        max_tokens: int = 77,
        layer: int = -1,
        pad_to_max: bool = False,
        subfolder: str = "",
        tokenizer_subfolder: str | None = None,
        revision: str | None = None,
    ):
        super().__init__()
        if max_tokens < 2:
            raise UserError(f"max_tokens of a text encoder is at least 2, got {max_tokens}")
        self.source, self.max_tokens, self.layer, self.pad_to_max = source, max_tokens, layer, pad_to_max
        self.subfolder, self.revision = subfolder, revision
        self.tokenizer_subfolder = subfolder if tokenizer_subfolder is None else tokenizer_subfolder
        self.encoder = Borrowed(self._load)
        self._tokenizer: Any = None

    @property
    def width(self) -> int:  # type: ignore[override]
        """Channels of the token states, from the encoder's configuration; loads no weights."""
        config = self._config()
        return getattr(config, "text_config", config).hidden_size

    def config(self) -> dict[str, Any]:
        names = ("source", "max_tokens", "layer", "pad_to_max", "subfolder", "tokenizer_subfolder", "revision")
        return {name: getattr(self, name) for name in names}

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        tokenizer, padding = self.tokenizer, "max_length" if self.pad_to_max else "longest"
        full = [len(ids) for ids in tokenizer([*prompts], truncation=False, verbose=False)["input_ids"]]
        cut = tokenizer(
            [*prompts], padding=padding, max_length=self.max_tokens, truncation=True, return_tensors="pt", verbose=False
        )
        mask = cut["attention_mask"].bool()
        dropped = tuple(max(0, length - self.max_tokens) for length in full)
        return Tokens(cut["input_ids"], mask.new_ones(mask.shape) if self.pad_to_max else mask, dropped)

    def states(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        wants_all = self.layer != -1
        output = self.encoder.network(
            input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=wants_all
        )
        states = output.hidden_states[self.layer] if wants_all else output.last_hidden_state
        own = getattr(output, "pooler_output", None)
        return states, masked_mean(states, tokens.mask) if own is None else own

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}-{self.layer}-{int(self.pad_to_max)}"

    @property
    def tokenizer(self) -> Any:
        """The encoder's own tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self._from_pretrained("AutoTokenizer", self.tokenizer_subfolder)
        return self._tokenizer

    def _load(self) -> nn.Module:
        return self._from_pretrained(TEXT_CLASSES.get(self._config().model_type, "AutoModel"), self.subfolder)

    def _config(self) -> Any:
        return self._from_pretrained("AutoConfig", self.subfolder)

    def _from_pretrained(self, name: str, subfolder: str) -> Any:
        try:
            import transformers
        except ImportError as error:
            raise MissingExtra("transformers", "hub", f"the text encoder {self.source!r}") from error
        try:
            return getattr(transformers, name).from_pretrained(
                self.source, subfolder=subfolder, revision=self.revision or "main"
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot load the text encoder {self.source!r} ({name}): {reason}") from error
