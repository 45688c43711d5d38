"""Time of a training step: one member of ours against the straightforward loop.

    python benchmarks/one_member.py

Both train at the reference size (784 → 1,024, k = 50, batch 128) on the same MNIST
batches, turn by turn in one process. Prints the median step of each and their ratio, and
writes them to benchmarks/results/one_member.json.
"""

import json
import platform
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import sae_helpers as sae

STEPS, WARM_UP = 300, 20


class Straightforward:
    """What one would write first: nn.Linear, a top-k mask, a dense decode, default Adam."""

    def __init__(self, recipe, d_in):
        torch.manual_seed(recipe.seed)
        self.encoder, self.k = nn.Linear(d_in, recipe.d_sae), recipe.k
        nn.init.orthogonal_(self.encoder.weight)
        nn.init.zeros_(self.encoder.bias)
        self.optimizer = torch.optim.Adam(self.encoder.parameters(), lr=recipe.learning_rate)

    def train_step(self, x):
        pre = self.encoder(x)
        mask = torch.zeros_like(pre).scatter(1, pre.topk(self.k).indices, 1.0)
        loss = F.mse_loss((pre * mask) @ F.normalize(self.encoder.weight, dim=1), x)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def main():
    data = sae.load_mnist()
    recipe = replace(sae.RECIPES["reference"], n_members=1)
    straightforward, ours = Straightforward(recipe, data.train.shape[1]), sae.Trainer(recipe, data.train)
    times = {"straightforward": [], "ours": []}
    for _ in range(STEPS):
        start = time.perf_counter()
        ours.train_step()
        middle = time.perf_counter()
        # The batch that ours has just taken, which it picks from the whole set by itself.
        position = (ours.step - 1) % ours.steps_per_epoch
        x = data.train[ours.order[position * recipe.batch_size : (position + 1) * recipe.batch_size]]
        straightforward.train_step(x)
        times["ours"].append(middle - start)
        times["straightforward"].append(time.perf_counter() - middle)
    medians = {name: 1e3 * median(seconds[WARM_UP:]) for name, seconds in times.items()}
    ratio = medians["ours"] / medians["straightforward"]
    result = {
        "command": "python benchmarks/one_member.py",
        "date": date.today().isoformat(),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "data": data.name,
        "median_ms_per_step": medians,
        "ratio": ratio,
    }
    path = Path(__file__).parent / "results" / "one_member.json"
    path.parent.mkdir(exist_ok=True)
    sae.write_atomically(path, lambda temporary: temporary.write_text(json.dumps(result, indent=1) + "\n"))
    for name, milliseconds in medians.items():
        print(f"{name:16} {milliseconds:6.2f} ms a step")
    print(f"ratio            {ratio:6.2f} (wanted: at most 0.75); written to {path.name}")


if __name__ == "__main__":
    main()
