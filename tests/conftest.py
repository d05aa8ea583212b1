"""Eight virtual CPU devices, set before JAX starts; a persistent compilation cache keeps repeated runs short.

The shapes and dtypes that the numeric rooms annotate are checked at every call (while tracing, that is).
"""

import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compiling, and most of that is LLVM optimising programs that run once, on a few numbers.
# `XLA_FLAGS= python -m pytest` tests them as users run them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "exprl_jax_test_cache"))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# No example fails by the clock: machines are busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

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

# They compile models or start programs; what the other files test is the quick tier, but for what is marked `long`.
LONG = """
    attention calibration calls checkpoint code_verifier compile_check costs custom_verifier decoder diagnostics
    distill dry_run evaluate extending families folder function_judge gguf_file gpu_benchmark grader_agreement hints
    hlo judge judge_training leaks likelihood logprobs lora lora_run losses main mesh notebook package packed paged
    probe processes resume rl_run run_evaluation run_models same_scores sampler sandbox scoring sft show slots
    supervised tpu_scripts train update wave
""".split()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        marked = item.get_closest_marker("slow") or item.get_closest_marker("long")
        if item.path.stem.removeprefix("test_") not in LONG and marked is None:
            item.add_marker("quick")
