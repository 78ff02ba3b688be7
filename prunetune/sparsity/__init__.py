"""The mathematics of sparse networks, as functions of tensors."""
