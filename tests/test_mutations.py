"""Files damaged or forged at random: each is read rightly or refused in one line, in little time and memory; and
properties of the numerical core that hold for any input.

A failure names the seed: `mutant(original, seed)` is the file that did it. With MUTANTS=100000 in the environment
it tries more.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import json
import math
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FILES, TEST_IMAGES, TRAIN_IMAGES, small_arrays, write_small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import mnist_sae_train as cli
import sae_helpers as sae

MUTANTS = int(os.environ.get("MUTANTS", 10_000))  # of each kind
SECONDS, MEGABYTES = 20, 200  # for one of them; memory for all

# Mutants

NUMBERS = (0, 1, 2, 8, 9, 127, 128, 254, 255)
HOSTILE = (
    *(
        None,
        True,
        "",
        "x",
        "0",
        "-1",
        "1e999",
        "٣",
        "\0",
        [],
        {},
        [[]],
        -1,
        0,
        1,
        2,
        3,
        0.5,
        2**31,
        2**63,
        2**64,
        10**40,
    ),
    *("F64", "F16", "I64", "BOOL", "[" * 500, 1e308, float("nan"), float("inf"), [0, 2**60], [2**60, 0], [8, 8]),
)


def mutant(original: bytes, seed: int) -> bytes:
    """One to three random changes; most of them in the first bytes, where the structure is described."""
    draw, content = random.Random(seed), bytearray(original)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        n = max(1, min(len(content), draw.choice((8, 64, 1024, len(content)))))
        at, length = draw.randrange(n), draw.choice((1, 1, 2, 4, 8, 100))
        match draw.randrange(8):
            case 0:
                content[at : at + 1] = [content[at] ^ 1 << draw.randrange(8)] if content else b""
            case 1:
                content[at : at + 1] = bytes([draw.choice(NUMBERS)])
            case 2:
                content[at : at + length] = draw.randbytes(length)
            case 3:
                del content[at : at + length]
            case 4:
                content[at:at] = draw.randbytes(length)
            case 5:
                content[at:at] = content[at : at + length]
            case 6:
                source = draw.randrange(n)
                content[at : at + length] = content[source : source + length]
            case 7:
                del content[draw.randrange(len(content) + 1) :]
    return bytes(content)


def forgery(original: bytes, seed: int) -> bytes:
    """A safetensors file with one or two hostile values in its header, or in JSON that lies in its metadata."""
    draw, end = random.Random(seed), 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:end])
    inner = "state" in header.get("__metadata__", {}) and draw.random() < 0.7
    tree = json.loads(header["__metadata__"]["state"]) if inner else header
    for _ in range(draw.choice((1, 1, 2))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = draw.choice(list(keys))
            if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
                node = node[key]
                continue
            what = draw.random()
            if what < 0.15 and isinstance(node, dict):
                node[draw.choice(("x", "W", "A", "k", "step", "__metadata__"))] = node.pop(key)
            elif what < 0.3:
                del node[key]
            else:
                node[key] = copy.deepcopy(draw.choice(HOSTILE))
            break
    if inner:
        header["__metadata__"]["state"] = json.dumps(tree)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + original[end:]


def either(original: bytes, seed: int) -> bytes:
    return (forgery if seed % 2 else mutant)(original, seed)


@contextlib.contextmanager
def within_limits():
    """Neither hangs nor takes memory out of proportion."""

    def too_long(*_):
        raise AssertionError(f"a mutant took more than {SECONDS} s")

    measured = Path("/proc/self/clear_refs").exists()  # Linux
    before = signal.signal(signal.SIGALRM, too_long)
    if measured:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        start = peak()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not measured or peak() - start < MEGABYTES


def peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024


def try_mutants(path: Path, change, read, check, seeds) -> None:
    """Each is refused in one line that names it, or `check(content)` says whether what `read` returns is right."""
    original, refused, accepted = path.read_bytes(), 0, 0
    print(f"{path.name}: seeds {seeds.start} to {seeds.stop}")
    with within_limits():
        for seed in seeds:
            content = change(original, seed)
            path.write_bytes(content)
            signal.alarm(SECONDS)
            try:
                found = read()
            except sae.SAEError as error:
                refused += 1
                assert "\n" not in str(error) and str(path.parent) in str(error), f"seed {seed}: {error}"
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
            else:
                accepted += 1
                assert check(found, content), f"seed {seed} was read wrongly"
    path.write_bytes(original)
    print(f"{refused:,} refused, {accepted:,} read")
    assert refused > len(seeds) / 10  # the mutants are no copies


def seeds_of(part: int, parts: int) -> range:
    return range(MUTANTS * part // parts, MUTANTS * (part + 1) // parts)


# Readers


@pytest.mark.parametrize("part, packed", [(0, False), (1, True)], ids=["plain", "gzipped"])
def test_mutants_of_a_data_set(tmp_path, monkeypatch, part, packed):
    arrays = {name: array.astype(np.uint8) for name, array in small_arrays().items()}
    whole = b"".join(array.tobytes() for array in arrays.values())
    monkeypatch.setattr(sae, "_SHA256", hashlib.sha256(whole).hexdigest())
    folder = write_small(tmp_path / "letters")
    seeds = seeds_of(part, 2)
    for i, name in enumerate(FILES):
        path = folder / name
        if packed:
            path = path.with_name(f"{name}.gz")
            path.write_bytes(gzip.compress((folder / name).read_bytes(), mtime=0))
            (folder / name).unlink()

        def right(data, content, name=name, i=i):
            found = [
                (data.train * 255).round().byte(),
                data.train_labels,
                data.test.mul(255).round().byte(),
                data.test_labels,
            ]
            got = b"".join(part.byte().numpy().tobytes() for part in found)
            # gzip carries a checksum; bytes of a plain file are what they are, but they are not MNIST any more.
            if packed or data.is_mnist:
                return got == whole and data.is_mnist
            start = 4 + 4 * content[3]
            return found[i].byte().numpy().tobytes() == content[start:] and got != whole

        quarter = range(seeds.start + i * len(seeds) // 4, seeds.start + (i + 1) * len(seeds) // 4)
        try_mutants(path, mutant, lambda: cli.load_idx(folder), right, quarter)


def test_mutants_of_mnist_are_mnist_or_refused(small_mnist):
    path = small_mnist / "MNIST" / "raw" / TEST_IMAGES
    expected = sae.load_mnist(small_mnist)

    def right(data, content):
        return data.is_mnist and data.test.equal(expected.test) and data.train.equal(expected.train)

    seeds = range(MUTANTS // 50)
    try_mutants(path, mutant, lambda: sae.load_mnist(small_mnist), right, seeds)


@pytest.mark.parametrize("promised", [100, 10**9])
def test_gzip_that_swells_is_not_unpacked(tmp_path, promised):
    folder = write_small(tmp_path / "letters")
    (folder / TRAIN_IMAGES).unlink()
    bomb = bytes([0, 0, 8, 3]) + np.array([promised // 100, 10, 10], ">i4").tobytes() + bytes(2 * 10**8)
    (folder / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress(bomb, 1))
    size = len(bomb)
    del bomb
    with (
        within_limits() if promised < size else contextlib.nullcontext(),
        pytest.raises(sae.SAEError, match="promises"),
    ):
        cli.load_idx(folder)


def test_mutants_of_a_checkpoint(tmp_path):
    recipe = sae.Recipe("improved", d_sae=10, k=3, n_members=2)
    model = sae.Trainer(recipe, torch.rand(20, 6, generator=torch.Generator().manual_seed(0))).model
    path = tmp_path / "sae.safetensors"
    model.save(path, "letters", "improved")

    def right(found, content):
        same = all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), model.state_dict().values()))
        same = same and (found.k, found.relu, found.state_dict().keys()) == (3, False, model.state_dict().keys())
        return same or b'"sha256"' not in content  # another writer need not give a checksum

    try_mutants(path, either, lambda: sae.TopKSAE.load(path), right, seeds_of(0, 1))


@pytest.fixture(scope="module")
def small_state(tmp_path_factory):
    """The folder of a run that was stopped within its second epoch."""
    folder = tmp_path_factory.mktemp("state")
    x = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    data = sae.Images(
        "letters", (2, 3), x, torch.zeros(20, dtype=torch.int64), x[:5], torch.zeros(5, dtype=torch.int64)
    )
    run = cli.Run(cli.FileTrainer(sae.Recipe("improved", d_sae=10, k=3, n_members=2, batch_size=8), data), data, folder)
    for _ in range(4):
        run.trainer.train_step()
        if run.trainer.step == 3:
            run.epochs.append(cli.report(run.trainer, data)[0])
    run.seconds, run.wandb_id = 1.5, "0123abcd"  # the same file in each run of the tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getppid", lambda: 1234)
        run.write_state()
    return folder, data


def restored(folder, data):
    state = cli.read_state(folder)
    run = cli.Run(cli.FileTrainer(state["recipe"], data), data, folder)
    run.restore(state)
    return run


def same_run(a, b):
    one, other = a.trainer.tensors(), b.trainer.tensors()
    return all(torch.equal(one[name], other[name]) for name in one) and all(
        [a.trainer.step == b.trainer.step, a.epochs == b.epochs, a.seconds == b.seconds, a.wandb_id == b.wandb_id]
    )


def test_mutants_of_a_state(small_state):
    folder, data = small_state
    expected = restored(folder, data)
    try_mutants(
        folder / cli.STATE, either, lambda: restored(folder, data), lambda run, _: same_run(run, expected),
        seeds_of(0, 1),
    )  # fmt: skip


def test_forged_states_whose_checksum_is_right(small_state):
    """An enemy knows the checksum too: what it then says may be another training, but is one that can go on."""
    folder, data = small_state
    path = folder / cli.STATE
    original = path.read_bytes()

    def sign(content, seed):
        from safetensors import safe_open

        content = forgery(content, seed)
        path.write_bytes(content)
        with contextlib.suppress(Exception), safe_open(path, framework="pt") as file:
            text = file.metadata()["state"]
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            save_file(tensors, path, {"state": text, "sha256": sae.checksum(text, tensors)})
        return path.read_bytes()

    def goes_on(run, _):
        with contextlib.suppress(sae.SAEError):
            run.trainer.train_step()
        return run.trainer.step <= run.trainer.total_steps + 1

    seeds = range(MUTANTS // 5)
    path.write_bytes(original)
    try_mutants(path, sign, lambda: restored(folder, data), goes_on, seeds)


@pytest.mark.parametrize("part, name", [(0, "rows.npy"), (1, "rows.safetensors")])
def test_mutants_of_rows(tmp_path, part, name):
    array = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float16)
    path = tmp_path / name
    np.save(path, array) if part == 0 else save_file({"rows": torch.from_numpy(array)}, path)

    def right(data, content):
        rows = torch.cat([data.train.float(), data.test])
        kind = data.train.numpy().dtype
        return (
            rows.isfinite().all()
            and rows.square().sum(1).isfinite().all()
            and np.frombuffer(content[-kind.itemsize * rows.numel() :], kind).astype("f4").tobytes()
            == rows.numpy().tobytes()
            and torch.allclose(data.mean, data.train.double().mean(0).float(), rtol=1e-5)
        ) or path.suffix == ".npy"  # what follows an array in .npy is ignored

    try_mutants(path, mutant if part == 0 else either, lambda: cli.load_rows(path), right, seeds_of(part, 2))


# Properties

sizes = st.integers(1, 9)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def images(seed, n, d_in):
    return torch.rand(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(seed, d_in, d_sae, k, members=2, **settings):
    """In float64, so that only wrong formulae differ."""
    torch.manual_seed(seed)
    model = sae.TopKSAE(d_in, d_sae, k, range(seed, seed + members), images(seed, 1, d_in)[0], **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


shapes = dict(seed=st.integers(0, 10**6), n=sizes, d_in=st.integers(2, 9), d_sae=sizes, share=st.floats(0, 1))


def k_of(share, d_sae):
    return 1 + round(share * (d_sae - 1))


@quick
@given(**shapes, encoder_map=st.booleans(), relu=st.booleans())
def test_order_of_features_and_length_of_decoder_rows_change_nothing(seed, n, d_in, d_sae, share, encoder_map, relu):
    x, k = images(seed, n, d_in), k_of(share, d_sae)
    model, other = (model_of(seed, d_in, d_sae, k, encoder_map=encoder_map, relu=relu) for _ in range(2))
    order = torch.randperm(d_sae)
    with torch.no_grad():
        other.W.copy_(model.W[:, order])
        other.b_enc.copy_(model.b_enc[:, order])
    torch.testing.assert_close(other(x), model(x))
    with torch.no_grad():
        values, indices = model.encode(x)
        x_hat = model.decode(values, indices)
        model.W.mul_(0.5 + torch.rand(2, d_sae, 1, dtype=torch.float64))
    torch.testing.assert_close(model.decode(values, indices), x_hat)


@quick
@given(**shapes, members=st.integers(1, 4))
def test_ensemble_equals_its_members(seed, n, d_in, d_sae, share, members):
    x, model = images(seed, n, d_in), model_of(seed, d_in, d_sae, k_of(share, d_sae), members)
    for m in range(members):
        alone = model_of(seed, d_in, d_sae, model.k, 1)
        with torch.no_grad():
            alone.W.copy_(model.W[m : m + 1])
            alone.b_enc.copy_(model.b_enc[m : m + 1])
        torch.testing.assert_close(alone(x)[0], model(x)[m])


@quick
@given(**shapes, encoder_map=st.booleans(), relu=st.booleans())
def test_fast_gradient_is_autograds(seed, n, d_in, d_sae, share, encoder_map, relu):
    x, found = images(seed, n, d_in), []
    for plain in (False, True):
        model = model_of(seed, d_in, d_sae, k_of(share, d_sae), encoder_map=encoder_map, relu=relu)
        x_hat = model.decode(*model.encode(x)) if plain else model(x)
        sae.mse(x, x_hat).sum().backward()
        found.append([x_hat.detach(), *(parameter.grad for parameter in model.parameters())])
    for fast, slow in zip(*found):
        torch.testing.assert_close(fast, slow)


@quick
@given(**shapes)
def test_all_features_kept_leave_out_nothing(seed, n, d_in, d_sae, share):
    x, model = images(seed, n, d_in), model_of(seed, d_in, d_sae, d_sae)
    values, indices = model.encode(x)
    assert indices.sort(-1)[0].equal(torch.arange(d_sae).expand(2, n, -1))
    torch.testing.assert_close(values, model.pre_activations(x).gather(-1, indices))


@quick
@given(seed=st.integers(0, 10**6), members=st.integers(2, 5), d_sae=sizes, d_in=st.integers(2, 9))
def test_fast_consistency_is_the_mean_over_pairs(seed, members, d_sae, d_in):
    weights = torch.randn(members, d_sae, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    W = torch.nn.Parameter(weights)
    features = torch.nn.functional.normalize(W, dim=-1)
    pairs = [(a, b) for a in range(members) for b in range(a)]
    plain = torch.stack([1 - (features[a] * features[b]).sum(-1).mean() for a, b in pairs]).mean()
    (gradient,) = torch.autograd.grad(0.3 * plain, W)
    W.grad = torch.zeros_like(W)
    torch.testing.assert_close(sae.add_consistency_gradient(W, 0.3), plain.detach())
    torch.testing.assert_close(W.grad, gradient)


@quick
@given(
    seed=st.integers(0, 10**6), n=sizes, d_in=st.integers(2, 9),
    gain=st.floats(0.01, 100), offset=st.floats(-100, 100),
)  # fmt: skip
def test_pearson_is_blind_to_gain_and_offset(seed, n, d_in, gain, offset):
    x, y = images(seed, n, d_in), images(seed + 1, n, d_in)
    torch.testing.assert_close(sae.pearson(x, gain * y + offset), sae.pearson(x, y), rtol=0, atol=1e-6)
    torch.testing.assert_close(sae.pearson(x, -y), -sae.pearson(x, y))
    assert sae.pearson(x, gain * x + offset).item() == pytest.approx(1, abs=1e-6)


@quick
@given(**shapes, batch=sizes)
def test_metrics_do_not_depend_on_the_size_of_a_batch(seed, n, d_in, d_sae, share, batch):
    x, model = images(seed, n, d_in), model_of(seed, d_in, d_sae, k_of(share, d_sae))
    mean = images(seed + 2, 1, d_in)[0]
    whole, parts = (sae.evaluate(model, x, mean, chunk=chunk) for chunk in (n, batch))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])
    assert whole["activity"].sum(1).tolist() == pytest.approx([model.k] * 2)


@quick
@given(seed=st.integers(0, 10**6), d_sae=sizes, d_in=st.integers(2, 9))
def test_matching_finds_a_dictionary_in_another_order(seed, d_sae, d_in):
    a = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
    b = a[torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))]
    for exact in (True, False):
        order, cosines = sae.match_features(a, b, exact)
        assert order.sort()[0].equal(torch.arange(d_sae))
        torch.testing.assert_close(cosines, torch.ones(d_sae))
        torch.testing.assert_close(b[order], a)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(1, 40), batch=st.integers(1, 50), d_sae=sizes, share=st.floats(0, 1), members=st.integers(1, 3))
def test_training_takes_batches_of_any_size(n, batch, d_sae, share, members):
    recipe = replace(
        sae.RECIPES["improved"], d_sae=d_sae, k=k_of(share, d_sae), n_members=members, batch_size=batch, epochs=2,
        decoder_bias=False,  # else one image alone is its own mean, and nothing fires
    )  # fmt: skip
    trainer = sae.Trainer(recipe, images(0, n, 5).float()).run(progress=False)
    assert trainer.step == 2 * math.ceil(n / batch)
    assert trainer.fires.sum(1).tolist() == [2 * n * recipe.k] * members
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
