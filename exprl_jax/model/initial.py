"""Parameters of a model that is trained from scratch: normal, each matrix scaled by its number of inputs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from exprl_jax.architecture import Architecture
from exprl_jax.model.decoder import Params, Transformer


def deviations(arch: Architecture) -> dict[str, float]:
    """The standard deviation of every matrix at the start, by its name among the parameters.

    A product of n inputs keeps the size of what it reads with 1 / √n.  What o and down give is added to the residual,
    2L times in all, so that theirs are smaller by √(2L) (GPT-2's rule).  Embedding and unembedding have 1 / √D: with
    hidden states of size 1 (they are normed), so are the first logits, tied or not.
    """
    inputs = {name: math.prod(dims) for name, (dims, _) in arch.products.items()}
    inputs |= {"o": inputs["o"] * 2 * arch.layers, "down": inputs["down"] * 2 * arch.layers}
    return {name: n**-0.5 for name, n in {**inputs, "embed": arch.width, "unembed": arch.width}.items()}


def fan_in_params(transformer: Transformer, key: jax.Array, dtype: str) -> Params:
    """Parameters to start from: matrices normal with `deviations`, norms 1, biases 0.

    Drawn in float32 and then cast.  They depend on the key and the architecture alone: not on dtype, mesh or
    arrangement of layers.
    """
    scale = deviations(transformer.arch)

    def draw(name, layer, shape):
        own = jax.random.fold_in(jax.random.fold_in(key, list(scale).index(name)), layer)
        return jax.random.normal(own, shape, jnp.float32) * scale[name]

    def fill(path, x):
        *above, name = (part.key for part in path)
        if name not in scale:
            return (jnp.ones if name.endswith("norm") else jnp.zeros)(x.shape, dtype)
        if above == ["layers"]:
            drawn = jax.vmap(lambda layer: draw(name, layer, x.shape[1:]))(jnp.arange(x.shape[0]))
        else:
            drawn = draw(name, int(above[0].removeprefix("layer_")) if above else 0, x.shape)
        return drawn.astype(dtype)

    return jax.tree_util.tree_map_with_path(fill, transformer.abstract_params(dtype))
