"""What is compiled ahead of time, and tested for spills, is what is launched, of whatever sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "specializations.py"


def test_sizes_do_not_change_the_code():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["may be specialized"] == []
    kernels = {name.split()[0] for name in result["compiled"]}
    assert {"scored_merge_bwd_kernel", "interpolate_bwd_token_kernel"} < kernels
    assert len(kernels) > 12
    for name, codes in result["compiled"].items():
        ahead, *launched = codes
        assert launched == [ahead], name
