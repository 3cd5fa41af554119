"""Runs Metal kernels on Linux: their unmodified source, executed on the CPU with every access
checked.

`emulator.MetalKernel` has the call signature of `mx.fast.metal_kernel`; `emulator.install` puts it
in MLX's place, so that a program's own launch code runs. `lint` refuses what Apple's compiler
would. What this can and cannot prove is written in README.md beside this file.
"""
