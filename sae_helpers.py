"""Top-k sparse autoencoders on MNIST: data, model, metrics, training, and what notebooks show them with.

The notebooks build each idea by hand; this module holds the polished versions. Shapes:

    M      n_members: autoencoders that train side by side
    B      images in a batch
    d_in   pixels of an image (784)
    d_sae  features (1,024)
    k      features kept for an image (50)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

# Threads that wait and spin make a step many times slower on a busy machine; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SAEError(ValueError):
    """Something the user can mend; the message says in one line what, and how."""


# ---- Data ----------------------------------------------------------------------------

_PROJECT = Path(__file__).resolve().parent
# Of the bytes of MNIST's training images, their labels, test images and theirs.
_SHA256 = "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"


@dataclass(frozen=True)
class Images:
    """A data set in memory: pixels in [0, 1], images flattened."""

    name: str
    shape: tuple[int, int]  # height and width of an image, in pixels
    train: Tensor  # [n_train, d_in], float32
    train_labels: Tensor  # [n_train], int64
    test: Tensor  # [n_test, d_in]
    test_labels: Tensor  # [n_test]
    is_mnist: bool = False  # checksums agree; claims about MNIST are checked on nothing else


def load_mnist(root: str | Path | None = None) -> Images:
    """The 60,000 training and 10,000 test images of MNIST (LeCun et al. 1998), read by torchvision.

    `root` (default: `$MNIST_ROOT`, else `data`) holds the four files in `MNIST/raw/`, plain or gzipped; missing
    ones are downloaded. Where there is none, and no network, the 1,797 digits that come with scikit-learn
    stand in, with a warning. Raises SAEError where files are damaged, incomplete or cannot be read.
    """
    from torchvision.datasets import MNIST

    root = Path(os.path.expanduser(root or os.environ.get("MNIST_ROOT") or "data"))
    # A notebook runs in its own folder; a relative path means the project's folder there.
    if not os.path.exists(root) and (_PROJECT / "pyproject.toml").exists():
        root = _PROJECT / root
    raw, before = root / "MNIST" / "raw", socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)  # torchvision sets none
    try:
        raw.exists() and os.listdir(raw)  # torchvision takes a closed folder for an empty one
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            # Told of what is missing alone, it names that, and unpacks files beside plain ones without a network.
            missing = [pair for pair in MNIST.resources if not (raw / pair[0].removesuffix(".gz")).exists()]
            reader = type("MNIST", (MNIST,), {"resources": missing})
            train, test = (reader(root, train=part, download=True) for part in (True, False))
    except Exception as error:  # whatever a broken file or connection makes of torchvision
        if not getattr(error, "filename", None) and not any(raw.glob("*-ubyte*")):  # no error of the disk
            return _offline_digits(raw)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SAEError(f"{raw} does not give MNIST ({reason}): delete damaged files, or connect") from error
    finally:
        socket.setdefaulttimeout(before)
    content = [part.numpy().tobytes() for data in (train, test) for part in (data.data, data.targets.byte())]
    if hashlib.sha256(b"".join(content)).hexdigest() != _SHA256:
        raise SAEError(f"{raw} holds other data than MNIST (SHA-256 differs): delete it, and it is downloaded again")
    x_train, x_test = (part.data.flatten(1).float() / 255 for part in (train, test))
    return Images("MNIST", (28, 28), x_train, train.targets, x_test, test.targets, is_mnist=True)


def _offline_digits(raw: Path) -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    print(f"*** NOT MNIST: none in {raw}, and no network. scikit-learn's 1,797 digits stand in. ***", file=sys.stderr)
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    x = F.interpolate(x, size=(28, 28), mode="bilinear").flatten(1)
    return Images("scikit-learn digits (not MNIST)", (28, 28), x[:1500], y[:1500], x[1500:], y[1500:])


# ---- Model ---------------------------------------------------------------------------


class TopKSAE(nn.Module):
    """M top-k sparse autoencoders with tied weights, held as one (k-sparse: Makhzani & Frey 2013).

    pre   = (x - b_dec) A Wᵀ + b_enc                 the k largest are kept, by value
    x_hat = Σ value · W_row / ‖W_row‖ + b_dec        over the kept features

    k may differ by member: codes are as long as the largest, and 0 beyond a member's own. A member follows
    from its seed, whatever stands beside it. b_dec [d_in] (None: 0) is the data's centre, and not trained.
    With `encoder_map` A [1, d_in, d_in] is, from the identity on, for all members; else it is None. With
    `relu` kept values below zero become 0. Raises SAEError where a k is not in 1…d_sae, or missing.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: int | Sequence[int], seeds: Sequence[int] = (0,),
        b_dec: Tensor | None = None, encoder_map=False, relu=False,
    ):  # fmt: skip
        super().__init__()
        self.n_members = len(seeds)
        for one in per_member("k", k, len(seeds)):
            if not (1 <= one <= d_sae and one == int(one)):
                raise SAEError(f"k = {one} features cannot be kept of {d_sae}: choose k from 1 to the hidden size")
        self.d_in, self.d_sae, self.k, self.relu = d_in, d_sae, k if isinstance(k, Sequence) else int(k), relu
        self.W = nn.Parameter(torch.stack([initial_weights(d_sae, d_in, seed) for seed in seeds]))  # [M, d_sae, d_in]
        self.b_enc = nn.Parameter(torch.zeros(len(seeds), d_sae))  # [M, d_sae]
        self.register_buffer("b_dec", (torch.zeros(d_in) if b_dec is None else b_dec.cpu()).repeat(len(seeds), 1))
        self.A = nn.Parameter(torch.eye(d_in)[None]) if encoder_map else None  # [1, d_in, d_in]

    def pre_activations(self, x: Tensor) -> Tensor:
        """Images [B, d_in] to what the k largest are kept of, [M, B, d_sae]."""
        return torch.baddbmm(self.b_enc[:, None], _mapped(x, self.b_dec, self.A), self.W.mT)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, d_in] to codes: values and feature indices, each [M, B, k], unordered."""
        return _keep(self.pre_activations(x), self.k, self.relu)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Codes (any number of features, each [M, B, n]) to reconstructions [M, B, d_in]."""
        norms = self.W.norm(dim=-1)[:, None].expand(-1, values.shape[1], -1)
        return _gather_rows(indices, values / norms.gather(-1, indices), self.W) + self.b_dec[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, d_in] to reconstructions [M, B, d_in]: decode(encode(x)), with a faster gradient."""
        return self.autoencode(x)[0]

    def autoencode(self, x: Tensor, boost: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` with its code: x_hat, values, indices. `boost` [M, d_sae] is added in choosing the k alone."""
        return _Autoencode.apply(x, self.W, self.b_enc, self.b_dec, self.A, self.k, self.relu, boost)

    def features(self) -> Tensor:
        """The dictionary: unit-length rows [M, d_sae, d_in]."""
        return F.normalize(self.W.detach(), dim=-1)

    def save(self, path: str | Path, data: str, recipe: str) -> None:
        """Write W, b_enc, b_dec, A if there is one, and what is needed to use them (safetensors)."""
        from safetensors.torch import save

        metadata = {name: str(int(getattr(self, name))) for name in ("d_in", "d_sae", "n_members", "relu")}
        metadata |= {"k": ",".join(map(str, np.atleast_1d(self.k))), "data": data, "recipe": recipe}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata["sha256"] = checksum(json.dumps(metadata, sort_keys=True), tensors)
        content = save(tensors, metadata)  # with the metadata in random order: equal runs should write equal bytes
        end = 8 + int.from_bytes(content[:8], "little")
        head = (text := json.dumps(json.loads(content[8:end]), sort_keys=True).encode()) + b" " * (-len(text) % 8)
        write_atomically(path, lambda file: file.write_bytes(len(head).to_bytes(8, "little") + head + content[end:]))

    @classmethod
    def load(cls, path: str | Path) -> TopKSAE:
        """Read what `save` wrote. Raises SAEError where the file is missing or not such a checkpoint."""
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            given = metadata.pop("sha256", None)  # other writers may leave it out
            if given not in (None, checksum(json.dumps(metadata, sort_keys=True), state)):
                raise ValueError("it is damaged: its checksum is wrong")
            d_in, d_sae, M = (int(metadata[name]) for name in ("d_in", "d_sae", "n_members"))
            W, A, (k, *more) = state["W"], state.get("A"), map(int, metadata["k"].split(","))
            fits = A is None or (len(A) in (1, M) and A.shape[1:] == (d_in, d_in))  # other writers may have M maps
            if not (fits and W.numel() and W.shape == (M, d_sae, d_in) and W.is_floating_point()):  # before it is made
                raise ValueError(f"W is {W.dtype} {list(W.shape)}")
            model = cls(d_in, d_sae, (k, *more) if more else k, range(M), None, A is not None, metadata["relu"] == "1")
            model.A = None if A is None else nn.Parameter(A)
            model.load_state_dict(state)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise SAEError(f"{path} is no checkpoint of this project ({reason}): train one, or give another") from error
        return model


