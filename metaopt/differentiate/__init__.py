"""Ways to differentiate an inner loop, one per file."""

from metaopt.differentiate.backprop import Backprop
from metaopt.differentiate.base import InnerLoop, Rule
from metaopt.differentiate.first_order import FirstOrder

__all__ = ["Backprop", "FirstOrder", "InnerLoop", "Rule"]
