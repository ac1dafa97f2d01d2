"""The delta memory on a CPU, in C: delta_memory.c is the kernel, jit.py compiles it, register.py makes it a backend."""
