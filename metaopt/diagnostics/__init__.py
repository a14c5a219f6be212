"""What derivatives through levels are worth: on the user's own problem, at its present state."""

from metaopt.diagnostics.check import HypergradientCheck, hypergradient_check
from metaopt.diagnostics.compare import MeasuredRule, RuleComparison, compare_rules
from metaopt.diagnostics.smoothness import metasmoothness

__all__ = [
    "HypergradientCheck",
    "MeasuredRule",
    "RuleComparison",
    "compare_rules",
    "hypergradient_check",
    "metasmoothness",
]
