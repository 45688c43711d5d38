"""Top-k sparse autoencoders on MNIST: data, model, training, metrics, pictures.

The notebooks build each idea by hand; this module holds the polished versions.
Letters used for shapes, here and in the notebooks:

    M      n_members: autoencoders that train side by side
    B      images in a batch
    d_in   pixels of an image (784)
    d_sae  features (1,024)
    k      features kept for an image (50)
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import socket
import sys
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from safetensors import safe_open
from safetensors.torch import save
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm
from torch import Tensor, nn
from torchvision.datasets import MNIST
from tqdm.auto import tqdm


class SAEError(ValueError):
    """Something the user can mend; the message says in one line what, and how."""


# --------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------

_PROJECT = Path(__file__).resolve().parent
_FILES = {
    "train": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
# SHA-256 of the four original MNIST files, unpacked.
_SHA256 = {
    "train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train_labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "test_labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


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


def project_folder() -> Path:
    """The project's folder, or the current one where this module was installed without it (Colab)."""
    return _PROJECT if (_PROJECT / "pyproject.toml").exists() else Path()


def load_mnist(root: str | Path | None = None) -> Images:
    """The 60,000 training and 10,000 test images of MNIST (LeCun et al. 1998).

    `root` (default: `$MNIST_ROOT`, else the folder `data`) is in torchvision's layout:
    `root/MNIST/raw/` holds the four files, plain or gzipped. Files that are missing are
    downloaded; every file is checked against the original's checksum. Without a network
    the 1,797 digits that come with scikit-learn stand in, with a warning.

    Raises SAEError where `root` is no folder, or a file is damaged or cannot be read.
    """
    if root is None:
        root = os.environ.get("MNIST_ROOT") or "data"
    root = Path(root).expanduser()
    with _one_line_errors(root):
        # A notebook runs in its own folder; a relative path means the project's folder there.
        if not root.exists():
            root = project_folder() / root
        if root.exists() and not root.is_dir():
            raise SAEError(
                f"{root} is not a folder: set MNIST_ROOT to the folder that holds MNIST/raw, or to an empty one"
            )
    raw = root / "MNIST" / "raw"
    with _one_line_errors(raw):
        if any(_find(raw, stem) is None for stem in _FILES.values()) and not _download(raw):
            return _offline_digits(raw)
    return _load_raw(raw, "MNIST", _SHA256)


def load_idx(folder: str | Path) -> Images:
    """A data set in MNIST's file format (Fashion-MNIST, KMNIST, …), named by its folder.

    The four idx files lie, plain or gzipped, in `folder` or in a folder `raw` below it.
    Raises SAEError where one is missing, damaged or not of the right structure.
    """
    folder = Path(folder).expanduser()
    with _one_line_errors(folder):
        if not folder.is_dir():
            raise SAEError(f"{folder} is not a folder: give the one that holds the four idx files")
        raw = folder / "raw" if (folder / "raw").is_dir() else folder
        return _load_raw(raw, folder.resolve().name, {})


@contextlib.contextmanager
def _one_line_errors(path: Path):
    try:
        yield
    except OSError as error:
        raise SAEError(
            f"{error.filename or path}: {error.strerror or error}; give yourself access to it, or choose another folder"
        ) from error


def _find(raw: Path, stem: str) -> Path | None:
    """The file itself, else its gzipped form, else None."""
    for path in (raw / stem, raw / f"{stem}.gz"):
        try:
            path.stat()
            return path
        except (FileNotFoundError, NotADirectoryError):
            continue
    return None


def _load_raw(raw: Path, name: str, sha256: dict[str, str]) -> Images:
    arrays = {part: _read_idx(raw, stem, sha256.get(part)) for part, stem in _FILES.items()}
    for part in ("train", "test"):
        images, labels = arrays[part], arrays[f"{part}_labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or len(images) == 0:
            raise SAEError(
                f"{raw / _FILES[part]}: images of shape {images.shape} with labels of shape {labels.shape}; "
                "expected [n, height, width] and [n], n > 0: replace the pair"
            )
    if arrays["train"].shape[1:] != arrays["test"].shape[1:]:
        raise SAEError(f"{raw}: training and test images differ in size: replace one of them")

    def pixels(part):
        return torch.tensor(arrays[part].reshape(len(arrays[part]), -1), dtype=torch.float32) / 255

    def labels(part):
        return torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64))

    shape = arrays["train"].shape[1:]
    return Images(name, shape, pixels("train"), labels("train"), pixels("test"), labels("test"), bool(sha256))


def _read_idx(raw: Path, stem: str, sha256: str | None) -> np.ndarray:
    """One idx file: two zero bytes, type 8 (unsigned byte), the number of dimensions, their sizes, the data."""
    path = _find(raw, stem)
    if path is None:
        raise SAEError(f"{raw / stem} is missing (as is {stem}.gz): copy the file there")
    # Only a file with a known checksum can be fetched again by this module.
    remedy = "delete it, and it will be downloaded again" if sha256 else "replace it with a good copy"
    with _one_line_errors(path):
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise SAEError(f"{path} is damaged ({error}): {remedy}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise SAEError(
            f"{path} is not an idx file of bytes (it starts with {content[:4].hex() or 'nothing'}): {remedy}"
        )
    shape = tuple(np.frombuffer(content, ">u4", count=content[3], offset=4).tolist())
    expected = 4 + 4 * content[3] + math.prod(shape)
    if len(content) != expected:
        raise SAEError(f"{path} holds {len(content):,} bytes where its header promises {expected:,}: {remedy}")
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise SAEError(f"{path} has the right size but not the content of MNIST's original (SHA-256 differs): {remedy}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def _download(raw: Path) -> bool:
    """Fetch missing files through torchvision; False where the network does not answer within seconds."""
    if not any(_answers(mirror + MNIST.resources[0][0]) for mirror in MNIST.mirrors):
        return False
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw) as temporary:
        print(f"Downloading MNIST to {raw} …", file=sys.stderr)
        old_timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(10)  # torchvision sets none; this bounds each read
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                source = Path(MNIST(temporary, download=True).raw_folder)
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            print(f"The download broke off: {error}", file=sys.stderr)
            return False
        finally:
            socket.setdefaulttimeout(old_timeout)
        for stem in _FILES.values():
            if _find(raw, stem) is None:
                os.replace(source / stem, raw / stem)
    return True