def checksum(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a text and of tensors, with their names, types and shapes."""
    parts = [(f"{name} {t.dtype} {list(t.shape)}".encode(), t.numpy().tobytes()) for name, t in sorted(tensors.items())]
    return hashlib.sha256(b"".join(sum(parts, (text.encode(),)))).hexdigest()


def per_member(name: str, value, n_members: int) -> tuple:
    """A setting as one value for each member. Raises SAEError where their number is wrong."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * n_members
    if len(values) != n_members:
        raise SAEError(f"{name} has {len(values)} values for {n_members} members: give one value, or one for each")
    return values


def initial_weights(d_sae: int, d_in: int, seed: int) -> Tensor:
    """Orthogonal weights [d_sae, d_in] (Saxe et al. 2013): with d_sae > d_in it is the columns that are orthonormal."""
    return nn.init.orthogonal_(torch.empty(d_sae, d_in), generator=torch.Generator().manual_seed(seed))


def _mapped(x, b_dec, A):
    """(x - b_dec) A, [M, B, d_in]; where all members share A, x is multiplied once."""
    return x - b_dec[:, None] if A is None else x @ A - b_dec[:, None] @ A


# The value of a boosted feature whose own is negative: as good as none, exact in float16, and it fires.
_BARELY = 2**-20


def _keep(pre, k, relu, boost=None):
    """The k largest by index, so that ties never keep more: values and indices [M, B, k]."""
    one_k = isinstance(k, int)
    values, indices = (pre if boost is None else pre + boost[:, None]).topk(k if one_k else max(k), sorted=not one_k)
    if boost is not None:
        values = pre.gather(-1, indices)
        boosted = boost[:, None].expand_as(pre).gather(-1, indices) > 0
        values = values.masked_fill(boosted & (values < 0), _BARELY)
    if not one_k:  # a tensor made of k would be copied to the device: no CUDA graph holds that
        ranks = torch.arange(max(k), device=pre.device)
        values = values * torch.stack([ranks < one for one in k])[:, None]
    return (values.relu() if relu else values), indices


# Only k of d_sae features fire. On a CPU the next three touch only their rows, a twentieth of the
# dense product's work; elsewhere the dense product is used. Indices and weights are [M, B, n].


def _gather_rows(indices, weights, rows):
    """Weighted sums of rows [M, d_sae, d_in] → [M, B, d_in]."""
    if rows.device.type != "cpu":
        return _dense(indices, weights, rows.shape[1]) @ rows
    flat, offsets, _ = _bags(indices, rows.shape[1])
    sums = F.embedding_bag(flat, rows.flatten(0, 1), offsets, per_sample_weights=weights.flatten(), mode="sum")
    return sums.view(*indices.shape[:2], -1)


def _row_products(indices, g, rows):
    """Products of g [M, B, d_in] with the rows that are needed → [M, B, n]: the gather's gradient at its weights."""
    if rows.device.type != "cpu":
        return (g @ rows.mT).gather(-1, indices)
    flat, offsets, bag = _bags(indices, rows.shape[1])
    # Autograd's own formula, without the forward pass that autograd would run first.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g.flatten(0, 1), rows.flatten(0, 1), flat, offsets, bag, 0
    ).view(indices.shape)


