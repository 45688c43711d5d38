"""What the benchmarks share: results by part, each with the command, date and device that made it."""

import json
import platform
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

import sae_helpers as sae

# `improved` as it was when the results of notebooks 03 and 04 were stored; notebook 06 tells what came after.
FORMER = replace(
    sae.RECIPES["improved"], decay=0.2, decay_power=1.0, reinit_until=0.8, row_moments=False, consistency_until=1.0
)
RESULTS = Path(__file__).parent / "results"


def machine(device="cpu"):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def main(script, parts, names, device="cpu", file=None):
    """Run the parts (all without `names`), each a function of the data; replace theirs in results/<file>.json."""
    if unknown := [name for name in names if name not in parts]:
        sys.exit(f"{unknown[0]!r} is not a part: choose among {', '.join(parts)}")
    data = sae.load_mnist()
    path = RESULTS / f"{file or script}.json"
    for name in names or parts:
        part = {
            "command": f"python benchmarks/{script}.py {name}",
            "date": date.today().isoformat(),
            "device": machine(device),
            "torch": torch.__version__,
            "data": data.name,
            "results": parts[name](data),
        }
        # Read anew: another process may have written another part meanwhile.
        stored = json.loads(path.read_text()) if path.exists() else {}
        text = json.dumps({**stored, name: part}, indent=1) + "\n"
        sae.write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
