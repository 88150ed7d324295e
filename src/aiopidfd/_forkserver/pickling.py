"""Pickle the function and the arguments of a worker."""

from __future__ import annotations

import importlib
import pickle
import pickletools


def pickle_call(child_func: object, args: tuple[object, ...], *, has_main: bool) -> bytes:
    """Return the pickle of a function and its arguments. Use cloudpickle, if it is installed, for what pickle cannot pickle.

    `has_main`: whether the process that unpickles it has the `__main__` module of this process.

    Raises:
        pickle.PicklingError: they cannot be pickled, or the other process could not unpickle them.
    """
    call = (child_func, args)
    cause: Exception | None = None
    try:
        pickled = pickle.dumps(call, pickle.HIGHEST_PROTOCOL)
    except Exception as exc:  # PicklingError, AttributeError, TypeError, or any exception of __reduce__()
        cause, problem = exc, f"cannot be pickled: {exc}"
    else:
        if has_main or not _refers_to_main(pickled):
            return pickled
        problem = "belong to __main__, which a spawned fork server does not have (preload '__main__' or use another module)"
    try:
        cloudpickle = importlib.import_module("cloudpickle")
    except ImportError:
        raise pickle.PicklingError(
            f"child_func or its arguments {problem} (use functions at the top level of a module, or install cloudpickle)"
        ) from cause
    try:
        return bytes(cloudpickle.dumps(call, pickle.HIGHEST_PROTOCOL))
    except Exception as exc:
        raise pickle.PicklingError(f"child_func or its arguments cannot be pickled by cloudpickle either: {exc}") from exc


def _refers_to_main(pickled: bytes) -> bool:
    """Return whether unpickling needs `__main__`. The string "__main__" among the arguments gives True, too."""
    return b"__main__" in pickled and any(argument == "__main__" for _, argument, _ in pickletools.genops(pickled))
