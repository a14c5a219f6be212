"""Gradients of a task loss, averaged over a batch of tasks."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from metaopt import tree
from metaopt._functional import Functional, Params, functional, lend
from metaopt.autodiff.gradient import gradient
from metaopt.autodiff.graph import VARIABLES
from metaopt.autodiff.plain import Recording, begin_at
from metaopt.autodiff.replay import drawn_again
from metaopt.batching import prefers_loop
from metaopt.checks import check_differentiable, check_finite, check_scalar
from metaopt.closure import find_hidden, find_leaves, name_tracked
from metaopt.compiled import compile_whole
from metaopt.distributed import (
    Ranks,
    check_agreement,
    copy_to_ranks,
    current_ranks,
    gather_rows,
    sum_over_ranks,
    work_alone,
)
from metaopt.exact_ops import any_order
from metaopt.inner_problem import as_tensor
from metaopt.torch_internals import is_autograd_excluded
from metaopt.transforms import is_tracked, values_are_readable
from metaopt.tree import Tree


class _Variables(NamedTuple):
    """What is differentiated: `params`, and the parameters of what is learned beside."""

    params: Tree
    learned: Params


SEED_ALIKE = (
    "Every rank makes the same models and draws the same tasks, of which it then takes its part: "
    "use the same seeds on all of them."
)

_Differentiated = tuple[_Variables, Tensor, Tree]  # mean gradients, losses [n], aux [n, ...]


def meta_grad(
    task_loss: Callable[[Tree, Tree], Any],
    *,
    learn: nn.Module | None = None,
    has_aux: bool = False,
    compile: bool = False,
    chunk_size: int | None = None,
) -> MetaGradient:
    """Return a function that computes g = 1/n sum_i grad_w L(w; task_i).

    Each task is differentiated by itself and the gradients are averaged: torch's derivative of an
    average over `vmap` is silently wrong for fused norm layers (see `any_order`, which also holds
    here).

    Args:
        task_loss: `task_loss(params, task)` returns a scalar; usually it calls `minimize`.
        learn: what else is learned: a module that `task_loss` uses, such as an optimizer with
            parameters, a schedule or a loss, or several in an `nn.ModuleDict`. All of its
            parameters that require grad are differentiated.
        has_aux: `task_loss` returns (a scalar, aux), with a tree of tensors.
        compile: compile the whole meta-gradient; see `compile_whole`. For small networks and few
            steps, which are all unrolled at compile time. Otherwise let `task_loss` call
            `minimize(..., compile=True)`, with `chunk_size=1`: five steps of a convolution network
            then took half a minute to compile, not three, and ran faster.
        chunk_size: number of tasks that are batched by `vmap` at a time; 1 means a plain loop over
            tasks. By default all of them, or one if the first call meets something that cannot be
            batched, which a warning then names, or, on a CPU, a convolution or more than 2^18
            parameters: see `prefers_loop`.

    Returns:
        `meta_gradient(params, tasks) -> (grads, losses [n])`, or with `has_aux` `(grads, losses,
        aux)`. Every leaf of `tasks` has the leading axis n; or `tasks` is a list of tasks, whose
        shapes may differ, and which are differentiated one by one (aux is then stacked, or a list
        if its shapes differ). With `learn`, `grads` is a pair: those of `params`, and those of the
        module's parameters by name. All is detached at the top level; to differentiate it again,
        call it inside `torch.func.grad`. Inside of `join_ranks`, where every rank is given the
        same `tasks`, each differentiates its part of them; what is returned is of all.

    Raises:
        TypeError: `learn` is not a module, or `chunk_size` not an integer.
        ValueError: there are no tasks, or their leading axes differ. At the first call: the loss
            depends on a tensor that requires grad and is not differentiated here, which would be
            silently left out; or it does not depend on what is to be learned.
        NonFiniteError: a task's loss is not finite.

    Warns:
        RuntimeWarning: once, if tasks cannot be batched and `chunk_size` is None.

    Cost:
        `chunk_size` times the memory of one task, and as many copies of the parameters. The first
        call evaluates the loss of one task once more; of a list, that of each.
    """
    return MetaGradient(
        task_loss, learn=learn, has_aux=has_aux, compile=compile, chunk_size=chunk_size
    )


class MetaGradient:
    """A function (params, tasks) -> (grads, losses); made by `meta_grad`."""

    def __init__(
        self,
        task_loss: Callable[[Tree, Tree], Any],
        *,
        learn: nn.Module | None,
        has_aux: bool,
        compile: bool,
        chunk_size: int | None,
    ):
        _check_chunk_size(chunk_size)
        if learn is not None and not isinstance(learn, nn.Module):
            raise TypeError(
                f"`learn` must be an nn.Module, got a {type(learn).__name__}. For several modules: "
                "`learn=nn.ModuleDict({'inner': optimizer, 'loss': loss})`."
            )
        self.task_loss, self.has_aux, self.chunk_size = task_loss, has_aux, chunk_size
        self.learned: Functional | None = None if learn is None else functional(learn)
        if self.learned is not None and not self.learned.params:
            raise ValueError(
                f"`learn` must have a parameter that requires grad, got a {type(learn).__name__} "
                "without."
            )
        self._one = compile_whole(self._differentiate) if compile else self._differentiate
        self._many = (
            compile_whole(self._differentiate_batch) if compile else self._differentiate_batch
        )
        self._loops: bool | None = None  # what the first call found to be faster, or possible
        self._is_checked = False

    def __call__(self, params: Tree, tasks: Tree) -> Any:
        """Return (grads, losses [n]), and aux if there is any."""
        if isinstance(params, nn.Module | Functional):
            raise TypeError(
                f"`params` must be a tree of tensors, got a {type(params).__name__}. Pass "
                "`net.params`."
            )
        count = _count_listed(tasks) if isinstance(tasks, list) else _count(tasks)
        ranks = current_ranks()
        part = ranks.share(count, "tasks")
        variables = _Variables(params, {} if self.learned is None else self.learned.params)
        # Where plain autograd stands in for a transform around this, it is not the outermost one.
        outermost = values_are_readable() and not VARIABLES.get()
        if outermost:
            self._check(variables, tasks)
            variables = tree.map(torch.Tensor.detach, variables)
        # Without gradients at the top level, autograd would record the whole computation once more.
        with torch.set_grad_enabled(not outermost):
            if not ranks.are_many:
                total, all_losses, all_aux = self._average(variables, tasks, count)
            else:
                own = tasks[part] if isinstance(tasks, list) else ranks.own(tasks)
                total, all_losses, all_aux = self._average_own(variables, own, count, ranks)
        if outermost:
            check_finite(all_losses, "meta_grad", unit="task")
        found = total.params if self.learned is None else tuple(total)
        return (found, all_losses, all_aux) if self.has_aux else (found, all_losses)

    def _average(self, variables: _Variables, tasks: Tree, count: int) -> _Differentiated:
        """Return (1/count of the sum of the gradients, losses, aux) of some tasks."""
        total, losses, aux = None, [], []
        for grads, loss, more in self._differentiate_parts(variables, tasks):
            total = _add(total, grads, len(loss) / count)
            losses.append(loss)
            aux.append(more)
        assert total is not None  # there is a task
        return total, losses[0] if len(losses) == 1 else torch.cat(losses), _join(aux)

    def _average_own(
        self, variables: _Variables, tasks: Tree, count: int, ranks: Ranks
    ) -> _Differentiated:
        """Return what `_average` does for the tasks of all ranks, of which these are one's own."""
        variables = copy_to_ranks(variables, ranks)
        with work_alone():
            own, losses, aux = self._average(variables, tasks, count)
        if isinstance(aux, list):
            raise ValueError(
                "meta_grad: aux of different shapes cannot be gathered from several ranks. Let "
                "`task_loss` return the same shapes for every task, or no aux."
            )
        total = sum_over_ranks(own, ranks)
        return total, *gather_rows((losses, aux), count, ranks)

    def _check(self, variables: _Variables, tasks: Tree) -> None:
        """Raise at the first call if derivatives would be left out."""
        if self._is_checked or is_autograd_excluded():
            return
        check_differentiable(None, "params", tree.named_leaves(variables.params))
        given = {"params": variables, "tasks": tasks}
        check_agreement("meta_grad", given, current_ranks(), SEED_ALIKE)
        some = tasks if isinstance(tasks, list) else [tree.index(tasks, 0)]
        _check_dependence(self.task_loss, self._value, variables, some)
        self._is_checked = True

    def _differentiate_parts(self, variables: _Variables, tasks: Tree) -> Iterator[_Differentiated]:
        """Differentiate some tasks after the other; those in a list, and in chunks of 1, singly."""
        listed = isinstance(tasks, list)
        count = len(tasks) if listed else len(tree.leaves(tasks)[0])
        chunk = 1 if listed else self._chunk(variables, tasks, count)
        for start in range(0, count, chunk):
            if chunk == 1:
                task = tasks[start] if listed else tree.index(tasks, start)
                yield self._one(variables, task)
                continue
            some = tasks if chunk >= count else tree.index(tasks, slice(start, start + chunk))
            try:
                yield self._many(variables, some)
            except Exception as error:
                error.add_note(
                    "meta_grad: tasks were batched by vmap. With `chunk_size=1` they are gone "
                    "through one by one."
                )
                raise

    def _chunk(self, variables: _Variables, tasks: Tree, count: int) -> int:
        """Return the number of tasks to batch; the first call finds out what is better."""
        if self.chunk_size is not None:
            return int(self.chunk_size)
        if self._loops is None and count > 1 and not torch.compiler.is_compiling():
            two = tree.index(tasks, slice(2))
            self._loops = _is_better_in_a_loop(
                self._differentiate, self._differentiate_batch, variables, two
            )
        return 1 if self._loops else count

    # One task, or a batch of them. The context is entered inside, for a compiled function then has
    # it only while it is traced.

    def _differentiate(self, variables: _Variables, task: Tree) -> _Differentiated:
        with any_order():
            grads, loss, aux = gradient(lambda at: self._value(at, task), variables)
        return grads, loss[None], tree.map(lambda leaf: leaf[None], aux)

    def _differentiate_batch(self, variables: _Variables, tasks: Tree) -> _Differentiated:
        # vmap has no channels-last layout; `contiguous()` would leave a weight with one channel as
        # it is.
        variables = tree.map(
            lambda leaf: leaf.clone(memory_format=torch.contiguous_format), variables
        )

        # Lists, which each transform takes apart again.
        def value(values: list[Tensor], row: list[Tensor]) -> tuple[Tensor, Tree]:
            return self._value(tree.with_leaves(variables, values), tree.with_leaves(tasks, row))

        with any_order():
            per_task = vmap(
                grad_and_value(value, has_aux=True), in_dims=(None, 0), randomness="different"
            )
            grads, (losses, aux) = per_task(tree.leaves(variables), tree.leaves(tasks))
        return tree.with_leaves(variables, [grad.mean(0) for grad in grads]), losses, aux

    def _value(self, variables: _Variables, task: Tree) -> tuple[Tensor, Tree]:
        """Return (loss, aux) of a task."""
        params, learned = variables
        if self.learned is None:
            result = self.task_loss(params, task)
        else:
            result = lend(self.learned.model, learned, self.task_loss, params, task)
        if not self.has_aux:
            return check_scalar(result, "task_loss"), ()
        if type(result) is not tuple or len(result) != 2:
            raise ValueError(
                "`task_loss` must return (loss, aux) because of has_aux=True, got a "
                f"{type(result).__name__}. Return both, or leave `has_aux` out."
            )
        loss = check_scalar(result[0], "task_loss")
        return loss, tree.map(lambda leaf: as_tensor(leaf, "task_loss", loss), result[1])


