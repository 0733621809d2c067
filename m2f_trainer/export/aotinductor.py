"""AOTInductor: compile a torch program to machine code for CPUs, in one package.

The machine's C++ compiler makes it, for the instructions of its CPU. A package does not check its inputs: other sizes
or types than those in model.json give wrong results without an error. (Its own checks, `AOTI_RUNTIME_CHECK_INPUTS=1`
in torch 2.13, refuse batches of one image.)
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from m2f_trainer.errors import MissingPackageError


def check_compiler() -> None:
    """Check that there is a C++ compiler.

    Raises:
        MissingPackageError: there is none.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        tried = ", ".join(filter(None, config.cpp.cxx))
        raise MissingPackageError(
            f"--format aotinductor compiles C++, and no compiler works here (tried: {tried}): install one, such as by "
            "apt-get install g++, or name it by the environment variable CXX"
        ) from error


def compile_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile a program to the package `path`, whose name ends with .pt2."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(path))


def supported_machines() -> str:
    """The machines that a package compiled here runs on."""
    return (
        f"{platform.system()} on {platform.machine()}, CPUs with all instructions of the one that compiled it "
        f"({torch.backends.cpu.get_cpu_capability()}); torch {torch.__version__} (other versions may refuse it)"
    )
