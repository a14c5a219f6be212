"""BERT, GPT-2 and Llama of Hugging Face in inner loops and levels, against plain torch by hand.

They are small and have random weights.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import metaopt as mo
from optimizers import SGD, Adam

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("float64")

VOCABULARY, LENGTH, STEPS = 30, 8, 2
KINDS = ["bert", "gpt2"]


def build(
    kind: str, *, dropout: float = 0.0, attention: str = "sdpa", hooked: bool = False
) -> nn.Module:
    """Return a model of 2 layers, width 32, in training mode.

    Args:
        kind: "bert" classifies into 3, "gpt2" and "llama" predict the next token; the last has
            grouped heads, rotary positions and RMS norms.
        dropout: wherever there is any.
        attention: "sdpa", torch's fused kernels, or "eager".
        hooked: switch gradient checkpointing on and off: a hook stays that asks activations to
            require grad.
    """
    if kind == "bert":
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=3, **sizes, **rates
        )
        model = transformers.BertForSequenceClassification(config)
    elif kind == "llama":
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 16,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=VOCABULARY, attention_dropout=dropout, **sizes)
        )
    else:
        sizes = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 16,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **rates)
        )
    model.set_attn_implementation(attention)
    if hooked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # version 5.24 gives them new names
            model.gradient_checkpointing_enable()
            model.gradient_checkpointing_disable()
        # what PEFT calls, and older versions in `gradient_checkpointing_enable`
        model.enable_input_require_grads()
    return model.double().train()


def batch_of(kind: str, rows: int = 3) -> dict[str, Tensor]:
    """Return sequences of different lengths, and labels."""
    ids, mask = (
        torch.randint(VOCABULARY, (rows, LENGTH)),
        torch.ones(rows, LENGTH, dtype=torch.int64),
    )
    mask[0, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "bert":
        return {**inputs, "labels": torch.randint(3, (rows,))}
    return {**inputs, "targets": ids.masked_fill(mask == 0, -100)}


def loss_of(output: Any, batch: Any) -> Tensor:
    """Return the model's own loss; that of GPT-2 in float64, for its own is computed in float32."""
    if output.loss is not None:
        return output.loss
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["targets"][:, 1:].flatten())


def inputs_of(batch: Any) -> Any:
    return {
        **{name: values for name, values in batch.items() if name != "targets"},
        "use_cache": False,
    }


def plain_loss(model: nn.Module, params: Any, batch: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        return loss_of(functional_call(model, params, (), inputs_of(batch)), batch)


def net_loss(net: mo.Functional) -> Any:
    return lambda params, batch: loss_of(net(params, **inputs_of(batch)), batch)


def descend(
    model: nn.Module,
    params: Any,
    batch: Any,
    lr: Any,
    *,
    first_order: bool = False,
    momentum: float = 0.0,
    steps: int = STEPS,
) -> Any:
    """Return the parameters after some steps, by hand."""
    velocity = None
    for _ in range(steps):
        found = torch.autograd.grad(
            plain_loss(model, params, batch), list(params.values()), create_graph=not first_order
        )
        velocity = (
            found
            if velocity is None
            else [momentum * v + g for v, g in zip(velocity, found, strict=True)]
        )
        params = {name: p - lr * v for (name, p), v in zip(params.items(), velocity, strict=True)}
    return params


RULES = {
    "full": mo.Backprop(),
    "steps": mo.Backprop(memory="steps"),
    "first-order": mo.FirstOrder(),
    "first-order-steps": mo.FirstOrder(memory="steps"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"attention": "eager"}, {"hooked": True}], ids=["sdpa", "eager", "hooked"]
)
def test_the_derivative_through_a_loop_is_that_by_hand(kind: str, rule: str, options: Any) -> None:
    """With the hook every loop was refused, as one that reaches a tensor through its closure.

    It does not.
    """
    model, batch, query = build(kind, **options), batch_of(kind), batch_of(kind)
    net, lr = mo.functional(model), torch.tensor(0.1, requires_grad=True)
    loss = net_loss(net)
    out = mo.minimize(
        loss, SGD(lr, momentum=0.9), net.params, batch, steps=STEPS, differentiate=RULES[rule]
    )
    leaves = [lr, *net.params.values()]
    with sdpa_kernel(SDPBackend.MATH):
        found = torch.autograd.grad(loss(out.params, query), leaves)
    params = descend(
        model, dict(net.params), batch, lr, first_order=rule.startswith("first"), momentum=0.9
    )
    expected = torch.autograd.grad(plain_loss(model, params, query), leaves)
    assert expected[0].abs() > 1e-4
    assert all(parameter.grad is None for parameter in model.parameters())
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_with_dropout_too(kind: str, rule: str, hooked: bool) -> None:
    """Masks are drawn in the order of the calls, and the same when a step is rebuilt."""
    model, batch, query = build(kind, dropout=0.2, hooked=hooked), batch_of(kind), batch_of(kind)
    net = mo.functional(model)
    loss, leaves = net_loss(net), list(net.params.values())
    torch.manual_seed(1)
    out = mo.minimize(loss, SGD(0.1), net.params, batch, steps=STEPS, differentiate=RULES[rule])
    found = torch.autograd.grad(loss(out.params, query), leaves)
    torch.manual_seed(1)
    params = descend(model, dict(net.params), batch, 0.1, first_order=rule.startswith("first"))
    expected = torch.autograd.grad(plain_loss(model, params, query), leaves)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-9)