def _answers(url: str, seconds: float = 5) -> bool:
    answered = threading.Event()

    def ask():
        with contextlib.suppress(OSError, http.client.HTTPException), urllib.request.urlopen(url, timeout=seconds):
            answered.set()

    # A thread, because a name look-up ignores every timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _offline_digits(raw: Path) -> Images:
    from sklearn.datasets import load_digits

    print(
        f"*** NOT MNIST: no files in {raw} and no network. Running on scikit-learn's 1,797 digits instead; "
        "put the four MNIST files there, or connect and run again. ***",
        file=sys.stderr,
    )
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False).flatten(1)
    labels = torch.tensor(digits.target)
    n_train = 1_500
    return Images(
        "scikit-learn digits (not MNIST)", (28, 28),
        images[:n_train], labels[:n_train], images[n_train:], labels[n_train:],
    )  # fmt: skip


# --------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------


class TopKSAE(nn.Module):
    """M top-k sparse autoencoders with tied weights, held as one (k-sparse: Makhzani & Frey 2013).

    pre   = (x - b_dec) Wᵀ + b_enc                   the k largest are kept, by value
    x_hat = Σ value · W_row / ‖W_row‖ + b_dec        over the kept features

    Args:
        d_in, d_sae, k: input size, features, features kept for an image (one number, or one for each member).
        seeds: one per member; a member is the same whatever members stand beside it.
        b_dec: start of the decoder bias [d_in]; None leaves it at zero and untrained.
        relu: kept values below zero become zero.

    Where members keep different numbers of features, codes are as long as the largest k;
    what lies beyond a member's own k is 0.

    Raises SAEError where a k is not in 1…d_sae, or not as many are given as there are members.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: int | Sequence[int], seeds: Sequence[int] = (0,),
        b_dec: Tensor | None = None, relu=False,
    ):  # fmt: skip
        super().__init__()
        for one in per_member("k", k, len(seeds)):
            if not 1 <= one <= d_sae:
                raise SAEError(f"k = {one} features cannot be kept of {d_sae}: choose k from 1 to the hidden size")
        self.d_in, self.d_sae, self.k, self.relu = d_in, d_sae, k, relu
        self.W = nn.Parameter(torch.stack([initial_weights(d_sae, d_in, seed) for seed in seeds]))  # [M, d_sae, d_in]
        self.b_enc = nn.Parameter(torch.zeros(len(self.W), d_sae))  # [M, d_sae]
        start = torch.zeros(d_in) if b_dec is None else b_dec.detach().cpu()
        self.b_dec = nn.Parameter(start.repeat(len(self.W), 1), requires_grad=b_dec is not None)  # [M, d_in]

    @property
    def n_members(self) -> int:
        return len(self.W)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, d_in] to codes: values and feature indices, each [M, B, k], unordered."""
        return _encode(x, self.W, self.b_enc, self.b_dec, self.k, self.relu)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Codes (any number of features, each [M, B, n]) to reconstructions [M, B, d_in]."""
        norms = self.W.norm(dim=-1)[:, None].expand(-1, values.shape[1], -1)
        return _gather_rows(indices, values / norms.gather(-1, indices), self.W) + self.b_dec[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, d_in] to reconstructions [M, B, d_in]: decode(encode(x)), with a faster gradient."""
        return self.autoencode(x)[0]

    def autoencode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` with the code that it passed through, which carries no gradient: x_hat, values, indices."""
        return _Autoencode.apply(x, self.W, self.b_enc, self.b_dec, self.k, self.relu)

    def features(self) -> Tensor:
        """The dictionary: unit-length rows [M, d_sae, d_in]."""
        return F.normalize(self.W.detach(), dim=-1)

    def save(self, path: str | Path, data: str, recipe: str) -> None:
        """Write W, b_enc, b_dec and what is needed to use them (safetensors)."""
        metadata = dict(
            k=",".join(map(str, np.atleast_1d(self.k))), relu=str(int(self.relu)),
            d_in=str(self.d_in), d_sae=str(self.d_sae),
            n_members=str(self.n_members), data=data, recipe=recipe,
        )  # fmt: skip
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata)))

    @classmethod
    def load(cls, path: str | Path) -> TopKSAE:
        """Read what `save` wrote. Raises SAEError where the file is missing or not such a checkpoint."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ks = tuple(map(int, metadata["k"].split(",")))
            model = cls(
                int(metadata["d_in"]), int(metadata["d_sae"]), ks[0] if len(ks) == 1 else ks,
                seeds=range(int(metadata["n_members"])), relu=metadata["relu"] == "1",
            )  # fmt: skip
            model.load_state_dict(state)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise SAEError(f"{path} is no checkpoint of this project ({reason}): train one, or give another") from error
        return model


def per_member(name: str, value, n_members: int) -> tuple:
    """A setting as one value for each member. Raises SAEError where their number is wrong."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * n_members
    if len(values) != n_members:
        raise SAEError(f"{name} has {len(values)} values for {n_members} members: give one value, or one for each")
    return values


def initial_weights(d_sae: int, d_in: int, seed: int) -> Tensor:
    """Orthogonal weights [d_sae, d_in] (Saxe et al. 2013): with d_sae > d_in it is the columns that are orthonormal."""
    return nn.init.orthogonal_(torch.empty(d_sae, d_in), generator=torch.Generator().manual_seed(seed))


def _encode(x, W, b_enc, b_dec, k, relu):
    pre = torch.baddbmm(b_enc[:, None], x - b_dec[:, None], W.transpose(1, 2))  # [M, B, d_sae]
    kept = _kept(k, pre.device)
    # By index, so that ties never keep more than k.
    values, indices = pre.topk(int(np.max(k)), sorted=kept is not None)
    if kept is not None:
        values = values * kept
    return (values.relu() if relu else values), indices


def _kept(k, device):
    """Which of the max(k) largest each member keeps, [M, 1, max(k)]; None where all keep the same number."""
    if isinstance(k, int):
        return None
    ranks = torch.arange(max(k), device=device)  # a tensor made of k would be copied to the device: no graph holds that
    return torch.stack([ranks < one for one in k])[:, None]


def _gather_rows(indices, weights, rows):
    """Weighted sums of rows: [M, B, n] indices and weights, rows [M, d_sae, d_in] → [M, B, d_in].

    On a CPU only the n rows that are needed are touched, a twentieth of the dense product's work.
    """
    M, B, n = indices.shape
    if _dense_is_faster(rows):
        return torch.bmm(_dense(indices, weights, rows.shape[1]), rows)
    flat = F.embedding_bag(
        _bags(indices, rows.shape[1])[0], rows.reshape(-1, rows.shape[-1]),
        per_sample_weights=weights.reshape(M * B, n), mode="sum",
    )  # fmt: skip
    return flat.view(M, B, -1)


def _row_products(indices, g, rows):
    """Products of g [M, B, d_in] with the rows that are needed → [M, B, n]: the gather's gradient at its weights."""
    if _dense_is_faster(rows):
        return torch.bmm(g, rows.transpose(1, 2)).gather(-1, indices)
    flat, offsets, bag = _bags(indices, rows.shape[1])
    # Autograd's own formula, without the forward pass that autograd would run first.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g.flatten(0, 1), rows.reshape(-1, rows.shape[-1]), flat.flatten(), offsets, bag, 0
    )
    return products.view(indices.shape)


def _scatter_rows(indices, weights, rows, d_sae):
    """The transpose of `_gather_rows`: rows [M, B, d_in], weighted, are added up by index → [M, d_sae, d_in]."""
    if _dense_is_faster(rows):
        return torch.bmm(_dense(indices, weights, d_sae).transpose(1, 2), rows)
    flat, offsets, bag = _bags(indices, d_sae)
    total = torch.ops.aten._embedding_bag_dense_backward(
        rows.flatten(0, 1), flat.flatten(), bag, offsets, offsets, len(rows) * d_sae, False, 0, weights.flatten()
    )
    return total.view(len(rows), d_sae, -1)


def _bags(indices, d_sae):
    """What embedding_bag calls indices, offsets and offset2bag, with one bag of n rows for each member and image."""
    M, B, n = indices.shape
    flat = (indices + torch.arange(M)[:, None, None] * d_sae).view(M * B, n)
    offsets = torch.arange(0, M * B * n, n)
    return flat, offsets, torch.arange(M * B).repeat_interleave(n)


def _dense_is_faster(rows):
    return rows.device.type != "cpu"


def _dense(indices, weights, d_sae):
    return weights.new_zeros(*indices.shape[:2], d_sae).scatter_add_(-1, indices, weights)


class _Autoencode(torch.autograd.Function):
    """decode(encode(x)) with a gradient that, like the code, touches only the k features kept.

    Autograd would build three tensors of W's size and add them up; this builds one.
    With u = value / ‖W_row‖, g the gradient at x_hat and p that at the pre-activations:
    the gradient of a row is  Σ u g  (it is a decoder row)  +  Σ p (x - b_dec)  (an encoder
    row)  -  Σ p value / ‖W_row‖² · W_row  (its length divides the value).
    """

    @staticmethod
    def forward(ctx, x, W, b_enc, b_dec, k, relu):
        values, indices = _encode(x, W, b_enc, b_dec, k, relu)
        norms = W.norm(dim=-1)  # [M, d_sae]
        kept_norms = norms[:, None].expand(-1, len(x), -1).gather(-1, indices)
        u = values / kept_norms  # [M, B, k]
        ctx.save_for_backward(x, W, b_dec, indices, u, norms, kept_norms)
        ctx.k, ctx.relu = k, relu
        device = x.device.type
        ctx.autocast = dict(
            device_type=device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        ctx.mark_non_differentiable(values, indices)
        return _gather_rows(indices, u, W) + b_dec[:, None], values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        x, W, b_dec, indices, u, norms, kept_norms = ctx.saved_tensors
        with torch.autocast(**ctx.autocast):  # the large products in the precision of the forward pass
            p = _row_products(indices, g, W) / kept_norms
            kept = _kept(ctx.k, x.device)
            if kept is not None:
                p = p * kept
            if ctx.relu:
                p = p * (u > 0)
            grad_W = _scatter_rows(
                torch.cat([indices, indices], 1), torch.cat([u, p], 1), torch.cat([g, x - b_dec[:, None]], 1),
                W.shape[1],
            ).to(W.dtype)  # fmt: skip
        flat = indices.flatten(1)  # [M, B k]
        grad_norms = torch.zeros_like(norms).scatter_add_(1, flat, (p * u).flatten(1))
        grad_W.addcmul_(W, (grad_norms / norms)[..., None], value=-1)
        grad_b_enc = torch.zeros_like(norms).scatter_add_(1, flat, p.flatten(1))
        grad_b_dec = None
        if ctx.needs_input_grad[3]:
            grad_b_dec = g.sum(1) - torch.bmm(grad_b_enc[:, None], W)[:, 0]
        grad_x = _gather_rows(indices, p, W).sum(0) if ctx.needs_input_grad[0] else None
        return grad_x, grad_W, grad_b_enc, grad_b_dec, None, None


# --------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------


def mse(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean squared error over the last two dimensions (images, pixels); x_hat may have a leading M."""
    return (x_hat - x).square().mean((-2, -1))


def pearson(x: Tensor, x_hat: Tensor) -> Tensor:
    """Pearson correlation between each image and its reconstruction, averaged over images.

    x [B, d_in], x_hat [..., B, d_in] → [...]. An image without variation correlates with
    nothing: it counts as 0 (scipy returns nan for it).
    """
    x = x - x.mean(-1, keepdim=True)
    x_hat = x_hat - x_hat.mean(-1, keepdim=True)
    lengths = x.norm(dim=-1) * x_hat.norm(dim=-1)
    return ((x * x_hat).sum(-1) / lengths.clamp_min(1e-8)).mean(-1)


def explained_variance(x: Tensor, x_hat: Tensor, mean: Tensor) -> Tensor:
    """1 - SSE / SSE(mean image), over all images and pixels together; `mean` is the training mean [d_in]."""
    return 1 - mse(x, x_hat) / mse(x, mean.expand_as(x))


@torch.no_grad()
def evaluate(model: TopKSAE, x: Tensor, mean: Tensor, chunk: int = 1000) -> dict[str, Tensor]:
    """Quality of every member on images x [n, d_in].

    Returns mse, pearson, explained_variance, dead_fraction (features that fire for no image
    of x), mean_active (features that fire for an image), each [M], and activity [M, d_sae]:
    the share of images for which a feature fires. A feature fires where its code is not 0.
    """
    M, n = model.n_members, len(x)
    sse, correlation = torch.zeros(2, M, device=x.device)
    fires = torch.zeros(M, model.d_sae, device=x.device)
    for part in x.split(chunk):
        values, indices = model.encode(part)
        x_hat = model.decode(values, indices)
        sse += mse(part, x_hat) * len(part)
        correlation += pearson(part, x_hat) * len(part)
        fires += count_fires(values, indices, model.d_sae)
    return {
        "mse": sse / n,
        "pearson": correlation / n,
        "explained_variance": 1 - sse / n / mse(x, mean.expand_as(x)),
        "dead_fraction": (fires == 0).float().mean(1),
        "mean_active": fires.sum(1) / n,
        "activity": fires / n,
    }


def report(trainer: Trainer, data: Images) -> tuple[dict, Tensor]:
    """Quality of what has been trained so far, for a file: epoch, step, and under `train` and `test` the metrics.

    Each metric has a number for each member; `matched_cosine` is one number, or None where
    there is one member. As many training images are evaluated as there are test images, so
    that dead fractions compare. Returns the entry, and the activity [M, d_sae] on test images.

    Raises SAEError where training has diverged.
    """
    x_test, mean = data.test.to(trainer.x.device), trainer.x.mean(0)
    entry = {"epoch": trainer.epoch, "step": trainer.step}
    for part, x in (("train", trainer.x[: len(x_test)]), ("test", x_test)):
        quality = evaluate(trainer.model, x, mean)
        trainer.require_finite(quality["mse"])
        names = ("mse", "pearson", "explained_variance", "dead_fraction")
        entry[part] = {name: quality[name].tolist() for name in names}
    features = trainer.model.features()
    cosine = matched_cosine(features) if len(features) > 1 else None  # JSON has no nan, which one member would give
    for part in ("train", "test"):
        entry[part]["matched_cosine"] = cosine
    return entry, quality["activity"]


def count_fires(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """How many of the B images each feature fires for, [M, d_sae] int64: its code is there and not 0."""
    counts = torch.zeros(len(indices), d_sae, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(1, indices.flatten(1), (values != 0).long().flatten(1))


def monitor_score(activity: Tensor, target: float = 0.0625) -> Tensor:
    """The reference system's re-initialisation score of each member: mean of (|activity - target| / target)³.

    activity [M, d_sae] is the share of a batch for which a feature fires; returns [M]. A
    feature that never fires adds 1 to the mean, one that fires for every image 3,375.
    """
    return ((activity - target).abs() / target).pow(3).mean(-1)


def match_features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Best one-to-one matching of two dictionaries [d_sae, d_in] (Hungarian algorithm, Kuhn 1955).

    Returns `order`, so that b[order] stands feature by feature beside a, and the cosine
    similarity of each pair, both [d_sae].
    """
    similarity = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    _, order = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    order = torch.from_numpy(order).to(a.device)
    return order, similarity.gather(1, order[:, None])[:, 0]


def matched_cosine(features: Tensor) -> float:
    """Mean cosine similarity of matched features over all pairs of members [M, d_sae, d_in]; nan for M = 1."""
    pairs = [(a, b) for i, a in enumerate(features) for b in features[:i]]
    return float(np.mean([match_features(a, b)[1].mean().item() for a, b in pairs])) if pairs else math.nan


def predict_initial_mse(energy: float, d_in: int, d_sae: int, k: int) -> float:
    """MSE of an untrained, orthogonally initialised top-k SAE, from order statistics alone.

    `energy` is the mean squared pixel, E‖x‖² / d_in (the MSE of the zero image). The
    d_sae pre-activations of an image are close to Gaussian, of variance ‖x‖² / max(d_in, d_sae).
    The k largest of them carry the share  q = t + τ φ(τ)  of their energy, with t = k / d_sae
    and τ the value that a standard Gaussian exceeds with probability t. The image comes back
    too faint, as q / c of itself (c: length of a row), with noise of energy q (1 - q) ‖x‖²;
    notebook 02 derives this. With d_sae ≤ d_in rows are orthonormal and there is no noise.
    """
    t = k / d_sae
    threshold = norm.isf(t)
    q = t + (threshold * norm.pdf(threshold) if t < 1 else 0)
    if d_sae <= d_in:
        return energy * (1 - q * d_sae / d_in)
    c = math.sqrt(d_in / d_sae)
    return energy * ((1 - q / c) ** 2 + q * (1 - q))


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. Raises SAEError where one makes no sense.

    `learning_rate` and `k` may be tuples with a value for each member: one run then compares them.
    """

    name: str
    decoder_bias: bool  # train b_dec, from the mean image on
    learning_rate: float | tuple[float, ...]
    decay: float  # in this last share of the steps the learning rate falls to 0
    reinit: str  # what starts anew during training: "none", "members" (reference monitor) or rare "features"
    reinit_until: float = 1.0  # share of the steps after which no rare feature starts anew
    decay_power: float = 1.0  # 1: falls along a line; 0.5: fast at first, as 1 - √
    row_moments: bool = False  # one second moment of Adam for a row of W, not one for each weight
    relu: bool = False
    d_sae: int = 1024
    k: int | tuple[int, ...] = 50
    n_members: int = 5
    epochs: int = 5
    batch_size: int = 128
    consistency_weight: float = 0.01
    consistency_warmup: int = 100  # steps
    consistency_until: float = 1.0  # share of the steps after which its weight falls to 0 along a line
    match_every: int = 100  # steps between two matchings of the members
    precision: str = "auto"  # of the large products: float32, float16, bfloat16; auto: float16 on CUDA, else float32
    seed: int = 0

    def __post_init__(self):
        if self.reinit not in ("none", "members", "features"):
            raise SAEError(f"reinit is {self.reinit!r}: choose none, members or features")
        if self.precision not in ("auto", "float32", "float16", "bfloat16"):
            raise SAEError(f"precision is {self.precision!r}: choose auto, float32, float16 or bfloat16")
        for field in ("d_sae", "n_members", "epochs", "batch_size", "match_every"):
            if getattr(self, field) < 1:
                raise SAEError(f"{field} is {getattr(self, field)}: it must be at least 1")
        for rate in per_member("learning_rate", self.learning_rate, self.n_members):
            if not 0 < rate < math.inf:
                raise SAEError(f"learning_rate is {rate}: it must be above 0, for example 0.001")
        for k in per_member("k", self.k, self.n_members):
            if k < 1:
                raise SAEError(f"k is {k}: it must be at least 1")
            if k > self.d_sae:
                raise SAEError(f"k = {k} features cannot be kept of d_sae = {self.d_sae}: choose a smaller k")
        if not 0 <= self.consistency_weight < math.inf:
            raise SAEError(f"consistency_weight is {self.consistency_weight}: it must be 0 or above, for example 0.01")
        if not 0 <= self.decay <= 1:
            raise SAEError(f"decay is {self.decay}: it is a share of the steps, from 0 to 1")
        if not 0 < self.decay_power < math.inf:
            raise SAEError(f"decay_power is {self.decay_power}: it must be above 0, for example 1")
        for field in ("reinit_until", "consistency_until"):
            if not 0 <= getattr(self, field) <= 1:
                raise SAEError(f"{field} is {getattr(self, field)}: it is a share of the steps, from 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise SAEError(f"seed is {self.seed}: it must be from 0 to {2**32 - 1}")


RECIPES = {
    "reference": Recipe("reference", decoder_bias=False, learning_rate=1e-3, decay=0, reinit="members"),
    "improved": Recipe(
        "improved",
        decoder_bias=True,
        learning_rate=2e-3,
        decay=0.3,
        decay_power=0.5,
        reinit="features",
        reinit_until=0.85,
        row_moments=True,
        consistency_until=0.7,
    ),
}


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises SAEError where `name` is not to be had."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in has.items() if there)
    if not has.get(name, False):
        raise SAEError(f"device {name!r} is not available here: choose auto, or one of {[d for d in has if has[d]]}")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` takes float16 on CUDA, float32 elsewhere. Raises SAEError where the device does not train in `name`."""
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    if name not in {"cuda": ("float32", "float16", "bfloat16"), "cpu": ("float32", "bfloat16")}.get(
        device.type, ("float32",)
    ):
        raise SAEError(f"precision {name} is not for device {device.type}: choose auto or float32")
    return getattr(torch, name)


class Trainer:
    """Trains the members of an ensemble on the same batches; holds all that training remembers.

    Args:
        recipe: the settings.
        x: training images [n, d_in], kept whole on `device`.

    Attributes: `model`, `parts` (for each member its slices of the trained parameters, sharing
    their memory), `optimizer` (Adam, a group for each member), `scaler` (of the loss, for float16),
    `step` (steps taken), `order` (this epoch's order of the images), `generator` (draws the
    next one), `fires` [M, d_sae] (for how many of the `images_seen` each feature fired; a
    difference between two steps is the activity in that window), `reinits` (pairs of a step
    and how many features of each member started anew after it) and `history`, which has one
    entry for every `log_every` steps, measured before the step: step; consistency (the
    consistency loss, 0 where it is off); and, one number per member, learning_rate,
    dead_fraction (features that fired for none of the last 100 to 200 batches, or of all so
    far) and, on the training batch, mse and pearson.

    Raises SAEError where the device cannot train in the recipe's precision.
    """

    log_every = 10
    capture = True  # on CUDA, replay the step as one CUDA graph: it is bound by the launches of its kernels
    monitor_threshold = 100.0  # of the reference system; see `monitor_score`
    look_every = 100  # steps between two looks at which features have fired
    share_every = 10  # steps between two sharings of Adam's second moment within a row
    rare = 0.03  # a feature starts anew that has since fired less than this often, where 1 is the mean feature

    def __init__(self, recipe: Recipe, x: Tensor, device: torch.device | str = "cpu"):
        self.recipe = recipe
        self.x = x.to(device)
        self.precision = pick_precision(recipe.precision, self.x.device)
        # Distinct for distinct (seed, member), so that two ensembles share no member.
        seeds = np.random.SeedSequence(recipe.seed).generate_state(recipe.n_members).tolist()
        self.model = TopKSAE(
            x.shape[1], recipe.d_sae, recipe.k, seeds,
            b_dec=x.mean(0) if recipe.decoder_bias else None, relu=recipe.relu,
        ).to(self.x)  # fmt: skip
        # Each member's part of each parameter: views, so that one member's Adam can start again alone.
        self.parts = [
            {name: p.detach()[m].requires_grad_() for name, p in self.model.named_parameters() if p.requires_grad}
            for m in range(recipe.n_members)
        ]
        on_cuda = self.x.device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            # A captured step reads the learning rates where they lie, so on CUDA they are tensors.
            [{"params": list(part.values()), "lr": self.x.new_zeros(()) if on_cuda else 0.0} for part in self.parts],
            fused=on_cuda or self.x.device.type == "cpu", capturable=on_cuda,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.x.device.type, enabled=self.precision == torch.float16)
        self.weight = self.x.new_zeros(())  # of the consistency loss, in this step
        self.graph = None  # the captured step; see `replay`
        self.plain_steps = 0  # full batches that went before its capture
        self.fires = torch.zeros(recipe.n_members, recipe.d_sae, dtype=torch.int64, device=self.x.device)
        self.fires_at_last_look, self.fires_at_look_before = self.fires.clone(), self.fires.clone()
        self.reinits: list[tuple[int, list[int]]] = []
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.step = 0
        self.history: dict[str, list] = {
            name: [] for name in ("step", "consistency", "learning_rate", "dead_fraction", "mse", "pearson")
        }

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.x) / self.recipe.batch_size)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.recipe.epochs

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.steps_per_epoch

    @property
    def images_seen(self) -> int:
        within = self.step % self.steps_per_epoch * self.recipe.batch_size  # the last batch may be smaller
        return self.epoch * len(self.x) + within

    @property
    def consistent(self) -> bool:
        return self.recipe.n_members > 1 and self.recipe.consistency_weight > 0

    def learning_rates(self) -> list[float]:
        """Each member's learning rate in this step.

        With decay_power 1/2 it falls as 1 - √ (Hägele et al. 2024), and most of the decay is at a low rate.
        """
        left = 1 - self.step / self.total_steps
        share = 1 - (1 - min(1.0, left / self.recipe.decay)) ** self.recipe.decay_power if self.recipe.decay else 1.0
        return [rate * share for rate in per_member("learning_rate", self.recipe.learning_rate, len(self.parts))]

    def consistency_share(self) -> float:
        """The share of the consistency weight that is left late in training, when members settle on their own."""
        fall = 1 - self.recipe.consistency_until
        return min(1.0, (1 - self.step / self.total_steps) / fall) if fall else 1.0

    def run(self, progress: bool = True, after_epoch: Callable[[Trainer], None] | None = None) -> Trainer:
        """Train to the end and return itself; `after_epoch(trainer)` is called at the end of each epoch."""
        with tqdm(
            total=self.total_steps, initial=self.step, unit="step", mininterval=0.5, disable=not progress, leave=False
        ) as bar:  # fmt: skip
            while self.step < self.total_steps:
                self.train_step()
                if self.history["step"][-1] == self.step - 1:
                    loss, correlation = (np.mean(self.history[name][-1]) for name in ("mse", "pearson"))
                    bar.set_postfix(loss=f"{loss:.4f}", pearson=f"{correlation:.4f}", refresh=False)
                bar.update()
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
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates()):
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        warm = min(1.0, self.step / max(1, recipe.consistency_warmup))
        self.weight.fill_(recipe.consistency_weight * 0.5 * (1 - math.cos(math.pi * warm)) * self.consistency_share())
        captured = self.capture and x.device.type == "cuda" and len(x) == recipe.batch_size
        x_hat, fires, consistency = (self.replay if captured else self.update)(x)
        if recipe.row_moments and self.step % self.share_every == 0:
            self.share_second_moments()

        if self.step % self.log_every == 0:
            dead = (self.fires == self.fires_at_look_before).float().mean(1)
            losses = mse(x, x_hat)
            self.require_finite(losses)
            quality = (values.tolist() for values in (dead, losses, pearson(x, x_hat)))
            entry = (self.step, float(consistency), self.learning_rates(), *quality)
            for name, value in zip(self.history, entry, strict=True):
                self.history[name].append(value)
        self.step += 1
        if recipe.reinit == "members":
            score = monitor_score(fires / len(x))
            for m in (score > self.monitor_threshold).nonzero()[:, 0].tolist():
                self.restart_member(m)
        if self.step % self.look_every == 0:
            if recipe.reinit == "features":
                self.reinit_rare_features()
            self.fires_at_look_before, self.fires_at_last_look = self.fires_at_last_look, self.fires.clone()

    def update(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The part of a step that never waits for the device.

        Returns reconstructions [M, B, d_in], how often each feature fired [M, d_sae], and
        the consistency loss, all from before the step.
        """
        low = self.precision != torch.float32
        with torch.autocast(x.device.type, self.precision) if low else contextlib.nullcontext():
            x_hat, values, indices = self.model.autoencode(x)  # [M, B, d_in], two of [M, B, k]
        fires = count_fires(values, indices, self.recipe.d_sae)  # [M, d_sae]
        self.fires += fires
        losses = self.losses(x, x_hat)  # [M]
        self.model.zero_grad()
        self.scaler.scale(losses.sum()).backward()  # a member's loss reaches that member's parameters only
        for m, part in enumerate(self.parts):
            for name, view in part.items():
                view.grad = getattr(self.model, name).grad[m]
        self.scaler.unscale_(self.optimizer)  # before the consistency loss, whose gradient was never scaled
        consistency = add_consistency_gradient(self.model.W, self.weight) if self.consistent else torch.zeros(())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return x_hat.detach(), fires, consistency

    def replay(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`update` as a CUDA graph: recorded once, after a few plain steps, then launched as a whole."""
        if self.plain_steps < 3:  # by then optimizer and scaler hold their state
            self.plain_steps += 1
            return self.update(x)
        if self.graph is None:
            self.captured_x, graph = x.clone(), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.captured = self.update(self.captured_x)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                print(f"The step cannot be captured ({reason}): training goes on, more slowly.", file=sys.stderr)
                self.capture = False
                scaler = torch.amp.GradScaler(x.device.type, enabled=self.scaler.is_enabled())
                scaler.load_state_dict(self.scaler.state_dict())  # without the half step that was recorded
                self.scaler = scaler
                return self.update(x)
            self.graph = graph
        self.captured_x.copy_(x)
        self.graph.replay()
        return self.captured

    def losses(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """What each member minimises, [M], besides the consistency loss."""
        return mse(x, x_hat)

    def require_finite(self, losses: Tensor) -> None:
        """Raise SAEError where training has diverged."""
        if not losses.isfinite().all():
            rate = self.recipe.learning_rate
            raise SAEError(f"the loss is no longer a number (step {self.step}): choose a learning_rate below {rate}")

    @torch.no_grad()
    def restart_member(self, m: int) -> None:
        """Give member m new weights, biases as at the start, and an Adam that remembers nothing."""
        part = self.parts[m]
        part["W"].copy_(initial_weights(self.recipe.d_sae, self.x.shape[1], self._new_seed(m)))
        part["b_enc"].zero_()
        if self.recipe.decoder_bias:
            part["b_dec"].copy_(self.x.mean(0))
        for view in part.values():
            for tensor in self.optimizer.state.get(view, {}).values():
                tensor.zero_()  # in place, where a captured step finds them
        self._note_reinit(m, self.recipe.d_sae)

    @torch.no_grad()
    def share_second_moments(self) -> None:
        """Give the weights of a row of W one second moment of Adam, their mean (after Adam-mini: Zhang et al. 2024).

        Adam lengthens the steps of weights with small gradients: here those of the border's
        pixels, which carry little but noise. With one moment a feature moves along its gradient.
        In ten steps of β2 = 0.999 the weights' moments part by a hundredth only.
        """
        for part in self.parts:
            if state := self.optimizer.state.get(part["W"]):
                state["exp_avg_sq"].copy_(state["exp_avg_sq"].mean(1, keepdim=True).expand_as(part["W"]))

    @torch.no_grad()
    def reinit_rare_features(self) -> None:
        """Start anew each member's features that fired too rarely since the last look, except late in training.

        With the consistency loss a feature belongs to its partners in the other members, which
        would pull it away from any new direction of its own: it takes that of the living ones.
        """
        window = self.fires - self.fires_at_last_look
        if self.step > self.recipe.reinit_until * self.total_steps:
            return  # at a low learning rate, a new feature would not be learnt to the end
        alive = window >= self.rare * window.double().mean(1, keepdim=True)  # [M, d_sae]
        for m in range(self.recipe.n_members):
            rare = (~alive[m]).nonzero()[:, 0]
            if len(rare):
                partners = F.normalize(self.model.W[:, rare], dim=-1) * alive[:, rare, None]
                self.reinit_features(m, rare, partners.sum(0) if self.consistent else None)
                alive[m] = True  # a partner for the members that follow

    @torch.no_grad()
    def reinit_features(self, m: int, features: Tensor, directions: Tensor | None = None) -> None:
        """Let n features of member m, given by index, start anew; nothing else changes.

        They take the `directions` [n, d_in]; without them, or where a row is zero, they point at
        what the member misses. Length of the row and b_enc are those of the mean of the other
        features. So is Adam's second moment: starting it at 0, long after the first step,
        would make the feature's first hundred steps up to 6 times too long.

        Raises SAEError where the features are all that the member has.
        """
        part, n = self.parts[m], len(features)
        others = torch.ones(self.recipe.d_sae, dtype=torch.bool, device=self.x.device)
        others[features] = False
        if not others.any():
            raise SAEError(f"all {n} features of member {m} cannot start anew like the others: use restart_member")
        new = self.missed_directions(m, n)
        if directions is not None:
            new = torch.where(directions.any(1, keepdim=True), directions, new)
        part["W"][features] = F.normalize(new, dim=1) * part["W"][others].norm(dim=1).mean()
        part["b_enc"][features] = part["b_enc"][others].mean()
        for name in ("W", "b_enc"):
            if state := self.optimizer.state.get(part[name]):
                state["exp_avg"][features] = 0
                state["exp_avg_sq"][features] = state["exp_avg_sq"][others].mean(0)
        self._note_reinit(m, n)

    @torch.no_grad()
    def missed_directions(self, m: int, n: int) -> Tensor:
        """What n images that member m reconstructs badly have in common with others, [n, d_in].

        After Bricken et al. 2023, who take the residual of one image. Here it is averaged with
        those that point the same way (weight: cosine to the power 8).
        """
        generator = torch.Generator().manual_seed(self._new_seed(m))
        x = self.x[torch.randperm(len(self.x), generator=generator)[: max(256, 2 * n)].to(self.x.device)]
        W, b_enc, b_dec = (getattr(self.model, name)[m : m + 1] for name in ("W", "b_enc", "b_dec"))
        k = per_member("k", self.recipe.k, self.recipe.n_members)[m]
        residuals = x - _Autoencode.apply(x, W, b_enc, b_dec, k, self.recipe.relu)[0][0]
        worst = residuals.norm(dim=1).argsort(descending=True)[torch.arange(n, device=x.device) % len(x)]
        directions = F.normalize(residuals, dim=1)
        return (directions[worst] @ directions.T).relu().pow(8) @ residuals

    def _new_seed(self, m: int) -> int:
        # From the step, not from a generator: training on draws the same batches with and without.
        return int(np.random.SeedSequence([self.recipe.seed, self.step, m]).generate_state(1)[0])

    def _note_reinit(self, m: int, n: int) -> None:
        if not self.reinits or self.reinits[-1][0] != self.step:
            self.reinits.append((self.step, [0] * self.recipe.n_members))
        self.reinits[-1][1][m] += n

    @torch.no_grad()
    def align_members(self) -> None:
        """Reorder each member's features so that feature i means the same in every member.

        A member's order of features is arbitrary, so it can be chosen; the optimizer's
        moments move with the features. Each member is matched to the sum of those before it.
        """
        features = self.model.features()
        self.require_finite(features)
        total = features[0].clone()
        for m in range(1, self.recipe.n_members):
            order, _ = match_features(total, features[m])
            total += features[m, order]
            for counts in (self.fires, self.fires_at_last_look, self.fires_at_look_before):
                counts[m] = counts[m, order]
            for name in ("W", "b_enc"):
                part = self.parts[m][name]
                state = self.optimizer.state.get(part, {})
                for tensor in (part, state.get("exp_avg"), state.get("exp_avg_sq")):
                    if tensor is not None:
                        tensor.copy_(tensor[order])

    def state_dict(self) -> dict:
        """All that is needed to go on training bit for bit as if it had never stopped."""
        return {
            "recipe": asdict(self.recipe), "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(), "order": self.order.cpu(), "step": self.step,
            "fires": self.fires, "fires_at_last_look": self.fires_at_last_look,
            "fires_at_look_before": self.fires_at_look_before, "reinits": self.reinits, "history": self.history,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state`, which must come from the same recipe and images."""
        state = copy.deepcopy(state)  # training on must not change what was given
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].to(self.x.device)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.graph = None  # it would work on the tensors of before
        self.generator.set_state(state["generator"])
        self.order = state["order"].to(self.x.device)
        self.step = state["step"]
        for name in ("fires", "fires_at_last_look", "fires_at_look_before"):
            setattr(self, name, state[name].to(self.x.device))
        self.reinits = state["reinits"]
        self.history = state["history"]


