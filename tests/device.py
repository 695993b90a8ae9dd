"""A stand-in for CuPy: NumPy's functions on an array type that refuses to meet a NumPy array.

What runs under it keeps all arrays on the "device", moves them only through `get` and `asarray`, and
calls no np. function on them; the numbers are NumPy's to the bit. Every way back to the host is counted,
and a fused chain may do no more than `cupy.fuse` can trace.
"""

import types

import numpy as np


class DeviceArray:
    """An array that NumPy cannot see; scalars are taken, as CuPy takes them."""

    __hash__ = None
    transfers = 0  # to the host, each of which waits for the device
    fusing = False

    def __init__(self, host):
        self._host = host

    def get(self):
        return np.array(self.moved())

    def moved(self):
        only_elementwise("a transfer")
        DeviceArray.transfers += 1
        return self._host

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        only_elementwise(name)
        if name in ("item", "tolist", "tobytes"):
            return getattr(self.moved(), name)
        value = getattr(self._host, name)
        return wrapped(value) if callable(value) else on_device(value)

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion of a device array to a NumPy array")

    def __array_ufunc__(self, ufunc, method, *operands, **kwargs):
        if any(isinstance(x, np.generic) for x in operands):  # the operator of a scalar on the left
            return wrapped(ufunc)(*operands)
        raise TypeError(f"np.{ufunc.__name__} met a device array")

    def __array_function__(self, function, *args, **kwargs):
        raise TypeError(f"np.{function.__name__} met a device array")

    def __getitem__(self, key):
        only_elementwise("indexing")
        return on_device(self._host[on_host(key)])

    def __setitem__(self, key, value):
        self._host[on_host(key)] = on_host(value)

    def __len__(self):
        return len(self._host)

    def __int__(self):
        return int(self.moved())

    def __float__(self):
        return float(self.moved())

    def __bool__(self):
        return bool(self.moved())

    def __copy__(self):
        return DeviceArray(self._host.copy())

    def __deepcopy__(self, memo):
        return DeviceArray(self._host.copy())


def only_elementwise(what):
    if DeviceArray.fusing:
        raise TypeError(f"{what} in a fused chain")


def on_device(value):
    if isinstance(value, tuple):
        return tuple(on_device(v) for v in value)
    return DeviceArray(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value


def on_host(value):
    """Unwrapped; a NumPy array among the operands is a leak."""
    if isinstance(value, DeviceArray):
        return value._host
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("a NumPy array met a device array")
    if isinstance(value, list | tuple):
        return type(value)(on_host(v) for v in value)
    return value


def wrapped(function):
    def call(*args, **kwargs):
        return on_device(function(*on_host(args), **{k: on_host(v) for k, v in kwargs.items()}))

    return call


def operator(name):
    def call(self, *others):
        result = getattr(self._host, name)(*on_host(others))
        return self if name.startswith("__i") and name != "__invert__" else on_device(result)

    return call


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
for name in BINARY:
    for form in (name, f"r{name}", f"i{name}"):
        setattr(DeviceArray, f"__{form}__", operator(f"__{form}__"))
for name in ("neg", "abs", "invert", "lt", "le", "eq", "ne", "gt", "ge"):
    setattr(DeviceArray, f"__{name}__", operator(f"__{name}__"))


def ufunc(function):
    call = wrapped(function)
    call.reduceat, call.at = wrapped(function.reduceat), wrapped(function.at)
    return call


def entry(value):
    if isinstance(value, np.ufunc):
        return ufunc(value)
    if not callable(value) or isinstance(value, type):
        return value
    call = wrapped(value)

    def unfused(*args, **kwargs):
        only_elementwise(value.__name__)
        return call(*args, **kwargs)

    return unfused


def fuse(chain):
    """Positional arrays, scalars and None of one dtype; what is computed from them is elementwise."""

    def call(*operands):
        if DeviceArray.fusing:  # a chain within a chain
            return chain(*operands)
        if len({on_host(x).dtype for x in operands if x is not None}) != 1:
            raise TypeError(f"operands of several dtypes in {chain.__name__}")
        DeviceArray.fusing = True
        try:
            return chain(*operands)
        finally:
            DeviceArray.fusing = False

    return call


namespace = types.SimpleNamespace(**{k: entry(v) for k, v in vars(np).items() if not k.startswith("_")})
namespace.linalg = types.SimpleNamespace(**{k: entry(v) for k, v in vars(np.linalg).items() if k[0] != "_"})
namespace.ndarray = DeviceArray
namespace.fuse = fuse
namespace.asarray = lambda a, dtype=None: DeviceArray(  # from the host, which is the way in
    np.array(a._host if isinstance(a, DeviceArray) else a, dtype=dtype)
)
