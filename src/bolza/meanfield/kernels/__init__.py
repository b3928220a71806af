"""Kernels of wide networks: Gaussian processes and tangent kernels, of infinite width and of a given network."""

from bolza.meanfield.kernels.empirical import empirical_ntk
from bolza.meanfield.kernels.infinite import InfiniteKernels, infinite_kernels, nngp, ntk
from bolza.meanfield.kernels.kernel import Kernel, KernelCall
from bolza.meanfield.kernels.kernel_maps import kernel_map
from bolza.meanfield.kernels.linearized import Linearized, linearized, two_layer_gram
from bolza.meanfield.kernels.posterior import Posterior, gp_posterior, ntk_posterior

__all__ = [
    "InfiniteKernels",
    "Kernel",
    "KernelCall",
    "Posterior",
    "Linearized",
    "empirical_ntk",
    "gp_posterior",
    "infinite_kernels",
    "kernel_map",
    "linearized",
    "nngp",
    "ntk",
    "ntk_posterior",
    "two_layer_gram",
]