def _is_better_in_a_loop(
    one: Callable[[_Variables, Tree], _Differentiated],
    many: Callable[[_Variables, Tree], _Differentiated],
    variables: _Variables,
    two: Tree,
) -> bool:
    """Return True if tasks cannot be batched, or not faster; of the former warn.

    Args:
        one: differentiates one task.
        many: differentiates a batch of tasks.
        variables: what is differentiated.
        two: a batch of two tasks.
    """
    leaves = tree.leaves(variables)
    try:
        if prefers_loop(many, variables, two):
            return True
        if not all(leaf.is_cpu for leaf in leaves):
            many(variables, two)  # on a CPU that was tried just now
        return False
    except Exception as error:
        with drawn_again(leaves):
            # If the loss is wrong by itself, that is what to say.
            one(variables, tree.index(two, 0))
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            "meta_grad: these tasks cannot be batched by vmap, so they are gone through one by "
            f"one. The reason: {reason} Pass `chunk_size=1` if that is all right.",
            RuntimeWarning,
            stacklevel=5,
        )
        return True


def _check_dependence(
    task_loss: Any,
    value: Callable[[_Variables, Tree], tuple[Tensor, Tree]],
    variables: _Variables,
    tasks: Sequence[Tree],
) -> None:
    """Raise if the loss depends on less, or on more, than what is differentiated.

    Args:
        task_loss: the user's function, searched for the names of tensors.
        value: returns the loss of a task, which is evaluated to see what it depends on.
        variables: what is differentiated.
        tasks: those to evaluate.
    """
    leaves = tree.leaves(variables)

    def evaluate(task: Tree) -> tuple[list[Tensor], Tensor]:
        at = begin_at(leaves, again=False)
        with drawn_again(leaves), any_order(), Recording(at):
            return at, value(tree.with_leaves(variables, at), task)[0]

    reached: set[int] = set()
    for task in tasks:
        at, loss = evaluate(task)
        if not is_tracked(loss):
            raise ValueError(
                "`task_loss` must depend on `params`, but its gradient would be zero: nothing "
                "that it computes from them reaches the loss. Call the model as `net(params, "
                "x)`; detach nothing on the way."
            )

        def again(task: Tree = task) -> list[Tensor]:
            return [evaluate(task)[1]]

        if find_hidden([loss], again, at) is not None:
            raise ValueError(
                f"`task_loss` depends on {name_tracked(task_loss, loss)}, which requires grad but "
                "is not differentiated here. To learn it, pass the module that it belongs to: "
                "`meta_grad(task_loss, learn=module)`. Otherwise detach it, or call "
                "`requires_grad_(False)`."
            )
        below = {id(leaf) for leaf in find_leaves(loss)}
        reached |= {place for place, leaf in enumerate(at) if id(leaf) in below}
    first = len(leaves) - len(variables.learned)
    unused = [name for place, name in enumerate(variables.learned, first) if place not in reached]
    if unused:
        raise ValueError(
            f"`task_loss` must depend on all that is learned, but does not on {unused} of "
            "`learn`. Use it, or call `requires_grad_(False)` on it. (A rule that looks at the end "
            "of a loop, such as `Implicit`, gives the optimizer no derivative.)"
        )


