"""Codecs: encode and decode tensors in few bits."""