@torch.no_grad()
def add_consistency_gradient(W: Tensor, weight: float | Tensor) -> Tensor:
    """Add weight · ∇C to W.grad and return C, for members whose features are aligned.

    C = mean over pairs of members and over features of 1 - cosine similarity (after Marks
    et al. 2024). With f the unit-length features and s their sum over members, the mean
    cosine over the M (M-1) / 2 pairs is (‖s‖² - M) / (M (M-1)), so no pair is ever visited.
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


# --------------------------------------------------------------------------------------
# Pictures, tables, files
# --------------------------------------------------------------------------------------


# Diverging in hue, but lightness rises all the way: the sign is readable without colours.
# Few steps, for small files.
SIGNED = LinearSegmentedColormap.from_list("signed", ["#0b2a5b", "#979797", "#ffe08a"], N=33)


def draw_images(
    axis: Axes, images: Tensor, shape: tuple[int, int], columns: int = 10, signed=False, labels: Sequence[str] = ()
) -> None:
    """Draw images [n, d_in] in rows, 2 pixels apart, on an axis that shows nothing else, with labels above them.

    Grey from 0 to 1; `signed`: 0 is mid-grey, each image on its own scale. All are one array:
    drawing that is a hundred times faster than drawing n of them.
    """
    rows, (height, width), room = math.ceil(len(images) / columns), shape, 9 if len(labels) else 0
    images = images.detach().float().cpu()
    if signed:
        images = images / images.abs().amax(1, keepdim=True).clamp_min(1e-8)
    canvas = np.full((rows, room + height + 2, columns, width + 2), np.nan)
    for i, image in enumerate(images):
        canvas[i // columns, room : room + height, i % columns, :width] = image.view(shape)
    colours = dict(cmap=SIGNED, vmin=-1) if signed else dict(cmap="gray", vmin=0)
    canvas = canvas.reshape(rows * (room + height + 2), columns * (width + 2))[:-2, :-2]
    axis.imshow(canvas, vmax=1, interpolation="nearest", **colours)
    axis.axis("off")
    for i, text in enumerate(labels):
        at = i % columns * (width + 2) + width / 2, i // columns * (room + height + 2) + room - 2
        axis.text(*at, text, ha="center", fontsize=7)


def show_images(
    images: Tensor, data: Images, title: str, titles: Sequence[str] = (), columns: int = 10, signed=False, size=0.78
) -> Figure:
    """A grid of images [n, d_in], each `size` inches wide: grey from 0 to 1, or `signed`, each on its own scale."""
    rows, room = math.ceil(len(images) / columns), 9 if len(titles) else 0
    height = size / (data.shape[1] + 2) * (rows * (data.shape[0] + room + 2) - 2)
    figure = plt.figure(figsize=(size * columns, height + 0.35), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    draw_images(axis, images, data.shape, columns, signed, titles)
    figure.suptitle(f"{data.name}: {title}", fontsize=9, y=1 - 0.06 / figure.get_figheight(), va="top")
    return figure


def plot_reconstructions(model: TopKSAE, data: Images) -> Figure:
    """Test images above member 0's reconstructions: the best, median and worst four by Pearson of the first 2,000."""
    x = data.test[:2000].to(model.W.device)  # so few, because the picture is logged after each epoch
    first = (model.W[:1], model.b_enc[:1], model.b_dec[:1], per_member("k", model.k, model.n_members)[0], model.relu)
    with torch.no_grad():
        x_hat = torch.cat([_Autoencode.apply(part, *first)[0][0] for part in x.split(1000)])
    scores = pearson(x[:, None], x_hat[:, None])
    ranked, middle = scores.argsort(descending=True), len(x) // 2
    chosen = torch.cat([ranked[:4], ranked[middle - 2 : middle + 2], ranked[-4:]])
    titles = [f"digit {data.test_labels[i]}" for i in chosen.tolist()] + [f"{r:.3f}" for r in scores[chosen].tolist()]
    return show_images(
        torch.cat([x[chosen], x_hat[chosen]]), data,
        f"best, median, worst four of {len(x):,} test images; below, reconstructions with their Pearson", titles,
        columns=12,
    )  # fmt: skip


