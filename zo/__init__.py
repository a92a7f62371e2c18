"""Zeroth-order fine-tuning."""
