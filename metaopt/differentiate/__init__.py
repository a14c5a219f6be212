"""Ways to differentiate an inner loop, one per file."""

from metaopt.differentiate.backprop import Backprop
from metaopt.differentiate.base import InnerLoop, Rule
from metaopt.differentiate.first_order import FirstOrder
from metaopt.differentiate.implicit import Implicit

__all__ = ["Backprop", "FirstOrder", "Implicit", "InnerLoop", "Rule"]
