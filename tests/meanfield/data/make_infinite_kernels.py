"""Writes infinite_kernels.npz: kernels of an independent library, as reference values for the tests.

The library, neural-tangents 0.6.5, needs an old JAX that does not install beside a current torch. Run this in an
environment of its own (Python 3.11):

    pip install "jax==0.4.23" "jaxlib==0.4.23" "numpy<2" "scipy<1.12" "neural-tangents==0.6.5" scikit-learn
    python make_infinite_kernels.py

Everything in float64. The inputs are scikit-learn's digits divided by 16. Of the 1000 × 1000 kernels of the
depth-10 network every 50th row and column is kept, and the sums of all rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


def main() -> None:
    """Compute and write; the imports are here so that the file can be read without the library."""
    import jax
    import neural_tangents as nt
    from jax import numpy as jnp
    from neural_tangents import stax
    from sklearn.datasets import load_digits

    jax.config.update("jax_enable_x64", True)
    images = load_digits().images / 16
    flat = images.reshape(len(images), 64)
    small = images[:10, :, :, None]
    w, b = 2**0.5, 0.1  # standard deviations

    dense = lambda width=1, std=w, bias=b, **kw: stax.Dense(width, W_std=std, b_std=bias, **kw)  # noqa: E731
    conv = lambda size=3, strides=1, padding="SAME", width=1, **kw: stax.Conv(  # noqa: E731
        width, (size, size), (strides, strides), padding, W_std=w, b_std=b, **kw
    )

    def fully_connected(depth, act, **options):
        layers = [dense(**options)]
        for _ in range(depth):
            layers += [act(), dense(**options)]
        return stax.serial(*layers)

    def block(*inner):
        return stax.serial(
            stax.FanOut(2), stax.parallel(stax.Identity(), stax.serial(*inner)), stax.FanInSum()
        )

    networks = {
        "erf_4": (fully_connected(4, stax.Erf), flat[:20]),
        "leaky_3": (fully_connected(3, lambda: stax.LeakyRelu(0.2)), flat[:20]),
        "gelu_3": (fully_connected(3, stax.Gelu), flat[:20]),
        "standard_relu_2": (
            stax.serial(
                dense(50, parameterization="standard"),
                stax.Relu(),
                dense(40, parameterization="standard"),
                stax.Relu(),
                dense(1, parameterization="standard"),
            ),
            flat[:20],
        ),
        "residual_relu": (
            stax.serial(dense(), block(stax.Relu(), dense()), block(stax.Relu(), dense()), stax.Relu(), dense()),
            flat[:20],
        ),
        "layer_norm_relu": (
            stax.serial(dense(), stax.LayerNorm(eps=1e-5), stax.Relu(), dense(), stax.LayerNorm(eps=1e-5), stax.Relu(),
                        dense()),
            flat[:20],
        ),
        "conv_flatten": (
            stax.serial(conv(), stax.Relu(), conv(), stax.Relu(), conv(), stax.Relu(), stax.Flatten(), dense()), small,
        ),
        "conv_pool": (
            stax.serial(conv(), stax.Relu(), conv(), stax.Relu(), conv(), stax.Relu(), stax.GlobalAvgPool(), dense()),
            small,
        ),
        "conv_strides": (
            stax.serial(conv(strides=2), stax.Relu(), conv(2, padding="VALID"), stax.Relu(), stax.Flatten(), dense()),
            small,
        ),
        "conv_circular": (
            stax.serial(conv(padding="CIRCULAR"), stax.Erf(), conv(padding="CIRCULAR"), stax.Erf(),
                        stax.GlobalAvgPool(), dense()),
            small,
        ),
        "conv_average_pool": (
            stax.serial(conv(), stax.Relu(), stax.AvgPool((2, 2), (2, 2)), conv(), stax.Relu(), stax.Flatten(),
                        dense()),
            small,
        ),
        "conv_residual_pool": (
            stax.serial(conv(), block(stax.Relu(), conv()), block(stax.Relu(), conv()), stax.Relu(),
                        stax.GlobalAvgPool(), dense()),
            small,
        ),
    }  # fmt: skip

    out = {}
    _, _, kernel = fully_connected(10, stax.Relu)
    both = kernel(jnp.asarray(flat[:1000]), None, ("nngp", "ntk"))
    for name, k in (("nngp", both.nngp), ("ntk", both.ntk)):
        out[f"digits_relu_10/{name}"] = np.asarray(k)[::50, ::50]
        out[f"digits_relu_10/{name}_sums"] = np.asarray(k).sum(1)
    for key, ((_, _, kernel), x) in networks.items():
        both = kernel(jnp.asarray(x), None, ("nngp", "ntk"))
        out[f"{key}/nngp"], out[f"{key}/ntk"] = np.asarray(both.nngp), np.asarray(both.ntk)
    print(nt.__version__, jax.__version__, {key: value.shape for key, value in out.items()})  # noqa: T201
    np.savez_compressed(Path(__file__).with_name("infinite_kernels.npz"), **out)


if __name__ == "__main__":
    main()