def _scatter_rows(indices, weights, rows, d_sae):
    """The transpose of `_gather_rows`: rows [M, B, d_in], weighted, are added up by index → [M, d_sae, d_in]."""
    if rows.device.type != "cpu":
        return _dense(indices, weights, d_sae).mT @ rows
    flat, offsets, bag = _bags(indices, d_sae)
    return torch.ops.aten._embedding_bag_dense_backward(
        rows.flatten(0, 1), flat, bag, offsets, offsets, len(rows) * d_sae, False, 0, weights.flatten()
    ).view(len(rows), d_sae, -1)


def _bags(indices, d_sae):
    """What embedding_bag calls indices, offsets and offset2bag, with one bag of n rows for each member and image."""
    M, B, n = indices.shape
    flat = (indices + torch.arange(M)[:, None, None] * d_sae).flatten()
    return flat, torch.arange(0, M * B * n, n), torch.arange(M * B).repeat_interleave(n)


def _dense(indices, weights, d_sae):
    return weights.new_zeros(*indices.shape[:2], d_sae).scatter_add_(-1, indices, weights)


class _Autoencode(torch.autograd.Function):
    """decode(encode(x)) with a gradient that, like the code, touches only the k features kept.

    Autograd would build three tensors of W's size. With u = value / ‖W_row‖, y = (x - b_dec) A, g the gradient
    at x_hat and p that at the pre-activations, the gradient of a row is  Σ u g  (it is a decoder row)  +  Σ p y
    (an encoder row)  -  Σ p value / ‖W_row‖² · W_row  (its length divides the value).
    """

    @staticmethod
    def forward(ctx, x, W, b_enc, b_dec, A, k, relu, boost):
        y = _mapped(x, b_dec, A)  # [M, B, d_in]
        values, indices = _keep(torch.baddbmm(b_enc[:, None], y, W.mT), k, relu, boost)
        norms = W.norm(dim=-1)  # [M, d_sae]
        kept_norms = norms[:, None].expand(-1, len(x), -1).gather(-1, indices)
        u = values / kept_norms  # [M, B, k]
        ctx.save_for_backward(x, W, b_dec, A, y, values, indices, u, norms, kept_norms)
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.mark_non_differentiable(values, indices)
        return _gather_rows(indices, u, W) + b_dec[:, None], values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        x, W, b_dec, A, y, values, indices, u, norms, kept_norms = ctx.saved_tensors
        grad_x = grad_A = None
        with torch.autocast(*ctx.autocast):  # the large products in the precision of the forward pass
            p = _row_products(indices, g, W) / kept_norms * (values != 0)  # 0: cut off by relu, or beyond its own k
            p = torch.where(values == _BARELY, p.clamp_max(0), p)  # it may learn to be above zero, not to sink
            both = torch.cat([indices, indices], 1), torch.cat([u, p], 1), torch.cat([g, y], 1)
            grad_W = _scatter_rows(*both, W.shape[1]).to(W.dtype)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
                grad_y = _gather_rows(indices, p, W)  # [M, B, d_in]
            if ctx.needs_input_grad[4]:  # Σ (x - b_dec)ᵀ grad_y, over members too where they share A
                shared = len(A) == 1
                grad_A = x.mT @ (grad_y.sum(0, keepdim=True) if shared else grad_y)
                grad_A = grad_A - torch.einsum("mi,mj->ij" if shared else "mi,mj->mij", b_dec, grad_y.sum(1))
            if ctx.needs_input_grad[0]:
                grad_x = (grad_y if A is None else grad_y @ A.mT).sum(0)
        flat = indices.flatten(1)  # [M, B k]
        grad_norms = torch.zeros_like(norms).scatter_add_(1, flat, (p * u).flatten(1))
        grad_W.addcmul_(W, (grad_norms / norms)[..., None], value=-1)
        grad_b_enc = torch.zeros_like(norms).scatter_add_(1, flat, p.flatten(1))
        return grad_x, grad_W, grad_b_enc, None, grad_A, None, None, None


