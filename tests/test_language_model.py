"""The language model that learns while it reads: tied weights, meta-gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import metaopt as mo
from metaopt.tasks.reading import ChunkTransformer, Documents, Passage, chunk_losses
from metaopt.tasks.text import Alphabet, library, split_by_name, topics
from optimizers import SGD, LSTMOptimizer, MLPOptimizer

ROOT = Path(__file__).parent.parent
ALPHABET = Alphabet("abc ")
TEXTS = ["abcabc abc" * 3, "cab bac " * 4, "short"]


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def documents(**sizes: int) -> Documents:
    return Documents(TEXTS, ALPHABET, **{"window": 3, "chunk": 4, **sizes})


def model() -> ChunkTransformer:
    """Return a small model in float64."""
    torch.manual_seed(0)
    return ChunkTransformer(5, window=3, chunk=4, width=4, heads=2, blocks=2).double()


def test_passages_are_what_stands_before_and_the_chunk() -> None:
    read = documents().beginnings(3)
    assert read.seen.shape == (2, 3, 7)
    text = ALPHABET.encode(TEXTS[1])
    assert read.wanted[1].flatten().equal(text[:12])
    assert read.seen[1, 0].tolist() == [4, 4, 4, 4, *text[:3].tolist()]
    assert read.seen[1, 2].equal(text[4:11])
    drawn = documents().draw(torch.Generator().manual_seed(0), 20, 2)
    whole = torch.cat([drawn.seen[:, 0], drawn.wanted[:, 0, -1:]], 1)
    assert drawn.wanted[:, 0].equal(whole[:, 4:])
    assert drawn.seen[:, 1, :4].equal(whole[:, 4:])
    assert len(whole.unique(dim=0)) > 5
    for ask in (documents().beginnings, lambda n: documents().draw(torch.Generator(), 1, n)):
        with pytest.raises(ValueError, match="`chunks` must be at most what the longest"):
            ask(9)
    with pytest.raises(ValueError, match="`texts` must hold a document, got none"):
        Documents([], ALPHABET, window=1, chunk=1)


def test_no_document_is_in_two_parts_and_its_name_decides() -> None:
    texts = library() | topics()
    parts = split_by_name(texts, (0.6, 0.2))
    assert sum(map(len, parts)) == len(texts) > 400
    assert set.union(*map(set, parts)) == set(texts)
    shares = [len(part) / len(texts) for part in parts]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.07)  # three deviations of the binomial
    some = dict(list(texts.items())[:20])
    assert all(
        one.items() <= part.items() for one, part in zip(split_by_name(some, (0.6, 0.2)), parts)
    )
    assert "argparse.py" in texts
    assert not [name for name in texts if "pydoc_data" in name or name.startswith("test/")]


def test_a_prediction_depends_on_its_window_and_on_nothing_else() -> None:
    """With one block; each more sees a window further back."""
    net = ChunkTransformer(5, window=3, chunk=4, width=4, heads=2, blocks=1)
    seen = documents().beginnings(1).seen[0, 0]
    before = net(seen)
    for place in range(7):
        other = seen.clone()
        other[place] = (other[place] + 1) % 5
        changed = (net(other) != before).any(-1).nonzero()[:, 0].tolist()
        assert changed == [row for row in range(4) if row <= place <= row + 3]
    with pytest.raises(ValueError, match="`heads` must divide `width`, got 3 and 64"):
        ChunkTransformer(5, heads=3)


def test_tied_embeddings_stay_tied_while_it_reads() -> None:
    """One weight moves, by the gradients of both of its uses."""
    import language_model

    net, passage = model(), mo.tree.index(documents().beginnings(2), 0)
    way = language_model.Way(net, SGD(0.5), "")
    assert "readout.weight" not in way.net.params
    assert way.moving == list(way.net.params)
    losses = way.read(way.net.params, passage)

    def loss(params: dict, chunk: Passage) -> torch.Tensor:
        return chunk_losses(way.net(params, chunk.seen), chunk.wanted)

    after = mo.minimize(loss, SGD(0.5), way.net.params, mo.tree.index(passage, slice(1))).params
    torch.testing.assert_close(losses[1], loss(after, mo.tree.index(passage, 1)))

    untied = model()
    untied.readout.weight = nn.Parameter(untied.embedding.weight.detach().clone())
    chunk_losses(untied(passage.seen[0]), passage.wanted[0]).backward()
    both = untied.embedding.weight.grad + untied.readout.weight.grad
    moved = net.embedding.weight.detach() - 0.5 * both
    torch.testing.assert_close(after["embedding.weight"], moved, rtol=1e-12, atol=1e-14)
    way.net.load(after)
    assert net.readout.weight is net.embedding.weight
    torch.testing.assert_close(net.readout.weight.detach(), moved, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("prefix", ["blocks.1.mlp.", ""], ids=["mlp", "all"])
@pytest.mark.parametrize("rule", [mo.Backprop(), mo.Backprop(memory=mo.Revolve(1))])
def test_meta_gradients_are_those_of_autograd(prefix: str, rule: mo.Rule) -> None:
    """In the initial weights and in the rates; float64, so to rounding: two chunks by hand."""
    import language_model

    net, passages = model(), documents().beginnings(2)
    names = [name for name, _ in net.named_parameters() if name.startswith(prefix)]
    rates = {name: nn.Parameter(torch.tensor(0.3).double()) for name in names}
    way = language_model.Way(net, SGD(lr=rates), prefix)
    learning = language_model.Learning(
        way, lambda: passages, (0.0, 0.0), lambda step: 1.0, rule, torch.Generator()
    )
    (grads, of_rates), losses = learning.meta_gradient(way.net.params, passages)

    start = dict(net.named_parameters())
    total = torch.zeros(())
    for row in range(2):
        seen, wanted = passages.seen[row], passages.wanted[row]

        def loss(at: dict, chunk: int, seen: Any = seen, wanted: Any = wanted) -> torch.Tensor:
            logits = torch.func.functional_call(net, at, (seen[chunk],), tie_weights=True)
            return F.cross_entropy(logits, wanted[chunk])

        first = loss(start, 0)
        slopes = torch.autograd.grad(first, [start[name] for name in names], create_graph=True)
        moved = {n: start[n] - rates[n] * slope for n, slope in zip(names, slopes, strict=True)}
        second = loss({**start, **moved}, 1)
        torch.testing.assert_close(losses[row], ((first + second) / 2).detach())
        total = total + (first + second) / 4
    expected = torch.autograd.grad(total, [*start.values(), *rates.values()])
    found = [*(grads[name] for name in start), *of_rates.values()]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert all(rate.abs() > 1e-8 for rate in of_rates.values())


def test_a_static_model_is_evaluated_as_it_is() -> None:
    """To rounding in float64; and a rate of 0 is the same."""
    import language_model

    net, passages = model(), documents().beginnings(3)
    plain = torch.stack(
        [
            torch.stack([F.cross_entropy(net(s), w) for s, w in zip(seen, wanted, strict=True)])
            for seen, wanted in zip(*passages, strict=True)
        ]
    ).detach()
    for optimizer in (None, SGD(0.0)):
        found = language_model.Way(net, optimizer, "blocks.1.mlp.").read_all(passages)
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
    changes = language_model.Way(net, SGD(0.3), "blocks.1.mlp.").read_all(passages)
    torch.testing.assert_close(changes[:, 0], plain[:, 0], rtol=1e-12, atol=0)
    assert (changes[:, 1:] - plain[:, 1:]).abs().min() > 1e-6


def test_a_learned_rate_stays_at_0_or_above() -> None:
    import language_model

    rate = nn.Parameter(torch.tensor(0.001))
    way = language_model.Way(model().float(), SGD(lr=rate), "blocks.1.mlp.")
    passages = documents().beginnings(2)
    learning = language_model.Learning(
        way, lambda: passages, (0.1, 1.0), lambda step: 1.0, mo.Backprop(), torch.Generator()
    )
    rates = []
    for _ in range(4):
        learning.step()
        rates.append(rate.item())
    assert min(rates) >= 0


def test_the_options_choose_an_optimizer_and_what_is_kept() -> None:
    import language_model as script

    made = script.make_learned(script.Config(optimizer="mlp", hidden_size=3, step_size=0.5), 7)
    assert isinstance(made, MLPOptimizer)
    assert (made.hidden_size, made.step_size, made.seed) == (3, 0.5, 7)
    made = script.make_learned(script.Config(hidden_size=3, step_size=0.5), 7)
    assert isinstance(made, LSTMOptimizer)
    assert (made.hidden_size, made.scale, made.seed) == (3, 0.5, 7)
    assert script.make_rule(script.Config(memory="full")) == mo.Backprop()
    revolve = script.Config(memory="revolve", snapshots=2)
    assert script.make_rule(revolve) == mo.Backprop(memory=mo.Revolve(2))


def test_the_script_runs(tmp_path: Path, capsys: Any) -> None:
    import language_model

    config = language_model.Config(
        train="topics",
        hidden_size=2,
        width=8,
        window=8,
        chunk=64,
        length=4,
        documents=3,
        chunks=2,
        pretrain_steps=2,
        steps=2,
        static_steps=3,
        grid=(0.1, 0.2),
        seeds=(0, 1),
        out=tmp_path,
    )
    found = language_model.main(config)
    printed = capsys.readouterr().out
    ways = [
        "static",
        "dynamic evaluation",
        "meta-learned start and rates",
        "meta-learned start and optimizer",
    ]
    assert all(f"| {name} " in printed for name in ways)
    assert isinstance(
        mo.Optimizer.load(tmp_path / f"{ways[3]}, seed 1/optimizer.safetensors"), LSTMOptimizer
    )
    rates = mo.Optimizer.load(tmp_path / f"{ways[2]}, seed 0/optimizer.safetensors").lr.values
    assert len(rates) == 4
    assert all(0 < rate != 1 for rate in rates.values())
    weights = load_file(tmp_path / "static, seed 0/model.safetensors")
    assert "embedding.weight" in weights
    assert "readout.weight" not in weights
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["config"]["chunk"] == 64
    for sort, curves in found.items():
        assert [*curves] == ways
        for name, bits in curves.items():
            assert bits.shape == (2, 3, 4)
            its = figures["sorts"][sort][name]
            assert its["mean"] == pytest.approx(bits.mean().item(), rel=1e-5)
            assert len(its["by position"]) == 4
        # before the first step dynamic evaluation is the static model
        torch.testing.assert_close(curves[ways[0]][..., 0], curves[ways[1]][..., 0])
    assert (tmp_path / "reading.png").stat().st_size > 10_000


def test_documents_that_are_too_short_are_named() -> None:
    import language_model

    with pytest.raises(ValueError, match="`length` times `chunk` must leave topics for training"):
        language_model.read_data(language_model.Config(length=400))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "`chunk` must be positive, got 0"),
        ({"lr": -1.0}, r"`lr` must be positive, got -1\.0"),
        ({"grid": ()}, r"`grid` must hold positive learning rates, got \(\)"),
        ({"seeds": ()}, r"`seeds` must hold seeds of at least 0, got \(\)"),
    ],
)
def test_silly_options_are_refused(options: dict, message: str) -> None:
    import language_model

    with pytest.raises(ValueError, match=message):
        language_model.Config(**options)
