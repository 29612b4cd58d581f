"""Tests that `vm/test` runs."""
