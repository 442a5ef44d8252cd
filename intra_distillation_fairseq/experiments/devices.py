"""What there is to compute on. Asked in a process of its own, so that this one neither loads torch nor holds a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from intra_distillation_fairseq.errors import UserError

_PROBE = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"devices": gpus, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}))
"""


def probe() -> dict[str, Any]:
    """GPUs by name (`devices`, empty without), torch's CUDA version (`cuda`) and its CPU threads (`threads`).

    Raises:
        UserError: torch cannot be imported.
    """
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().split("\n") or [""])[-1]
        raise UserError(f"torch does not work in {sys.executable} ({reason}): run scripts/setup.sh")
    return json.loads(done.stdout.strip().split("\n")[-1])
