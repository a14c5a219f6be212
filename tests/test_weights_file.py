"""Saving and loading of weights: round trips, and files that are wrong or hostile."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import assert_close
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import metaopt as mo
from metaopt import tree
from metaopt.optimizer.hyperparameter import set_hyperparameter
from metaopt.optimizer.module import FORMAT, Configurable, known_classes
from optimizers import (
    SGD,
    Adam,
    AdamW,
    Grouped,
    LSTMOptimizer,
    LSTMSchedule,
    PerParameter,
    RMSprop,
    Rprop,
)


class Decay(mo.Schedule):
    """rate / (1 + slope t), with a learned rate and a slope that may be a schedule itself."""

    def __init__(
        self,
        rate: Any,
        slope: Any = 0.0,
        *,
        name: str = "decay",
        enabled: bool = True,
        note: str | None = None,
    ):
        super().__init__()
        set_hyperparameter(self, "rate", rate)
        set_hyperparameter(self, "slope", slope)
        self.name, self.enabled, self.note = name, enabled, note

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Any, Any]:
        slope = (
            self.slope(state, step=step, loss=loss, grads=grads)[0]
            if isinstance(self.slope, mo.Schedule)
            else self.slope
        )
        return self.rate / (1 + slope * step), state


OPTIMIZERS = {
    "numbers": lambda: SGD(0.1, 0.9, weight_decay=0.01, nesterov=True),
    "parameter": lambda: SGD(lr=nn.Parameter(torch.tensor(0.125))),
    "tensor": lambda: SGD(lr=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)),
    "betas": lambda: Adam(1e-3, (nn.Parameter(torch.tensor(0.85)), 0.99), eps=1e-6),
    "adamw": lambda: AdamW(weight_decay=nn.Parameter(torch.tensor(0.3))),
    "rmsprop": lambda: RMSprop(0.02, momentum=torch.tensor(0.5), centered=True),
    "schedule": lambda: SGD(lr=Decay(nn.Parameter(torch.tensor(0.5)), 0.1, name="käse", note=None)),
    "nested": lambda: Adam(
        lr=Decay(nn.Parameter(torch.tensor(0.5)), Decay(torch.tensor(0.2), enabled=False))
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_loaded_is_what_was_saved(kind: str, tmp_path: Path) -> None:
    optimizer = OPTIMIZERS[kind]()
    path = tmp_path / "new folder" / "weights.safetensors"
    optimizer.save(path)
    torch.manual_seed(7)
    random = torch.get_rng_state()
    loaded = mo.Optimizer.load(path)
    assert torch.equal(random, torch.get_rng_state()), "loading must not draw random numbers"
    assert type(loaded) is type(optimizer)
    assert loaded.config() == optimizer.config()
    for (name, own), (other_name, other) in zip(
        loaded.state_dict().items(), optimizer.state_dict().items(), strict=True
    ):
        assert (name, own.dtype, own.requires_grad) == (
            other_name,
            other.dtype,
            other.requires_grad,
        )
        assert torch.equal(own, other)
    assert [(n, p.requires_grad) for n, p in loaded.named_parameters()] == [
        (n, p.requires_grad) for n, p in optimizer.named_parameters()
    ]
    start, target = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    runs = [
        mo.minimize(lambda w, _: (w - target).square().sum(), o, start, None, steps=3).params
        for o in (optimizer, loaded)
    ]
    assert_close(*runs, 0)


def test_precision_and_non_contiguous_tensors_survive(tmp_path: Path) -> None:
    lr = torch.arange(6.0).reshape(2, 3).t()
    optimizer = SGD(lr=nn.Parameter(lr)).double()
    assert not optimizer.lr.is_contiguous()
    optimizer.save(tmp_path / "w")
    loaded = SGD.load(tmp_path / "w")
    assert loaded.lr.dtype == torch.float64
    assert torch.equal(loaded.lr, lr.double())
    loaded.save(tmp_path / "w")  # over itself
    assert torch.equal(SGD.load(str(tmp_path / "w")).lr, lr.double())


def test_the_header_is_plain_json(tmp_path: Path) -> None:
    SGD(lr=Decay(nn.Parameter(torch.tensor(0.5)))).save(tmp_path / "w")
    with safe_open(tmp_path / "w", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT
    assert json.loads(metadata["config"])["arguments"]["lr"]["class"] == "Decay"


def write(
    path: Path, config: Any, tensors: dict[str, Tensor] | None = None, **metadata: str
) -> Path:
    """Write a weights file by hand, as a stranger could."""
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(tensors or {}, path, metadata={"format": FORMAT, "config": text} | metadata)
    return path


SGD_CONFIG = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            {"class": "Popen", "arguments": {"args": ["true"]}},
            {},
            r"names the class 'Popen', which is not known; known are \[",
        ),
        (
            {"class": "nn.Linear", "arguments": {}},
            {},
            r"names the class 'nn.Linear', which is not known",
        ),
        ({"class": ["SGD"], "arguments": {}}, {}, r"nothing can be built: "),
        (
            {
                "class": "SGD",
                "arguments": SGD_CONFIG | {"lr": {"class": "os.system", "arguments": {}}},
            },
            {},
            r"names the class 'os.system'",
        ),
        (
            {"class": "SGD", "arguments": {"no_such": 1.0}},
            {},
            r"nothing can be built: .*unexpected keyword argument 'no_such'",
        ),
        (
            {"class": "SGD", "arguments": {}},
            {},
            r"nothing can be built: .*missing 1 required positional argument: 'lr'",
        ),
        (
            {"class": "SGD", "arguments": SGD_CONFIG | {"lr": "0.1"}},
            {},
            r"nothing can be built: SGD: `lr` must be a number",
        ),
        (
            {"class": "SGD", "arguments": SGD_CONFIG | {"lr": -1.0}},
            {},
            r"nothing can be built: SGD: `lr` must lie in \[0.0, inf\], got -1.0",
        ),
        ({"class": "SGD", "arguments": [1, 2]}, {}, r"nothing can be built: "),
        (
            {"class": "SGD", "arguments": SGD_CONFIG | {"lr": {"parameter": [2], "dtype": "nn"}}},
            {},
            r"nothing can be built: ",
        ),
        (
            {
                "class": "SGD",
                "arguments": SGD_CONFIG | {"lr": {"parameter": [2], "dtype": "no_such"}},
            },
            {},
            r"nothing can be built: .*no_such",
        ),
        (
            {
                "class": "SGD",
                "arguments": SGD_CONFIG | {"lr": {"parameter": "many", "dtype": "float32"}},
            },
            {},
            r"nothing can be built: ",
        ),
        (
            {
                "class": "SGD",
                "arguments": SGD_CONFIG | {"lr": {"parameter": [-2], "dtype": "float32"}},
            },
            {},
            r"nothing can be built: ",
        ),
        (
            {"class": "SGD", "arguments": SGD_CONFIG | {"lr": {"parameter": [], "dtype": "int64"}}},
            {},
            r"nothing can be built: ",
        ),
        (
            {"class": "Adam", "arguments": {"betas": [0.9]}},
            {},
            r"nothing can be built: Adam: `betas` must be a pair",
        ),
        ("{", {}, r"nothing can be built: "),
        ("[" * 100_000, {}, r"nothing can be built: "),
        ("", {}, r"nothing can be built: "),
        ("3", {}, r"holds a int, not a Optimizer"),
        (
            {"class": "Decay", "arguments": {"rate": 0.1}},
            {},
            r"holds a Decay, not a Optimizer. Use `Decay.load`",
        ),
        (
            {
                "class": "SGD",
                "arguments": SGD_CONFIG | {"lr": {"parameter": [2], "dtype": "float32"}},
            },
            {},
            r"does not fit SGD: tensor 'lr' should be floating-point \(2,\), found absent",
        ),
        (
            {
                "class": "SGD",
                "arguments": SGD_CONFIG | {"lr": {"parameter": [2], "dtype": "float32"}},
            },
            {"lr": torch.ones(3)},
            r"does not fit SGD: tensor 'lr' should be floating-point \(2,\), found floating-point "
            r"\(3,\)",
        ),
        (
            {
                "class": "SGD",
                "arguments": SGD_CONFIG | {"lr": {"parameter": [2], "dtype": "float32"}},
            },
            {"lr": torch.ones(2, dtype=torch.int64)},
            r"does not fit SGD: tensor 'lr' should be floating-point \(2,\), found torch.int64 "
            r"\(2,\)",
        ),
        # Asks for 4 exabytes: an error about the tensor, at once, and no allocation.
        (
            {
                "class": "SGD",
                "arguments": SGD_CONFIG | {"lr": {"parameter": [10**9, 10**9], "dtype": "float32"}},
            },
            {"lr": torch.ones(2)},
            r"does not fit SGD: tensor 'lr' should be floating-point \(1000000000, 1000000000\), "
            r"found",
        ),
        (
            {"class": "SGD", "arguments": SGD_CONFIG},
            {"extra": torch.ones(2)},
            r"tensor 'extra' should be absent, found floating-point \(2,\)",
        ),
    ],
)
def test_a_wrong_or_hostile_file_is_a_clear_error(
    config: Any, tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        mo.Optimizer.load(write(tmp_path / "w.safetensors", config, tensors))


LSTM_CONFIG = {
    "class": "LSTMOptimizer",
    "arguments": {"hidden_size": 2, "scale": 0.1, "seed": 0},
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": {}}, r"LSTMOptimizer: `scale` must be a number, got \{\}. Write scale=0.1"),
        ({"scale": "0.1"}, r"LSTMOptimizer: `scale` must be a number, got '0.1'"),
        ({"seed": 0.5}, r"LSTMOptimizer: `seed` must be an integer of at least 0, got 0.5"),
        (
            {"hidden_size": True},
            r"LSTMOptimizer: `hidden_size` must be a positive integer, got True",
        ),
    ],
)
def test_every_argument_in_a_file_is_checked(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """`scale={}` was read, and crashed in use."""
    tensors = LSTMOptimizer(2).state_dict()
    assert isinstance(mo.Optimizer.load(write(tmp_path / "w", LSTM_CONFIG, tensors)), LSTMOptimizer)
    config = LSTM_CONFIG | {"arguments": LSTM_CONFIG["arguments"] | arguments}  # type: ignore[operator]
    with pytest.raises(ValueError, match=rf"nothing can be built: {message}"):
        mo.Optimizer.load(write(tmp_path / "w", config, tensors))


def test_a_word_for_a_truth_value_in_a_file(tmp_path: Path) -> None:
    """`amsgrad="no"` was taken for True."""
    Adam(0.1).save(tmp_path / "w")
    with safe_open(tmp_path / "w", "pt") as file:
        config = json.loads(file.metadata()["config"])
    config["arguments"]["amsgrad"] = "no"
    with pytest.raises(
        ValueError, match=r"nothing can be built: Adam: `amsgrad` must be True or False, got 'no'"
    ):
        Adam.load(write(tmp_path / "w", config))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite(value: float, tmp_path: Path) -> None:
    """They were read without a word, and all that they updated became nan."""
    optimizer = LSTMOptimizer(2)
    with torch.no_grad():
        optimizer.cells[1].bias[3] = value  # type: ignore[union-attr,operator,index]
    message = r"entries that are not finite in the tensor 'cells.1.bias'. They would spread"
    with pytest.raises(ValueError, match=rf"w has {message}"):
        mo.Optimizer.load(write(tmp_path / "w", LSTM_CONFIG, optimizer.state_dict()))
    with pytest.raises(
        ValueError,
        match=r"LSTMOptimizer: the tensor 'cells.1.bias' has entries that are not finite, so .* is "
        r"not",
    ):
        optimizer.save(tmp_path / "new" / "w")
    assert not (tmp_path / "new").exists()


def test_one_tensor_in_another_precision(tmp_path: Path) -> None:
    """It was read, and crashed in the first matrix product; a module converted as one is right."""
    tensors = LSTMOptimizer(2).state_dict()
    tensors["cells.1.weight"] = tensors["cells.1.weight"].double()
    with pytest.raises(
        ValueError,
        match=r"the tensor 'cells.1.weight' should be of torch.float32, as 'cells.0.bias', found "
        r"torch.float64",
    ):
        mo.Optimizer.load(write(tmp_path / "w", LSTM_CONFIG, tensors))
    LSTMOptimizer(2).double().save(tmp_path / "w")
    assert next(LSTMOptimizer.load(tmp_path / "w").parameters()).dtype == torch.float64
    Grouped({"a": LSTMOptimizer(2).double(), "*": LSTMOptimizer(2)}).save(tmp_path / "w")
    assert {p.dtype for p in Grouped.load(tmp_path / "w").parameters()} == {
        torch.float32,
        torch.float64,
    }
    config = {
        "class": "SGD",
        "arguments": SGD_CONFIG | {"lr": {"parameter": [], "dtype": "float64"}},
    }
    with pytest.raises(
        ValueError,
        match=r"'lr' should be of torch.float64, as its configuration says, found torch.float32",
    ):
        SGD.load(write(tmp_path / "w", config, {"lr": torch.tensor(0.1)}))


def test_a_tensor_that_its_class_refuses(tmp_path: Path) -> None:
    """Numbers of a configuration were checked, those in tensors not.

    A lower limit above 0 must not meet a placeholder's zeros.
    """
    config = {
        "class": "SGD",
        "arguments": SGD_CONFIG | {"lr": {"parameter": [], "dtype": "float32"}},
    }
    with pytest.raises(
        ValueError,
        match=r"has a tensor that its class refuses: SGD: `lr` must lie in \[0.0, inf\], got -1.0",
    ):
        SGD.load(write(tmp_path / "w", config, {"lr": torch.tensor(-1.0)}))
    by_name = SGD_CONFIG | {
        "lr": {
            "class": "ByName",
            "arguments": {"values": {"mapping": [["*", {"tensor": [], "dtype": "float32"}]]}},
        }
    }
    with pytest.raises(
        ValueError,
        match=r"has a tensor that its class refuses: ByName: `value0` must lie in .* got -1.0",
    ):
        SGD.load(
            write(
                tmp_path / "w",
                {"class": "SGD", "arguments": by_name},
                {"lr.value0": torch.tensor(-1.0)},
            )
        )
    Rprop(0.1, etas=(0.5, nn.Parameter(torch.tensor(1.5)))).save(tmp_path / "w")
    assert Rprop.load(tmp_path / "w").eta_plus == 1.5


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"No weights file at .*missing.safetensors. Give the path that `save` wrote",
    ):
        SGD.load(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match="No weights file at"):
        SGD.load(tmp_path)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(2)}, foreign)
    with pytest.raises(
        ValueError, match=r"has format None, expected 'metaopt-1'. Write it with `save`"
    ):
        SGD.load(foreign)
    with pytest.raises(ValueError, match=r"has format 'pt', expected 'metaopt-1'"):
        SGD.load(write(foreign, {}, format="pt"))
    pickled = tmp_path / "weights.pt"
    torch.save({"lr": torch.ones(2)}, pickled)
    with pytest.raises(ValueError, match=r"weights.pt is not a safetensors file"):
        SGD.load(pickled)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is not a safetensors file"):
        SGD.load(tmp_path / "empty")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w"
    Adam(lr=nn.Parameter(torch.rand(8))).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a safetensors file"):
            Adam.load(path)


def test_loading_the_wrong_class_names_the_right_one(tmp_path: Path) -> None:
    SGD(0.1).save(tmp_path / "w")
    with pytest.raises(ValueError, match=r"holds a SGD, not a Adam. Use `SGD.load`"):
        Adam.load(tmp_path / "w")
    assert isinstance(Configurable.load(tmp_path / "w"), SGD)
    AdamW(0.1).save(tmp_path / "w")
    assert type(Adam.load(tmp_path / "w")) is AdamW  # a subclass is one


def test_an_argument_that_json_cannot_hold_is_refused_when_saving(tmp_path: Path) -> None:
    decay = Decay(0.1)
    decay.note = {1.0}  # type: ignore[assignment]
    with pytest.raises(
        TypeError,
        match=r"A constructor argument of type set cannot be saved: \{1.0\}. Use numbers, tensors "
        r"or modules",
    ):
        SGD(lr=decay).save(tmp_path / "w")
    decay.note = torch.ones(2)  # type: ignore[assignment]
    with pytest.raises(
        TypeError,
        match=r"Decay: the tensor `note` is neither parameter nor buffer, so it would not be saved",
    ):
        SGD(lr=decay).save(tmp_path / "w")


def test_only_our_classes_are_known() -> None:
    known = known_classes()
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Decay"} <= known.keys()
    assert all(issubclass(kind, Configurable) for same in known.values() for kind in same)


def test_a_deployed_optimizer_comes_from_a_file(tmp_path: Path) -> None:
    SGD(lr=nn.Parameter(torch.tensor(0.5))).save(tmp_path / "w")
    w = nn.Parameter(torch.ones(2))
    deployed = SGD.load(tmp_path / "w").as_torch([w])
    w.grad = torch.ones(2)
    deployed.step()
    assert tree.map(torch.Tensor.tolist, w.detach()) == [0.5, 0.5]


class Waves(mo.Schedule):
    """Has a constant that is not saved."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count
        self.frequencies = torch.arange(count).float()

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Tensor, Any]:
        return self.frequencies.cos().sum(), state


