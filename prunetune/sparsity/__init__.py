"""The maths of sparse networks: tensors in, tensors out."""
