"""What the benchmarks share: results by part, each with the command, date and device that made it."""

import json
import platform
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import sae_helpers as sae

RESULTS = Path(__file__).parent / "results"
CHOOSE_ON = 50_000  # whatever is chosen is compared on training images 50,000 to 59,999


def machine(device="cpu"):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def main(script, parts, names, device="cpu", file=None, data=None):
    """Run the parts (all without `names`), each a function of the data; replace theirs in results/<file>.json.

    `data` (default: MNIST) has at least a name.
    """
    if unknown := [name for name in names if name not in parts]:
        sys.exit(f"{unknown[0]!r} is not a part: choose among {', '.join(parts)}")
    data = data or sae.load_mnist()
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


def effective_features(activity):
    """The exponential of the entropy of use, for each member's activity [M, d_sae]: as many equally used ones."""
    share = activity / activity.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


class Restarts(sae.Trainer):
    """Re-initialises single features that fire rarely: the remedy that most SAE code has (after Bricken et al. 2023).

    Every `look_every` steps, until the share `until` of the steps, each feature that has since
    fired less than `rare` of what the mean feature fires starts anew: in a direction that the
    member misses, with the others' mean length and bias, and with Adam's second moment of the
    others. (Not for members with the consistency loss, which moves features about.)
    """

    look_every, until, rare = 100, 0.85, 0.03

    def __init__(self, recipe, x, device="cpu"):
        super().__init__(recipe, x, device)
        self.fires_before, self.started_anew = self.fires.clone(), 0

    def train_step(self):
        super().train_step()
        if self.step % self.look_every == 0:
            if self.step <= self.until * self.total_steps:
                self.restart_rare_features(self.fires - self.fires_before)
            self.fires_before = self.fires.clone()

    @torch.no_grad()
    def restart_rare_features(self, window):
        rare = window < self.rare * window.double().mean(1, keepdim=True)  # [M, d_sae]
        for m in range(self.recipe.n_members):
            if rare[m].any():
                self.restart_features(m, rare[m].nonzero()[:, 0])

    @torch.no_grad()
    def restart_features(self, m, features):
        """Let features of member m, given by index, start anew; nothing else changes."""
        part, n = self.parts[m], len(features)
        others = torch.ones(self.recipe.d_sae, dtype=torch.bool)
        others[features] = False
        part["W"][features] = F.normalize(self.missed_directions(m, n), dim=1) * part["W"][others].norm(dim=1).mean()
        part["b_enc"][features] = part["b_enc"][others].mean()
        for name in ("W", "b_enc"):
            state = self.optimizer.state[part[name]]
            state["exp_avg"][features] = 0
            state["exp_avg_sq"][features] = state["exp_avg_sq"][others].mean(0)
        self.started_anew += n

    @torch.no_grad()
    def missed_directions(self, m, n):
        """What n badly reconstructed images have in common with those whose residuals point the same way, [n, d_in]."""
        seed = int(np.random.SeedSequence([self.recipe.seed, self.step, m]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        x = self.x[torch.randperm(len(self.x), generator=generator)[: max(256, 2 * n)]]
        residuals = x - self.reconstruct(x, m)
        worst = residuals.norm(dim=1).argsort(descending=True)[torch.arange(n) % len(x)]
        directions = F.normalize(residuals, dim=1)
        return (directions[worst] @ directions.T).relu().pow(8) @ residuals

    def reconstruct(self, x, m):
        return self.model(x)[m]