def test_constants_that_are_not_saved_are_real_after_loading(tmp_path: Path) -> None:
    SGD(lr=Waves(3)).save(tmp_path / "w")
    optimizer = SGD.load(tmp_path / "w")
    w = torch.ones(2)
    updates, _ = optimizer(w, optimizer.init(w))
    assert torch.equal(updates, -torch.arange(3).float().cos().sum() * w)


def test_two_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    SGD(0.1).save(tmp_path / "w")
    twin = type("SGD", (mo.Optimizer,), {})
    with pytest.raises(
        ValueError,
        match=r"names the class 'SGD', which \[.*'metaopt.optimizers.sgd'.*\] define. Rename all "
        r"but one",
    ):
        SGD.load(tmp_path / "w")
    del twin
    gc.collect()
    assert isinstance(SGD.load(tmp_path / "w"), SGD)


def test_an_argument_that_is_no_attribute_is_named(tmp_path: Path) -> None:
    class Forgetful(mo.Schedule):
        def __init__(self, count: int):
            super().__init__()

    with pytest.raises(
        TypeError,
        match=r"Forgetful: every argument .* missing \['count'\]. Write self.count = count",
    ):
        Forgetful(3).config()


def test_the_file_is_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    SGD(0.1).save(tmp_path / "w")
    assert (tmp_path / "w").stat().st_mode == (tmp_path / "other").stat().st_mode


