"""What can be asked about a tensor inside `torch.func` transforms."""

import torch
from torch import Tensor
from torch._C import _functorch as functorch


def is_tracked(tensor: Tensor) -> bool:
    """Say whether autograd, at the top level or at any level of `torch.func.grad`, differentiates through `tensor`."""
    while not tensor.requires_grad:
        if not functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return True


def values_are_readable() -> bool:
    """Say whether a tensor's value may decide what Python does next: not under vmap, grad, jvp or compile."""
    return not torch.compiler.is_compiling() and functorch.peek_interpreter_stack() is None
