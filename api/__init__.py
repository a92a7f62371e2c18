"""Headrace: fine-tune models as large as your disk."""
