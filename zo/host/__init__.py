"""Host kernels of the zeroth-order package."""
