"""What `vm/clients` runs."""
