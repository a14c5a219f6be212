"""`meta_weight_net.py text` on a made-up corpus, with a tiny BERT of random weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_sentences import save_bert
from torch.nn.attention import SDPBackend, sdpa_kernel

import metaopt as mo
from metaopt.tasks.rated_text import Corpus
from metaopt.tasks.sentences import SentenceEncoder
from optimizers import AdamW

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import meta_weight_net_text as script
from meta_weight_net_comparison import FOLDS, METHODS, Comparison, Run, damage, drawn_rows
from meta_weight_net_text_report import Seen

SUBJECTS = ["a film", "film", "a plot", "plot ,", "a a film", "a plot , a film"]


@pytest.fixture(scope="module")
def corpus():
    """Return 240 texts, which one word makes positive or negative."""
    words = [("good", 2.0), ("fine", 1.0), ("bad", -2.0), ("bad bad", -3.0)]
    found = [(f"{s} {w}", rating) for s in SUBJECTS for w, rating in words]
    texts, ratings = zip(*found * 10, strict=True)
    return Corpus(list(texts), torch.tensor(ratings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def config(folder, tmp_path):
    return script.Config(
        model=folder,
        noise=0.4,
        clean=20,
        train=120,
        test=40,
        tokens=8,
        learning_rates=(0.003, 0.01),
        lengths=(3, 6),
        batch_size=16,
        clean_batch=20,
        seeds=2,
        features=tmp_path / "features",
        out=tmp_path / "out",
        json=tmp_path / "figures.json",
    )


def compare(config, corpus):
    encoder = SentenceEncoder(config.model, config.tokens)
    sentences = script.encode(config, corpus, encoder)
    return Comparison(config, sentences, (corpus.ratings > 0).long(), encoder)


@pytest.mark.parametrize(("flip", "share"), [("both", 0.5), ("positive", 1.0), ("negative", 0.0)])
def test_labels_are_damaged_as_asked(config, corpus, flip, share):
    truth = (corpus.ratings > 0).long()
    config = dataclasses.replace(config, flip=flip)
    split = damage(config, truth, 3)
    flipped = 120 if flip == "both" else 60
    assert split.wrong.sum() == round(0.4 * flipped)
    assert torch.equal(split.wrong, split.given != truth[split.train])
    assert truth[split.train][split.wrong].float().mean() == pytest.approx(share, abs=0.2)
    assert truth[split.clean].tolist() == [0] * 10 + [1] * 10
    rows = torch.cat([split.train, split.clean, split.test])
    assert len(rows.unique()) == len(rows) == 180
    other = damage(dataclasses.replace(config, noise=0.2), truth, 3)
    assert torch.equal(other.clean, split.clean)  # the same at every noise
    oracle = drawn_rows("oracle", split, FOLDS)
    assert not split.wrong[oracle].any()
    assert split.given[oracle].float().mean() == 0.5
    balanced = drawn_rows("balanced", split, FOLDS)
    assert split.given[balanced].float().mean() == 0.5
    assert len(balanced.unique()) == 120
    left_out = drawn_rows("clean only", split, 1)
    assert truth[split.clean[left_out]].bincount().tolist() == [8, 8]


@pytest.mark.parametrize("weight_input", ["loss", "history and class"])
def test_a_step_of_the_weight_net_is_that_by_hand(config, corpus, weight_input):
    """The learner's step, then -d(g . v)/d theta by a difference at its end, Adam's first step."""
    config = dataclasses.replace(config, weight_input=weight_input, layers=1)
    comparison = compare(config, corpus)
    run = Run("finite differences", 0, 0, FOLDS)
    ours, plain = comparison.begin(run), comparison.begin(run._replace(method="plain"))
    theta = {name: p.detach().clone() for name, p in ours.weights.named_parameters()}
    batch, clean = ours.batch_at(0), comparison.splits[0].clean
    v_batch = mo.Shuffled(
        comparison.examples(clean, comparison.truth[clean], torch.arange(20)), 20, 0
    ).batch_at(0)
    ours.step()
    after = dict(ours.model.named_parameters())
    net, weight_net = plain.net, mo.functional(ours.weights)

    def weighted(params, theta):
        losses = F.cross_entropy(net(params, *batch[0]), batch[1], reduction="none")
        weights = weight_net(theta, ours.look(losses, batch[1], batch[2])).squeeze(1)
        return (weights * losses).sum() / weights.sum()

    first = {name: p.detach() for name, p in plain.net.params.items()}
    expected = mo.minimize(
        lambda params, _: weighted(params, theta), AdamW(0.003), first, None, steps=1
    ).params
    for name, value in expected.items():
        torch.testing.assert_close(after[name].detach(), value.detach(), rtol=1e-4, atol=1e-6)
    now = {name: p.detach() for name, p in after.items()}
    slope = torch.func.grad(lambda p: F.cross_entropy(net(p, *v_batch[0]), v_batch[1]))(now)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward derivative
        product = torch.func.grad(
            lambda t: -torch.func.jvp(lambda p: weighted(p, t), (now,), (slope,))[1]
        )(theta)
    moved = {name: p.detach() - theta[name] for name, p in ours.weights.named_parameters()}
    for name, derivative in product.items():
        # Adam's first step is -lr sign; leave out entries that the difference's bias can turn
        sure = derivative.abs() > 0.3 * derivative.abs().max()
        assert sure.any()
        assert torch.equal(moved[name][sure].sign(), -derivative[sure].sign())


def test_the_history_is_the_mean_of_the_losses_before(config, corpus):
    config = dataclasses.replace(config, weight_input="history")
    comparison = compare(config, corpus)
    training = comparison.begin(Run("SAMA", 0, 0, FOLDS))
    expected = torch.zeros(120, 2)
    for number in range(10):
        sentences, labels, rows = training.batches.batch_at(number)
        losses = F.cross_entropy(training.logits(sentences), labels, reduction="none")
        expected[rows] += torch.stack([losses, torch.ones(16)], 1)
        training.step()
    torch.testing.assert_close(training.history, expected)
    assert training.history[:, 1].max() == 2
    losses = torch.rand(120)
    seen = training.look(losses, labels, training.history)
    torch.testing.assert_close(seen[:, 0], losses)
    once = expected[:, 1] > 0
    torch.testing.assert_close(seen[once, 1], (expected[:, 0] / expected[:, 1])[once])
    torch.testing.assert_close(seen[~once, 1], losses[~once])


def run(config, corpus, monkeypatch):
    monkeypatch.setattr(script, "read_rated_text", lambda path: {"movie": corpus})
    threads = torch.get_num_threads()
    try:
        return script.main(config)
    finally:
        torch.set_num_threads(threads)


def test_end_to_end(config, corpus, monkeypatch, capsys):
    config = dataclasses.replace(config, learning_rates=(0.01,), lengths=(2, 4))
    results = run(config, corpus, monkeypatch)
    printed = capsys.readouterr().out
    assert "Film reviews, 40 % of the labels flipped; test accuracy" in printed
    assert "SAMA, lowest weights of the first seed (wrong labels weigh" in printed
    for method, result in results.items():
        assert method in printed
        assert result.test_accuracy.shape == result.score.shape == (2, 1, 2)
        assert result.test_accuracy.isfinite().all()
        assert (result.score <= 21).all()
    (figures,) = json.loads(config.json.read_text()).values()
    assert figures.keys() == set(METHODS)
    assert figures["plain"]["tuned"] == results["plain"].chosen(longest=False).tolist()
    assert (config.out / "learned_weights.png").stat().st_size > 10_000


def test_a_comparison_goes_on_from_anywhere(config, corpus):
    """To the last bit: from the middle of a training with a history, and from between two."""
    config = dataclasses.replace(
        config, methods=("plain", "SAMA"), weight_input="history", learning_rates=(0.01,)
    )
    whole, half = compare(config, corpus), compare(config, corpus)
    for _ in range(whole.steps):
        whole.step()
    for at in (2 * 6, 2 * 6 + 4):
        while half.now["step"] < at:
            half.step()
        resumed = compare(config, corpus)
        resumed.load_state_dict(copy.deepcopy(half.state_dict()))
        for _ in range(whole.steps - at):
            resumed.step()
        assert torch.equal(resumed.now["judged"].nan_to_num(), whole.now["judged"].nan_to_num())


@pytest.mark.parametrize(("method", "layers"), [("plain", None), ("SAMA", 1)])
def test_half_precision_is_near_and_not_the_same(config, corpus, method, layers):
    found = []
    for precision in ("float32", "bf16"):
        one = dataclasses.replace(config, precision=precision, layers=layers)
        comparison = compare(one, corpus)
        training = comparison.begin(Run(method, 0, 0, FOLDS))
        training.step()
        training.step()
        logits = training.logits(comparison.sentences)
        assert logits.dtype == torch.float32
        found.append(logits)
    # 8 bits of mantissa: 2^-9 each operation, of logits of order 1
    assert 1e-5 < (found[0] - found[1]).abs().max() < 0.05


def test_adapters_are_the_only_trained_part_but_for_the_head(config, corpus):
    pytest.importorskip("peft")
    comparison = compare(dataclasses.replace(config, lora=True, layers=2), corpus)
    training = comparison.begin(Run("SAMA", 0, 1, FOLDS))
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    training.step()
    training.step()
    moved = {n for n, p in training.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n or n.startswith("head.")}
    assert len(moved) == 2 * 2 * 2 + 4


def test_adapters_need_peft(config, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"--lora needs peft, .*: pip install peft"):
        compare(dataclasses.replace(config, lora=True, layers=1), corpus)


def test_figures_are_kept_under_the_options_that_give_them():
    key = script.describe(
        script.Config(
            flip="positive", lora=True, layers=2, lengths=(5, 10), weight_input="loss", seeds=3
        )
    )
    expected = "--flip positive --layers 2 --lora --lengths 5 10 --weight-input loss --seeds 3"
    assert key == expected
    changed = script.Config(data=Path("a"), out=Path("b"), json=Path("c"), methods=("plain",))
    assert script.describe(changed) == "defaults"


def test_snippets_are_judged_without_their_padding(config, corpus):
    """In groups of one length, and back in the order that was asked for."""
    comparison = compare(dataclasses.replace(config, layers=1), corpus)
    rows = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = comparison.training.logits(comparison.examples(rows, rows, rows)[0])
    assert comparison.sentences.mask.sum(1).unique().numel() > 1
    torch.testing.assert_close(comparison.logits(rows), expected, rtol=1e-4, atol=1e-6)
    assert comparison.logits(rows[:0]).shape == (0, 2)


def test_a_long_tail_has_no_wrong_labels_to_weigh(config, corpus):
    split = damage(
        dataclasses.replace(config, noise=0.0, imbalance=6.0), (corpus.ratings > 0).long(), 3
    )
    assert sorted(split.given.bincount().tolist()) == [10, 60]
    assert not split.wrong.any()
    seen = Seen(split.train * 1.0, split.train * 1.0, split.wrong, split.given, split.train)
    assert script.lowest("SAMA", seen, corpus).startswith(
        "SAMA, lowest weights of the first seed:\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 1}, "`seeds` must be at least 2, got 1"),
        ({"lengths": (6, 3)}, "`lengths` must be positive and rising"),
        ({"methods": ("magic",)}, "`methods` must be of .*, got .*magic"),
        ({"clean": 25}, "`clean` must be a multiple of 10, .*, got 25"),
        ({"batch_size": 17}, "4 of 5 folds must fill a batch of 17, got 20"),
        ({"lora": True}, "`lora` adapts layers, and none is trained"),
        ({"noise": 1.0}, r"must lie in \[0, 1\), got 1.0. Write 0.4"),
        ({"imbalance": 61.0}, r"must lie in \[1, 60\], got 61.0"),
    ],
)
def test_bad_configurations(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)
