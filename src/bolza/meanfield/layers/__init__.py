"""What each kind of layer does to second moments of signals and gradients, and the walk through a graph of them.

`moment_maps` holds the vocabulary and the plain layers; `norm_maps`, `conv_maps`, `attention_maps`,
`recurrent_maps` and `cell_maps` one family each; `function_maps` what is called as a function; `virtual` runs
on sampled units what has no closed form; `walk` and `predict` go through a network.
"""

from bolza.meanfield.layers import (  # noqa: F401  (they register their layers)
    attention_maps,
    cell_maps,
    conv_maps,
    norm_maps,
    recurrent_maps,
)
