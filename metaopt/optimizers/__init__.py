"""The package `optimizers` beside `metaopt`, under a name that no file of a user's can take.

`import optimizers` finds whatever comes first on the path: a user's own `optimizers.py` beside
their script hides ours. So its modules are always loaded here, by their place on disk, as
`metaopt.optimizers` and below. Where `import optimizers` does find our package, that name is given
the same modules. Classes are therefore defined once, whichever name is imported first, and pickles
name them in a way that works in every process.

Type checkers read the stubs in this folder.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

_root = Path(__file__).parents[2]
# Of the name only the last part is looked for in a folder.
_spec = PathFinder.find_spec(__name__, [str(_root)])
if _spec is None or _spec.loader is None or _spec.submodule_search_locations is None:
    raise ImportError(
        f"The package `optimizers` must stand beside `metaopt`, got none in {_root}. The two are "
        f"one "
        "distribution. Install it again: pip install --force-reinstall torch-metaopt.",
        name="optimizers",
    )
__path__, __file__ = _spec.submodule_search_locations, _spec.origin
_spec.loader.exec_module(sys.modules[__name__])
# Last: until here the import system reads off the first one that this module is not complete.
__spec__ = _spec
