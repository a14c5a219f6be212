"""Ways to differentiate an inner loop, one per file."""

from metaopt.differentiate.backprop import Backprop
from metaopt.differentiate.base import End, InnerLoop, PointRule, Rule, attach
from metaopt.differentiate.first_order import FirstOrder
from metaopt.differentiate.implicit import Implicit

__all__ = ["Backprop", "End", "FirstOrder", "Implicit", "InnerLoop", "PointRule", "Rule", "attach"]
