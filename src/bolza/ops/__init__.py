"""Numerics without control theory: pure functions of tensors."""
