import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.data import diabetes, digits, digits_images, text
from bolza.models import NAMES, activation_module, gpt, make, mlp, resnet, vit
from bolza.training import default_loss

DATA = {"digits": digits(), "images": digits_images(), "diabetes": diabetes(), "text": text(length=16)}


@pytest.mark.parametrize(
    ("name", "data"),
    [(n, d) for n in NAMES if n != "gpt" for d in ("digits", "images")]
    + [("mlp", "diabetes"), ("gru", "diabetes"), ("gpt", "text"), ("mlp", "text")],
)
def test_every_network_reads_its_data_and_every_parameter_gets_a_gradient(name, data):
    dataset = DATA[data]
    model = make(name, dataset)
    outputs = model(dataset.train_x[:4])
    dataset.check_outputs(outputs, dataset.train_y[:4])
    default_loss(dataset.task)(outputs, dataset.train_y[:4]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_depth_of_the_perceptron_counts_its_linear_layers(depth):
    assert sum(isinstance(m, nn.Linear) for m in mlp(depth, 5).modules()) == depth


@pytest.mark.parametrize("depth", [4, 6, 8, 10])
def test_depth_of_the_residual_network_counts_layers_on_the_longest_path(depth):
    net = resnet(depth)
    layers = [m for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "skip" not in n]
    assert len(layers) == depth


def test_a_causal_network_does_not_see_later_tokens():
    model = gpt(vocabulary=11, depth=2, width=16, length=8, heads=2)
    tokens = torch.randint(11, (1, 8))
    other = tokens.clone()
    other[0, 5:] = (other[0, 5:] + 1) % 11
    a, b = model(tokens), model(other)
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-6) and not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)


def test_a_vision_transformer_without_positions_does_not_know_the_order_of_patches():
    model = vit(depth=2)
    nn.init.zeros_(model.positions)
    x = torch.randn(3, 1, 8, 8)
    assert torch.allclose(model(x), model(x.roll(2, -1)), atol=1e-5)


def test_a_tied_head_starts_near_the_loss_of_guessing():
    data = DATA["text"]
    model = gpt(vocabulary=data.num_classes, length=16, tied=True)
    loss = default_loss("language")(model(data.train_x[:64]), data.train_y[:64])
    assert abs(loss.item() - torch.tensor(float(data.num_classes)).log().item()) < 1.0


def test_an_unrolled_cell_equals_the_recurrent_layer():
    model = make("gru", DATA["digits"])
    layer = nn.GRU(8, 64, batch_first=True)
    layer.load_state_dict({f"{k}_l0": v for k, v in model.cell.state_dict().items()})
    x = DATA["digits"].train_x[:5]
    assert torch.allclose(model(x), model.head(layer(x.view(5, 8, 8))[0][:, -1]), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("lenet", DATA["digits"]), "'lenet' is not known"),
        (lambda: make("gpt", DATA["digits"]), "task is classification: choose mlp"),
        (lambda: make("resnet", DATA["text"]), "choose gpt or mlp"),
        (lambda: make("cnn", DATA["diabetes"]), "reads images"),
        (lambda: make("mlp", DATA["digits"], activation="sine"), "activation='sine' is not known"),
        (lambda: make("gru", DATA["digits"], depth=7), "depth=7 does not divide"),
        (lambda: mlp(depth=0), "depth=0"),
        (lambda: vit(width=10, heads=4), "width=10 is not a multiple"),
        (lambda: activation_module(nn.Tanh()), "makes no module"),
    ],
)
def test_impossible_networks_are_refused_by_name(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
