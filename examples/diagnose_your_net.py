"""Diagnose a network of your own, before any training.

Anything that is an `nn.Module` with a loss will do; here a plain network, too deep for its initialisation.
"""

import torch
from torch import nn

import bolza

torch.manual_seed(0)
data = bolza.data.digits()
layers = [nn.Linear(64, 60), nn.Tanh()]
for _ in range(13):
    layers += [nn.Linear(60, 60), nn.Tanh()]
model = nn.Sequential(*layers, nn.Linear(60, 10))

diagnosis = bolza.diagnose(model, (data.train_x[:128], data.train_y[:128]), loss=nn.functional.cross_entropy)
for finding in diagnosis.findings:
    if finding.verdict in ("bad", "warn"):
        print(f"[{finding.verdict}] {finding.text}")
        if finding.remedy:
            print(f"       remedy: {finding.remedy}")
