"""Pickle what a worker is to run, or say clearly why that is not possible."""

from __future__ import annotations

import importlib
import pickle
import pickletools


def pickle_call(child_func: object, args: tuple[object, ...], *, has_main: bool) -> bytes:
    """Return the pickle of a function and its arguments; by cloudpickle, if that is installed, where pickle cannot.

    `has_main`: whether the process that unpickles has our `__main__` module.

    Raises:
        pickle.PicklingError: it cannot be pickled, or not be unpickled there.
    """
    call = (child_func, args)
    cause: Exception | None = None
    try:
        pickled = pickle.dumps(call, pickle.HIGHEST_PROTOCOL)
    except Exception as exc:  # PicklingError, AttributeError, TypeError, and whatever __reduce__ raises
        cause, problem = exc, f"cannot be pickled: {exc}"
    else:
        if has_main or not _refers_to_main(pickled):
            return pickled
        problem = "belong to __main__, which a spawned fork server does not have: preload '__main__', or use another module"
    try:
        cloudpickle = importlib.import_module("cloudpickle")
    except ImportError:
        raise pickle.PicklingError(
            f"child_func or its arguments {problem} (functions of modules can be pickled; "
            "cloudpickle, if it is installed, pickles the rest)"
        ) from cause
    try:
        return bytes(cloudpickle.dumps(call, pickle.HIGHEST_PROTOCOL))
    except Exception as exc:
        raise pickle.PicklingError(f"child_func or its arguments cannot be pickled, by cloudpickle either: {exc}") from exc


def _refers_to_main(pickled: bytes) -> bool:
    """Return whether unpickling looks something up in `__main__`. May be wrong on a text that happens to say so."""
    return b"__main__" in pickled and any(argument == "__main__" for _, argument, _ in pickletools.genops(pickled))
