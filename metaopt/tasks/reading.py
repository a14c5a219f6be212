"""Documents that are read chunk by chunk, and a language model that reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.checks import check_count
from metaopt.tasks.text import Alphabet


class Passage(NamedTuple):
    """Consecutive chunks of a document; of several documents with a leading axis more.

    Attributes:
        seen: what is given to the model to predict a chunk, [chunks, window + chunk], int64: each
            character of the chunk but the last, and what stands before.
        wanted: the chunk itself, [chunks, chunk], int64.
    """

    seen: Tensor
    wanted: Tensor


class Documents:
    """Texts as numbers, from which passages are cut.

    Args:
        texts: the documents.
        alphabet: the symbols. Before a document stands the one for characters that have none.
        window: characters that are seen before a chunk, but for the one just before it.
        chunk: characters in a chunk.

    Raises:
        ValueError: there are no documents, or a number is not positive.
    """

    def __init__(self, texts: Iterable[str], alphabet: Alphabet, *, window: int, chunk: int):
        self.window = check_count(self, "window", window)
        self.chunk = check_count(self, "chunk", chunk)
        before = torch.full((window + 1,), alphabet.size - 1)
        self.texts = [torch.cat([before, alphabet.encode(text)]) for text in texts]
        if not self.texts:
            raise ValueError("Documents: `texts` must hold a document, got none. Add some.")

    def beginnings(self, chunks: int) -> Passage:
        """Return the first chunks of all documents that have as many, in their order.

        Raises:
            ValueError: none has.
        """
        needed = self._length(chunks)
        return _stack([self._cut(text, 0, chunks) for text in self.texts if len(text) >= needed])

    def draw(self, generator: torch.Generator, count: int, chunks: int) -> Passage:
        """Draw passages with replacement; all places where one can begin are equally likely.

        Raises:
            ValueError: no document is long enough.
        """
        needed = self._length(chunks)
        room = torch.tensor([max(len(text) - needed + 1, 0) for text in self.texts])
        ends = room.cumsum(0)
        if not ends[-1]:
            return _stack([])
        places = torch.randint(int(ends[-1]), (count,), generator=generator)
        rows = torch.searchsorted(ends, places, right=True)
        starts = (places - (ends - room)[rows]).tolist()
        chosen = zip(rows.tolist(), starts, strict=True)
        return _stack([self._cut(self.texts[row], start, chunks) for row, start in chosen])

    def _length(self, chunks: int) -> int:
        return self.window + 1 + check_count(self, "chunks", chunks) * self.chunk

    def _cut(self, text: Tensor, start: int, chunks: int) -> Passage:
        piece = text[start : start + self._length(chunks)]
        seen = piece[:-1].unfold(0, self.window + self.chunk, self.chunk)
        return Passage(seen, piece[self.window + 1 :].view(chunks, self.chunk))


def _stack(passages: list[Passage]) -> Passage:
    if not passages:
        raise ValueError(
            "`chunks` must be at most what the longest document has, and none is long enough. Ask "
            "for fewer chunks, or give longer documents."
        )
    seen, wanted = zip(*passages, strict=True)
    return Passage(torch.stack(seen), torch.stack(wanted))


class ChunkTransformer(nn.Module):
    """A transformer that predicts a chunk from what stands in a window before each character.

    Blocks are x + attention(norm x), then x + MLP(norm x). The readout is the embedding once more:
    the two share one weight. Attention is written out, since the fused kernels have no second
    derivative.

    Args:
        symbols: size of the alphabet.
        window: characters before its own that a position attends to.
        chunk: characters that are predicted at a time.
        width: of the embeddings.
        heads: of the attention; they divide the width.
        blocks: number of blocks. In the last one only the chunk is computed.

    Raises:
        ValueError: a number is not positive, or `heads` does not divide `width`.

    Reference:
        Tied weights: Press and Wolf 2017, arXiv:1608.05859; blocks: Xiong et al. 2020,
        arXiv:2002.04745.
    """

    allowed: Tensor

    def __init__(
        self,
        symbols: int,
        *,
        window: int = 64,
        chunk: int = 128,
        width: int = 64,
        heads: int = 4,
        blocks: int = 2,
    ):
        super().__init__()
        given = {"window": window, "chunk": chunk, "width": width, "heads": heads, "blocks": blocks}
        for name, value in given.items():
            check_count(self, name, value)
        if width % heads:
            raise ValueError(
                f"ChunkTransformer: `heads` must divide `width`, got {heads} and {width}."
            )
        self.chunk = chunk
        self.embedding = nn.Embedding(symbols, width)
        self.position = nn.Parameter(0.1 * torch.randn(window + chunk, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(blocks)])
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.readout = nn.Linear(width, symbols)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.readout.weight = self.embedding.weight
        place = torch.arange(window + chunk)
        back = place[:, None] - place
        self.register_buffer("allowed", (back >= 0) & (back <= window), persistent=False)

    def forward(self, seen: Tensor) -> Tensor:
        """Return logits [..., chunk, symbols] for seen [..., window + chunk]."""
        x = self.embedding(seen) + self.position
        *first, last = self.blocks
        for block in first:
            x = block(x, self.allowed)
        return self.readout(self.norm(last(x, self.allowed[-self.chunk :])))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One block of `ChunkTransformer`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Return the last positions, as many as `allowed` [positions, length] has rows."""
        positions = allowed.shape[0]
        query, key, value = (
            rows.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for rows in self.attention(self.attention_norm(x)).chunk(3, -1)
        )
        scores = query[..., -positions:, :] @ key.transpose(-1, -2) / math.sqrt(key.shape[-1])
        mixed = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ value
        x = x[..., -positions:, :] + self.output(mixed.transpose(-2, -3).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


def chunk_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean cross-entropy of each chunk in nats, [...].

    Args:
        logits: [..., chunk, symbols].
        wanted: [..., chunk], int64.
    """
    losses = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none")
    return losses.view(wanted.shape).mean(-1)
