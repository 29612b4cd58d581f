"""Tests of the harness itself, without a guest; `vm/lint` runs them."""
