"""The module under test, under one alias, so that the whole suite also runs on a vendored copy:

S3C_SUBJECT=some.package._s3cache python -m pytest
"""

from __future__ import annotations

import importlib
import os

name = os.environ.get("S3C_SUBJECT", "aind_s3_cache")
s3c = importlib.import_module(name)
