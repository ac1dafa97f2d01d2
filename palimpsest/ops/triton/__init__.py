"""The portable GPU tier: Triton kernels. `register` holds the torch side and is all that may be imported early."""
