"""Ways to differentiate an inner loop, one per file."""

from metaopt.differentiate.backprop import Backprop
from metaopt.differentiate.evolution_strategy import EvolutionStrategy
from metaopt.differentiate.finite_difference import FiniteDifference
from metaopt.differentiate.first_order import FirstOrder
from metaopt.differentiate.forward_mode import ForwardMode
from metaopt.differentiate.implicit import Implicit
from metaopt.differentiate.penalty import Penalty
from metaopt.differentiate.point import End, PointRule, Read, at_end
from metaopt.differentiate.protocol import Given, InnerLoop, Inputs, Pullback, Result, Rule
from metaopt.differentiate.sama import SAMA
from metaopt.differentiate.steps import run, weigh_result
from metaopt.differentiate.t1t2 import T1T2

__all__ = [
    "SAMA",
    "T1T2",
    "Backprop",
    "End",
    "EvolutionStrategy",
    "FiniteDifference",
    "FirstOrder",
    "ForwardMode",
    "Given",
    "Implicit",
    "InnerLoop",
    "Inputs",
    "Penalty",
    "PointRule",
    "Pullback",
    "Read",
    "Result",
    "Rule",
    "at_end",
    "run",
    "weigh_result",
]
