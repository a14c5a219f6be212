"""Gradients of a task loss, averaged over a batch of tasks."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from metaopt import tree
from metaopt._functional import Functional, Params, functional, lent
from metaopt._minimize import check_finite
from metaopt.autodiff.gradient import gradient
from metaopt.autodiff.graph import VARIABLES
from metaopt.autodiff.plain import Recording, begin_at
from metaopt.batching import prefers_loop
from metaopt.closure import find_hidden, graph_leaves, tracked_names
from metaopt.compiled import compiled
from metaopt.exact_ops import any_order
from metaopt.inner_problem import as_tensor, check_scalar
from metaopt.transforms import is_differentiable, is_tracked, values_are_readable
from metaopt.tree import Tree


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
        compile: compile the whole meta-gradient; see `compiled`. For small networks and few steps,
            which are all unrolled at compile time. Otherwise let `task_loss` call `minimize(...,
            compile=True)`, with `chunk_size=1`: five steps of a convolution network then took half
            a minute to compile, not three, and ran faster.
        chunk_size: number of tasks that are batched by `vmap` at a time; 1 means a plain loop over
            tasks. By default all of them, or one if the first call meets something that cannot be
            batched, which a warning then names, or, on a CPU, a convolution or more than 2^18
            parameters: see `prefers_loop`.

    Returns:
        `meta_gradient(params, tasks) -> (grads, losses [n])`, or with `has_aux` `(grads, losses,
        aux)`. Every leaf of `tasks` has the leading axis n; or `tasks` is a list of tasks, whose
        shapes may differ, and which are gone through one by one (aux is then stacked, or a list if
        its shapes differ). With `learn`, `grads` is a pair: those of `params`, and those of the
        module's parameters by name. All is detached at the top level; to differentiate it again,
        call it inside `torch.func.grad`.

    Raises:
        TypeError: `learn` is no module, or `chunk_size` no integer.
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
                f"without."
            )
        self._one = compiled(self._differentiate) if compile else self._differentiate
        self._many = compiled(self._differentiate_batch) if compile else self._differentiate_batch
        self._loops: bool | None = None  # what the first call found to be faster, or possible
        self._is_checked = False

    def __call__(self, params: Tree, tasks: Tree) -> Any:
        """Return (grads, losses [n]), and aux if there is any."""
        if isinstance(params, nn.Module | Functional):
            raise TypeError(
                f"`params` must be a tree of tensors, got a {type(params).__name__}. Pass "
                f"`net.params`."
            )
        listed = isinstance(tasks, list)
        count = _count_listed(tasks) if listed else _count(tasks)
        variables = params, {} if self.learned is None else self.learned.params
        # Where plain autograd stands in for a transform around this, it is not the outermost one.
        outermost = values_are_readable() and not VARIABLES.get()
        if outermost:
            if not self._is_checked:
                self._check(variables, tasks if listed else [tree.index(tasks, 0)])
            variables = tree.map(torch.Tensor.detach, variables)
        total, losses, aux = None, [], []
        # Without gradients at the top level, autograd would record the whole computation once more.
        with torch.set_grad_enabled(not outermost):
            for grads, loss, more in self._parts(variables, tasks, None if listed else count):
                total = _plus(total, grads, len(loss) / count)
                losses.append(loss)
                aux.append(more)
        all_losses = losses[0] if len(losses) == 1 else torch.cat(losses)
        if outermost:
            check_finite(all_losses, "meta_grad", unit="task")
        found = total if self.learned is not None or total is None else total[0]
        return (found, all_losses, _joined(aux)) if self.has_aux else (found, all_losses)

    def _parts(
        self, variables: Tree, tasks: Tree, count: int | None
    ) -> Iterator[tuple[Tree, Tensor, Tree]]:
        """Yield (mean gradients, losses, aux) of some tasks after the other; without a count, of
        the tasks in a list.
        """
        if count is None:
            for task in tasks:
                yield self._one(variables, task)
            return
        if (
            self._loops is None
            and self.chunk_size is None
            and count > 1
            and not torch.compiler.is_compiling()
        ):
            self._loops = self._is_better_in_a_loop(variables, tasks)
        chunk = self.chunk_size or (1 if self._loops else count)
        for start in range(0, count, chunk):
            if chunk == 1:
                yield self._one(variables, tree.index(tasks, start))
            else:
                some = tasks if chunk >= count else tree.index(tasks, slice(start, start + chunk))
                yield self._many_explained(variables, some)

    def _many_explained(self, variables: Tree, tasks: Tree) -> tuple[Tree, Tensor, Tree]:
        try:
            return self._many(variables, tasks)  # type: ignore[no-any-return]
        except Exception as error:
            error.add_note(
                "meta_grad: tasks were batched by vmap. With `chunk_size=1` they are gone through "
                "one by one."
            )
            raise

    # One task, or a batch of them. The context is entered inside, for a compiled function then has
    # it only while it is traced.

    def _differentiate(self, variables: Tree, task: Tree) -> tuple[Tree, Tensor, Tree]:
        with any_order():
            grads, loss, aux = gradient(lambda at: self._value(at, task), variables)
        return grads, loss[None], tree.map(lambda leaf: leaf[None], aux)

    def _differentiate_batch(self, variables: Tree, tasks: Tree) -> tuple[Tree, Tensor, Tree]:
        # vmap has no channels-last layout; `contiguous()` would leave a weight with one channel as
        # it is
        variables = tree.map(
            lambda leaf: leaf.clone(memory_format=torch.contiguous_format), variables
        )
        # lists, which each transform takes apart again
        values, rows = tree.leaves(variables), tree.leaves(tasks)

        def value(values: list[Tensor], row: list[Tensor]) -> tuple[Tensor, Tree]:
            return self._value(tree.with_leaves(variables, values), tree.with_leaves(tasks, row))

        with any_order():
            per_task = vmap(
                grad_and_value(value, has_aux=True), in_dims=(None, 0), randomness="different"
            )
            grads, (losses, aux) = per_task(values, rows)
        return tree.with_leaves(variables, [grad.mean(0) for grad in grads]), losses, aux

    def _value(self, variables: Tree, task: Tree) -> tuple[Tensor, Tree]:
        """Return (loss, aux) of a task."""
        params, learned = variables
        if self.learned is None:
            result = self.task_loss(params, task)
        else:
            result = lent(self.learned.model, learned, self.task_loss, params, task)
        if not self.has_aux:
            return check_scalar(result, "task_loss"), ()
        if type(result) is not tuple or len(result) != 2:
            raise ValueError(
                f"`task_loss` must return (loss, aux) because of has_aux=True, got a "
                f"{type(result).__name__}. Return both, or "
                "leave `has_aux` out."
            )
        loss = check_scalar(result[0], "task_loss")
        return loss, tree.map(lambda leaf: as_tensor(leaf, "task_loss", loss), result[1])

    # What the first call finds out

    def _is_better_in_a_loop(self, variables: Tree, tasks: Tree) -> bool:
        two = tree.index(tasks, slice(2))
        try:
            if prefers_loop(self._differentiate_batch, variables, two):
                return True
            if not all(leaf.is_cpu for leaf in tree.leaves(variables)):
                self._differentiate_batch(variables, two)  # on a CPU that was tried just now
        except Exception as error:
            with torch.random.fork_rng(
                devices={leaf.device.index for leaf in tree.leaves(variables) if leaf.is_cuda}
            ):
                # if the loss is wrong by itself, that is what to say
                self._differentiate(variables, tree.index(tasks, 0))
            reason = str(error).strip().split("\n")[0]
            warnings.warn(
                f"meta_grad: these tasks cannot be batched by vmap, so they are gone through one "
                f"by one. The reason: {reason} Pass "
                "`chunk_size=1` if that is all right.",
                RuntimeWarning,
                stacklevel=4,
            )
            return True
        return False

    def _check(self, variables: Tree, tasks: Sequence[Tree]) -> None:
        """Raise at the first call if derivatives would be left out: evaluate the loss, and see what
        it depends on.
        """
        if torch.is_inference_mode_enabled():
            return
        for path, leaf in tree.named_leaves(variables[0]):
            if not is_differentiable(leaf):
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(
                    f"`params` must be floating-point or complex tensors, got {kind} at {path}. "
                    f"Convert it."
                )
        leaves = tree.leaves(variables)
        devices = {leaf.device.index for leaf in leaves if leaf.is_cuda}

        def evaluate(task: Tree) -> tuple[list[Tensor], Tensor]:
            with torch.random.fork_rng(devices=devices), any_order():
                at = begin_at(leaves, again=False)
                with Recording(at):
                    return at, self._value(tree.with_leaves(variables, at), task)[0]

        reached: set[int] = set()
        for task in tasks:
            at, value = evaluate(task)

            def again(task: Tree = task) -> list[Tensor]:
                return [evaluate(task)[1]]

            if not is_tracked(value):
                raise ValueError(
                    "`task_loss` must depend on `params`, but its gradient would be zero: nothing "
                    "that it computes from them reaches the loss. Call the model as `net(params, "
                    "x)`; detach nothing on the way."
                )
            if find_hidden([value], again, at) is not None:
                raise ValueError(
                    f"`task_loss` depends on {tracked_names(self.task_loss, value)}, which "
                    f"requires grad but is not "
                    "differentiated here. To learn it, pass the module that it belongs to: "
                    "`meta_grad(task_loss, learn=module)`. Otherwise detach it, or call "
                    "`requires_grad_(False)`."
                )
            below = {id(leaf) for leaf in graph_leaves(value)}
            reached |= {place for place, leaf in enumerate(at) if id(leaf) in below}
        learned = variables[1]
        first = len(leaves) - len(learned)
        unused = [name for place, name in enumerate(learned, first) if place not in reached]
        if unused:
            raise ValueError(
                f"`task_loss` must depend on all that is learned, but does not on {unused} of "
                f"`learn`. Use it, or call "
                "`requires_grad_(False)` on it. (A rule that looks at the end of a loop, such as "
                "`Implicit`, gives the optimizer no derivative.)"
            )
        self._is_checked = True


def assign_grads(model: nn.Module, grads: Params) -> None:
    """Write `grads` into the `.grad` of the model's parameters, for any `torch.optim` optimizer to
    use.

    Raises:
        ValueError: a name is not a parameter of the model, a trainable parameter is missing, or a
            shape differs.
    """
    trainable = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if trainable.keys() != grads.keys():
        missing, unknown = (
            sorted(trainable.keys() - grads.keys()),
            sorted(grads.keys() - trainable.keys()),
        )
        raise ValueError(
            f"`grads` must name the model's trainable parameters; missing {missing}, unknown "
            f"{unknown}."
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


def _plus(total: Tree | None, grads: Tree, share: float) -> Tree:
    """Return total + share grads, where None is zero."""
    if total is not None:
        return tree.map(lambda total, g: tree.scaled_sum(total, share, g), total, grads)
    return grads if share == 1 else tree.map(lambda g: share * g, grads)


def _joined(parts: list[Tree]) -> Tree:
    """Return the aux of all tasks, stacked; a list of them if their structures or shapes differ."""
    if len(parts) == 1:
        return parts[0]
    leaves, structures = zip(*map(tree.flatten, parts), strict=True)
    shapes = [[leaf.shape[1:] for leaf in own] for own in leaves]
    if any(other != structures[0] for other in structures) or any(
        other != shapes[0] for other in shapes
    ):
        return [tree.index(part, 0) for part in parts]
    return tree.map(lambda *leaves: torch.cat(leaves), *parts)


def _count(tasks: Tree) -> int:
    count = tree.leading_axis(tasks)
    if not count:
        raise ValueError(
            "Every leaf of `tasks` must have the number of tasks (at least 1) as its leading axis, "
            "got "
            f"{tree.leading_axes(tasks)} (-1: none). Stack the tasks first, or pass them as a list."
        )
    return count


def _count_listed(tasks: list[Tree]) -> int:
    if not tasks:
        raise ValueError("`tasks` must hold at least one task, got an empty list.")
    if all(isinstance(task, Tensor) for task in tasks):
        raise ValueError(
            f"`tasks` must be a list of tasks, such as [(x, y), (x, y)], got {len(tasks)} bare "
            f"tensors. For stacked tasks pass a "
            "tuple, `tuple(tasks)`."
        )
    return len(tasks)
