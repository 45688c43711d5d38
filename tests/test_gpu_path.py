"""What happens on CUDA and on Apple's MPS, as far as it shows without either; what is left runs where CUDA is.

1. No tensor of a training is float64, which MPS does not have.
2. FakeTensorMode on "cuda": devices and kinds of numbers, and that a step waits for nothing.
3. Graphs, on a CPU, that record a step and replay it as CUDA's do.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import write_small
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mnist_sae_train as cli
import sae_helpers as sae

N, D_IN, STEPS = 100, 20, 16  # in batches of 32 each fourth is smaller
# Learning rates, and their mean, are the same in a tensor, which holds float32, and in a number of Python's.
PLAIN = sae.Recipe(
    "small", encoder_map=False, row_moments=False, selection_floor=0, learning_rate=2**-8, decay=0.5, d_sae=32, k=5,
    n_members=3, epochs=4, batch_size=32, consistency_weight=0.1, consistency_warmup=5, match_every=5,
    precision="float32",
)  # fmt: skip
FLOOR = dict(selection_floor=0.9, row_moments=True, encoder_map=True)
each = pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(decoder_bias=False),
        dict(n_members=1),
        dict(consistency_weight=0),
        dict(monitor=True),
        FLOOR,
        FLOOR | dict(k=(2, 5, 9), relu=True, learning_rate=(2**-10, 2**-8, 7 * 2**-10)),
    ],
    ids=["plain", "no bias", "one member", "free", "monitor", "improved", "own settings"],
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(steps=0, device="cpu", kind=cli.CapturedTrainer, **changes):
    """A small trainer after some steps, whose monitor restarts a member now and then."""
    one = kind(replace(PLAIN, **changes), draw(N, D_IN), device)
    one.memory, one.monitor_threshold = 0.5, 10.0
    return to_step(one, steps)


def to_step(one, step):
    while one.step < step:
        one.train_step()
    return one


def assert_identical(a, b):
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name
    assert a.step == b.step and a.restarts == b.restarts and a.scaler.state_dict() == b.scaler.state_dict()


def state_of(one):
    """As it comes out of a file."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in one.tensors().items()}, "step": one.step,
        "restarts": one.restarts, "scaler": one.scaler.state_dict(),
    }  # fmt: skip


# Float64


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)), func
        return out


class Elsewhere(Tensor):
    """Says that it lies on a GPU."""

    device = torch.device("cuda")


@pytest.fixture
def dense_products(monkeypatch):
    """A CPU takes the products that a GPU takes."""

    def dense(original):
        return lambda indices, weights, rows, *more: original(
            indices, weights, rows.as_subclass(Elsewhere), *more
        ).as_subclass(Tensor)

    for name in ("_gather_rows", "_row_products", "_scatter_rows"):
        monkeypatch.setattr(sae, name, dense(getattr(sae, name)))


@each
def test_training_holds_no_float64(changes, dense_products, tmp_path):
    data = cli.load_idx(write_small(tmp_path / "letters"))
    with NoFloat64():
        one = make(STEPS, kind=sae.Trainer, **changes)
        cli.report(sae.Trainer(replace(PLAIN, **changes), data.train), data)
        sae.matched_cosine(one.model.features())
    assert one.history["mse"] and all(parameter.dtype == torch.float32 for parameter in one.model.parameters())


# Tensors that only say that they lie on a GPU


class NoWaiting(TorchDispatchMode):
    """No tensor goes from one device to another; what needs a value (item, nonzero) raises in FakeTensorMode."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket._qualified_op_name in ("aten::_to_copy", "aten::copy_", "aten::index"):
            devices = {t.device.type for t in tree_leaves((out, args)) if isinstance(t, Tensor)}
            assert len(devices) == 1, f"{func} between {devices}"
        return out


@pytest.fixture
def on_fake_cuda(monkeypatch):
    """FakeTensorMode, and stand-ins for what wants a device that is there: autograd's engine, Adam, and `to`."""
    context = SimpleNamespace(mark_non_differentiable=lambda *_: None)
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)

    def apply(*given):
        context.given = given
        context.needs_input_grad = [isinstance(t, Tensor) and t.requires_grad for t in given]
        with torch.no_grad():
            x_hat, *code = sae._Autoencode.forward(context, *given)
        context.g = torch.empty_like(x_hat)
        return (x_hat, *code)

    def backward(loss):
        for p, grad in zip(context.given, sae._Autoencode.backward(context, context.g)):
            if isinstance(p, Tensor) and p.requires_grad:
                assert grad.shape == p.shape and grad.device == p.device
                p.grad = grad.to(p.dtype)

    def to(model, x):
        for name, p in list(model.named_parameters()):
            setattr(model, name, torch.nn.Parameter(p.detach().to(x.device)))
        for name, buffer in list(model.named_buffers()):
            setattr(model, name, buffer.to(x.device))

    for target, stand_in in {
        "sae_helpers._Autoencode.apply": apply, "torch.Tensor.backward": backward, "torch.nn.Module.to": to,
        "torch._fused_adam_": lambda *_, **__: None, "torch.cuda.is_bf16_supported": lambda *_: True,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    }.items():  # fmt: skip
        monkeypatch.setattr(target, stand_in)
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@each
def test_step_on_cuda_stays_there_and_waits_for_nothing(changes, precision, on_fake_cuda):
    one = sae.Trainer(replace(PLAIN, **changes, precision=precision), torch.zeros(N, D_IN, device="cuda"), "cuda")
    one.update(one.x[:32])  # Adam and the scaler begin
    with NoWaiting():
        x_hat, fires, _ = one.update(one.x[:32])
    assert x_hat.device.type == fires.device.type == "cuda"
    assert x_hat.dtype == one.scale.dtype == one.use.dtype == torch.float32
    assert one.scaler.is_enabled() == (precision == "float16")