def assign_grads(model: nn.Module, grads: Params) -> None:
    """Write `grads` into the `.grad` of the model's parameters, for a `torch.optim` optimizer.

    Raises:
        ValueError: a name is not a parameter of the model, a trainable parameter is missing, or a
            shape differs.
    """
    trainable = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if trainable.keys() != grads.keys():
        missing, unknown = trainable.keys() - grads.keys(), grads.keys() - trainable.keys()
        raise ValueError(
            f"`grads` must name the model's trainable parameters; missing {sorted(missing)}, "
            f"unknown {sorted(unknown)}."
        )
    for name, parameter in trainable.items():
        if parameter.shape != grads[name].shape:
            raise ValueError(
                f"`grads[{name!r}]` must have shape {tuple(parameter.shape)}, got "
                f"{tuple(grads[name].shape)}."
            )
        parameter.grad = grads[name].detach().clone()


def _check_chunk_size(chunk_size: Any) -> None:
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, numbers.Integral):
        raise TypeError(f"`chunk_size` must be a positive integer or None, got {chunk_size!r}.")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be a positive integer or None, got {chunk_size}.")


def _add(total: _Variables | None, grads: _Variables, share: float) -> _Variables:
    """Return total + share grads, where None is zero."""
    if total is not None:
        grads = tree.map(lambda total, g: tree.scaled_sum(total, share, g), total, grads)
    elif share != 1:
        grads = tree.map(lambda g: share * g, grads)
    return grads


