"""Instructions of compiled kernels: no count grows unnoticed, and loops are read as they are."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import triton

from pointformer.profiling.machine_code import parse

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu" / "instructions.py"
TABLE = SCRIPT.parents[1] / "results" / "instructions.jsonl"
SHAPE = ("--size", "128x256", "--batch", "1")

SOURCE = """
for start in range(count):
    total += load(start)
    while total < limit:
        total *= 2
"""
CODE = """
	//## File "/elsewhere/kernel.py", line 1
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
	//## File "/elsewhere/kernel.py", line 3
        /*0010*/                   LDG.E R3, [R4.64] ;
.L_x_1:
	//## File "/elsewhere/kernel.py", line 5
        /*0020*/                   FMUL R3, R3, R3 ;
        /*0030*/              @!P1 FADD R3, R3, R3 ;
	//## File "/elsewhere/helper.py", line 9 inlined at "/elsewhere/kernel.py", line 4
	//## File "/elsewhere/kernel.py", line 4
        /*0040*/               @P0 BRA `(.L_x_3) ;
.L_x_2:
	//## File "/elsewhere/kernel.py", line 4
        /*0050*/               @P1 BRA `(.L_x_1) ;
	//## File "/elsewhere/kernel.py", line 2
        /*0060*/               @P2 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   MUFU.RCP R3, R3 ;
        /*0090*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""


def test_loops_are_those_of_the_source():
    """Code out of the way belongs to the loop that it returns to; padding is never reached."""
    code = parse(CODE, {"kernel.py": ast.parse(SOURCE)})
    assert code.per_round() == {"": 2, "start": 2, "start.total": 6}
    assert code.issued({"start": 3, "total": 10}) == 2 + 3 * 2 + 10 * 6
    with pytest.raises(KeyError, match="total"):
        code.issued({"start": 3})


@pytest.mark.long
def test_no_kernel_issues_more_than_before():
    lines = [json.loads(line) for line in TABLE.read_text().splitlines()]
    mine = triton.__version__, "128x256 batch 1"
    before = [line for line in lines if (line["triton"], line["shape"]) == mine]
    if not before:
        pytest.skip(
            f"no counts for Triton {triton.__version__}; see bench/gpu/instructions.py --write"
        )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), *SHAPE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]

    def totals(rows):
        issued = Counter()
        for row in rows:
            assert row["bound_us"] >= max(row["floor_us"], row["issue_us"]) > 0
            for kernel in row["kernels"]:
                place = f"{row['op']} of stage {row['stage']}, {row['pass']}"
                issued[f"{place}: {kernel['kernel']}"] += kernel["issued"]
        return issued

    old, new = totals(before), totals(rows)
    refresh = f"python bench/gpu/instructions.py {' '.join(SHAPE)} --write"
    assert old.keys() == new.keys(), f"refresh the table: {refresh}"
    grown = {key: (old[key], new[key]) for key in old if new[key] > 1.05 * old[key]}
    assert not grown, f"instructions before and now, see {refresh}: {grown}"