@functools.cache
def tasks_of(kind: str, count: int = 3) -> Any:
    support, query = (
        {name: torch.stack([one[name] for one in batches]) for name in batches[0]}
        for batches in ([batch_of(kind) for _ in range(count)] for _ in range(2))
    )
    return support, query


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}], ids=["", "one by one"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_meta_gradients_are_those_by_hand(kind: str, options: Any, hooked: bool) -> None:
    """A mask check that reads values, which vmap cannot, ended in torch's own text.

    Now in the loop, with one warning.
    """
    model = build(kind, hooked=hooked)
    net, tasks, inner = mo.functional(model), tasks_of(kind), SGD(nn.Parameter(torch.tensor(0.1)))
    loss = net_loss(net)

    def task_loss(params: Any, task: Any) -> Tensor:
        return loss(mo.minimize(loss, inner, params, task[0], steps=STEPS).params, task[1])

    meta_gradient = mo.meta_grad(task_loss, learn=inner, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (grads, of_inner), losses = meta_gradient(net.params, tasks)
        meta_gradient(net.params, tasks)
    told = [str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)]
    assert len(told) <= (0 if options else 1)
    assert all(
        "cannot be batched by vmap, so they are gone through one by one" in text for text in told
    )
    leaves, values = [inner.lr, *net.params.values()], []
    for index in range(3):
        support, query = mo.tree.index(tasks, index)
        values.append(plain_loss(model, descend(model, dict(net.params), support, inner.lr), query))
    assert_close(losses, torch.stack(values), 1e-9)
    expected = torch.autograd.grad(torch.stack(values).mean(), leaves)
    for one, other in zip([of_inner["lr"], *grads.values()], expected, strict=True):
        assert_close(one, other, 1e-9)


def weighing(kind: str, rule: Any, optimizer: Any, **options: Any) -> Any:
    """Return (graph, model, weights, support, query) of a level that weighs another's examples.

    The other is a Hugging Face model.
    """
    model, weights = build(kind, attention="eager", **options), nn.Linear(LENGTH, 1)
    support, query = batch_of(kind), batch_of(kind)
    graph = weighing_of(model, weights, support, query, rule, optimizer)
    return graph, model, weights, support, query


def weighing_of(
    model: nn.Module, weights: nn.Module, support: Any, query: Any, rule: Any, optimizer: Any
) -> mo.LevelGraph:
    def lower_loss(levels: Any, batch: Any) -> Tensor:
        weight = levels.weights(batch["input_ids"] / VOCABULARY).sigmoid().mean()
        return weight * loss_of(levels.model(**inputs_of(batch)), batch)

    def upper_loss(levels: Any, batch: Any) -> Tensor:
        return loss_of(levels.model(**inputs_of(batch)), batch)

    lower = mo.Level("model", model, lower_loss, optimizer, data=[support])
    upper = mo.Level("weights", weights, upper_loss, Adam(0.1), data=[query], allow_unused=True)
    return mo.LevelGraph([mo.Edge(upper, lower, steps=1, differentiate=rule)])


@pytest.mark.parametrize(
    "rule", [mo.Backprop(), mo.T1T2(), mo.SAMA(radius=1e-5)], ids=["backprop", "t1t2", "sama"]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_hypergradients_are_those_by_hand(kind: str, rule: Any, hooked: bool) -> None:
    """T1T2 is -d(g .

    v)/dm at the end, g the lower gradient and v the upper one; SAMA the same times lr, by
    differences.
    """
    graph, model, weights, support, query = weighing(kind, rule, SGD(0.1), hooked=hooked)
    start, outer = dict(mo.functional(model).params), list(weights.parameters())

    def lower(params: Any) -> Tensor:
        return weights(support["input_ids"] / VOCABULARY).sigmoid().mean() * plain_loss(
            model, params, support
        )

    grads = torch.autograd.grad(lower(start), list(start.values()), create_graph=True)
    after = {name: p - 0.1 * g for (name, p), g in zip(start.items(), grads, strict=True)}
    if isinstance(rule, mo.Backprop):
        expected = torch.autograd.grad(plain_loss(model, after, query), outer)
    else:
        # these rules look at where it stands
        v = torch.autograd.grad(plain_loss(model, start, query), list(start.values()))
        g = torch.autograd.grad(lower(start), list(start.values()), create_graph=True)
        scale = 0.1 if isinstance(rule, mo.SAMA) else 1.0
        expected = torch.autograd.grad(
            -scale * sum((a * b).sum() for a, b in zip(g, v, strict=True)), outer
        )
    found = graph.hypergradient("weights")
    for (name, _), own in zip(weights.named_parameters(), expected, strict=True):
        assert own.abs().max() > 1e-6
        assert_close(found[name], own, 1e-7 if isinstance(rule, mo.SAMA) else 1e-9)


@pytest.mark.parametrize(
    "rule", [mo.Backprop(), mo.T1T2(), mo.SAMA()], ids=["backprop", "t1t2", "sama"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_level_steps_with_dropout(kind: str, rule: Any) -> None:
    graph, model, weights, *_ = weighing(kind, rule, Adam(1e-3), dropout=0.2, hooked=True)
    before = [p.detach().clone() for p in [*model.parameters(), *weights.parameters()]]
    assert all(
        torch.as_tensor(value).isfinite().all() for _ in range(2) for value in graph.step().values()
    )
    after = [*model.parameters(), *weights.parameters()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) >= len(after) - 1


# A third kind, and adapters of PEFT: against finite differences


def adapted(dropout: float = 0.0) -> nn.Module:
    """Return a Llama model whose only trainable part are LoRA adapters, of random weights."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks for what version 5.24 renamed
        model = peft.get_peft_model(build("llama"), config).double().train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they begin at zero, where the other half has no gradient
            nn.init.normal_(parameter, std=0.3)
    return model


def make(kind: str) -> nn.Module:
    return adapted() if kind == "lora" else build(kind)


def slope_along(fn: Any, params: Any, direction: Any, step: float) -> Tensor:
    """Return the derivative of fn along a direction, by central differences.

    Llama's norms round to float32, which leaves five digits of a difference.
    """
    after, before = (
        fn({name: p.detach() + sign * step * direction[name] for name, p in params.items()})
        for sign in (1, -1)
    )
    return (after - before).detach() / (2 * step)


@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_meta_gradients_are_finite_differences(kind: str) -> None:
    model, batch, query = make(kind), batch_of("llama"), batch_of("llama")
    net = mo.functional(model)
    loss = net_loss(net)

    def outer(params: Any) -> Tensor:
        return loss(mo.minimize(loss, SGD(0.1), params, batch, steps=STEPS).params, query)

    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert all("lora" in name for name in net.params) == (kind == "lora") == bool(frozen)
    grads = torch.autograd.grad(outer(net.params), list(net.params.values()))
    direction = {name: torch.randn_like(p) for name, p in net.params.items()}
    found = sum((g * d).sum() for g, d in zip(grads, direction.values(), strict=True))
    assert found.abs() > 1e-3
    assert_close(found, slope_along(outer, net.params, direction, 1e-4), 1e-4)
    by_hand = torch.autograd.grad(
        plain_loss(model, descend(model, dict(net.params), batch, 0.1), query),
        list(net.params.values()),
    )
    assert_close([*grads], [*by_hand], 1e-9)
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])


@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_hypergradients_are_finite_differences(kind: str) -> None:
    model, weights = make(kind), nn.Linear(LENGTH, 1)
    support, query = batch_of("llama"), batch_of("llama")
    graph = weighing_of(model, weights, support, query, mo.Backprop(), SGD(1.0))
    net, start = mo.functional(model), mo.functional(weights)

    def outer(params: Any) -> Tensor:
        weight = start(params, support["input_ids"] / VOCABULARY).sigmoid().mean()
        after = descend(model, dict(net.params), support, weight, steps=1)  # of weight * loss
        return plain_loss(model, after, query)

    found = graph.hypergradient("weights")
    expected = torch.autograd.grad(outer(start.params), list(start.params.values()))
    assert_close([*found.values()], [*expected], 1e-9)
    direction = {name: torch.randn_like(p) for name, p in start.params.items()}
    along = sum((found[name] * direction[name]).sum() for name in found)
    assert along.abs() > 1e-3
    assert_close(along, slope_along(outer, start.params, direction, 1e-2), 1e-5)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    graph.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trainable


def test_a_checkpoint_holds_the_adapters(tmp_path: Path) -> None:
    def trainer(model: nn.Module, steps: int, *, resume: bool = False) -> mo.Trainer:
        torch.manual_seed(2)
        graph = weighing_of(
            model, nn.Linear(LENGTH, 1), batch_of("llama"), batch_of("llama"), mo.T1T2(), SGD(0.1)
        )
        return mo.Trainer(
            graph, max_steps=steps, checkpoint=tmp_path / "run", resume=resume, progress=False
        )

    torch.manual_seed(1)
    model = adapted()
    trainer(model, 2).fit()
    torch.manual_seed(1)
    resumed = adapted()
    trainer(resumed, 2, resume=True).fit()
    for (name, one), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
