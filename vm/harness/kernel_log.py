"""The log of a guest's kernel, which has to be clean at the end of a test."""

from .guest import Guest

# Parts of a kernel log that mean trouble.
TROUBLE = (
    "BUG:",
    "WARNING:",
    "Oops",
    "possible recursive locking",
    "circular locking",
    "hung task",
    "blocked for more",
    "KASAN",
    "stale page cache",
    "suspicious RCU",
    "sleeping function",
)


def check_kernel_log(guest: Guest) -> None:
    """Fails if the kernel's log reports trouble."""
    lines = guest.output("dmesg").splitlines()
    for number, line in enumerate(lines):
        if any(word in line for word in TROUBLE):
            raise AssertionError("the guest's kernel says:\n" + "\n".join(lines[number : number + 30]))
