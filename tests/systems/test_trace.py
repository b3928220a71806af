"""The traced graph computes what the network computes, and tracing leaves no trace."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from bolza.core.errors import ArgumentError, TraceError
from bolza.systems.exporter import export_graph
from bolza.systems.roles import is_guard
from bolza.systems.trace import _check, _export, trace, untouched


def replayed(traced, *args):
    """Run the graph by torch.fx itself, independently of this library's own runner."""
    return torch.fx.Interpreter(traced.graph_module).run(*args)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Everything(nn.Module):
    """Habits of real code that stop a plain symbolic trace."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("average", torch.zeros(4))
        self.extra = None

    def forward(self, x, scale=None):
        assert isinstance(x, torch.Tensor) and x.dim() == 2
        if x.shape[1] != 4:
            raise ValueError("wrong width")
        if scale is not None:
            x = x * scale
        h = Sign.apply(self.fc(x))
        with torch.no_grad():
            mean = h.mean(0, keepdim=True)
            self.average.mul_(0.9).add_(mean[0], alpha=0.1)
        h = h - mean
        h += torch.arange(x.shape[0], device=x.device)[:, None]
        h[:, 0] = 0
        h.relu_()
        self.extra = h.pow(2).mean()
        return F.dropout(h @ (self.weight / self.weight.norm()), 0.2, self.training)


def test_the_graph_has_the_output_and_the_gradients_of_the_network():
    net, x = Everything().eval(), torch.randn(5, 4, requires_grad=True)
    traced = trace(net, x)
    assert traced.kind == "fx" and traced.opaque == ()
    torch.testing.assert_close(replayed(traced, x), net(x))
    weights = torch.randn(5, 4)
    inputs = [x, net.weight]
    with torch.no_grad():
        net.average.zero_()
    own = torch.autograd.grad((net(x) * weights).sum(), inputs)
    _check(traced)  # straight-through and no_grad parts included; raises where gradients differ
    assert all(g.abs().sum() > 0 for g in own)


def test_tracing_leaves_the_network_as_it_was():
    net = Everything()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    generator = torch.get_rng_state()
    trace(net, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net.extra is None and net.training and net.fc.weight.grad is None
    assert set(net.__dict__) == set(Everything().__dict__)


def test_nodes_know_shapes_types_and_numbers():
    class Net(nn.Module):
        def forward(self, x):
            return x.view(x.size(0) * 2, -1).double()

    values = {node.name: node.meta["val"] for node in trace(Net(), torch.zeros(3, 4)).nodes}
    assert values["size"] == 3 and values["mul"] == 6
    assert values["view"].shape == (6, 2) and values["double"].dtype == torch.float64
    assert values["view"].device.type == "meta"


def test_roles_tell_data_from_sizes_and_constants():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * (2 * self.w) + torch.arange(x.shape[1]) + torch.rand_like(x)

    roles = {node.name: node.meta["role"] for node in trace(Net(), torch.zeros(3, 4), check=False).nodes}
    assert roles["w"] == roles["mul"] == "constant"
    assert roles["arange"] == "size"
    assert roles["rand_like"] == roles["add_1"] == "data"


def test_sizes_stay_free_unless_the_control_flow_depends_on_them():
    class Loop(nn.Module):
        def forward(self, x):
            total = x[:, 0]
            for t in range(1, x.shape[1]):
                total = total + x[:, t]
            return total

    traced = trace(Loop(), torch.randn(2, 3, 4))
    assert sum(is_guard(node) for node in traced.graph.nodes) == 1
    assert traced.accepts(torch.zeros(7, 3, 9))
    assert not traced.accepts(torch.zeros(2, 5, 4))
    x = torch.randn(5, 3, 2)
    torch.testing.assert_close(replayed(traced, x), x.sum(1))


def test_data_dependent_control_flow_is_refused_with_the_line_and_the_remedy():
    class Branching(nn.Module):
        def forward(self, x):
            if x.mean() > 0:
                return x
            return -x

    with pytest.raises(TraceError, match=r"Branching .*test_trace.py:\d+ `if x.mean\(\) > 0:`.*torch.where"):
        trace(Branching(), torch.randn(2, 2))

    class Counting(nn.Module):
        def forward(self, x):
            return x[: int(x.argmax())]

    with pytest.raises(TraceError, match="Python number"):
        trace(Counting(), torch.randn(4))


class Halting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        for _ in range(5):
            x = self.fc(x)
            if x.norm() < 1:
                break
        return x


def test_a_sub_module_that_cannot_be_read_becomes_one_operation():
    net = nn.Sequential(nn.Linear(3, 3), Halting(), nn.Linear(3, 2))
    x = torch.randn(4, 3)
    traced = trace(net, x)
    assert traced.opaque == ("1",)
    torch.testing.assert_close(replayed(traced, x), net(x))


def test_randomness_outside_torch_is_noticed():
    class Layerdrop(nn.Module):
        def forward(self, x):
            return x * random.random()

    with pytest.raises(TraceError, match="Python's or NumPy's"):
        trace(Layerdrop(), torch.ones(2, 2))


def test_dropout_by_hand_is_recorded_as_random():
    class DropPath(nn.Module):
        def forward(self, x):
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
            return x.div(0.5) * x.new_empty(shape).bernoulli_(0.5)

    traced = trace(DropPath(), torch.ones(64, 2))
    assert any(node.meta["random"] for node in traced.nodes)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_layers_are_read_without_moving_their_buffers(wrap):
    net = nn.Sequential(wrap(nn.Linear(3, 3)), nn.Tanh())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    trace(net, torch.randn(4, 3))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_stacks_of_torch_are_looked_into(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).train(training)
    calls = [node for node in trace(net, torch.randn(2, 5, 8)).nodes if node.op == "call_module"]
    assert [node.target for node in calls] == ["layers.0", "layers.1", "layers.2"]


def test_the_exporter_reads_the_same_function():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
    x = torch.randn(4, 1, 8, 8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with untouched(net, (x,)):
        traced = _export(net, (x,))
        _check(traced)
        assert traced.kind == "export"
    y = torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(replayed(traced, y), net(y))
    assert {n.meta["role"] for n in traced.nodes if n.op == "get_attr"} == {"constant"}
    net.load_state_dict(before)


def test_the_exporter_takes_over_where_the_symbolic_trace_stops():
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            if type(x) is not torch.Tensor:  # a test that no proxy can pass
                raise TypeError("give a tensor")
            return self.fc(x).tanh()

    net, x = Strided(), torch.randn(4, 3)
    with pytest.raises(TypeError):
        net([1.0])

    class FakeAware(Strided):
        def forward(self, x):
            if type(x).__name__ == "ExampleProxy":
                raise TypeError("give a tensor")
            return self.fc(x).tanh()

    traced = trace(FakeAware(), x)
    assert traced.kind == "export"
    torch.testing.assert_close(replayed(traced, x), traced.module(x))


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ArgumentError, match="module is of type function"):
        trace(lambda x: x, torch.zeros(1))
    with pytest.raises(ArgumentError, match="example is str"):
        trace(nn.Identity(), "a batch")


def test_a_forward_that_fails_on_the_example_says_how():
    with pytest.raises(TraceError, match="mat1 and mat2"):
        trace(nn.Sequential(nn.Linear(3, 3)), torch.zeros(2, 4))


def test_export_graph_is_pure():
    net = nn.BatchNorm1d(3)
    graph_module = export_graph(net, (torch.randn(4, 3),))
    graph_module(torch.randn(4, 3))
    assert int(net.num_batches_tracked) == 0 and torch.equal(net.running_mean, torch.zeros(3))


class WritesThroughAView(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.a, self.b, self.write = nn.Linear(4, 4), nn.Linear(4, 2), write
        nn.init.constant_(self.a.bias, 5.0)  # so that no clamp acts on the example

    def forward(self, x):
        h = self.a(x)
        self.write(h)
        return self.b(torch.tanh(h))


def clamp_a_part(h):
    part = h[:, :2]
    part.clamp_(min=0.0)


def relu_a_part(h):
    F.relu(h[:, 1:], inplace=True)


@pytest.mark.parametrize("write", [clamp_a_part, relu_a_part])
def test_a_write_through_a_view_is_not_lost_where_the_example_does_not_show_it(write):
    net = WritesThroughAView(write)
    traced = trace(net, 0.1 * torch.randn(3, 4))
    other = 100 * torch.randn(6, 4)
    torch.testing.assert_close(replayed(traced, other), net(other))
    # nor does the graph overwrite what it is given: its operations are functional
    assert not any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in traced.nodes
    )


def test_halves_that_do_not_overlap_may_be_overwritten_apart():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            left, right = self.a(x)[:, :2], x[:, 2:]
            left.mul_(2.0)
            return left + right

    assert trace(Halves(), torch.randn(3, 4)).kind == "fx"


@pytest.mark.parametrize("transform", ["vmap", "grad", "Tensor"])
def test_a_symbol_never_reaches_compiled_code_that_would_crash(transform):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x)
            if transform == "vmap":
                return torch.func.vmap(torch.tanh)(h)
            if transform == "grad":
                return torch.func.grad(lambda v: v.square().sum())(h)
            return torch.Tensor(h) + h

    net, x = Functional(), torch.randn(3, 4)
    try:
        torch.testing.assert_close(replayed(trace(net, x), x), net(x))
    except TraceError as error:
        assert "cannot be read" in str(error)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_looked_into(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, x.tanh(), use_reentrant=reentrant)

    traced = trace(Checkpointed(), torch.randn(3, 4))
    assert traced.kind == "fx" and {"block.0", "block.2"} <= {str(node.target) for node in traced.nodes}


def test_an_object_that_hides_its_tensors_is_refused():
    @dataclasses.dataclass
    class Box:
        value: torch.Tensor

    class Boxed(nn.Linear):
        def forward(self, x):
            return Box(super().forward(x))

    with pytest.raises(TraceError, match="type Box with tensors in it"):
        trace(Boxed(3, 2), torch.randn(4, 3))


def test_a_compiled_network_is_refused_by_name():
    with pytest.raises(ArgumentError, match="_orig_mod"):
        trace(torch.compile(nn.Linear(2, 2), backend="eager"), torch.ones(3, 2))


def test_layerdrop_is_noticed_whatever_the_dice_say():
    class Layerdrop(nn.Linear):
        def forward(self, x):
            return super().forward(x) if random.random() < 2.0 else x  # the branch is always the same

    state = random.getstate()
    with pytest.raises(TraceError, match="draw them with torch"):
        trace(Layerdrop(2, 2), torch.ones(2, 2))
    assert random.getstate() == state
