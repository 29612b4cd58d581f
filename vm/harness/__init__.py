"""The VM harness: guest kernels, an initramfs, QEMU, the daemon, and commands in the guest."""
