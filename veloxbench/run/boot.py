"""Starts a worker in any environment: ``python boot.py '{"veloxbench": FOLDER, …}'``.

The packages that are named are loaded from their folders, and nothing else of this program can be imported: a package
of the same import name as one of its own is the environment's.
"""

import importlib.util
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    for name, folder in json.loads(sys.argv[1]).items():
        place = Path(folder)
        spec = importlib.util.spec_from_file_location(
            name, place / "__init__.py", submodule_search_locations=[str(place)]
        )
        assert spec is not None and spec.loader is not None  # noqa: PT018 (a file always has both)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    from veloxbench.run.worker import main

    main()
