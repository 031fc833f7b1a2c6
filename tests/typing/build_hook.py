"""Put the module's own text into the wheel a second time, as its stubs.

A lone module cannot carry the `py.typed` mark, but a `*-stubs` package needs none (PEP 561): type
checkers see the annotations that a reader sees. `force-include` alone cannot do this, because it
moves a file and we need it twice.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULE = "aind_s3_cache"
SUBMODULES = ("json_utils", "s3_cache", "uri_utils")  # 0.1 had them; ours exist only at run time


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.stubs = Path(tempfile.mkdtemp())
        shutil.copyfile(Path(self.root, f"{MODULE}.py"), self.stubs / "__init__.pyi")
        for name in SUBMODULES:
            text = f"from {MODULE} import *\n"
            (self.stubs / f"{name}.pyi").write_bytes(text.encode())
        build_data["force_include"][str(self.stubs)] = f"{MODULE}-stubs"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(self.stubs)