class TestPrinting:
    def test_numbers_and_what_is_learned(self) -> None:
        assert (
            repr(SGD(0.1, 0.9))
            == "SGD(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False)"
        )
        text = repr(Adam(nn.Parameter(torch.tensor(0.125)), (torch.tensor(0.85), 0.99)))
        assert text.startswith("Adam(lr=Parameter(0.125), betas=(tensor(0.85), 0.99), eps=1e-08")
        assert "lr=Parameter(shape=(5,), 0.1 to 0.5)" in repr(
            SGD(nn.Parameter(torch.arange(1.0, 6) / 10))
        )
        assert "lr=Parameter([0.1, 0.2])" in repr(SGD(nn.Parameter(torch.tensor([0.1, 0.2]))))
        assert "Decay(rate=Parameter(0.5), slope=0.1, name='decay', enabled=True)" in repr(
            SGD(Decay(nn.Parameter(torch.tensor(0.5)), 0.1))
        )
        assert "lr=tensor(shape=(2,))" in repr(SGD(torch.ones(2, device="meta")))
        assert "(value0): Decay(rate=0.1" in repr(SGD({"*": Decay(0.1)}))

    def test_values_by_names(self) -> None:
        rates = {"*.bias": nn.Parameter(torch.tensor(0.01)), "*": Decay(0.1)}
        assert (
            "(lr): ByName(\n    '*.bias': Parameter(0.01), '*': Decay\n    (value1): Decay("
            in repr(SGD(rates))
        )
        many = PerParameter({str(i): torch.ones(2) for i in range(9)}, 0.1)
        assert repr(many).startswith("PerParameter('0': Parameter([0.1, 0.1]), '1': ")
        assert repr(many).endswith("and 5 more)")

    def test_what_a_schedule_has_learned(self) -> None:
        schedule = LSTMSchedule(0.1)
        with torch.no_grad():
            schedule.log_initial += 1
        assert "log_initial=Parameter(-1.303)" in repr(SGD(schedule))

    def test_under_transforms_and_of_no_entries(self) -> None:
        seen = []

        def loss(lr: Tensor) -> Tensor:
            seen.append(repr(SGD(lr)))
            return lr.sum()

        torch.func.vmap(torch.func.grad(loss))(torch.ones(2))
        assert "lr=tensor(shape=())" in seen[0]
        assert "lr=tensor([])" in repr(SGD(torch.ones(0)))

    def test_an_optimizer_of_ones_own(self) -> None:
        """It raised a TypeError unless every argument of the constructor is an attribute.

        Here none is.
        """

        class MetaSGD(mo.Optimizer):
            def __init__(self, params: Any, rate: float, *more: Any, **options: Any):
                super().__init__()
                self.rates = nn.ParameterList([torch.full_like(p, rate) for p in params])
                self.gain = nn.Parameter(torch.tensor(2.0))

            def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Any) -> Any:
                return [-self.gain * r * g for r, g in zip(self.rates, grads, strict=True)], {}

        assert repr(MetaSGD([torch.ones(2)], 0.1, 1, word="x")).startswith(
            "MetaSGD(\n  gain=Parameter(2)\n  (rates): ParameterList("
        )
