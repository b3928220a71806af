"""A command line in this process, and a folder with networks and data that are wrong in every way."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

USER_CODE = """
import torch
from torch import nn
from torch.nn import functional as F
from bolza.data import Dataset

def net(): return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
def raises(): raise RuntimeError("no such file: weights.pt")
def no_module(): return 7
def half(): return net().half()

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)
    def forward(self, x): return self.used(x)
def unused(): return Unused()

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
    def forward(self, x): return self.a(x) if bool(x.detach().sum() > 0) else self.b(x)
def branching(): return Branching()

class Explodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x):
        raise KeyError("hidden_state")
def explodes(): return Explodes()

def inputs(n=32): return torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
def good(): return inputs(), torch.arange(32) % 3
def nan():
    x = inputs(); x[5, 2] = float("nan"); return x, torch.arange(32) % 3
def labels(): return inputs(), torch.arange(32) % 7
def one(): return inputs(1), torch.zeros(1, dtype=torch.long)
def empty(): return iter(())
def vector_loss(outputs, targets): return F.cross_entropy(outputs, targets, reduction="none")
def square(h): return h * torch.tanh(h)
def bad_activation(h): raise ZeroDivisionError("in the activation")
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with ``user_code.py`` in it."""
    (tmp_path / "user_code.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delitem(sys.modules, "user_code", raising=False)
    yield tmp_path
    sys.modules.pop("user_code", None)


@pytest.fixture
def bolza(home: Path) -> Callable[..., Result]:
    """Run the command line: ``bolza("phase", "--at", "1,0")``."""
    from bolza.cli import app

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="bolza")

    return run
