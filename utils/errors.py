"""What a user can mend, ``InputError``, and what is the machine's fault, ``out_of_memory``."""

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and how to mend it.

    Scripts print it on stderr and exit with code 2 (``utils.cli.run``).
    """


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device, or this machine, has no memory left."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(sign in str(error) for sign in OUT_OF_MEMORY)
    )
