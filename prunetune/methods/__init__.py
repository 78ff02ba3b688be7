"""Mask methods: masks that are learnt, stay fixed, move during training, or close gradually."""
