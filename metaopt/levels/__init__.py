"""Levels that optimise, and the graph of how they depend on each other."""

from metaopt.levels.edge import Edge
from metaopt.levels.graph import LevelGraph
from metaopt.levels.level import Level
from metaopt.levels.scope import Levels
from metaopt.levels.shuffled import Shuffled

__all__ = ["Edge", "Level", "LevelGraph", "Levels", "Shuffled"]