def test_adam_on_cuda_is_one_that_a_graph_holds(on_fake_cuda):
    for x in (torch.zeros(N, D_IN, device="cuda"), torch.zeros(N, D_IN, device="cuda", dtype=torch.float64)):
        for group in sae.Trainer(PLAIN, x, "cuda").optimizer.param_groups:
            assert group["capturable"] and group["fused"]
            assert group["lr"].device.type == "cuda" and group["lr"].dtype == torch.float32  # its kernel reads no other


def test_only_cuda_captures_and_a_subclass_may_refuse(on_fake_cuda):
    class ReadsTheStep(sae.Trainer):
        capture = False

    class Both(ReadsTheStep, cli.CapturedTrainer):
        pass

    x = torch.zeros(N, D_IN, device="cuda")
    assert cli.CapturedTrainer(PLAIN, x, "cuda").capture
    assert not Both(PLAIN, x, "cuda").capture
    assert not cli.CapturedTrainer(PLAIN, torch.zeros(N, D_IN)).capture


def test_mean_of_the_codes_does_not_overflow_in_low_precision():
    one = sae.Trainer(replace(PLAIN, selection_floor=0.5), 5000 * draw(N, D_IN))
    one.precision, x = torch.float16, one.x[:32]
    values = one.model.encode(x)[0].detach()
    assert values.max() < torch.finfo(torch.float16).max < values.sum((1, 2)).min()
    one.update(x)
    assert_close(one.scale, values.mean((1, 2)), rtol=0.01, atol=0)
    assert one.boost().isfinite().all()


# The step as a graph


class Graph(TorchDispatchMode):
    """A CUDA graph's ways on a CPU: what changes a tensor is recorded and not carried out, on a replay it is.

    A replay works on the tensors, and with the numbers, of the recording. What waits for the device ends it,
    and then leaving it raises too, and stays on the stream.
    """

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")
    stream = "the default stream"

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket._qualified_op_name in self.WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            self.calls.append((func, args, kwargs, None))
            return args[0] if func._schema.returns else None
        out = func(*args, **kwargs)
        if not func.is_view:
            self.calls.append((func, args, kwargs, out))
        return out

    def __exit__(self, kind, *more):
        super().__exit__(kind, *more)
        if kind:
            raise RuntimeError("operation failed due to a previous error during capture")

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for to, value in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(to, Tensor):
                    to.copy_(value)


@contextlib.contextmanager
def on_stream(stream):
    before, Graph.stream = Graph.stream, stream
    try:
        yield
    finally:
        Graph.stream = before


@contextlib.contextmanager
def capture(graph, stream):
    before, Graph.stream = Graph.stream, stream
    with graph:
        yield
    Graph.stream = before


@pytest.fixture
def graphs(monkeypatch):
    """Devices of the streams that were asked for; torch's ways to capture are those above."""
    devices = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: devices.append(device) or object())
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return devices


def captured(steps=0, scaled=False, **changes):
    """A trainer that captures, with learning rates in tensors, as on CUDA."""
    one = make(**changes)
    one.capture = True
    for group in one.optimizer.param_groups:
        group["lr"] = torch.zeros(())
    return to_step(with_scaler(one) if scaled else one, steps)


def with_scaler(one):
    one.scaler = torch.amp.GradScaler("cpu", growth_interval=4)
    return one


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@each
def test_captured_step_is_the_plain_one(changes, scaled, graphs):
    one, plain = captured(scaled=scaled, **changes), make(**changes)
    replayed, replay = [], Graph.replay
    Graph.replay = lambda graph: (replayed.append(one.step), replay(graph))
    try:
        to_step(one, STEPS)
    finally:
        Graph.replay = replay
    assert replayed == [step for step in range(4, STEPS) if step % 4 != 3]  # after three of full size
    assert_identical(one, to_step(with_scaler(plain) if scaled else plain, STEPS))
    assert bool(one.restarts) == one.recipe.monitor and graphs == [one.x.device]
    if one.recipe.selection_floor:
        assert (one.boost() > 0).any()


