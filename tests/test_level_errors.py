"""Graphs that cannot work: each a clear error that names the level."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from level_problems import CG, Value, level
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD, Adam

BACKPROP = mo.Backprop()


def two(
    upper: dict[str, Any] | None = None, lower: dict[str, Any] | None = None, **edge: Any
) -> mo.LevelGraph:
    """Return a small graph "top" -> "low", with other arguments where given."""
    top = {"value": torch.ones(2), "loss": lambda s, _: (s.low() * s.top()).sum()} | (upper or {})
    low = {"value": torch.ones(2), "loss": lambda s, _: ((s.low() - s.top()) ** 2).sum()} | (
        lower or {}
    )
    return mo.LevelGraph([mo.Edge(level("top", **top), level("low", **low), **edge)])


def named(*names: str, reads: dict[str, str] | None = None) -> list[mo.Level]:
    """Return levels whose losses are the squared sum of their own value and of others.

    The others are the levels in `reads`.
    """

    def loss(name: str) -> Callable[..., Tensor]:
        seen = [name, *(reads or {}).get(name, "").split()]
        return lambda s, _: sum(getattr(s, other)().sum() for other in seen) ** 2

    return [level(name, torch.ones(2), loss(name)) for name in names]


def circle() -> mo.LevelGraph:
    a, b, c = named("a", "b", "c")
    return mo.LevelGraph([mo.Edge(a, b), mo.Edge(b, c), mo.Edge(c, a)])


def one_name() -> mo.LevelGraph:
    return mo.LevelGraph([mo.Edge(*named("a", "a"))])


def one_module() -> mo.LevelGraph:
    model = Value(torch.ones(2))
    levels = [
        mo.Level(name, model, lambda s, _: s.a().sum() * s.b().sum(), SGD(0.1)) for name in "ab"
    ]
    return mo.LevelGraph([mo.Edge(*levels)])


def unrelated() -> mo.LevelGraph:
    top, left, right = named(
        "top", "left", "right", reads={"top": "left right", "left": "top right", "right": "top"}
    )
    return mo.LevelGraph([mo.Edge(top, left), mo.Edge(top, right)])


def contradicting_steps() -> mo.LevelGraph:
    top, left, right, low = named(
        "top",
        "left",
        "right",
        "low",
        reads={"top": "low", "left": "top", "right": "top", "low": "left right"},
    )
    return mo.LevelGraph(
        [
            mo.Edge(top, left),
            mo.Edge(top, right),
            mo.Edge(left, low, steps=2),
            mo.Edge(right, low, steps=3),
        ]
    )


def contradicting_rules() -> mo.LevelGraph:
    top, left, right, low = named(
        "top",
        "left",
        "right",
        "low",
        reads={"top": "low", "left": "top", "right": "top", "low": "left right"},
    )
    edges = [
        mo.Edge(top, left),
        mo.Edge(top, right),
        mo.Edge(left, low),
        mo.Edge(right, low, differentiate=CG),
    ]
    return mo.LevelGraph(edges)


def deep_sharing() -> mo.LevelGraph:
    top, mid, low, deep = named(
        "top",
        "mid",
        "low",
        "deep",
        reads={"top": "mid deep", "mid": "top low", "low": "mid deep", "deep": "low top"},
    )
    return mo.LevelGraph(
        [mo.Edge(top, mid), mo.Edge(mid, low), mo.Edge(low, deep), mo.Edge(top, deep)]
    )


def hidden_response() -> mo.LevelGraph:
    reads = {"top": "low", "mid": "top solved", "solved": "mid low", "low": "solved"}
    top, mid, solved, low = named("top", "mid", "solved", "low", reads=reads)
    return mo.LevelGraph(
        [mo.Edge(top, mid), mo.Edge(mid, solved, differentiate=CG), mo.Edge(solved, low)]
    )


def two_starts() -> mo.LevelGraph:
    a, b, low = named("a", "b", "low", reads={"a": "low", "b": "low", "low": "a b"})
    return mo.LevelGraph([mo.Edge(a, low, start="restart"), mo.Edge(b, low)])


def mixed_copies() -> mo.LevelGraph:
    loss = lambda s, _: (s.top() * s.left() * s.right()).sum()
    top, left = (
        level("top", torch.ones(2), loss),
        level("left", torch.ones(2), lambda s, _: (s.left() * s.top()).sum(), copies=2),
    )
    right = level("right", torch.ones(2), lambda s, _: (s.right() * s.top()).sum(), copies=3)
    return mo.LevelGraph([mo.Edge(top, left), mo.Edge(top, right)])


def shared_copies() -> mo.LevelGraph:
    a, b = named("a", "b", reads={"a": "low", "b": "low"})
    low = level("low", torch.ones(2), lambda s, _: (s.low() * s.a() * s.b()).sum(), copies=2)
    return mo.LevelGraph([mo.Edge(a, low), mo.Edge(b, low)])


def look_ahead_in_the_middle() -> mo.LevelGraph:
    top, mid, low = named("top", "mid", "low", reads={"top": "mid", "mid": "top low", "low": "mid"})
    return mo.LevelGraph([mo.Edge(top, mid), mo.Edge(mid, low, look_ahead=True)])


def optimizer_of_a_level_beside() -> mo.LevelGraph:
    lr = SGD(nn.Parameter(torch.tensor(0.1)))
    rate = mo.Level("rate", lr, lambda s, _: s.left().sum(), SGD(0.1))
    left, right = (
        level("left", torch.ones(2), lambda s, _: s.left().sum(), optimizer=lr),
        level("right", torch.ones(2), lambda s, _: s.right().sum() * s.low().sum(), 0.1),
    )
    low = level("low", torch.ones(2), lambda s, _: (s.low() * s.right()).sum(), optimizer=lr)
    return mo.LevelGraph([mo.Edge(rate, left), mo.Edge(right, low)])


def optimizer_at_a_point() -> mo.LevelGraph:
    lr = SGD(nn.Parameter(torch.tensor(0.1)))
    rate = mo.Level("rate", lr, lambda s, _: s.low().sum(), SGD(0.1))
    low = level("low", torch.ones(2), lambda s, _: s.low().square().sum(), optimizer=lr)
    return mo.LevelGraph([mo.Edge(rate, low, differentiate=CG)])


def closure() -> mo.LevelGraph:
    model = nn.Linear(2, 1)
    return two(lower={"loss": lambda s, _: (s.low() * s.top()).sum() + model(torch.ones(2)).sum()})


def unused_bias() -> mo.LevelGraph:
    top = mo.Level(
        "top", nn.Linear(2, 2), lambda s, _: (s.low() @ s.top.params["weight"]).sum(), SGD(0.1)
    )
    low = level("low", torch.ones(2), lambda s, _: (s.low() @ s.top.params["weight"]).sum())
    return mo.LevelGraph([mo.Edge(top, low)])


X = [torch.ones(2)]
GRAPHS: dict[str, tuple[Callable[[], mo.LevelGraph], str]] = {
    "circle": (
        circle,
        r"must not form a circle, got . -> . -> . -> .\. Take one of these edges out",
    ),
    "no edges": (lambda: mo.LevelGraph([]), r"`edges` must hold at least one Edge, got none"),
    "twice": (
        lambda: mo.LevelGraph([edge := mo.Edge(*named("a", "b", reads={"b": "a"})), edge]),
        "Edge a -> b stands twice",
    ),
    "one name": (one_name, "Two levels have the name 'a'"),
    "one module": (one_module, r"levels 'a' and 'b' share a parameter of shape \(2,\)"),
    "unknown level": (
        lambda: two(lower={"loss": lambda s, _: (s.low() * s.tpo()).sum()}),
        r"level 'low': its loss reads `levels.tpo`, but no edge leads to a level of this name. The "
        r"graph has \['low', 'top'\]",
    ),
    "unrelated": (
        unrelated,
        r"level 'left': its loss reads 'right', which is neither above nor below "
        r"it.*Edge\(upper=right, lower=left\)",
    ),
    "no data": (
        lambda: two(lower={"loss": lambda s, batch: (s.low() * s.top()).sum() * batch[0]}),
        r"level 'low' has no data, and its loss fails on the batch None: .*Pass `data=`",
    ),
    "empty data": (lambda: two(lower={"data": []}), r"level 'low': `data` is empty"),
    "no response": (
        lambda: two(lower={"loss": lambda s, _: s.low().square().sum()}),
        r"Edge top -> low: the loss of 'low' does not depend on 'top', so there is no response",
    ),
    "detached": (
        lambda: two(lower={"loss": lambda s, _: (s.low() * s.top().detach()).sum()}),
        r"Edge top -> low: the loss of 'low' does not depend on 'top'",
    ),
    "unused": (
        lambda: two(upper={"loss": lambda s, _: torch.zeros(())}),
        r"Edge top -> low: the loss of 'top' does not depend on its parameter 'value'.*pass "
        r"`allow_unused=True`",
    ),
    "unused bias": (
        unused_bias,
        r"Edge top -> low: the loss of 'top' does not depend on its parameter 'bias'",
    ),
    "closure": (
        closure,
        r"level 'low': its loss reaches `model.bias` \(shape \(1,\)\), `model.weight` .* through "
        r"its closure",
    ),
    "vector": (
        lambda: two(lower={"loss": lambda s, _: s.low() * s.top()}),
        r"level 'low': the loss must return .* scalars, got for 'loss' a torch.float32 tensor of "
        r"shape \(2,\). Take the mean",
    ),
    "metric": (
        lambda: two(lower={"loss": lambda s, _: {"loss": (s.low() * s.top()).sum(), "count": 3}}),
        r"level 'low': the loss must return floating-point scalars, got for 'count' a int",
    ),
    "dict": (
        lambda: two(lower={"loss": lambda s, _: {"los": (s.low() * s.top()).sum()}}),
        r"level 'low': a loss that returns a dict must have the key \"loss\", got \['los'\]",
    ),
    "shapes": (
        lambda: two(lower={"value": torch.ones(1)}, start="upper"),
        r'Edge top -> low: start="upper" needs models with the same parameters, got .*\(2,\)\} '
        r"above and .*\(1,\)\} below",
    ),
    "two starts": (
        two_starts,
        r"Edge a -> low: start='restart' needs a lower level with one upper level, but there is "
        r"Edge b -> low too",
    ),
    "steps": (
        contradicting_steps,
        r"Edge (left|right) -> low: steps=\d contradicts the other edges, by which 'low' makes \S+ "
        r"steps for one of",
    ),
    "rules": (
        contradicting_rules,
        r"Edge right -> low: `differentiate` must be that of Edge left -> low.*on the way from "
        r"'top' down to 'low'",
    ),
    "deep": (
        deep_sharing,
        r"Edge low -> deep: 'low' makes its steps inside those of 'mid', and so cannot share "
        r"'deep' with \['top'\]",
    ),
    "hidden": (
        hidden_response,
        r"level 'top': its loss reads 'low', which runs inside the steps of 'solved'. Implicit "
        r"there and Backprop for 'mid'",
    ),
    "copies": (
        mixed_copies,
        r"all levels inside a step of 'top' need the same `copies`, got \[2, 3\]",
    ),
    "shared copies": (
        shared_copies,
        r"Edge a -> low: a level with `copies` needs one upper level whose loss reads it",
    ),
    "look ahead": (
        look_ahead_in_the_middle,
        r"Edge mid -> low: look_ahead=True needs an upper level that is at the top",
    ),
    "optimizer beside": (
        optimizer_of_a_level_beside,
        r"level 'low': its optimizer's parameter 'lr' belongs to the level "
        r"'rate'.*Edge\(upper=rate, lower=low\)",
    ),
    "optimizer at a point": (
        optimizer_at_a_point,
        r"Edge rate -> low: 'rate' is the optimizer of 'low', which Implicit does not "
        r"differentiate",
    ),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_bad_graph_says_what_is_wrong_with_which_level(kind: str) -> None:
    build, message = GRAPHS[kind]
    with pytest.raises(ValueError, match=message):
        build()


LEVELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "name": (
        lambda: level("my level", 1.0, None),
        ValueError,
        r"Level: `name` must be an identifier, got 'my level'",
    ),
    "model": (
        lambda: mo.Level("a", "model", None, SGD(0.1)),
        TypeError,
        r"level 'a': `model` must be an nn.Module, got str",
    ),
    "optimizer": (
        lambda: mo.Level("a", (m := nn.Linear(1, 1)), None, torch.optim.SGD(m.parameters(), 0.1)),
        TypeError,
        r"level 'a': `optimizer` must be a metaopt Optimizer, got "
        r"torch.optim.sgd.SGD.*mo.from_torch",
    ),
    "frozen": (
        lambda: mo.Level("a", nn.Linear(1, 1).requires_grad_(False), abs, SGD(0.1)),
        ValueError,
        r"level 'a': the model has no trainable",
    ),
    "accumulate": (
        lambda: level("a", 1.0, abs, accumulate=0),
        ValueError,
        r"level 'a': `accumulate` must be a positive integer, got 0",
    ),
    "warmup": (
        lambda: level("a", 1.0, abs, warmup=1.5),
        ValueError,
        r"level 'a': `warmup` must be an integer of at least 0, got 1.5",
    ),
    "nowhere": (
        lambda: mo.Edge(level("a", 1.0, abs), None),
        TypeError,
        r"Edge: `lower` must be a Level, got None",
    ),
    "edge steps": (
        lambda: mo.Edge(*named("a", "b"), steps=0),
        ValueError,
        r"Edge a -> b: `steps` must be a positive integer, got 0",
    ),
    "start": (
        lambda: mo.Edge(*named("a", "b"), start="anew"),
        ValueError,
        r"Edge a -> b: `start` must be .* got 'anew'",
    ),
    "rule": (
        lambda: mo.Edge(*named("a", "b"), differentiate=mo.Implicit),
        TypeError,
        r"Edge a -> b: `differentiate` must be a rule",
    ),
    "look ahead": (
        lambda: mo.Edge(*named("a", "b"), look_ahead="SGD"),
        TypeError,
        r"Edge a -> b: `look_ahead` must be True, False, or the metaopt Optimizer of the virtual "
        r"steps, got 'SGD'",
    ),
    "loss": (
        lambda: level("a", 1.0, None),
        TypeError,
        r"level 'a': `loss` must be a function loss\(levels, batch\), got NoneType",
    ),
    "unused": (
        lambda: level("a", 1.0, abs, allow_unused="yes"),
        TypeError,
        r"level 'a': `allow_unused` must be True or False, got 'yes'",
    ),
    "precision": (
        lambda: level("a", 1.0, abs, precision=torch.int8),
        TypeError,
        r"level 'a': `precision` must be a floating-point dtype or None, got torch.int8",
    ),
    "loss scale": (
        lambda: level("a", 1.0, abs, precision=torch.float16, loss_scale=1000),
        ValueError,
        r"level 'a': `loss_scale` must be a power of two, got 1000: .* Write 1024.0\.",
    ),
    "no loss scale": (
        lambda: level("a", 1.0, abs, precision=torch.float16, loss_scale=0),
        ValueError,
        r"level 'a': `loss_scale` must be a positive number, got 0\.",
    ),
    "loss scale elsewhere": (
        lambda: level("a", 1.0, abs, precision=torch.bfloat16, loss_scale=8.0),
        ValueError,
        r"`loss_scale` is for `precision=torch.float16`, got it with torch.bfloat16",
    ),
    "one edge": (
        lambda: mo.LevelGraph(mo.Edge(*named("a", "b"))),
        TypeError,
        r"`edges` must be a list of Edge, got one Edge a -> b. Write LevelGraph\(\[edge\]\)",
    ),
    "an array": (
        lambda: two(lower={"data": torch.ones(3, 2).numpy()}),
        TypeError,
        r"level 'low': `data` must be an iterable of batches, got a ndarray, which looks like one "
        r"batch",
    ),
    "no edge": (
        lambda: mo.LevelGraph(named("a", "b")),
        TypeError,
        r"`edges` must be a list of Edge, got a Level in it",
    ),
    "one batch": (
        lambda: two(lower={"data": (torch.ones(2), torch.ones(2))}),
        TypeError,
        r"level 'low': `data` must be an iterable of batches, got a tuple, which looks like one "
        r"batch.*`data=\[batch\]`",
    ),
    "no iterable": (
        lambda: two(lower={"data": 3}),
        TypeError,
        r"level 'low': `data` must be an iterable of batches or None, got int",
    ),
    "words": (
        lambda: two(lower={"data": [("a", "b")]}),
        TypeError,
        r"level 'low': a batch must be a tree of tensors, got leaves of type \['str'\]",
    ),
}


@pytest.mark.parametrize("kind", LEVELS)
def test_a_bad_part_says_what_is_wrong(kind: str) -> None:
    build, error, message = LEVELS[kind]
    with pytest.raises(error, match=message):
        build()


def test_data_that_ends() -> None:
    """A generator cannot begin again.

    Batches of one step of the level above must have one shape.
    """
    once = two(
        lower={
            "data": (x for x in [torch.ones(2)] * 3),
            "loss": lambda s, x: ((s.low() - s.top() * x) ** 2).sum(),
        },
        steps=2,
    )
    once.step()
    with pytest.raises(
        ValueError,
        match=r"level 'low': `data` ended after 3 batches and cannot begin again: it is an "
        r"iterator",
    ):
        once.step()
    ragged = two(
        lower={
            "data": [torch.ones(2, 2), torch.ones(1, 2)],
            "loss": lambda s, x: ((s.low() - s.top() * x) ** 2).sum(),
        },
        steps=2,
    )
    with pytest.raises(
        ValueError,
        match=r"level 'low': the 2 batches of one step of the level above must have the "
        r"same.*`drop_last=True`",
    ):
        ragged.step()


def test_what_a_loss_reads_must_not_change() -> None:
    """And what it depends on neither.

    A derivative that was there and no longer arrives is an error, not zeros.
    """
    flag = [False]

    def loss(levels: Any, _: Any) -> Tensor:
        return (levels.low() * levels.top()).sum() if flag[0] else levels.top().sum()

    graph = two(upper={"loss": loss})
    flag[0] = True
    with pytest.raises(
        ValueError,
        match=r"level 'top': its loss reads `levels.low` now, but did not when the graph was built",
    ):
        graph.step()
    for after in (lambda s: torch.ones(()), lambda s: torch.ones((), requires_grad=True) * 2):
        flag[0] = False
        changed = two(
            upper={
                "loss": lambda s, _, after=after: after(s) if flag[0] else (s.low() * s.top()).sum()
            }
        )
        flag[0] = True
        with pytest.raises(
            ValueError,
            match=r"level 'top': no derivative arrives at its parameter 'value'.*pass "
            r"`allow_unused=True`",
        ):
            changed.step()


def test_allow_unused_gives_zeros() -> None:
    top = mo.Level(
        "top",
        nn.Linear(2, 2),
        lambda s, _: (s.low() @ s.top.params["weight"]).sum(),
        SGD(0.1),
        allow_unused=True,
    )
    low = level("low", torch.ones(2), lambda s, _: (s.low() @ s.top.params["weight"]).sum())
    grads = mo.LevelGraph([mo.Edge(top, low)]).hypergradient("top")
    assert grads["bias"].abs().max() == 0 < grads["weight"].abs().max()


def test_a_hypergradient_of_no_level() -> None:
    with pytest.raises(ValueError, match=r"`level` must be one of \['top', 'low'\], got 'weights'"):
        two().hypergradient("weights")
    with pytest.raises(
        ValueError, match=r"level 'low' has `copies`, each with a gradient of its own"
    ):
        two(lower={"copies": 2}).hypergradient("low")


@pytest.mark.parametrize("rule", [BACKPROP, mo.Backprop(memory="steps"), CG], ids=str)
@pytest.mark.parametrize("bad", ["top", "mid", "low"])
def test_a_loss_that_is_not_finite_names_level_and_step(bad: str, rule: Any) -> None:
    data = {name: [torch.ones(2)] * 5 for name in ("top", "mid", "low")}
    data[bad] = [torch.ones(2)] * 3 + [torch.full((2,), torch.inf)] * 2
    losses = {
        "top": lambda s, x: ((s.mid() - x) ** 2).sum(),
        "mid": lambda s, x: (
            (s.mid() - s.top()) ** 2 + 0.1 * s.low() ** 2 + (s.mid() - x) ** 2
        ).sum(),
        "low": lambda s, x: ((s.low() - s.mid() * x) ** 2).sum(),
    }
    top, mid, low = [
        level(name, torch.ones(2), loss, data=data[name]) for name, loss in losses.items()
    ]
    graph = mo.LevelGraph(
        [mo.Edge(top, mid, differentiate=rule), mo.Edge(mid, low, differentiate=rule)]
    )
    for _ in range(3):
        graph.step()
    with pytest.raises(mo.NonFiniteError, match=rf"level '{bad}', step 3: the loss is (inf|nan)"):
        graph.step()


def test_steps_are_counted_on_after_a_state_is_loaded() -> None:
    data = [torch.tensor(x) for x in (1.0, 1.0, 1.0, torch.nan)]

    def graph() -> mo.LevelGraph:
        low = level(
            "low", torch.ones(2), lambda s, x: ((s.low() - s.top()) ** 2).sum() + x, data=data
        )
        top = level(
            "top", torch.ones(2), lambda s, _: ((s.low() - 3) ** 2).sum(), data=[torch.zeros(2)]
        )
        return mo.LevelGraph([mo.Edge(top, low, differentiate=mo.FiniteDifference())])

    one, other = graph(), graph()
    for _ in range(2):
        one.step()
    other.load_state_dict(one.state_dict())
    other.step()
    with pytest.raises(mo.NonFiniteError, match="level 'low', step 3: the loss is nan"):
        other.step()


def test_where_derivatives_would_be_lost_it_is_refused() -> None:
    graph = two()
    for method in (graph.step, lambda: graph.hypergradient("top")):
        with (
            torch.inference_mode(),
            pytest.raises(ValueError, match=r"inside torch.inference_mode\(\).*Call it outside"),
        ):
            method()
        with pytest.raises(ValueError, match=r"inside a transform of torch.func.*Call it outside"):
            torch.func.vmap(lambda x, method=method: (method(), x)[1])(torch.ones(2))
    graph.step()


def test_the_first_loss_that_is_not_finite_is_named_though_later_ones_are() -> None:
    """With a derivative of zero the level goes on as if nothing had happened."""
    data = [torch.tensor(x) for x in (1.0, torch.inf, 1.0, 1.0)]
    low = level("low", torch.ones(2), lambda s, x: ((s.low() - s.top()) ** 2).sum() + x, data=data)
    top = level(
        "top", torch.ones(2), lambda s, _: ((s.low() - 3) ** 2).sum(), data=[torch.zeros(2)]
    )
    with pytest.raises(mo.NonFiniteError, match="level 'low', step 1: the loss is inf"):
        mo.LevelGraph([mo.Edge(top, low, steps=4)]).step()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_compiled_step_sees_it_too(bad: float) -> None:
    """A compiler must not take 0 times the loss for 0."""
    data = [torch.tensor(x) for x in (1.0, bad, 1.0)]
    low = level("low", torch.ones(2), lambda s, x: ((s.low() - s.top()) ** 2).sum() + x, data=data)
    top = level(
        "top", torch.ones(2), lambda s, _: ((s.low() - 3) ** 2).sum(), data=[torch.zeros(2)]
    )
    graph = mo.LevelGraph(
        [mo.Edge(top, low, steps=3, differentiate=mo.FiniteDifference())], compile=True
    )
    with pytest.raises(mo.NonFiniteError, match=f"level 'low', step 1: the loss is {bad}"):
        graph.step()


STATES: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (
        lambda: [],
        r"a state must have the parts \['data', 'draws', 'initial', 'levels', 'steps'\], got a "
        r"list",
    ),
    "a part": (lambda: {"levels": {}}, r"a state must have the parts .*, got \['levels'\]"),
    "another optimizer": (
        lambda: two(lower={"optimizer": Adam(0.1)}).state_dict(),
        r"the state is that of another graph. At levels\['top'\].*\['optimizer'\].* where this "
        r"graph has nothing",
    ),
    "another shape": (
        lambda: two(lower={"value": torch.ones(3)}, upper={"value": torch.ones(3)}).state_dict(),
        r"it has a torch.float\d+ of shape \(3,\), where this graph has a torch.float\d+ of shape "
        r"\(2,\)",
    ),
    "another level": (
        lambda: mo.LevelGraph(
            [mo.Edge(*named("top", "other", reads={"top": "other", "other": "top"}))]
        ).state_dict(),
        r"At levels\['top'\]\['below'\]\['low'\].* it has nothing, where this graph has a torch",
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_of_another_graph_is_refused_and_nothing_is_changed(kind: str) -> None:
    make, message = STATES[kind]
    graph = two(upper={"data": None})
    graph.step()
    before = graph.params("top")["value"].clone()
    with pytest.raises(ValueError, match=message):
        graph.load_state_dict(make())
    assert torch.equal(graph.params("top")["value"], before)
    graph.load_state_dict(graph.state_dict())


def test_a_gradient_that_is_not_finite_is_named_before_it_spoils_the_parameters() -> None:
    """The loss is finite where the square root has no derivative."""
    graph = two(
        upper={"loss": lambda s, _: (s.top() - s.top().detach()).sqrt().sum() + s.low().sum()}
    )
    before = graph.params("top")["value"].clone()
    with pytest.raises(
        mo.NonFiniteError, match=r"level 'top', step 0: the gradient norm is (inf|nan)"
    ):
        graph.step()
    assert torch.equal(graph.params("top")["value"], before)
