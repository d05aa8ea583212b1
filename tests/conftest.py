"""Eight virtual CPU devices, set before JAX starts; a persistent compilation cache keeps repeated runs short.

The shapes and dtypes that the numeric rooms annotate are checked at every call (while tracing, that is).
"""

import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "exprl_jax_test_cache"))

import jax  # noqa: E402
import jaxtyping  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# records.py is left out: JAX rebuilds its pytrees through `__init__` with leaves that are not arrays.
ANNOTATED = (
    "learning.advantages",
    "learning.distillation",
    "learning.logprobs",
    "learning.losses",
    "learning.supervised",
    "learning.update",
    "model.attention",
    "model.decoder",
    "reward.scoring",
    "rollout.sampling",
)
jaxtyping.install_import_hook([f"exprl_jax.{name}" for name in ANNOTATED], "beartype.beartype")
