"""Write tanh_depth_scales.json: ξ_c of tanh at σ_b² = 0.05 in 30 digits, by mpmath.

    python tests/meanfield/data/tanh_depth_scales.py        (about ten minutes)

Nothing of this library is used. Means over one Gaussian and over two are trapezoid sums in every
direction, whose error is that of e^(-2π d/h) with d ≥ 1 the distance to the poles of tanh and h = 0.1:
10⁻²⁷. The variance and the correlation are roots found by mpmath; the equation of the correlation is
divided by 1 - c, so that its root below 1 stands alone.
"""

import json
from pathlib import Path

from mpmath import exp, findroot, log, mp, mpf, pi, re, sqrt, tanh

mp.dps = 30
BIAS, STEP, REACH = mpf("0.05"), mpf("0.1"), 115
Z = [k * STEP for k in range(-REACH, REACH + 1)]
W = [STEP * exp(-z * z / 2) / sqrt(2 * pi) for z in Z]


def mean(f):
    """E f(z), z standard normal."""
    return sum(w * f(z) for z, w in zip(Z, W, strict=True))


def mean_of_pair(f, q, c):
    """E f(u) f(v) for an f that is odd or even: twice the half plane."""
    root, s, total = sqrt(q), sqrt(1 - c * c), mpf(0)
    for k in range(REACH, 2 * REACH + 1):
        x = Z[k]
        inner = sum(w * f(root * (c * x + s * y)) for y, w in zip(Z, W, strict=True))
        total += W[k] * f(root * x) * inner * (1 if k == REACH else 2)
    return total


def slope(h):
    """Derivative of tanh."""
    return 1 - tanh(h) ** 2


def depth_scale(weight):
    """q*, c* and ξ_c."""
    q = findroot(lambda q: weight * mean(lambda z: tanh(sqrt(q) * z) ** 2) + BIAS - q, mpf("0.6"))
    chi_1 = weight * mean(lambda z: slope(sqrt(q) * z) ** 2)
    if chi_1 <= 1:
        return q, mpf(1), -1 / log(chi_1)
    second = mean(lambda z: tanh(sqrt(q) * z) ** 2)

    def excess(c):
        return weight * (second - mean_of_pair(tanh, q, c)) / (q * (1 - c)) - 1

    c = re(findroot(excess, (mpf("0.3"), mpf("0.6")), tol=mpf(10) ** -40))  # a step beyond 1 made it complex
    return q, c, -1 / log(weight * mean_of_pair(slope, q, c))


def main():
    """All fifty points."""
    rows = []
    for k in range(50):
        weight = 1 + mpf(3 * k) / 49
        q, c, xi = depth_scale(weight)
        rows.append({"k": k, "q": mp.nstr(q, 20), "c": mp.nstr(c, 20), "xi_c": mp.nstr(xi, 20)})
    record = {
        "what": "tanh, bias_var = 0.05, weight_var = 1 + 3k/49",
        "made_by": Path(__file__).name,
        "digits": mp.dps,
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
