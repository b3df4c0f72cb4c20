"""The program with a guard: the interpreter reports every name that an unpickler looks up, and here that ends the process."""

import sys


def guard(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook; it cannot be taken off again."""
    if event == "pickle.find_class":
        raise RuntimeError(f"something was unpickled: {arguments}")


if __name__ == "__main__":
    sys.addaudithook(guard)
    from fedmpi.run import main

    sys.exit(main())