# ---- Metrics -------------------------------------------------------------------------


def mse(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean squared error over the last two dimensions (images, pixels); x_hat may have a leading M."""
    return (x_hat - x).square().mean((-2, -1))


def pearson(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean over images of Pearson's correlation of x [B, d_in] and x_hat [..., B, d_in] → [...]; 0 for a flat image."""
    x, x_hat = (images - images.mean(-1, keepdim=True) for images in (x, x_hat))
    lengths = x.norm(dim=-1) * x_hat.norm(dim=-1)
    return ((x * x_hat).sum(-1) / lengths.clamp_min(1e-8)).mean(-1)


@torch.no_grad()
def evaluate(model: TopKSAE, x: Tensor, mean: Tensor, chunk: int = 1000) -> dict[str, Tensor]:
    """Quality of every member on images x [n, d_in]; `mean` [d_in] is the training mean.

    Returns, each [M], mse, pearson, explained_variance (1 - SSE / SSE of the mean image), dead_fraction (features
    that fire for no image), rare_fraction (for fewer than 1 in 1,000); and activity [M, d_sae], a feature's share.
    """
    n, sums, fires = len(x), 0, 0
    for part in x.split(chunk):
        values, indices = model.encode(part)
        x_hat = model.decode(values, indices)
        sums += len(part) * torch.stack([mse(part, x_hat), pearson(part, x_hat)])
        fires += count_fires(values, indices, model.d_sae)
    error, correlation = sums / n
    return {
        "mse": error,
        "pearson": correlation,
        "explained_variance": 1 - error / mse(x, mean.expand_as(x)),
        "dead_fraction": (fires == 0).float().mean(1),
        "rare_fraction": (fires < n / 1000).float().mean(1),
        "activity": fires / n,
    }


def count_fires(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """How many of the B images each feature fires for, [M, d_sae] int64: its code is there and not 0."""
    counts = torch.zeros(len(indices), d_sae, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(1, indices.flatten(1), (values != 0).long().flatten(1))


def monitor_score(activity: Tensor, target: float = 0.0625) -> Tensor:
    """The reference system's score [M]: mean of (|a - target| / target)³, features firing for a share a of a batch."""
    return ((activity - target).abs() / target).pow(3).mean(-1)


def match_features(a: Tensor, b: Tensor, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Best one-to-one matching of two dictionaries [d_sae, d_in] (Hungarian algorithm, Kuhn 1955).

    Returns `order` [d_sae], so that b[order] stands beside a, and the cosine of each pair [d_sae]. Not `exact`:
    features that are each other's nearest are paired first; several times faster, and a little below the best.
    """
    from scipy.optimize import linear_sum_assignment

    similarity = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    table, rows = similarity.cpu(), torch.arange(len(a))
    order = table.argmax(1)
    left = torch.ones(len(a), dtype=torch.bool) if exact else table.argmax(0)[order] != rows
    columns = rows[torch.isin(rows, order[~left], invert=True)]
    order[left] = columns[linear_sum_assignment(table[left][:, columns].numpy(), maximize=True)[1]]
    return order.to(a.device), similarity.gather(1, order.to(a.device)[:, None])[:, 0]


def matched_cosine(features: Tensor) -> float:
    """Mean cosine similarity of matched features over all pairs of members [M, d_sae, d_in]; nan for M = 1."""
    pairs = [(a, b) for i, a in enumerate(features) for b in features[:i]]
    return float(np.mean([match_features(a, b)[1].mean().item() for a, b in pairs])) if pairs else math.nan


# ---- Training ------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, checked; `learning_rate` and `k` may have a value for each member, to compare them."""

    name: str
    decoder_bias: bool = True  # b_dec is the mean training image; else 0
    encoder_map: bool = True  # train A, from the identity on
    row_moments: bool = True  # one second moment of Adam for a row of W, not one for each weight
    selection_floor: float = 0.2  # features used less than this are helped, where 1 is the mean feature; 0: none
    learning_rate: float | tuple[float, ...] = 3e-3
    decay: float = 0.3  # in this last share of the steps the learning rate falls to 0 along a line
    monitor: bool = False  # the reference system's: a member whose score is too high starts anew
    relu: bool = False
    d_sae: int = 1024
    k: int | tuple[int, ...] = 50
    n_members: int = 5
    epochs: int = 5
    batch_size: int = 128
    consistency_weight: float = 0.01
    consistency_warmup: int = 100  # steps
    match_every: int = 100  # steps between two matchings of the members
    precision: str = "auto"  # of the large products: float32, float16, bfloat16; auto: float16 on CUDA, else float32
    seed: int = 0

    def __post_init__(self):
        many = 2**31 - 1
        for field, kind, low, high in (
            ("n_members", int, 1, many), ("d_sae", int, 1, many), ("k", int, 1, self.d_sae), ("epochs", int, 1, many),
            ("batch_size", int, 1, many), ("consistency_warmup", int, 0, many), ("match_every", int, 1, many),
            ("seed", int, 0, 2**32 - 1), ("learning_rate", float, 1e-12, 1e12), ("decay", float, 0, 1),
            ("consistency_weight", float, 0, 1e30), ("selection_floor", float, 0, 1),
        ):  # fmt: skip
            given = getattr(self, field)
            several, numbers = field in ("k", "learning_rate") and isinstance(given, (list, tuple)), []
            for value in given if several else [given]:
                value = value.tolist() if isinstance(value, (np.generic, np.ndarray, Tensor)) else value  # for JSON
                right = isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high
                if not right or value != kind(value):
                    what = "a whole number" if kind is int else "a number"
                    raise SAEError(f"{field} is {value!r}: it must be {what} from {low:,} to {high:,}")
                numbers.append(kind(value))
            value = per_member(field, tuple(numbers), self.n_members) if several else numbers[0]
            object.__setattr__(self, field, value)
        if self.precision not in ("auto", "float32", "float16", "bfloat16"):
            raise SAEError(f"precision is {self.precision!r}: choose auto, float32, float16 or bfloat16")


RECIPES = {
    "improved": Recipe("improved"),
    "reference": Recipe("reference", decoder_bias=False, encoder_map=False, row_moments=False, selection_floor=0,
                        learning_rate=1e-3, decay=0, monitor=True),
}  # fmt: skip


class Trainer:
    """Trains the members of an ensemble on the same batches; holds all that training remembers.

    `x` [n, d_in] are the training images, kept whole on `device`; `parts` the trained parameters as each member's
    slices; `optimizer` an Adam with a group for each member and one for A; `order` this epoch's order of the images,
    `generator` what draws the next; `fires` [M, d_sae] for how many images each feature fired; `use` [M, d_sae] how
    often it was kept lately, where 1 is the mean; `scale` [M] the mean value kept; `restarts` the steps and members
    of the monitor's restarts. `history` has, for every `log_every` steps and from before them, step, consistency (that
    loss, 0 where off) and, a number for each member, learning_rate, dead_fraction, rare_fraction (by `use`: kept for
    less than 1 in 100,000 and 1 in 1,000), mse and pearson (batch).
    """

    log_every = 10
    monitor_threshold = 100.0  # of the reference system; see `monitor_score`
    map_rate = 0.25  # A's share of the learning rate
    memory = 0.99  # of `use`, from step to step
    lift = 4.0  # see `boost`
    share_every = 10  # steps, in which the second moments of a row (β2 = 0.999) part by a hundredth

    def __init__(self, recipe: Recipe, x: Tensor, device: torch.device | str = "cpu"):
        self.recipe, self.x, M = recipe, x.to(device), recipe.n_members
        on, precisions = self.x.device.type, {"cuda": ("float16", "bfloat16"), "cpu": ("bfloat16",)}
        if recipe.precision not in ("auto", "float32", *precisions.get(on, ())):
            raise SAEError(f"precision {recipe.precision} is not for device {on}: choose auto or float32")
        name = recipe.precision.replace("auto", "float16" if on == "cuda" else "float32")
        self.precision = getattr(torch, name)
        # Distinct for distinct (seed, member), so that two ensembles share no member.
        seeds = np.random.SeedSequence(recipe.seed).generate_state(M).tolist()
        b_dec = x.mean(0) if recipe.decoder_bias else None
        self.model = TopKSAE(x.shape[1], recipe.d_sae, recipe.k, seeds, b_dec, recipe.encoder_map, recipe.relu)
        self.model.to(self.x)
        # Each member's part of each parameter: views, so that one member's Adam can start again alone.
        W, b_enc = self.model.W.detach(), self.model.b_enc.detach()
        self.parts = [{"W": W[m].requires_grad_(), "b_enc": b_enc[m].requires_grad_()} for m in range(M)]
        groups = [list(part.values()) for part in self.parts] + ([[self.model.A]] if recipe.encoder_map else [])
        self.optimizer = torch.optim.Adam(
            # A captured step reads the learning rates where they lie, so on CUDA they are tensors.
            [{"params": part, "lr": torch.zeros((), device=self.x.device) if on == "cuda" else 0.0} for part in groups],
            fused=on in ("cuda", "cpu"), capturable=on == "cuda",
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(on, enabled=self.precision == torch.float16)
        self.weight = self.x.new_zeros(())  # of the consistency loss, in this step
        self.fires = torch.zeros(M, recipe.d_sae, dtype=torch.int64, device=self.x.device)
        self.use, self.scale = torch.ones_like(b_enc), self.x.new_zeros(M)
        self.generator, self.order = torch.Generator().manual_seed(recipe.seed), torch.empty(0, dtype=torch.int64)
        self.step, self.restarts, self.steps_per_epoch = 0, [], math.ceil(len(x) / recipe.batch_size)
        self.total_steps = self.steps_per_epoch * recipe.epochs
        self.consistent = M > 1 and recipe.consistency_weight > 0
        names = ("step", "consistency", "learning_rate", "dead_fraction", "rare_fraction", "mse", "pearson")
        self.history: dict[str, list] = {name: [] for name in names}

    def learning_rates(self) -> list[float]:
        """Each member's learning rate in this step."""
        share = min(1.0, (1 - self.step / self.total_steps) / (self.recipe.decay or 1e-9))
        return [rate * share for rate in per_member("learning_rate", self.recipe.learning_rate, len(self.parts))]

    def run(self, progress: bool = True, after_epoch: Callable[[Trainer], None] | None = None) -> Trainer:
        """Train to the end and return itself; `after_epoch(trainer)` is called at the end of each epoch."""
        from tqdm.auto import tqdm

        steps = range(self.step, self.total_steps)
        for _ in (bar := tqdm(steps, initial=self.step, total=self.total_steps, disable=not progress, leave=False)):
            self.train_step()
            shown = ("mse", "pearson", "rare_fraction")
            bar.set_postfix({name: f"{np.mean(self.history[name][-1]):.4f}" for name in shown}, refresh=False)
            if after_epoch is not None and self.step % self.steps_per_epoch == 0:
                after_epoch(self)
        return self

    def train_step(self) -> None:
        """One step of every member on the same batch."""
        recipe, position = self.recipe, self.step % self.steps_per_epoch
        if position == 0:
            self.order = torch.randperm(len(self.x), generator=self.generator).to(self.x.device)
        x = self.x[self.order[position * recipe.batch_size : (position + 1) * recipe.batch_size]]
        if self.consistent and self.step % recipe.match_every == 0:
            self.align_members()
        # What changes from step to step lies where a captured step reads it.
        rates = self.learning_rates()
        for group, rate in zip(self.optimizer.param_groups, [*rates, self.map_rate * np.mean(rates).item()]):
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        warm = min(1.0, self.step / max(1, recipe.consistency_warmup))
        self.weight.fill_(recipe.consistency_weight * 0.5 * (1 - math.cos(math.pi * warm)))
        x_hat, fires, consistency = self.update(x)
        if recipe.row_moments and self.step % self.share_every == 0:
            self.share_second_moments()
        if self.step % self.log_every == 0:
            self.require_finite(losses := mse(x, x_hat))
            share = self.use * fires.sum(1, keepdim=True) / (len(x) * recipe.d_sae)  # of the images, [M, d_sae]
            quality = ((share < 1e-5).float().mean(1), (share < 1e-3).float().mean(1), losses, pearson(x, x_hat))
            entry = (self.step, float(consistency), rates, *(values.tolist() for values in quality))
            for name, value in zip(self.history, entry, strict=True):
                self.history[name].append(value)
        self.step += 1
        if recipe.monitor:
            score = monitor_score(fires / len(x))
            for m in (score > self.monitor_threshold).nonzero()[:, 0].tolist():
                self.restart_member(m)

    def update(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The part of a step that never waits for the device, so that a CUDA graph can hold it.

        Returns what was before it: x_hat [M, B, d_in], fires [M, d_sae] of the batch, and the consistency loss.
        """
        low = self.precision != torch.float32
        with torch.autocast(x.device.type, self.precision) if low else contextlib.nullcontext():
            x_hat, values, indices = self.model.autoencode(x, self.boost())  # [M, B, d_in], two of [M, B, k]
        fires = count_fires(values, indices, self.recipe.d_sae)  # [M, d_sae]
        self.fires += fires
        total = fires.sum(1).clamp_min(1)  # with relu, none may fire
        self.use.lerp_(fires.to(self.use) / total[:, None] * self.recipe.d_sae, 1 - self.memory)
        self.scale.copy_(values.sum((1, 2), dtype=self.scale.dtype) / total)
        self.model.zero_grad()
        self.scaler.scale(self.losses(x, x_hat).sum()).backward()  # a member's loss reaches its own parameters and A
        for m, part in enumerate(self.parts):
            for name, view in part.items():
                view.grad = getattr(self.model, name).grad[m]
        self.scaler.unscale_(self.optimizer)  # before the consistency loss, whose gradient was never scaled
        consistency = add_consistency_gradient(self.model.W, self.weight) if self.consistent else torch.zeros(())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return x_hat.detach(), fires, consistency

    def boost(self) -> Tensor | None:
        """The selection floor: what features get on top in the choice of the k largest, [M, d_sae], or None.

        The further a feature's use lies below the floor, the more: at most `lift` times the mean value kept. So it
        fires where it fits best, and learns from that. A conscience (DeSieno 1988) of those left out; mixtures of
        experts are balanced so too (Wang et al. 2024, arXiv 2408.15664).
        """
        floor = self.recipe.selection_floor
        return self.lift * self.scale[:, None].clamp_min(0) * (1 - self.use / floor).clamp_min(0) if floor else None

    @torch.no_grad()
    def share_second_moments(self) -> None:
        """Give the weights of a row of W one second moment of Adam, their mean (after Adam-mini: Zhang et al. 2024).

        Adam lengthens the steps of weights with small gradients: here those of the border's
        pixels, which carry little but noise. With one moment a feature moves along its gradient.
        """
        for part in self.parts:
            moment = self.optimizer.state[part["W"]]["exp_avg_sq"]
            moment.copy_(moment.mean(1, keepdim=True).expand_as(moment))

    def losses(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """What each member minimises, [M], besides the consistency loss."""
        return mse(x, x_hat)

    def require_finite(self, values: Tensor) -> None:
        """Raise SAEError where training has diverged."""
        if not values.isfinite().all():
            rate = self.recipe.learning_rate
            raise SAEError(f"the loss is no longer a number (step {self.step}): choose a learning_rate below {rate}")

    @torch.no_grad()
    def restart_member(self, m: int) -> None:
        """Give member m new weights, b_enc as at the start, and an Adam that remembers nothing."""
        # From the step, not from a generator: training on draws the same batches with and without.
        seed = int(np.random.SeedSequence([self.recipe.seed, self.step, m]).generate_state(1)[0])
        self.parts[m]["W"].copy_(initial_weights(self.recipe.d_sae, self.x.shape[1], seed))
        self.parts[m]["b_enc"].zero_()
        for view in self.parts[m].values():
            for tensor in self.optimizer.state.get(view, {}).values():
                tensor.zero_()  # in place, where a captured step finds them
        self.use[m] = 1
        self.restarts.append((self.step, m))

    @torch.no_grad()
    def align_members(self) -> None:
        """Reorder each member's features, and Adam's moments, so that feature i means the same in every member.

        Each is matched to the sum of those before it. The order of features is arbitrary: it can be chosen.
        """
        self.require_finite(features := self.model.features())
        total = features[0].clone()
        for m in range(1, self.recipe.n_members):
            order, _ = match_features(total, features[m], exact=False)
            total += features[m, order]
            moved = [self.fires[m], self.use[m], *self.parts[m].values()]
            for state in (self.optimizer.state.get(part, {}) for part in self.parts[m].values()):
                moved += [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
            for tensor in moved:
                tensor.copy_(tensor[order])


@torch.no_grad()
def add_consistency_gradient(W: Tensor, weight: float | Tensor) -> Tensor:
    """Add weight · ∇C to W.grad and return C, for members whose features are aligned.

    C is the mean over pairs of members and over features of 1 - cosine (after Marks et al. 2024). With f the
    unit-length features and s their sum over members, the mean cosine is (‖s‖² - M) / (M (M-1)): no pair is visited.
    """
    M, d_sae, _ = W.shape
    norms = W.norm(dim=-1, keepdim=True)  # [M, d_sae, 1]
    s = W[0] / norms[0]
    for m in range(1, M):
        s.addcmul_(W[m], 1 / norms[m])  # [d_sae, d_in]
    pairs = M * (M - 1)
    scale = 2 * weight / (pairs * d_sae)
    for m in range(M):
        # ∂C/∂W_m is the part of -s at right angles to f_m, over ‖W_m‖: length costs nothing.
        along = (W[m] * s).sum(-1, keepdim=True) / norms[m] ** 2
        W.grad[m].addcmul_(s, -scale / norms[m]).addcmul_(W[m], scale * along / norms[m])
    return 1 - (s.square().sum(-1).mean() - M) / pairs


# ---- What notebooks show, and files --------------------------------------------------


def show_images(
    images: Tensor, data: Images, title: str, titles: Sequence[str] = (), columns: int = 10, signed=False,
    size=0.78, axis=None,
):  # fmt: skip
    """Draw images [n, d_in], each `size` inches wide, in rows, `titles` above them; on `axis`, or a new figure.

    Grey from 0 to 1; `signed`: 0 is mid-grey, each on its own scale. Returns the figure.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap
    from torchvision.utils import make_grid

    (height, width), room, images = data.shape, 10 if len(titles) else 0, images.detach().float().cpu()
    colours = dict(cmap="gray", vmin=0)
    if signed:
        images = images / images.abs().amax(1, keepdim=True).clamp_min(1e-8)
        # Diverging in hue, but lightness rises all the way: the sign is readable without colours.
        shades = ["#0b2a5b", "#979797", "#ffe08a"]  # in few steps, for small files
        colours = dict(cmap=LinearSegmentedColormap.from_list("signed", shades, N=33), vmin=-1)
    padded = F.pad(images.view(-1, 1, height, width), (0, 2, room, 2), value=math.nan)
    canvas = make_grid(padded, columns, padding=0, pad_value=math.nan)[0, :-2, :-2]
    if axis is None:
        tall = size / (width + 2) * len(canvas)
        figure = plt.figure(figsize=(size * columns, tall + 0.35), facecolor="white")
        axis = figure.add_axes((0, 0, 1, tall / (tall + 0.35)))
        figure.suptitle(f"{data.name}: {title}", fontsize=9, y=1 - 0.06 / (tall + 0.35), va="top")
    else:
        axis.set_title(title, fontsize=9)
    axis.imshow(canvas.numpy(), vmax=1, interpolation="nearest", origin="upper", **colours)
    axis.axis("off")
    for i, text in enumerate(titles):
        at = i % columns * (width + 2) + width / 2, i // columns * (room + height + 2) + room - 2
        axis.text(*at, text, ha="center", fontsize=9)
    return axis.figure


def show(figure, data: Images) -> None:
    """Show a figure of a notebook, with the name of the data in its corner."""
    import matplotlib.pyplot as plt

    figure.supxlabel(data.name, x=0.995, ha="right", fontsize=9, color="dimgray")  # the layout keeps room for it
    plt.show()


def table(header: Sequence[str], rows: Iterable[Sequence], data: Images) -> None:
    """Show a small table, as Markdown in a notebook, with the name of the data; floats get four decimals."""
    from IPython.display import Markdown, display

    texts = [[f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in texts]
    lines.insert(1, "| --- " * len(header) + "|")
    display(Markdown("\n".join([*lines, "", f"*Data: {data.name}*"])))


def stored_results(name: str) -> dict:
    """Results of a benchmark, benchmarks/results/<name>.json. Raises SAEError where the file is not there."""
    for folder in (_PROJECT / "benchmarks" / "results", Path(sys.prefix) / "share" / "mnist-sae", Path()):
        if (folder / f"{name}.json").exists():
            return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    raise SAEError(f"{name}.json is not here: put the project's benchmarks/results/{name}.json beside the notebook")


def check_claims(claims: Iterable[tuple[str, float, float, float]], data: Images) -> None:
    """Say how many claims (text, value, lowest and highest good one) hold; on MNIST AssertionError names the others."""
    claims = list(claims)
    failed = [f"{text}: {value:.4g}, not {a:g} to {b:g}" for text, value, a, b in claims if not a <= value <= b]
    if failed and data.is_mnist:
        raise AssertionError("; ".join(failed))
    print(f"{len(claims)} claims, " + ("all hold" if data.is_mnist else "not checked (not MNIST)"))


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, then rename: the file is whole or not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
