from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "masquerade_engine",
        "masquerade_engine.detokenizer",
        "masquerade_engine.prefix_index",
        "masquerade_engine.prompt",
        "masquerade_engine.requests",
        "masquerade_engine.residency",
        "masquerade_engine.scheduler",
        "masquerade_engine.settings",
        "masquerade_kernels.planner",
    ],
)
def test_policy_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
