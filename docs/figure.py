"""Draw the figure of the README: ``python docs/figure.py`` diagnoses the default network and treats it.

A 50-layer tanh network in PyTorch's default initialisation, on handwritten digits; a minute on two cores.
"""

from pathlib import Path

import torch

import bolza
from bolza.diagnosis import figures
from bolza.report import to_png

torch.manual_seed(0)
diagnosis = bolza.diagnose(bolza.models.mlp(depth=50, width=100), "digits")
figure = figures.gradient(diagnosis.facts["propagation"], diagnosis.treated.get("propagation"))
assert figure is not None
path = Path(__file__).parent / "images" / "gradient.png"
path.write_bytes(to_png(figure, dpi=130))
