"""The Triton kernels behind ``vtc.ops``. Nothing here is imported before a tensor needs it."""