def plot_training(history: dict[str, list], data: Images, epochs: Sequence[dict] = ()) -> Figure:
    """Loss and Pearson on training batches over steps, a line per member; dots: test images after each epoch.

    `epochs` has for each epoch its last `step` and, under `test`, `mse` and `pearson` per member.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), facecolor="white")
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.15, top=0.91, wspace=0.2)  # a layout engine takes longer
    for axis, name, label in zip(axes, ("mse", "pearson"), ("MSE (per pixel)", "Pearson correlation")):
        axis.plot(history["step"], history[name], color="tab:blue", alpha=0.5, linewidth=0.8)
        axis.plot([], [], color="tab:blue", label="training batches, a line per member")
        if epochs:
            steps, means = [e["step"] for e in epochs], [np.mean(e["test"][name]) for e in epochs]
            axis.plot(steps, means, "ko", markersize=5, label="test images, mean of members")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")  # powers of ten would need more room than there is
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(fontsize=8)
    axes[0].set_title(f"{data.name}: loss, last batch {np.mean(history['mse'][-1]):.4f}", fontsize=10)
    axes[1].set_title(f"{data.name}: Pearson, last batch {np.mean(history['pearson'][-1]):.4f}", fontsize=10)
    return figure


def plot_features(model: TopKSAE, activity: Tensor, data: Images, n: int = 80) -> Figure:
    """Member 0's features at n evenly spaced ranks of use, most used first."""
    ranked = activity[0].argsort(descending=True).cpu()
    chosen = ranked[torch.linspace(0, len(ranked) - 1, min(n, len(ranked))).long()]
    dead = (activity[0] == 0).float().mean().item()
    return show_images(
        model.features()[0].cpu()[chosen], data,
        f"{len(chosen)} of {model.d_sae:,} features by use; light adds ink, dark removes it; {dead:.1%} dead",
        signed=True,
    )  # fmt: skip


