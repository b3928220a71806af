"""Where a deep network can be trained, from its activation and two variances alone.

Ordered: inputs become indistinguishable and gradients vanish. Chaotic: neighbours separate and gradients
explode. On the line between them depth is free.
"""

import torch

import bolza

tanh, bias_var = torch.nn.Tanh(), 0.05
print(
    f"critical weight variance at bias variance {bias_var}: "
    f"{float(bolza.meanfield.critical_weight_var(tanh, bias_var=bias_var)):.6f}"
)
print("weight variance   regime    factor a layer (chi_1)   depth scale of correlations")
for weight_var in (1.0, 1.5, 1.760955, 2.0, 3.0):
    point = bolza.meanfield.fixed_point(tanh, weight_var=weight_var, bias_var=bias_var)
    print(
        f"{weight_var:15.3f}   {str(point.regime):8s}  {float(point.chi_1):22.4f}   {float(point.xi_c):10.1f}"
    )
