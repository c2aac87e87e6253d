"""From a name to a module: `package.module:factory`, or `net.py:Net` from a file's source."""

import difflib
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from layercast.models.foreign.trust import Trust

_loading = threading.Lock()


class FactoryError(ValueError):
    """Code could not be imported, or what it made is no module; the text names it and says why."""


class NameFault(FactoryError):
    """There is no such module or factory, or it takes other arguments: what was asked for is wrong, not the code."""


@dataclass(frozen=True)
class Code:
    """A source file: its plain name, its content, and the path that tracebacks show."""

    name: str
    content: bytes
    path: Path


def build(architecture: str, arguments: Mapping[str, Any], trust: Trust, code: Code | None = None) -> nn.Module:
    """Import what `architecture` names, from `code` where it is given, call it, and return the module it makes.

    Nothing is imported unless `trust` allows it, and nothing is called but a class or function that was defined in
    code which it allows. FactoryError says what is not allowed, missing, or raised.
    """
    if refusal := trust.refusal(architecture, code is not None):
        raise FactoryError(refusal)
    name, _, attributes = architecture.partition(":")
    home = _module_of(code) if code else _imported(name)
    factory = _attribute(home, attributes, architecture)
    _check_factory(factory, home, architecture, trust)
    _check_arguments(factory, arguments, architecture)
    try:
        made = factory(**arguments)
    except (Exception, SystemExit) as error:
        raise FactoryError(f"{architecture} raised {_said(error)}") from error
    if not isinstance(made, nn.Module):
        raise FactoryError(f"{architecture} returned {type(made).__name__}; want an nn.Module")
    return made


def _imported(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise NameFault(
                f"there is no module {error.name!r} here; install its package in this environment, or give the file "
                f"that defines it"
            ) from error
        raise FactoryError(f"importing {name} raised {_said(error)}") from error
    except (Exception, SystemExit) as error:
        raise FactoryError(f"importing {name} raised {_said(error)}") from error


def _module_of(code: Code) -> types.ModuleType:
    """Run a source file as a module of a name that only its content gives, once a process."""
    name = f"layercast_code_{sha256(code.content).hexdigest()[:16]}"
    with _loading:
        if name in sys.modules:
            return sys.modules[name]
        module = types.ModuleType(name)
        module.__file__ = str(code.path)
        sys.modules[name] = module  # dataclasses and torch look a class's module up there
        try:
            exec(compile(code.content, str(code.path), "exec"), module.__dict__)  # noqa: S102 trusted, see `build`
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception | SystemExit):
                raise
            hint = ""
            if isinstance(error, ModuleNotFoundError):
                hint = "; the file must stand alone: it can import installed packages only"
            raise FactoryError(f"running {code.name} raised {_said(error)}{hint}") from error
    return module


def _attribute(home: types.ModuleType, attributes: str, architecture: str) -> Any:
    found: Any = home
    for attribute in attributes.split("."):
        if not attribute.isidentifier() or attribute.startswith("__") or not hasattr(found, attribute):
            known = [name for name in dir(found) if not name.startswith("_")]
            near = difflib.get_close_matches(attribute, known, n=3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise NameFault(f"{architecture}: there is no {attribute!r} in it{hint}")
        found = getattr(found, attribute)
    return found


def _check_factory(factory: Any, home: types.ModuleType, architecture: str, trust: Trust) -> None:
    """Refuse what is no factory, and code that only happens to be within reach, such as `os.system` in a package."""
    if isinstance(factory, nn.Module):
        raise NameFault(f"{architecture} is a module already; want its class, or a function that returns one")
    is_class = inspect.isclass(factory)
    if is_class and not issubclass(factory, nn.Module):
        raise NameFault(f"{architecture} is a class, but no nn.Module")
    if not is_class and not inspect.isroutine(factory):
        raise NameFault(f"{architecture} is a {type(factory).__name__}; want a class or a function")
    defined = getattr(factory, "__module__", None) or "another place"
    package = architecture.partition(".")[0].partition(":")[0]
    is_near = defined == home.__name__ or (architecture in trust.entries and defined.partition(".")[0] == package)
    if not is_near and not trust.trusts_module(defined):
        name = getattr(factory, "__qualname__", "it")
        raise NameFault(f"{architecture} is defined in {defined}, which is not trusted by this; name {defined}:{name}")


def _check_arguments(factory: Callable[..., Any], arguments: Mapping[str, Any], architecture: str) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # written in C: the call itself will tell
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(map(str, signature.parameters.values())) or "nothing"
        raise NameFault(f"{architecture}: {error}; it takes ({takes}), give them with --arguments") from None


def _said(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:400]
