"""Characters of Python's own text, and the small language models that are trained on them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

import metaopt as mo
from metaopt.meta_training.task import sample_tasks
from metaopt.tasks.text import Alphabet, encoded_sources, source

FAMILIES = [
    mo.tasks.CharacterTransformer(width=6, length=5, batch_size=3, modules=("textwrap",)),
    mo.tasks.CharacterLSTM(width=4, length=5, batch_size=3, modules=("textwrap",)),
]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=["transformer", "LSTM"])


def double(tree):
    return {name: leaf.double() for name, leaf in tree.items()}


def test_the_alphabet_has_the_most_frequent_characters_and_one_symbol_for_the_rest() -> None:
    alphabet = Alphabet.most_frequent(["abba", "cab", "é"], symbols=4)
    assert (alphabet.characters, alphabet.size) == ("abc", 4)
    assert alphabet.encode("cébz").tolist() == [2, 3, 1, 3]
    with pytest.raises(ValueError, match="`characters` must be different, got 'aa'"):
        Alphabet("aa")


def test_sources_are_read_without_an_import() -> None:
    alphabet, text = encoded_sources(("textwrap", "this"), 48)
    assert alphabet.size == 48
    assert len(text) == len(source("textwrap")) + len(source("this"))
    assert torch.bincount(text, minlength=48)[:47].diff().max() <= 0  # the most frequent first
    for name in ("no_such_module", "_thread"):
        with pytest.raises(ValueError, match=f"must be Python source of the module, got '{name}'"):
            source(name)


@each_family
def test_batches_are_pieces_of_the_text(family) -> None:
    params, batches, _ = family.sample(torch.Generator().manual_seed(0), 40)
    assert batches.shape == (40, 3, 6)
    _, text = encoded_sources(family.modules, family.symbols)
    windows = {tuple(row) for row in text.unfold(0, 6, 1).tolist()}
    assert {tuple(row) for row in batches.flatten(0, 1).tolist()} <= windows
    assert batches.unique(dim=0).shape[0] > 30
    again = family.sample(torch.Generator().manual_seed(0), 40)
    assert all(params[name].equal(leaf) for name, leaf in again.params.items())


def test_the_standard_deviations() -> None:
    """Of [48 x 16] normal numbers the deviation is known to 2.6 %; 10 % is four of those."""
    transformer, lstm = mo.tasks.CharacterTransformer(), mo.tasks.CharacterLSTM()
    assert (transformer.batch_size, transformer.length, transformer.symbols) == (8, 24, 48)
    assert (lstm.batch_size, lstm.length, lstm.symbols) == (8, 16, 48)
    wanted = {
        transformer: {"embedding": 0.3, "mlp.weight0": 1 / 4, "mlp.weight1": 1 / 8},
        lstm: {"embedding": 0.5, "input.weight": 24**-0.5, "state.weight": 24**-0.5},
    }
    wanted[transformer] |= {"position": 0.1, "readout.weight": 1 / 4, "attention.query": 1 / 4}
    wanted[lstm]["readout.weight"] = 24**-0.5
    for family, stds in wanted.items():
        params = family.sample(torch.Generator().manual_seed(0), 1).params
        for name, std in stds.items():
            rtol = 0.15 if params[name].numel() < 500 else 0.1
            assert params[name].std().item() == pytest.approx(std, rel=rtol), name
        assert all(not leaf.any() for name, leaf in params.items() if "bias" in name)
        assert all((leaf == 1).all() for name, leaf in params.items() if "gain" in name)


def test_the_transformer_is_torchs() -> None:
    """To rounding in float64: the same formula from torch's own attention and norm."""
    family, w = FAMILIES[0], double(FAMILIES[0].sample(torch.Generator().manual_seed(1), 1).params)
    w = {name: leaf + 0.1 * torch.sin(1 + leaf) for name, leaf in w.items()}
    batch = family.sample(torch.Generator().manual_seed(2), 1).batches[0]

    def norm(x, name):
        return F.rms_norm(x, (6,), w[f"{name}.gain"], eps=1e-6)

    x = w["embedding"][batch[:, :-1]] + w["position"]
    query, key, value = (
        (norm(x, "attention") @ w[f"attention.{name}"]).view(3, 5, 2, 3).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    x = x + attended.transpose(1, 2).reshape(3, 5, 6) @ w["attention.output"]
    hidden = F.gelu(norm(x, "mlp") @ w["mlp.weight0"] + w["mlp.bias0"])
    x = x + hidden @ w["mlp.weight1"] + w["mlp.bias1"]
    logits = norm(x, "readout") @ w["readout.weight"] + w["readout.bias"]
    expected = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])
    torch.testing.assert_close(family.loss(w, batch), expected, rtol=1e-12, atol=0)


def test_the_lstm_is_torchs() -> None:
    """To rounding in float64; torch has its gates in another order."""
    family, w = FAMILIES[1], double(FAMILIES[1].sample(torch.Generator().manual_seed(1), 1).params)
    w["input.bias"] = torch.linspace(-1, 1, 16, dtype=torch.float64)
    batch = family.sample(torch.Generator().manual_seed(2), 1).batches[0]
    lstm = nn.LSTM(4, 4, batch_first=True, dtype=torch.float64)
    order = torch.arange(16).view(4, 4)[[0, 1, 3, 2]].flatten()  # ours: input, forget, output, cell
    weights = {
        "weight_ih_l0": w["input.weight"].T[order],
        "weight_hh_l0": w["state.weight"].T[order],
        "bias_ih_l0": w["input.bias"][order],
        "bias_hh_l0": torch.zeros(16, dtype=torch.float64),
    }
    lstm.load_state_dict(weights)
    states, _ = lstm(w["embedding"][batch[:, :-1]])
    logits = states @ w["readout.weight"] + w["readout.bias"]
    expected = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])
    torch.testing.assert_close(family.loss(w, batch), expected, rtol=1e-12, atol=0)


@each_family
def test_gradients_of_many_models_are_those_of_each(family) -> None:
    """Two transforms deep, as evolution asks for them; float64, so to rounding."""
    (params, batches, _), gradient = (
        sample_tasks(family, torch.Generator().manual_seed(0), 2, 1),
        grad(family.loss),
    )
    models = {name: torch.stack([leaf, leaf.sin()], 1) for name, leaf in double(params).items()}
    found = vmap(vmap(gradient, (0, None)))(models, batches[:, 0])
    for task in range(2):
        for half in range(2):
            one = {name: leaf[task, half] for name, leaf in models.items()}
            for name, leaf in gradient(one, batches[task, 0]).items():
                torch.testing.assert_close(found[name][task, half], leaf, rtol=1e-9, atol=1e-12)


@each_family
def test_a_loss_before_training_is_near_that_of_a_guess(family) -> None:
    params, batches, _ = family.sample(torch.Generator().manual_seed(0), 1)
    assert family.loss(params, batches[0]).item() == pytest.approx(math.log(48), rel=0.35)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mo.tasks.CharacterTransformer(width=0), "`width` must be a positive integer, got"),
        (
            lambda: mo.tasks.CharacterTransformer(heads=3),
            "`heads` must divide `width`, got 3 and 16",
        ),
        (lambda: mo.tasks.CharacterLSTM(length=0), "`length` must be a positive integer, got 0"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
