"""Makes the tiny networks of tests/models importable as `oddities`, without touching sys.path."""

import importlib.util
import signal
import sys
from pathlib import Path

# A shell starts background jobs with Ctrl-C ignored, and they hand that on: the tests that send one need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_FILE = Path(__file__).parent / "models" / "oddities.py"

if "oddities" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("oddities", _FILE)
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["oddities"] = _module
    _spec.loader.exec_module(_module)
