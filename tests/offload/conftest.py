"""Lets the tests of this folder import the helpers beside them."""

from __future__ import annotations
