"""Eight virtual CPU devices, set before JAX starts; a persistent compilation cache keeps repeated runs short."""

import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "exprl_jax_test_cache"))

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