@pytest.mark.parametrize("step", [0, 2, 6])
def test_used_trainer_goes_on_from_another_state(step, graphs):
    used = captured(10, **FLOOR)
    used.restore(state_of(make(step, **FLOOR)))
    assert used.graph is None
    assert all(isinstance(group["lr"], Tensor) for group in used.optimizer.param_groups)  # its own, still
    assert_identical(to_step(used, STEPS), make(STEPS, **FLOOR))
    assert used.graph is not None


def test_state_brings_no_options_of_another_device(graphs):
    one = captured()
    for group in one.optimizer.param_groups:
        group["capturable"] = True
    one.restore(state_of(make(6)))
    assert all(group["capturable"] and isinstance(group["lr"], Tensor) for group in one.optimizer.param_groups)
    assert all(state["step"].dtype == torch.float32 for state in one.optimizer.state.values())
    plain = make()
    plain.restore(state_of(captured(6)))
    assert not any(group["capturable"] or isinstance(group["lr"], Tensor) for group in plain.optimizer.param_groups)
    assert_identical(to_step(plain, STEPS), make(STEPS))


class Asks(cli.CapturedTrainer):
    def losses(self, x, x_hat):
        assert super().losses(x, x_hat).sum().item() > 0  # waits for the device
        return super().losses(x, x_hat)


class AsksLate(cli.CapturedTrainer):
    """Between the scaler's `unscale_` and `update`, when it is of two minds."""

    def __init__(self, *given):
        super().__init__(*given)

        def wait(*_):
            self.weight.item()

        self.optimizer.register_step_pre_hook(wait)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("kind", [Asks, AsksLate])
def test_capture_that_fails_leaves_no_trace(kind, scaled, graphs, capsys):
    one, plain = captured(STEPS, kind=kind, scaled=scaled, **FLOOR), make(**FLOOR)
    printed = capsys.readouterr().err
    assert printed.count("\n") == printed.count("cannot be captured (operation not permitted when stream is") == 1
    assert one.graph is None and Graph.stream == "the default stream"
    assert_identical(one, to_step(with_scaler(plain) if scaled else plain, STEPS))
    assert captured(STEPS).graph is not None  # the next one is not disturbed


def test_capture_that_runs_out_of_memory_is_given_up(graphs, capsys, monkeypatch):
    @contextlib.contextmanager
    def fail(graph, stream):
        raise torch.OutOfMemoryError("CUDA out of memory.\nand more")
        yield

    monkeypatch.setattr(torch.cuda, "graph", fail)
    assert_identical(captured(STEPS), make(STEPS))
    assert capsys.readouterr().err.count("cannot be captured (CUDA out of memory.)") == 1


# Where CUDA is


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@each
def test_captured_step_on_cuda_is_the_plain_one(changes, precision):
    one, plain = (make(device="cuda", precision=precision, **changes) for _ in range(2))
    plain.capture = False
    one.run(progress=False)
    plain.run(progress=False)
    assert one.graph is not None and plain.graph is None
    assert_close(one.model.W, plain.model.W, rtol=1e-3, atol=1e-4)
    for name in ("mse", "rare_fraction"):
        assert_close(torch.tensor(one.history[name]), torch.tensor(plain.history[name]), rtol=1e-3, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("there, back", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_state_goes_on_on_another_device(there, back):
    one = make(device=back)
    one.restore(state_of(make(6, device=there)))
    to_step(one, STEPS)
    assert (one.graph is not None) == (back == "cuda")
    assert_close(one.model.W.cpu(), make(STEPS).model.W, rtol=0, atol=1e-4)


@needs_cuda
def test_capture_that_fails_on_cuda_leaves_no_trace(capsys):
    stream = torch.cuda.current_stream()
    one = make(STEPS, device="cuda", kind=Asks)
    assert one.graph is None and "cannot be captured" in capsys.readouterr().err
    assert torch.cuda.current_stream() == stream
    assert_close(one.model.W.cpu(), make(STEPS).model.W, rtol=0, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device_captures_too():
    one = make(STEPS, device="cuda:1")
    assert one.graph is not None and torch.cuda.current_device() == 0
    assert_close(one.model.W.cpu(), make(STEPS).model.W, rtol=0, atol=1e-4)


@needs_cuda
def test_float64_images_train_on_cuda():
    one = cli.CapturedTrainer(PLAIN, draw(N, D_IN).double(), "cuda")
    assert to_step(one, STEPS).graph is not None and one.model.W.dtype == torch.float64
