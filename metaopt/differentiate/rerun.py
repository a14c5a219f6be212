"""Rules that run the loop again when they know the cotangents."""

from __future__ import annotations

from metaopt import tree
from metaopt.autodiff.derivative import with_derivative
from metaopt.autodiff.modes import noting_modes
from metaopt.autodiff.replay import Ambient
from metaopt.differentiate.protocol import Given, InnerLoop, Pullback, Result, Rule
from metaopt.differentiate.steps import run


class RerunRule(Rule):
    """A rule whose pullback runs the loop again, with the random numbers of the first time."""

    def pull_back(self, loop: InnerLoop, cotangents: Result, wanted: Given) -> Given:
        """Return the cotangents of what the loop was given, None if not wanted; differentiable."""
        raise TypeError(f"{type(self).__name__} must define `pull_back(loop, cotangents, wanted)`.")

    def vjp(self, loop: InnerLoop) -> tuple[Result, Pullback]:
        """Run without a graph, and again for each pullback."""
        given = loop.given()
        ambient = Ambient.now(tree.leaves(given))

        def pullback(cotangents: Result, wanted: Given) -> Given:
            with ambient.restored():
                return self.pull_back(loop.starting_from(given), cotangents, wanted)

        return run(loop.starting_from(given)), pullback

    def attach(self, loop: InnerLoop) -> Result:
        """Run without a graph; the pullback is a function of the loop's tensors."""
        given = loop.given()
        ambient = Ambient.now(tree.leaves(given))

        def pull_back(_: Result, given: Given, cotangents: Result, wanted: Given) -> Given:
            return self.pull_back(loop.starting_from(given), cotangents, wanted)

        with noting_modes() as modes:
            result = run(loop.starting_from(given))
        return with_derivative(pull_back, result, given, ambient, modes)  # type: ignore[no-any-return]
