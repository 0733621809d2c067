"""The Triton kernels against transformers' deformable attention."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton comes with torch for CUDA")


@needs_triton
def test_the_triton_kernels_and_their_gradients_are_transformers() -> None:
    """In a fresh process, because Triton's interpreter must be enabled before anything imports triton."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-m", "tests.model.triton_interpreted"], cwd=root, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_kernels_compile_for_cards_that_are_not_here(capability: int, kind: str) -> None:
    """The interpreter accepts what Triton's compiler rejects; aligned pointers choose other code than others."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from m2f_trainer.model import deformable_triton

    constants = {"heads": 8, "levels": 3, "points": 4, "dim": 32, "breadth": 32, "block": 32}
    for kernel in (deformable_triton._forward, deformable_triton._backward):
        pointers = [name for name in kernel.arg_names if name not in {*constants, "length"}]
        half = {"value", "output", "grad"}
        types = {name: f"*{kind if name in half else 'fp32'}" for name in pointers} | {"sizes": "*i32", "length": "i32"}
        types |= dict.fromkeys(constants, "constexpr")
        for aligned in (pointers, [*pointers, "length"]):
            attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
            signature = {name: types[name] for name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
            assert compile_kernel(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernels_are_the_reference_on_this_device() -> None:
    from m2f_trainer.model.deformable_attention import check_equal
    from m2f_trainer.model.deformable_grid import attend_grid, attend_grid_backward
    from m2f_trainer.model.deformable_triton import attend_triton, attend_triton_backward

    kernels, reference = (attend_triton, attend_triton_backward), (attend_grid, attend_grid_backward)
    check_equal(kernels, reference, torch.device("cuda"))


@pytest.mark.skipif(find_spec("triton") is not None, reason="triton is there")
def test_the_missing_package_is_named() -> None:
    with pytest.raises(ImportError, match="triton, which comes with torch for CUDA, isn't installed"):
        import m2f_trainer.model.deformable_triton  # noqa: F401