def plot_run(trainer: Trainer, data: Images, epochs: Sequence[dict], activity: Tensor) -> dict[str, Figure]:
    """The three pictures of a run by name; `epochs` and `activity` come from `report`. The caller closes them."""
    return {
        "reconstructions": plot_reconstructions(trainer.model, data),
        "training_metrics": plot_training(trainer.history, data, epochs),
        "sae_features": plot_features(trainer.model, activity, data),
    }


def save_pictures(figures: dict[str, Figure], folder: str | Path) -> None:
    """Write each figure to `folder` under its name, as PNG."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = Path(folder) / f"{name}.png"
        write_atomically(path, lambda temporary, figure=figure: figure.savefig(temporary, dpi=90))


def save_run(trainer: Trainer, data: Images, epochs: Sequence[dict], seconds: float, folder: str | Path) -> None:
    """Write what a finished run leaves to `folder`: `sae.safetensors` and, after it, `metrics.json`.

    `epochs` are the entries of `report`; `seconds` is the time of training alone.
    """
    recipe, folder = trainer.recipe, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "data": data.name,
        "recipe": asdict(recipe),
        "epochs": epochs,
        "final": {part: epochs[-1][part] for part in ("train", "test")},
        "reinitialised_features": [sum(counts[m] for _, counts in trainer.reinits) for m in range(recipe.n_members)],
        "train_images_evaluated": min(len(data.train), len(data.test)),
        "seconds": seconds,
        "device": trainer.x.device.type if trainer.x.device.type != "cuda" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seed": recipe.seed,
    }
    trainer.model.save(folder / "sae.safetensors", data=data.name, recipe=recipe.name)
    write_atomically(folder / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=1)))


def find_run(recipe: Recipe, data: Images) -> Path | None:
    """The newest finished run below the project's `runs` with this very recipe and data, or None.

    A run older than this module was trained by other code, and is passed over. Raises
    SAEError where a run's metrics.json cannot be read.
    """
    runs = project_folder() / "runs"
    wanted = json.loads(json.dumps({"data": data.name, "recipe": asdict(recipe)}))  # JSON knows no tuples
    for path in sorted(runs.glob("*/metrics.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        if path.stat().st_mtime < Path(__file__).stat().st_mtime:
            return None
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SAEError(f"{path} is damaged ({error}): delete {path.parent}") from error
        if all(metrics.get(key) == value for key, value in wanted.items()):
            return path.parent
    return None


def log_epoch(run, trainer: Trainer, entry: dict, figures: dict[str, Figure]) -> None:
    """Log an epoch to a Weights & Biases run: training every `log_every` steps, the entry of `report`, pictures.

    Numbers are means over the members. Training has a matched cosine where a consistency loss
    keeps the members aligned; the test images have it always.
    """
    from wandb import Image

    history = trainer.history
    for i, step in enumerate(history["step"]):
        if step >= entry["step"] - trainer.steps_per_epoch:
            values = {f"train/{name}": float(np.mean(values[i])) for name, values in history.items()}
            if trainer.consistent:
                values["train/matched_cosine"] = 1 - history["consistency"][i]
            run.log(values, step=step)
    evaluated = {f"test/{name}": float(np.mean(value)) for name, value in entry["test"].items() if value is not None}
    run.log(evaluated | {name: Image(figure) for name, figure in figures.items()}, step=entry["step"])


def show(figure: Figure, data: Images) -> None:
    """Show a figure of a notebook, with the name of the data in its corner."""
    figure.supxlabel(data.name, x=0.995, ha="right", fontsize=7, color="dimgray")  # the layout keeps room for it
    plt.show()


def table(header: Sequence[str], rows: Iterable[Sequence], data: Images) -> None:
    """Show a small table, as Markdown in a notebook, with the name of the data; floats get four decimals."""
    from IPython.display import Markdown, display

    def line(cells):
        texts = (f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells)
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    lines = [line(header), line(["---"] * len(header)), *map(line, rows)]
    display(Markdown("\n".join([*lines, "", f"*Data: {data.name}*"])))


def stored_results(name: str) -> dict:
    """Results of a benchmark, benchmarks/results/<name>.json. Raises SAEError where the file is not there."""
    for folder in (_PROJECT / "benchmarks" / "results", Path(sys.prefix) / "share" / "mnist-sae", Path()):
        path = folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    raise SAEError(f"{name}.json is not here: put the project's benchmarks/results/{name}.json beside the notebook")


def check_claims(claims: Iterable[tuple[str, float, float, float]], data: Images) -> None:
    """Show claim, measured value, accepted range (both ends included) and verdict.

    Each claim is (text, measured, low, high). Raises AssertionError where one fails. On
    data that is not MNIST nothing is checked, and the table says so.
    """
    rows, failed = [], []
    for text, measured, low, high in claims:
        holds = low <= measured <= high
        verdict = ("holds" if holds else "**FAILS**") if data.is_mnist else "not checked (not MNIST)"
        rows.append((text, f"{measured:.4g}", f"{low:g} to {high:g}", verdict))
        if data.is_mnist and not holds:
            failed.append(f"{text}: measured {measured:.4g}, accepted {low:g} to {high:g}")
    table(("claim", "measured", "accepted", "verdict"), rows, data)
    if failed:
        raise AssertionError("; ".join(failed))


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, then rename: the file is whole or not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
