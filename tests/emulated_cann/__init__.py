"""The real torch_npu on a machine without a card: CANN's C interface, computed by the CPU."""