def _join(parts: list[Tree]) -> Tree:
    """Return the aux of all tasks, stacked; a list of them if their structures or shapes differ."""
    if len(parts) == 1:
        return parts[0]
    kinds = []
    for part in parts:
        leaves, structure = tree.flatten(part)
        kinds.append((structure, [leaf.shape[1:] for leaf in leaves]))
    if any(kind != kinds[0] for kind in kinds):
        return [tree.index(part, 0) for part in parts]
    return tree.map(lambda *leaves: torch.cat(leaves), *parts)


def _count(tasks: Tree) -> int:
    axes = tree.leading_axes(tasks)
    lengths = set(axes.values())
    if len(lengths) != 1 or min(lengths) < 1:
        raise ValueError(
            "Every leaf of `tasks` must have the number of tasks (at least 1) as its leading axis, "
            f"got {axes} (-1: none). Stack the tasks first, or pass them as a list."
        )
    return lengths.pop()


def _count_listed(tasks: list[Tree]) -> int:
    if not tasks:
        raise ValueError("`tasks` must hold at least one task, got an empty list.")
    if all(isinstance(task, Tensor) for task in tasks):
        raise ValueError(
            f"`tasks` must be a list of tasks, such as [(x, y), (x, y)], got {len(tasks)} bare "
            "tensors. For stacked tasks pass a tuple, `tuple(tasks)`."
        )
    return len(tasks)
