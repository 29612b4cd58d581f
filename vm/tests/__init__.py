"""Tests with a guest, which `vm/test` runs."""
