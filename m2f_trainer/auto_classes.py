"""Makes transformers' Auto classes know our models once both packages are imported, in either order.

Registering needs transformers and torch, which take seconds to import and which `m2f --help` does without. So if
transformers is there, we register at once; if not, a finder waits for its import and registers right after it.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LIBRARY = "transformers"
MODEL_PACKAGE = "m2f_trainer.model"


def register_with_transformers() -> None:
    """Register now if transformers is imported, otherwise as soon as it is."""
    if LIBRARY in sys.modules:
        import_model()
    else:
        sys.meta_path.insert(0, AfterImport())


def import_model() -> None:
    """Import the model, which registers itself; a model package that is being imported will get there by itself."""
    if MODEL_PACKAGE not in sys.modules:
        importlib.import_module(f"{MODEL_PACKAGE}.mask2former")


class AfterImport(MetaPathFinder):
    """Finds transformers as the other finders do, but has the model imported after it, and then retires."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The other finders' spec of transformers; None for anything else."""
        if name != LIBRARY:
            return None
        found = (other.find_spec(name, path, target) for other in sys.meta_path if other is not self)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    import_model()

            spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec
