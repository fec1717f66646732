"""The parts of ``benchmarks/gpu_suite.py``: what is measured (selection, kernels, e2e), how (timing), against what
(floors, published), on which models (models), and how it is written down (rows).
"""
