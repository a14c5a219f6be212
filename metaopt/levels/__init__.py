"""Levels that optimise, and the graph of how they depend on each other."""

from metaopt.levels.edge import Edge
from metaopt.levels.graph import LevelGraph
from metaopt.levels.level import Level
from metaopt.levels.scope import Levels

__all__ = ["Edge", "Level", "LevelGraph", "Levels"]
